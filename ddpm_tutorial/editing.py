"""Editing: inpainting with any sampler, by wrapping its noise model and by going back and forth (chapter 9)."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .diffusion import (
    GaussianDiffusion,
    NoiseModel,
    asking,
    check_counts,
    check_floats,
    check_same_shape,
    randn_like,
)
from .sampling import SampleStep, checked_at_the_call


def _check_known(known: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, true where the image is known; got {mask.dtype}")
    check_floats(known=known)


def _spread_over(x_t: Tensor, known: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the shape of x_t and on its device."""
    try:
        return known.to(x_t).expand_as(x_t), mask.to(x_t.device).expand_as(x_t)
    except RuntimeError:
        raise ValueError(
            f"known and mask must be {tuple(x_t.shape)}, as x_t, or expand to it; got {tuple(known.shape)} and "
            f"{tuple(mask.shape)}"
        ) from None


def keep_known(model: NoiseModel, diffusion: GaussianDiffusion, known: Tensor, mask: Tensor) -> NoiseModel:
    """``model`` with the answer given where ``mask`` is true: the noise there is the one that ``known`` leaves in x_t.

    Each pred_x0 then has the known pixels, so a sampler takes them along the forward process of ``known`` (DDIM eq. 7,
    with the true x_0) and ends at them; ``model`` fills in the others. Only ``sample_ddpm(variance="beta")``, whose
    noise is not of that family, gives them too much noise on the way. ``known`` and ``mask`` (bool) are
    (B, …), or of a shape that expands to it.
    """
    _check_known(known, mask)

    @asking(model, diffusion=diffusion)
    def masked(x_t: Tensor, t: int | Tensor) -> Tensor:
        x_0, given = _spread_over(x_t, known, mask)
        return torch.where(given, diffusion.predict_noise(x_t, t, x_0), model(x_t, t))

    return masked


def pull_known(model: NoiseModel, diffusion: GaussianDiffusion, known: Tensor, mask: Tensor) -> NoiseModel:
    """``model`` pulled towards images whose x_0 has the ``known`` pixels where ``mask`` (bool) is true: its score minus
    the gradient of ‖known − pred_x0‖² / 2(1 − ᾱ_t) with respect to x_t, through the network (DPS, Chung et al., 2022,
    arXiv:2209.14687, eq. 16). 1 − ᾱ_t is the variance of x_0 given x_t for pixels of variance 1 without correlation;
    the paper finds its weight by trial. One evaluation forwards and backwards. Inside ``keep_known`` the known pixels
    come out exactly. ``known`` and ``mask`` are (B, …), or of a shape that expands to it.
    """
    _check_known(known, mask)

    @asking(model, diffusion=diffusion)
    def pulled(x_t: Tensor, t: Tensor) -> Tensor:
        x_0, given = _spread_over(x_t, known, mask)
        with torch.enable_grad():  # samplers run without gradients
            x = x_t.detach().requires_grad_()
            noise = model(x, t)
            miss = (x_0 - diffusion.predict_x0(x, t, noise)) * given
            pull = -torch.autograd.grad(miss.square().sum(), x)[0]
        variance = 1 - diffusion.at(diffusion.alphas_cumprod, t, x_t)
        return noise.detach() + diffusion.noise_from_score(pull / (2 * variance), t)

    return pulled


def _check_loops(sampler, diffusion: GaussianDiffusion, x_T, num_loops: int, **_others) -> None:
    check_counts(num_loops=num_loops)
    sampler(x_T=x_T, start=diffusion.num_timesteps)  # says what is wrong, and runs no step


@checked_at_the_call(_check_loops)
def resample(
    sampler: Callable[..., Iterator[SampleStep]],
    diffusion: GaussianDiffusion,
    x_T: Tensor,
    *,
    num_loops: int,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[SampleStep]:
    """RePaint (Lugmayr et al., 2022, arXiv:2201.09865): each step down is taken ``num_loops`` times, with noise added
    again between, so that pixels settle on one another. 1 loop is the sampler itself, one step at a time; but
    ``sample_dpmpp_2m`` begins afresh in each step, without the last one to draw a line through: it is DDIM here.
    Unlike RePaint's algorithm 1 it goes back one of the sampler's steps at a time, and loops in the last step too.

    ``sampler(x_T=…, start=…)`` is one of ``SAMPLERS`` with the rest filled in:
    ``partial(sample_ddim, keep_known(model, …), diffusion, shape)``. Yields every step; t goes down and up, the last
    x_t is the sample. Each evaluation of the model counts ``num_loops`` times.
    """
    x_t, t = x_T, diffusion.num_timesteps
    while t > 0:
        step = next(sampler(x_T=x_t, start=t))
        yield step
        for _ in range(num_loops - 1):
            again = add_noise(diffusion, step.x_t, step.t, t, randn_like(step.x_t, generator))
            step = next(sampler(x_T=again, start=t))
            yield step
        x_t, t = step.x_t, step.t


def add_noise(diffusion: GaussianDiffusion, x_earlier: Tensor, earlier: int, t: int, noise: Tensor) -> Tensor:
    """From x_t' at an ``earlier`` time t' up to x_t in one jump: √(ᾱ_t/ᾱ_t') x_t' + √(1 − ᾱ_t/ᾱ_t') ε, the steps
    t' + 1 … t of DDPM eq. 2 together. 0 ≤ t' ≤ t; from t' = 0 it is ``q_sample``. Shapes (B, …)."""
    if not 0 <= earlier <= t:
        raise ValueError(f"noise is added from an earlier time up to t, so 0 ≤ earlier ≤ t; got {earlier} and t = {t}")
    check_same_shape("x_earlier", x_earlier, "noise", noise)
    table = diffusion.alphas_cumprod
    kept = diffusion.at(table, t, x_earlier, first=0) / diffusion.at(table, earlier, x_earlier, first=0)  # ᾱ_t/ᾱ_t'
    return kept.sqrt() * x_earlier + (1 - kept).sqrt() * noise
