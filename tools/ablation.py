"""The ablation of chapter 8: python tools/ablation.py --data SOURCE [--help].

Trains a small U-Net again and again, each time with one thing changed, draws samples from each, and writes what the
shipped classifier sees in them to ablation-cpu.json (or -cuda) in the package's results. All runs have the same number
of steps, batch, seed and first weights. A run that is in the file already is left out: stop it at any time, and start
it again.
"""

import multiprocessing
import os
import sys
import time
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json

import torch
from measure import machine, write_json

from ddpm_tutorial.arguments import Parser
from ddpm_tutorial.data import load_fashion_mnist, seeded_generator
from ddpm_tutorial.diffusion import SCHEDULES, GaussianDiffusion
from ddpm_tutorial.evaluation import real_figures
from ddpm_tutorial.guidance import classifier_free
from ddpm_tutorial.losses import LOSSES
from ddpm_tutorial.metrics import Classifier, Seen, look, sample_figures
from ddpm_tutorial.results import RESULTS_FOLDER
from ddpm_tutorial.sampling import sample_ddim, sample_ddpm, sample_images
from ddpm_tutorial.training import TrainConfig, train
from ddpm_tutorial.unet import Stage, UNet

BASE = {"schedule": "linear", "loss": "l2", "target": "noise", "num_timesteps": 1000, "seed": 0}
RUNS = {f"{schedule}, {loss}": {"schedule": schedule, "loss": loss} for schedule in SCHEDULES for loss in LOSSES} | {
    "linear, l2, seed 1": {"seed": 1},
    "linear, l2, seed 2": {"seed": 2},
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


def train_and_judge(name: str, options: dict, reference: Seen) -> dict:
    """One run: its settings, its seconds, and the figures of its samples beside ``reference``, the training images."""
    torch.set_num_threads(options["threads"])
    settings = BASE | RUNS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_fashion_mnist("train", options["data"])
    images, labels = data.images, data.labels
    if settings.get("flips"):  # each image and its mirror image
        images, labels = torch.cat([images, images.flip(-1)]), labels.repeat(2)
    diffusion = GaussianDiffusion.from_schedule(settings["schedule"], settings["num_timesteps"])
    torch.manual_seed(settings["seed"])
    model = UNet(
        channels=options["channels"], patch_size=2, num_classes=10,
        **{key: settings[key] for key in ("target", "schedule", "num_timesteps")},
    )  # fmt: skip
    if not settings.get("attention", True):
        for stage in [module for module in model.modules() if isinstance(module, Stage)]:
            stage.attention = torch.nn.Identity()
    steps = options["num_train_steps"]
    config = TrainConfig(
        steps, options["batch_size"], lr=options["lr"], warmup_steps=steps // 20,
        target=settings["target"], loss=settings["loss"], seed=settings["seed"],
    )  # fmt: skip
    began = time.perf_counter()
    last = deque(train(model, diffusion, images, labels, config), maxlen=1).pop()
    seconds = time.perf_counter() - began

    classifier = Classifier.from_pretrained().to(device)
    rows = {}
    for sampling, how in (SAMPLINGS | FURTHER.get(name, {})).items():
        network = last.ema.module if how.get("ema", True) else model.eval()
        drawn, labels = draw(network, diffusion, options["num_images"], how)
        rows[sampling] = sample_figures(look(drawn, classifier), labels, reference)
    return {"settings": settings, "training_seconds": round(seconds), "figures": rows}


def draw(network: UNet, diffusion: GaussianDiffusion, count: int, how: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` images, the classes in turn, drawn as ``how`` says, and their labels."""
    sampler = {"ddim": sample_ddim, "ddpm": sample_ddpm}[how["sampler"]]
    options = {key: value for key, value in how.items() if key not in ("sampler", "ema")}
    device = diffusion.betas.device
    labels, generator, parts = torch.arange(count) % 10, seeded_generator(0, device=device), []
    for batch in labels.split(250):
        noise_model = classifier_free(network, batch.to(device))
        steps = sampler(noise_model, diffusion, (len(batch), 1, 28, 28), generator=generator, **options)
        parts.append(sample_images(steps).cpu())
    return torch.cat(parts), labels


def main(argv: list[str] | None = None) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = Parser(prog="ablation.py", description="The ablation of chapter 8.")
    parser.add_argument("--data", required=True, metavar="SOURCE", help="'hub', 'sample', or a folder of IDX files")
    parser.add_argument("--runs", nargs="+", metavar="NAME", help=f"these only, of: {'; '.join(RUNS)}")
    parser.add_argument("--num-train-steps", type=int, default=1200, metavar="N", help="of each run (default: 1200)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="(default: 32)")
    parser.add_argument("--channels", type=int, default=24, metavar="N", help="width of the U-Net (default: 24)")
    parser.add_argument("--lr", type=float, default=2e-3, metavar="X", help="peak learning rate (default: 2e-3)")
    parser.add_argument("--num-images", type=int, default=300, metavar="N", help="samples a row (default: 300)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    out = RESULTS_FOLDER / f"ablation-{device.type}.json"
    parser.add_argument("--out", type=Path, default=out, metavar="FILE.json", help="(default: the package's results)")
    args = parser.parse_args(argv)
    names = args.runs or list(RUNS)
    for name in names:
        if name not in RUNS:
            parser.error(f"--runs knows {'; '.join(RUNS)}; got {name!r}")
    for option in ("num_train_steps", "batch_size", "processes"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1, got {getattr(args, option)}")
    if args.out.suffix != ".json" or not args.out.parent.is_dir():
        parser.error(f"--out must be a FILE.json in a folder that exists, got {args.out}")
    fixed = {name: getattr(args, name) for name in ("num_train_steps", "batch_size", "channels", "lr", "num_images")}
    result = {"settings": fixed, "machine": machine(device), "runs": {}}
    try:
        if args.out.exists():
            result = json.loads(args.out.read_text(encoding="utf-8"))
            if result["settings"] != fixed:
                parser.error(f"{args.out} holds runs of other settings, {result['settings']}; --out takes another file")
        reference = look(load_fashion_mnist("train", args.data).images)
        if "real" not in result:
            result["real"] = real_figures(load_fashion_mnist("test", args.data), reference, args.num_images)
            write_json(args.out, result)
    except (ValueError, OSError, KeyError) as error:
        parser.error(f"{error}")
    wanted = [name for name in names if name not in result["runs"]]
    options = fixed | {"data": args.data, "threads": max(1, torch.get_num_threads() // args.processes)}
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        running: dict[Future, str] = {pool.submit(train_and_judge, name, options, reference): name for name in wanted}
        for done in as_completed(running):
            name = running[done]
            result["runs"][name] = done.result()
            result["runs"] = {known: result["runs"][known] for known in RUNS if known in result["runs"]}
            write_json(args.out, result)
            row = next(iter(result["runs"][name]["figures"].values()))
            print(f"{name:20s} " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
