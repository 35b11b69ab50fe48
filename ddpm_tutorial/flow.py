"""Flow matching in this book's notation (chapter 10): the straight path x_u = (1 − u) x_0 + u ε from data, u = 0, to
noise, u = 1; its velocity; and what turns a flow into a noise model, so that the samplers of chapter 6 take it.

Lipman et al., "Flow Matching for Generative Modeling", 2022, arXiv:2210.02747; Liu, Gong, Liu, "Flow Straight and
Fast", 2022, arXiv:2209.03003.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .diffusion import GaussianDiffusion, check_counts, check_diffusion, check_floats, path_times
from .files import SHIPPED_WEIGHTS

SHIPPED_FLOW = SHIPPED_WEIGHTS / "flow"  # a ``NoisePredictor`` of Fashion-MNIST, trained for the velocity


def straight_path(x_0: Tensor, noise: Tensor, u: Tensor) -> Tensor:
    """x_u = (1 − u) x_0 + u ε, equation (10.1). Shapes (B, …); ``u`` (B,) in [0, 1]."""
    check_floats(x_0=x_0, noise=noise, u=u)
    if x_0.shape != noise.shape or u.shape != x_0.shape[:1]:
        raise ValueError(
            f"x_0 and noise must have one shape (B, …) and u (B,), got {tuple(x_0.shape)}, {tuple(noise.shape)} and "
            f"{tuple(u.shape)}"
        )
    if not ((u >= 0) & (u <= 1)).all():
        raise ValueError(f"u must lie in [0, 1], got {u.min().item()} … {u.max().item()}")
    u = u.view(-1, *[1] * (x_0.ndim - 1))
    return (1 - u) * x_0 + u * noise


def straight_beta_schedule(num_timesteps: int) -> Tensor:
    """The β_t for which timestep t lies at u = t/(T + 1) on the straight path: √ᾱ_t : √(1 − ᾱ_t) = 1 − u : u. At u = 1
    there would be no signal left, and β = 1. (T,) float64, as the schedules of ``diffusion``."""
    check_counts(num_timesteps=num_timesteps)
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / (num_timesteps + 1)
    alpha_bar = (1 - u) ** 2 / ((1 - u) ** 2 + u**2)
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def velocity_of(model: Callable, diffusion: GaussianDiffusion) -> Callable[[Tensor, int], Tensor]:
    """Any noise model as a velocity field of the straight path: V(x_u, t) = ε − x̂_0 at u = u_t, equation (10.10). It
    takes points (B, …) of the path and a timestep, an int in 1 … T, and gives (B, …)."""
    check_diffusion(model, diffusion)
    _, scale = path_times(diffusion)

    def velocity(x_u: Tensor, t: int) -> Tensor:
        x_t = scale[t] * x_u
        noise = model(x_t, torch.full((len(x_t),), t, device=x_t.device))
        return noise - diffusion.predict_x0(x_t, t, noise)

    return velocity


def noise_model_of(velocity: Callable, diffusion: GaussianDiffusion) -> Callable[[Tensor, Tensor], Tensor]:
    """A velocity field V(x_u, u), with ``u`` (B,), as a noise model(x_t, t) for the samplers: ε = x_u + (1 − u) V, the
    last of (10.10), which is ``noise_from_velocity``."""
    times, scale = path_times(diffusion)

    def model(x_t: Tensor, t: int | Tensor) -> Tensor:
        t = torch.full((len(x_t),), t) if isinstance(t, int) else t
        return diffusion.noise_from_velocity(x_t, t, velocity(x_t / diffusion.at(scale, t, x_t), times[t]))

    model.diffusion = diffusion
    return model


def train_flow(
    velocity: nn.Module,
    pairs: Callable[[int, torch.Generator | None], tuple[Tensor, Tensor]],
    *,
    num_train_steps: int = 2500,
    generator: torch.Generator | None = None,
) -> Iterator[float]:
    """Flow matching: teach ``velocity(x_u, u)`` the mean of ε − x_0, equation (10.7); yields each step's loss.

    ``pairs(count, generator)`` gives x_0 and noise, (count, …) each: drawn independently, or coupled by a flow that was
    trained before (reflow). u is uniform in [0, 1]. Batches of 512 and Adam, with a cosine from 0.01 to 0, as
    ``toy.train_points``.
    """
    optimizer = torch.optim.Adam(velocity.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_train_steps)
    for _ in range(num_train_steps):
        x_0, noise = pairs(512, generator)
        u = torch.rand(len(x_0), generator=generator)
        loss = (velocity(straight_path(x_0, noise, u), u) - (noise - x_0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()
