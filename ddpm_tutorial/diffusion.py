"""The forward process and every formula of DDPM that needs no network (chapters 1 and 3).

The code's ``t`` is the paper's ``t``: timesteps are 1 … T, every table has T + 1 entries, and entry 0 is clean
data (``betas[0] = 0``, ``alphas_cumprod[0] = 1``). Libraries that count from 0 call our ``t`` by ``t - 1``.

DDPM: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, arXiv:2006.11239.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

NoiseModel = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, …), t (B,)) -> predicted noise (B, …)
MAX_SQRT_ALPHA_BAR_T = 0.05  # above this, x_T still shows the data and is not the N(0, I) that sampling starts from
MAX_COUNT = 1_000_000  # of timesteps, channels, …: what is larger is a slip, and would end in torch's words for it


# -------------------------------------------------------------------------------------- what may be given
def check_counts(**counts: int) -> None:
    """ValueError names the first of these that is not an integer in 1 … ``MAX_COUNT``."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_COUNT:
            raise ValueError(f"{name} must be an integer of at least 1, at most {MAX_COUNT}, got {count!r}")


def check_floats(**tensors: Tensor) -> None:
    """ValueError names the first of these that is no tensor of floats: uint8 images, say."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be floats, got {given} (data.to_model_range makes float images of uint8)")


def holds_integers(x: Tensor) -> bool:
    """Whether the tensor's dtype is one of integers; booleans are none."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


# --------------------------------------------------------------------------------------- beta schedules
def _scaled_range(num_timesteps: int, name: str) -> tuple[float, float]:
    """The ends of DDPM's linear schedule, (1e-4, 0.02) at T = 1000, scaled by 1000/T so that x_T is noise at any T."""
    check_counts(num_timesteps=num_timesteps)
    scale = 1000 / num_timesteps
    start, end = scale * 1e-4, scale * 0.02
    if end >= 1:
        raise ValueError(
            f"{name}_beta_schedule got num_timesteps={num_timesteps}: beta_T = 20/T must stay below 1, "
            "so T must be at least 21 (cosine_beta_schedule allows fewer)"
        )
    return start, end


def linear_beta_schedule(num_timesteps: int) -> Tensor:
    """β_t rises in equal steps from 1e-4 to 0.02, times 1000/T (DDPM section 4). Returns β_1 … β_T, (T,) float64."""
    start, end = _scaled_range(num_timesteps, "linear")
    return torch.linspace(start, end, num_timesteps, dtype=torch.float64)


def quadratic_beta_schedule(num_timesteps: int) -> Tensor:
    """√β_t rises in equal steps between linear's ends ("quad" in the code of DDIM, arXiv:2010.02502). (T,) float64."""
    start, end = _scaled_range(num_timesteps, "quadratic")
    return torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float64) ** 2


def sigmoid_beta_schedule(num_timesteps: int) -> Tensor:
    """β_t follows a sigmoid on [−6, 6] between linear's ends ("sigmoid" in the code of DDIM). Returns (T,) float64."""
    start, end = _scaled_range(num_timesteps, "sigmoid")
    ramp = torch.sigmoid(torch.linspace(-6, 6, num_timesteps, dtype=torch.float64))
    return start + (end - start) * ramp


def cosine_beta_schedule(num_timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """ᾱ_t = f(t)/f(0) with f(t) = cos²((t/T + s)/(1 + s) · π/2), so β_t = 1 − ᾱ_t/ᾱ_{t−1}, at most ``max_beta``.

    Nichol, Dhariwal, "Improved DDPM", 2021, arXiv:2102.09672, eq. 17. Returns β_1 … β_T, (T,) float64.
    """
    check_counts(num_timesteps=num_timesteps)
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=max_beta)


SCHEDULES = {
    "linear": linear_beta_schedule,
    "cosine": cosine_beta_schedule,
    "quadratic": quadratic_beta_schedule,
    "sigmoid": sigmoid_beta_schedule,
}


def beta_schedule(name: str, num_timesteps: int = 1000) -> Tensor:
    """The schedule of that name, β_1 … β_T, (T,) float64. ValueError names the known ones."""
    if name not in list(SCHEDULES):  # a list, for names that cannot be hashed
        raise ValueError(f"unknown schedule {name!r}; the known ones are {', '.join(SCHEDULES)}")
    return SCHEDULES[name](num_timesteps)


# ----------------------------------------------------------------------------------- the diffusion itself
def _checked(betas: Tensor) -> Tensor:
    betas = betas.cpu() if isinstance(betas, Tensor) else betas  # before float64, which Apple's GPUs do not have
    betas = torch.as_tensor(betas, dtype=torch.float64)
    if betas.ndim != 1 or len(betas) < 1:
        raise ValueError(f"betas must have shape (T,) with T at least 1, got {tuple(betas.shape)}")
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError(
            f"each beta must lie in (0, 1); got values from {betas.min().item():.4g} to {betas.max().item():.4g}"
        )
    return betas.clone()  # not the caller's, nor a part of a mapped file, which Windows would not let go


def diffusion_tables(betas: Tensor) -> dict[str, Tensor]:
    """The tables of a ``GaussianDiffusion``, (T + 1,) each, of β_1 … β_T, (T,) float64. Entry 0 is clean data."""
    betas = torch.cat([torch.zeros(1, dtype=torch.float64), betas])
    alphas = 1 - betas
    alphas_cumprod = alphas.cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])  # ᾱ_{t−1}
    one_minus = (1 - alphas_cumprod).clamp(min=1e-20)  # entry 0 is never used as a divisor
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": alphas_cumprod,
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
        "posterior_variance": betas * (1 - previous) / one_minus,  # β̃_t, DDPM eq. 7; β̃_1 = 0
        "posterior_mean_coef_x0": previous.sqrt() * betas / one_minus,
        "posterior_mean_coef_xt": alphas.sqrt() * (1 - previous) / one_minus,
    }


class GaussianDiffusion(nn.Module):
    """The Gaussian Markov chain x_0 → x_1 → … → x_T given by β_1 … β_T, and its exact conditionals.

    ``betas`` is (T,), each in (0, 1). The tables are computed in float64 and stored in float32, (T + 1,) each;
    ``.to(device)`` moves them. A warning says so when √ᾱ_T is above 0.05: x_T is then not pure noise.
    Every method takes ``t`` as an int or as integers (B,), one for each item of the batch.
    """

    def __init__(self, betas: Tensor):
        super().__init__()
        self.exact_betas = _checked(betas)  # float64: what a checkpoint keeps, so that a loaded copy is exact
        self.num_timesteps = len(self.exact_betas)
        for name, table in diffusion_tables(self.exact_betas).items():
            self.register_buffer(name, table.float(), persistent=False)
        if (left := self.sqrt_alphas_cumprod[-1].item()) > MAX_SQRT_ALPHA_BAR_T:
            warnings.warn(
                f"this schedule never reaches noise: sqrt(alpha_bar_T) is {left:.3f}, above {MAX_SQRT_ALPHA_BAR_T}. "
                "Sampling that starts from N(0, I) will be wrong; use larger betas or more steps.",
                stacklevel=2,
            )

    @classmethod
    def from_schedule(cls, name: str = "linear", num_timesteps: int = 1000) -> "GaussianDiffusion":
        """The diffusion of a named schedule: linear, cosine, quadratic or sigmoid."""
        return cls(beta_schedule(name, num_timesteps))

    def describe(self) -> str:
        """T and the ends of the betas, in words."""
        first, last = self.exact_betas[0].item(), self.exact_betas[-1].item()
        return f"T = {self.num_timesteps}, betas from {first:.3g} to {last:.3g}"

    # ---------------------------------------------------------------------------- reading the tables
    def at(self, table: Tensor, t: int | Tensor, like: Tensor, first: int = 1) -> Tensor:
        """``table[t]``, shaped to multiply ``like`` (B, …): (B, 1, …), or a scalar for an int ``t``. ValueError as by
        ``check_timesteps``."""
        self.check_timesteps(t, like, first)
        if isinstance(t, int):
            return table[t]
        return table[t.to(table.device, torch.long)].view(-1, *[1] * (like.ndim - 1))  # (B, 1, …, 1)

    def check_timesteps(self, t: int | Tensor, like: Tensor, first: int = 1) -> None:
        """ValueError where t is outside first … T, or is not one integer for each item of the batch ``like`` (B, …).
        The range is not checked on a GPU, where the host would have to wait, nor by ``torch.compile``, whose graph
        would break.
        """
        if isinstance(t, Tensor) and t.shape == like.shape[:1] and holds_integers(t):
            seen = t.device.type == "cpu" and len(t) > 0 and not torch.compiler.is_compiling()
            low, high = (t.min().item(), t.max().item()) if seen else (first, first)
        elif isinstance(t, int) and not isinstance(t, bool):
            low = high = t
        else:
            given = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
            raise ValueError(
                f"t must be an int, or integers of shape ({like.shape[0]},) for a batch of {like.shape[0]}; got {given}"
            )
        if low < first or high > self.num_timesteps:
            raise ValueError(f"t must lie in {first} … {self.num_timesteps}, got values from {low} to {high}")

    # ---------------------------------------------------------------------------------- the forward process
    def q_step(self, x_prev: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """One step x_{t−1} → x_t = √(1 − β_t) x_{t−1} + √β_t ε (DDPM eq. 2). Shapes (B, …)."""
        check_same_shape("x_prev", x_prev, "noise", noise)
        return self.at(self.alphas, t, x_prev).sqrt() * x_prev + self.at(self.betas, t, x_prev).sqrt() * noise

    def q_chain(self, x_0: Tensor, generator: torch.Generator | None = None):
        """The forward chain, step by step: yields (t, x_t) for t = 0 … T. x_0 is (B, …)."""
        x_t = x_0
        yield 0, x_t
        for t in range(1, self.num_timesteps + 1):
            x_t = self.q_step(x_t, t, randn_like(x_t, generator))
            yield t, x_t

    def q_sample(self, x_0: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε in one jump (DDPM eq. 4). t in 0 … T; shapes (B, …)."""
        check_same_shape("x_0", x_0, "noise", noise)
        signal = self.at(self.sqrt_alphas_cumprod, t, x_0, first=0)
        return signal * x_0 + self.at(self.sqrt_one_minus_alphas_cumprod, t, x_0, first=0) * noise

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mean μ̃_t(x_t, x_0), (B, …), and variance β̃_t of q(x_{t−1} | x_t, x_0) (DDPM eqs. 6 and 7).

        The variance broadcasts against x_t; at t = 1 it is 0 and the mean is x_0.
        """
        check_same_shape("x_0", x_0, "x_t", x_t)
        mean = self.at(self.posterior_mean_coef_x0, t, x_t) * x_0 + self.at(self.posterior_mean_coef_xt, t, x_t) * x_t
        return mean, self.at(self.posterior_variance, t, x_t)

    # ------------------------------------------------------------------------------------ x_0 and noise
    def predict_x0(self, x_t: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """The x_0 that gives x_t with this noise: (x_t − √(1 − ᾱ_t) ε) / √ᾱ_t (DDPM eq. 15). Shapes (B, …)."""
        check_same_shape("x_t", x_t, "noise", noise)
        noisy = self.at(self.sqrt_one_minus_alphas_cumprod, t, x_t) * noise
        return (x_t - noisy) / self.at(self.sqrt_alphas_cumprod, t, x_t)

    def predict_noise(self, x_t: Tensor, t: int | Tensor, x_0: Tensor) -> Tensor:
        """The noise that gives x_t from this x_0: (x_t − √ᾱ_t x_0) / √(1 − ᾱ_t). Shapes (B, …)."""
        check_same_shape("x_t", x_t, "x_0", x_0)
        clean = self.at(self.sqrt_alphas_cumprod, t, x_t) * x_0
        return (x_t - clean) / self.at(self.sqrt_one_minus_alphas_cumprod, t, x_t)

    def snr(self) -> Tensor:
        """Signal-to-noise ratio ᾱ_t / (1 − ᾱ_t), (T + 1,); infinite at t = 0."""
        return (self.sqrt_alphas_cumprod / self.sqrt_one_minus_alphas_cumprod) ** 2  # no 1 − ᾱ_t: it cancels in float32

    def mean_from_noise(self, x_t: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """μ̃_t(x_t, x_0) written with the noise: (x_t − β_t/√(1 − ᾱ_t) ε) / √α_t (DDPM eq. 11). Shapes (B, …)."""
        check_same_shape("x_t", x_t, "noise", noise)
        scale = self.at(self.betas, t, x_t) / self.at(self.sqrt_one_minus_alphas_cumprod, t, x_t)
        return (x_t - scale * noise) / self.at(self.alphas, t, x_t).sqrt()

    def noise_from_mean(self, x_t: Tensor, t: int | Tensor, mean: Tensor) -> Tensor:
        """The noise for which ``mean_from_noise`` gives this mean: (x_t − √α_t μ) √(1 − ᾱ_t)/β_t. Shapes (B, …)."""
        check_same_shape("x_t", x_t, "mean", mean)
        scale = self.at(self.betas, t, x_t) / self.at(self.sqrt_one_minus_alphas_cumprod, t, x_t)
        return (x_t - self.at(self.alphas, t, x_t).sqrt() * mean) / scale

    def predict_v(self, x_0: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans, Ho, 2022, arXiv:2202.00512). Shapes (B, …)."""
        check_same_shape("x_0", x_0, "noise", noise)
        clean = self.at(self.sqrt_one_minus_alphas_cumprod, t, x_0) * x_0
        return self.at(self.sqrt_alphas_cumprod, t, x_0) * noise - clean

    def x0_from_v(self, x_t: Tensor, t: int | Tensor, v: Tensor) -> Tensor:
        """x_0 = √ᾱ_t x_t − √(1 − ᾱ_t) v: no division, so no error grows. Shapes (B, …)."""
        check_same_shape("x_t", x_t, "v", v)
        turned = self.at(self.sqrt_one_minus_alphas_cumprod, t, x_t) * v
        return self.at(self.sqrt_alphas_cumprod, t, x_t) * x_t - turned

    def noise_from_v(self, x_t: Tensor, t: int | Tensor, v: Tensor) -> Tensor:
        """ε = √(1 − ᾱ_t) x_t + √ᾱ_t v. Shapes (B, …)."""
        check_same_shape("x_t", x_t, "v", v)
        turned = self.at(self.sqrt_alphas_cumprod, t, x_t) * v
        return self.at(self.sqrt_one_minus_alphas_cumprod, t, x_t) * x_t + turned

    def noise_from_velocity(self, x_t: Tensor, t: int | Tensor, velocity: Tensor) -> Tensor:
        """ε from the straight path's velocity ε − x_0: (x_t + √ᾱ_t · velocity)/(√ᾱ_t + √(1 − ᾱ_t)). Shapes (B, …)."""
        check_same_shape("x_t", x_t, "velocity", velocity)
        clean = self.at(self.sqrt_alphas_cumprod, t, x_t)
        return (x_t + clean * velocity) / (clean + self.at(self.sqrt_one_minus_alphas_cumprod, t, x_t))

    def score_from_noise(self, noise: Tensor, t: int | Tensor) -> Tensor:
        """−ε/√(1 − ᾱ_t): ∇ log q(x_t | x_0) for the noise drawn, ∇ log q(x_t) for its mean E[ε | x_t]. (B, …)."""
        return -noise / self.at(self.sqrt_one_minus_alphas_cumprod, t, noise)

    def noise_from_score(self, score: Tensor, t: int | Tensor) -> Tensor:
        """ε = −√(1 − ᾱ_t) · score, the inverse of ``score_from_noise``. Shapes (B, …)."""
        return -self.at(self.sqrt_one_minus_alphas_cumprod, t, score) * score


def path_times(diffusion: GaussianDiffusion) -> tuple[Tensor, Tensor]:
    """Where a diffusion's timesteps lie on the straight path, equation (10.9): u_t = √(1 − ᾱ_t)/b_t and the scale
    b_t = √ᾱ_t + √(1 − ᾱ_t), so that x_t = b_t x_u. Two tables (T + 1,)."""
    scale = diffusion.sqrt_alphas_cumprod + diffusion.sqrt_one_minus_alphas_cumprod
    return diffusion.sqrt_one_minus_alphas_cumprod / scale, scale


def randn_like(x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """Standard normal noise shaped as x, on x's device; drawn on the generator's own device, so that a CPU
    generator gives the same noise everywhere. A list of generators, one for each item of x (B, …), gives each item its
    own stream: its noise then does not depend on the others in the batch."""
    if isinstance(generator, Sequence):
        if len(generator) != len(x):
            raise ValueError(f"{len(x)} items need as many generators, got {len(generator)}")
        return torch.stack([randn_like(item, own) for item, own in zip(x, generator, strict=True)])
    check_floats(x=x)
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def check_same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """ValueError where two tensors are not floats of one shape: another would be stretched to fit, unseen."""
    check_floats(**{name_a: a, name_b: b})
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


# ------------------------------------------------------------------------- which diffusion a noise model has
def check_diffusion(model: Callable, diffusion: GaussianDiffusion) -> None:
    """ValueError where a noise model comes with a diffusion of its own, and this is another one. A plain function has
    none, and fits everywhere."""
    own = getattr(model, "diffusion", None)
    if own is not None and not torch.equal(own.exact_betas, diffusion.exact_betas):
        raise ValueError(
            f"the network was trained with another diffusion ({own.describe()}) than the one given "
            f"({diffusion.describe()}): its answers would be wrong"
        )


def asking(*models: Callable, diffusion: GaussianDiffusion | None = None) -> Callable[[Callable], Callable]:
    """Decorator of a noise model that asks others: it has the ``diffusion`` that it computes with itself, else theirs.
    ValueError where they differ."""
    theirs = (model.diffusion for model in models if getattr(model, "diffusion", None) is not None)
    own = next(theirs, None) if diffusion is None else diffusion
    if own is not None:
        for model in models:
            check_diffusion(model, own)

    def mark(model: Callable) -> Callable:
        model.diffusion = own
        return model

    return mark
