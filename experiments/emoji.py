"""Emoji and their words (chapter 11): python -m experiments.emoji --out FOLDER (--minutes M | --num-train-steps N).

Trains the network that ships, on all emoji and their captions; then the same one three times without words, a third as
long, on 100, 1,000 and all emoji, and draws samples at a quarter, at half and at the end of each. On a GPU in bf16 and
compiled, where a few minutes are enough; --compile does so on a CPU, which should have instructions for bf16.

FOLDER gets config.json and model.safetensors (16-bit), how they were made as training.json, how near the samples come
to the images of their training as emoji.json, eight samples of each run as emoji.npz, and a grid of captions as
captions.png; and of each run, which is not made again where it is there, all samples: words.npz, 100.npz, ... To ship
them, copy the first three to ddpm_tutorial/weights/emoji and the next two to ddpm_tutorial/results.
"""

import copy
import json
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
from ddpm_tutorial.files import written_aside
from ddpm_tutorial.guidance import classifier_free
from ddpm_tutorial.metrics import nearest_neighbours
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import sample_ddim, sample_images
from ddpm_tutorial.settings import TrainConfig, number, one_of, whole
from ddpm_tutorial.training import processes, train
from ddpm_tutorial.unet import UNet
from ddpm_tutorial.words import Emoji, captions_of, load_emoji

from .benchmark.measure import ENDLESS, pace
from .common import differences, fingerprint, machine, outcome, parsed_for_device

SUBSETS = (100, 1000, 1911)  # how many emoji the three runs without words see
MEMORY_SHARE = 1 / 3  # their steps over those of the network that ships
RESERVE = 0.8  # of the time that is left after compiling, for the steps; the rest is for drawing samples
OPTIONS_FILE = "options.json"  # what all runs of a folder have in common
QUANTILES = (5, 25, 50, 75, 95)  # in percent
SHOWN = ("red heart", "green heart", "blue apple", "cat face", "smiling face with tears", "person running", "flag", "")


def network(vocabulary: tuple[str, ...], channels: int) -> NoisePredictor:
    torch.manual_seed(0)  # the initial weights
    unet = UNet(in_channels=3, channels=channels, patch_size=2, num_classes=len(vocabulary))
    return NoisePredictor(unet, GaussianDiffusion.from_schedule("cosine"), "v", (3, 32, 32), vocabulary)


def shuffled(count: int) -> Tensor:
    """The order in which the three runs take images: a run of more images has those of a run of fewer."""
    return torch.randperm(count, generator=seeded_generator(0))


def subset(images: Tensor, count: int, batch_size: int) -> Tensor:
    """``count`` of the images, as often as makes a batch."""
    chosen = images[shuffled(len(images))[:count]]
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


def nearness(distances: Tensor) -> dict[str, float]:
    """Quantiles of distances to the nearest training image, in grey levels."""
    return {f"q{q}": round(distances.quantile(q / 100).item(), 2) for q in QUANTILES}


def memory_rows(samples: dict[str, Tensor], images: Tensor, batch_size: int) -> list[dict]:
    """How near samples come to the images of their training, and how near images come that were not in it (of all
    images: each to the others). A copy is nearer than 95 of 100 such new images are. ``samples`` by kind-count-step."""
    order, rows, new = shuffled(len(images)), [], {}
    for name, drawn in samples.items():
        kind, count, step = name.split("-")
        count, step = int(count), int(step)
        seen, unseen = images[order[:count]], images[order[count:]]
        if count not in new:
            if len(unseen):
                new[count] = nearest_neighbours(unseen, seen)[0]
            else:
                apart = torch.cdist(*[images.flatten(1).float()] * 2).fill_diagonal_(torch.inf)
                new[count] = apart.min(1).values / images[0].numel() ** 0.5
            rows.append({"samples": "new images", "num_images": count} | nearness(new[count]))
        distances = nearest_neighbours(drawn, seen)[0]
        copies = (distances < new[count].quantile(0.05)).double().mean().item()
        passes = round(step * batch_size / count, 1)
        told = {"samples": kind, "num_images": count, "step": step, "passes": passes, "copies": round(copies, 3)}
        rows.append(told | nearness(distances))
    return rows


def begun(out: Path) -> dict:
    """The options that the runs in a folder have, {} where none was begun."""
    file = out / OPTIONS_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def begin(out: Path, options: dict) -> None:
    """The runs of a folder are compared: ValueError where others were begun there with other options."""
    if other := differences(begun(out) or options, options):
        raise ValueError(f"{out} was begun with {other}: choose another --out, or its options")
    with written_aside(out / OPTIONS_FILE) as aside:
        aside.write_text(json.dumps(options), encoding="utf-8")


def run(minutes: float | None, num_train_steps: int | None, out: Path, channels: int, batch_size: int, num_samples: int,
        compile: bool, only: str | None, cuda: bool) -> None:  # fmt: skip
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    emoji = load_emoji()
    fast, num_train_steps = cuda or compile, num_train_steps or begun(out).get("steps")
    options = {"batch_size": batch_size, "precision": "bf16" if fast else "no", "compile": fast}
    if num_train_steps is None:
        probe, config = network(emoji.vocabulary, channels), TrainConfig(ENDLESS, **options)
        states = train(probe, emoji.images, emoji.captions, config)
        each = pace(states, 60 * minutes / 20, processes().device)[1]
        left = RESERVE * (60 * minutes - (time.perf_counter() - began))
        num_train_steps = max(1, int(left / each / (1 + MEMORY_SHARE * len(SUBSETS))))
        print(f"{each * 1000:.1f} ms a step, {num_train_steps} steps", flush=True)
    begin(out, {"steps": num_train_steps, "channels": channels, "num_samples": num_samples} | options)
    options["warmup_steps"] = min(TrainConfig().warmup_steps, num_train_steps // 10)

    settings = {"steps": num_train_steps, "channels": channels, "batch_size": batch_size, "num_samples": num_samples}
    if only != "memory":
        train_with_words(emoji, channels, TrainConfig(num_train_steps, **options), num_samples, out)
    if only != "words":
        steps = max(4, int(MEMORY_SHARE * num_train_steps))
        for count in SUBSETS:
            train_without(emoji, count, channels, TrainConfig(steps, label_dropout=1.0, **options), num_samples, out)
    parts = [out / f"{name}.npz" for name in ("words", *SUBSETS)]
    if all(part.exists() for part in parts):
        together(emoji, parts, settings | {"options": options}, out)


def kept(path: Path, samples: dict[str, Tensor], began: float) -> None:
    """Samples by kind-count-step, and the seconds since ``began`` that they took."""
    seconds = time.perf_counter() - began
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, seconds=seconds, **{name: images.numpy() for name, images in samples.items()})


def train_with_words(emoji: Emoji, channels: int, config: TrainConfig, num_samples: int, out: Path) -> None:
    if (out / "words.npz").exists():
        return
    began = time.perf_counter()
    states = steps_of(network(emoji.vocabulary, channels), emoji.images, emoji.captions, config)
    model = deque(states, maxlen=1).pop().ema.module
    rows = [text for text in SHOWN for _ in range(8)]
    grids = [draw(model, rows, scale) for scale in (1.0, 3.0)]
    save_image(torch.cat(grids).float() / 255, out / "captions.png", nrow=8)
    samples = {f"words-{len(emoji.images)}-{config.num_train_steps}": draw(model, num_samples)}
    half = copy.deepcopy(model)
    half.unet.half()
    half.save_pretrained(out)
    kept(out / "words.npz", samples, began)


def train_without(emoji: Emoji, count: int, channels: int, config: TrainConfig, num_samples: int, out: Path) -> None:
    """On ``count`` emoji, every caption dropped; samples at a quarter, at half and at the end."""
    if (out / f"{count}.npz").exists():
        return
    began, samples, steps = time.perf_counter(), {}, config.num_train_steps
    images = subset(emoji.images, count, config.batch_size)
    no_words = torch.zeros(len(images), emoji.captions.shape[1], dtype=torch.long)
    for state in steps_of(network(emoji.vocabulary, channels), images, no_words, config):
        if state.step in (steps // 4, steps // 2, steps):
            samples[f"plain-{count}-{state.step}"] = draw(state.ema.module, num_samples)
    kept(out / f"{count}.npz", samples, began)


def together(emoji: Emoji, parts: list[Path], settings: dict, out: Path) -> None:
    samples, seconds = {}, {}
    for part in parts:
        with np.load(part) as file:
            seconds[part.stem] = round(float(file["seconds"]), 1)
            samples |= {name: torch.from_numpy(file[name]) for name in file.files if name != "seconds"}
    np.savez_compressed(out / "emoji.npz", **{name: drawn[:8].numpy() for name, drawn in samples.items()})
    compiled = " --compile" if settings["options"]["compile"] and processes().device.type == "cpu" else ""
    command = (
        f"python -m experiments.emoji --num-train-steps {settings['steps']} --channels {settings['channels']} "
        f"--batch-size {settings['batch_size']} --num-samples {settings['num_samples']}{compiled} --out FOLDER"
    )
    device, memory_steps = processes().device, max(int(name.split("-")[2]) for name in samples if "plain" in name)
    settings |= {"memory_steps": memory_steps, "num_images": len(emoji.images), "seed": 0, "device": device.type}
    info = {"command": command, **settings, "seconds": seconds, "torch": torch.__version__}
    (out / "training.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    table = {
        "rows": memory_rows(samples, emoji.images, settings["batch_size"]),
        "settings": settings | {"emoji": fingerprint(out)}, "command": command, "machine": machine(device),
    }  # fmt: skip
    (out / "emoji.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.emoji", description="Train on emoji and their words.")
    how_long = parser.add_mutually_exclusive_group(required=True)
    how_long.add_argument("--minutes", type=number("above 0", lambda m: m > 0), metavar="M", help="in all")
    how_long.add_argument("--num-train-steps", type=whole(), metavar="N", help="of the network that ships")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for weights and samples")
    parser.add_argument("--compile", action="store_true", help="bf16 and compiled on a CPU, too")
    parser.add_argument("--channels", type=whole(), default=48, metavar="N", help="width (default: 48)")
    parser.add_argument("--batch-size", type=whole(), default=256, metavar="N", help="images a step (default: 256)")
    parser.add_argument("--num-samples", type=whole(), default=256, metavar="N",
                        help="of each run, for its memory (default: 256)")  # fmt: skip
    parser.add_argument("--only", type=one_of("words", "memory"), metavar="X",
                        help="words (the network that ships) or memory (the other three)")  # fmt: skip
    args = parsed_for_device(parser, argv)
    device = args.pop("device")
    return outcome(parser.prog, lambda: run(**args, cuda=device.type == "cuda"), args["out"])


if __name__ == "__main__":
    sys.exit(main())
