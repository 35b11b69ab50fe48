"""The evaluation of the weights, for chapters 2 and 8 and the model card: python -m experiments.evaluation [--help].

By the functions of ``ddpm-tutorial evaluate``: evaluation-bits.json has the bound of real test images;
evaluation-10000.json the figures of 10,000 samples, evaluation-5x2000.json of the same as five sets, and
evaluation-guided.json of 2,000 with guidance. ``--only`` makes one of them.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ddpm_tutorial.command.evaluate import measure_bits, measure_samples
from ddpm_tutorial.command.sample import save_images
from ddpm_tutorial.data import load_fashion_mnist
from ddpm_tutorial.drawing import draw_batches, read_samples
from ddpm_tutorial.metrics import Classifier
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.results import RESULTS_FOLDER
from ddpm_tutorial.settings import one_of, whole
from ddpm_tutorial.training import processes

from .common import Table, made_with, pixel_figures, run_command, table_parser

DEFAULTS = {"num_images": 10_000, "seed": 0}
SAMPLER = {"sampler": "dpmpp-2m", "num_inference_steps": 100, "spacing": "u"}
GUIDANCE_SCALE = 1.3
BITS_IMAGES = 1000  # real ones, at most, of which the bound is taken
REPEATS = {"10000": 1, "5x2000": 5, "guided": 1}
NAMES = ["bits", *REPEATS]


def run(
    command: str, out: Path, num_images: int, seed: int, data: str | None = None, checkpoint: str | None = None,
    only: str | None = None,
) -> None:  # fmt: skip
    files = [f"evaluation-{name}.json" for name in REPEATS]  # evaluation-bits has a number of images of its own
    if out.name not in files:
        raise ValueError(f"--out says in which folder the tables go, by the name of {', '.join(files)}; got {out.name}")
    model = NoisePredictor.from_pretrained(checkpoint).to(processes().device)
    train, test = (load_fashion_mnist(split, data).images for split in ("train", "test"))
    sizes = {"num_train_images": len(train), "num_test_images": len(test)}
    if only != "bits" and num_images > len(test):
        raise ValueError(f"--num-images must be at most {len(test)} for this data, got {num_images}")
    with tempfile.TemporaryDirectory() as folder:
        for name in [only] if only else NAMES:
            judges, count = ([], min(num_images, BITS_IMAGES)) if name == "bits" else ([Classifier], num_images)
            settings = {"num_images": count, "seed": seed, "device": model.device.type, **sizes}
            settings |= {} if name == "bits" else SAMPLER | {"guidance_scale": scale_of(name)}
            settings |= made_with(checkpoint, *judges)
            table = Table(out.with_name(f"evaluation-{name}.json"), command, settings, [])
            if "metric" in table:
                continue
            print(f"evaluation-{name} …", file=sys.stderr, flush=True)
            if name == "bits":
                report = measure_bits(model, data, seed, count)
            else:
                report = judged(model, data, train, seed, num_images, name, Path(folder))
            table.result |= {"metric": "bits-per-dim" if name == "bits" else "samples", "seed": seed, **report}
            table.write()


def scale_of(name: str) -> float:
    return GUIDANCE_SCALE if name == "guided" else 1.0


def judged(
    model: NoisePredictor, data: str | None, real: Tensor, seed: int, num_images: int, name: str, folder: Path
) -> dict:
    """What ``evaluate`` says of samples, and their ``pixel_figures`` beside ``real`` images."""
    guidance_scale = scale_of(name)
    samples = folder / f"guidance-{guidance_scale}.npz"
    if not samples.exists():
        count = num_images // REPEATS["5x2000"] if name == "guided" else num_images  # as in each of the five sets
        labels = torch.arange(count) % (model.num_classes or 1)
        batches = draw_batches(model, labels, **SAMPLER, guidance_scale=guidance_scale, seed=seed)
        save_images(batches, labels, samples, columns=10)
    report = measure_samples(model, data, seed, samples=samples, repeats=REPEATS[name])
    del report["samples"]  # the file's name
    pixels = pixel_figures(read_samples(samples)[0], real)
    return {**SAMPLER, "guidance_scale": guidance_scale, **report, "pixels": pixels}


def main(argv: list[str] | None = None) -> int:
    parser = table_parser("evaluation", "The weights' bound in bits/dim, and the figures of their samples.")
    parser.set_defaults(out=RESULTS_FOLDER / "evaluation-10000.json")
    parser.add_argument("--num-images", type=whole(), metavar="N", help="samples (default: 10000)")
    parser.add_argument("--only", type=one_of(*NAMES), metavar="NAME", help=f"of {', '.join(NAMES)}")
    return run_command(parser, argv, run, DEFAULTS)


if __name__ == "__main__":
    sys.exit(main())
