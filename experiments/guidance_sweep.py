"""Guidance at several scales, with and without remedies, for chapter 7: python -m experiments.guidance_sweep [--help].

Every setting of guidance draws as many images of each class from the same noise. ``ddpm_tutorial.metrics`` judges them,
and random subsets of as many real test images.
"""

import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_tutorial.data import load_fashion_mnist, seeded_generator, to_model_range
from ddpm_tutorial.guidance import (
    NoiseModel,
    classifier_free,
    classifier_guidance,
    guided_between,
    rescaled,
)
from ddpm_tutorial.metrics import Classifier, NoisyClassifier, Seen, look, of_subsets, sample_figures
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import ddim_timesteps, sample_dpmpp_2m, sample_images
from ddpm_tutorial.settings import whole
from ddpm_tutorial.training import processes

from .common import Table, made_with, run_command, table_parser

DEFAULTS = {"num_images": 500, "num_inference_steps": 15, "seed": 0}
BATCH_SIZE = 100


class Setting(NamedTuple):
    """One row: the method, its scale, and at most one remedy."""

    method: str  # "classifier-free" or "classifier"
    guidance_scale: float
    interval: list[int] | None = None  # guided at low < t ≤ high only, the conditional model elsewhere
    rescale: float = 0.0
    clip: bool = True


SETTINGS = [
    *(Setting("classifier-free", scale) for scale in (1.0, 8.0, 2.0, 4.0, 0.0, 1.5)),
    *(Setting("classifier-free", 8.0, interval=pair) for pair in ([200, 600], [600, 1000], [0, 200])),
    Setting("classifier-free", 8.0, clip=False),
    Setting("classifier-free", 8.0, rescale=0.7),
    Setting("classifier-free", 4.0, interval=[200, 600]),
    *(Setting("classifier", scale) for scale in (1.0, 2.0, 4.0, 8.0)),
]


def guided_model(
    setting: Setting, model: NoisePredictor, noisy_classifier: NoisyClassifier, labels: Tensor
) -> NoiseModel:
    """The noise model of a setting, for these labels (B,)."""
    conditional = classifier_free(model, labels)
    if setting.method == "classifier":
        return classifier_guidance(model, noisy_classifier, model.diffusion, labels, setting.guidance_scale)
    guided = classifier_free(model, labels, setting.guidance_scale)
    if setting.interval:
        return guided_between(*setting.interval, guided, conditional)
    if setting.rescale:
        return rescaled(guided, conditional, model.diffusion, setting.rescale)
    return guided


def draw(setting: Setting, model: NoisePredictor, noisy_classifier, labels: Tensor, steps: int, seed: int) -> Tensor:
    """An image for each label, uint8 (N, C, H, W). The first noise is the same for every setting."""
    x_T, batches = torch.randn(len(labels), *model.image_shape, generator=seeded_generator(seed)), []
    for start, wanted in zip(x_T.split(BATCH_SIZE), labels.to(model.device).split(BATCH_SIZE), strict=True):
        guided = guided_model(setting, model, noisy_classifier, wanted)
        options = {"num_inference_steps": steps, "clip_denoised": setting.clip, "x_T": start}
        batches.append(sample_images(sample_dpmpp_2m(guided, model.diffusion, start.shape, **options)))
    return torch.cat(batches).cpu()


def variety(images: Tensor, labels: Tensor) -> float:
    """1 − the correlation of the pixels of two images of one class: the mean over pairs, then over classes. 0: one
    picture, up to brightness and contrast. uint8 images (N, C, H, W), labels (N,)."""
    found = []
    for label in labels.unique():
        pixels = images[labels == label].flatten(1).double()
        correlation = torch.corrcoef(pixels)
        others = ~torch.eye(len(pixels), dtype=torch.bool)
        found.append(1 - correlation[others].nanmean().item())  # an image of one grey has no correlation
    return statistics.mean(found)


def figures(images: Tensor, labels: Tensor, classifier: Classifier, reference: Seen, seed: int) -> dict[str, float]:
    """What the judge says of uint8 images (N, C, H, W) made for labels (N,), and what needs no judge."""
    x = to_model_range(images)
    return sample_figures(look(images, classifier), labels, reference, seed) | {
        "variety": variety(images, labels),
        "contrast": x.flatten(1).std(dim=1).mean().item(),
        "white": (images >= 250).double().mean().item(),
    }


def run(
    command: str, out: Path, num_images: int, num_inference_steps: int, seed: int, data: str | None = None,
    checkpoint: str | None = None, until: float = float("inf"),
) -> None:  # fmt: skip
    model, judge = NoisePredictor.from_pretrained(checkpoint).to(processes().device), Classifier.from_pretrained()
    train, test = load_fashion_mnist("train", data), load_fashion_mnist("test", data)
    fewest = test.labels.bincount().min().item()
    if not judge.num_features < num_images <= 10 * fewest or num_images % 10:
        raise ValueError(
            f"--num-images must be a multiple of 10, above {judge.num_features} and at most {10 * fewest} for "
            f"this data, got {num_images}"
        )
    ddim_timesteps(model.diffusion.num_timesteps, num_inference_steps)  # says what is wrong
    settings = {
        "num_images": num_images, "seed": seed, "sampler": "dpmpp-2m", "num_inference_steps": num_inference_steps,
        "device": model.device.type, "num_train_images": len(train.images), "num_test_images": len(test.images),
        **made_with(checkpoint, Classifier, NoisyClassifier),
    }  # fmt: skip
    table = Table(out, command, settings, [setting._asdict() for setting in SETTINGS])
    if not table.missing:
        return
    model.requires_grad_(False).to(memory_format=torch.channels_last)
    noisy_classifier = NoisyClassifier.from_pretrained().requires_grad_(False).to(model.device)
    reference, labels = look(train.images, judge.to(model.device)), torch.arange(num_images) % 10
    if "real" not in table:

        def figures_of(chosen: Tensor, seed: int) -> dict[str, float]:
            return figures(test.images[chosen], test.labels[chosen], judge, reference, seed)

        table["real"] = of_subsets(figures_of, test.labels, num_images, seed)

    def row(job: dict) -> dict:
        images = draw(Setting(**job), model, noisy_classifier, labels, num_inference_steps, seed)
        return figures(images, labels, judge, reference, seed)

    table.fill(row, until=until)


def main(argv: list[str] | None = None) -> int:
    parser = table_parser("guidance_sweep", "Guidance at several scales, judged beside real images.")
    parser.add_argument("--num-images", type=whole(), metavar="N", help="images a setting (default: 500)")
    parser.add_argument("--num-inference-steps", type=whole(), metavar="N",
                        help="steps of DPM-Solver++(2M) (default: 15)")  # fmt: skip
    return run_command(parser, argv, run, DEFAULTS)


if __name__ == "__main__":
    sys.exit(main())
