"""Editing of real test images, for chapter 9: python -m experiments.editing [--help].

Half-known images are completed with and without going back and forth; image-to-image changes a garment's class at
several strengths.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ddpm_tutorial.data import ImageData, load_fashion_mnist, seeded_generator, to_model_range, to_uint8
from ddpm_tutorial.editing import keep_known, pull_known, resample
from ddpm_tutorial.guidance import classifier_free
from ddpm_tutorial.metrics import Classifier, label_agreement, look
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import sample_ddim
from ddpm_tutorial.settings import whole
from ddpm_tutorial.training import processes

from .common import Table, made_with, run_command, table_parser

DEFAULTS = {"num_images": 100, "seed": 0}
# with the true label or without, with DPS's pull or without, steps, eta, loops
COMPLETIONS = [
    (False, False, 25, 0.0, 1), (False, False, 25, 1.0, 1), (False, False, 25, 1.0, 2), (False, False, 25, 1.0, 5),
    (False, False, 125, 1.0, 1), (False, True, 25, 1.0, 1), (True, False, 25, 1.0, 1), (True, False, 25, 1.0, 5),
]  # fmt: skip
CHANGES = [(0, 3), (7, 9)]  # T-shirt to dress, sneaker to ankle boot
STRENGTHS = [0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0]


class Measure:
    """The figures of ``num_images`` test images, chosen at random, and of what editing makes of them."""

    def __init__(self, model: NoisePredictor, test: ImageData, num_images: int, seed: int):
        self.model, self.diffusion, self.seed = model, model.diffusion, seed
        self.judge = Classifier.from_pretrained().to(model.device)
        self.all, self.all_labels = to_model_range(test.images).to(model.device), test.labels.to(model.device)
        chosen = torch.randperm(len(test.images), generator=seeded_generator(seed))[:num_images]
        self.x_0, self.labels = self.all[chosen], self.all_labels[chosen]
        self.mask = torch.zeros(1, 1, 28, 28, dtype=torch.bool, device=model.device)
        self.mask[..., :14] = True  # the left half is known

    def agreement(self, x: Tensor, labels: Tensor) -> float:
        return label_agreement(look(to_uint8(x), self.judge).logits, labels.cpu())

    def figures_of(self, x: Tensor) -> dict:
        seam = (x[..., 14] - x[..., 13]).abs().mean().item()
        error = (x - self.x_0)[..., 14:].square().mean().sqrt().item()
        return {"label_agreement": self.agreement(x, self.labels), "seam": seam, "error": error}

    def completion(self, with_label: bool, pull: bool, steps: int, eta: float, loops: int) -> dict:
        model = classifier_free(self.model, self.labels) if with_label else self.model
        if pull:
            model = pull_known(model, self.diffusion, self.x_0, self.mask)
        model = keep_known(model, self.diffusion, self.x_0, self.mask)
        generator, shape = seeded_generator(self.seed, 1, device=self.x_0.device), self.x_0.shape
        sampler = partial(
            sample_ddim, model, self.diffusion, shape, num_inference_steps=steps, eta=eta, generator=generator
        )
        x_T = torch.randn(shape, generator=generator, device=self.x_0.device)
        *_, last = resample(sampler, self.diffusion, x_T, num_loops=loops, generator=generator)
        return self.figures_of(last.x_t.clamp(-1, 1))

    def change(self, old: int, new: int, strength: float) -> dict:
        x_0 = self.all[self.all_labels == old][: len(self.x_0) // 4]
        start, generator = round(strength * self.diffusion.num_timesteps), seeded_generator(self.seed, 2)
        x_start = self.diffusion.q_sample(x_0, start, torch.randn(x_0.shape, generator=generator).to(x_0.device))
        labels = torch.full((len(x_0),), new, device=x_0.device)
        *_, last = sample_ddim(
            classifier_free(self.model, labels, 2.0), self.diffusion, x_0.shape, x_T=x_start, start=start,
            num_inference_steps=20,
        )  # fmt: skip
        pairs = torch.stack([x_0.flatten(1), last.x_t.flatten(1)], dim=1)  # (N, 2, pixels)
        similarity = sum(torch.corrcoef(pair)[0, 1].item() for pair in pairs) / len(pairs)
        return {"label_agreement": self.agreement(last.x_t, labels), "similarity": similarity}


def jobs() -> list[dict]:
    """What each row is about: the name of a method of ``Measure`` as "kind", and its arguments."""
    names = ("with_label", "pull", "steps", "eta", "loops")
    completions = [{"kind": "completion"} | dict(zip(names, values, strict=True)) for values in COMPLETIONS]
    changes = [{"kind": "change", "old": old, "new": new, "strength": s} for old, new in CHANGES for s in STRENGTHS]
    return completions + changes


def run(
    command: str, out: Path, num_images: int, seed: int, data: str | None = None, checkpoint: str | None = None
) -> None:
    test = load_fashion_mnist("test", data)
    if not 4 <= num_images <= len(test.images):
        raise ValueError(f"--num-images must lie in 4 … {len(test.images)} for this data, got {num_images}")
    model = NoisePredictor.from_pretrained(checkpoint).to(processes().device)
    settings = {
        "num_images": num_images, "seed": seed, "device": model.device.type, "num_test_images": len(test.images),
        **made_with(checkpoint, Classifier),
    }  # fmt: skip
    table = Table(out, command, settings, jobs())
    if not table.missing:
        return
    measure = Measure(model, test, num_images, seed)
    table["real"] = measure.figures_of(measure.x_0)

    def row(job: dict) -> dict:
        return getattr(measure, job["kind"])(**{name: value for name, value in job.items() if name != "kind"})

    table.fill(row, cost=lambda job: job["steps"] * job["loops"] if job["kind"] == "completion" else 10)


def main(argv: list[str] | None = None) -> int:
    parser = table_parser("editing", "Chapter 9's editing, measured on real test images.")
    parser.add_argument("--num-images", type=whole(), metavar="N",
                        help="images to complete; up to a quarter of that to change (default: 100)")  # fmt: skip
    return run_command(parser, argv, run, DEFAULTS)


if __name__ == "__main__":
    sys.exit(main())
