"""Losses on what the network predicts, and the weight of each timestep (chapters 3, 5 and 10)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .diffusion import GaussianDiffusion, check_same_shape
from .settings import TARGETS

LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}


def simple_loss(output: Tensor, wanted: Tensor, kind: str = "l2") -> Tensor:
    """L_simple (DDPM eq. 14): the mean over every element of |ε − ε_θ|² ("l2"), |ε − ε_θ| ("l1"), or Huber's loss with
    its corner at 1 ("huber", quadratic inside, linear outside). A network that answers with v or x_0 is compared with
    that (``NoisePredictor.wanted``). Equal shapes in, a scalar out.
    """
    if kind not in LOSSES:
        raise ValueError(f"unknown loss {kind!r}; the known ones are {', '.join(LOSSES)}")
    check_same_shape("output", output, "wanted", wanted)
    return LOSSES[kind](output, wanted)


def timestep_probabilities(diffusion: GaussianDiffusion, target: str = "noise") -> Tensor:
    """How often training draws each timestep, (T + 1,), float64; entry 0 is 0, the sum 1. For "noise" and "x_0" all
    alike (DDPM algorithm 1). For "v" in proportion to φ_t − φ_{t−1}, where x_t = cos φ_t · x_0 + sin φ_t · ε; for
    "velocity" to u_t − u_{t−1}, where u_t = √(1 − ᾱ_t)/(√ᾱ_t + √(1 − ᾱ_t)) is the time on the straight path.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; the known ones are {', '.join(TARGETS)}")
    tables = diffusion.sqrt_one_minus_alphas_cumprod, diffusion.sqrt_alphas_cumprod
    noise, signal = (table.cpu().double() for table in tables)
    steps = torch.arange(diffusion.num_timesteps + 1, dtype=torch.float64)
    time = {"v": torch.atan2(noise, signal), "velocity": noise / (noise + signal)}.get(target, steps)
    shares = time.diff(prepend=time[:1])
    return shares / shares.sum()


def draw_timesteps(probabilities: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` timesteps drawn with these probabilities (T + 1,), one from each of ``count`` equal slices of their
    distribution, so that every batch covers all noise levels. (count,) integers, rising, on the CPU."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return torch.searchsorted(probabilities.cumsum(0), u.double(), right=True).clamp(1, len(probabilities) - 1)


def weighted_noise_loss(pred_noise: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """Mean over the batch of weight · (mean over the item of |ε − ε_θ|²); weight 1 is L_simple. (B, …), (B, …), (B,)
    in, a scalar out. ``weight`` is a table of this module read at the batch's t, such as ``vlb_weights(diffusion)[t]``.
    """
    check_same_shape("pred_noise", pred_noise, "noise", noise)
    if weight.shape != noise.shape[:1]:
        raise ValueError(f"weight must be ({noise.shape[0]},), one per item, got {tuple(weight.shape)}")
    return (weight * (pred_noise - noise).square().flatten(1).mean(dim=1)).mean()


def vlb_weights(diffusion: GaussianDiffusion, variance: str = "posterior") -> Tensor:
    """The factor of ‖ε − ε_θ‖² in L_{t−1}, in nats: β_t² / (2 σ_t² α_t (1 − ᾱ_t)) (DDPM eq. 12). (T + 1,); entry 0,
    where there is no step, is 0. ‖·‖² is a sum over the dimensions of one item, not a mean.

    ``variance`` is that of p_θ(x_{t−1} | x_t): "beta" (σ_t² = β_t) or "posterior" (σ_t² = β̃_t). With β̃_1 = 0 the
    latter is infinite at t = 1.
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance must be 'posterior' or 'beta', got {variance!r}")
    sigma_squared = diffusion.posterior_variance if variance == "posterior" else diffusion.betas
    one_minus_alpha_bar = diffusion.sqrt_one_minus_alphas_cumprod**2  # 1 − ᾱ_t without float32's cancellation
    weights = diffusion.betas**2 / (2 * sigma_squared * diffusion.alphas * one_minus_alpha_bar)
    weights[0] = 0
    return weights


def min_snr_weights(diffusion: GaussianDiffusion, gamma: float = 5.0) -> Tensor:
    """min(SNR_t, γ) / SNR_t, Min-SNR-γ (Hang et al., 2023, arXiv:2303.09556) as a factor of the noise error; (T + 1,).

    1 from the noisy end down to where SNR_t = γ, then falling to 0 at t = 0.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    snr_inverse = (diffusion.sqrt_one_minus_alphas_cumprod / diffusion.sqrt_alphas_cumprod) ** 2
    return (gamma * snr_inverse).clamp(max=1)
