"""Fashion-MNIST from the hub, from IDX files, or from the sample shipped in the package; and any other images, from
IDX files, a folder or the hub (chapter 5).

Fashion-MNIST: Xiao, Rasul, Vollgraf, 2017, arXiv:1708.07747; images MIT licence, Zalando SE.
"""

import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .files import asking_hub
from .pictures import HUB_SOURCE, classes_of, from_folder, from_hub, inside, square, to_tensor

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
HUB_NAME = "zalando-datasets/fashion_mnist"  # on the hub
NAMED_SOURCES = ("hub", "sample")  # what is no folder, even beside one of that name
SOURCE_VARIABLE = "DDPM_TUTORIAL_DATA"  # the environment variable that sets the default source
SAMPLE_FOLDER = Path(__file__).parent / "sample"
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
MERSENNE_WORDS = 624  # of 32 bits: the state of the CPU's generator
# MNIST, KMNIST and others have files of the same names, sizes and labels: only the bytes say whose they are.
FASHION_SHA256 = {  # of all pixels, then all labels
    "train": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
    "test": "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
}


class _Columns(NamedTuple):
    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]


class ImageData(_Columns):
    """Images (N, C, H, W) uint8, labels (N,) int64, and the name of each label (None and () without labels)."""

    left_out = ""  # what else the source holds, in words

    def describe(self) -> str:
        """What was found, in a line that a person can check."""
        count, channels, height, width = self.images.shape
        names = ", ".join([*self.class_names[:10], *["…"] * (len(self.class_names) > 10)])
        classes = f"{len(self.class_names)} class{'es' if len(self.class_names) != 1 else ''} ({names})"
        return (
            f"{count} image{'s' if count != 1 else ''} of {height}×{width} in {'grey' if channels == 1 else 'colour'}, "
            f"values {self.images.min()} … {self.images.max()}, {'without labels' if self.labels is None else classes}"
            + (f"; left out: {self.left_out}" if self.left_out else "")
        )


def load_fashion_mnist(split: str = "train", source: str | Path | None = None) -> ImageData:
    """Fashion-MNIST as ``ImageData``.

    ``split`` is "train" (60,000 images) or "test" (10,000). ``source`` is "hub" (Hugging Face, through
    ``datasets``), "sample" (5,000 and 1,000 real images, shipped in the package), or a folder with the four IDX
    files of the original download, gzipped or not, also as Kaggle and torchvision name and lay them. Without one, the
    environment variable DDPM_TUTORIAL_DATA decides, else "hub". No source replaces another: what cannot be read, or is
    not Fashion-MNIST, raises ValueError, FileNotFoundError or ConnectionError.
    """
    source = chosen_source(source)
    if split not in IDX_FILES:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if source == "sample":
        images, labels = _read_sample(split)
    elif source == "hub":
        images, labels = _read_hub(split)
    else:
        images, labels = _read_idx_folder(Path(source), split)
        if not _is_fashion(images, labels, split):
            raise ValueError(
                f"{source}: these IDX files are not those of Fashion-MNIST's {split} split; load_images reads them, "
                "and `ddpm-tutorial train --data`"
            )
    return ImageData(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long(), CLASS_NAMES)


def load_images(
    source: str | Path | None = None,
    split: str = "train",
    image_size: int | None = None,
    channels: int | None = None,
) -> ImageData:
    """Fashion-MNIST, or any other images, as ``ImageData``.

    ``source`` is one of ``load_fashion_mnist``'s; a folder of other IDX files, whose classes are then named by their
    numbers; a data set on the hub, "owner/name" or "owner/name:CONFIGURATION"; or a folder of images: one sub-folder a
    class, or none for images without labels. Where it has sub-folders train, test and valid (or training, Testing, val,
    …), these are the splits, else all of it is "train". ``image_size`` scales the shorter side to it and cuts out the
    middle square; ``channels`` is 1 (grey) or 3 (colour). Without them images stay as they are, and must all be alike.
    Transparent images are put on white, 16 bits scaled to 8; what would be misread raises ValueError.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"image channels must be 1 (grey) or 3 (colour), got {channels}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"the image size must be at least 1, got {image_size}")
    source = chosen_source(source)
    folder = Path(source)
    if source in NAMED_SOURCES:
        data = load_fashion_mnist(split, source)
    elif folder.is_dir() and _find_idx(folder):
        pixels, values = _read_idx_folder(folder, split)
        labels, names = classes_of(values.tolist())
        names = CLASS_NAMES if _is_fashion(pixels, values, split) else names
        data = ImageData(torch.from_numpy(pixels)[:, None], labels, names)
    else:
        if folder.is_dir():
            found = from_folder(folder, split)
        elif _may_be_on_hub(source):
            found = from_hub(str(source), split)
        else:
            raise _no_folder(source)
        data = ImageData(to_tensor(found, image_size, channels), found.labels, found.class_names)
        data.left_out = found.left_out
        return data
    images = data.images
    if image_size is not None and images.shape[2:] != (image_size, image_size):
        images = square(image_size)(images)
    return ImageData(images if channels != 3 else images.repeat(1, 3, 1, 1), data.labels, data.class_names)


def chosen_source(source: str | Path | None) -> str | Path:
    """The source, or where it is None that of the environment variable, or "hub"."""
    if source == "":
        raise ValueError(f"the source is empty. {SOURCES}")
    return source if source is not None else os.environ.get(SOURCE_VARIABLE) or "hub"


SOURCES = (
    "A source is 'hub' or 'sample' (Fashion-MNIST), a folder of IDX files or of images, or a data set on the hub, as "
    "owner/name"
)


def _may_be_on_hub(source: str | Path) -> bool:
    """Whether it is owner/name, and no mistyped path: no folder here has the owner's name."""
    return bool(HUB_SOURCE.fullmatch(str(source))) and not Path(source).parent.is_dir() and not Path(source).exists()


def _no_folder(source: str | Path) -> OSError:
    if Path(source).exists():
        return NotADirectoryError(f"{source} is a file, not a folder (unpack an archive first). {SOURCES}")
    return FileNotFoundError(f"no such folder: {source}. {SOURCES}")


# ---------------------------------------------------------------------------------------- sources of IDX files
def _read_sample(split: str) -> tuple[np.ndarray, np.ndarray]:
    from pyarrow import parquet  # slow to import, so only where it is used

    table = parquet.read_table(SAMPLE_FOLDER / f"{split}.parquet")
    images = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()]
    return np.stack(images), np.array(table["label"].to_pylist())


def _read_hub(split: str) -> tuple[np.ndarray, np.ndarray]:
    import datasets

    try:
        with asking_hub():
            dataset = datasets.load_dataset(HUB_NAME, split=split)
            return np.stack([np.asarray(image) for image in dataset["image"]]), np.asarray(dataset["label"])
    except Exception as error:  # of two libraries and a network: of any kind
        raise ConnectionError(
            f"the hub's {HUB_NAME} could not be read ({type(error).__name__}). The other sources need no "
            f"network: 'sample' (shipped with the package), or a folder of Fashion-MNIST's IDX files. Choose one "
            f"with source=, --data, or the environment variable {SOURCE_VARIABLE}."
        ) from error


def _is_fashion(images: np.ndarray, labels: np.ndarray, split: str) -> bool:
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() == FASHION_SHA256[split]


def _read_idx_folder(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    if split not in IDX_FILES:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if not folder.is_dir():
        raise _no_folder(folder)
    found = _find_idx(folder)
    for kind, name in zip(("images", "labels"), IDX_FILES[split], strict=True):
        if (split, kind) not in found:
            raise FileNotFoundError(f"{folder} holds neither {name} nor {name}.gz")
    images, labels = read_idx(found[split, "images"], ndim=3), read_idx(found[split, "labels"], ndim=1)
    if len(images) != len(labels) or images.size == 0:
        raise ValueError(
            f"{folder}: there must be images with one label each; got images of shape {images.shape} and "
            f"{len(labels)} labels"
        )
    return images, labels


IDX_NAME = re.compile(r"(?:.+[-_.])?(train|t10k|test)[-_.](?:(images)[-_.]idx3|(labels)[-_.]idx1)[-_.]ubyte(?:\.gz)?")


def _find_idx(folder: Path) -> dict[tuple[str, str], Path]:
    """The IDX files of ("train" or "test", "images" or "labels"): in the folder, else in one of its folders (Kaggle's
    have the file's name), else in a folder raw of one (torchvision's). ValueError where there are several to choose."""
    folders, _ = inside(folder)
    found: dict[tuple[str, str], Path] = {}
    for places in ([folder], folders, [path / "raw" for path in folders if (path / "raw").is_dir()]):
        here: dict[tuple[str, str], dict[str, Path]] = {}
        for path in (path for place in places for path in inside(place)[1]):
            if match := IDX_NAME.fullmatch(path.name.lower()):
                key = "train" if match[1] == "train" else "test", match[2] or match[3]
                here.setdefault(key, {}).setdefault(re.sub(r"\.gz$", "", str(path), flags=re.I), path)
        for key, paths in here.items():
            if key in found:
                continue
            if len(paths) > 1:
                raise ValueError(f"{folder} holds several IDX files of {key[0]} {key[1]}: {' and '.join(paths)}; "
                                 "give a folder with one of them as the source")  # fmt: skip
            (found[key],) = paths.values()
    return found


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
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in [−1, 1], got {images.dtype}")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def batch_indices(num_images: int, batch_size: int, seed: int, first_step: int = 0) -> Iterator[Tensor]:
    """Endless batches of indices, (batch_size,) each: epochs of a fresh permutation, incomplete batches dropped.

    The stream depends on ``seed`` alone, so starting at ``first_step`` continues it exactly.
    """
    if not 1 <= batch_size <= num_images:
        raise ValueError(f"batch_size must lie in 1 … {num_images} (the number of images), got {batch_size}")
    epoch, start = divmod(first_step, num_images // batch_size)
    while True:
        order = torch.randperm(num_images, generator=seeded_generator(seed, 0, epoch))  # no step has number 0
        yield from order[: num_images // batch_size * batch_size].view(-1, batch_size)[start:]
        epoch, start = epoch + 1, 0


def seeded_generator(seed: int, *parts: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one part of the randomness of a run: ``seeded_generator(seed, step)``, say. Each ``seed`` in
    0 … 2**128 − 1 with each tuple of parts in 0 … 2**32 − 1 has a stream of its own, by NumPy's ``SeedSequence``;
    ValueError for others. 64 bits of it seed a GPU's generator. The CPU's would keep 32 of them (two of 50,000 images
    are then alike in one case of four), so all its state is filled, as NumPy fills that of its own Mersenne Twister."""
    for name, value, bits in [("seed", seed, 128), *(("part of a seed", part, 32) for part in parts)]:
        if not isinstance(value, int | np.integer) or not 0 <= value < 2**bits:
            raise ValueError(f"a {name} must be an integer in 0 … 2**{bits} − 1, got {value!r}")
    sequence = np.random.SeedSequence(seed, spawn_key=parts)
    generator = torch.Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
    if generator.device.type == "cpu":
        words = sequence.generate_state(MERSENNE_WORDS)
        words[0] = 2**31  # of this word the twister reads one bit; and it must not be 0 in all of them
        state = generator.get_state()  # bytes: 24 of the seed and the position, 8 for each word, the rest
        state.numpy()[24 : 24 + 8 * MERSENNE_WORDS].view(np.uint64)[:] = words
        generator.set_state(state)
    return generator
