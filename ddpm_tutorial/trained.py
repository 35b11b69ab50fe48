"""A trained model as the command line uses it: load it, draw images for labels, write and read them."""

import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from .arguments import at_least
from .checkpoint import INFO_FILE, read_training_info, written_aside
from .data import CLASS_NAMES, seeded_generator, to_uint8
from .diffusion import SHIPPED_WEIGHTS, GaussianDiffusion, randn_like
from .guidance import classifier_free
from .sampling import SAMPLERS, SampleStep, ddim_timesteps, sample_images
from .training import processes
from .unet import UNet

BATCH_SIZE = 200  # images drawn together
NUM_FRAMES = 40  # of a GIF, at most
MAX_GUIDANCE_SCALE = 100
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
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: it holds no config.json")
    device = processes().device
    model, diffusion = UNet.from_pretrained(folder).to(device), GaussianDiffusion.from_pretrained(folder).to(device)
    info = read_training_info(folder) if (folder / INFO_FILE).exists() else {}
    shape = info.get("image_shape") or [model.in_channels, 28, 28]  # without a word, it was Fashion-MNIST
    classes = model.num_classes or 0
    class_names = info.get("class_names") or list(CLASS_NAMES if classes == 10 else map(str, range(classes)))
    for name, values, kind in (("image_shape", shape, int), ("class_names", class_names, str)):
        if not isinstance(values, list) or not all(isinstance(value, kind) and value for value in values):
            raise ValueError(f"{folder / INFO_FILE} is damaged: {name} is {values!r}")
    if len(class_names) != classes or len(shape) != 3 or min(shape) < 1 or shape[0] != model.in_channels:
        raise ValueError(
            f"{folder}: the network has {classes} classes and {model.in_channels} channels, "
            f"{INFO_FILE} names {len(class_names)} classes and images of shape {shape}"
        )
    if model.target != "noise" and not _same(model.signal, diffusion.sqrt_alphas_cumprod):
        raise ValueError(f"{folder}: the network was made for another noise schedule than diffusion.safetensors holds")
    return Trained(model, diffusion, device, tuple(shape), class_names)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-5)


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

    ValueError at the call, before anything is drawn, names the option that is wrong.
    """
    at_least(1, batch_size=batch_size)
    begin = sampler_of_images(trained, sampler, num_inference_steps, guidance_scale, seed, eta)

    def batches() -> Iterator[Tensor]:
        with tqdm(total=len(labels), unit="image", mininterval=1) as bar:
            for first in range(0, len(labels), batch_size):
                batch = labels[first : first + batch_size]
                yield sample_images(begin(batch, first)[1]).cpu()
                bar.update(len(batch))

    return batches()


def draw_chain(trained: Trained, labels: Tensor, *options, **named) -> list[Tensor]:
    """Up to ``NUM_FRAMES`` moments of the chain, evenly from x_T to the sample; each is the x_t of one batch of images,
    uint8 (N, C, H, W)."""
    x_T, steps = sampler_of_images(trained, *options, **named)(labels, 0)
    chain = [to_uint8(x_t).cpu() for x_t in (x_T, *(step.x_t for step in steps))]
    count = min(NUM_FRAMES, len(chain))
    return [chain[round(i * (len(chain) - 1) / (count - 1))] for i in range(count)]


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
    and beside any number of others.
    """
    at_least(0, seed=seed)
    if not abs(guidance_scale) <= MAX_GUIDANCE_SCALE:  # not for nan either
        limits = f"{-MAX_GUIDANCE_SCALE} … {MAX_GUIDANCE_SCALE}"
        raise ValueError(f"--guidance-scale must lie in {limits}, got {guidance_scale}")
    if guidance_scale != 1 and not trained.class_names:
        raise ValueError(f"trained without labels: --guidance-scale must be 1 here, got {guidance_scale}")
    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
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
        if sampler != "ddim" or not 0 <= eta <= 1:
            raise ValueError(f"--eta belongs to the sampler ddim and lies in 0 … 1, got {eta} with {sampler}")
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
    if out.suffix not in ("", *FILE_TYPES) or out.name in FILE_TYPES:
        raise ValueError(f"--out must end in .png, .npz or .gif, or be a folder (no ending), got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"nothing can be written to the folder {out.parent}")
    if out.suffix and out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; --out with an ending is a file")
    if not out.suffix and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; --out without an ending is a new or empty folder for the images")


def save_images(
    batches: Iterable[Tensor], labels: Tensor, out: Path, columns: int, class_names: Sequence[str] = ()
) -> None:
    """Write uint8 batches (B, C, H, W): one after the other as PNG files into the folder ``out``, or all together as a
    grid FILE.png, or with their labels as FILE.npz."""
    if not out.suffix:
        return _save_singles(batches, labels, out, class_names)
    images = torch.cat(list(batches))
    with written_aside(out) as aside:
        if out.suffix == ".png":
            _grid(images, columns).save(aside)
        else:
            np.savez_compressed(aside, images=images.numpy(), labels=labels.numpy())


def _save_singles(batches: Iterable[Tensor], labels: Tensor, folder: Path, class_names: Sequence[str]) -> None:
    """00000_sneaker.png, 00001_ankle-boot.png, …; without classes 00000.png, …"""
    folder.mkdir(exist_ok=True)
    digits = max(5, len(str(len(labels) - 1)))
    endings = ["_" + re.sub(r"\W+", "-", name.lower()).strip("-") for name in class_names] or [""]
    number = 0
    for batch in batches:
        for image in batch:
            with written_aside(folder / f"{number:0{digits}d}{endings[labels[number]]}.png") as aside:
                _picture(image).save(aside)
            number += 1


def save_chain(frames: Sequence[Tensor], out: Path, columns: int) -> None:
    """Write uint8 batches (N, C, H, W), one a frame, as an animated grid FILE.gif that stays at its last frame."""
    first, *others = [_grid(frame, columns) for frame in frames]
    durations = [80] * len(others) + [3000]  # milliseconds
    with written_aside(out) as aside:
        # optimize: Pillow would give up grey levels of a frame to mark what did not change in it
        first.save(aside, save_all=True, append_images=others, duration=durations, loop=0, optimize=False)


def _grid(images: Tensor, columns: int) -> Image.Image:
    grid = make_grid(images, nrow=columns)  # (3, H, W): it makes three channels of one
    return _picture(grid[: images.shape[1]])


def _picture(image: Tensor) -> Image.Image:
    """uint8 (1 or 3, H, W) → a picture of PIL, grey or in colour."""
    return Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())


def read_samples(path: Path) -> tuple[Tensor, Tensor]:
    """The images uint8 (N, C, H, W) and labels (N,) of a FILE.npz that ``sample`` wrote."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    except (zipfile.BadZipFile, zlib.error, EOFError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a FILE.npz with images and labels: {error}") from error
    integers = not (labels.is_floating_point() or labels.is_complex())
    if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1] or not integers:
        raise ValueError(
            f"{path} must hold uint8 images (N, C, H, W) and integer labels (N,), got {images.dtype} "
            f"{tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}"
        )
    return images, labels.long()
