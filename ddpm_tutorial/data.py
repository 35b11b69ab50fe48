"""Fashion-MNIST from the hub, from IDX files, or from the sample shipped in the package (chapter 5).

Fashion-MNIST: Xiao, Rasul, Vollgraf, 2017, arXiv:1708.07747; images MIT licence, Zalando SE.
"""

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
HUB_NAME = "zalando-datasets/fashion_mnist"
SOURCE_VARIABLE = "DDPM_TUTORIAL_DATA"  # the environment variable that sets the default source
SAMPLE_FOLDER = Path(__file__).parent / "sample"
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class ImageData(NamedTuple):
    """Images (N, 1, 28, 28) uint8, labels (N,) int64, and the name of each label."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]


def load_fashion_mnist(split: str = "train", source: str | Path | None = None) -> ImageData:
    """Fashion-MNIST as ``ImageData``.

    ``split`` is "train" (60,000 images) or "test" (10,000). ``source`` is "hub" (Hugging Face, through
    ``datasets``), "sample" (5,000 and 1,000 real images, shipped in the package), or a folder with the four IDX
    files of the original download, gzipped or not. Without one, the environment variable DDPM_TUTORIAL_DATA
    decides, else "hub". No source replaces another: what cannot be read raises ValueError, FileNotFoundError or
    ConnectionError.
    """
    if split not in IDX_FILES:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    source = source if source is not None else os.environ.get(SOURCE_VARIABLE) or "hub"
    if source == "sample":
        images, labels = _read_sample(split)
    elif source == "hub":
        images, labels = _read_hub(split)
    else:
        images, labels = _read_idx_folder(Path(source), split)
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or len(images) == 0:
        raise ValueError(
            f"{source}: Fashion-MNIST has 28×28 images with one label each; "
            f"got images of shape {images.shape} and {len(labels)} labels"
        )
    if labels.max() >= len(CLASS_NAMES):
        raise ValueError(f"{source}: labels must lie in 0 … 9, got {labels.max()}")
    return ImageData(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long(), CLASS_NAMES)


# ------------------------------------------------------------------------------------------- the sources
def _read_sample(split: str) -> tuple[np.ndarray, np.ndarray]:
    from datasets import Dataset  # slow to import, so only where it is used

    return _to_arrays(Dataset.from_parquet(str(SAMPLE_FOLDER / f"{split}.parquet"), keep_in_memory=True))


def _read_hub(split: str) -> tuple[np.ndarray, np.ndarray]:
    from datasets import load_dataset

    try:
        return _to_arrays(load_dataset(HUB_NAME, split=split))
    except (OSError, RuntimeError) as error:  # datasets and huggingface_hub raise many kinds, all of them these
        raise ConnectionError(
            f"the hub's {HUB_NAME} could not be read ({type(error).__name__}). The other sources need no "
            f"network: 'sample' (shipped with the package), or a folder of Fashion-MNIST's IDX files. Choose one "
            f"with source=, --data, or the environment variable {SOURCE_VARIABLE}."
        ) from error


def _to_arrays(dataset) -> tuple[np.ndarray, np.ndarray]:
    images = np.stack([np.asarray(image) for image in dataset["image"]])
    return images, np.asarray(dataset["label"])


def _read_idx_folder(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no such folder: {folder}. A source is 'hub', 'sample', or a folder of Fashion-MNIST's IDX files"
        )
    images, labels = (_find_idx(folder, name) for name in IDX_FILES[split])
    return read_idx(images, ndim=3), read_idx(labels, ndim=1)


def _find_idx(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds neither {name} nor {name}.gz")


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """An IDX file of bytes with ``ndim`` dimensions, gzipped (by its content) or not, as a uint8 array.

    The format: two zero bytes, 8 (unsigned byte), the number of dimensions, each size as a big-endian 32-bit
    integer, the data. ValueError for anything else, and for a file that is cut short or too long.
    """
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: damaged or truncated gzip file ({error})") from error
    if data[:4] != bytes([0, 0, 8, ndim]):
        raise ValueError(
            f"{path}: not an IDX file of {ndim}-dimensional bytes: it begins with {data[:4].hex(' ') or 'nothing'}, "
            f"expected 00 00 08 {ndim:02x}"
        )
    if len(data) < 4 + 4 * ndim:
        raise ValueError(f"{path}: truncated in its header")
    shape = tuple(np.frombuffer(data, ">u4", ndim, offset=4).tolist())
    expected, got = int(np.prod(shape, dtype=object)), len(data) - 4 - 4 * ndim
    if got != expected:
        problem = "truncated" if got < expected else "too long"
        raise ValueError(f"{path}: {problem}: its header says {shape}, {expected} bytes, and {got} follow")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy()


# ------------------------------------------------------------------------------------ scaling and batches
def to_model_range(images: Tensor) -> Tensor:
    """uint8 grey levels 0 … 255 to float32 in [−1, 1]."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 (0 … 255), got {images.dtype}")
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [−1, 1] (values outside are clipped) to the nearest uint8 grey level."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def batch_indices(num_images: int, batch_size: int, seed: int, first_step: int = 0) -> Iterator[Tensor]:
    """Endless batches of indices, (batch_size,) each: epochs of a fresh permutation, incomplete batches dropped.

    The stream depends on ``seed`` alone, so starting at ``first_step`` continues it exactly.
    """
    if not 1 <= batch_size <= num_images:
        raise ValueError(f"batch_size must lie in 1 … {num_images} (the number of images), got {batch_size}")
    epoch, start = divmod(first_step, num_images // batch_size)
    while True:
        order = torch.randperm(num_images, generator=seeded_generator(seed, epoch))
        yield from order[: num_images // batch_size * batch_size].view(-1, batch_size)[start:]
        epoch, start = epoch + 1, 0


def seeded_generator(*seeds: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by several integers (a run's seed and a step, say), mixed so that neighbours differ."""
    mixed = np.random.SeedSequence(seeds).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(mixed))
