"""How network and optimiser were chosen, for chapter 5: python -m experiments.choices [--help].

Each run trains from the start for the same seconds of processor time on one thread, with one thing changed, and the
learning rate follows the share of the time that is used. Then the shipped classifier looks at 1,000 samples.
"""

import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm_tutorial.data import load_fashion_mnist, seeded_generator
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.drawing import draw_images
from ddpm_tutorial.losses import simple_loss
from ddpm_tutorial.metrics import Classifier, Seen, look, sample_figures, spread
from ddpm_tutorial.optimizer import make_optimizers
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.settings import TrainConfig, number, one_of, whole
from ddpm_tutorial.training import EMA, training_batches
from ddpm_tutorial.unet import UNet

from .common import PROCESSES, Table, fingerprint, jobs_of, pixel_figures, rows_of, run_command, table_parser

DEFAULTS = {"seconds": 300.0}
SEEDS = 3
NUM_IMAGES, NUM_STEPS = 1000, 25  # of DDIM
WARMUP, COOLDOWN = 0.02, 0.3  # shares of the time
SMALL_T = 0.15  # share of the timesteps that "more small t" draws again, with 1/t
BASE = {
    "channels": 48, "head": True, "optimizer": "muon", "lr": 6e-3, "batch_size": 64, "fast": False, "small_t": False
}  # fmt: skip
RUNS = {
    "Adam, no head": {"optimizer": "adam", "lr": 2e-3, "head": False},
    "Adam": {"optimizer": "adam", "lr": 2e-3},
    "Adam, 5e-3": {"optimizer": "adam", "lr": 5e-3},
    "Muon, no head": {"head": False},
    "Muon": {},
    "Muon, 3e-3": {"lr": 3e-3},
    "Muon, 1.2e-2": {"lr": 1.2e-2},
    "batch of 32": {"batch_size": 32},
    "batch of 128": {"batch_size": 128},
    "64 channels": {"channels": 64},
    "bf16, compiled": {"fast": True},
    "64 channels, bf16, compiled": {"channels": 64, "fast": True},
    "more small t": {"small_t": True},
}


def build(settings: dict, seed: int) -> NoisePredictor:
    torch.manual_seed(seed)
    unet = UNet(channels=settings["channels"], patch_size=2, num_classes=10)
    if not settings["head"]:  # the folded pixels are the output
        unet.head, unet.conv_out = None, nn.Conv2d(unet.channels, unet.patch_size**2, 3, padding=1)
        nn.init.zeros_(unet.conv_out.weight)
    return NoisePredictor(unet, GaussianDiffusion.from_schedule(), "v").to(memory_format=torch.channels_last)


def train_for(seconds: float, settings: dict, seed: int, images: Tensor, labels: Tensor) -> tuple[NoisePredictor, int]:
    """The averaged network after these seconds of this process's processor time, and the steps that they allowed: the
    loop of ``ddpm_tutorial.training``, with a learning rate that depends on the time used."""
    model = build(settings, seed).train()
    config = TrainConfig(
        10**9, settings["batch_size"], lr=settings["lr"], optimizer=settings["optimizer"], seed=seed
    )  # fmt: skip
    optimizers, ema = make_optimizers(model.unet, config, fused=True), EMA(model, config.ema_decay)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings["fast"])
    network = torch.compile(model.unet) if settings["fast"] else model.unet
    began = None
    for step, x_0, t, noise, y in training_batches(model, images, labels, config, 0):
        if settings["small_t"]:
            generator = seeded_generator(seed, step, 2)
            again = torch.rand(len(t), generator=generator) < SMALL_T
            t = torch.where(again, model.diffusion.num_timesteps ** torch.rand(len(t), generator=generator), t).long()
        x_t = model.diffusion.q_sample(x_0, t, noise).contiguous(memory_format=torch.channels_last)
        with autocast:
            output = network(x_t, t, y)
        simple_loss(output.float(), model.wanted(x_0, t, noise)).backward()
        if began is None:  # the first batch compiles, outside the clock, and is not learned from
            model.zero_grad()
            began = time.process_time()
            continue
        used = (time.process_time() - began) / seconds
        if used >= 1:
            return ema.module, step - 2
        nn.utils.clip_grad_norm_(model.unet.parameters(), config.grad_clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1, (used + 1e-3) / WARMUP, (1 - used) / COOLDOWN)
            optimizer.step()
            optimizer.zero_grad()
        ema.update_parameters(model)


def train_and_judge(job: dict, seconds: float, data: str | None, reference: Seen) -> dict:
    torch.set_num_threads(1)
    train, settings = load_fashion_mnist("train", data), job["options"]
    model, steps = train_for(seconds, settings, job["seed"], train.images, train.labels)
    labels = torch.arange(NUM_IMAGES) % 10
    samples = draw_images(model, labels, num_inference_steps=NUM_STEPS)
    figures = sample_figures(look(samples), labels, reference) | pixel_figures(samples, train.images)
    return {"steps": steps, "images_seen": steps * settings["batch_size"]} | figures


def run(
    command: str, out: Path, seconds: float, data: str | None = None, runs: list[str] | None = None,
    seeds: int = SEEDS, processes: int = PROCESSES,
) -> None:  # fmt: skip
    images = load_fashion_mnist("train", data).images
    settings = {
        "seconds": seconds, "num_images": NUM_IMAGES, "sampler": f"ddim, {NUM_STEPS} steps",
        "num_train_images": len(images), "device": "cpu", "classifier": fingerprint(Classifier.shipped),
    }  # fmt: skip
    table = Table(out, command, settings, jobs_of(BASE, RUNS, range(SEEDS)))
    table.missing = [job for job in table.missing if job["run"] in (runs or RUNS) and job["seed"] < seeds]
    if table.missing:
        make = partial(train_and_judge, seconds=seconds, data=data, reference=look(images))
        table.fill(make, processes=processes)
    table["runs"] = over_seeds(table.result["rows"])


def over_seeds(rows: list[dict]) -> dict:
    """For each run, the mean and standard deviation of its numbers over the seeds."""
    found = {}
    for name, of_run in rows_of(BASE, RUNS, rows).items():
        sets = [{key: value for key, value in row.items() if isinstance(value, int | float) and key != "seed"}
                for row in of_run]  # fmt: skip
        found[name] = {"options": of_run[0]["options"], "seeds": len(sets), "figures": spread(sets)}
    return found


def main(argv: list[str] | None = None) -> int:
    about = "Networks and optimisers after equal processor time."
    parser = table_parser("choices", about, "choices-cpu", trains=True)
    parser.add_argument("--runs", type=one_of(*RUNS), nargs="+", metavar="NAME", help=f"of: {'; '.join(RUNS)}")
    parser.add_argument("--seeds", type=whole(1, SEEDS), metavar="N", help=f"the first N (default: {SEEDS})")
    parser.add_argument("--seconds", type=number("above 0", lambda s: s > 0), metavar="S",
                        help="of processor time, for the training of each run (default: 300)")  # fmt: skip
    parser.add_argument("--processes", type=whole(1, 64), metavar="N", help=f"runs at a time (default: {PROCESSES})")
    return run_command(parser, argv, run, DEFAULTS)


if __name__ == "__main__":
    sys.exit(main())
