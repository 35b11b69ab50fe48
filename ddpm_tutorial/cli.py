"""The command line: ``ddpm-tutorial train``, ``sample`` and ``evaluate`` (chapters 5, 6 and 2).

Exit status: 0 done, 1 failed while running, 2 bad input (one line says what), 130 or 143 stopped by a signal.
"""

import argparse
import contextlib
import json
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

    parser = Parser(prog="ddpm-tutorial", description="Train a DDPM on Fashion-MNIST, sample from it, and evaluate it.")
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

    evaluate = commands.add_parser(
        "evaluate",
        help="measure a checkpoint on real images",
        description="Measure a trained model on real images: the variational bound in bits per dimension.",
        epilog="Example: ddpm-tutorial evaluate --data sample --metric bits-per-dim --num-images 200",
    )
    evaluate.add_argument("--checkpoint", metavar="FOLDER", help=f"a folder that train wrote (default: {SHIPPED})")
    evaluate.add_argument("--data", metavar="SOURCE", help="as for train")
    evaluate.add_argument("--split", default="test", metavar="X", help="test or train (default: test)")
    evaluate.add_argument("--metric", default="bits-per-dim", metavar="X", help="bits-per-dim (the default)")
    evaluate.add_argument(
        "--num-images", type=int, default=200, metavar="N", help="images, drawn at random; 0: all (default: 200)"
    )
    evaluate.add_argument(
        "--num-steps", type=int, default=50, metavar="N", help="timesteps for each image; 0: all T (default: 50)"
    )
    evaluate.add_argument("--seed", type=int, default=0, metavar="N", help="seed of images and noise (default: 0)")
    evaluate.add_argument("--out", type=Path, help="also write the figures to FILE.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(build_parser().parse_args(argv))
    command = args.pop("command")
    try:
        return {"train": run_train, "sample": run_sample, "evaluate": run_evaluate}[command](**args)
    except FloatingPointError as error:
        return _fail(command, error, 1)
    except (ValueError, OSError) as error:  # ConnectionError and FileNotFoundError are OSErrors
        return _fail(command, error, 2)


def _fail(command: str, error: Exception, status: int) -> int:
    print(f"ddpm-tutorial {command}: error: {error}", file=sys.stderr)
    return status


def _at_least(least: int, **options: int) -> None:
    for name, value in options.items():
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def _load(checkpoint: str | None):
    """The U-Net and the diffusion of a checkpoint folder (None: the shipped one), on the best device, and that."""
    import torch

    from .diffusion import SHIPPED_WEIGHTS, GaussianDiffusion
    from .unet import UNet

    folder = SHIPPED_WEIGHTS if checkpoint is None else Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: it holds no config.json")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return UNet.from_pretrained(folder).to(device), GaussianDiffusion.from_pretrained(folder).to(device), device


# ------------------------------------------------------------------------------------------------- train
def run_train(
    out: Path, log_every: int, checkpoint_every: int, sample_every: int, resume: bool = False, **given
) -> int:
    import torch

    from .data import CLASS_NAMES, load_fashion_mnist
    from .diffusion import GaussianDiffusion
    from .training import TrainConfig, read_training_info, train_to_folder
    from .unet import UNet

    _at_least(1, log_every=log_every, checkpoint_every=checkpoint_every)
    _at_least(0, sample_every=sample_every)
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
    from .guidance import classifier_free
    from .sampling import SAMPLERS, ddim_timesteps, sample_images

    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png or .npz, got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {out.parent}")
    _at_least(1, num_images=num_images)
    if not math.isfinite(guidance_scale):
        raise ValueError(f"--guidance-scale must be a finite number, got {guidance_scale}")
    _at_least(0, seed=seed)
    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if sampler == "ddpm" and num_inference_steps is not None:
        raise ValueError("--num-inference-steps belongs to ddim; ddpm always takes all T steps")
    if num_inference_steps is None:
        num_inference_steps = 50
    options = {"num_inference_steps": num_inference_steps} if sampler == "ddim" else {}
    model, diffusion, device = _load(checkpoint)
    ddim_timesteps(diffusion.num_timesteps, num_inference_steps)  # says what is wrong before a progress bar begins
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
    """Write uint8 images (N, C, H, W) as a PNG grid or, with their labels, as an NPZ file."""
    import numpy as np
    from torchvision.utils import save_image

    with _written_aside(out) as aside:
        if out.suffix == ".png":
            save_image(images.float() / 255, aside, nrow=columns)
        else:
            np.savez_compressed(aside, images=images.numpy(), labels=labels.numpy())


@contextlib.contextmanager
def _written_aside(out: Path):
    """A path beside ``out`` to write to; it takes the place of ``out`` when all went well, else it goes."""
    aside = out.with_name(".writing-" + out.name)
    try:
        yield aside
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- evaluate
def run_evaluate(
    checkpoint: str | None,
    data: str | None,
    split: str,
    metric: str,
    num_images: int,
    num_steps: int,
    seed: int,
    out: Path | None,
) -> int:
    import torch

    from .data import load_fashion_mnist, seeded_generator, to_model_range
    from .elbo import bits_per_dim, mean_and_error

    if metric != "bits-per-dim":
        raise ValueError(f"--metric must be bits-per-dim, got {metric!r}")
    _at_least(0, num_images=num_images, num_steps=num_steps, seed=seed)
    if out is not None and (out.suffix != ".json" or not out.parent.is_dir()):
        raise ValueError(f"--out must be a FILE.json in a folder that exists, got {out}")
    model, diffusion, device = _load(checkpoint)
    images = load_fashion_mnist(split, data).images
    if num_images > len(images):
        raise ValueError(f"--num-images must be at most {len(images)}, the size of the {split} split; got {num_images}")
    generator = seeded_generator(seed)
    chosen = torch.randperm(len(images), generator=generator)[: num_images or len(images)]
    x_0 = to_model_range(images[chosen]).to(device)
    result = bits_per_dim(model, diffusion, x_0, generator, num_steps=num_steps or None, progress=True)

    first = (result.terms * (result.timesteps == 1)) @ result.weights
    middle = result.total - result.prior - first
    parts = {"total": result.total, "L_T": result.prior, "L_1_to_T-1": middle, "L_0": first}
    names = ("mean", "standard_error")
    figures = {part: dict(zip(names, mean_and_error(bits), strict=True)) for part, bits in parts.items()}
    print(f"bits/dim without labels, {len(x_0)} {split} images, {len(result.weights)} timesteps each:")
    for name, figure in figures.items():
        print(f"  {name:10s} {figure['mean']:8.4f} ± {figure['standard_error']:.4f}")
    if out is not None:
        report = {
            "metric": metric, "split": split, "num_images": len(x_0), "num_steps": len(result.weights), "seed": seed,
            "bits_per_dim": figures,
        }  # fmt: skip
        with _written_aside(out) as aside:
            aside.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
