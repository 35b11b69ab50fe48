"""The options of the command line: what ``ddpm-tutorial --help`` shows."""

import argparse
from dataclasses import fields
from pathlib import Path

SHIPPED = "the weights shipped with the package"
CONFIG_HELP = {
    "num_train_steps": "optimiser steps",
    "batch_size": "images a step, over all processes together",
    "lr": "peak learning rate",
    "warmup_steps": "steps of linear warm-up",
    "optimizer": "adamw or adam",
    "weight_decay": "weight decay",
    "grad_clip": "largest norm of the gradient",
    "ema_decay": "decay of the averaged weights that sample",
    "target": "what layers and loss are about: noise or x_0, drawing t uniformly, or v, drawing its angle uniformly",
    "loss": "l2, l1 or huber",
    "label_dropout": "share of labels dropped, for classifier-free guidance",
    "precision": "no (float32), bf16 or fp16 autocast; the last two are for GPUs",
    "compile": "torch.compile: minutes before the first step, then faster ones",
    "seed": "seed of the initial weights, the batches, the timesteps and the noise",
}
# How long a run is, and how wide its network: the options of `train` that are not in TrainConfig.
RUN_DEFAULTS = {
    "data": None,
    "image_size": None,
    "image_channels": None,
    "schedule": "linear",
    "num_timesteps": 1000,
    "channels": 64,
    "channel_mults": [1, 2],
    "num_res_blocks": 1,
    "patch_size": 2,
    "unconditional": False,
}


def at_least(least: int, **options: int) -> None:
    """ValueError for an option below ``least``."""
    for name, value in options.items():
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def add_sampling_options(parser) -> None:
    parser.add_argument("--sampler", metavar="X", help="ddim, ddpm, heun or dpmpp-2m (default: ddim)")
    parser.add_argument(
        "--num-inference-steps", type=int, metavar="N",
        help="steps (default: ddim 50, heun 25, dpmpp-2m 20); ddpm always takes all T",
    )  # fmt: skip
    parser.add_argument("--eta", type=float, metavar="E", help="ddim's share of fresh noise, 0 … 1 (default: 0)")
    parser.add_argument(
        "--guidance-scale", type=float, metavar="S",
        help="0: any class; 1: the class, no guidance; more: a clearer one (default: 1)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="seed of images and noise (default: 0)")


class Parser(argparse.ArgumentParser):
    """An error is one line and exit status 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def build_parser() -> argparse.ArgumentParser:
    from .training import TrainConfig

    parser = Parser(
        prog="ddpm-tutorial",
        description="Train a DDPM on Fashion-MNIST or other images, sample from it, and evaluate it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|sample|evaluate")

    train = commands.add_parser(
        "train",
        help="train a class-conditional U-Net",
        description="Train a noise-predicting U-Net and keep checkpoints, a log and sample grids in a folder.",
        epilog="Example: ddpm-tutorial train --data hub --out runs/first --num-train-steps 20000. Ctrl-C writes a "
        "checkpoint; the same command with --resume goes on from there, exactly.",
        argument_default=argparse.SUPPRESS,
    )
    train.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, log.csv and samples/")
    train.add_argument(
        "--data",
        metavar="SOURCE",
        help="Fashion-MNIST: 'hub', 'sample' (5,000 images shipped with the package) or a folder of its IDX files; "
        "other images: a folder of IDX files, a folder with one sub-folder a class (or none: without labels; or train "
        "and test with these inside), or a data set on the hub, as owner/name or owner/name:CONFIGURATION. Transparent "
        "images are put on white (default: the environment variable DDPM_TUTORIAL_DATA, else hub)",
    )
    train.add_argument(
        "--image-size", type=int, metavar="N", help="scale and cut images to N×N (default: as they are, all alike)"
    )
    train.add_argument("--image-channels", type=int, metavar="C", help="1: grey, 3: colour (default: as they are)")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with its options")
    for field in fields(TrainConfig):
        option, text = "--" + field.name.replace("_", "-"), CONFIG_HELP[field.name]
        if field.type is bool:
            train.add_argument(option, action="store_true", help=text)
        else:
            train.add_argument(option, type=field.type, metavar="X", help=f"{text} (default: {field.default})")
    train.add_argument("--schedule", metavar="X", help="linear, cosine, quadratic or sigmoid (default: linear)")
    train.add_argument("--num-timesteps", type=int, metavar="T", help="length of the diffusion (default: 1000)")
    train.add_argument("--channels", type=int, metavar="N", help="width of the U-Net's finest level (default: 64)")
    train.add_argument(
        "--channel-mults", type=int, nargs="+", metavar="N", help="each level's width over --channels (default: 1 2)"
    )
    train.add_argument("--num-res-blocks", type=int, metavar="N", help="residual blocks a level (default: 1)")
    train.add_argument(
        "--patch-size",
        type=int,
        metavar="P",
        help="fold P×P pixels into channels first: 2 is two to four times faster than 1 (default: 2)",
    )
    train.add_argument("--unconditional", action="store_true", help="a model without class labels")
    for name, what in (("log", "rows of log.csv"), ("checkpoint", "checkpoints"), ("sample", "sample grids; 0: none")):
        default = 100 if name == "log" else 1000
        train.add_argument(
            f"--{name}-every", type=int, default=default, metavar="N", help=f"steps between {what} (default: {default})"
        )

    sample = commands.add_parser(
        "sample",
        argument_default=argparse.SUPPRESS,  # what is not given is left to the function that takes it
        help="draw images from a checkpoint",
        description="Draw images from a trained model into a PNG grid, PNG files, an NPZ file or a GIF. The same "
        "seed gives the same images however many are asked for.",
        epilog="Example: ddpm-tutorial sample --labels sneaker bag --num-images 20 --guidance-scale 2 --out grid.png",
    )
    sample.add_argument("--checkpoint", metavar="FOLDER", help=f"a folder that train wrote (default: {SHIPPED})")
    sample.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="class names or numbers, repeated in turn (default: all)"
    )
    sample.add_argument("--num-images", type=int, metavar="N", help="how many (default: 100)")
    add_sampling_options(sample)
    sample.add_argument("--batch-size", type=int, metavar="N", help="images drawn together (default: 200)")
    sample.add_argument(
        "--out", type=Path, required=True,
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
    evaluate.add_argument("--checkpoint", metavar="FOLDER", help=f"a folder that train wrote (default: {SHIPPED})")
    evaluate.add_argument("--data", metavar="SOURCE", help="as for train")
    evaluate.add_argument("--metric", metavar="X", help="bits-per-dim (the default) or samples")
    evaluate.add_argument(
        "--num-images", type=int, metavar="N",
        help="real images, or samples; 0: as many as the split has (default: 200)",
    )  # fmt: skip
    bound = evaluate.add_argument_group("with --metric bits-per-dim")
    bound.add_argument("--split", metavar="X", help="test or train (default: test)")
    bound.add_argument("--num-steps", type=int, metavar="N", help="timesteps for each image; 0: all T (default: 50)")
    samples = evaluate.add_argument_group("with --metric samples")
    samples.add_argument("--samples", type=Path, metavar="FILE.npz", help="judge these instead of drawing new ones")
    samples.add_argument(
        "--repeats", type=int, metavar="R",
        help="sets of samples to draw, or to divide FILE.npz into (default: 1)",
    )  # fmt: skip
    samples.add_argument(
        "--features", metavar="X",
        help="own: of the shipped classifier (the default); inception: of Inception-v3, as papers do (downloads it)",
    )  # fmt: skip
    add_sampling_options(samples)
    evaluate.add_argument("--out", type=Path, help="also write the figures to FILE.json")
    return parser
