"""Samplers: from noise to images with any noise model ``model(x_t, t)`` (chapters 5 and 6).

Each sampler is a generator: it yields every step, and the caller plots, stops, or keeps the last. ``start`` begins it
part-way: at that timestep, with ``x_T`` as the x_t there (chapter 9). ``spacing`` says in what the timesteps are even:
in "t", or in "u", the share of noise (``path_timesteps``). ``generator`` may be a list, one for each image.
Arguments that do not fit are a ValueError at the call.
"""

import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .data import to_uint8
from .diffusion import GaussianDiffusion, check_diffusion, check_floats, path_times, randn_like
from .settings import SPACINGS


class SampleStep(NamedTuple):
    """One step of a sampler: it has arrived at timestep t (0 at the end) with x_t; pred_x0 is the clean data that the
    model saw where the step began. Both (B, …)."""

    t: int
    x_t: Tensor
    pred_x0: Tensor


def checked_at_the_call(check: Callable[..., None]) -> Callable[[Callable], Callable]:
    """Decorator of a generator function. A generator runs, and so looks at what it was given, only when its first step
    is asked for; this passes all arguments, by name, to ``check`` where the function is called."""

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args, **named):
            given = signature.bind(*args, **named)  # TypeError for a misspelt name
            given.apply_defaults()
            check(**given.arguments)
            return function(*args, **named)

        return call

    return decorate


def _check_arguments(
    model, diffusion: GaussianDiffusion, shape, x_T, start, generator, num_inference_steps=1, variance="beta", eta=0,
    spacing="t", **_others,
) -> None:  # fmt: skip
    T = diffusion.num_timesteps
    check_diffusion(model, diffusion)
    if not isinstance(shape, Sequence) or not shape or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"shape must be that of the samples, (B, …), got {shape!r}")
    ddim_timesteps(T, num_inference_steps)  # says what is wrong
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance must be 'posterior' or 'beta', got {variance!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be {' or '.join(map(repr, SPACINGS))}, got {spacing!r}")
    if start is not None and (isinstance(start, bool) or not isinstance(start, int) or not 1 <= start <= T):
        raise ValueError(f"start must lie in 1 … {T} (T), got {start!r}")
    if start is not None and x_T is None:
        raise ValueError(f"start={start} needs x_T, the x_t to begin with: pure noise belongs to T")
    if x_T is not None:
        check_floats(x_T=x_T)
        if tuple(x_T.shape) != tuple(shape):
            raise ValueError(f"x_T must have the shape asked for, {tuple(shape)}, got {tuple(x_T.shape)}")
    own = generator if isinstance(generator, Sequence) else [generator] * shape[0]
    if len(own) != shape[0] or not all(isinstance(one, torch.Generator | None) for one in own):
        raise ValueError(f"generator must be one, or {shape[0]}, one for each image; got {generator!r:.200}")


@checked_at_the_call(_check_arguments)
@torch.no_grad()
def sample_ddpm(
    model: Callable[[Tensor, Tensor], Tensor],
    diffusion: GaussianDiffusion,
    shape: Sequence[int],
    *,
    clip_denoised: bool = True,
    variance: str = "posterior",
    x_T: Tensor | None = None,
    start: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[SampleStep]:
    """Ancestral sampling, T steps (DDPM algorithm 2). The last x_t is the sample.

    Each step predicts x_0, clips it to [−1, 1] if ``clip_denoised``, and draws x_{t−1} from q(x_{t−1} | x_t, x_0);
    without clipping this is the paper's formula in ε (its eqs. 7 and 11 are one). ``variance`` is "posterior"
    (σ_t² = β̃_t) or "beta" (σ_t² = β_t), the two choices of DDPM section 3.2. ``x_T`` (B, …) replaces the first noise.
    """
    x_t = _start(diffusion, shape, x_T, generator)
    for t in range(diffusion.num_timesteps if start is None else start, 0, -1):
        pred_x0 = _predict_x0(model, diffusion, x_t, t, clip_denoised)
        mean, posterior_variance = diffusion.q_posterior(pred_x0, x_t, t)
        if t == 1:  # the last step adds no noise (algorithm 2, line 3)
            x_t = mean
        else:
            sigma = (posterior_variance if variance == "posterior" else diffusion.betas[t]).sqrt()
            x_t = mean + sigma * randn_like(x_t, generator)
        yield SampleStep(t - 1, x_t, pred_x0)


@checked_at_the_call(_check_arguments)
@torch.no_grad()
def sample_ddim(
    model: Callable[[Tensor, Tensor], Tensor],
    diffusion: GaussianDiffusion,
    shape: Sequence[int],
    *,
    num_inference_steps: int = 50,
    eta: float = 0.0,
    clip_denoised: bool = True,
    x_T: Tensor | None = None,
    start: int | None = None,
    spacing: str = "t",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[SampleStep]:
    """DDIM (Song et al., arXiv:2010.02502, eq. 12) on ``num_inference_steps`` of the T timesteps.

    ``eta`` 0 is deterministic; 1 adds the noise of ancestral sampling, and with all T steps equals ``sample_ddpm``.
    Where ``clip_denoised`` changes x_0, the noise is computed again from it, so that both still explain x_t.
    """
    x_t = _start(diffusion, shape, x_T, generator)
    for t, t_next in _steps_down(diffusion, num_inference_steps, start, spacing):
        pred_x0 = _predict_x0(model, diffusion, x_t, t, clip_denoised)
        noise = diffusion.predict_noise(x_t, t, pred_x0)
        alpha_bar_t, alpha_bar_next = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod[t_next]
        variance = (1 - alpha_bar_next) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_next)
        sigma = eta * variance.sqrt()  # DDIM eq. 16
        x_t = alpha_bar_next.sqrt() * pred_x0 + (1 - alpha_bar_next - sigma**2).clamp(min=0).sqrt() * noise
        if eta > 0 and t_next > 0:
            x_t = x_t + sigma * randn_like(x_t, generator)
        yield SampleStep(t_next, x_t, pred_x0)


@checked_at_the_call(_check_arguments)
@torch.no_grad()
def sample_heun(
    model: Callable[[Tensor, Tensor], Tensor],
    diffusion: GaussianDiffusion,
    shape: Sequence[int],
    *,
    num_inference_steps: int = 25,
    clip_denoised: bool = True,
    x_T: Tensor | None = None,
    start: int | None = None,
    spacing: str = "t",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[SampleStep]:
    """Heun's method, second order (Karras et al., 2022, arXiv:2206.00364, algorithm 1), on the ODE that DDIM walks:
    d(x/√ᾱ) / dσ̄ = ε_θ with σ̄ = √(1 − ᾱ)/√ᾱ. Each step goes as DDIM does, looks at the noise there, and goes again
    with the mean of both. Two evaluations per step, one in the last: 2 · num_inference_steps − 1.
    """
    x_t = _start(diffusion, shape, x_T, generator)
    for t, t_next in _steps_down(diffusion, num_inference_steps, start, spacing):
        pred_x0 = _predict_x0(model, diffusion, x_t, t, clip_denoised)
        noise = diffusion.predict_noise(x_t, t, pred_x0)
        arrived = diffusion.q_sample(pred_x0, t_next, noise)  # the DDIM step
        if t_next > 0:
            there = _predict_x0(model, diffusion, arrived, t_next, clip_denoised)
            mean_noise = (noise + diffusion.predict_noise(arrived, t_next, there)) / 2
            arrived = diffusion.q_sample(diffusion.predict_x0(x_t, t, mean_noise), t_next, mean_noise)
        x_t = arrived
        yield SampleStep(t_next, x_t, pred_x0)


@checked_at_the_call(_check_arguments)
@torch.no_grad()
def sample_dpmpp_2m(
    model: Callable[[Tensor, Tensor], Tensor],
    diffusion: GaussianDiffusion,
    shape: Sequence[int],
    *,
    num_inference_steps: int = 20,
    clip_denoised: bool = True,
    x_T: Tensor | None = None,
    start: int | None = None,
    spacing: str = "t",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[SampleStep]:
    """DPM-Solver++(2M) (Lu et al., 2022, arXiv:2211.01095, algorithm 2): second order with one evaluation per step.

    In λ = log(√ᾱ/√(1 − ᾱ)) the ODE is linear but for x_0. A line through this step's and the last step's pred_x0
    stands for it; the first step, and the last (where λ is infinite), take pred_x0 alone, as DDIM does: with one or
    two steps this is DDIM. The line is followed by at most last_h, so that a ``start`` just above a timestep of the
    list, whose first step is short, does not multiply the model's errors.
    """
    log_snr = diffusion.snr().cpu().double().log() / 2  # λ_t; infinite at t = 0
    x_t = _start(diffusion, shape, x_T, generator)
    last_x0, last_h = None, None
    for t, t_next in _steps_down(diffusion, num_inference_steps, start, spacing):
        pred_x0 = _predict_x0(model, diffusion, x_t, t, clip_denoised)
        h, aim = (log_snr[t_next] - log_snr[t]).item(), pred_x0
        if last_x0 is not None and t_next > 0:
            aim = pred_x0 + (pred_x0 - last_x0) * min(h / (2 * last_h), 1)
        x_t = diffusion.q_sample(aim, t_next, diffusion.predict_noise(x_t, t, aim))
        last_x0, last_h = pred_x0, h
        yield SampleStep(t_next, x_t, pred_x0)


def ddim_timesteps(num_timesteps: int, num_inference_steps: int) -> list[int]:
    """``num_inference_steps`` timesteps spread evenly from T down; the step after the last one is 0 (clean data).

    T itself is always the first: a sampler that starts from pure noise must say that it is at T (Lin et al.,
    arXiv:2305.08891, section 3.3). diffusers calls this spacing "trailing".
    """
    whole = isinstance(num_inference_steps, int) and not isinstance(num_inference_steps, bool)
    if not whole or not 1 <= num_inference_steps <= num_timesteps:
        raise ValueError(
            f"num_inference_steps must be an integer in 1 … {num_timesteps} (T), got {num_inference_steps!r}"
        )
    return [round(num_timesteps * (1 - i / num_inference_steps)) for i in range(num_inference_steps)]


def path_timesteps(diffusion: GaussianDiffusion, num_inference_steps: int) -> list[int]:
    """The timesteps, from T down, that lie nearest to an even walk in u = √(1 − ᾱ) / (√ᾱ + √(1 − ᾱ)), the time of the
    straight path (chapter 10): each once, so many steps may be fewer. A linear schedule then spends its evaluations
    where images take shape, and not on what is nearly pure noise."""
    ddim_timesteps(diffusion.num_timesteps, num_inference_steps)  # says what is wrong
    u = path_times(diffusion)[0][1:]
    even = 1 - torch.arange(num_inference_steps, device=u.device) / num_inference_steps
    nearest = 1 + (u[:, None] - even).abs().argmin(0)
    return sorted(set(nearest.tolist()), reverse=True)


SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim, "heun": sample_heun, "dpmpp-2m": sample_dpmpp_2m}


def sample_images(steps: Iterator[SampleStep]) -> Tensor:
    """Run a sampler to its end and return its sample as uint8 images (B, C, H, W):
    ``sample_images(sample_ddim(model, diffusion, (16, 1, 28, 28)))``."""
    return to_uint8(deque(steps, maxlen=1).pop().x_t)


def _start(diffusion: GaussianDiffusion, shape: Sequence[int], x_T: Tensor | None, generator) -> Tensor:
    device = diffusion.betas.device
    return randn_like(torch.empty(tuple(shape), device=device), generator) if x_T is None else x_T.to(device)


def _steps_down(
    diffusion: GaussianDiffusion, num_inference_steps: int, start: int | None, spacing: str
) -> Iterator[tuple[int, int]]:
    if spacing == "t":
        timesteps = ddim_timesteps(diffusion.num_timesteps, num_inference_steps)
    else:
        timesteps = path_timesteps(diffusion, num_inference_steps)
    if start is not None:  # the same steps, from there on
        timesteps = [start, *(t for t in timesteps if t < start)]
    return zip(timesteps, [*timesteps[1:], 0], strict=True)


def _predict_x0(model, diffusion: GaussianDiffusion, x_t: Tensor, t: int, clip_denoised: bool) -> Tensor:
    pred_noise = model(x_t, torch.full(x_t.shape[:1], t, device=x_t.device))
    pred_x0 = diffusion.predict_x0(x_t, t, pred_noise)
    return pred_x0.clamp(-1, 1) if clip_denoised else pred_x0
