"""Ten minutes of a GPU: python -m experiments.gpu --minutes 9 --out FOLDER [--data SOURCE].

Trains the shipped recipe as long as half of the time allows, in bf16 and compiled, into FOLDER/weights; draws the
ladder and the guidance sweep of these weights, and measures the speed of our network and of the peers that cost as
much, eager and fastest, into FOLDER/results. A row or a network for which no time is left is left out.

To ship them, copy both folders over ``ddpm_tutorial/weights`` and ``ddpm_tutorial/results``: ``make results`` keeps
what is complete and made with the shipped weights, and makes the rest again.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from ddpm_tutorial.command import train as command
from ddpm_tutorial.command.arguments import Parser
from ddpm_tutorial.data import load_fashion_mnist
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.settings import TEXT, RunSettings, TrainConfig, number, whole
from ddpm_tutorial.training import processes, train
from ddpm_tutorial.unet import UNet

from . import guidance_sweep, ladder
from .benchmark.__main__ import speed_benchmark
from .benchmark.measure import ENDLESS, pace
from .benchmark.peers import shipped_config
from .common import outcome, parsed_for_device

UNTIL = {"training": 0.5, "ladder": 0.7, "guidance_sweep": 0.8, "benchmark": 1.0}  # shares of the time


def steps_in(seconds: float, model: NoisePredictor, data: str | None, options: dict) -> int:
    """How many steps of training these seconds allow, a start like this one's included."""
    began, images = time.perf_counter(), load_fashion_mnist("train", data)
    loaded = time.perf_counter() - began
    states = train(model, images.images, images.labels, TrainConfig(ENDLESS, **options))
    start, step = pace(states, seconds / 20, processes().device)
    return max(2, int((seconds - (time.perf_counter() - began) - loaded - start) / step))


def run(
    minutes: float, out: Path, device: torch.device, data: str | None, num_images: int, channels: int, batch_size: int
) -> None:
    began, cuda = time.monotonic(), device.type == "cuda"
    until = {name: began + 60 * minutes * share for name, share in UNTIL.items()}
    weights, results = out / "weights", out / "results"
    results.mkdir(parents=True, exist_ok=True)
    if not weights.exists():
        options = {"batch_size": batch_size, "precision": "bf16" if cuda else "no", "compile": cuda}
        unet = UNet(channels=channels, patch_size=RunSettings().patch_size, num_classes=10)
        probe = NoisePredictor(unet, GaussianDiffusion.from_schedule(), RunSettings().target)
        steps = steps_in(until["training"] - time.monotonic(), probe, data, options)
        every = {"checkpoint_every": ENDLESS, "sample_every": ENDLESS}
        given = {} if data is None else {"data": data}
        command.run(weights, **given, channels=channels, num_train_steps=steps, **options, **every)
    told = f"python -m experiments.gpu --minutes {minutes:g} --num-images {num_images} --out FOLDER --data SOURCE"
    shared = {"command": told, "num_images": num_images, "seed": 0, "data": data, "checkpoint": str(weights)}
    ladder.run(out=results / "ladder.json", **shared, until=until["ladder"])
    steps = guidance_sweep.DEFAULTS["num_inference_steps"]
    guidance_sweep.run(
        out=results / "guidance_sweep.json", **shared, num_inference_steps=steps, until=until["guidance_sweep"]
    )
    out = results / f"benchmark-{device.type}.json"
    speed_benchmark(told, out, device, rounds=3, quick=True, until=until["benchmark"])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.gpu", description="Train and measure on a GPU in a few minutes.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.add_argument("--minutes", type=number("above 0", lambda m: m > 0), default=9, metavar="M", help="in all")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for weights and results")
    parser.add_argument("--data", type=TEXT, metavar="SOURCE", help="Fashion-MNIST: hub, sample or a folder")
    parser.add_argument("--num-images", type=whole(), default=2000, metavar="N", help="images a row")
    parser.add_argument("--channels", type=whole(), default=shipped_config()["channels"], metavar="N", help="width")
    # a step of few images leaves most of a GPU idle
    batch_size = 1024 if torch.cuda.is_available() else TrainConfig().batch_size
    parser.add_argument("--batch-size", type=whole(), default=batch_size, metavar="N", help="images a step")
    args = parsed_for_device(parser, argv)
    return outcome(parser.prog, lambda: run(**args), args["out"])


if __name__ == "__main__":
    sys.exit(main())
