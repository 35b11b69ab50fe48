"""One training looked at several times, for chapter 5: python -m experiments.progress [--help].

The recipe of the package on Fashion-MNIST. At each moment: the mean loss of the batches since the last one, what the
shipped classifier sees in 1,000 samples of the averaged weights, and ten of these samples, of the same noises each
time; the images are in progress.npz, beside the table.
"""

import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from ddpm_tutorial.data import load_fashion_mnist
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.drawing import draw_images
from ddpm_tutorial.files import written_aside
from ddpm_tutorial.metrics import Classifier, look, real_figures, sample_figures
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.settings import TrainConfig, whole
from ddpm_tutorial.training import train
from ddpm_tutorial.unet import UNet

from .benchmark.peers import shipped_config
from .common import Table, cuda_or_cpu, fingerprint, run_command, table_parser

DEFAULTS = {"num_train_steps": 2000}
SHARES = (1 / 60, 1 / 20, 2 / 15, 1 / 3, 2 / 3, 1)  # of the run, at whose ends it is looked at
NUM_IMAGES, SHOWN = 1000, 10
SAMPLER = {"sampler": "dpmpp-2m", "num_inference_steps": 20, "spacing": "u"}


def run(command: str, out: Path, num_train_steps: int, data: str | None = None) -> None:
    device, moments = cuda_or_cpu(), [max(1, round(share * num_train_steps)) for share in SHARES]
    data_train, data_test = (load_fashion_mnist(split, data) for split in ("train", "test"))
    settings = {
        "num_train_steps": num_train_steps, "batch_size": TrainConfig().batch_size, "seed": TrainConfig().seed,
        "num_images": NUM_IMAGES, "num_train_images": len(data_train.images), "network": shipped_config(),
        "device": device.type, **SAMPLER, "classifier": fingerprint(Classifier.shipped),
    }  # fmt: skip
    table = Table(out, command, settings, [{"step": step} for step in moments])
    if not table.missing and "real" in table:  # that is written last
        return
    table.result["rows"], table.missing = [], list(table.jobs)  # a training cannot be looked at when it is over
    reference, labels = look(data_train.images), torch.arange(NUM_IMAGES) % 10
    torch.manual_seed(0)
    model = NoisePredictor(UNet(**shipped_config()), GaussianDiffusion.from_schedule(), "v")
    states = train(model, data_train.images, data_train.labels, TrainConfig(num_train_steps))
    done, shown = 0, []

    def look_again(job: dict) -> dict:
        nonlocal done
        losses = []
        for state in islice(states, job["step"] - done):
            losses.append(state.loss)
        done = state.step
        samples = draw_images(state.ema.module, labels, **SAMPLER)
        shown.append(samples[:SHOWN])
        return {"loss": torch.stack(losses).mean().item()} | sample_figures(look(samples), labels, reference)

    table.fill(look_again, cost=lambda job: job["step"])
    with written_aside(out.with_suffix(".npz")) as aside, aside.open("wb") as file:
        np.savez_compressed(file, images=torch.stack(shown).numpy(), steps=np.array(moments))
    table["real"] = real_figures(data_test, reference, NUM_IMAGES)


def main(argv: list[str] | None = None) -> int:
    parser = table_parser("progress", "One training, looked at several times.", trains=True)
    parser.add_argument("--num-train-steps", type=whole(30), metavar="N", help="of the run (default: 2000)")
    return run_command(parser, argv, run, DEFAULTS)


if __name__ == "__main__":
    sys.exit(main())
