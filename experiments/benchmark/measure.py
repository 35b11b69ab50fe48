"""What the benchmark measures, and how: training steps and network evaluations, in rounds."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm_tutorial.data import seeded_generator, to_model_range
from ddpm_tutorial.diffusion import GaussianDiffusion, linear_beta_schedule
from ddpm_tutorial.losses import simple_loss
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.settings import TrainConfig
from ddpm_tutorial.training import train
from ddpm_tutorial.unet import UNet

from .peers import IMAGE, Candidate

ENDLESS = 10**9


@dataclass(frozen=True)
class Setting:
    """How a network is run. The batch is the same in all."""

    channels_last: bool = False
    bf16: bool = False
    compile: bool = False
    fused: bool = False


def settings(device: torch.device, compile: bool) -> dict[str, Setting]:
    """Eager float32 as the library builds it, and the fastest setting that we know for this device."""
    cuda = device.type == "cuda"
    return {"eager": Setting(), "fast": Setting(channels_last=True, bf16=cuda, compile=compile, fused=cuda)}


# -------------------------------------------------------------------------------------------- what is measured
def peer_steps(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    images: Tensor,
    setting: Setting,
    batch_size: int,
    *,
    loss: str = "l2",
    grad_clip: float | None = 1.0,
) -> Iterator[None]:
    """DDPM algorithm 1 with any module of (x, t): as ``ddpm_tutorial.training.train`` has it, with Adam at 1e-3
    and no average."""
    device = images.device
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout).train()
    run = torch.compile(model) if setting.compile else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True if setting.fused else None)
    generator = seeded_generator(0, device=device)
    while True:
        index = torch.randint(len(images), (batch_size,), generator=generator, device=device)
        t = torch.randint(1, diffusion.num_timesteps + 1, (batch_size,), generator=generator, device=device)
        noise = torch.randn(batch_size, *images.shape[1:], generator=generator, device=device)
        x_t = diffusion.q_sample(to_model_range(images[index]), t, noise).contiguous(memory_format=layout)
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.bf16):
            pred_noise = run(x_t, t)
        error = simple_loss(pred_noise.float(), noise, loss)
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        yield


def our_steps(unet: UNet, diffusion, images, labels, setting: Setting, batch_size: int) -> Iterator:
    precision = "bf16" if setting.bf16 else "no"
    config = TrainConfig(ENDLESS, batch_size, precision=precision, compile=setting.compile)
    return train(NoisePredictor(unet, diffusion, "v"), images, labels if unet.num_classes else None, config)


def training_task(candidate: Candidate, setting: Setting, batch_size: int, device: torch.device) -> Callable[[], None]:
    """A call that takes one training step. Ours in its fast setting takes the package's own."""
    torch.manual_seed(0)
    images = torch.randint(256, (4 * batch_size, *IMAGE), dtype=torch.uint8).to(device)
    labels = torch.randint(10, (len(images),), device=device)
    diffusion = GaussianDiffusion(linear_beta_schedule(1000)).to(device)
    model = candidate.build()
    if candidate.family == "ours" and setting.channels_last:
        steps = our_steps(model, diffusion, images, labels, setting, batch_size)
    else:
        steps = peer_steps(model, diffusion, images, setting, batch_size)
    return lambda: next(steps)


def sampling_task(candidate: Candidate, setting: Setting, batch_size: int, device: torch.device) -> Callable[[], None]:
    """A call that evaluates the network once, as a sampler does."""
    torch.manual_seed(0)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    model = candidate.build().to(device, memory_format=layout).eval()
    run = torch.compile(model) if setting.compile else model
    x = torch.randn(batch_size, *IMAGE, device=device).contiguous(memory_format=layout)
    t = torch.full((batch_size,), 500, device=device)

    @torch.no_grad()
    def call():
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.bf16):
            run(x, t)

    return call


# ------------------------------------------------------------------------------------------------ the rounds
def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], None], repeats: int, device: torch.device) -> tuple[float, float]:
    """(wall-clock, this process's CPU) seconds a call."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    synchronise(device)
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def pace(states: Iterator, seconds: float, device: torch.device) -> tuple[float, float]:
    """Of a loop of training: the seconds until it is warm, and of each step from there on, by up to 200 of them in
    these ``seconds``."""
    began = time.perf_counter()
    for _ in range(5):  # the first compiles, a later one records a CUDA graph
        next(states)
    synchronise(device)
    ready, count = time.perf_counter(), 0
    while count < 200 and (count == 0 or time.perf_counter() - ready < seconds):
        next(states)
        count += 1
    synchronise(device)
    return ready - began, (time.perf_counter() - ready) / count


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def set_up(make: Callable[[], Callable[[], None]], device, quick: bool) -> tuple[Callable[[], None], int]:
    """The call, warm, and how often it must be repeated to last about 0.2 s (one call is enough on a CPU)."""
    call = make()
    call()
    seconds, _ = timed(call, 1, device) if not quick else (1.0, 0)
    return call, min(200, max(1, round(0.2 / seconds)))


def run_rounds(
    tasks: dict, rounds: int, device, quick: bool, after_round: Callable[[dict, dict], None], until: float = math.inf
) -> None:
    """``tasks``: key → a function that makes the call to time. A call that fails as it
    warms up leaves the race, and so does one whose turn to do so comes when ``time.monotonic()`` is past ``until``."""
    ready, failed = {}, {}
    for i, (key, make) in enumerate(tasks.items()):
        note(f"warming up {i + 1}/{len(tasks)}: {' · '.join(key)}")
        if time.monotonic() > until:
            failed[key] = "no time was left"
            continue
        try:
            ready[key] = set_up(make, device, quick)
        except Exception as error:  # a compiler that is missing, an operation without a kernel: reported in the table
            failed[key] = reason(error)
    times = {key: [] for key in ready}
    for i in range(rounds):
        keys = list(ready)
        shift = i * len(keys) // rounds
        note(f"round {i + 1}/{rounds}")
        for key in keys[shift:] + keys[:shift]:
            times[key].append(timed(*ready[key], device))
        after_round(times, failed)
    note("")


def note(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles, to four digits."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {name: float(f"{v:.4g}") for name, v in (("median", middle), ("q1", low), ("q3", high))}
