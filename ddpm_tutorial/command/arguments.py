"""The options of the command line: what ``ddpm-tutorial --help`` shows. Each checks its own value."""

import argparse
from dataclasses import fields
from pathlib import Path

from .. import __version__
from ..settings import SAMPLERS, SEED, SPACINGS, TEXT, RunSettings, TrainConfig, number, one_of, whole

SHIPPED = "the weights shipped with the package"
MAX_IMAGES = 1_000_000  # of one command: a grid and a FILE.npz are made in memory
MAX_GUIDANCE_SCALE = 100
GUIDANCE_SCALE = number(
    f"in {-MAX_GUIDANCE_SCALE} … {MAX_GUIDANCE_SCALE}", lambda scale: abs(scale) <= MAX_GUIDANCE_SCALE
)
ETA = number("in 0 … 1", lambda eta: 0 <= eta <= 1)


def path(text: str) -> Path:
    return Path(TEXT(text))


class Parser(argparse.ArgumentParser):
    """An error is one line and exit status 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the options)\n")


def add_settings(parser, settings: type) -> None:
    """An option for each field of a dataclass of ``settings``."""
    for field, default in zip(fields(settings), vars(settings()).values(), strict=True):
        option, kind = "--" + field.name.replace("_", "-"), field.metadata["kind"]
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text = field.metadata["help"] + ("" if default is None else f" (default: {shown})")
        if field.type is bool:
            parser.add_argument(option, action="store_true", help=field.metadata["help"])
        elif isinstance(default, list):
            parser.add_argument(option, type=kind.read, nargs="+", metavar="N", help=text)
        else:
            metavar = "SOURCE" if field.name == "data" else "N" if kind.read is int else "X"
            parser.add_argument(option, type=kind, metavar=metavar, help=text)


def add_sampling_options(parser) -> None:
    parser.add_argument("--sampler", type=one_of(*SAMPLERS), metavar="X", help=f"{', '.join(SAMPLERS)} (default: ddim)")
    parser.add_argument(
        "--num-inference-steps", type=whole(), metavar="N",
        help="steps (default: ddim 50, heun 25, dpmpp-2m 20); ddpm always takes all T",
    )  # fmt: skip
    parser.add_argument(
        "--spacing", type=one_of(*SPACINGS), metavar="X",
        help="steps even in t, or in u, the share of noise (default: t)",
    )  # fmt: skip
    parser.add_argument("--eta", type=ETA, metavar="E", help="ddim's share of fresh noise, 0 … 1 (default: 0)")
    parser.add_argument(
        "--guidance-scale", type=GUIDANCE_SCALE, metavar="S",
        help="0: any class; 1: the class, no guidance; more: a clearer one (default: 1)",
    )  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ddpm-tutorial",
        description="Train a DDPM on Fashion-MNIST or other images, sample from it, and evaluate it.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|sample|evaluate")

    train = commands.add_parser(
        "train",
        help="train a class-conditional U-Net",
        description="Train a U-Net and keep checkpoints, a log and sample grids in a folder.",
        epilog="Example: ddpm-tutorial train --data hub --out runs/first --num-train-steps 20000. Ctrl-C writes a "
        "checkpoint; the same command with --resume goes on from there, exactly.",
        argument_default=argparse.SUPPRESS,  # what is not given is left to the function that takes it
    )
    train.add_argument(
        "--out", type=path, metavar="FOLDER", required=True, help="folder for the checkpoint, log.csv and samples/"
    )
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with its options")
    add_settings(train, RunSettings)
    add_settings(train, TrainConfig)

    sample = commands.add_parser(
        "sample",
        argument_default=argparse.SUPPRESS,
        help="draw images from a checkpoint",
        description="Draw images from a trained model into a PNG grid, PNG files, an NPZ file or a GIF. The same "
        "seed gives the same images however many are asked for.",
        epilog="Example: ddpm-tutorial sample --labels sneaker bag --num-images 20 --guidance-scale 2 --out grid.png",
    )
    sample.add_argument(
        "--checkpoint", type=TEXT, metavar="FOLDER", help=f"a folder that train wrote (default: {SHIPPED})"
    )
    sample.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="class names or numbers, repeated in turn (default: all)"
    )
    sample.add_argument("--num-images", type=whole(1, MAX_IMAGES), metavar="N", help="how many (default: 100)")
    add_sampling_options(sample)
    sample.add_argument("--seed", type=SEED, metavar="N", help="seed of images and noise (default: 0)")
    sample.add_argument(
        "--batch-size", type=whole(1, MAX_IMAGES), metavar="N", help="images drawn together (default: 200)"
    )
    sample.add_argument(
        "--out", type=path, required=True,
        help="FILE.png (a grid), FILE.npz (images and labels), FILE.gif (the chain, up to 200 images), or a new "
        "or empty folder for files like 00000_sneaker.png",
    )  # fmt: skip

    evaluate = commands.add_parser(
        "evaluate",
        argument_default=argparse.SUPPRESS,
        help="measure a checkpoint on real images",
        description="Measure a trained model: the variational bound of real images in bits per dimension, or its "
        "samples beside real images (Fréchet distance, Inception Score, precision, recall, label agreement and more).",
        epilog="Example: ddpm-tutorial evaluate --data hub --metric samples --num-images 2000 --out figures.json",
    )
    evaluate.add_argument(
        "--checkpoint", type=TEXT, metavar="FOLDER", help=f"a folder that train wrote (default: {SHIPPED})"
    )
    evaluate.add_argument("--data", type=TEXT, metavar="SOURCE", help="as for train")
    evaluate.add_argument(
        "--metric", type=one_of("bits-per-dim", "samples"), metavar="X", help="bits-per-dim (the default) or samples"
    )
    evaluate.add_argument(
        "--num-images", type=whole(0, MAX_IMAGES), metavar="N",
        help="real images, or samples; 0: as many as the split has (default: 200)",
    )  # fmt: skip
    evaluate.add_argument("--seed", type=SEED, metavar="N", help="seed of the images chosen or drawn (default: 0)")
    evaluate.add_argument("--out", type=path, help="also write the figures to FILE.json")
    bound = evaluate.add_argument_group("with --metric bits-per-dim")
    bound.add_argument("--split", type=one_of("test", "train"), metavar="X", help="test or train (default: test)")
    bound.add_argument(
        "--num-steps", type=whole(0), metavar="N", help="timesteps for each image; 0: all T (default: 50)"
    )
    samples = evaluate.add_argument_group("with --metric samples")
    samples.add_argument("--samples", type=path, metavar="FILE.npz", help="judge these instead of drawing new ones")
    samples.add_argument(
        "--repeats", type=whole(1, 1000), metavar="R",
        help="sets of samples to draw, or to divide FILE.npz into (default: 1)",
    )  # fmt: skip
    samples.add_argument(
        "--features", type=one_of("own", "inception"), metavar="X",
        help="own: of the shipped classifier (the default); inception: of Inception-v3, as papers do (downloads it)",
    )  # fmt: skip
    add_sampling_options(samples)
    return parser
