"""Ten minutes of a GPU: python -m experiments.gpu --minutes 9 --out FOLDER [--data SOURCE] [--only PART...].

Makes the weights of all diffusions of the book and of the autoencoder, then tables of them (the classifiers' come from
``experiments.classifiers``). The parts come in the order of their worth, and each may take its
share of the time that is left:

- ``shipped``: the recipe of the shipped weights, in bf16 and here compiled, in FOLDER/shipped; what ships of it in
  FOLDER/weights
- ``flow``: the same for the velocity (chapter 10) in FOLDER/flow; what ships of it, in 16 bits, in FOLDER/weights/flow
- ``emoji``, ``latents``: those experiments, in FOLDER/emoji and FOLDER/latents; their files say what
  ships
- ``ladder``, ``ladder_flow``, ``guidance_sweep``, ``benchmark``: FOLDER/results, of the weights in FOLDER/weights. What
  no time is left for is left out of a table

The same command goes on where it was cut off: what is there is not made again, its time is for the others. A part that
fails does not stop the others. On a CPU, too, ``--only flow`` makes of a finished training in FOLDER/flow what ships.

To ship them, copy both folders over ``ddpm_tutorial/weights`` and ``ddpm_tutorial/results``: ``make results`` keeps
what is complete and made with the shipped weights, and makes the rest again.
"""

import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from ddpm_tutorial.checkpoint import INFO_FILE, STATE_FILE, read_training_info
from ddpm_tutorial.command import train as command
from ddpm_tutorial.command.arguments import Parser
from ddpm_tutorial.data import load_fashion_mnist
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.settings import TEXT, RunSettings, TrainConfig, number, one_of, whole
from ddpm_tutorial.training import processes, train
from ddpm_tutorial.unet import UNet

from . import emoji, guidance_sweep, ladder, ladder_flow, latents
from .benchmark.__main__ import speed_benchmark
from .benchmark.measure import ENDLESS, pace
from .benchmark.peers import shipped_config
from .common import outcome, parsed_for_device, read_result

WEIGHTS = {"shipped": 45, "flow": 12, "emoji": 15, "latents": 10}
SHARES = WEIGHTS | {"ladder": 8, "ladder_flow": 3, "guidance_sweep": 3, "benchmark": 4}
LATENTS_SHARE = 0.3  # of that part's time, for the training of each of its two models


def seconds_for(parts: list[str], left: float) -> float:
    """Of the seconds that are ``left`` for these parts, those of the first."""
    return left * SHARES[parts[0]] / sum(SHARES[part] for part in parts)


def steps_in(seconds: float, model: NoisePredictor, data: str | None, options: dict) -> int:
    """How many steps of training these seconds allow, a start like this one's included."""
    began, images = time.perf_counter(), load_fashion_mnist("train", data)
    loaded = time.perf_counter() - began
    states = train(model, images.images, images.labels, TrainConfig(ENDLESS, **options))
    start, step = pace(states, seconds / 20, processes().device)
    return max(2, int((seconds - (time.perf_counter() - began) - loaded - start) / step))


def is_complete(folder: Path) -> bool:
    info = read_training_info(folder) if (folder / INFO_FILE).exists() else None
    return info is not None and info["step"] == info["config"]["num_train_steps"]


def trained(
    seconds: float, run: Path, folder: Path, target: str, in_16_bits: bool, data: str | None, channels: int,
    options: dict,
) -> int:  # fmt: skip
    """A training of Fashion-MNIST in the folder ``run``, and of its end what ships in ``folder``."""
    given, status = {} if data is None else {"data": data}, 0
    if is_complete(folder):
        return status
    if (run / STATE_FILE).exists() and not is_complete(run):
        status = command.run(run, resume=True, **given)
    elif not (run / STATE_FILE).exists():
        unet = UNet(channels=channels, patch_size=RunSettings().patch_size, num_classes=10)
        steps = steps_in(seconds, NoisePredictor(unet, GaussianDiffusion.from_schedule(), target), data, options)
        every = {"checkpoint_every": max(1, steps // 5), "sample_every": 0}
        status = command.run(run, **given, target=target, channels=channels, num_train_steps=steps, **options, **every)
    if status == 0:
        model = NoisePredictor.from_pretrained(run)
        if in_16_bits:
            model.unet.half()
        model.save_pretrained(folder)
        for name in (command.LOG_FILE, INFO_FILE):  # the latter says that it is complete
            shutil.copy(run / name, folder / name)
    return status


def trained_latents(seconds: float, out: Path, *options: str) -> int:
    """As long as in a run that was cut off, or as these seconds allow."""
    before = read_result(out / "latents.json").get("settings", {}).get("seconds")
    each = before or max(1, round(LATENTS_SHARE * seconds))
    return latents.main(["--seconds", str(each), "--out", str(out), *options])


def run(
    minutes: float, out: Path, device: torch.device, data: str | None, only: list[str], num_images: int, channels: int,
    batch_size: int,
) -> None:  # fmt: skip
    end, cuda = time.monotonic() + 60 * minutes, device.type == "cuda"
    weights, results = out / "weights", out / "results"
    results.mkdir(parents=True, exist_ok=True)
    load_fashion_mnist("test", data)  # says what is wrong with it, once
    options = {"batch_size": batch_size, "precision": "bf16" if cuda else "no", "compile": cuda}
    network = {"data": data, "channels": channels, "options": options}
    told = f"python -m experiments.gpu --minutes {minutes:g} --num-images {num_images} --out FOLDER --data SOURCE"
    shared = {"command": told, "num_images": num_images, "seed": 0, "data": data, "checkpoint": str(weights)}

    on = ["--device", device.type]

    def until(table: Callable, **options) -> Callable[[float], None]:
        return lambda s: table(**options, until=time.monotonic() + s)

    make = {
        "shipped": lambda s: trained(s, out / "shipped", weights, "v", False, **network),
        "flow": lambda s: trained(s, out / "flow", weights / "flow", "velocity", True, **network),
        "emoji": lambda s: emoji.main(["--minutes", str(s / 60), "--out", str(out / "emoji"), *on]),
        "latents": lambda s: trained_latents(s, out / "latents", *on, *([] if data is None else ["--data", data])),
        "ladder": until(ladder.run, out=results / "ladder.json", **shared),
        "ladder_flow": until(ladder_flow.run, out=results / "ladder-flow.json", flow=str(weights / "flow"), **shared),
        "guidance_sweep": until(
            guidance_sweep.run, out=results / "guidance_sweep.json", **shared,
            num_inference_steps=guidance_sweep.DEFAULTS["num_inference_steps"],
        ),
        "benchmark": until(
            speed_benchmark, command=told, out=results / f"benchmark-{device.type}.json", device=device, rounds=3,
            quick=True,
        ),
    }  # fmt: skip
    left, failed = [part for part in SHARES if part in only], []
    while left:
        seconds = seconds_for(left, max(0.0, end - time.monotonic()))
        part = left.pop(0)
        print(f"{part}: {seconds:.0f} s", flush=True)
        torch.compiler.reset()  # it compiles one function for a few networks only
        try:
            status = 1 if part in WEIGHTS and seconds < 1 else make[part](seconds)
        except Exception:
            traceback.print_exc()
            status = 1
        if status and status > 128:  # stopped by a signal
            raise KeyboardInterrupt
        failed += [part] if status else []
    if failed:
        raise ValueError(f"not made: {', '.join(failed)}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.gpu", description="Train and measure on a GPU in a few minutes.")
    parser.add_argument("--minutes", type=number("above 0", lambda m: m > 0), default=9, metavar="M",
                        help="in all (default: 9)")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for weights and results")
    parser.add_argument("--data", type=TEXT, metavar="SOURCE", help="Fashion-MNIST: hub, sample or a folder")
    parser.add_argument("--only", type=one_of(*SHARES), nargs="+", default=list(SHARES), metavar="PART",
                        help=f"of {', '.join(SHARES)} (default: all)")  # fmt: skip
    parser.add_argument("--num-images", type=whole(), default=2000, metavar="N", help="images a row (default: 2000)")
    parser.add_argument("--channels", type=whole(), default=shipped_config()["channels"], metavar="N",
                        help="width (default: the shipped one's)")  # fmt: skip
    # a step of few images leaves most of a GPU idle
    batch_size = 1024 if torch.cuda.is_available() else TrainConfig().batch_size
    parser.add_argument("--batch-size", type=whole(), default=batch_size, metavar="N",
                        help=f"images a step (default: {batch_size} here)")  # fmt: skip
    args = parsed_for_device(parser, argv)
    return outcome(parser.prog, lambda: run(**args), args["out"])


if __name__ == "__main__":
    sys.exit(main())
