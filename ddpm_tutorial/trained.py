"""A trained model as the command line uses it: load it, draw images for labels, write and read them."""

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import save_image
from tqdm.auto import tqdm

from .arguments import at_least
from .checkpoint import INFO_FILE, read_training_info, written_aside
from .data import CLASS_NAMES, seeded_generator
from .diffusion import SHIPPED_WEIGHTS, GaussianDiffusion
from .guidance import classifier_free
from .sampling import SAMPLERS, ddim_timesteps, sample_images
from .training import processes
from .unet import UNet


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
    shape = tuple(info.get("image_shape") or (model.in_channels, 28, 28))  # without a word, it was Fashion-MNIST
    classes = model.num_classes or 0
    class_names = info.get("class_names") or (CLASS_NAMES if classes == 10 else tuple(map(str, range(classes))))
    if len(class_names) != classes or len(shape) != 3 or shape[0] != model.in_channels:
        raise ValueError(
            f"{folder}: the network has {classes} classes and {model.in_channels} channels, "
            f"{INFO_FILE} names {len(class_names)} classes and images of shape {shape}"
        )
    return Trained(model, diffusion, device, shape, class_names)


def draw_images(
    trained: Trained,
    labels: Tensor,
    sampler: str,
    num_inference_steps: int | None,
    guidance_scale: float,
    seed: int,
) -> Tensor:
    """One image for each label, uint8 (N, C, H, W). ValueError names the option that is wrong."""
    at_least(0, seed=seed)
    if not math.isfinite(guidance_scale):
        raise ValueError(f"--guidance-scale must be a finite number, got {guidance_scale}")
    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    options = {}
    if num_inference_steps is not None:
        if sampler == "ddpm":
            raise ValueError("--num-inference-steps belongs to the other samplers; ddpm always takes all T steps")
        ddim_timesteps(trained.diffusion.num_timesteps, num_inference_steps)  # says what is wrong before the bar begins
        options = {"num_inference_steps": num_inference_steps}
    generator, batches = seeded_generator(seed), []
    with tqdm(total=len(labels), unit="image", mininterval=1) as bar:
        for batch in labels.split(200):
            noise_model = trained.model
            if trained.class_names:
                noise_model = classifier_free(trained.model, batch.to(trained.device), guidance_scale)
            shape = (len(batch), *trained.image_shape)
            steps = SAMPLERS[sampler](noise_model, trained.diffusion, shape, generator=generator, **options)
            batches.append(sample_images(steps).cpu())
            bar.update(len(batch))
    return torch.cat(batches)


def parse_label(text: str | int, class_names: Sequence[str]) -> int:
    """A class number, or the beginning of a class name that fits only one, upper or lower case, without signs."""

    def plain(name: str) -> str:
        return "".join(c for c in name.lower() if c.isalnum())

    text, names = str(text), [plain(name) for name in class_names]
    found = [i for i, name in enumerate(names) if plain(text) and name == plain(text)]
    if not found and text.isdecimal():
        found = [int(text)] if int(text) < len(names) else []
    elif not found and plain(text):
        found = [i for i, name in enumerate(names) if name.startswith(plain(text))]
    if len(found) != 1:
        known = [f"{i} {name}" for i, name in enumerate(class_names)]
        known = known if len(known) <= 20 else [*known[:20], f"… {len(names) - 1}"]
        raise ValueError(f"unknown label {text!r}; the labels are {', '.join(known)}")
    return found[0]


def save_images(images, labels, out: Path, columns: int) -> None:
    """Write uint8 images (N, C, H, W) as a PNG grid or, with their labels, as an NPZ file."""
    with written_aside(out) as aside:
        if out.suffix == ".png":
            save_image(images.float() / 255, aside, nrow=columns)
        else:
            np.savez_compressed(aside, images=images.numpy(), labels=labels.numpy())


def read_samples(path: Path) -> tuple[Tensor, Tensor]:
    """The images uint8 (N, C, H, W) and labels (N,) of a FILE.npz that ``sample`` wrote."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a FILE.npz with images and labels: {error}") from error
    if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path} must hold uint8 images (N, C, H, W) and labels (N,), got {images.dtype} {tuple(images.shape)} "
            f"and {tuple(labels.shape)}"
        )
    return images, labels
