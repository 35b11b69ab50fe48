"""Other people's images: folders of image files, and data sets on the hub, as uint8 tensors (chapter 5).

What would be misread is refused with its name, never guessed.
"""

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from .files import asking_hub

ENDINGS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .avif .tif .tiff .pbm .pgm .ppm .pnm".split()
)  # fmt: skip
JUNK = ("__macosx", "@eadir", "thumbs.db", "desktop.ini")  # beside hidden names: no one's images or classes
SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "valid", "valid": "valid", "validation": "valid",
}  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "classes", "class_name", "category", "target", "targets", "y")
HUB_SOURCE = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::(.+))?")  # owner/name, or owner/name:CONFIGURATION


class Found(NamedTuple):
    """What a source holds: the name of each picture and what opens it; labels, class names; what is left out."""

    pictures: Sequence[tuple[str, Callable[[], Image.Image]]]
    labels: Tensor | None
    class_names: tuple[str, ...]
    left_out: str


def classes_of(values: Sequence[Hashable]) -> tuple[Tensor, tuple[str, ...]]:
    """Labels 0 … K−1 for K different values, and the names of these: the values themselves, sorted."""
    names = sorted(set(values))
    index = {name: i for i, name in enumerate(names)}
    return torch.tensor([index[value] for value in values]), tuple(map(str, names))


# ------------------------------------------------------------------------------------------------ folders
def inside(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files in a folder, by name, without hidden ones, systems' litter, and links that go round."""
    above = {str(path) for path in (folder.resolve(), *folder.resolve().parents)}
    entries = sorted(folder.iterdir(), key=lambda path: path.name)
    entries = [path for path in entries if not path.name.startswith(".") and path.name.lower() not in JUNK]
    entries = [path for path in entries if not path.is_symlink() or os.path.realpath(path) not in above]
    return [path for path in entries if path.is_dir()], [path for path in entries if not path.is_dir()]


def from_folder(folder: Path, split: str) -> Found:
    """A folder with one sub-folder a class, or none; or with such folders train, test and valid (or their like)."""
    others: Counter[str] = Counter()

    def look(folder: Path) -> tuple[list[Path], list[Path]]:
        folders, files = inside(folder)
        others.update(path.suffix.lower() or "none" for path in files if path.suffix.lower() not in ENDINGS)
        return folders, [path for path in files if path.suffix.lower() in ENDINGS]

    def listed(paths: list[Path]) -> str:
        return ", ".join([path.name for path in paths[:5]] + ["…"] * (len(paths) > 5))

    def left_out() -> str:
        count = sum(others.values())
        kinds = ", ".join(sorted(others)[:10])
        return f"{count} file{'s' if count > 1 else ''} with other endings ({kinds})" if others else ""

    folders, images = look(folder)
    splits = [path for path in folders if path.name.lower() in SPLITS]
    if splits:
        names = [SPLITS[path.name.lower()] for path in splits]
        if len(set(names)) < len(names) or len(splits) < len(folders) or images:
            beside = [path for path in folders if path not in splits] + images
            raise ValueError(
                f"{folder} has the splits {listed(splits)} beside {listed(beside) or 'each other'}: rename or move "
                "what is no split, or is one twice; or give one of them as the source"
            )
        wanted = SPLITS.get(split.lower(), split)
        if wanted not in names:
            raise ValueError(f"{folder} has no split {split}; it has {listed(splits)}")
        folder = splits[names.index(wanted)]
        folders, images = look(folder)
        if again := [path for path in folders if path.name.lower() in SPLITS]:
            raise ValueError(f"{folder} is a split and has the splits {listed(again)}: which is meant?")
    elif split != "train":
        raise ValueError(f"{folder} has no sub-folders train and {split}: all of it is the split train")
    if folders and images:
        raise ValueError(f"{folder} holds images beside sub-folders: it must be one sub-folder a class, or none")
    if not folders and not images:
        raise FileNotFoundError(
            f"{folder} holds neither train-images-idx3-ubyte nor images, nor sub-folders of them"
            + (f"; it has {left_out()}" if others else "")
        )
    if not folders:
        return Found(_openers(images), None, (), left_out())
    files: list[Path] = []
    values: list[str] = []
    for place in folders:
        deeper, images = look(place)
        if deeper:
            raise ValueError(
                f"{place} holds sub-folders ({listed(deeper)}), and a class is a folder of images: is the source one "
                "level deeper, or shall these images move up?"
            )
        if not images:
            has = f"has {left_out()}" if others else "is empty"
            raise ValueError(f"the class folder {place} holds no images ({has}): remove it")
        files += images
        values += [place.name] * len(images)
    return Found(_openers(files), *classes_of(values), left_out())


def _openers(files: list[Path]) -> list[tuple[str, Callable[[], Image.Image]]]:
    # Not by name: Pillow would map an uncompressed TIFF, and maps those wrongly that are to be turned.
    return [(str(path), lambda path=path: Image.open(io.BytesIO(path.read_bytes()))) for path in files]


# ------------------------------------------------------------------------------------------------ the hub
def from_hub(source: str, split: str) -> Found:
    """A data set on the hub, as owner/name or owner/name:CONFIGURATION, by its columns of images and of labels."""
    import datasets

    name, configuration = HUB_SOURCE.fullmatch(source).groups()
    try:
        with asking_hub():
            dataset = datasets.load_dataset(name, *([configuration] if configuration else []), split=split)
    except Exception as error:  # of two libraries and a network: of any kind
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        hint = f"; choose one as {name}:CONFIGURATION" if "config" in reason.lower() else ""
        raise ConnectionError(
            f"there is no folder {source}, and the hub's could not be read: {reason}{hint}"
        ) from error
    columns = dataset.features
    images = [column for column, kind in columns.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise ValueError(f"{source} has no column of images; it has {', '.join(columns)}")
    if len(images) > 1:
        raise ValueError(
            f"{source} has several columns of images, {' and '.join(images)}: save those of one as files in a folder, "
            "and give that as the source"
        )
    if len(dataset) == 0:
        raise ValueError(f"the split {split} of {source} is empty")
    labels, class_names, used = _hub_labels(dataset, f"the split {split} of {source}")
    unused = [column for column in columns if column not in (*images, used)]
    left_out = f"the column{'s' if len(unused) > 1 else ''} {', '.join(unused)}" if unused else ""
    pictures = dataset.select_columns(images)
    openers = [(f"{source}, image {i}", lambda i=i: pictures[i][images[0]]) for i in range(len(dataset))]
    return Found(openers, labels, class_names, left_out)


def _hub_labels(dataset, name: str) -> tuple[Tensor | None, tuple[str, ...], str | None]:
    """Labels, class names and column: the first of class labels, or else of integers or text called label, class, …"""
    import datasets

    kinds = dataset.features
    known = [column for column, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    plain = re.compile(r"u?int\d+|bool|(large_)?string")
    named = [column for column in kinds if column.lower() in LABEL_COLUMNS]
    known += [column for column in named if plain.fullmatch(str(getattr(kinds[column], "dtype", "")))]
    if not known:
        return None, (), None
    column = known[0]
    values = dataset[column][:]
    missing = [value for value in values if value is None or value == ""]
    if isinstance(kinds[column], datasets.ClassLabel):
        missing = [value for value in values if value is None or value < 0]
    if missing:
        raise ValueError(f"{name} has {len(missing)} of {len(values)} images without a label in the column {column}")
    if isinstance(kinds[column], datasets.ClassLabel):
        return torch.tensor(values), tuple(kinds[column].names), column
    return *classes_of(values), column


# ----------------------------------------------------------------------------------------------- pictures
def to_tensor(found: Found, image_size: int | None, channels: int | None) -> Tensor:
    """Open, turn upright, scale and cut each picture; (N, C, H, W) uint8. ValueError names one that does not fit."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    images: list[Tensor] = []
    deep: list[tuple[int, str]] = []  # the highest grey level of each picture of 16 bits, and its name
    for name, open_picture in tqdm(found.pictures, unit="image", desc="reading", delay=1, leave=False, disable=None):
        try:
            picture, highest = _plain(open_picture())
        except Exception as error:  # a damaged file makes Pillow raise any kind
            raise ValueError(f"{name} is no image that can be read: {str(error) or type(error).__name__}") from error
        if channels is not None:
            picture = picture.convert("L" if channels == 1 else "RGB")
        if highest is not None:
            deep.append((highest, name))
        image = pil_to_tensor(square(image_size)(picture) if image_size else picture)
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"images differ: {name} is {_shape(image)}, those before are {_shape(images[0])}; choose "
                "an image size (--image-size) or a number of channels (--image-channels) for all"
            )
        images.append(image)
    if deep and max(deep)[0] < 4096:
        raise ValueError(
            f"images of 16 bits that use 12 at most would be almost black: {max(deep)[1]} has the highest value, "
            f"{max(deep)[0]} of 65535; scale them first"
        )
    return torch.stack(images)


def _plain(picture: Image.Image | None) -> tuple[Image.Image, int | None]:
    """A picture upright, in mode L or RGB, what is transparent on white; and of 16 grey bits the highest value."""
    if picture is None:
        raise ValueError("it is missing")
    if getattr(picture, "is_animated", False) and picture.format != "MPO":  # MPO: a JPEG with its preview
        raise ValueError(f"it holds {picture.n_frames} images; save each as a file")
    tags, tiles = getattr(picture, "tag_v2", {}), getattr(picture, "tile", None)
    # In modes I and F white may be anything, but for these two formats (PNG until Pillow 9).
    deep = picture.mode.startswith("I;16") or picture.mode == "I" and picture.format in ("PNG", "PPM")
    if picture.mode in ("I", "F") and not deep:
        kind = "floating point" if picture.mode == "F" else "32-bit integer"
        raise ValueError(f"its grey levels are {kind} numbers, of which none is known to be white; save it as 8 bits")
    if tags.get(339, (1,))[0] != 1 or deep and tags and (tags.get(258) != (16,) or tags.get(262) == 0):
        raise ValueError("its grey levels are signed, or 12 bits, or 0 is white; save it as 8 bits")
    # Pillow compares a transparent colour of other bits with the colours scaled to 8.
    if "transparency" in picture.info and tiles and tiles[0][3] in ("L;2", "L;4", "RGB;16B"):
        raise ValueError("its transparent colour is not of 8 bits; save it with an alpha channel")

    picture = ImageOps.exif_transpose(picture)
    if deep:
        levels = np.asarray(picture).astype(np.int64)
        highest = int(levels.max())
        levels[levels == picture.info.get("transparency", -1)] = 65535
        return Image.fromarray((levels >> 8).astype(np.uint8)), highest  # as Pillow does with colours of 16 bits
    mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    if "transparency" in picture.info or picture.mode in ("LA", "PA", "RGBA", "RGBa"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(mode), None


def square(image_size: int):
    """Scale the shorter side to ``image_size`` and cut out the middle; of a PIL image, or of a tensor (…, H, W)."""
    from torchvision.transforms import v2

    resize = v2.Resize(image_size, v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(image_size)])


def _shape(image: Tensor) -> str:
    return f"{image.shape[1]}×{image.shape[2]} in {image.shape[0]} channel{'s' if image.shape[0] > 1 else ''}"
