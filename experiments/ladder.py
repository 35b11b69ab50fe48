"""Every sampler at several costs, for chapter 6: python -m experiments.ladder [--help].

Each sampler draws as many images for each number of network evaluations, from the same noise and for the same labels;
DDPM alone also with all timesteps.
``ddpm_tutorial.metrics`` judges them, and random subsets of as many real test images. Rows are made in the order of
their cost.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_tutorial.data import load_fashion_mnist, seeded_generator
from ddpm_tutorial.guidance import classifier_free
from ddpm_tutorial.metrics import Classifier, look, real_figures, sample_figures, spread
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import sample_ddim, sample_ddpm, sample_dpmpp_2m, sample_heun, sample_images
from ddpm_tutorial.settings import whole
from ddpm_tutorial.training import processes

from .common import Table, made_with, run_command, table_parser

DEFAULTS = {"num_images": 1000, "seed": 0, "max_evaluations": None}
EVALUATIONS = (5, 10, 20, 50, 100, 250, 1000)  # of the network, for each image
BATCH_SIZE = 1000
ONLY_ALL_STEPS = "DDPM, σ² = β"  # takes all timesteps, or none
SOLVERS = {
    "DDIM, η = 0": partial(sample_ddim, eta=0.0),
    "DDIM, η = 0.5": partial(sample_ddim, eta=0.5),
    "DDPM (DDIM, η = 1)": partial(sample_ddim, eta=1.0),  # strided ancestral sampling, σ² = β̃ of the sub-sequence
    "Heun": sample_heun,
    "DPM-Solver++(2M)": sample_dpmpp_2m,
    "DPM-Solver++(2M), even in u": partial(sample_dpmpp_2m, spacing="u"),
    ONLY_ALL_STEPS: partial(sample_ddpm, variance="beta"),
}
ALL_STEPS = ("DDPM (DDIM, η = 1)", ONLY_ALL_STEPS)  # dear; the solvers have arrived long before
AGAIN, NUM_SEEDS = ("DPM-Solver++(2M)", 20), 8  # this row is drawn with other seeds too: how much of a figure is luck


def ladder(num_timesteps: int, max_evaluations: int | None = None) -> list[dict]:
    """What each row is about: the sampler and the evaluations allowed, the cheapest first."""
    allowed = [n for n in sorted(EVALUATIONS) if n <= min(max_evaluations or num_timesteps, num_timesteps)]
    few = [name for name in SOLVERS if name != ONLY_ALL_STEPS]
    return [{"sampler": name, "allowed": n} for n in allowed for name in (ALL_STEPS if n == num_timesteps else few)]


def solver(sampler: str, allowed: int) -> Callable:
    if sampler == ONLY_ALL_STEPS:
        return SOLVERS[sampler]
    steps = (allowed + 1) // 2 if sampler == "Heun" else allowed  # Heun's n steps take 2n − 1
    return partial(SOLVERS[sampler], num_inference_steps=steps)


@torch.no_grad()
def draw(sampler: Callable, model: NoisePredictor, labels: Tensor, seed: int) -> tuple[Tensor, int, float, float]:
    """An image for each label, uint8 (N, C, H, W); network evaluations an image; seconds an image (wall, processor).

    The first noise is the same for every sampler, so that rows differ in the sampler and not in luck.
    """
    batches, calls, device = [], 0, model.device
    x_T = torch.randn(len(labels), *model.image_shape, generator=seeded_generator(seed))
    wall, processor = time.perf_counter(), time.process_time()
    for i in tqdm(range(0, len(labels), BATCH_SIZE), leave=False, mininterval=1, disable=None):
        noise_model = classifier_free(model, labels[i : i + BATCH_SIZE].to(device))

        def counting(x_t: Tensor, t: Tensor, noise_model=noise_model) -> Tensor:
            nonlocal calls
            calls += 1
            return noise_model(x_t, t)

        start, generator = x_T[i : i + BATCH_SIZE], seeded_generator(seed, 1 + i, device=device)
        batches.append(sample_images(sampler(counting, model.diffusion, start.shape, x_T=start, generator=generator)))
    images = torch.cat(batches).cpu()
    seconds = [(now - then) / len(labels) for now, then in
               ((time.perf_counter(), wall), (time.process_time(), processor))]  # fmt: skip
    return images, calls // len(batches), *seconds


def ready(checkpoint: str | Path | None) -> NoisePredictor:
    """The network on its device, after a first batch: what that takes is in no row."""
    model = NoisePredictor.from_pretrained(checkpoint).to(processes().device, memory_format=torch.channels_last)
    with torch.no_grad():
        t = torch.ones(BATCH_SIZE, dtype=torch.long, device=model.device)
        model(torch.zeros(BATCH_SIZE, *model.image_shape, device=model.device), t)
    return model


def fill(
    jobs: list[dict], drawn: Callable[[dict, Tensor, int], tuple[Tensor, int, float, float]], networks: dict[str, str],
    *, command: str, out: Path, num_images: int, seed: int, data: str | None, until: float, again: dict | None = None,
) -> None:  # fmt: skip
    """The table of these ``jobs``, images by ``drawn(job, labels, seed)``, as ``draw`` gives them, with ``networks`` of
    these hashes; and one row ``again``, with other seeds."""
    judge, device = Classifier.from_pretrained(), processes().device
    train, test = load_fashion_mnist("train", data), load_fashion_mnist("test", data)
    least = judge.num_features + 1
    if not least <= num_images <= len(test.images):
        raise ValueError(f"--num-images must lie in {least} … {len(test.images)} for this data, got {num_images}")
    settings = {
        "num_images": num_images, "seed": seed, "device": device.type, "num_train_images": len(train.images),
        "num_test_images": len(test.images), **networks,
    }  # fmt: skip
    table = Table(out, command, settings, jobs)
    wanted = again in jobs and "other_seeds" not in table
    if not table.missing and not wanted:
        return
    reference, labels = look(train.images, judge.to(device)), torch.arange(num_images) % len(train.class_names)
    if "real" not in table:
        table["real"] = real_figures(test, reference, num_images, seed, judge)

    def row(job: dict) -> dict:
        images, evaluations, wall, processor = drawn(job, labels, seed)
        figures = sample_figures(look(images, judge), labels, reference, seed)
        return {"evaluations": evaluations} | figures | {"seconds": wall, "processor_seconds": processor}  # an image

    table.fill(row, cost=lambda job: job["allowed"], until=until)
    if wanted and time.monotonic() < until:
        seeds = range(seed + 1, seed + NUM_SEEDS + 1)
        seen = [look(drawn(again, labels, own)[0], judge) for own in seeds]
        figures = [sample_figures(images, labels, reference, own) for images, own in zip(seen, seeds, strict=True)]
        table["other_seeds"] = again | {"number": NUM_SEEDS} | spread(figures)


def run(
    command: str, out: Path, num_images: int, seed: int, data: str | None = None, checkpoint: str | None = None,
    max_evaluations: int | None = None, until: float = float("inf"),
) -> None:  # fmt: skip
    model = ready(checkpoint)

    def drawn(job: dict, labels: Tensor, seed: int) -> tuple[Tensor, int, float, float]:
        return draw(solver(**job), model, labels, seed)

    fill(ladder(model.diffusion.num_timesteps, max_evaluations), drawn, made_with(checkpoint, Classifier),
         command=command, out=out, num_images=num_images, seed=seed, data=data, until=until,
         again=dict(zip(("sampler", "allowed"), AGAIN, strict=True)))  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = table_parser("ladder", "Every sampler at several costs, judged beside real images.")
    parser.add_argument("--num-images", type=whole(), metavar="N", help="images a row (default: 1000)")
    parser.add_argument("--max-evaluations", type=whole(min(EVALUATIONS)), metavar="N",
                        help=f"leave out dearer rows of {', '.join(map(str, EVALUATIONS))}")  # fmt: skip
    return run_command(parser, argv, run, DEFAULTS)


if __name__ == "__main__":
    sys.exit(main())
