"""Emoji and their words (chapter 11): python -m experiments.emoji --out FOLDER (--minutes M | --num-train-steps N).

Trains the network that ships, on all emoji and their captions; then the same one three times without words, a third as
long, on 100, 1,000 and all emoji, and draws samples at a quarter, at half and at the end of each. On a GPU in bf16 and
compiled; a few minutes of one are enough.

FOLDER gets config.json and model.safetensors (16-bit), the samples as memory.npz, a grid of captions as captions.png,
and how all of it was made as training.json.
"""

import argparse
import copy
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import save_image

from ddpm_tutorial.command.arguments import Parser
from ddpm_tutorial.data import seeded_generator
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.guidance import classifier_free
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import sample_ddim, sample_images
from ddpm_tutorial.settings import TrainConfig, number, one_of, whole
from ddpm_tutorial.training import train
from ddpm_tutorial.unet import UNet
from ddpm_tutorial.words import captions_of, load_emoji

SUBSETS = (100, 1000, 1911)  # how many emoji the three runs without words see
MEMORY_SHARE = 1 / 3  # their steps over those of the network that ships
RESERVE = 0.8  # of the time that is left after compiling, for the steps; the rest is for drawing samples
SHOWN = ("red heart", "green heart", "blue apple", "cat face", "smiling face with tears", "person running", "flag", "")


def network(vocabulary: tuple[str, ...], channels: int) -> NoisePredictor:
    torch.manual_seed(0)  # the initial weights
    unet = UNet(in_channels=3, channels=channels, patch_size=2, num_classes=len(vocabulary))
    return NoisePredictor(unet, GaussianDiffusion.from_schedule("cosine"), "v", (3, 32, 32), vocabulary)


def subset(images: Tensor, count: int, batch_size: int) -> Tensor:
    """``count`` of the images, the same ones in every run, as often as makes a batch."""
    chosen = images[torch.randperm(len(images), generator=seeded_generator(0))[:count]]
    return chosen.repeat(-(-batch_size // count), 1, 1, 1) if count < batch_size else chosen


def draw(model: NoisePredictor, texts: list[str] | int, guidance_scale: float = 1.0) -> Tensor:
    """Samples (N, 3, 32, 32) uint8 on the CPU, by 50 DDIM steps: one of each text, or ``texts`` of any."""
    ask, count = model, texts
    if not isinstance(texts, int):
        ask = classifier_free(model, captions_of(texts, model.class_names).to(model.device), guidance_scale)
        count = len(texts)
    shape = (count, *model.image_shape)
    return sample_images(sample_ddim(ask, model.diffusion, shape, generator=seeded_generator(0))).cpu()


def steps_of(model: NoisePredictor, images: Tensor, captions: Tensor, config: TrainConfig) -> Iterator:
    """``train``, and a line with the mean loss ten times."""
    total, since = 0.0, 0
    for state in train(model, images, captions, config):
        total, since = total + state.loss, since + 1
        if state.step % max(1, config.num_train_steps // 10) == 0:
            print(f"step {state.step} of {config.num_train_steps}: loss {float(total) / since:.4f}", flush=True)
            total, since = 0.0, 0
        yield state


def pace(model: NoisePredictor, images: Tensor, captions: Tensor, options: dict) -> float:
    """Seconds a step, after the compilation."""
    states = train(model, images, captions, TrainConfig(10**9, **options))
    for _ in range(3):
        next(states).loss.item()
    began = time.perf_counter()
    for _ in range(30):
        state = next(states)
    state.loss.item()  # waits for the device
    return (time.perf_counter() - began) / 30


def run(minutes: float | None, num_train_steps: int | None, out: Path, channels: int, batch_size: int, num_samples: int,
        cuda: bool) -> None:  # fmt: skip
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    emoji = load_emoji()
    options = {"batch_size": batch_size, "precision": "bf16" if cuda else "no", "compile": cuda}
    if num_train_steps is None:
        each = pace(network(emoji.vocabulary, channels), emoji.images, emoji.captions, options)
        left = RESERVE * (60 * minutes - (time.perf_counter() - began))
        num_train_steps = max(1, int(left / each / (1 + MEMORY_SHARE * len(SUBSETS))))
        print(f"{each * 1000:.1f} ms a step, {num_train_steps} steps", flush=True)
    options["warmup_steps"] = min(TrainConfig().warmup_steps, num_train_steps // 10)

    config = TrainConfig(num_train_steps, **options)
    states = steps_of(network(emoji.vocabulary, channels), emoji.images, emoji.captions, config)
    model = deque(states, maxlen=1).pop().ema.module
    seconds = time.perf_counter() - began
    rows = [text for text in SHOWN for _ in range(8)]
    grids = [draw(model, rows, scale) for scale in (1.0, 3.0)]
    save_image(torch.cat(grids).float() / 255, out / "captions.png", nrow=8)
    samples = {f"captions-{len(emoji.images)}-{num_train_steps}": draw(model, num_samples)}
    kept = copy.deepcopy(model)
    kept.unet.half()
    kept.save_pretrained(out)

    steps = max(4, int(MEMORY_SHARE * num_train_steps))
    config = TrainConfig(steps, label_dropout=1.0, **options)  # every caption is dropped: a model without words
    for count in SUBSETS:
        images = subset(emoji.images, count, batch_size)
        no_words = torch.zeros(len(images), emoji.captions.shape[1], dtype=torch.long)
        for state in steps_of(network(emoji.vocabulary, channels), images, no_words, config):
            if state.step in (steps // 4, steps // 2, steps):
                samples[f"{count}-{state.step}"] = draw(state.ema.module, num_samples)
    np.savez_compressed(out / "memory.npz", **{name: images.numpy() for name, images in samples.items()})
    info = {
        "command": "python -m experiments.emoji --out FOLDER "
        + (f"--num-train-steps {num_train_steps}" if minutes is None else f"--minutes {minutes:g}"),
        "steps": num_train_steps, "memory_steps": steps, "batch_size": batch_size, "options": options,
        "num_images": len(emoji.images), "seconds_with_compiling": round(seconds, 1),
        "seconds": round(time.perf_counter() - began, 1), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out}")


def main(argv: list[str] | None = None) -> int:
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser = Parser(prog="python -m experiments.emoji", description="Train on emoji and their words.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    how_long = parser.add_mutually_exclusive_group(required=True)
    how_long.add_argument("--minutes", type=number("above 0", lambda m: m > 0), metavar="M", help="in all")
    how_long.add_argument("--num-train-steps", type=whole(), metavar="N", help="of the network that ships")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for weights and samples")
    parser.add_argument("--device", type=one_of("cuda", "cpu"), default=found, metavar="X", help="cuda or cpu")
    parser.add_argument("--channels", type=whole(), default=48, metavar="N", help="width")
    parser.add_argument("--batch-size", type=whole(), default=256, metavar="N", help="images a step")
    parser.add_argument("--num-samples", type=whole(), default=256, metavar="N", help="of each run, for its memory")
    args = vars(parser.parse_args(argv))
    device = args.pop("device")
    if device == "cuda" and found == "cpu":
        parser.error("--device: no CUDA GPU is found here")
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"
    run(**args, cuda=device == "cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())
