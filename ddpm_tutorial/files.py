"""Files, safely: written whole or not at all, held by one process, read with a clear word on what is wrong in them.

A network is two files, ``config.json`` (what it is built with) and ``model.safetensors`` (its weights), in a folder or
on the Hugging Face hub. Nothing is ever unpickled.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock, Timeout
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SHIPPED_WEIGHTS = Path(__file__).parent / "weights"  # the checkpoint that comes with the package
LOCK_FILE = ".lock"  # held while a run writes to its folder; one that a killed run leaves behind locks nothing
ASIDE = ".writing-"  # the prefix of what is being written; a killed run leaves it behind, the next one writes over it


# ------------------------------------------------------------------------------------------------ reading
@contextlib.contextmanager
def reading(path: str | Path, expected: str) -> Iterator[None]:
    """Whatever is wrong with a file's contents becomes a ValueError of one line that names it."""
    try:
        yield
    except (OSError, FloatingPointError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file finds its own way to fail
        reason = " ".join(str(error).split())
        if reason.startswith(str(path)):
            raise
        if not reason or isinstance(error, LookupError):
            reason = f"{type(error).__name__} {reason}"
        raise ValueError(f"{path} is damaged or holds no {expected}: {reason:.300}") from error


@contextlib.contextmanager
def asking_hub() -> Iterator[None]:
    """A question to the hub is asked twice at most, quietly; the library asks six times, in 23 s and twelve lines."""
    from huggingface_hub.utils import http_backoff, logging

    level, options = logging.get_verbosity(), getattr(http_backoff, "__kwdefaults__", None) or {}
    before = dict(options)
    logging.set_verbosity_error()
    options["max_retries"] = 1  # of questions; downloads have their own retries
    try:
        yield
    finally:
        logging.set_verbosity(level)
        options.update(before)


# ------------------------------------------------------------------------------------------------ writing
@contextlib.contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A path beside ``out`` to write to; it takes the place of ``out`` when all went well, else it goes."""
    aside = out.with_name(ASIDE + out.name)
    try:
        yield aside
        moved(aside, out)
    except SafetensorError as error:  # what it raises where a file cannot be written
        raise OSError(str(error)) from error
    finally:
        aside.unlink(missing_ok=True)


def moved(path: Path, target: Path) -> None:
    """``path`` in the place of ``target``, its contents on the disk before its name is."""
    with path.open("r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())
    os.replace(path, target)


def check_writable(out: Path) -> None:
    """OSError where ``written_aside`` could not write ``out``: better before the work than after."""
    aside = out.with_name(ASIDE + out.name)
    try:
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise type(error)(f"nothing can be written to {out}: {error.strerror}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder: ValueError where another process does. The system lets go of it when the process ends, in
    whatever way."""
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another run is writing to {folder}: wait for its end, or choose another --out") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file; there releasing it does
            (folder / LOCK_FILE).unlink()
        lock.release()


# ------------------------------------------------------------------------------------------------ networks
class Pretrained:
    """A base of networks. ``config`` is what the constructor takes, ``shipped`` the folder of the shipped weights."""

    shipped: ClassVar[Path]
    config: dict[str, Any]

    def contents(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What its two files hold."""
        return self.config, self.state_dict()

    @classmethod
    def of_contents(cls, config: dict[str, Any], tensors: dict[str, Tensor]):
        return filled(cls(**config), tensors)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``; ``from_pretrained`` reads them."""
        folder, (config, tensors) = Path(folder), self.contents()
        folder.mkdir(parents=True, exist_ok=True)
        with written_aside(folder / "config.json") as aside:
            aside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with written_aside(folder / "model.safetensors") as aside:
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, aside)

    @classmethod
    def from_pretrained(cls, folder_or_hub_name: str | Path | None = None, **options):
        """The network saved in a folder or on the Hugging Face hub (default: the shipped weights), in evaluation mode.

        ``options`` are those of ``huggingface_hub.hf_hub_download``, so a folder takes none. ValueError where it gets
        some, or the files are damaged or do not fit each other; FloatingPointError where a weight is not finite.
        """
        place = cls.shipped if folder_or_hub_name is None else folder_or_hub_name
        config, weights = (_found(place, name, options) for name in ("config.json", "model.safetensors"))
        with reading(place, f"{cls.__name__} of this package"):
            return cls.of_contents(json.loads(config.read_text(encoding="utf-8")), load_file(weights)).eval()


def filled(network: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The network with these weights; 16-bit ones become its own float32. FloatingPointError, TypeError or RuntimeError
    where they do not fit."""
    own = network.state_dict()
    for name, value in tensors.items():
        if name in own and value.is_floating_point() != own[name].is_floating_point():
            raise TypeError(f"{name} is of {value.dtype}, not {own[name].dtype}")
        if not value.isfinite().all():
            raise FloatingPointError(f"{name} in model.safetensors is not finite")
    network.load_state_dict(tensors)
    return network


def _found(place: str | Path, name: str, options: dict) -> Path:
    if Path(place).is_dir():
        if options:
            raise ValueError(f"{', '.join(options)}: for a download from the hub, and {place} is a folder")
        if not (Path(place) / name).is_file():
            raise FileNotFoundError(f"no checkpoint in {place}: it holds no {name}")
        return Path(place) / name
    owner, _, rest = str(place).partition("/")
    if not rest or "/" in rest or Path(owner).exists():
        raise FileNotFoundError(f"no such folder: {place} (nor is it a name on the hub, owner/name)")
    with asking_hub():
        return Path(hf_hub_download(str(place), name, **options))
