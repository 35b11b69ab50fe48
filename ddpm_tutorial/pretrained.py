"""Loading networks that come with weights: what ``UNet`` and the two classifiers share."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from huggingface_hub import hf_hub_download
from safetensors.torch import load_file


@contextlib.contextmanager
def reading(path: str | Path, expected: str) -> Iterator[None]:
    """Whatever is wrong with a file's contents becomes a ValueError of one line that names it."""
    try:
        yield
    except (OSError, FloatingPointError):
        raise
    except Exception as error:  # a damaged file finds its own way to fail
        reason = " ".join(str(error).split())
        if reason.startswith(str(path)):
            raise
        if not reason or isinstance(error, LookupError):
            reason = f"{type(error).__name__} {reason}"
        raise ValueError(f"{path} is damaged or holds no {expected}: {reason:.300}") from error


class Pretrained:
    """Stands before ``PyTorchModelHubMixin`` among a network's bases; ``shipped`` is the folder of its weights."""

    shipped: ClassVar[Path]

    @classmethod
    def from_pretrained(cls, folder_or_hub_name: str | Path | None = None, **options):
        """The network saved in a folder or on the Hugging Face hub (default: the shipped weights), in evaluation mode.

        Reads ``config.json`` and ``model.safetensors``, and never a pickle; ``options`` are those of
        ``huggingface_hub.hf_hub_download``. ValueError where the files are damaged or do not fit each other,
        FloatingPointError where a weight is not finite.
        """
        place = cls.shipped if folder_or_hub_name is None else folder_or_hub_name
        config, weights = (_find(place, name, options) for name in ("config.json", "model.safetensors"))
        with reading(place, f"{cls.__name__} of this package"):
            model = cls(**json.loads(config.read_text(encoding="utf-8")))
            tensors, own = load_file(weights), model.state_dict()
            for name, value in tensors.items():
                if name in own and value.is_floating_point() != own[name].is_floating_point():
                    raise TypeError(f"{name} is of {value.dtype}, not {own[name].dtype}")
                if not value.isfinite().all():
                    raise FloatingPointError(f"{weights}: {name} is not finite")
            model.load_state_dict(tensors)
        return model.eval()


def _find(place: str | Path, name: str, options: dict) -> Path:
    if Path(place).is_dir():
        if not (Path(place) / name).is_file():
            raise FileNotFoundError(f"no checkpoint in {place}: it holds no {name}")
        return Path(place) / name
    owner, _, rest = str(place).partition("/")
    if not rest or "/" in rest or Path(owner).exists():
        raise FileNotFoundError(f"no such folder: {place} (nor is it a name on the hub, owner/name)")
    return Path(hf_hub_download(str(place), name, **options))
