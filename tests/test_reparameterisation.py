"""Chapter 3's conversions between the mean, x_0, noise, v and score: each pair is inverse, and each is right.

Tolerances. Inputs are float64, but the tables are stored in float32, each entry rounded by up to 6e-8 of itself. Where
both directions read the same entries the rounding cancels and only float64's 1e-16 is left, magnified by a division
(up to 160 for x_0, 6e5 for nothing here): 1e-10 is ample. Where two directions read different entries (v needs
cos² + sin² = 1; eq. 7 against eq. 11) the 6e-8 shows, magnified by at most √(1 − ᾱ_t)/β_t, about 150 for linear betas.
"""

import pytest
import torch
from torch.testing import assert_close

from ddpm_tutorial.diffusion import GaussianDiffusion

SAME_TABLES = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(params=["linear", "quadratic", "sigmoid"])
def diffusion(request):
    return GaussianDiffusion.from_schedule(request.param, 1000)


@pytest.fixture
def drawn(diffusion, generator):
    """t with both ends among the random ones, x_0, noise and x_t, (B, 3, 4, 4) float64."""
    t = torch.cat([torch.tensor([1, 2, 999, 1000]), torch.randint(1, 1001, (60,), generator=generator)])
    x_0, noise = torch.randn(2, 64, 3, 4, 4, generator=generator, dtype=torch.float64)
    return t, x_0, noise, diffusion.q_sample(x_0, t, noise)


def test_x0_and_noise_are_inverse(diffusion, drawn):
    t, x_0, noise, x_t = drawn
    assert_close(diffusion.predict_noise(x_t, t, x_0), noise, **SAME_TABLES)
    assert_close(diffusion.predict_x0(x_t, t, noise), x_0, **SAME_TABLES)
    assert_close(diffusion.predict_x0(x_t, t, diffusion.predict_noise(x_t, t, x_0)), x_0, **SAME_TABLES)


def test_mean_and_noise_are_inverse(diffusion, drawn):
    t, _, noise, x_t = drawn
    assert_close(diffusion.noise_from_mean(x_t, t, diffusion.mean_from_noise(x_t, t, noise)), noise, **SAME_TABLES)
    assert_close(diffusion.mean_from_noise(x_t, t, diffusion.noise_from_mean(x_t, t, noise)), noise, **SAME_TABLES)


def test_score_and_noise_are_inverse(diffusion, drawn):
    t, _, noise, _ = drawn
    assert_close(diffusion.noise_from_score(diffusion.score_from_noise(noise, t), t), noise, **SAME_TABLES)
    assert_close(diffusion.score_from_noise(diffusion.noise_from_score(noise, t), t), noise, **SAME_TABLES)


def test_v_gives_back_x0_and_noise(diffusion, drawn):
    t, x_0, noise, x_t = drawn
    v = diffusion.predict_v(x_0, t, noise)
    # ᾱ_t + (1 − ᾱ_t), each factor rounded: 1 within about 2e-7, times values of up to about 5
    assert_close(diffusion.x0_from_v(x_t, t, v), x_0, rtol=0, atol=2e-6)
    assert_close(diffusion.noise_from_v(x_t, t, v), noise, rtol=0, atol=2e-6)
    x_0_back, noise_back = diffusion.x0_from_v(x_t, t, v), diffusion.noise_from_v(x_t, t, v)
    assert_close(diffusion.predict_v(x_0_back, t, noise_back), v, rtol=0, atol=4e-6)


def test_v_is_the_derivative_of_x_t_by_the_angle(diffusion, generator):
    """x_t = cos φ x_0 + sin φ ε, v = d x_t / dφ, by automatic differentiation."""
    x_0, noise = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    for t in (1, 300, 1000):
        phi = diffusion.sqrt_alphas_cumprod[t].double().acos()
        if t == 1:  # acos is ill-conditioned near 1: take the angle from its sine
            phi = diffusion.sqrt_one_minus_alphas_cumprod[t].double().asin()
        jacobian = torch.autograd.functional.jacobian(lambda a: a.cos() * x_0 + a.sin() * noise, phi)
        v = diffusion.predict_v(x_0[None], t, noise[None])[0]
        assert_close(v, jacobian, rtol=0, atol=2e-6)


def test_mean_from_noise_is_the_posterior_mean(diffusion, drawn):
    """DDPM's eq. 11 with the true noise against its eq. 7 with the true x_0."""
    t, x_0, noise, x_t = drawn
    mean, _ = diffusion.q_posterior(x_0, x_t, t)
    assert_close(diffusion.mean_from_noise(x_t, t, noise), mean, rtol=0, atol=2e-6)
    assert_close(diffusion.noise_from_mean(x_t, t, mean), noise, rtol=0, atol=5e-3)  # 2e-6 · √(1 − ᾱ_t)/β_t


def test_score_is_the_gradient_of_the_gaussian_log_density(diffusion, drawn):
    t, x_0, noise, x_t = drawn
    x_t = x_t.clone().requires_grad_()
    signal = diffusion.at(diffusion.sqrt_alphas_cumprod, t, x_t).double()
    sigma = diffusion.at(diffusion.sqrt_one_minus_alphas_cumprod, t, x_t).double()
    log_q = torch.distributions.Normal(signal * x_0, sigma).log_prob(x_t).sum()
    (gradient,) = torch.autograd.grad(log_q, x_t)
    assert_close(diffusion.score_from_noise(noise, t), gradient, **SAME_TABLES)


def test_an_int_t_equals_a_batch_of_it(diffusion, drawn):
    _, x_0, noise, x_t = drawn
    batch = torch.full((64,), 123)
    for call in (diffusion.mean_from_noise, diffusion.noise_from_mean, diffusion.x0_from_v, diffusion.noise_from_v):
        assert_close(call(x_t, 123, noise), call(x_t, batch, noise))
    assert_close(diffusion.predict_v(x_0, 123, noise), diffusion.predict_v(x_0, batch, noise))
    assert_close(diffusion.score_from_noise(noise, 123), diffusion.score_from_noise(noise, batch))
    assert_close(diffusion.noise_from_score(noise, 123), diffusion.noise_from_score(noise, batch))


def test_wrong_shapes_and_timesteps_are_refused(diffusion, drawn):
    t, x_0, noise, x_t = drawn
    for name in ("mean_from_noise", "noise_from_mean", "predict_v", "x0_from_v", "noise_from_v"):
        method = getattr(diffusion, name)
        with pytest.raises(ValueError, match="one shape"):
            method(x_t, t, noise[:, :1])
        with pytest.raises(ValueError, match="t must lie in 1 … 1000"):
            method(x_t, 0, noise)
    for method in (diffusion.score_from_noise, diffusion.noise_from_score):
        with pytest.raises(ValueError, match="t must lie in 1 … 1000"):
            method(noise, 1001)
