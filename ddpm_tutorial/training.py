"""Training: the loop, EMA, checkpoints that resume exactly (chapter 5).

``train`` is the loop of DDPM algorithm 1 as a generator; ``train_to_folder`` runs it with a progress bar, a CSV log,
sample grids and checkpoints, and is what the command line calls.
"""

import csv
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torchvision.utils import save_image
from tqdm.auto import tqdm

from .data import batch_indices, seeded_generator, to_model_range
from .diffusion import GaussianDiffusion
from .guidance import classifier_free, drop_labels
from .losses import LOSSES, noise_loss
from .sampling import sample_ddim, sample_images
from .unet import UNet

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
PRECISIONS = ("no", "bf16", "fp16")
STATE_FILE = "state.safetensors"  # everything that resuming needs, in one file, replaced in one move


@dataclass(frozen=True)
class TrainConfig:
    """What a run depends on. ValueError names an option that is out of range."""

    num_train_steps: int = 20_000
    batch_size: int = 64  # over all processes together
    lr: float = 1e-3  # the peak: linear warm-up to it, then a cosine down to 0 at the last step
    warmup_steps: int = 200
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # the largest norm of the gradient
    ema_decay: float = 0.999  # of the weights that sample; lower in the first steps, min(decay, (1 + n) / (10 + n))
    loss: str = "l2"
    label_dropout: float = 0.1  # the share of labels replaced by the null label, for classifier-free guidance
    precision: str = "no"  # float32; "bf16" and "fp16" use autocast
    seed: int = 0

    def __post_init__(self):
        def check(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        for name in ("num_train_steps", "batch_size"):
            check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "weight_decay", "seed"):
            check(name, getattr(self, name) >= 0, "at least 0")
        check("lr", math.isfinite(self.lr) and self.lr > 0, "a positive number")
        check("grad_clip", self.grad_clip > 0, "positive")
        check("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        check("label_dropout", 0 <= self.label_dropout <= 1, "in [0, 1]")
        for name, known in (("optimizer", OPTIMIZERS), ("loss", LOSSES), ("precision", PRECISIONS)):
            check(name, getattr(self, name) in known, f"one of {', '.join(known)}")


class TrainState(NamedTuple):
    """Yielded after every step. ``loss`` and ``grad_norm`` are scalars still on the device (reading one waits for
    it); ``model`` has the raw weights, ``ema`` the averaged ones (``ema.module`` is the U-Net that samples)."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    lr: float
    model: UNet
    ema: AveragedModel
    optimizer: torch.optim.Optimizer


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 1 … num_train_steps: linear warm-up, then half a cosine from ``lr`` to 0."""
    warmup = min(1.0, step / (config.warmup_steps + 1))
    after = max(0, step - config.warmup_steps) / max(1, config.num_train_steps - config.warmup_steps)
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, after)))


def make_ema(model: UNet, decay: float) -> AveragedModel:
    """An exponential moving average of the weights; early on its decay is (1 + n) / (10 + n) at update n, else the
    average would stay near the random start for 1 / (1 − decay) steps."""

    @torch.no_grad()
    def update(averaged, current, num_averaged):
        n = int(num_averaged)
        torch._foreach_lerp_(list(averaged), list(current), 1 - min(decay, (1 + n) / (10 + n)))

    ema = AveragedModel(model, multi_avg_fn=update)
    return ema.eval().requires_grad_(False)


def train(
    model: UNet,
    diffusion: GaussianDiffusion,
    images: Tensor,
    labels: Tensor | None,
    config: TrainConfig,
    resume_from: str | Path | None = None,
) -> Iterator[TrainState]:
    """DDPM algorithm 1 on uint8 ``images`` (N, C, H, W) and ``labels`` (N,), or None for a model without classes.

    Device, precision and processes are those of ``accelerate``; the images live on the device. All randomness of a
    step comes from (seed, step), so a run resumed from the checkpoint folder ``resume_from`` gives the same weights
    as one never stopped. A loss that is not finite raises FloatingPointError.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if config.batch_size > len(images):
        raise ValueError(f"batch_size must lie in 1 … {len(images)} (the number of images), got {config.batch_size}")
    if model.num_classes is None:
        labels = None
    elif labels is None:
        raise ValueError("a class-conditional model needs labels")
    elif labels.shape != images.shape[:1] or not 0 <= labels.min() <= labels.max() < model.num_classes:
        raise ValueError(
            f"labels must be ({len(images)},) in 0 … {model.num_classes - 1}; "
            f"got {tuple(labels.shape)} in {labels.min().item()} … {labels.max().item()}"
        )
    return _train_steps(model, diffusion, images, labels, config, resume_from)  # the checks above run at once


def _train_steps(model, diffusion, images, labels, config, resume_from) -> Iterator[TrainState]:
    accelerator = Accelerator(mixed_precision=config.precision)
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    if config.batch_size % world:
        raise ValueError(f"batch_size {config.batch_size} must be divisible by the number of processes, {world}")
    model.to(device, memory_format=torch.channels_last).train()
    diffusion.to(device)
    images = images.to(device)
    labels = None if labels is None else labels.to(device)
    make_optimizer = OPTIMIZERS[config.optimizer]
    optimizer = make_optimizer(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    ema = make_ema(model, config.ema_decay)
    done = 0 if resume_from is None else load_state(resume_from, model, ema, optimizer)
    parallel, prepared_optimizer = accelerator.prepare(model, optimizer)

    batches = batch_indices(len(images), config.batch_size, config.seed, first_step=done)
    mine = slice(rank * config.batch_size // world, (rank + 1) * config.batch_size // world)
    for step in range(done + 1, config.num_train_steps + 1):
        # Every process draws the whole batch and takes its share: the same run for any number of processes.
        on_cpu = seeded_generator(config.seed, step, 0)
        on_device = seeded_generator(config.seed, step, 1, device=device)
        index = next(batches)
        t = torch.randint(1, diffusion.num_timesteps + 1, (config.batch_size,), generator=on_cpu)[mine]
        noise = torch.randn(config.batch_size, *images.shape[1:], generator=on_device, device=device)[mine]
        x_0 = to_model_range(images[index[mine].to(device)])
        y = None
        if labels is not None:
            dropped = drop_labels(labels[index.to(device)], config.label_dropout, model.num_classes, on_cpu)
            y = dropped[mine]

        x_t = diffusion.q_sample(x_0, t, noise).contiguous(memory_format=torch.channels_last)
        loss = noise_loss(parallel(x_t, t.to(device), y).float(), noise, config.loss)
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step, config)
        prepared_optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        grad_norm = accelerator.clip_grad_norm_(parallel.parameters(), config.grad_clip)
        if not torch.isfinite(grad_norm) and config.precision != "fp16":  # fp16's scaler skips such a step itself
            raise FloatingPointError(
                f"step {step}: the loss is {loss.item()} and the gradient is not finite; "
                "the weights were left as they were. Try a lower --lr or more --warmup-steps."
            )
        prepared_optimizer.step()
        ema.update_parameters(model)
        yield TrainState(step, accelerator.reduce(loss.detach(), "mean"), grad_norm, lr, model, ema, optimizer)


# ------------------------------------------------------------------------------------------ checkpoints
def save_checkpoint(state: TrainState, diffusion: GaussianDiffusion, folder: str | Path, info: dict) -> None:
    """Write ``folder``: model.safetensors (EMA weights) and config.json, diffusion.safetensors, training.json
    (``info``), and the state to resume from. Each file is written aside, then moved into place."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in state.ema.module.state_dict().items()}
    for index, entries in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        metadata = {"step": str(state.step), "averaged": str(int(state.ema.n_averaged))}
        save_file(tensors, aside / STATE_FILE, metadata=metadata)
        state.ema.module.save_pretrained(aside)
        diffusion.save_pretrained(aside)
        (aside / "training.json").write_text(json.dumps(info | {"step": state.step}, indent=2) + "\n")
        (aside / "README.md").unlink(missing_ok=True)  # the hub mixin's empty model card
        for path in sorted(aside.iterdir(), key=lambda path: path.name == STATE_FILE):  # the state last
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_state(folder: str | Path, model: UNet, ema: AveragedModel, optimizer: torch.optim.Optimizer) -> int:
    """Load what ``save_checkpoint`` wrote into the three, and return its step. ValueError for a file that is damaged
    or belongs to another network."""
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            step, averaged = int(file.metadata()["step"]), int(file.metadata()["averaged"])
        groups = {"model": {}, "ema": {}, "optimizer": {}}
        for name, value in tensors.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = value
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in groups["optimizer"].items():
            index, _, entry = name.partition(".")
            moments.setdefault(int(index), {})[entry] = value
        model.load_state_dict(groups["model"])
        ema.module.load_state_dict(groups["ema"])
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged or is not a checkpoint of this network: {reason}") from error
    ema.n_averaged.fill_(averaged)
    return step


def read_training_info(folder: str | Path) -> dict:
    """The contents of a checkpoint's training.json."""
    path = Path(folder) / "training.json"
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint in {folder}: {path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path} is not a checkpoint's training.json")
    return info


# --------------------------------------------------------------------------------------- a run in a folder
def train_to_folder(
    model: UNet,
    diffusion: GaussianDiffusion,
    images: Tensor,
    labels: Tensor | None,
    config: TrainConfig,
    out: str | Path,
    *,
    info: dict | None = None,
    resume: bool = False,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    sample_every: int = 1000,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Run ``train`` to its end in the folder ``out`` and return the last step.

    Writes log.csv every ``log_every`` steps, a checkpoint every ``checkpoint_every``, a grid of EMA samples under
    samples/ every ``sample_every`` (0: none), and a last checkpoint at the end, or when ``should_stop()`` is true.
    ``resume`` continues from the checkpoint in ``out``; without it a folder that holds one is refused. ``info`` is
    written to training.json beside the configuration.
    """
    out = Path(out)
    if (out / STATE_FILE).exists() and not resume:
        raise ValueError(f"{out} already holds a checkpoint: continue it with --resume, or choose another folder")
    main = PartialState().is_main_process
    steps = train(model, diffusion, images, labels, config, resume_from=out if resume else None)
    info = {**(info or {}), "config": asdict(config)}
    state, losses, began = None, [], time.perf_counter()
    if main:
        out.mkdir(parents=True, exist_ok=True)
        for left_behind in out.glob(".writing-*"):  # by a run that was killed while it wrote
            shutil.rmtree(left_behind)
    with tqdm(total=config.num_train_steps, unit="step", mininterval=1, disable=not main) as bar:
        for state in steps:
            losses.append(state.loss)
            last = state.step == config.num_train_steps or should_stop()
            if main and (last or state.step % log_every == 0):
                loss, seconds = torch.stack(losses).mean().item(), time.perf_counter() - began
                row = {
                    "step": state.step,
                    "epoch": round(state.step * config.batch_size / len(images), 4),
                    "loss": f"{loss:.6f}",
                    "grad_norm": f"{state.grad_norm.item():.4f}",
                    "lr": f"{state.lr:.3e}",
                    "images_per_second": round(len(losses) * config.batch_size / seconds, 1),
                }
                _append_row(out / "log.csv", row)
                losses, began = [], time.perf_counter()
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update(state.step - bar.n)
            if main and sample_every and (last or state.step % sample_every == 0):
                _save_samples(state, diffusion, images.shape[1:], out / "samples" / f"step-{state.step:06d}.png")
            if main and (last or state.step % checkpoint_every == 0):
                save_checkpoint(state, diffusion, out, info)
            if last:
                break
    return config.num_train_steps if state is None else state.step


def _append_row(path: Path, row: dict) -> None:
    """Add a row to the log. Rows of this step or later, left by a run that was killed after its last checkpoint, go."""
    old = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    keep = [r for r in old if int(r["step"]) < row["step"]]
    if len(keep) == len(old) and old:
        with path.open("a", newline="") as file:
            csv.DictWriter(file, row).writerow(row)
        return
    aside = path.with_name(".writing-" + path.name)
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows([*keep, row])
    os.replace(aside, path)


def _save_samples(state: TrainState, diffusion: GaussianDiffusion, image_shape: Sequence[int], path: Path) -> None:
    """Eight samples of each class (or 80 without classes) by 20 DDIM steps from one fixed noise, as a grid."""
    model, count = state.ema.module, 80
    device = diffusion.betas.device
    if model.num_classes is not None:
        labels = torch.arange(model.num_classes, device=device).repeat(8)
        model, count = classifier_free(model, labels), len(labels)
    shape = (count, *image_shape)
    steps = sample_ddim(model, diffusion, shape, num_inference_steps=20, generator=seeded_generator(0))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(sample_images(steps).float() / 255, path, nrow=count // 8)
