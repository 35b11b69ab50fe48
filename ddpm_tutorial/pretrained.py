"""Loading networks that come with weights: what ``UNet`` and the two classifiers share."""

import contextlib
import io
from pathlib import Path
from typing import ClassVar

from safetensors import SafetensorError


class Pretrained:
    """Stands before ``PyTorchModelHubMixin`` among a network's bases; ``shipped`` is the folder of its weights."""

    shipped: ClassVar[Path]

    @classmethod
    def from_pretrained(cls, folder_or_hub_name: str | Path | None = None, **options):
        """The network saved in a folder or on the Hugging Face hub (default: the shipped weights), in evaluation mode.

        Reads ``config.json`` and ``model.safetensors``; ``options`` are those of the hub mixin. ValueError where the
        files are damaged or do not fit each other.
        """
        place = str(cls.shipped if folder_or_hub_name is None else folder_or_hub_name)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints where it loads from
                return super().from_pretrained(place, strict=True, **options)
        except (SafetensorError, RuntimeError, TypeError, AttributeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{place} is damaged or holds no {cls.__name__} of this package: {reason}") from error
