"""Training: DDPM algorithm 1 as a generator, and EMA (chapter 5).

It runs on one device, or on as many as ``accelerate launch`` or ``torchrun`` starts processes for. The command line
writes the log, the sample grids and the checkpoints.
"""

import copy
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import TrainState, load_state
from .data import batch_indices, seeded_generator, to_model_range
from .guidance import check_labels, drop_labels
from .losses import draw_timesteps, simple_loss, timestep_probabilities
from .optimizer import Muon, make_optimizers
from .predictor import NoisePredictor
from .settings import TrainConfig
from .unet import UNet

MAX_POWER = 10.0  # the mean square of float data; what a schedule calls noise has 1
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def processes() -> PartialState:
    """This process's ``device`` and its place among those that ``accelerate launch`` or ``torchrun`` started. The
    best device there is, or the CPU where ACCELERATE_USE_CPU=1 is set."""
    # Without cpu=True, accelerate takes processes that torchrun started on a machine without GPUs for strangers.
    cpus = "LOCAL_RANK" in os.environ and not (torch.cuda.is_available() or torch.xpu.is_available())
    return PartialState(cpu=cpus or parse_flag_from_env("ACCELERATE_USE_CPU"))


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 1 … num_train_steps: linear warm-up to ``lr``, which stays, and a linear way down to 0 over the
    last ``cooldown`` of the steps (Hägele et al., 2024, arXiv:2405.18392). Until there it does not depend on the number
    of steps: a run that is made longer in time is the same as one that was longer from the start."""
    up = step / (config.warmup_steps + 1)
    down = (config.num_train_steps + 1 - step) / (config.cooldown * config.num_train_steps + 1)
    return config.lr * min(1.0, up, down)


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
    model: NoisePredictor,
    images: Tensor,
    labels: Tensor | None,
    config: TrainConfig,
    resume_from: str | Path | None = None,
) -> Iterator[TrainState]:
    """DDPM algorithm 1 on ``images`` (N, C, H, W) and ``labels`` (N,), captions (N, L) that are filled up with the null
    label, or None for a model without classes. Images are uint8, or float32 that goes in as it is: what is no image,
    such as latents, scaled to a variance of about 1.

    Checks what it is given, then runs ``train_steps``. All randomness of a step comes from (seed, step), so a run
    resumed from the checkpoint folder ``resume_from`` gives the same weights as one never stopped (on CUDA within
    rounding), and one in several processes the same as in one, within rounding. A step whose loss or gradient is not
    finite is left out, and raises FloatingPointError: at once on the CPU, elsewhere by ``TrainState.check``
    (``save_checkpoint`` calls it) or at the end.
    """
    if not isinstance(model, NoisePredictor):
        raise ValueError(
            f"train takes a NoisePredictor (a network with its target and diffusion), got {type(model).__name__}"
        )
    world, device, unet = processes().num_processes, processes().device, model.unet
    if images.dtype not in (torch.uint8, torch.float32) or images.ndim != 4:
        raise ValueError(f"images must be uint8 or float32 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if images.dtype == torch.float32 and not images.square().mean() <= MAX_POWER:
        raise ValueError("float images must be finite, of a variance of about 1; grey levels 0 … 255 are uint8")
    height, width, divisor = *images.shape[2:], unet.size_divisor
    if height % divisor or width % divisor:
        near = sorted({max(1, size // divisor + i) * divisor for size in (height, width) for i in (0, 1)})
        raise ValueError(
            f"images are {height}×{width}, and this U-Net needs sizes divisible by {divisor}: "
            f"{' or '.join(map(str, near))} (--image-size), say"
        )
    if tuple(images.shape[1:]) != model.image_shape:
        raise ValueError(
            f"the model draws images {model.image_shape} (its image_shape), and these are {tuple(images.shape[1:])}"
        )
    if config.batch_size > len(images):
        raise ValueError(f"batch_size must lie in 1 … {len(images)} (the number of images), got {config.batch_size}")
    if config.batch_size % world:
        raise ValueError(f"batch_size {config.batch_size} must be divisible by the number of processes, {world}")
    if config.precision == "fp16" and device.type == "mps":
        raise ValueError("precision fp16 does not train on mps: use bf16 or no")
    if (labels is None) != (model.num_classes is None):
        needs = "a class-conditional model needs" if labels is None else "a model without classes takes no"
        raise ValueError(f"{needs} labels")
    if labels is not None:
        check_labels(labels.cpu(), model.num_classes, captions=True)
        if len(labels) != len(images):
            raise ValueError(f"labels must be one for each of the {len(images)} images, got {len(labels)}")
    return train_steps(model, images, labels, config, resume_from)


def train_steps(
    model: NoisePredictor, images: Tensor, labels: Tensor | None, config: TrainConfig, resume_from: str | Path | None
) -> Iterator[TrainState]:
    """The loop of ``train``. On CUDA the CPU queues the work of one step after another; no line waits for a result."""
    device, world, unet, diffusion = processes().device, processes().num_processes, model.unet, model.diffusion
    layout, fused = _fastest(device)
    model.to(device, memory_format=layout).train()
    optimizers = make_optimizers(unet, config, fused)
    ema = EMA(model, config.ema_decay)
    autocast = _autocast(device, config.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    done = 0 if resume_from is None else load_state(resume_from, model, ema, optimizers, scaler)
    count = config.batch_size // world
    network = _compiled(unet, autocast, images[:count], labels, layout) if config.compile else unet
    network = _distributed(network, device) if world > 1 else network
    bad_step = torch.zeros((), dtype=torch.long, device=device)  # the first that was not finite; 0: none

    def update(x_0: Tensor, t: Tensor, noise: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x_t = diffusion.q_sample(x_0, t, noise).contiguous(memory_format=layout)
        with autocast:
            output = network(x_t, t, y)
        loss = simple_loss(output.float(), model.wanted(x_0, t, noise), config.loss)

        model.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), config.grad_clip)
        loss = reduce(loss.detach(), "mean")  # over the processes
        finite = (loss + grad_norm).isfinite()
        for optimizer in optimizers:
            _step_if(finite, optimizer)
        return loss, grad_norm, finite

    if device.type == "cuda" and world == 1 and not scaler.is_enabled():
        update = Recorded(update)
    for step, *batch in training_batches(model, images.to(device), labels, config, done):
        lr = learning_rate(step, config)
        _set_rate(optimizers, lr)
        loss, grad_norm, finite = update(*batch)
        scaler.update()

        # In fp16 a gradient may overflow now and then: then the scale is lowered, and the run goes on.
        bad = ~(loss.isfinite() if scaler.is_enabled() else finite)
        bad_step.masked_fill_(bad & (bad_step == 0), step)
        state = TrainState(step, loss, grad_norm, lr, model, ema, optimizers, scaler, bad_step)
        if device.type == "cpu" or step == config.num_train_steps:
            state.check()  # on a GPU this waits, so there the caller does it when it reads the loss
        ema.update_parameters(model)
        yield state


def training_batches(
    model: NoisePredictor, images: Tensor, labels: Tensor | None, config: TrainConfig, done: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor | None]]:
    """Lines 2 to 4 of algorithm 1: (step, x_0, t, noise, labels) of each step after the first ``done``, where the
    ``images`` are. Some labels are dropped, for classifier-free guidance.

    Each of several processes draws the whole batch, so that the run is the same for any number of them, and takes every
    ``world``-th item of it: t rises through the batch, and each process is to have small ones and large ones.
    """
    device, rank, world = images.device, processes().process_index, processes().num_processes
    probabilities = timestep_probabilities(model.diffusion, model.target)
    labels = None if labels is None else labels.cpu()
    batches = batch_indices(len(images), config.batch_size, config.seed, first_step=done)
    for step, index in zip(range(done + 1, config.num_train_steps + 1), batches, strict=False):
        on_cpu = seeded_generator(config.seed, step, 0)
        on_device = seeded_generator(config.seed, step, 1, device=device)
        drawn = [index, draw_timesteps(probabilities, config.batch_size, on_cpu)]
        if labels is not None:
            kept = drop_labels(labels[index], config.label_dropout, model.num_classes, on_cpu)
            drawn += kept.view(len(kept), -1).T  # a row for each word of the captions
        index, t, *y = _moved(torch.stack(drawn)[:, rank::world].contiguous(), device)  # one copy for all
        y = torch.stack(y, dim=1).view(-1, *labels.shape[1:]) if y else None
        noise = torch.randn(config.batch_size, *images.shape[1:], generator=on_device, device=device)[rank::world]
        x_0 = images[index]
        yield step, to_model_range(x_0) if x_0.dtype == torch.uint8 else x_0, t, noise, y


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The CPU's tensor on the device. CUDA copies from pinned memory while the CPU goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Recorded:
    """``update`` as a CUDA graph. Its kernels are many and small, and the CPU takes longer to start them than the GPU
    to run them; so, after three steps as usual, they are recorded once, and then started together. Where that fails,
    with a warning, steps go on as usual. Arguments are tensors of the same shapes at each call, or None."""

    def __init__(self, update: Callable[..., tuple[Tensor, ...]]):
        self.update, self.usual, self.graph, self.stream = update, 3, None, torch.cuda.Stream()

    def __call__(self, *given: Tensor | None) -> tuple[Tensor, ...]:
        if self.graph is None and not self.usual:
            self.record(given)
        if self.usual:
            self.usual -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                found = self.update(*given)
            torch.cuda.current_stream().wait_stream(self.stream)
            return found
        for mine, new in zip(self.given, given, strict=True):
            if mine is not None:
                mine.copy_(new)
        self.graph.replay()
        return tuple(found.clone() for found in self.found)  # the next replay writes into the same memory

    def record(self, given: tuple[Tensor | None, ...]) -> None:
        self.given, graph = [None if tensor is None else tensor.clone() for tensor in given], torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.found = self.update(*self.given)
            self.graph = graph
        except RuntimeError as error:
            warnings.warn(f"steps are not recorded as a CUDA graph, which is slower: {error}", stacklevel=4)
            self.usual = math.inf


def _set_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()``, left out (weights, moments and count stay) where ``finite`` is false. Muon and a fused
    optimizer read this on the device, from the flag that ``GradScaler.step`` gives them too; for others the CPU
    waits."""
    if isinstance(optimizer, Muon) or optimizer.defaults["fused"]:
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


def _compiled(
    unet: UNet, autocast: torch.autocast, images: Tensor, labels: Tensor | None, layout: torch.memory_format
) -> nn.Module:
    """``torch.compile(unet)``; the U-Net as it is, with a warning, where this machine cannot compile. It compiles when
    it is called, so it is tried here, forwards and backwards, on a batch like ``images`` and as many ``labels``."""
    t = torch.ones(len(images), dtype=torch.long, device=processes().device)
    x_t = torch.zeros(images.shape, device=t.device).contiguous(memory_format=layout)
    y = None if labels is None else torch.zeros_like(labels[: len(images)], device=t.device)
    try:
        network = torch.compile(unet)
        with autocast:
            output = network(x_t, t, y)
        output.sum().backward()
    except RuntimeError as error:
        warnings.warn(f"torch.compile is not available here, so the U-Net runs as it is: {error}", stacklevel=3)
        network = unet
    unet.zero_grad(set_to_none=True)
    return network


def _distributed(network: nn.Module, device: torch.device) -> nn.Module:
    """``DistributedDataParallel``: averages gradients over the processes. Buffers are constants, and are not sent."""
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    buffers = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None, **buffers)
