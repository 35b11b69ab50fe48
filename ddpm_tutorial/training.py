"""Training: the loop, EMA, and a run in a folder that can be stopped at any moment (chapter 5).

``train`` is the loop of DDPM algorithm 1 as a generator; ``train_to_folder`` runs it with a progress bar, a CSV log,
sample grids and checkpoints, and is what the command line calls. Both run on one device, or on as many as
``accelerate launch`` or ``torchrun`` starts processes for.
"""

import csv
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torchvision.utils import save_image
from tqdm.auto import tqdm

from .checkpoint import (
    STATE_FILE,
    TrainState,
    load_state,
    read_training_info,
    remove_left_behind,
    repair_model,
    save_checkpoint,
    written_aside,
)
from .data import batch_indices, seeded_generator, to_model_range
from .diffusion import TARGETS, GaussianDiffusion, check_made_for
from .guidance import classifier_free, drop_labels
from .losses import LOSSES, draw_timesteps, target_loss, timestep_probabilities
from .sampling import sample_ddim, sample_images
from .unet import UNet

__all__ = [
    "STATE_FILE", "TrainConfig", "TrainState", "WriteError", "learning_rate", "make_ema", "processes",
    "read_training_info", "save_checkpoint", "train", "train_steps", "train_to_folder",
]  # fmt: skip
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class WriteError(OSError):
    """A run's folder could not be written to: a full disk, say."""


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
    target: str = "noise"  # what the loss compares: "noise" (L_simple) or "x_0" with t uniform, "v" with its angle so
    loss: str = "l2"
    label_dropout: float = 0.1  # the share of labels replaced by the null label, for classifier-free guidance
    precision: str = "no"  # float32; "bf16" and "fp16" use autocast
    compile: bool = False  # torch.compile: minutes before the first step, then faster ones
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
        choices = {"target": TARGETS, "loss": LOSSES, "optimizer": OPTIMIZERS, "precision": PRECISIONS}
        for name, known in choices.items():
            check(name, getattr(self, name) in known, f"one of {', '.join(known)}")


def processes() -> PartialState:
    """This process's ``device`` and its place among those that ``accelerate launch`` or ``torchrun`` started. The
    best device there is, or the CPU where ACCELERATE_USE_CPU=1 is set."""
    # Without cpu=True, accelerate takes processes that torchrun started on a machine without GPUs for strangers.
    cpus = "LOCAL_RANK" in os.environ and not (torch.cuda.is_available() or torch.xpu.is_available())
    return PartialState(cpu=cpus or parse_flag_from_env("ACCELERATE_USE_CPU"))


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


# ---------------------------------------------------------------------------------------------- the loop
def train(
    model: UNet,
    diffusion: GaussianDiffusion,
    images: Tensor,
    labels: Tensor | None,
    config: TrainConfig,
    resume_from: str | Path | None = None,
) -> Iterator[TrainState]:
    """DDPM algorithm 1 on uint8 ``images`` (N, C, H, W) and ``labels`` (N,), or None for a model without classes.

    Checks what it is given, then runs ``train_steps``. All randomness of a step comes from (seed, step), so a run
    resumed from the checkpoint folder ``resume_from`` gives the same weights as one never stopped, and one in several
    processes the same as in one, within rounding. A loss that is not finite raises FloatingPointError.
    """
    check_made_for(model, diffusion, config.target)
    world, device = processes().num_processes, processes().device
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if images.shape[1] != model.in_channels:
        raise ValueError(f"the U-Net takes {model.in_channels} channels, and the images have {images.shape[1]}")
    height, width, divisor = *images.shape[2:], model.size_divisor
    if height % divisor or width % divisor:
        near = sorted({max(1, size // divisor + i) * divisor for size in (height, width) for i in (0, 1)})
        raise ValueError(
            f"images are {height}×{width}, and this U-Net needs sizes divisible by {divisor}: "
            f"{' or '.join(map(str, near))} (--image-size), say"
        )
    if config.batch_size > len(images):
        raise ValueError(f"batch_size must lie in 1 … {len(images)} (the number of images), got {config.batch_size}")
    if config.batch_size % world:
        raise ValueError(f"batch_size {config.batch_size} must be divisible by the number of processes, {world}")
    if config.precision == "fp16" and device.type == "mps":
        raise ValueError("precision fp16 does not train on mps: use bf16 or no")
    if model.num_classes is None:
        labels = None
    elif labels is None:
        raise ValueError("a class-conditional model needs labels")
    elif labels.shape != images.shape[:1] or not 0 <= labels.min() <= labels.max() < model.num_classes:
        raise ValueError(
            f"labels must be ({len(images)},) in 0 … {model.num_classes - 1}; "
            f"got {tuple(labels.shape)} in {labels.min().item()} … {labels.max().item()}"
        )
    return train_steps(model, diffusion, images, labels, config, resume_from)


def train_steps(
    model: UNet,
    diffusion: GaussianDiffusion,
    images: Tensor,
    labels: Tensor | None,
    config: TrainConfig,
    resume_from: str | Path | None,
) -> Iterator[TrainState]:
    """The loop of ``train``. Images, network and noise live on the device; only t and indices come from the CPU."""
    device, rank, world = processes().device, processes().process_index, processes().num_processes
    tuned = device.type in ("cuda", "cpu")  # channels-last and fused Adam: faster on both, unsafe on MPS
    layout = torch.channels_last if tuned else torch.contiguous_format
    model.to(device, memory_format=layout).train()
    diffusion.to(device)
    images, labels = images.to(device), None if labels is None else labels.to(device)
    make_optimizer = OPTIMIZERS[config.optimizer]
    optimizer = make_optimizer(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True if tuned else None
    )
    ema = make_ema(model, config.ema_decay)
    autocast = _autocast(device, config.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    done = 0 if resume_from is None else load_state(resume_from, model, ema, optimizer, scaler)
    network = _compiled(model) if config.compile else model
    if world > 1:
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

    probabilities = timestep_probabilities(diffusion, config.target)
    batches = batch_indices(len(images), config.batch_size, config.seed, first_step=done)
    mine = slice(rank * config.batch_size // world, (rank + 1) * config.batch_size // world)
    for step in range(done + 1, config.num_train_steps + 1):
        # Every process draws the whole batch and takes its share: the same run for any number of processes.
        on_cpu = seeded_generator(config.seed, step, 0)
        on_device = seeded_generator(config.seed, step, 1, device=device)
        index = next(batches)
        t = draw_timesteps(probabilities, config.batch_size, on_cpu)[mine]
        noise = torch.randn(config.batch_size, *images.shape[1:], generator=on_device, device=device)[mine]
        x_0 = to_model_range(images[index[mine].to(device)])
        y = None
        if labels is not None:
            dropped = drop_labels(labels[index.to(device)], config.label_dropout, model.num_classes, on_cpu)
            y = dropped[mine]

        x_t = diffusion.q_sample(x_0, t, noise).contiguous(memory_format=layout)
        with autocast:
            pred_noise = network(x_t, t.to(device), y)
        loss = target_loss(pred_noise.float(), noise, t, diffusion, config.target, config.loss)
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step, config)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        loss = reduce(loss.detach(), "mean")  # over the processes
        # In fp16 a gradient may overflow now and then: the scaler leaves that step out and lowers its scale.
        if not (loss.isfinite() if scaler.is_enabled() else loss.isfinite() & grad_norm.isfinite()):
            raise FloatingPointError(
                f"step {step}: the loss is {loss.item()}, the gradient's norm {grad_norm.item()}; the weights were "
                "left as they were. Start again with a lower --lr, more --warmup-steps, or --precision no."
            )
        scaler.step(optimizer)
        scaler.update()
        ema.update_parameters(model)
        yield TrainState(step, loss, grad_norm, lr, model, ema, optimizer, scaler)


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = PRECISIONS[precision]
    try:
        return torch.autocast(device.type, dtype, enabled=dtype is not None)
    except RuntimeError as error:
        raise ValueError(f"precision {precision} is not supported on {device.type}: {error}") from error


def _compiled(model: UNet) -> Callable:
    """``torch.compile(model)``; the model as it is, with a warning, where this machine cannot compile."""
    torch._dynamo.config.suppress_errors = True  # what fails to compile, now or later, runs as it is
    try:
        return torch.compile(model)
    except RuntimeError as error:
        warnings.warn(f"torch.compile is not available here, so the U-Net runs as it is: {error}", stacklevel=3)
        return model


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
    samples/ every ``sample_every`` (0: none), and a last checkpoint at the end, or when ``should_stop()`` is true in
    any process. ``resume`` continues from the checkpoint in ``out``; without it a folder that holds one is refused.
    ``info`` is written to training.json beside the configuration. WriteError where the folder cannot be written to.
    """
    out = Path(out)
    if (out / STATE_FILE).exists() and not resume:
        raise ValueError(f"{out} already holds a checkpoint: continue it with --resume, or choose another folder")
    main = processes().is_main_process
    steps = train(model, diffusion, images, labels, config, resume_from=out if resume else None)
    info = {**(info or {}), "config": asdict(config)}
    state, losses, began = None, [], time.perf_counter()
    if main:
        out.mkdir(parents=True, exist_ok=True)
        remove_left_behind(out)
        if resume:
            repair_model(out)
    with tqdm(total=config.num_train_steps, unit="step", mininterval=1, disable=not main) as bar:
        for state in steps:
            losses.append(state.loss)
            stopped, step = _in_any_process(should_stop()), state.step
            last = stopped or step == config.num_train_steps
            try:
                if main and (last or step % log_every == 0):
                    loss, seconds = torch.stack(losses).mean().item(), time.perf_counter() - began
                    row = {
                        "step": step,
                        "epoch": round(step * config.batch_size / len(images), 4),
                        "loss": f"{loss:.6f}",
                        "grad_norm": f"{state.grad_norm.item():.4f}",
                        "lr": f"{state.lr:.3e}",
                        "images_per_second": round(len(losses) * config.batch_size / seconds, 1),
                    }
                    _append_row(out / "log.csv", row)
                    losses, began = [], time.perf_counter()
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    bar.update(step - bar.n)
                if main and (last or step % checkpoint_every == 0):
                    save_checkpoint(state, diffusion, out, info)
                if main and sample_every and not stopped and (last or step % sample_every == 0):
                    _save_samples(state, diffusion, images.shape[1:], out / "samples" / f"step-{step:06d}.png")
            except OSError as error:
                raise WriteError(
                    f"step {step}: {out} could not be written to ({error}). "
                    "What was saved before is whole: make room, then go on with --resume."
                ) from error
            if last:
                break
    return config.num_train_steps if state is None else state.step


def _in_any_process(flag: bool) -> bool:
    """Whether the flag is true in one of the processes, so that all of them stop at the same step."""
    if processes().num_processes == 1:
        return flag
    return bool(reduce(torch.tensor(float(flag), device=processes().device), "sum") > 0)


def _append_row(path: Path, row: dict) -> None:
    """Add a row to the log. Rows of this step or later, and half a row, left by a run that was killed, go."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    old = list(csv.DictReader(whole.splitlines()))
    keep = [r for r in old if int(r["step"]) < row["step"]]
    if old and len(keep) == len(old) and whole == text:
        with path.open("a", newline="") as file:
            csv.DictWriter(file, row).writerow(row)
        return
    with written_aside(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows([*keep, row])


def _save_samples(state: TrainState, diffusion: GaussianDiffusion, image_shape: Sequence[int], path: Path) -> None:
    """Eight samples of each class, at most ten (or 80 without classes), by 20 DDIM steps from one fixed noise."""
    model, count = state.ema.module, 80
    device = diffusion.betas.device
    if model.num_classes is not None:
        labels = torch.arange(min(model.num_classes, 10), device=device).repeat(8)
        model, count = classifier_free(model, labels), len(labels)
    shape = (count, *image_shape)
    steps = sample_ddim(model, diffusion, shape, num_inference_steps=20, generator=seeded_generator(0))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        save_image(sample_images(steps).float() / 255, aside, nrow=count // 8)
