"""Toy data whose exact noise predictor is known, and a small denoiser for points in the plane: the oracle of the
chapters and the tests (chapters 1, 2, 3, 6, 7 and 10)."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .diffusion import GaussianDiffusion
from .losses import weighted_noise_loss


class GaussianMixture:
    """Data x_0 ~ Σ_k w_k N(μ_k, d_k² I) in D dimensions; with one component, a Gaussian.

    ``means`` (K, D), ``stds`` (K,) and ``weights`` (K,), which sum to 1. The forward process keeps a mixture a
    mixture: x_t ~ Σ_k w_k N(√ᾱ_t μ_k, (ᾱ_t d_k² + 1 − ᾱ_t) I), so q(x_t), its score and the best noise predictor
    are closed forms. Points are (B, D); ``t`` is an int or (B,).
    """

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor | None = None):
        self.means, self.stds = torch.as_tensor(means), torch.as_tensor(stds)
        count = len(self.means)
        self.weights = torch.full((count,), 1 / count) if weights is None else torch.as_tensor(weights)
        if self.means.ndim != 2 or self.stds.shape != (count,) or self.weights.shape != (count,):
            raise ValueError(
                "means must be (K, D), stds and weights (K,); got "
                f"{tuple(self.means.shape)}, {tuple(self.stds.shape)} and {tuple(self.weights.shape)}"
            )
        at_least_0 = all((part >= 0).all() for part in (self.weights, self.stds))  # false for NaN, too
        if not at_least_0 or abs(self.weights.sum().item() - 1) > 1e-5:
            raise ValueError(
                f"weights must sum to 1, and weights and stds be at least 0; got {self.weights} and {self.stds}"
            )

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``count`` points, (count, D)."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[component] + self.stds[component, None] * noise

    def log_prob(self, diffusion: GaussianDiffusion, x_t: Tensor, t: int | Tensor) -> Tensor:
        """log q(x_t), (B,); t = 0 is the data itself."""
        return self._log_joint(*self._offsets(diffusion, x_t, t)).logsumexp(dim=1)

    def score(self, diffusion: GaussianDiffusion, x_t: Tensor, t: int | Tensor) -> Tensor:
        """∇ log q(x_t), (B, D): each component's −(x_t − mean)/variance, weighted by p(component | x_t)."""
        offsets, variance = self._offsets(diffusion, x_t, t)
        responsibility = self._log_joint(offsets, variance).softmax(dim=1)  # (B, K)
        return -(responsibility[..., None] * offsets / variance[..., None]).sum(dim=1)

    def noise_model(self, diffusion: GaussianDiffusion) -> Callable[[Tensor, Tensor], Tensor]:
        """The best possible ε_θ(x_t, t) = E[ε | x_t] = −√(1 − ᾱ_t) ∇ log q(x_t), as a model for any sampler."""

        def model(x_t: Tensor, t: int | Tensor) -> Tensor:
            sigma_t = diffusion.at(diffusion.sqrt_one_minus_alphas_cumprod, t, x_t)
            return -sigma_t * self.score(diffusion, x_t, t)

        model.diffusion = diffusion
        return model

    def _offsets(self, diffusion: GaussianDiffusion, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """x_t minus each component's mean at t, (B, K, D), and its variance, (B, K) or (1, K)."""
        alpha_bar_t = diffusion.at(diffusion.alphas_cumprod, t, x_t, first=0).reshape(-1, 1)  # (B or 1, 1)
        offsets = x_t[:, None] - alpha_bar_t.sqrt()[..., None] * self.means
        sigma_t = diffusion.at(diffusion.sqrt_one_minus_alphas_cumprod, t, x_t, first=0).reshape(-1, 1)
        return offsets, alpha_bar_t * self.stds**2 + sigma_t**2

    def _log_joint(self, offsets: Tensor, variance: Tensor) -> Tensor:
        """log of weight · density of each component, (B, K)."""
        dim = offsets.shape[-1]
        quadratic = (offsets**2).sum(-1) / variance
        return self.weights.log() - 0.5 * (quadratic + dim * (2 * math.pi * variance).log())


# ----------------------------------------------------------------------- the bound in one dimension, exactly
class ExactElbo(NamedTuple):
    """The bound averaged over the data, in nats, with everything around it; all float64.

    bound = ``prior`` + Σ ``terms`` ≥ ``nll`` = −E log p_θ(x_0) ≥ ``entropy`` of the data.
    """

    prior: Tensor  # L_T
    terms: Tensor  # (T,): L_0 (a density: no grey levels here), L_1, …, L_{T−1}
    nll: Tensor
    entropy: Tensor

    @property
    def bound(self) -> Tensor:
        return self.prior + self.terms.sum()


def gaussian_elbo(mean: float, std: float, diffusion: GaussianDiffusion, variances: Tensor) -> ExactElbo:
    """``ExactElbo`` of x_0 ~ N(mean, std²) in closed form, for the best possible p_θ with the given σ_t².

    p_θ(x_{t−1} | x_t) has the exact mean E[x_{t−1} | x_t] and the variance ``variances[t]``, a (T + 1,) table
    (``elbo.reverse_variances``). Every p_θ(x_t) is then Gaussian, so the NLL is a recursion of two numbers.
    """
    betas, alpha_bar, previous, variances = _float64_tables(diffusion, variances)
    marginal = alpha_bar * std**2 + 1 - alpha_bar  # variance of x_t
    x0_variance = std**2 * (1 - alpha_bar) / marginal  # of x_0 given x_t
    prior = 0.5 * (alpha_bar[-1] * (std**2 + mean**2) - alpha_bar[-1] - (1 - alpha_bar[-1]).log())
    terms = _expected_terms(betas, alpha_bar, previous, variances, x0_variance)
    model_mean, model_variance = torch.tensor([0.0, 1.0], dtype=torch.float64)  # of p_θ(x_t), from p(x_T) down
    for t in reversed(range(len(betas))):
        slope = (1 - betas[t]).sqrt() * (previous[t] * std**2 + 1 - previous[t]) / marginal[t]
        model_mean = previous[t].sqrt() * mean + slope * (model_mean - alpha_bar[t].sqrt() * mean)
        model_variance = slope**2 * model_variance + variances[t]
    nll = 0.5 * ((2 * math.pi * model_variance).log() + (std**2 + (mean - model_mean) ** 2) / model_variance)
    entropy = 0.5 * torch.tensor(2 * math.pi * math.e * std**2, dtype=torch.float64).log()
    return ExactElbo(prior, terms, nll, entropy)


def mixture_elbo(
    mixture: GaussianMixture, diffusion: GaussianDiffusion, variances: Tensor, limit: float = 6.0, points: int = 1201
) -> ExactElbo:
    """``ExactElbo`` of a 1-D mixture on an even grid of ``points`` from −limit to limit.

    As in ``gaussian_elbo``, p_θ has the exact mean and the given σ_t². p_θ(x_0) comes from T integrals over the grid,
    so the grid's spacing must stay below the smallest σ_t (ValueError).
    """
    if mixture.means.shape[1] != 1:
        raise ValueError(f"mixture_elbo takes a mixture in one dimension, got {mixture.means.shape[1]}")
    betas, alpha_bar, previous, variances = _float64_tables(diffusion, variances)
    x = torch.linspace(-limit, limit, points, dtype=torch.float64)
    dx = 2 * limit / (points - 1)
    if dx > variances.min().sqrt():
        raise ValueError(f"the grid's spacing {dx:.2g} must be below the smallest σ_t, {variances.min().sqrt():.2g}")
    means, stds, weights = mixture.means[:, 0].double(), mixture.stds.double(), mixture.weights.double()

    def gaussian(offset: Tensor, variance: Tensor) -> Tensor:
        return torch.exp(-0.5 * offset**2 / variance) / (2 * math.pi * variance).sqrt()

    data = (weights * gaussian(x[:, None] - means, stds**2)).sum(1)  # q(x_0) on the grid
    model, x0_variance = gaussian(x, torch.ones(1)), torch.empty_like(betas)  # p_θ(x_T) = N(0, 1)
    for t in reversed(range(len(betas))):
        component_variance = alpha_bar[t] * stds**2 + 1 - alpha_bar[t]  # (K,)
        offsets = x[:, None] - alpha_bar[t].sqrt() * means  # (points, K)
        log_joint = weights.log() - 0.5 * (offsets**2 / component_variance + (2 * math.pi * component_variance).log())
        density, share = log_joint.logsumexp(1).exp(), log_joint.softmax(1)  # q(x_t), p(component | x_t)
        x0_means = means + alpha_bar[t].sqrt() * stds**2 / component_variance * offsets  # E[x_0 | x_t, component]
        x0_mean = (share * x0_means).sum(1)
        spread = stds**2 * (1 - alpha_bar[t]) / component_variance + (x0_means - x0_mean[:, None]) ** 2
        x0_variance[t] = (density * (share * spread).sum(1)).sum() * dx  # E Var(x_0 | x_t)
        mean = previous[t].sqrt() * betas[t] * x0_mean + (1 - betas[t]).sqrt() * (1 - previous[t]) * x  # eq. 7, times
        mean = mean / (1 - alpha_bar[t])  # 1 − ᾱ_t
        model = gaussian(x[:, None] - mean, variances[t]) @ model * dx  # p_θ(x_{t−1}) = ∫ p_θ(x_{t−1} | x_t) p_θ(x_t)
    prior = 0.5 * (alpha_bar[-1] * (data * x**2).sum() * dx - alpha_bar[-1] - (1 - alpha_bar[-1]).log())
    terms = _expected_terms(betas, alpha_bar, previous, variances, x0_variance)
    nll, entropy = (-(data * p.clamp(min=1e-300).log()).sum() * dx for p in (model, data))
    return ExactElbo(prior, terms, nll, entropy)


def _float64_tables(diffusion: GaussianDiffusion, variances: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """β_t, ᾱ_t, ᾱ_{t−1} and σ_t² for t = 1 … T, (T,) float64 each."""
    if variances.shape != diffusion.betas.shape:
        raise ValueError(f"variances must be a table ({len(diffusion.betas)},), got {tuple(variances.shape)}")
    betas = diffusion.exact_betas
    alpha_bar = (1 - betas).cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return betas, alpha_bar, previous, variances[1:].cpu().double()


def _expected_terms(betas, alpha_bar, previous, variances, x0_variance) -> Tensor:
    """L_0 … L_{T−1} of a p_θ with the exact mean, given E Var(x_0 | x_t), (T,)."""
    posterior_variance = betas * (1 - previous) / (1 - alpha_bar)  # β̃_t, DDPM eq. 7
    missed = previous * betas**2 / (1 - alpha_bar) ** 2 * x0_variance  # E (μ̃_t − μ_θ)²
    decoder = 0.5 * ((2 * math.pi * variances).log() + missed / variances)  # −E log N(x_0; μ_θ, σ_1²)
    ratio = posterior_variance / variances
    kl = 0.5 * (ratio - 1 - ratio.log() + missed / variances)
    return torch.cat([decoder[:1], kl[1:]])


# -------------------------------------------------------------------------------- data sets in the plane
def spiral(count: int, generator: torch.Generator | None = None, noise: float = 0.04) -> Tensor:
    """Points on a spiral of one and a half turns plus N(0, noise² I), (count, 2), variance about 1 per coordinate."""
    angle = 3 * math.pi * torch.rand(count, generator=generator).sqrt()
    points = torch.stack([angle.cos(), angle.sin()], dim=1) * angle[:, None] / 4.7
    return points + noise * torch.randn(count, 2, generator=generator)


def moons(count: int, generator: torch.Generator | None = None, noise: float = 0.04) -> Tensor:
    """Points on two half circles that reach into each other plus N(0, noise² I), (count, 2), mean 0, total variance
    about 2."""
    angle = math.pi * torch.rand(count, generator=generator)
    lower = torch.rand(count, generator=generator) < 0.5
    upper_moon = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    points = 2**0.5 * torch.where(lower[:, None], -upper_moon, upper_moon)  # the lower one is the upper one, turned
    return points + noise * torch.randn(count, 2, generator=generator)


def rings(count: int, generator: torch.Generator | None = None, noise: float = 0.04) -> Tensor:
    """Points on circles of radius 0.8 and 1.8, half on each, plus N(0, noise² I), (count, 2); total variance 2."""
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    radius = torch.where(torch.rand(count, generator=generator) < 0.5, 0.8, 1.8)
    points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return points + noise * torch.randn(count, 2, generator=generator)


# ------------------------------------------------------------------------------- a small denoiser for points
class PointDenoiser(nn.Module):
    """ε_θ(x_t, t) for points (B, 2): an MLP on x_t with t appended, scaled to [−1, 1]. ``t`` is (B,) integers."""

    def __init__(self, num_timesteps: int, width: int = 64):
        super().__init__()
        self.num_timesteps = num_timesteps
        self.net = nn.Sequential(
            nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        if t.shape != x_t.shape[:1]:
            raise ValueError(f"t must be ({x_t.shape[0]},), one timestep per point; got {tuple(t.shape)}")
        return self.net(torch.cat([x_t, 2 * t[:, None] / self.num_timesteps - 1], dim=1))  # (B, 3) in


def train_points(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    sample: Callable[[int, torch.Generator | None], Tensor],
    *,
    num_train_steps: int = 2500,
    batch_size: int = 512,
    lr: float = 1e-2,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[float]:
    """DDPM algorithm 1 on fresh points ``sample(batch_size, generator)`` in every step; yields each step's loss.

    ``weights`` (T + 1,) multiplies the squared error of each timestep; without it the loss is L_simple. Adam, with a
    cosine from ``lr`` to 0.
    """
    weights = torch.ones(diffusion.num_timesteps + 1) if weights is None else weights
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_train_steps)
    for _ in range(num_train_steps):
        x_0 = sample(batch_size, generator)
        t = torch.randint(1, diffusion.num_timesteps + 1, (batch_size,), generator=generator)
        noise = torch.randn(x_0.shape, generator=generator)
        loss = weighted_noise_loss(model(diffusion.q_sample(x_0, t, noise), t), noise, weights[t])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()
