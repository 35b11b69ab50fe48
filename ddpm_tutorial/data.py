"""Fashion-MNIST from the hub, from IDX files, or from the sample shipped in the package; and any other images, from
a folder or the hub (chapter 5).

Fashion-MNIST: Xiao, Rasul, Vollgraf, 2017, arXiv:1708.07747; images MIT licence, Zalando SE.
"""

import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

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
    """Images (N, C, H, W) uint8, labels (N,) int64, and the name of each label (None and () without labels)."""

    images: Tensor
    labels: Tensor | None
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
    source = _or_default(source)
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


def load_images(
    source: str | Path | None = None,
    split: str = "train",
    image_size: int | None = None,
    channels: int | None = None,
) -> ImageData:
    """Fashion-MNIST, or any other images, as ``ImageData``.

    ``source`` is one of ``load_fashion_mnist``'s, a data set's name on the hub ("owner/name"), or a folder of images:
    one sub-folder a class, or none for images without labels; where it has sub-folders train and test, these are the
    splits, else all of it is "train". ``image_size`` scales the shorter side to it and cuts out the middle square;
    ``channels`` is 1 (grey) or 3 (colour). Without them images stay as they are, and must all be alike.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"image channels must be 1 (grey) or 3 (colour), got {channels}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"the image size must be at least 1, got {image_size}")
    source = _or_default(source)
    folder = Path(source)
    if source in ("hub", "sample") or any(_idx_paths(folder, name) for files in IDX_FILES.values() for name in files):
        images, labels, class_names = load_fashion_mnist(split, source)
        if image_size not in (None, 28):
            images = _square(image_size)(images)
        return ImageData(images if channels != 3 else images.repeat(1, 3, 1, 1), labels, class_names)
    if folder.is_dir():
        pictures, labels, class_names = _image_folder(folder, split)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        pictures, labels, class_names = _hub_images(str(source), split)
    else:
        raise FileNotFoundError(
            f"no such folder: {source}. A source is 'hub' or 'sample' (Fashion-MNIST), a folder of Fashion-MNIST's IDX "
            "files or of images, or a data set on the hub, as owner/name"
        )
    return ImageData(_to_tensor(pictures, image_size, channels), labels, class_names)


def _or_default(source: str | Path | None) -> str | Path:
    return source if source is not None else os.environ.get(SOURCE_VARIABLE) or "hub"


# ------------------------------------------------------------------------------------ Fashion-MNIST's sources
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
    for path in _idx_paths(folder, name):
        return path
    raise FileNotFoundError(f"{folder} holds neither {name} nor {name}.gz")


def _idx_paths(folder: Path, name: str) -> list[Path]:
    return [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]


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


# ------------------------------------------------------------------------------------------- other images
Pictures = Iterable[tuple[str, Callable[[], Image.Image]]]  # the name of each, and what opens it


def _image_folder(folder: Path, split: str) -> tuple[Pictures, Tensor | None, tuple[str, ...]]:
    from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

    def inside() -> tuple[list[str], list[Path]]:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        folders = [path.name for path in paths if path.is_dir()]
        return folders, [path for path in paths if path.suffix.lower() in IMG_EXTENSIONS and path.is_file()]

    folders, files = inside()
    if folders and not files and set(folders) <= {"train", "test", "val", "valid", "validation"}:
        if split not in folders:
            raise ValueError(f"{folder} has no split {split}; it has {', '.join(folders)}")
        folder = folder / split
        folders, files = inside()
    elif split != "train":
        raise ValueError(f"{folder} has no sub-folders train and {split}: all of it is the split train")
    if folders and files:
        raise ValueError(f"{folder} holds images beside sub-folders: it must be one sub-folder a class, or none")
    if not folders and not files:
        raise FileNotFoundError(f"{folder} holds neither {IDX_FILES['train'][0]} nor images, nor sub-folders of them")
    labels, class_names = None, ()
    if folders:
        found = ImageFolder(str(folder))
        files, labels = zip(*found.samples, strict=True)
        labels, class_names = torch.tensor(labels), tuple(found.classes)
    return [(str(path), lambda path=path: Image.open(path)) for path in files], labels, class_names


def _hub_images(name: str, split: str) -> tuple[Pictures, Tensor | None, tuple[str, ...]]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"there is no folder {name}, and the hub's could not be read: {reason}") from error
    columns = {kind: [c for c, f in dataset.features.items() if isinstance(f, kind)] for kind in
               (datasets.Image, datasets.ClassLabel)}  # fmt: skip
    if not columns[datasets.Image]:
        raise ValueError(f"{name} has no column of images; it has {', '.join(dataset.features)}")
    image, label = columns[datasets.Image][0], (columns[datasets.ClassLabel] or [None])[0]
    labels, class_names = None, ()
    if label is not None:
        labels, class_names = torch.tensor(dataset[label][:]), tuple(dataset.features[label].names)
        if labels.min() < 0:
            raise ValueError(f"{name}: the split {split} has images without a label")
    pictures = [(f"{name}, image {i}", lambda i=i: dataset[i][image]) for i in range(len(dataset))]
    return pictures, labels, class_names


def _to_tensor(pictures: Pictures, image_size: int | None, channels: int | None) -> Tensor:
    """Open, turn upright, scale and cut each picture; (N, C, H, W) uint8. ValueError names one that does not fit."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    images: list[Tensor] = []
    for name, open_picture in tqdm(pictures, unit="image", desc="reading", leave=False, disable=None):
        try:
            picture = ImageOps.exif_transpose(open_picture())
            grey = channels == 1 or channels is None and picture.mode in ("1", "L", "LA", "I", "I;16", "F")
            picture = picture.convert("L" if grey else "RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name} is no image that can be read: {error}") from error
        image = pil_to_tensor(_square(image_size)(picture) if image_size else picture)
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"images differ: {name} is {_shape(image)}, those before are {_shape(images[0])}; choose "
                "an image size (--image-size) or a number of channels (--image-channels) for all"
            )
        images.append(image)
    return torch.stack(images)


def _shape(image: Tensor) -> str:
    return f"{image.shape[1]}×{image.shape[2]} in {image.shape[0]} channel{'s' if image.shape[0] > 1 else ''}"


def _square(image_size: int):
    """Scale the shorter side to ``image_size`` and cut out the middle; of a PIL image, or of a tensor (…, H, W)."""
    from torchvision.transforms import v2

    resize = v2.Resize(image_size, v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(image_size)])


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
        order = torch.randperm(num_images, generator=seeded_generator(seed, 0, epoch))  # no step has number 0
        yield from order[: num_images // batch_size * batch_size].view(-1, batch_size)[start:]
        epoch, start = epoch + 1, 0


def seeded_generator(seed: int, *parts: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one part of the randomness of a run: ``seeded_generator(seed, step)``, say. Each ``seed`` in
    0 … 2**128 − 1 with each tuple of parts in 0 … 2**32 − 1 has a stream of its own, by 64 bits of NumPy's
    ``SeedSequence`` (of which a generator on the CPU keeps 32); ValueError for others."""
    for name, value, bits in [("seed", seed, 128), *(("part of a seed", part, 32) for part in parts)]:
        if not isinstance(value, int | np.integer) or not 0 <= value < 2**bits:
            raise ValueError(f"a {name} must be an integer in 0 … 2**{bits} − 1, got {value!r}")
    mixed = np.random.SeedSequence(seed, spawn_key=parts).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed))
