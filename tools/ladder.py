"""Measure every sampler at several costs: python tools/ladder.py [--help]. Chapter 6 shows what it writes.

Each sampler draws as many images for each number of network evaluations, from the same noise and for the same labels.
``ddpm_tutorial.metrics`` judges them, and random subsets of as many real test images. Rows are made in the order of
their cost and written one by one: a run that was stopped goes on with the same command.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from measure import machine, write_json
from resumable import add_options, fingerprint, read_started, run_checked
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_tutorial.arguments import Parser
from ddpm_tutorial.data import load_fashion_mnist, seeded_generator
from ddpm_tutorial.diffusion import SHIPPED_WEIGHTS
from ddpm_tutorial.evaluation import real_figures, spread
from ddpm_tutorial.guidance import classifier_free
from ddpm_tutorial.metrics import Classifier, look, sample_figures
from ddpm_tutorial.sampling import sample_ddim, sample_dpmpp_2m, sample_heun, sample_images
from ddpm_tutorial.trained import Trained, load_trained

EVALUATIONS = (5, 10, 20, 50, 100, 250, 1000)  # of the network, for each image
BATCH_SIZE = 250
SOLVERS = {
    "DDIM, η = 0": partial(sample_ddim, eta=0.0),
    "DDIM, η = 0.5": partial(sample_ddim, eta=0.5),
    "DDPM (DDIM, η = 1)": partial(sample_ddim, eta=1.0),  # strided ancestral sampling, σ² = β̃ of the sub-sequence
    "Heun": sample_heun,
    "DPM-Solver++(2M)": sample_dpmpp_2m,
}
AGAIN, NUM_SEEDS = ("DPM-Solver++(2M)", 20), 8  # this row is drawn with other seeds too: how much of a figure is luck


def ladder(num_timesteps: int, max_evaluations: int) -> list[tuple[str, int, Callable]]:
    """(name, evaluations allowed, sampler) of every row, the cheapest first."""
    rows = []
    for allowed in sorted(n for n in EVALUATIONS if n <= min(max_evaluations, num_timesteps)):
        for name, sampler in SOLVERS.items():
            steps = (allowed + 1) // 2 if name == "Heun" else allowed  # Heun's n steps take 2n − 1
            rows.append((name, allowed, partial(sampler, num_inference_steps=steps)))
    return rows


def draw(sampler: Callable, trained: Trained, labels: Tensor, seed: int, bar: tqdm) -> tuple[Tensor, int, float, float]:
    """An image for each label, uint8 (N, C, H, W); network evaluations an image; seconds an image (wall, processor).

    The first noise is the same for every sampler, so that rows differ in the sampler and not in luck.
    """
    batches, calls, device = [], 0, trained.device
    x_T = torch.randn(len(labels), *trained.image_shape, generator=seeded_generator(seed))
    wall, processor = time.perf_counter(), time.process_time()
    for i in range(0, len(labels), BATCH_SIZE):
        noise_model = classifier_free(trained.model, labels[i : i + BATCH_SIZE].to(device))

        def model(x_t: Tensor, t: Tensor, noise_model=noise_model) -> Tensor:
            nonlocal calls
            calls += 1
            bar.update(len(x_t))
            return noise_model(x_t, t)

        start = x_T[i : i + BATCH_SIZE]
        generator = seeded_generator(seed, 1 + i, device=device)
        batches.append(sample_images(sampler(model, trained.diffusion, start.shape, x_T=start, generator=generator)))
    images = torch.cat(batches).cpu()
    seconds = [(now - then) / len(labels) for now, then in
               ((time.perf_counter(), wall), (time.process_time(), processor))]  # fmt: skip
    return images, calls // len(batches), *seconds


def run(num_images: int, data: str | None, max_evaluations: int, seed: int, out: Path) -> None:
    trained, classifier = load_trained(None), Classifier.from_pretrained()
    classifier.to(trained.device)
    train, test = load_fashion_mnist("train", data), load_fashion_mnist("test", data)
    least = classifier.num_features + 1
    if not least <= num_images <= len(test.images):
        raise ValueError(f"--num-images must lie in {least} … {len(test.images)} for this data, got {num_images}")
    settings = {
        "num_images": num_images,
        "seed": seed,
        "device": trained.device.type,
        "num_train_images": len(train.images),
        "num_test_images": len(test.images),
        "weights": fingerprint(SHIPPED_WEIGHTS / "model.safetensors"),
        "classifier": fingerprint(Classifier.shipped / "model.safetensors"),
    }
    result = read_started(out, settings, lambda row: (row["sampler"], row["allowed"]))
    result["command"] = f"python tools/ladder.py --num-images {num_images} --data SOURCE --seed {seed}"
    result["machine"] = machine(trained.device)
    reference = look(train.images, classifier)
    if "real" not in result:
        result["real"] = real_figures(test, reference, num_images, seed, classifier)
        write_json(out, result)

    labels = torch.arange(num_images) % trained.model.num_classes
    done = {(row["sampler"], row["allowed"]) for row in result["rows"]}
    missing = [row for row in ladder(trained.diffusion.num_timesteps, max_evaluations) if row[:2] not in done]
    total = num_images * sum(allowed for _, allowed, _ in missing)
    warm = torch.zeros(BATCH_SIZE, *trained.image_shape, device=trained.device)
    with torch.no_grad():  # outside the clock
        trained.model.to(memory_format=torch.channels_last)(warm, torch.ones_like(warm[:, 0, 0, 0], dtype=torch.long))
    with tqdm(total=total, unit="evaluation", mininterval=1, disable=None) as bar:
        for name, allowed, sampler in missing:
            images, evaluations, wall, processor = draw(sampler, trained, labels, seed, bar)
            row = {"sampler": name, "allowed": allowed, "evaluations": evaluations}
            row |= sample_figures(look(images, classifier), labels, reference, seed)
            row |= {"seconds": wall, "processor_seconds": processor}  # an image
            result["rows"].append(row)
            write_json(out, result)
            bar.write(describe(row))
    if "other_seeds" not in result and max_evaluations >= AGAIN[1]:
        (sampler,) = (row[2] for row in ladder(trained.diffusion.num_timesteps, AGAIN[1]) if row[:2] == AGAIN)
        bar = tqdm(total=NUM_SEEDS * num_images * AGAIN[1], unit="evaluation", mininterval=1, disable=None)
        with torch.no_grad(), bar:
            drawn = [draw(sampler, trained, labels, seed + i, bar)[0] for i in range(1, NUM_SEEDS + 1)]
        figures = spread([sample_figures(look(images, classifier), labels, reference, seed) for images in drawn])
        result["other_seeds"] = {"sampler": AGAIN[0], "allowed": AGAIN[1], "number": NUM_SEEDS} | figures
        write_json(out, result)


def describe(row: dict) -> str:
    return (
        f"{row['sampler']:17} {row['evaluations']:5} evaluations   Fréchet {row['frechet_distance']:7.3f}   "
        f"score {row['inception_score']:5.2f}   label {row['label_agreement']:5.1%}   {row['seconds']:.4f} s an image"
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="ladder.py", description="Every sampler at several costs, judged beside real images.")
    parser.add_argument("--num-images", type=int, default=2000, metavar="N", help="images a row (default: 2000)")
    parser.add_argument("--max-evaluations", type=int, default=max(EVALUATIONS), metavar="N",
                        help=f"leave out dearer rows of {', '.join(map(str, EVALUATIONS))}")  # fmt: skip
    add_options(parser, "ladder")
    args = parser.parse_args(argv)
    if args.max_evaluations < min(EVALUATIONS):
        parser.error(f"--max-evaluations must be at least {min(EVALUATIONS)}, got {args.max_evaluations}")
    return run_checked(parser, args, run)


if __name__ == "__main__":
    sys.exit(main())
