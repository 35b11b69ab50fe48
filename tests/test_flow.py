"""Flow matching: the straight path, its velocity from any noise model and back, and Euler's method on it:
DDIM."""

import pytest
import torch
from torch.testing import assert_close

from ddpm_tutorial.diffusion import SCHEDULES, GaussianDiffusion, cosine_beta_schedule, path_times
from ddpm_tutorial.flow import (
    noise_model_of,
    straight_beta_schedule,
    straight_path,
    train_flow,
    velocity_of,
)
from ddpm_tutorial.guidance import classifier_free
from ddpm_tutorial.losses import timestep_probabilities
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import ddim_timesteps, path_timesteps, sample_ddim, sample_heun
from ddpm_tutorial.toy import GaussianMixture, PointDenoiser

MIXTURE = GaussianMixture(torch.tensor([[-1.0, 0.5], [1.2, -0.3]]), torch.tensor([0.3, 0.2]), torch.tensor([0.4, 0.6]))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture_velocity(x_u, u):
    """E[ε − x_0 | x_u] of the mixture, from Gaussian conditioning alone: no diffusion, no schedule."""
    u = u[:, None, None]
    offset = x_u[:, None] - (1 - u) * MIXTURE.means  # (B, K, D)
    data, noise = ((1 - u) * MIXTURE.stds[:, None] ** 2), u
    variance = (1 - u) ** 2 * MIXTURE.stds[:, None] ** 2 + u**2  # (B, K, 1)
    log_share = MIXTURE.weights.log() - (offset**2 / variance + variance.log()).sum(-1) / 2
    means = (noise - data) / variance * offset - MIXTURE.means  # E[ε − x_0 | x_u, component]
    return (log_share.softmax(1)[..., None] * means).sum(1)


@pytest.mark.parametrize("shape", [(5, 2), (5, 1, 4, 4)])
def test_the_path_goes_from_data_to_noise_at_an_even_pace(shape):
    x_0, noise = torch.randn(2, *shape, generator=seeded())
    assert torch.equal(straight_path(x_0, noise, torch.zeros(5)), x_0)
    assert torch.equal(straight_path(x_0, noise, torch.ones(5)), noise)
    middle = straight_path(x_0, noise, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    assert_close(middle[1], 0.7 * x_0[1] + 0.3 * noise[1])


@pytest.mark.parametrize(
    "x_0, noise, u",
    [(torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(3)),
     (torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2, 2), torch.zeros(2)),
     (torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([0.5, 1.1])),
     (torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([-0.1, 1.0]))],
)  # fmt: skip
def test_what_does_not_fit_is_refused(x_0, noise, u):
    with pytest.raises(ValueError, match="must"):
        straight_path(x_0, noise, u)


def test_the_straight_schedules_timesteps_lie_evenly_on_the_path():
    diffusion = GaussianDiffusion(straight_beta_schedule(99))
    times, scale = path_times(diffusion)
    assert_close(times, torch.arange(100) / 100, rtol=0, atol=1e-6)
    x_0, noise = torch.randn(2, 4, 3, generator=seeded())
    t = torch.tensor([1, 30, 50, 99])
    assert_close(diffusion.q_sample(x_0, t, noise), scale[t, None] * straight_path(x_0, noise, times[t]))


@pytest.mark.parametrize("betas", [straight_beta_schedule(200), cosine_beta_schedule(200)])
def test_a_noise_model_is_a_velocity_field_and_back(betas):
    """Against the velocity by Gaussian conditioning, which knows neither noise predictor nor schedule."""
    diffusion = GaussianDiffusion(betas)
    exact, x, times = MIXTURE.noise_model(diffusion), torch.randn(50, 2, generator=seeded()), path_times(diffusion)[0]
    velocity, model = velocity_of(exact, diffusion), noise_model_of(mixture_velocity, diffusion)
    for t in (1, 20, 100, 180):
        assert_close(velocity(x, t), mixture_velocity(x, times[t].expand(50)), rtol=1e-3, atol=1e-3)
        assert_close(model(x, t), exact(x, t), rtol=1e-4, atol=1e-4)
        assert torch.equal(model(x, t), model(x, torch.full((50,), t)))
    with pytest.raises(ValueError, match="another diffusion"):
        next(sample_ddim(model, GaussianDiffusion.from_schedule("linear", 200), (1, 2)))


def assert_euler_is_ddim(model, diffusion, x_T, timesteps, within, **walk):
    """x_u moved by (u' − u) V from one of the timesteps to the next, without a word of chapter 6."""
    times, scale = path_times(diffusion)
    velocity, x_u = velocity_of(model, diffusion), x_T / scale[-1]
    with torch.no_grad():
        for t, t_next in zip(timesteps, [*timesteps[1:], 0], strict=True):
            x_u = x_u + (times[t_next] - times[t]) * velocity(x_u, t)
    *_, last = sample_ddim(model, diffusion, x_T.shape, clip_denoised=False, x_T=x_T, **walk)
    assert_close(x_u, last.x_t, rtol=0, atol=within)


@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_eulers_method_on_the_path_is_ddim(num_steps):
    """With the shipped network, never trained for it."""
    model = NoisePredictor.from_pretrained()
    diffusion, model = model.diffusion, classifier_free(model, torch.arange(4), 1.0)
    x_T = torch.randn(4, 1, 28, 28, generator=seeded())
    steps = ddim_timesteps(diffusion.num_timesteps, num_steps)
    assert_euler_is_ddim(model, diffusion, x_T, steps, 2e-4, num_inference_steps=num_steps)


@pytest.mark.parametrize("betas", [straight_beta_schedule(200), *(of(200) for of in SCHEDULES.values())])
@pytest.mark.parametrize("spacing", ["t", "u"])
def test_it_is_ddim_with_any_schedule_and_walk(betas, spacing):
    diffusion, x_T = GaussianDiffusion(betas), torch.randn(50, 2, generator=seeded())
    steps = ddim_timesteps(200, 9) if spacing == "t" else path_timesteps(diffusion, 9)
    walk = {"num_inference_steps": 9, "spacing": spacing}
    assert_euler_is_ddim(MIXTURE.noise_model(diffusion), diffusion, x_T, steps, 1e-4, **walk)


def test_training_for_velocity_draws_the_paths_time_evenly():
    diffusion = GaussianDiffusion.from_schedule()
    shares, (times, _) = timestep_probabilities(diffusion, "velocity"), path_times(diffusion)
    assert_close(shares.cumsum(0), (times / times[-1]).double(), rtol=0, atol=1e-5)


def test_a_flow_learns_the_mixture():
    """The field that it learns is the conditional mean, and its samples have the mixture's two moments."""
    torch.manual_seed(0)
    field = PointDenoiser(1)  # its t is u where T is 1
    losses = list(train_flow(field, lambda n, g: (MIXTURE.sample(n, g), torch.randn(n, 2, generator=g)),
                             num_train_steps=600, generator=seeded()))  # fmt: skip
    x, u = torch.randn(500, 2, generator=seeded(1)) * 0.8, torch.full((500,), 0.5)
    error = (field(x, u) - mixture_velocity(x, u)).square().mean() / mixture_velocity(x, u).square().mean()
    assert error < 0.02 and sum(losses[-50:]) < 0.9 * sum(losses[:50])
    diffusion = GaussianDiffusion(straight_beta_schedule(100))
    *_, last = sample_heun(noise_model_of(field, diffusion), diffusion, (4000, 2), num_inference_steps=20,
                           clip_denoised=False, generator=seeded(2))  # fmt: skip
    assert_close(last.x_t.mean(0), MIXTURE.weights @ MIXTURE.means, rtol=0, atol=0.08)
    assert_close(last.x_t.std(0), MIXTURE.sample(100_000, seeded(3)).std(0), rtol=0.06, atol=0)
