"""What a run is set to. One declaration of a setting gives its option, its help, and the check of its value, on the
command line, in Python and in a checkpoint's training.json. No torch here: ``--help`` answers at once.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

TARGETS = ("noise", "v", "x_0", "velocity")
LOSSES = ("l2", "l1", "huber")
OPTIMIZERS = ("muon", "adam")
PRECISIONS = ("no", "bf16", "fp16")
SCHEDULES = ("linear", "cosine", "quadratic", "sigmoid")
SAMPLERS = ("ddim", "ddpm", "heun", "dpmpp-2m")
SPACINGS = ("t", "u")  # of a sampler's timesteps: even in t, or on the straight path


# ------------------------------------------------------------------------------------------ what values may be
class Kind(NamedTuple):
    """What a value may be. Called with an option's text it gives the value, or the error that argparse expects."""

    words: str
    allows: Callable[[Any], bool]
    read: Callable[[str], Any] = str

    def check(self, name: str, value: Any) -> None:
        """ValueError, which says what is allowed, where ``value`` is not."""
        if not self.allows(value):
            raise ValueError(f"{name} must be {self.words}, got {value!r:.200}")

    def __call__(self, text: str) -> Any:
        try:
            value = self.read(text)
        except ValueError:
            value = text
        if not self.allows(value):
            raise argparse.ArgumentTypeError(f"must be {self.words}, got {value!r:.200}")
        return value


def whole(low: int = 1, high: int = 10**9) -> Kind:
    return Kind(f"a whole number in {low} … {high}", lambda value: type(value) is int and low <= value <= high, int)


def number(words: str, fits: Callable[[float], bool]) -> Kind:
    def allows(value: Any) -> bool:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max and fits(value)  # no nan, no inf

    return Kind(f"a number {words}", allows, float)


def one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def some(kind: Kind) -> Kind:
    """A list; ``read`` is the kind of its items."""

    def allows(value: Any) -> bool:
        return isinstance(value, list) and value != [] and all(map(kind.allows, value))

    return Kind(f"a list, each {kind.words}", allows, kind)


def or_none(kind: Kind) -> Kind:
    return kind._replace(allows=lambda value: value is None or kind.allows(value))


TEXT = Kind("text, not empty", lambda value: isinstance(value, str) and value.strip() != "")
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
SEED = whole(0, 2**63 - 1)  # what torch takes
COLOURS = Kind("1 (grey) or 3 (colour)", lambda value: type(value) is int and value in (1, 3), int)


# ------------------------------------------------------------------------------------------------ the settings
def setting(default: Any, kind: Kind, help: str) -> Any:
    default = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**default, metadata={"kind": kind, "help": help})


class Settings:
    """The base of dataclasses whose fields are ``setting``s. ValueError names one that is not allowed."""

    def __post_init__(self):
        for this in fields(self):
            this.metadata["kind"].check(this.name, getattr(self, this.name))


@dataclass(frozen=True)
class TrainConfig(Settings):
    """What a training depends on; the defaults suit some hours of two CPU cores. ValueError names a setting that is
    out of range."""

    num_train_steps: int = setting(40_000, whole(), "optimiser steps")
    batch_size: int = setting(64, whole(), "images a step, over all processes together")
    lr: float = setting(6e-3, number("above 0", lambda lr: lr > 0), "learning rate, from warm-up to cool-down")
    warmup_steps: int = setting(200, whole(0), "first steps, in which the rate rises to --lr")
    cooldown: float = setting(
        0.3, number("in [0, 1]", lambda share: 0 <= share <= 1), "share of the steps, the last, in which it falls to 0"
    )
    optimizer: str = setting(
        "muon", one_of(*OPTIMIZERS), "muon (Adam moves the outer layers, biases and norms) or adam"
    )
    grad_clip: float = setting(1.0, number("above 0", lambda norm: norm > 0), "largest norm of the gradient")
    # lower in the first steps: min(decay, (1 + n) / (10 + n))
    ema_decay: float = setting(
        0.999, number("in [0, 1)", lambda decay: 0 <= decay < 1), "decay of the averaged weights that sample"
    )
    loss: str = setting("l2", one_of(*LOSSES), "l2, l1 or huber")
    # a dropped label becomes the null label
    label_dropout: float = setting(
        0.1, number("in [0, 1]", lambda share: 0 <= share <= 1),
        "share of labels dropped, for classifier-free guidance",
    )  # fmt: skip
    precision: str = setting(
        "no", one_of(*PRECISIONS), "no (float32), bf16 or fp16 autocast; for GPUs, bf16 for new CPUs too"
    )
    compile: bool = setting(False, FLAG, "torch.compile: minutes before the first step, then faster ones")
    seed: int = setting(0, SEED, "seed of the initial weights, the batches, the timesteps and the noise")


@dataclass(frozen=True)
class RunSettings(Settings):
    """The data and the network of a run of the command line, and how often it writes."""

    data: str | None = setting(
        None, or_none(TEXT),
        "Fashion-MNIST: 'hub', 'sample' (5,000 images shipped with the package) or a folder of its IDX files; "
        "other images: a folder of IDX files, a folder with one sub-folder a class (or none: without labels; or train "
        "and test with these inside), or a data set on the hub, as owner/name or owner/name:CONFIGURATION. Transparent "
        "images are put on white (default: the environment variable DDPM_TUTORIAL_DATA, else hub)",
    )  # fmt: skip
    image_size: int | None = setting(
        None, or_none(whole(1, 16_384)), "scale and cut images to N×N (default: as they are, all alike)"
    )
    image_channels: int | None = setting(None, or_none(COLOURS), "1: grey, 3: colour (default: as they are)")
    unconditional: bool = setting(False, FLAG, "a model without class labels")
    target: str = setting(
        "v", one_of(*TARGETS),
        "what the network's output stands for: noise or x_0, drawing t uniformly; v, drawing its angle uniformly; or "
        "velocity (noise − x_0: flow matching), drawing the straight path's time uniformly",
    )  # fmt: skip
    schedule: str = setting("linear", one_of(*SCHEDULES), "linear, cosine, quadratic or sigmoid")
    num_timesteps: int = setting(1000, whole(1, 100_000), "length of the diffusion")
    channels: int = setting(48, whole(1, 8192), "width of the U-Net's finest level")
    channel_mults: list[int] = setting([1, 2], some(whole(1, 64)), "each level's width over --channels")
    num_res_blocks: int = setting(1, whole(1, 64), "residual blocks a level")
    patch_size: int = setting(
        2, whole(1, 64), "fold P×P pixels into channels first: 2 is two to four times faster than 1"
    )
    log_every: int = setting(100, whole(), "steps between rows of log.csv; each checkpoint writes one, too")
    checkpoint_every: int = setting(1000, whole(), "steps between checkpoints")
    sample_every: int = setting(1000, whole(0), "steps between sample grids; 0: none")


# What --resume may change: the data may have moved, and a run may be made longer or write more often.
FREE = ("data", "num_train_steps", "compile", "log_every", "checkpoint_every", "sample_every")

# What else a training.json may hold. A name that is not here is its writer's own.
INFO = {
    "step": whole(0),
    "image_shape": Kind("three whole numbers above 0", lambda v: some(whole()).allows(v) and len(v) == 3),
    "class_names": or_none(
        Kind("a list of names, no two alike", lambda v: some(TEXT).allows(v) and len(set(v)) == len(v))
    ),
    "num_images": whole(),
    "checksum": TEXT,
}


def check_info(info: Any) -> None:
    """ValueError or TypeError names what a training.json must not hold."""
    if not isinstance(info, dict):
        raise TypeError(f"it must be an object of JSON, got {info!r:.200}")
    for name, kind in INFO.items():
        if name in info:
            kind.check(name, info[name])
    for name, settings in (("run", RunSettings), ("config", TrainConfig)):
        if name in info:
            settings(**info[name])
