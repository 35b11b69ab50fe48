"""Steps of the chapters' derivations that no code of the package computes: both sides, on numbers."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.flow import straight_path
from ddpm_tutorial.toy import GaussianMixture

CHAIN = GaussianDiffusion.from_schedule("linear", 100)
BETAS = torch.cat([torch.zeros(1, dtype=torch.float64), CHAIN.exact_betas])
ALPHAS, ABAR = 1 - BETAS, (1 - BETAS).cumprod(0)
SIGMA_BAR = ((1 - ABAR) / ABAR).sqrt()
GRID = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
MIXTURE = GaussianMixture(
    torch.tensor([[-1.0], [0.8]]).double(), torch.tensor([0.3, 0.5]).double(), torch.tensor([0.3, 0.7]).double()
)


def integral(values):
    return torch.trapezoid(values, GRID)


def mixture_density(y, sigma):
    """Of x_0 + σ̄ ε, x_0 from the mixture; y (N,)."""
    std = (MIXTURE.stds**2 + sigma**2).sqrt()
    return (MIXTURE.weights * Normal(MIXTURE.means[:, 0], std).log_prob(y[:, None]).exp()).sum(1)


def mixture_noise(y, sigma):
    """E[ε | y], by quadrature over x_0; y (N,)."""
    posterior = mixture_density(GRID, 0) * Normal(GRID, sigma).log_prob(y[:, None]).exp()
    posterior = posterior / integral(posterior)[:, None]
    return integral(posterior * (y[:, None] - GRID) / sigma)


@pytest.mark.parametrize("t", [2, 40, 100])
def test_completing_the_square(t):
    """(2.15) to (2.18): up to a constant, the two squares are those of one Gaussian, and A and B give it."""
    x, x_0, x_t = torch.linspace(-2, 2, 9).double(), 0.7, -0.4
    a, b, before = ALPHAS[t], BETAS[t], ABAR[t - 1]
    squares = (x_t - a.sqrt() * x) ** 2 / b + (x - before.sqrt() * x_0) ** 2 / (1 - before)  # (2.15)
    A = a / b + 1 / (1 - before)  # (2.16)
    B = a.sqrt() / b * x_t + before.sqrt() / (1 - before) * x_0
    for other in (A * x**2 - 2 * B * x, A * (x - B / A) ** 2):
        assert_close(squares - squares[0], other - other[0])
    joint = Normal(before.sqrt() * x_0, (1 - before).sqrt()).log_prob(x) + Normal(a.sqrt() * x, b.sqrt()).log_prob(
        torch.tensor(x_t).double()
    )
    assert_close(-2 * (joint - joint[0]), squares - squares[0])
    assert_close(1 / A, (1 - before) / (1 - ABAR[t]) * b)  # (2.17)


def test_second_moment_about_another_mean():
    """(2.19)."""
    p, other = Normal(torch.tensor(0.4).double(), 0.6), -0.7
    assert_close(integral(p.log_prob(GRID).exp() * (GRID - other) ** 2), p.variance + (p.mean - other) ** 2)


def test_an_error_of_the_noise_in_the_other_names():
    """(3.8)."""
    d = 1e-3
    for t in (2, 50, 100):
        x_t, noise = torch.tensor([[0.3]]).double(), torch.tensor([[-0.8]]).double()
        wrong, signal, sigma = noise + d, ABAR[t].sqrt(), (1 - ABAR[t]).sqrt()

        def x_0(noise, t=t, x_t=x_t):
            return CHAIN.predict_x0(x_t, t, noise)

        in_mean = CHAIN.mean_from_noise(x_t, t, wrong) - CHAIN.mean_from_noise(x_t, t, noise)
        in_v = CHAIN.predict_v(x_0(wrong), t, wrong) - CHAIN.predict_v(x_0(noise), t, noise)
        expected = -sigma / signal * d, -BETAS[t] / (ALPHAS[t].sqrt() * sigma) * d, d / signal
        for found, value in zip((x_0(wrong) - x_0(noise), in_mean, in_v), expected, strict=True):
            assert_close(found.squeeze(), value, rtol=1e-4, atol=0)


@pytest.mark.parametrize("t", [5, 50, 100])
def test_the_mean_clean_image_belongs_to_the_mean_noise(t):
    """(3.11), and (3.9) with it: both means by quadrature."""
    x_t = torch.tensor([-1.2, 0.1, 0.9]).double()
    posterior = (
        mixture_density(GRID, 0) * Normal(ABAR[t].sqrt() * GRID, (1 - ABAR[t]).sqrt()).log_prob(x_t[:, None]).exp()
    )
    posterior = posterior / integral(posterior)[:, None]
    noise = MIXTURE.noise_model(CHAIN)(x_t[:, None], t)
    assert_close(CHAIN.predict_x0(x_t[:, None], t, noise)[:, 0], integral(posterior * GRID), rtol=1e-3, atol=1e-4)


def test_a_later_noisy_image_says_nothing_more():
    """(4.7): p(x_0 | x_t, x_{t+1}) on a grid, from the joint law."""
    t, x_t, later = 40, torch.tensor(0.3).double(), torch.tensor(-0.6).double()
    of_x0 = mixture_density(GRID, 0) * Normal(ABAR[t].sqrt() * GRID, (1 - ABAR[t]).sqrt()).log_prob(x_t).exp()
    covariance = torch.tensor([[1 - ABAR[t], 0], [0, 1 - ABAR[t + 1]]])
    covariance[0, 1] = covariance[1, 0] = ALPHAS[t + 1].sqrt() * (1 - ABAR[t])  # of x_t and x_{t+1}, given x_0
    means = torch.stack([ABAR[t].sqrt() * GRID, ABAR[t + 1].sqrt() * GRID], dim=1)
    joint = MultivariateNormal(means, covariance).log_prob(torch.stack([x_t, later])).exp()
    both = mixture_density(GRID, 0) * joint
    assert_close(both / integral(both), of_x0 / integral(of_x0), atol=1e-8, rtol=1e-6)


def test_the_steepest_step_of_unit_size():
    """(5.3) and (5.4): no matrix with singular values up to 1 goes down further than −Σ o_i h_iᵀ."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    o, g, h = torch.linalg.svd(gradient, full_matrices=False)
    assert_close(sum(g[i] * torch.outer(o[:, i], h[i]) for i in range(6)), gradient)
    best = -sum(torch.outer(o[:, i], h[i]) for i in range(6))
    assert_close((gradient * best).sum(), -g.sum())
    for _ in range(50):
        step = torch.randn(6, 9, generator=generator, dtype=torch.float64)
        step = step / torch.linalg.matrix_norm(step, 2)
        assert_close((gradient * step).sum(), sum(g[i] * o[:, i] @ step @ h[i] for i in range(6)))
        assert (gradient * step).sum() > -g.sum()


@pytest.mark.parametrize("eta", [0.2, 1.0])
def test_the_divergence_of_a_step_of_the_family(eta):
    """(6.9) and (6.10), beside the divergence of the two Gaussians of (6.4)."""
    t, x_0, guess, x_t = 30, torch.tensor(0.7).double(), torch.tensor(0.2).double(), torch.tensor(-0.4).double()
    sigma = eta * ((1 - ABAR[t - 1]) / (1 - ABAR[t]) * BETAS[t]).sqrt()
    keep = (1 - ABAR[t - 1] - sigma**2).sqrt()

    def noise(x_0):
        return (x_t - ABAR[t].sqrt() * x_0) / (1 - ABAR[t]).sqrt()

    true, model = (Normal(ABAR[t - 1].sqrt() * x + keep * noise(x), sigma) for x in (x_0, guess))
    c = ABAR[t - 1].sqrt() - keep * ABAR[t].sqrt() / (1 - ABAR[t]).sqrt()
    assert_close(kl_divergence(true, model), c**2 * (x_0 - guess) ** 2 / (2 * sigma**2))
    weight = c**2 * (1 - ABAR[t]) / (2 * sigma**2 * ABAR[t])
    assert_close(kl_divergence(true, model), weight * (noise(x_0) - noise(guess)) ** 2)


def test_noise_spreads_a_density_as_the_equation_moves_it():
    """(6.15), all four sides, by finite differences."""
    y, sigma, d = torch.linspace(-2, 2, 9).double(), 0.7, 1e-3

    def slope(f):
        return (f(y + d) - f(y - d)) / (2 * d)

    by_level = (mixture_density(y, sigma + d) - mixture_density(y, sigma - d)) / (2 * d)
    second = (mixture_density(y + d, sigma) - 2 * mixture_density(y, sigma) + mixture_density(y - d, sigma)) / d**2

    def pull(y):
        log_slope = (mixture_density(y + d, sigma).log() - mixture_density(y - d, sigma).log()) / (2 * d)
        return sigma * mixture_density(y, sigma) * log_slope

    sides = sigma * second, slope(pull), -slope(lambda y: mixture_density(y, sigma) * mixture_noise(y, sigma))
    for side in sides:
        assert_close(side, by_level, atol=1e-4, rtol=1e-4)


def test_integrals_along_an_exact_path():
    """(6.14), (6.17), (6.19) and (6.20), on the path of Gaussian data that (6.24) gives."""
    mean, d = 0.8, 0.3
    sigma = torch.linspace(0.5, 2.5, 20_001).double()
    y = mean + (d**2 + sigma**2).sqrt() * 1.7  # (6.24): the distance in standard deviations stays
    noise = sigma * (y - mean) / (d**2 + sigma**2)
    guess = y - sigma * noise
    assert_close(torch.gradient(y, spacing=(sigma,))[0][1:-1], noise[1:-1], atol=1e-6, rtol=1e-6)  # (6.14)
    assert_close(y[0], y[-1] + torch.trapezoid(noise.flip(0), sigma.flip(0)))  # (6.17), from the last to the first
    lam = -sigma.log()
    changes = torch.gradient(lam.exp() * y, spacing=(lam,))[0]
    assert_close(changes[1:-1], (lam.exp() * guess)[1:-1], atol=1e-6, rtol=1e-6)  # (6.19)
    step = torch.trapezoid((lam.exp() * guess).flip(0), lam.flip(0))
    assert_close(lam[0].exp() * y[0], lam[-1].exp() * y[-1] + step)  # (6.20)


def test_a_step_towards_a_fixed_guess_is_ddim():
    """(6.21), its three forms and DDIM's step."""
    x_t, x_0, t, s = torch.tensor(0.4).double(), torch.tensor(-0.2).double(), 80, 50
    noise = (x_t - ABAR[t].sqrt() * x_0) / (1 - ABAR[t]).sqrt()
    y, ratio = x_t / ABAR[t].sqrt(), SIGMA_BAR[s] / SIGMA_BAR[t]
    forms = ratio * y + (1 - ratio) * x_0, x_0 + SIGMA_BAR[s] * (y - x_0) / SIGMA_BAR[t], x_0 + SIGMA_BAR[s] * noise
    for form in forms:
        assert_close(ABAR[s].sqrt() * form, CHAIN.q_sample(x_0[None], s, noise[None])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0])
def test_two_guided_paths_and_the_tilted_law(scale):
    """(7.10) to (7.12): the slope of the solution is the equation's, its end is d^s, and the tilted law's spread."""
    d, sigma = 0.6, torch.linspace(0, 5, 50_001).double()
    u = (1 + sigma**2) ** ((1 - scale) / 2) * (d**2 + sigma**2) ** (scale / 2)
    right = sigma * ((1 - scale) / (1 + sigma**2) + scale / (d**2 + sigma**2)) * u
    assert_close(torch.gradient(u, spacing=(sigma,))[0][1:-1], right[1:-1], atol=1e-6, rtol=1e-4)
    assert u[0].item() == pytest.approx(d**scale)
    everything, mu = Normal(torch.tensor(0.0).double(), 1), 0.8
    tilted = (everything.log_prob(GRID) * (1 - scale) + Normal(mu, d).log_prob(GRID) * scale).exp()
    tilted = tilted / integral(tilted)
    mean = integral(tilted * GRID)
    assert_close(integral(tilted * (GRID - mean) ** 2).sqrt().item(), (1 - scale + scale / d**2) ** -0.5)


def test_guided_aim_at_the_start():
    """(7.13): where x_T says nothing, both guesses are means, and (7.9) of the noises is theirs."""
    x_T, m, m_y, s, a = 1.3, -0.4, 0.1, 4.0, ABAR[-1].item()
    free, asked = ((x_T - math.sqrt(a) * x) / math.sqrt(1 - a) for x in (m, m_y))
    aim = (x_T - math.sqrt(1 - a) * (free + s * (asked - free))) / math.sqrt(a)
    assert aim == pytest.approx(m + s * (m_y - m))


def test_the_pull_of_a_known_pixel():
    """(9.4) to (9.7): the conditional law of two pixels, both scores by differentiation, and their means' ratio."""
    rho, a = 0.9, 0.7
    pair = MultivariateNormal(torch.zeros(2).double(), torch.tensor([[1, rho], [rho, 1]]).double())
    at_a = pair.log_prob(torch.stack([torch.full_like(GRID, a), GRID], dim=1)).exp()
    at_a = at_a / integral(at_a)  # (9.1), for two pixels
    assert_close(integral(at_a * GRID).item(), rho * a)
    assert_close(integral(at_a * (GRID - rho * a) ** 2).item(), 1 - rho**2)
    for t in (10, 60):
        abar, k = ABAR[t], torch.tensor(0.2).double()
        u = torch.tensor(-0.5).double().requires_grad_()
        noisy = MultivariateNormal(torch.zeros(2).double(), abar * pair.covariance_matrix + (1 - abar) * torch.eye(2))
        (felt,) = torch.autograd.grad(noisy.log_prob(torch.stack([k, u])), u)
        assert_close(felt, -(u - abar * rho * k).detach() / (1 - abar**2 * rho**2))
        wanted = Normal(abar.sqrt() * rho * k, (abar * (1 - rho**2) + 1 - abar).sqrt())
        (right,) = torch.autograd.grad(wanted.log_prob(u), u)
        assert_close(right, -(u - abar.sqrt() * rho * k).detach() / (1 - abar * rho**2))
        pulls = abar * rho * abar.sqrt() * a / (1 - abar**2 * rho**2), abar.sqrt() * rho * a / (1 - abar * rho**2)
        assert_close(pulls[0] / pulls[1], abar * (1 - abar * rho**2) / (1 - abar**2 * rho**2))


@pytest.mark.parametrize("p", [0.5, 1.0, 5.0])
def test_the_mean_of_the_unknown_pixel(p):
    """(9.8) to (9.11): the equation solved in small steps of Heun, beside the integral and, at p = 1, beside c."""
    rho, a, n = 0.9, 1.0, 20_000

    def change(abar, m):
        return -p * (m - abar * rho * a) / (abar * (1 - abar**2 * rho**2))

    grid = torch.linspace(1e-6, 1, n).double().tolist()
    m = rho * a * p / (p + 1) * grid[0]  # near 0 the equation's own solution
    for now, then in zip(grid[:-1], grid[1:], strict=True):
        h, first = then - now, change(now, m)
        # near 0 the pull is stiff: an implicit mean of both ends
        slope = -p / (then * (1 - then**2 * rho**2))
        m = (m + h / 2 * (first - slope * then * rho * a)) / (1 - h / 2 * slope)
    x = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    missing = ((x**2 * (1 - rho**2) / (1 - rho**2 * x**2)) ** (p / 2)).mean().item()
    assert m == pytest.approx(rho * a * (1 - missing), abs=2e-3)
    if p == 1:
        c = math.sqrt(1 - rho**2)
        assert m == pytest.approx(rho * a / (1 + c), abs=2e-3)


@pytest.mark.parametrize("eta, p", [(0.0, 0.5), (1.0, 1.0)])
def test_the_pull_of_a_short_step(eta, p):
    """(9.8): what a step of DDIM, or an ancestral one, moves y by, over dᾱ/ᾱ^{3/2} times the score."""
    a, b = 0.4, 0.4 + 1e-6  # ᾱ before and after
    x_t, score = 0.3, -1.1
    noise = -math.sqrt(1 - a) * score
    x_0 = (x_t - math.sqrt(1 - a) * noise) / math.sqrt(a)
    sigma2 = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
    y = (math.sqrt(b) * x_0 + math.sqrt(1 - b - sigma2) * noise) / math.sqrt(b)
    assert (y - x_t / math.sqrt(a)) / ((b - a) / a**1.5 * score) == pytest.approx(p, rel=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_fresh_noise_is_a_step_of_langevin(eta):
    """(6.16a) is (6.11) over √ᾱ; and for a short step (6.16b), whose second part leaves the law as it is."""
    x_bar, e, z = 0.7, -0.4, 1.3  # e: the predicted noise
    for now, then in ((60, 40), (60, 59)):
        a, b, s_now, s_then = ABAR[now], ABAR[then], SIGMA_BAR[now], SIGMA_BAR[then]
        x_0 = x_bar - s_now * e
        sigma2 = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        step = (b.sqrt() * x_0 + (1 - b - sigma2).sqrt() * e + sigma2.sqrt() * z) / b.sqrt()  # (6.11)
        s2 = eta**2 * s_then**2 / s_now**2 * (s_now**2 - s_then**2)
        assert_close(step, x_bar + ((s_then**2 - s2).sqrt() - s_now) * e + s2.sqrt() * z)
    h, sigma = 1e-5, 2.0
    s2 = eta**2 * (sigma - h) ** 2 / sigma**2 * (sigma**2 - (sigma - h) ** 2)
    moved = math.sqrt((sigma - h) ** 2 - s2) - sigma
    assert moved == pytest.approx(-(1 + eta**2) * h, rel=1e-3)
    assert s2 == pytest.approx(2 * eta**2 * sigma * h, rel=1e-3)
    # the step on the spot, of q = N(0, v): its variance stays, but for δ²
    v, delta = 1.8, eta**2 * sigma * h
    assert (1 - delta / v) ** 2 * v + 2 * delta == pytest.approx(v, abs=2 * delta**2)


def test_up_and_down_is_a_step_of_langevin():
    """(9.13): a short step up and DDIM's back; and for Gaussian q the law stays, but for β²."""
    beta, x, e, slope = 1e-4, 0.6, -0.8, -1.7  # slope: the score's, q = N(0, 1/1.7) at this level
    b = 0.5  # ᾱ_s; ᾱ_t below it
    a = b * (1 - beta)
    up = math.sqrt(1 - beta) * x + math.sqrt(beta) * e
    noise = -math.sqrt(1 - a) * slope * up
    down = math.sqrt(b) * (up - math.sqrt(1 - a) * noise) / math.sqrt(a) + math.sqrt(1 - b) * noise
    langevin = x + beta / 2 * slope * x + math.sqrt(beta) * e
    # left out is what is smaller than β
    assert abs(down - langevin) < 0.02 * abs(langevin - x - math.sqrt(beta) * e) + beta**1.5
    variance = 1 / 1.7
    assert (1 + beta / 2 * slope) ** 2 * variance + beta == pytest.approx(variance, rel=beta**2 * 2)


@pytest.mark.parametrize("u", [0.2, 0.7])
def test_the_mean_velocity_moves_the_law(u):
    """(10.2), (10.4) and (10.8), by quadrature over x_0 and ε; V is the mean by Gaussian conditioning."""
    x_0, noise = (grid.flatten() for grid in torch.meshgrid(*[torch.linspace(-6, 6, 601).double()] * 2, indexing="ij"))
    weight = mixture_density(x_0, 0) * Normal(0.0, 1.0).log_prob(noise).exp()
    weight = weight / weight.sum()

    def path(u):
        return straight_path(x_0[:, None], noise[:, None], torch.full(x_0.shape, u, dtype=torch.float64))[:, 0]

    def mean_velocity(x):
        variance = (1 - u) ** 2 * MIXTURE.stds**2 + u**2
        offset = x[:, None] - (1 - u) * MIXTURE.means[:, 0]
        share = (MIXTURE.weights.log() - 0.5 * (offset**2 / variance + variance.log())).softmax(1)
        return (share * ((u - (1 - u) * MIXTURE.stds**2) / variance * offset - MIXTURE.means[:, 0])).sum(1)

    assert_close((path(u + 1e-4) - path(u - 1e-4)) / 2e-4, noise - x_0)  # (10.2)
    x_u, d = path(u), 1e-4
    by_time = (weight * (path(u + d).sin() - path(u - d).sin())).sum() / (2 * d)  # (10.4), with f = sin
    for velocity in (noise - x_0, mean_velocity(x_u)):
        assert_close((weight * x_u.cos() * velocity).sum(), by_time, rtol=1e-4, atol=1e-5)
    guess = mean_velocity(x_u) + 0.3 * (2 * x_u).sin()
    loss = (weight * (guess - (noise - x_0)) ** 2).sum()  # (10.8)
    parts = (guess - mean_velocity(x_u)) ** 2, (noise - x_0 - mean_velocity(x_u)) ** 2
    assert_close(loss, sum((weight * part).sum() for part in parts), rtol=1e-4, atol=0)


def test_an_error_of_the_guess_in_the_other_answers():
    """(10.12), at one point of the path."""
    e, t = 1e-3, 40
    signal, sigma = ABAR[t].sqrt(), (1 - ABAR[t]).sqrt()
    b, x_0 = signal + sigma, torch.tensor(0.4).double()
    u, x_u = sigma / b, torch.tensor(-0.3).double()

    def answers(x_0):
        noise = (x_u - (1 - u) * x_0) / u  # (10.1) turned round
        return x_0, noise, noise - x_0, signal * noise - sigma * x_0

    expected = e, -(1 - u) / u * e, -e / u, -e / (u * b)
    for wrong, right, error in zip(answers(x_0 + e), answers(x_0), expected, strict=True):
        assert_close(wrong - right, torch.as_tensor(error).double(), rtol=1e-6, atol=0)
