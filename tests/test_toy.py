"""The oracle itself: the mixture's closed forms against quadrature, Monte Carlo and autograd; the points; the MLP."""

import math

import pytest
import torch
from torch.testing import assert_close

from ddpm_tutorial.diffusion import GaussianDiffusion, randn_like
from ddpm_tutorial.toy import GaussianMixture, PointDenoiser, moons, rings, spiral, train_points

TIMES = [1, 10, 300, 1000]


@pytest.fixture(scope="module")
def diffusion():
    return GaussianDiffusion.from_schedule("linear", 1000)


@pytest.fixture
def line():
    """Three clusters on a line, float64."""
    means, stds, weights = [[-1.2], [0.3], [1.5]], [0.1, 0.3, 0.2], [0.2, 0.5, 0.3]
    return GaussianMixture(*(torch.tensor(values, dtype=torch.float64) for values in (means, stds, weights)))


@pytest.fixture
def plane():
    """Three clusters in the plane, float64."""
    means = torch.tensor([[-1.0, 0.5], [1.0, 1.0], [0.0, -1.5]], dtype=torch.float64)
    stds, weights = torch.tensor([[0.2, 0.4, 0.3], [0.5, 0.2, 0.3]], dtype=torch.float64)
    return GaussianMixture(means, stds, weights)


# ------------------------------------------------------------------------------------------- the mixture
def density(offset, std):
    return torch.exp(-0.5 * (offset / std) ** 2) / (std * math.sqrt(2 * math.pi))


def posterior_grid(mixture, diffusion, x_t, t):
    """x_0 on a grid of spacing 0.001 and q(x_0) q(x_t | x_0) there, (B, N): nothing shared with the closed forms."""
    x_0 = torch.arange(-4, 4, 0.001, dtype=torch.float64)
    parts = zip(mixture.weights, mixture.means[:, 0], mixture.stds, strict=True)
    prior = sum(weight * density(x_0 - mean, std) for weight, mean, std in parts)
    signal = diffusion.sqrt_alphas_cumprod[t].double()
    sigma = diffusion.sqrt_one_minus_alphas_cumprod[t].double()
    return x_0, prior * density(x_t - signal * x_0, sigma)


def test_log_prob_of_the_data_is_that_of_torch_distributions(diffusion, plane, generator):
    x_0 = 2 * torch.randn(50, 2, generator=generator, dtype=torch.float64)
    components = torch.distributions.Independent(torch.distributions.Normal(plane.means, plane.stds[:, None]), 1)
    theirs = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(plane.weights), components)
    assert_close(plane.log_prob(diffusion, x_0, 0), theirs.log_prob(x_0))


@pytest.mark.parametrize("t", TIMES)
def test_log_prob_at_t_is_the_integral_over_x0(diffusion, line, t):
    x_t = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)[:, None]
    _, joint = posterior_grid(line, diffusion, x_t, t)
    integral = (joint.sum(dim=1) * 0.001).log()  # spacing far below every width: exact to about 1e-10
    # ᾱ_t is rounded to float32 on its own beside √ᾱ_t; offsets of up to 3 over widths of down to 0.1
    assert_close(line.log_prob(diffusion, x_t, t), integral, rtol=0, atol=1e-4)


def test_log_prob_at_t_is_the_mean_over_draws_in_the_plane(diffusion, plane, generator):
    """q(x_t) = E q(x_t | x_0), by Monte Carlo within five standard errors."""
    t, x_0 = 200, plane.sample(200_000, generator)
    signal, sigma = diffusion.sqrt_alphas_cumprod[t].double(), diffusion.sqrt_one_minus_alphas_cumprod[t].double()
    for x_t in 1.5 * torch.randn(8, 1, 2, generator=generator, dtype=torch.float64):
        values = density(x_t - signal * x_0, sigma).prod(dim=1)
        error = values.std() / len(values) ** 0.5
        assert abs(plane.log_prob(diffusion, x_t, t).exp() - values.mean()) < 5 * error


@pytest.mark.parametrize("mixture", ["line", "plane"])
def test_score_is_the_gradient_of_log_prob(diffusion, mixture, request, generator):
    mixture = request.getfixturevalue(mixture)
    x_t = 2 * torch.randn(100, mixture.means.shape[1], generator=generator, dtype=torch.float64)
    t = torch.randint(0, 1001, (100,), generator=generator)
    x_t.requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_prob(diffusion, x_t, t).sum(), x_t)
    assert_close(mixture.score(diffusion, x_t, t), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", TIMES)
def test_noise_model_is_the_posterior_mean_of_the_noise(diffusion, line, t):
    x_t = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)[:, None]
    x_0, joint = posterior_grid(line, diffusion, x_t, t)
    signal, sigma = diffusion.sqrt_alphas_cumprod[t].double(), diffusion.sqrt_one_minus_alphas_cumprod[t].double()
    noise = (x_t - signal * x_0) / sigma
    expected = (joint * noise).sum(dim=1, keepdim=True) / joint.sum(dim=1, keepdim=True)
    model = line.noise_model(diffusion)
    assert_close(model(x_t, t), expected, rtol=1e-4, atol=1e-4)  # float32 tables, as above
    assert_close(model(x_t, torch.full((21,), t)), model(x_t, t))


def test_of_points_it_is_the_softmax_average(diffusion, generator):
    """Standard deviation 0: the data are the points, and x̂_0 is their average weighted by likelihood."""
    points = torch.randn(20, 2, generator=generator)
    mixture, t = GaussianMixture(points, torch.zeros(20)), 400
    x_t = torch.randn(7, 2, generator=generator)
    signal, sigma = diffusion.sqrt_alphas_cumprod[t], diffusion.sqrt_one_minus_alphas_cumprod[t]
    weights = (-(torch.cdist(x_t, signal * points) ** 2) / (2 * sigma**2)).softmax(dim=1)
    pred_x0 = diffusion.predict_x0(x_t, t, mixture.noise_model(diffusion)(x_t, t))
    assert_close(pred_x0, weights @ points, rtol=1e-4, atol=1e-4)


def test_samples_have_the_mixtures_mean_and_variance(plane, generator):
    x_0 = plane.sample(100_000, generator)
    mean = (plane.weights[:, None] * plane.means).sum(0)
    second = (plane.weights[:, None] * (plane.means**2 + plane.stds[:, None] ** 2)).sum(0)
    error = x_0.std(dim=0) / len(x_0) ** 0.5
    assert ((x_0.mean(dim=0) - mean).abs() < 5 * error).all()
    squared_error = (x_0**2).std(dim=0) / len(x_0) ** 0.5
    assert (((x_0**2).mean(dim=0) - second).abs() < 5 * squared_error).all()


def test_mixtures_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"means must be \(K, D\)"):
        GaussianMixture(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="sum to 1"):
        GaussianMixture(torch.zeros(2, 1), torch.ones(2), torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match="at least 0"):
        GaussianMixture(torch.zeros(2, 1), torch.tensor([1.0, -1.0]))


# ------------------------------------------------------------------------------------ data sets in the plane
@pytest.mark.parametrize("points", [spiral, moons, rings])
def test_points_fill_the_scale_of_unit_noise(points, generator):
    """E|x_0|² is about 2, as for N(0, I), so that the schedules suit them; moons and rings are centred."""
    x_0 = points(50_000, generator)
    assert x_0.shape == (50_000, 2)
    assert abs(x_0.square().sum(dim=1).mean() - 2) < 0.1
    if points is not spiral:
        assert x_0.mean(dim=0).norm() < 0.03  # six standard errors


def test_points_without_noise_lie_on_their_curves(generator):
    radius = rings(1000, generator, noise=0.0).norm(dim=1)
    assert_close(torch.minimum((radius - 0.8).abs(), (radius - 1.8).abs()), torch.zeros(1000), rtol=0, atol=1e-5)
    assert 400 < (radius < 1).sum() < 600
    points = moons(1000, generator, noise=0.0) / 2**0.5
    to_upper, to_lower = ((points + s * torch.tensor([0.5, 0.25])).norm(dim=1) for s in (1, -1))
    on_upper, on_lower = (to_upper - 1).abs() < 1e-5, (to_lower - 1).abs() < 1e-5
    assert (on_upper | on_lower).all() and 400 < on_upper.sum() < 600
    assert (points[on_upper, 1] > -0.2501).all() and (points[on_lower, 1] < 0.2501).all()
    x, y = spiral(1000, generator, noise=0.0).T
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)  # radius = angle / 4.7, whole turns aside
    turns = (4.7 * radius - angle) / (2 * math.pi)
    assert_close(turns, turns.round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("points", [spiral, moons, rings])
def test_the_noise_of_points_has_the_given_size_and_the_seed_decides(points):
    def draw(noise):
        return points(20_000, torch.Generator().manual_seed(3), noise)

    assert_close(draw(0.1), draw(0.1))
    added = draw(0.1) - draw(0.0)
    assert_close(added.std(dim=0), torch.full((2,), 0.1), rtol=0.03, atol=0)


# --------------------------------------------------------------------------------------- the small denoiser
def test_the_denoiser_sees_t_and_checks_its_shape(generator):
    model = PointDenoiser(100)
    x_t = torch.randn(5, 2, generator=generator)
    out = model(x_t, torch.arange(1, 6))
    assert out.shape == (5, 2)
    assert not torch.allclose(out, model(x_t, torch.full((5,), 90)))
    with pytest.raises(ValueError, match=r"t must be \(5,\)"):
        model(x_t, torch.tensor(3))


def test_training_approaches_the_exact_predictor_and_its_floor():
    """One cluster: E[ε | x_t] is linear in x_t, so a short run gets near it."""
    diffusion = GaussianDiffusion.from_schedule("cosine", 50)
    data = GaussianMixture(torch.tensor([[1.0, -0.5]]), torch.tensor([0.5]))
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = PointDenoiser(50)
    losses = list(train_points(model, diffusion, data.sample, num_train_steps=300, batch_size=256, generator=generator))
    assert len(losses) == 300
    x_0 = data.sample(4000, generator)
    t, noise = torch.randint(1, 51, (4000,), generator=generator), randn_like(x_0, generator)
    x_t = diffusion.q_sample(x_0, t, noise)
    exact = data.noise_model(diffusion)(x_t, t)
    with torch.no_grad():
        gap = (model(x_t, t) - exact).square().mean()
    floor = (exact - noise).square().mean()
    assert gap < 0.01 < floor
    assert abs(sum(losses[-50:]) / 50 - floor) < 0.05


def test_training_weights_decide_which_timesteps_count():
    """With weight 0 for half of the timesteps the network learns the other half only."""
    diffusion = GaussianDiffusion.from_schedule("cosine", 50)
    weights = torch.zeros(51)
    weights[26:] = 1
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = PointDenoiser(50)
    data = GaussianMixture(torch.tensor([[1.0, -0.5]]), torch.tensor([0.1]))
    for _ in train_points(
        model, diffusion, data.sample, num_train_steps=300, batch_size=256, weights=weights, generator=generator
    ):
        pass
    gaps = []
    for t in (3, 40):
        x_0 = data.sample(1000, generator)
        x_t = diffusion.q_sample(x_0, t, randn_like(x_0, generator))
        with torch.no_grad():
            pred_noise = model(x_t, torch.full((1000,), t))
        gaps.append((pred_noise - data.noise_model(diffusion)(x_t, t)).square().mean())
    assert gaps[1] < 0.02 < gaps[0]
