"""The images that come with the package and the front page: python -m experiments.samples [--help].

samples.npz is what ``ddpm-tutorial sample --num-images 2000 --sampler dpmpp-2m`` draws, for chapter 8;
book/samples.png what ``ddpm-tutorial sample --num-images 40 --guidance-scale 2`` draws, three times as large.
samples.json says how both were made.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from ddpm_tutorial.command.sample import save_images
from ddpm_tutorial.drawing import draw_batches
from ddpm_tutorial.files import written_aside
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.results import RESULTS_FOLDER
from ddpm_tutorial.settings import whole
from ddpm_tutorial.training import processes

from .common import Table, made_with, run_command, table_parser

DEFAULTS = {"num_images": 2000, "seed": 0}
BOOK = Path(__file__).parents[1] / "book"
ENLARGED = 3


def run(command: str, out: Path, num_images: int, seed: int, data: str | None = None, checkpoint: str | None = None):
    model = NoisePredictor.from_pretrained(checkpoint).to(processes().device)
    settings = {"num_images": num_images, "seed": seed, "device": model.device.type, **made_with(checkpoint)}
    jobs = [
        {"file": "samples.npz", "num_images": num_images, "sampler": "dpmpp-2m", "guidance_scale": 1.0},
        {"file": "samples.png", "num_images": 40, "sampler": "ddim", "guidance_scale": 2.0},
    ]

    def row(job: dict) -> dict:
        labels = torch.arange(job["num_images"]) % (model.num_classes or 1)
        batches = draw_batches(model, labels, job["sampler"], guidance_scale=job["guidance_scale"], seed=seed)
        path = out.with_name(job["file"])
        if path.suffix == ".png" and path.parent == RESULTS_FOLDER:
            path = BOOK / path.name
        save_images(batches, labels, path, columns=10)
        if path.suffix == ".png":
            picture = Image.open(path)
            enlarged = picture.resize([ENLARGED * side for side in picture.size], Image.Resampling.NEAREST)
            with written_aside(path) as aside:
                enlarged.save(aside, format="PNG")
        return {}

    Table(out, command, settings, jobs).fill(row)


def main(argv: list[str] | None = None) -> int:
    parser = table_parser("samples", "The samples of chapter 8 and of the front page.")
    parser.add_argument("--num-images", type=whole(), metavar="N", help="in samples.npz (default: 2000)")
    return run_command(parser, argv, run, DEFAULTS)


if __name__ == "__main__":
    sys.exit(main())
