"""``ddpm-tutorial sample``: images for labels, in files (chapters 5 to 7)."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..drawing import BATCH_SIZE, draw_batches, draw_chain
from ..files import check_writable, written_aside
from ..predictor import NoisePredictor
from ..training import processes

FILE_TYPES = (".png", ".npz", ".gif")


def run(
    out: Path, checkpoint: str | None = None, labels: list[str] | None = None, num_images: int = 100, **sampling
) -> int:
    check_out(out)
    gif = out.suffix.lower() == ".gif"
    if gif and num_images > BATCH_SIZE:
        raise ValueError(f"--num-images must be at most {BATCH_SIZE} for a GIF, got {num_images}")
    if gif and "batch_size" in sampling:
        raise ValueError("--batch-size has no meaning for a GIF: its images are drawn together")
    model = NoisePredictor.from_pretrained(checkpoint).to(processes().device)
    if not model.class_names and labels:
        raise ValueError("this checkpoint was trained without labels; leave --labels out")
    wanted = [parse_label(label, model.class_names) for label in labels or range(len(model.class_names))] or [0]
    all_labels = torch.tensor(wanted)[torch.arange(num_images) % len(wanted)]
    columns = len(wanted) * max(1, 10 // len(wanted))  # each column one class
    if gif:
        save_chain(draw_chain(model, all_labels, **sampling), out, columns)
    else:
        save_images(draw_batches(model, all_labels, **sampling), all_labels, out, columns, model.class_names)
    print(f"{num_images} images in {out}")
    return 0


def parse_label(text: str | int, class_names: Sequence[str]) -> int:
    """A class number, or the beginning of a class name that fits only one, upper or lower case, without signs."""

    def plain(name: str) -> str:
        return "".join(c for c in name.lower() if c.isalnum())

    text, names = str(text), [plain(name) for name in class_names]
    found = [i for i, name in enumerate(class_names) if name == text]
    if not found and any(c.isalpha() for c in text):  # in numbers signs count
        found = [i for i, name in enumerate(names) if name == plain(text)]
    if not found and text.isdecimal():
        found = [int(text)] if int(text) < len(names) else []
    elif not found and any(c.isalpha() for c in text):
        found = [i for i, name in enumerate(names) if name.startswith(plain(text))]
    if len(found) > 1:
        raise ValueError(f"label {text!r} may be {' or '.join(class_names[i] for i in found)}")
    if not found:
        known = [f"{i} {name}" for i, name in enumerate(class_names)]
        known = known if len(known) <= 20 else [*known[:20], f"… {len(names) - 1}"]
        raise ValueError(f"unknown label {text!r}; the labels are {', '.join(known)}")
    return found[0]


# ------------------------------------------------------------------------------------------- writing and reading
def check_out(out: Path) -> None:
    """ValueError or OSError where ``save_images`` could not write ``out``; better before the drawing than after."""
    ending = out.suffix.lower()
    if ending not in ("", *FILE_TYPES) or out.name.lower() in FILE_TYPES:
        raise ValueError(f"--out must end in .png, .npz or .gif, or be a folder (no ending), got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {out.parent}")
    if ending and out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; --out with an ending is a file")
    if not ending and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; --out without an ending is a new or empty folder for the images")
    check_writable(out / "image.png" if out.is_dir() else out)


def save_images(
    batches: Iterable[Tensor], labels: Tensor, out: Path, columns: int, class_names: Sequence[str] = ()
) -> None:
    """Write uint8 batches (B, C, H, W): one after the other as PNG files into the folder ``out``, or all together as a
    grid FILE.png, or with their labels as FILE.npz."""
    if not out.suffix:
        return _save_singles(batches, labels, out, class_names)
    images = torch.cat(list(batches))
    with written_aside(out) as aside:
        if out.suffix.lower() == ".png":
            _grid(images, columns).save(aside, format="PNG")
        else:
            with aside.open("wb") as file:  # given a name, numpy would add an ending in small letters
                np.savez_compressed(file, images=images.numpy(), labels=labels.numpy())


def _save_singles(batches: Iterable[Tensor], labels: Tensor, folder: Path, class_names: Sequence[str]) -> None:
    """00000_sneaker.png, 00001_ankle-boot.png, …; without classes 00000.png, …"""
    folder.mkdir(exist_ok=True)
    digits, endings = max(5, len(str(len(labels) - 1))), _endings(class_names) or [""]
    number = 0
    for batch in batches:
        for image in batch:
            with written_aside(folder / f"{number:0{digits}d}{endings[labels[number]]}.png") as aside:
                _picture(image).save(aside)
            number += 1


def _endings(class_names: Sequence[str]) -> list[str]:
    """What file names say of each class: its name in letters and digits, with its number where that is not enough."""
    names = [re.sub(r"\W+", "-", name.lower()).strip("-")[:40] for name in class_names]
    if "" in names or len(set(names)) < len(names):
        names = [f"{i}-{name}".rstrip("-") for i, name in enumerate(names)]
    return [f"_{name}" for name in names]


def save_chain(frames: Sequence[Tensor], out: Path, columns: int) -> None:
    """Write uint8 batches (N, C, H, W), one a frame, as an animated grid FILE.gif that stays at its last frame."""
    first, *others = [_grid(frame, columns) for frame in frames]
    durations = [80] * len(others) + [3000]  # milliseconds
    with written_aside(out) as aside:
        # optimize: Pillow would give up grey levels of a frame to mark what did not change in it
        first.save(aside, format="GIF", save_all=True, append_images=others, duration=durations, loop=0, optimize=False)


def _grid(images: Tensor, columns: int) -> Image.Image:
    from torchvision.utils import make_grid  # slow to import, so only where it is used

    grid = make_grid(images, nrow=columns)  # (3, H, W): it makes three channels of one
    return _picture(grid[: images.shape[1]])


def _picture(image: Tensor) -> Image.Image:
    """uint8 (1 or 3, H, W) → a picture of PIL, grey or in colour."""
    return Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())
