"""The command line: ``ddpm-tutorial train`` and ``ddpm-tutorial sample`` (chapters 5 and 6).

Exit status: 0 done, 1 failed while running, 2 bad input (one line says what), 130 or 143 stopped by a signal.
"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Sequence
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
    "loss": "l2, l1 or huber, on the noise",
    "label_dropout": "share of labels dropped, for classifier-free guidance",
    "precision": "no (float32), bf16 or fp16 autocast",
    "seed": "seed of the initial weights, the batches, the timesteps and the noise",
}
# How long a run is, and how wide its network: the options of `train` that are not in TrainConfig.
RUN_DEFAULTS = {
    "data": None,
    "schedule": "linear",
    "num_timesteps": 1000,
    "channels": 64,
    "channel_mults": [1, 2],
    "num_res_blocks": 1,
    "patch_size": 2,
    "unconditional": False,
}


class Parser(argparse.ArgumentParser):
    """An error is one line and exit status 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def build_parser() -> argparse.ArgumentParser:
    from .training import TrainConfig

    parser = Parser(prog="ddpm-tutorial", description="Train a DDPM on Fashion-MNIST, and sample from it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|sample")

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
        help="'hub', 'sample' (5,000 images shipped with the package) or a folder of Fashion-MNIST's IDX files "
        "(default: the environment variable DDPM_TUTORIAL_DATA, else hub)",
    )
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with its options")
    for field in fields(TrainConfig):
        default = f"{CONFIG_HELP[field.name]} (default: {field.default})"
        train.add_argument("--" + field.name.replace("_", "-"), type=field.type, metavar="X", help=default)
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
        help="draw images from a checkpoint",
        description="Draw images from a trained model into a PNG grid or an NPZ file.",
        epilog="Example: ddpm-tutorial sample --labels sneaker bag --num-images 20 --guidance-scale 2 --out grid.png",
    )
    sample.add_argument("--checkpoint", metavar="FOLDER", help=f"a folder that train wrote (default: {SHIPPED})")
    sample.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="class names or numbers, repeated in turn (default: all ten)"
    )
    sample.add_argument("--num-images", type=int, default=100, metavar="N", help="how many (default: 100)")
    sample.add_argument("--sampler", default="ddim", metavar="X", help="ddim or ddpm (default: ddim)")
    sample.add_argument(
        "--num-inference-steps", type=int, metavar="N", help="steps of ddim (default: 50); ddpm always takes all T"
    )
    sample.add_argument(
        "--guidance-scale", type=float, default=1.0, metavar="S", help="1: none; more: clearer classes (default: 1)"
    )
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the noise (default: 0)")
    sample.add_argument("--out", type=Path, required=True, help="FILE.png (a grid) or FILE.npz (images and labels)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(build_parser().parse_args(argv))
    command = args.pop("command")
    try:
        return {"train": run_train, "sample": run_sample}[command](**args)
    except FloatingPointError as error:
        return _fail(command, error, 1)
    except (ValueError, OSError) as error:  # ConnectionError and FileNotFoundError are OSErrors
        return _fail(command, error, 2)


def _fail(command: str, error: Exception, status: int) -> int:
    print(f"ddpm-tutorial {command}: error: {error}", file=sys.stderr)
    return status


# ------------------------------------------------------------------------------------------------- train
def run_train(
    out: Path, log_every: int, checkpoint_every: int, sample_every: int, resume: bool = False, **given
) -> int:
    import torch

    from .data import CLASS_NAMES, load_fashion_mnist
    from .diffusion import GaussianDiffusion
    from .training import TrainConfig, read_training_info, train_to_folder
    from .unet import UNet

    for name, value, least in (
        ("log-every", log_every, 1), ("checkpoint-every", checkpoint_every, 1), ("sample-every", sample_every, 0),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    run, config = dict(RUN_DEFAULTS), {}
    if resume:
        saved = read_training_info(out)
        try:
            run, config = saved["run"], saved["config"]
        except KeyError as missing:
            raise ValueError(f"{out / 'training.json'} has no {missing}: not a run of this command") from None
        before = {**run, **config}
        free = ("data", "num_train_steps")  # the data may have moved, and a run may be made longer
        changed = [f"--{k.replace('_', '-')}" for k, v in given.items() if k not in free and before[k] != v]
        if changed:
            raise ValueError(f"the run in {out} was started with another {', '.join(changed)}; --resume keeps its own")
    run = {name: given.get(name, value) for name, value in run.items()}
    config = TrainConfig(**config | {name: value for name, value in given.items() if name not in run})

    data = load_fashion_mnist("train", run["data"])
    diffusion = GaussianDiffusion.from_schedule(run["schedule"], run["num_timesteps"])
    torch.manual_seed(config.seed)  # the initial weights
    model = UNet(
        channels=run["channels"],
        channel_mults=run["channel_mults"],
        num_res_blocks=run["num_res_blocks"],
        patch_size=run["patch_size"],
        num_classes=None if run["unconditional"] else len(CLASS_NAMES),
    )
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(data.images)} images, a U-Net of {size / 1e6:.2f} million parameters, run in {out}")

    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):  # finish the step, write a checkpoint, then stop
        signal.signal(number, lambda caught, _frame: stopped.append(caught))
    last = train_to_folder(
        model, diffusion, data.images, data.labels, config, out,
        info={"run": run}, resume=resume, log_every=log_every, checkpoint_every=checkpoint_every,
        sample_every=sample_every, should_stop=lambda: bool(stopped),
    )  # fmt: skip
    if stopped and last < config.num_train_steps:
        print(f"stopped at step {last} of {config.num_train_steps}; a checkpoint is in {out}; add --resume to go on")
        return 128 + stopped[0]
    print(f"done: step {last}; sample with: ddpm-tutorial sample --checkpoint {out} --out samples.png")
    return 0


# ------------------------------------------------------------------------------------------------ sample
def run_sample(
    checkpoint: str | None,
    labels: list[str] | None,
    num_images: int,
    sampler: str,
    num_inference_steps: int | None,
    guidance_scale: float,
    seed: int,
    out: Path,
) -> int:
    import torch
    from tqdm.auto import tqdm

    from .data import seeded_generator
    from .diffusion import SHIPPED_WEIGHTS, GaussianDiffusion
    from .guidance import classifier_free
    from .sampling import SAMPLERS, sample_images
    from .unet import UNet

    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png or .npz, got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {out.parent}")
    if num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {num_images}")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"--guidance-scale must be a finite number, got {guidance_scale}")
    if seed < 0:
        raise ValueError(f"--seed must be at least 0, got {seed}")
    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if sampler == "ddpm" and num_inference_steps is not None:
        raise ValueError("--num-inference-steps belongs to ddim; ddpm always takes all T steps")
    options = {"num_inference_steps": num_inference_steps or 50} if sampler == "ddim" else {}
    if num_inference_steps is not None and num_inference_steps < 1:
        raise ValueError(f"--num-inference-steps must be at least 1, got {num_inference_steps}")
    folder = SHIPPED_WEIGHTS if checkpoint is None else Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: it holds no config.json")

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    model = UNet.from_pretrained(folder).to(device)
    diffusion = GaussianDiffusion.from_pretrained(folder).to(device)
    if model.num_classes is None and labels:
        raise ValueError("this checkpoint was trained without labels; leave --labels out")
    wanted = [parse_label(label) for label in labels] if labels else list(range(model.num_classes or 1))
    all_labels = torch.tensor([wanted[i % len(wanted)] for i in range(num_images)])

    generator, batches = seeded_generator(seed), []
    with tqdm(total=num_images, unit="image", mininterval=1) as bar:
        for batch in all_labels.split(200):
            noise_model = model
            if model.num_classes is not None:
                noise_model = classifier_free(model, batch.to(device), guidance_scale)
            shape = (len(batch), model.in_channels, 28, 28)
            steps = SAMPLERS[sampler](noise_model, diffusion, shape, generator=generator, **options)
            batches.append(sample_images(steps).cpu())
            bar.update(len(batch))
    save_images(torch.cat(batches), all_labels, out, columns=max(10, len(wanted)) if len(wanted) > 1 else 10)
    print(f"{num_images} images in {out}")
    return 0


def parse_label(text: str) -> int:
    """A class number, or the beginning of a class name that fits only one, upper or lower case, without signs."""
    from .data import CLASS_NAMES

    def plain(name: str) -> str:
        return "".join(c for c in name.lower() if c.isalnum())

    found = [i for i, name in enumerate(CLASS_NAMES) if text == str(i) or plain(name) == plain(text)]
    if not found and plain(text):
        found = [i for i, name in enumerate(CLASS_NAMES) if plain(name).startswith(plain(text))]
    if len(found) != 1:
        known = ", ".join(f"{i} {name}" for i, name in enumerate(CLASS_NAMES))
        raise ValueError(f"unknown label {text!r}; the labels are {known}")
    return found[0]


def save_images(images, labels, out: Path, columns: int) -> None:
    """Write uint8 images (N, C, H, W) as a PNG grid or, with their labels, as an NPZ file, by way of a second name."""
    import numpy as np
    from torchvision.utils import save_image

    aside = out.with_name(".writing-" + out.name)
    try:
        if out.suffix == ".png":
            save_image(images.float() / 255, aside, nrow=columns)
        else:
            np.savez_compressed(aside, images=images.numpy(), labels=labels.numpy())
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main())
