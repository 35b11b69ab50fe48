"""A trained model as the command line uses it: load it, draw images for labels, write and read them."""

import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from .checkpoint import INFO_FILE, check_writable, read_training_info, written_aside
from .data import CLASS_NAMES, seeded_generator, to_uint8
from .diffusion import SHIPPED_WEIGHTS, GaussianDiffusion, check_made_for, randn_like
from .guidance import classifier_free
from .pretrained import reading
from .sampling import SAMPLERS, SampleStep, ddim_timesteps, sample_images
from .training import processes
from .unet import UNet

BATCH_SIZE = 200  # images drawn together
NUM_FRAMES = 40  # of a GIF, at most
FILE_TYPES = (".png", ".npz", ".gif")


class Trained(NamedTuple):
    """A trained U-Net on the best device, its diffusion, and what it was trained on."""

    model: UNet
    diffusion: GaussianDiffusion
    device: torch.device
    image_shape: tuple[int, int, int]
    class_names: Sequence[str]


def load_trained(folder: str | None) -> Trained:
    """The checkpoint in a folder (None: the shipped one). ValueError where its files do not fit each other."""
    folder = SHIPPED_WEIGHTS if folder is None else Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint in {folder}: there is no such folder")
    device, model = processes().device, UNet.from_pretrained(folder)
    with reading(folder / "diffusion.safetensors", "noise schedule"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one that never reaches noise: that was told when it was trained
        diffusion = GaussianDiffusion.from_pretrained(folder)
    info = read_training_info(folder) if (folder / INFO_FILE).exists() else {}
    shape = info.get("image_shape") or [model.in_channels, 28, 28]  # without a word, it was Fashion-MNIST
    classes = model.num_classes or 0
    class_names = info.get("class_names") or list(CLASS_NAMES if classes == 10 else map(str, range(classes)))
    if len(class_names) != classes or shape[0] != model.in_channels:
        raise ValueError(
            f"{folder}: the network has {classes} classes and {model.in_channels} channels, "
            f"{INFO_FILE} names {len(class_names)} classes and images of shape {shape}"
        )
    with reading(folder, "checkpoint whose files fit each other"):
        check_made_for(model, diffusion)
    return Trained(model.to(device), diffusion.to(device), device, tuple(shape), class_names)


def draw_images(trained: Trained, labels: Tensor, *options, **named) -> Tensor:
    """All of ``draw_batches`` together, uint8 (N, C, H, W)."""
    return torch.cat(list(draw_batches(trained, labels, *options, **named)))


def draw_batches(
    trained: Trained,
    labels: Tensor,
    sampler: str = "ddim",
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
    eta: float | None = None,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Tensor]:
    """One image for each label, in uint8 batches (≤ batch_size, C, H, W) as they are done: memory stays bounded.
    Another batch size gives the same images but for rounding, a grey level here and there.

    ValueError at the call, before anything is drawn, names the option that is wrong; FloatingPointError where an image
    is not finite.
    """
    begin = sampler_of_images(trained, sampler, num_inference_steps, guidance_scale, seed, eta)

    def batches() -> Iterator[Tensor]:
        with _progress(trained, labels) as bar:
            for first in range(0, len(labels), batch_size):
                chain = begin(labels[first : first + batch_size], first)[1]
                yield sample_images(_watched(trained, chain, bar)).cpu()

    return batches()


def draw_chain(trained: Trained, labels: Tensor, *options, **named) -> list[Tensor]:
    """Up to ``NUM_FRAMES`` moments of the chain, evenly from x_T to the sample; each is the x_t of one batch of images,
    uint8 (N, C, H, W). Errors as for ``draw_batches``."""
    x_T, steps = sampler_of_images(trained, *options, **named)(labels, 0)
    with _progress(trained, labels) as bar:
        chain = [to_uint8(x_t).cpu() for x_t in (x_T, *(step.x_t for step in _watched(trained, steps, bar)))]
    count = min(NUM_FRAMES, len(chain))
    return [chain[round(i * (len(chain) - 1) / (count - 1))] for i in range(count)]


def _progress(trained: Trained, labels: Tensor) -> tqdm:
    """A bar that counts, for each image, the timesteps from T down to 0: it moves with every step of a sampler."""
    return tqdm(
        total=len(labels) * trained.diffusion.num_timesteps, desc=f"{len(labels)} images", mininterval=1,
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}",
    )  # fmt: skip


def _watched(trained: Trained, chain: Iterator[SampleStep], bar: tqdm) -> Iterator[SampleStep]:
    """The same steps; they move the bar, and the last must be finite."""
    t = trained.diffusion.num_timesteps
    for step in chain:
        bar.update(len(step.x_t) * (t - step.t))
        t = step.t
        if t == 0 and not step.x_t.isfinite().all():
            raise FloatingPointError("the network gave images that are not finite: its training went wrong")
        yield step


def sampler_of_images(
    trained: Trained,
    sampler: str = "ddim",
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
    eta: float | None = None,
) -> Callable[[Tensor, int], tuple[Tensor, Iterator[SampleStep]]]:
    """A function of (labels (B,), first) that gives x_T and the chain of the images number first … first + B − 1.

    Image i takes all its noise from a generator of its own, seeded by (seed, i). So it is the same image in any batch
    and beside any number of others. ValueError names an option that does not go with the others or with the network.
    """
    if guidance_scale != 1 and not trained.class_names:
        raise ValueError(f"trained without labels: --guidance-scale must be 1 here, got {guidance_scale}")
    options = {}
    if num_inference_steps is not None:
        if sampler == "ddpm":
            raise ValueError(
                "--num-inference-steps belongs to the other samplers, ddpm always takes all T steps; "
                "with fewer it is --sampler ddim --eta 1"
            )
        ddim_timesteps(trained.diffusion.num_timesteps, num_inference_steps)  # says what is wrong
        options["num_inference_steps"] = num_inference_steps
    if eta is not None:
        if sampler != "ddim":
            raise ValueError(f"--eta belongs to the sampler ddim, got {eta} with {sampler}")
        options["eta"] = eta

    def begin(labels: Tensor, first: int) -> tuple[Tensor, Iterator[SampleStep]]:
        noise_model = trained.model
        if trained.class_names:
            noise_model = classifier_free(trained.model, labels.to(trained.device), guidance_scale)
        generators = [seeded_generator(seed, first + i) for i in range(len(labels))]
        x_T = randn_like(torch.empty(len(labels), *trained.image_shape, device=trained.device), generators)
        chain = SAMPLERS[sampler](noise_model, trained.diffusion, x_T.shape, x_T=x_T, generator=generators, **options)
        return x_T, chain

    return begin


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
    check_writable(out)


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
    grid = make_grid(images, nrow=columns)  # (3, H, W): it makes three channels of one
    return _picture(grid[: images.shape[1]])


def _picture(image: Tensor) -> Image.Image:
    """uint8 (1 or 3, H, W) → a picture of PIL, grey or in colour."""
    return Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())


def read_samples(path: Path) -> tuple[Tensor, Tensor]:
    """The images uint8 (N, C, H, W) and labels (N,) of a FILE.npz that ``sample`` wrote."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a FILE.npz")
    with reading(path, "images and labels as sample writes them"):
        if not zipfile.is_zipfile(path):
            raise ValueError("no NPZ file")
        with np.load(path, allow_pickle=False) as file:
            if missing := {"images", "labels"} - set(file.files):
                raise ValueError(f"without {' and '.join(sorted(missing))}")
            images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    integers = not (labels.is_floating_point() or labels.is_complex())
    if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1] or not integers:
        raise ValueError(
            f"{path} must hold uint8 images (N, C, H, W) and integer labels (N,), got {images.dtype} "
            f"{tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}"
        )
    return images, labels.long()
