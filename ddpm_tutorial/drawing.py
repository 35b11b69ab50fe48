"""Images for labels from a trained model: each image from a seed of its own, many together (chapters 5 and 8)."""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .data import seeded_generator, to_uint8
from .diffusion import check_counts, holds_integers, randn_like
from .files import reading
from .guidance import classifier_free
from .predictor import NoisePredictor
from .sampling import SAMPLERS, SampleStep, ddim_timesteps, sample_images

BATCH_SIZE = 200  # images drawn together
NUM_FRAMES = 40  # of a chain that is shown, at most


def draw_images(model: NoisePredictor, labels: Tensor, *options, **named) -> Tensor:
    """All of ``draw_batches`` together, uint8 (N, C, H, W)."""
    return torch.cat(list(draw_batches(model, labels, *options, **named)))


def draw_batches(
    model: NoisePredictor, labels: Tensor, *options, batch_size: int = BATCH_SIZE, **named
) -> Iterator[Tensor]:
    """One image for each label, in uint8 batches (≤ batch_size, C, H, W) as they are done: memory stays bounded.
    Another batch size gives the same images but for rounding, a grey level here and there. The options are those of
    ``sampler_of_images``.

    ValueError at the call, before anything is drawn, names the option that is wrong; FloatingPointError where an image
    is not finite.
    """
    check_counts(**{"batch_size": batch_size, "the number of labels": len(labels)})
    begin = sampler_of_images(model, *options, **named)
    begin(labels[:1], 0)  # says what is wrong, and takes no step

    def batches() -> Iterator[Tensor]:
        with _progress(model, labels) as bar:
            for first in range(0, len(labels), batch_size):
                chain = begin(labels[first : first + batch_size], first)[1]
                yield sample_images(_watched(model, chain, bar)).cpu()

    return batches()


def draw_chain(model: NoisePredictor, labels: Tensor, *options, **named) -> list[Tensor]:
    """Up to ``NUM_FRAMES`` moments of the chain, evenly from x_T to the sample; each is the x_t of one batch of images,
    uint8 (N, C, H, W). Errors as for ``draw_batches``."""
    x_T, steps = sampler_of_images(model, *options, **named)(labels, 0)
    with _progress(model, labels) as bar:
        chain = [to_uint8(x_t).cpu() for x_t in (x_T, *(step.x_t for step in _watched(model, steps, bar)))]
    count = min(NUM_FRAMES, len(chain))
    return [chain[round(i * (len(chain) - 1) / (count - 1))] for i in range(count)]


def _progress(model: NoisePredictor, labels: Tensor) -> tqdm:
    """A bar that counts, for each image, the timesteps from T down to 0: it moves with every step of a sampler.
    These take more timesteps now and fewer then, so the time left is told from the mean pace."""
    return tqdm(
        total=len(labels) * model.diffusion.num_timesteps, desc=f"{len(labels)} images", mininterval=1, smoothing=0,
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}",
    )  # fmt: skip


def _watched(model: NoisePredictor, chain: Iterator[SampleStep], bar: tqdm) -> Iterator[SampleStep]:
    """The same steps; they move the bar, and the last must be finite."""
    t = model.diffusion.num_timesteps
    for step in chain:
        bar.update(len(step.x_t) * (t - step.t))
        t = step.t
        if t == 0 and not step.x_t.isfinite().all():
            raise FloatingPointError("the network gave images that are not finite: its training went wrong")
        yield step


def sampler_of_images(
    model: NoisePredictor,
    sampler: str = "ddim",
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
    eta: float | None = None,
    spacing: str | None = None,
) -> Callable[[Tensor, int], tuple[Tensor, Iterator[SampleStep]]]:
    """A function of (labels (B,), first) that gives x_T and the chain of the images number first … first + B − 1.

    Image i takes all its noise from a generator of its own, seeded by (seed, i). So it is the same image in any batch
    and beside any number of others. ValueError names an option that does not go with the others or with the network.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; the known ones are {', '.join(SAMPLERS)}")
    if guidance_scale != 1 and not model.class_names:
        raise ValueError(f"trained without labels: --guidance-scale must be 1 here, got {guidance_scale}")
    options = {}
    if num_inference_steps is not None:
        if sampler == "ddpm":
            raise ValueError(
                "--num-inference-steps belongs to the other samplers, ddpm always takes all T steps; "
                "with fewer it is --sampler ddim --eta 1"
            )
        ddim_timesteps(model.diffusion.num_timesteps, num_inference_steps)  # says what is wrong
        options["num_inference_steps"] = num_inference_steps
    if eta is not None:
        if sampler != "ddim":
            raise ValueError(f"--eta belongs to the sampler ddim, got {eta} with {sampler}")
        options["eta"] = eta

    if spacing is not None:
        if sampler == "ddpm":
            raise ValueError(f"--spacing belongs to the other samplers, ddpm always takes all T steps, got {spacing}")
        options["spacing"] = spacing

    def begin(labels: Tensor, first: int) -> tuple[Tensor, Iterator[SampleStep]]:
        noise_model = model
        if model.class_names:
            noise_model = classifier_free(model, labels.to(model.device), guidance_scale)
        generators = [seeded_generator(seed, first + i) for i in range(len(labels))]
        x_T = randn_like(torch.empty(len(labels), *model.image_shape, device=model.device), generators)
        chain = SAMPLERS[sampler](noise_model, model.diffusion, x_T.shape, x_T=x_T, generator=generators, **options)
        return x_T, chain

    return begin


def read_samples(path: Path) -> tuple[Tensor, Tensor]:
    """The images uint8 (N, C, H, W) and labels (N,) of a FILE.npz that ``sample`` wrote."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a FILE.npz")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    with reading(path, "images and labels as sample writes them"):
        if not zipfile.is_zipfile(path):
            raise ValueError("no NPZ file")
        with np.load(path, allow_pickle=False) as file:
            if missing := {"images", "labels"} - set(file.files):
                raise ValueError(f"without {' and '.join(sorted(missing))}")
            images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    fits = images.dtype == torch.uint8 and images.ndim == 4 and labels.shape == images.shape[:1]
    if not fits or not holds_integers(labels):
        raise ValueError(
            f"{path} must hold uint8 images (N, C, H, W) and integer labels (N,), got {images.dtype} "
            f"{tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}"
        )
    return images, labels.long()
