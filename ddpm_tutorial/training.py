"""Training: the loop, EMA, and a run in a folder that can be stopped at any moment (chapter 5).

``train`` is the loop of DDPM algorithm 1 as a generator; ``train_to_folder`` runs it with a progress bar, a CSV log,
sample grids and checkpoints, and is what the command line calls. Both run on one device, or on as many as
``accelerate launch`` or ``torchrun`` starts processes for.
"""

import contextlib
import copy
import csv
import inspect
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env, reduce
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import save_image
from tqdm.auto import tqdm

from .checkpoint import (
    STATE_FILE,
    TrainState,
    check_run_folder,
    load_state,
    locked,
    read_training_info,
    repair_model,
    save_checkpoint,
    saved_step,
    written_aside,
)
from .data import batch_indices, seeded_generator, to_model_range
from .diffusion import GaussianDiffusion, check_made_for
from .guidance import classifier_free, drop_labels
from .losses import draw_timesteps, target_loss, timestep_probabilities
from .sampling import sample_ddim, sample_images
from .settings import TrainConfig, check_info
from .unet import UNet

__all__ = [
    "STATE_FILE", "EMA", "TrainConfig", "TrainState", "WriteError", "learning_rate", "processes",
    "read_training_info", "save_checkpoint", "train", "train_steps", "train_to_folder", "training_batches",
]  # fmt: skip
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LOG_FILE = "log.csv"
LOG_COLUMNS = ["step", "epoch", "loss", "grad_norm", "lr", "images_per_second"]


class WriteError(OSError):
    """A run's folder could not be written to: a full disk, say."""

    exit_status = 1


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


class EMA(nn.Module):
    """An exponential moving average of a network's weights; ``module`` is the averaged network. The first update
    copies; update n + 1 decays the average by min(decay, (1 + n) / (10 + n)), else it would stay near the random start
    for 1 / (1 − decay) steps."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.n_averaged = decay, 0  # counted by the CPU, which would have to wait for a count on a GPU

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        n = self.n_averaged
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - decay)
        self.n_averaged += 1


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
    resumed from the checkpoint folder ``resume_from`` gives the same weights as one never stopped (on CUDA within
    rounding), and one in several processes the same as in one, within rounding. A step whose loss or gradient is not
    finite is left out, and raises FloatingPointError: at once on the CPU, elsewhere by ``TrainState.check``
    (``save_checkpoint`` calls it) or at the end.
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
    """The loop of ``train``. On CUDA the CPU queues the work of one step after another; no line waits for a result."""
    device, world = processes().device, processes().num_processes
    layout, fused = _fastest(device)
    model.to(device, memory_format=layout).train()
    diffusion.to(device)
    make_optimizer = OPTIMIZERS[config.optimizer]
    optimizer = make_optimizer(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    ema = EMA(model, config.ema_decay)
    autocast = _autocast(device, config.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    done = 0 if resume_from is None else load_state(resume_from, model, ema, optimizer, scaler)
    batches = training_batches(images.to(device), labels, model.num_classes, diffusion, config, done)
    network = _compiled(model, autocast, images[: config.batch_size // world], layout) if config.compile else model
    network = _distributed(network, device) if world > 1 else network
    bad_step = torch.zeros((), dtype=torch.long, device=device)  # the first that was not finite; 0: none

    for step, x_0, t, noise, y in batches:
        x_t = diffusion.q_sample(x_0, t, noise).contiguous(memory_format=layout)
        with autocast:
            pred_noise = network(x_t, t, y)
        loss = target_loss(pred_noise.float(), noise, t, diffusion, config.target, config.loss)

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        loss = reduce(loss.detach(), "mean")  # over the processes
        finite = (loss + grad_norm).isfinite()
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(step, config)
        _step_if(finite, optimizer)
        scaler.update()

        # In fp16 a gradient may overflow now and then: then the scale is lowered, and the run goes on.
        bad = ~(loss.isfinite() if scaler.is_enabled() else finite)
        bad_step.masked_fill_(bad & (bad_step == 0), step)
        state = TrainState(step, loss, grad_norm, lr, model, ema, optimizer, scaler, bad_step)
        if device.type == "cpu" or step == config.num_train_steps:
            state.check()  # on a GPU this waits, so there the caller does it when it reads the loss
        ema.update_parameters(model)
        yield state


def training_batches(
    images: Tensor,
    labels: Tensor | None,
    null_label: int | None,
    diffusion: GaussianDiffusion,
    config: TrainConfig,
    done: int,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor | None]]:
    """Lines 2 to 4 of algorithm 1: (step, x_0, t, noise, labels) of each step after the first ``done``, where the
    uint8 ``images`` are. Some labels are dropped, for classifier-free guidance.

    Each of several processes draws the whole batch, so that the run is the same for any number of them, and takes every
    ``world``-th item of it: t rises through the batch, and each process is to have small ones and large ones.
    """
    device, rank, world = images.device, processes().process_index, processes().num_processes
    probabilities = timestep_probabilities(diffusion, config.target)
    labels = None if labels is None else labels.cpu()
    batches = batch_indices(len(images), config.batch_size, config.seed, first_step=done)
    for step, index in zip(range(done + 1, config.num_train_steps + 1), batches, strict=False):
        on_cpu = seeded_generator(config.seed, step, 0)
        on_device = seeded_generator(config.seed, step, 1, device=device)
        drawn = [index, draw_timesteps(probabilities, config.batch_size, on_cpu)]
        if labels is not None:
            drawn.append(drop_labels(labels[index], config.label_dropout, null_label, on_cpu))
        index, t, *y = _moved(torch.stack(drawn)[:, rank::world].contiguous(), device)  # one copy for all three
        noise = torch.randn(config.batch_size, *images.shape[1:], generator=on_device, device=device)[rank::world]
        yield step, to_model_range(images[index]), t, noise, y[0] if y else None


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The CPU's tensor on the device. CUDA copies from pinned memory while the CPU goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()``, left out (weights, moments and count stay) where ``finite`` is false. A fused optimizer
    reads this on the device, from the flag that ``GradScaler.step`` gives it too; for others the CPU waits."""
    if optimizer.defaults["fused"]:
        optimizer.found_inf = (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()


def _fastest(device: torch.device) -> tuple[torch.memory_format, bool | None]:
    """The layout of images and weights, and whether Adam is fused: channels-last and fused are faster on CUDA and the
    CPU, and unsafe on MPS.

    On CUDA this also sets, for the whole process, how float32 is multiplied: as TF32 (10 bits after the point, sums in
    float32), in matrix products as PyTorch does in convolutions anyway, on GPUs that have it (Ampere and later); and
    cuDNN times its algorithms on the first batch and keeps the fastest, as all batches have one shape.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    tuned = device.type in ("cuda", "cpu")
    return torch.channels_last if tuned else torch.contiguous_format, tuned or None


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = PRECISIONS[precision]
    try:
        return torch.autocast(device.type, dtype, enabled=dtype is not None)
    except RuntimeError as error:
        raise ValueError(f"precision {precision} is not supported on {device.type}: {error}") from error


def _compiled(model: UNet, autocast: torch.autocast, images: Tensor, layout: torch.memory_format) -> nn.Module:
    """``torch.compile(model)``; the model as it is, with a warning, where this machine cannot compile. It compiles when
    it is called, so it is tried here, forwards and backwards, on a batch like ``images``."""
    t = torch.ones(len(images), dtype=torch.long, device=processes().device)
    x_t = torch.zeros(images.shape, device=t.device).contiguous(memory_format=layout)
    y = None if model.num_classes is None else torch.zeros_like(t)
    try:
        network = torch.compile(model)
        with autocast:
            pred_noise = network(x_t, t, y)
        pred_noise.sum().backward()
    except RuntimeError as error:
        warnings.warn(f"torch.compile is not available here, so the U-Net runs as it is: {error}", stacklevel=3)
        network = model
    model.zero_grad(set_to_none=True)
    return network


def _distributed(network: nn.Module, device: torch.device) -> nn.Module:
    """``DistributedDataParallel``: averages gradients over the processes. Buffers are constants, and are not sent."""
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    buffers = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None, **buffers)


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
    """Run ``train`` to its end in the folder ``out`` and return the last step, that of the checkpoint where nothing is
    left to do.

    Writes a checkpoint every ``checkpoint_every`` steps, a row of log.csv every ``log_every`` and with each checkpoint
    (means since the row before, so a resumed run's are those of one never stopped), a grid of EMA samples under
    samples/ every ``sample_every`` (0: none), and all of them at the end. When ``should_stop()`` is true in any
    process, it ends with a row and a checkpoint. ``resume`` continues from the checkpoint in ``out``; without it a
    folder that holds one is refused, and so is one that another run writes to. ``info`` is written to training.json
    beside the configuration. WriteError where the folder cannot be written to.
    """
    out, main = Path(out), processes().is_main_process
    steps = train(model, diffusion, images, labels, config, resume_from=out if resume else None)
    info = {**(info or {}), "config": asdict(config)}
    check_info(info)  # what is written can be read

    def grid_is_due(step: int) -> bool:
        return sample_every > 0 and (step % sample_every == 0 or step == config.num_train_steps)

    def prepare() -> None:
        check_run_folder(out, resume)
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(out))
        if resume:
            repair_model(out)
        done = saved_step(out) if resume else 0
        _open_log(out / LOG_FILE, done)
        grid = _grid_path(out, done)
        if resume and grid_is_due(done) and not grid.exists():  # the run was stopped there
            _save_samples(UNet.from_pretrained(out).to(processes().device), diffusion, images.shape[1:], grid)

    with contextlib.ExitStack() as held:
        in_main_process(prepare)
        step = saved_step(out) if resume else 0
        loss_sum, logged, began = 0.0, step, time.perf_counter()
        bar = held.enter_context(
            tqdm(initial=step, total=config.num_train_steps, unit="step", mininterval=1, disable=not main)
        )
        for state in steps:
            step, loss_sum = state.step, loss_sum + state.loss
            stopped = _in_any_process(should_stop(), step)
            last = stopped or step == config.num_train_steps
            keep = last or step % checkpoint_every == 0
            log = keep or step % log_every == 0
            if log:
                state.check()  # in all processes
            try:
                if main and log:
                    loss, seconds = float(loss_sum) / (step - logged), time.perf_counter() - began
                    row = {
                        "step": step,
                        "epoch": round(step * config.batch_size / len(images), 4),
                        "loss": f"{loss:.6f}",
                        "grad_norm": f"{state.grad_norm.item():.4f}",
                        "lr": f"{state.lr:.3e}",
                        "images_per_second": round((step - logged) * config.batch_size / seconds, 1),
                    }
                    _append_row(out / LOG_FILE, row)
                    loss_sum, logged, began = 0.0, step, time.perf_counter()
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                # The grid first: a run that is killed between the two goes on from before, and draws it again.
                if main and grid_is_due(step) and not stopped:
                    _save_samples(state.ema.module, diffusion, images.shape[1:], _grid_path(out, step))
                if main and keep:
                    save_checkpoint(state, diffusion, out, info)
            except OSError as error:
                saved = "What was saved before is whole: make room, then go on with --resume."
                raise WriteError(
                    f"step {step}: {out} could not be written to ({error}). "
                    + (saved if (out / STATE_FILE).exists() else "Nothing was saved before.")
                ) from error
            bar.update()
            if last:
                break
    return step


def in_main_process(action: Callable[[], None]) -> None:
    """Run ``action`` in the main process alone; where it raises ValueError or OSError there, every process does."""
    failed: list[Exception | None] = [None]
    if processes().is_main_process:
        try:
            action()
        except (OSError, ValueError) as error:
            failed = [error]
    if error := broadcast_object_list(failed)[0]:
        raise error


def _in_any_process(flag: bool, step: int) -> bool:
    """Whether the flag is true in one of the processes, so that all of them stop at the same step. Several ask each
    other at every tenth step, because the answer makes the CPU wait for the device."""
    if processes().num_processes == 1:
        return flag
    return step % 10 == 0 and bool(reduce(torch.tensor(float(flag), device=processes().device), "sum") > 0)


def _open_log(path: Path, done: int) -> None:
    """Make the log ready for the rows after step ``done``: later rows, and half a row, left by a run that was killed,
    go. A file that is no log of this program is set aside and told."""
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    try:
        rows = list(csv.reader(whole.decode("utf-8").splitlines(), strict=True))
        keep = [row for row in rows[1:] if int(row[0]) <= done]
        if rows and (rows[0] != LOG_COLUMNS or any(len(row) != len(LOG_COLUMNS) for row in rows)):
            raise ValueError("its columns are others")
    except (ValueError, IndexError, csv.Error) as error:
        aside = path.with_name(f"{path.name}.damaged")
        os.replace(path, aside)
        print(f"{path} is no log of this program ({error}): it is {aside.name} now", file=sys.stderr)
        keep = []
    with written_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([LOG_COLUMNS, *keep])


def _append_row(path: Path, row: dict) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, LOG_COLUMNS).writerow(row)


def _grid_path(out: Path, step: int) -> Path:
    return out / "samples" / f"step-{step:06d}.png"


def _save_samples(model: UNet, diffusion: GaussianDiffusion, image_shape: Sequence[int], path: Path) -> None:
    """Eight samples of each class, at most ten (or 80 without classes), by 20 DDIM steps from one fixed noise."""
    device, count = next(model.parameters()).device, 80
    diffusion.to(device)
    if model.num_classes is not None:
        labels = torch.arange(min(model.num_classes, 10), device=device).repeat(8)
        model, count = classifier_free(model, labels), len(labels)
    shape = (count, *image_shape)
    steps = sample_ddim(model, diffusion, shape, num_inference_steps=20, generator=seeded_generator(0))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        save_image(sample_images(steps).float() / 255, aside, nrow=count // 8)
