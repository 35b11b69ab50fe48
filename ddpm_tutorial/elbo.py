"""The evidence lower bound of DDPM, term by term, in bits per dimension (chapter 2).

−log p_θ(x_0) ≤ L_T + Σ_{t=2}^{T} L_{t−1} + L_0 (DDPM eq. 5). L_T is ``prior_term``; ``vlb_term`` at t is L_{t−1}, and
L_0 at t = 1; ``bits_per_dim`` adds them up. Data is 8-bit: float x_0 in [−1, 1], one grey level is 2/255 (as made by
``data.to_model_range``). One dimension is one number of an image: 784 for 28×28 grey, three per pixel for colour.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .diffusion import GaussianDiffusion, check_counts, check_diffusion, check_floats, randn_like

HALF_LEVEL = 1 / 255  # half the distance between two grey levels in [−1, 1]


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, e^logvar1) ‖ N(mean2, e^logvar2)) of each element, in nats; the shapes broadcast."""
    log_ratio = logvar1 - logvar2
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """log of the mass that N(means, e^(2·log_scales)) puts on x's grey level, of each element, in nats (DDPM eq. 13).

    The level x reaches from x − 1/255 to x + 1/255; the outer ends of −1 and 1 are open, so the 256 masses sum to 1.
    ``log_scales`` is log σ. Finite and exact far into the tails: it never takes the log of a difference of two CDFs.
    """
    inv_scale = torch.exp(-log_scales)
    upper = torch.where(x > 1 - HALF_LEVEL, math.inf, (x - means + HALF_LEVEL) * inv_scale)
    lower = torch.where(x < -1 + HALF_LEVEL, -math.inf, (x - means - HALF_LEVEL) * inv_scale)
    flip = lower + upper > 0  # Φ(b) − Φ(a) = Φ(−a) − Φ(−b): work in the left tail, where log Φ is exact
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_upper, log_lower = log_normal_cdf(upper), log_normal_cdf(lower)
    smaller = (log_lower - log_upper).clamp(max=-torch.finfo(log_upper.dtype).eps)
    return log_upper + torch.log(-torch.expm1(smaller))  # log(Φ(b) − Φ(a)) = log Φ(b) + log(1 − Φ(a)/Φ(b))


def log_normal_cdf(z: Tensor) -> Tensor:
    """log Φ(z) of each element, exact in both tails. (torch.special.log_ndtr has these values, but its float32
    gradient is wrong below z = −1000: it is an exponential of the difference of two large numbers.)"""
    left, right = z.clamp(max=0), z.clamp(min=0)
    in_left = torch.special.erfcx(-left / 2**0.5).mul(0.5).log() - 0.5 * left**2  # Φ(z) = ½ e^{−z²/2} erfcx(−z/√2)
    return torch.where(z < 0, in_left, torch.log1p(-0.5 * torch.special.erfc(right / 2**0.5)))


def reverse_variances(diffusion: GaussianDiffusion, variance: str) -> Tensor:
    """σ_t² of p_θ(x_{t−1} | x_t), (T + 1,): "beta" is β_t, "posterior" is β̃_t (DDPM section 3.2).

    β̃_1 is 0, and a decoder needs a width, so "posterior" has σ_1² = β̃_2, as DDPM's own code does. (That code uses
    β̃_2 at t = 1 for its other choice too; "beta" here has σ_1² = β_1.) Entry 0 is not used.
    """
    if variance == "beta":
        return diffusion.betas
    if variance == "posterior":
        if diffusion.num_timesteps < 2:
            raise ValueError("variance='posterior' takes its decoder from t = 2, but this diffusion has T = 1")
        table = diffusion.posterior_variance.clone()
        table[1] = table[2]
        return table
    raise ValueError(f"variance must be 'beta', 'posterior' or a table of T + 1 values, got {variance!r}")


def _variance_table(diffusion: GaussianDiffusion, variance: str | Tensor) -> Tensor:
    if not isinstance(variance, Tensor):
        return reverse_variances(diffusion, variance)
    if variance.shape != diffusion.betas.shape or not (variance[1:] > 0).all():
        raise ValueError(
            f"a table of variances must be ({len(diffusion.betas)},) and positive from entry 1 on, "
            f"got shape {tuple(variance.shape)}"
        )
    return variance.to(diffusion.betas)


def _check_data(x_0: Tensor) -> None:
    """ValueError for images (B, C, H, W) that are not grey levels scaled to [−1, 1]; other data may be any floats."""
    check_floats(x_0=x_0)
    levels = (x_0 + 1) / (2 * HALF_LEVEL)
    if x_0.ndim == 4 and not ((x_0.abs() <= 1) & ((levels - levels.round()).abs() <= 0.01)).all():
        raise ValueError("x_0 must hold grey levels scaled to [−1, 1], as data.to_model_range makes them")


def _bits(nats: Tensor) -> Tensor:
    """(B, …) in nats → (B,): the mean over all but the batch, in bits."""
    return nats.flatten(1).mean(1) / math.log(2)


def prior_term(diffusion: GaussianDiffusion, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) in bits/dim: how far x_T is from where sampling starts, and what it still
    tells of x_0. x_0 (B, …) → (B,)."""
    _check_data(x_0)
    T = diffusion.num_timesteps
    mean = diffusion.sqrt_alphas_cumprod[T] * x_0  # DDPM eq. 4
    logvar = 2 * diffusion.sqrt_one_minus_alphas_cumprod[T].log()
    zero = torch.zeros_like(logvar)
    return _bits(normal_kl(mean, logvar, zero, zero))


def vlb_term(
    model: Callable[[Tensor, Tensor], Tensor],
    diffusion: GaussianDiffusion,
    x_0: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    variance: str | Tensor = "beta",
    clip_denoised: bool = True,
) -> Tensor:
    """L_{t−1} for t > 1 and L_0 for t = 1, in bits/dim, of x_0 and one x_t ~ q(x_t | x_0). Shapes (B, …) → (B,).

    L_{t−1} = KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)), L_0 = −log p_θ(x_0 | x_1) with the discretised decoder.
    p_θ has the mean μ̃_t(x_t, x̂_0), where x̂_0 is the model's (clipped to [−1, 1] if ``clip_denoised``), and the variance
    "beta", "posterior" (see ``reverse_variances``) or ``variance[t]`` of a table (T + 1,). Differentiable.
    """
    _check_data(x_0)
    check_diffusion(model, diffusion)
    return vlb_term_and_mse(model, diffusion, x_0, x_t, t, _variance_table(diffusion, variance), clip_denoised)[0]


def vlb_term_and_mse(
    model: Callable[[Tensor, Tensor], Tensor],
    diffusion: GaussianDiffusion,
    x_0: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    variances: Tensor,
    clip_denoised: bool = True,
) -> tuple[Tensor, Tensor]:
    """``vlb_term`` with a table of variances (T + 1,), and the mean square of x̂_0 − x_0, (B,) each."""
    if isinstance(t, int):
        t = torch.full(x_t.shape[:1], t, device=x_t.device)
    pred_x0 = diffusion.predict_x0(x_t, t, model(x_t, t))  # DDPM eq. 15
    if clip_denoised:
        pred_x0 = pred_x0.clamp(-1, 1)
    pred_mean, _ = diffusion.q_posterior(pred_x0, x_t, t)  # DDPM eqs. 7 and 11
    pred_logvar = diffusion.at(variances, t, x_t).log()
    mean, _ = diffusion.q_posterior(x_0, x_t, t)
    # β̃_1 = 0 has no logarithm. A KL is not used at t = 1, so any number does there, and 1 keeps it free of NaN.
    true_variance = diffusion.at(diffusion.posterior_variance, t, x_t)
    logvar = torch.where(true_variance > 0, true_variance, 1).log()
    kl = _bits(normal_kl(mean, logvar, pred_mean, pred_logvar))
    decoder_nll = _bits(-discretized_gaussian_log_likelihood(x_0, pred_mean, 0.5 * pred_logvar))
    return torch.where(t == 1, decoder_nll, kl), ((pred_x0 - x_0) ** 2).flatten(1).mean(1)


class BitsPerDim(NamedTuple):
    """The bound of each of B images, in bits/dim, and its parts at the S timesteps that were evaluated.

    ``total`` (B,) = ``prior`` + Σ_s ``weights[s]`` · ``terms[:, s]``. With every timestep, S = T, column s is t = s + 1
    and the weights are 1. With fewer, each timestep stands for ``weights[s]`` of them, and the total is an unbiased
    estimate. ``terms`` is L_{t−1} for t > 1 and L_0 for t = 1.
    """

    total: Tensor  # (B,)
    prior: Tensor  # (B,), L_T
    terms: Tensor  # (B, S)
    x0_mse: Tensor  # (B, S), mean square of x̂_0 − x_0 on the scale [−1, 1]
    timesteps: Tensor  # (B, S)
    weights: Tensor  # (S,)


@torch.no_grad()
def bits_per_dim(
    model: Callable[[Tensor, Tensor], Tensor],
    diffusion: GaussianDiffusion,
    x_0: Tensor,
    generator: torch.Generator | None = None,
    *,
    num_steps: int | None = None,
    variance: str | Tensor = "beta",
    clip_denoised: bool = True,
    batch_size: int = 100,
    progress: bool = False,
) -> BitsPerDim:
    """The bound on −log₂ p_θ(x_0) per dimension, with all its terms, of 8-bit images x_0 (B, C, H, W) in [−1, 1].

    Each term draws one x_t, so the total is a random number whose mean is the bound. ``num_steps`` S < T evaluates S
    timesteps per image: 1 … T is cut into S runs (``timestep_strata``), and each image draws one t from each run. One
    evaluation costs the same at any t. ``mean_and_error`` gives the mean over images and its standard error, which
    covers the choice of images, of timesteps, and of noise. Results stay on x_0's device. A model that is bound to
    labels is called on ``batch_size`` images at a time: call this once for each batch.
    """
    check_diffusion(model, diffusion)
    check_counts(batch_size=batch_size)
    if x_0.ndim != 4 or len(x_0) == 0:
        raise ValueError(f"x_0 must be float images (B, C, H, W), got {x_0.dtype} of shape {tuple(x_0.shape)}")
    _check_data(x_0)
    x_0 = x_0.float()
    variances = _variance_table(diffusion, variance)
    edges = timestep_strata(diffusion.num_timesteps, diffusion.num_timesteps if num_steps is None else num_steps)
    weights = edges.diff()  # how many timesteps each one stands for
    uniform = torch.rand(len(x_0), len(weights), generator=generator, device=generator.device if generator else "cpu")
    timesteps = (edges[:-1] + (uniform.cpu() * weights).long()).to(x_0.device)  # (B, S)
    terms, x0_mse = (torch.empty(timesteps.shape, device=x_0.device) for _ in range(2))
    with tqdm(total=timesteps.numel(), unit="term", mininterval=1, disable=not progress) as bar:
        for rows in torch.arange(len(x_0)).split(batch_size):
            batch = x_0[rows]
            for s in range(len(weights)):
                t = timesteps[rows, s]
                x_t = diffusion.q_sample(batch, t, randn_like(batch, generator))
                terms[rows, s], x0_mse[rows, s] = vlb_term_and_mse(
                    model, diffusion, batch, x_t, t, variances, clip_denoised
                )
                bar.update(len(rows))
    prior = prior_term(diffusion, x_0)
    weights = weights.to(terms)
    return BitsPerDim(prior + terms @ weights, prior, terms, x0_mse, timesteps, weights)


def timestep_strata(num_timesteps: int, num_steps: int) -> Tensor:
    """1 = e_0 < e_1 < … < e_S = T + 1: the run s of timesteps is e_s … e_{s+1} − 1. Returns (S + 1,) integers.

    The first runs are single timesteps, because the terms at small t are large and change fast; later ones grow in
    proportion to t. With S = T every run is one timestep; from S = 2 on t = 1 is a run of its own (L_0).
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps must be an integer in 1 … {num_timesteps} (T), got {num_steps!r}")
    edges = [1]
    for left in range(num_steps, 0, -1):  # a geometric progression from here to the end, in whole steps of at least 1
        here, end = edges[-1], num_timesteps + 1
        step = round(here * ((end / here) ** (1 / left) - 1)) if here > 1 or num_steps == 1 else 1
        edges.append(here + min(max(1, step), end - here - (left - 1)))
    return torch.tensor(edges)


def mean_and_error(per_image: Tensor) -> tuple[float, float]:
    """The mean of (B,) values and its standard error, std / √B (not a number for B = 1)."""
    values = per_image.cpu().double()  # there is no float64 on Apple's GPUs
    return values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan
