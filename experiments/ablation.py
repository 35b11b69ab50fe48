"""The ablation of chapter 8: python -m experiments.ablation [--help].

Trains a small network again and again, each time with one thing changed and with three seeds, draws samples from each,
and has the shipped classifier look at them. All runs have the same number of steps and the recipe of the package. One
run takes about three minutes of one core.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ddpm_tutorial.data import load_fashion_mnist, seeded_generator
from ddpm_tutorial.diffusion import SCHEDULES, GaussianDiffusion
from ddpm_tutorial.guidance import classifier_free
from ddpm_tutorial.losses import LOSSES
from ddpm_tutorial.metrics import Classifier, Seen, look, real_figures, sample_figures, spread
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import sample_ddim, sample_ddpm, sample_images
from ddpm_tutorial.settings import TrainConfig, number, one_of, whole
from ddpm_tutorial.training import train
from ddpm_tutorial.unet import Stage, UNet

from .common import PROCESSES, Table, cuda_or_cpu, fingerprint, jobs_of, rows_of, run_command, table_parser

DEFAULTS = {"num_train_steps": 1200, "batch_size": 32, "channels": 24, "lr": 6e-3, "num_images": 500}
SEEDS = (0, 1, 2)
BASE = {"schedule": "linear", "loss": "l2", "target": "noise", "num_timesteps": 1000}
RUNS = {f"{schedule}, {loss}": {"schedule": schedule, "loss": loss} for schedule in SCHEDULES for loss in LOSSES} | {
    "target v": {"target": "v"},
    "target x_0": {"target": "x_0"},
    "no attention": {"attention": False},
    "horizontal flips": {"flips": True},
    "T = 100": {"num_timesteps": 100},
}
# How samples are drawn: every run by the first; these others of one run show what sampling alone changes.
DDIM = {"sampler": "ddim", "num_inference_steps": 50}
SAMPLINGS = {"DDIM, 50 steps": DDIM}
FURTHER = {
    "linear, l2": {
        "DDIM, 50 steps, last weights instead of EMA": DDIM | {"ema": False},
        "DDIM, 50 steps, x_0 not clipped": DDIM | {"clip_denoised": False},
        "DDIM, 10 steps": DDIM | {"num_inference_steps": 10},
    },
    "T = 100": {
        "DDPM, all 100 steps, σ² = β̃": {"sampler": "ddpm", "variance": "posterior"},
        "DDPM, all 100 steps, σ² = β": {"sampler": "ddpm", "variance": "beta"},
    },
}


def train_and_judge(job: dict, options: dict, data: str | None, reference: Seen) -> dict:
    """One run: the figures of its samples beside ``reference``, the training images."""
    torch.set_num_threads(options["threads"])
    settings = job["options"]
    images, labels, _ = load_fashion_mnist("train", data)
    if settings.get("flips"):  # each image and its mirror image
        images, labels = torch.cat([images, images.flip(-1)]), labels.repeat(2)
    torch.manual_seed(job["seed"])
    unet = UNet(channels=options["channels"], patch_size=2, num_classes=10)
    if not settings.get("attention", True):
        for stage in [module for module in unet.modules() if isinstance(module, Stage)]:
            stage.attention = torch.nn.Identity()
    diffusion = GaussianDiffusion.from_schedule(settings["schedule"], settings["num_timesteps"])
    steps = options["num_train_steps"]
    config = TrainConfig(
        steps, options["batch_size"], lr=options["lr"], warmup_steps=steps // 20, loss=settings["loss"],
        seed=job["seed"],
    )  # fmt: skip
    *_, last = train(NoisePredictor(unet, diffusion, settings["target"]), images, labels, config)

    judge, rows = Classifier.from_pretrained().to(last.model.device), {}
    for sampling, how in (SAMPLINGS | FURTHER.get(job["run"], {})).items():
        model = last.ema.module if how.get("ema", True) else last.model.eval()
        drawn, labels = draw(model, options["num_images"], how)
        rows[sampling] = sample_figures(look(drawn, judge), labels, reference)
    return {"figures": rows}


def draw(model: NoisePredictor, count: int, how: dict) -> tuple[Tensor, Tensor]:
    """``count`` images, the classes in turn, drawn as ``how`` says, and their labels."""
    sampler = {"ddim": sample_ddim, "ddpm": sample_ddpm}[how["sampler"]]
    options = {key: value for key, value in how.items() if key not in ("sampler", "ema")}
    labels, generator, parts = torch.arange(count) % 10, seeded_generator(0, device=model.device), []
    for batch in labels.split(250):
        noise_model = classifier_free(model, batch.to(model.device))
        steps = sampler(noise_model, model.diffusion, (len(batch), 1, 28, 28), generator=generator, **options)
        parts.append(sample_images(steps).cpu())
    return torch.cat(parts), labels


def over_seeds(rows: list[dict]) -> dict:
    """For each run and each sampling of it, the mean and standard deviation of each figure over the seeds."""
    found = {}
    for run, of_run in rows_of(BASE, RUNS, rows).items():
        sets = [row["figures"] for row in of_run]
        figures = {sampling: spread([figures[sampling] for figures in sets]) for sampling in sets[0]}
        found[run] = {"options": of_run[0]["options"], "seeds": len(sets), "figures": figures}
    return found


def run(
    command: str, out: Path, data: str | None = None, runs: list[str] | None = None, seeds: int = len(SEEDS),
    processes: int = PROCESSES, **options,
) -> None:  # fmt: skip
    train_set = load_fashion_mnist("train", data)
    settings = options | {
        "optimizer": TrainConfig().optimizer, "num_train_images": len(train_set.images), "device": cuda_or_cpu().type,
        "classifier": fingerprint(Classifier.shipped),
    }  # fmt: skip
    table = Table(out, command, settings, jobs_of(BASE, RUNS, SEEDS))
    table.missing = [job for job in table.missing if job["run"] in (runs or RUNS) and job["seed"] < seeds]
    if table.missing:
        reference = look(train_set.images)
        if "real" not in table:
            table["real"] = real_figures(load_fashion_mnist("test", data), reference, options["num_images"])
        options["threads"] = max(1, torch.get_num_threads() // processes)
        table.fill(partial(train_and_judge, options=options, data=data, reference=reference), processes=processes)
    table["runs"] = over_seeds(table.result["rows"])


def main(argv: list[str] | None = None) -> int:
    name = f"ablation-{cuda_or_cpu().type}"
    parser = table_parser("ablation", "The ablation of chapter 8.", name, trains=True)
    parser.add_argument("--runs", type=one_of(*RUNS), nargs="+", metavar="NAME", help=f"of: {'; '.join(RUNS)}")
    parser.add_argument("--seeds", type=whole(1, len(SEEDS)), metavar="N", help="the first N (default: 3)")
    parser.add_argument("--num-train-steps", type=whole(), metavar="N", help="of each run (default: 1200)")
    parser.add_argument("--batch-size", type=whole(), metavar="N", help="(default: 32)")
    parser.add_argument("--channels", type=whole(), metavar="N", help="width of the U-Net (default: 24)")
    parser.add_argument("--lr", type=number("above 0", lambda lr: lr > 0), metavar="X", help="(default: 6e-3)")
    parser.add_argument("--num-images", type=whole(97), metavar="N", help="samples a row (default: 500)")
    parser.add_argument("--processes", type=whole(1, 64), metavar="N", help=f"runs at a time (default: {PROCESSES})")
    return run_command(parser, argv, run, DEFAULTS)


if __name__ == "__main__":
    sys.exit(main())
