"""elbo.py: each term against torch.distributions, against a network that knows x_0, and against exact toy data."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ddpm_tutorial.data import load_fashion_mnist, to_model_range
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.elbo import (
    bits_per_dim,
    discretized_gaussian_log_likelihood,
    log_normal_cdf,
    mean_and_error,
    normal_kl,
    prior_term,
    reverse_variances,
    timestep_strata,
    vlb_term,
)
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.toy import GaussianMixture, gaussian_elbo

LEVELS = to_model_range(torch.arange(256, dtype=torch.uint8))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def grey_images(count, channels=1, size=6, seed=0):
    levels = torch.randint(0, 256, (count, channels, size, size), generator=seeded(seed))
    levels[:, :, : size // 2] = 0  # half of all pixels at the open end
    return to_model_range(levels.to(torch.uint8))


def knows(diffusion, x_0):
    """The noise model that knows x_0, so that every mean is right."""
    return lambda x_t, t: diffusion.predict_noise(x_t, t, x_0)


def zero_noise(x_t, t):
    return torch.zeros_like(x_t)


# ---------------------------------------------------------------------------------------------- the pieces
def test_normal_kl_equals_torch_distributions():
    m1, lv1, m2, lv2 = torch.randn(4, 200, generator=seeded(), dtype=torch.float64) * 3
    expected = kl_divergence(Normal(m1, (lv1 / 2).exp()), Normal(m2, (lv2 / 2).exp()))
    torch.testing.assert_close(normal_kl(m1, lv1, m2, lv2), expected)
    torch.testing.assert_close(normal_kl(m1, lv1, m1, lv1), torch.zeros(200, dtype=torch.float64))
    assert normal_kl(m1[:, None], lv1[:, None], m2, lv2).shape == (200, 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_scale", [-12.0, -6.0, -4.6, -2.0, 0.0, 4.0])
def test_the_256_levels_have_total_mass_1(dtype, log_scale):
    means = torch.tensor([-40.0, -1.0, -0.998, 0.001, 0.37, 1.0, 7.0], dtype=dtype)[:, None]
    log_prob = discretized_gaussian_log_likelihood(LEVELS.to(dtype), means, torch.tensor(log_scale, dtype=dtype))
    assert log_prob.isfinite().all()
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(7, dtype=dtype), rtol=1e-4, atol=1e-4)


def test_level_mass_is_the_difference_of_two_cdfs():
    x, half = LEVELS.double(), 1 / 255
    normal = Normal(torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))
    mass = normal.cdf(x + half) - normal.cdf(x - half)
    mass[0], mass[-1] = normal.cdf(x[0] + half), 1 - normal.cdf(x[-1] - half)
    found = discretized_gaussian_log_likelihood(x, normal.mean, normal.stddev.log())
    torch.testing.assert_close(found, mass.log(), rtol=1e-9, atol=1e-9)


def test_level_mass_in_the_far_tail():
    # Over a bin far out, the density falls like e^{-z·s}: ∫_a^b φ ≈ φ(a)/a · (1 − e^{−a(b−a)}) with relative error 1/a²
    sigma = torch.tensor(0.01)
    x, mean = torch.tensor(0.5) * 2 / 255 - 1 + 1 / 255, torch.tensor(0.3)
    found = discretized_gaussian_log_likelihood(x, mean, sigma.log()).double()
    a, b = (0.3 - x.double() - 1 / 255) / 0.01, (0.3 - x.double() + 1 / 255) / 0.01
    expected = -(a**2) / 2 - math.log((2 * math.pi) ** 0.5) - a.log() + torch.log1p(-torch.exp(-a * (b - a)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_level_mass_is_as_exact_in_the_right_tail_as_in_the_left():
    means, log_scale = torch.tensor([-0.9, 0.0, 0.31])[:, None], torch.tensor(0.01).log()
    found = discretized_gaussian_log_likelihood(LEVELS, means, log_scale)  # down to about -18,000
    mirrored = discretized_gaussian_log_likelihood(-LEVELS, -means, log_scale)
    torch.testing.assert_close(found, mirrored, rtol=1e-5, atol=1e-5)


def test_level_mass_has_finite_gradients_at_the_extremes():
    means = torch.tensor([-1e3, -1.0, 0.0, 1.0, 1e3], requires_grad=True)
    log_scales = torch.tensor([[-8.0], [0.0]], requires_grad=True)
    for x in (-1.0, 1 / 255, 1.0):
        log_prob = discretized_gaussian_log_likelihood(torch.tensor(x), means, log_scales)
        for gradient in torch.autograd.grad(log_prob.sum(), (means, log_scales)):
            assert gradient.isfinite().all()


def test_level_mass_is_finite_where_the_two_edges_round_to_one_number():
    means = torch.tensor([-1e6, 1e6, -1e15, 1e15], requires_grad=True)  # in σ: log CDFs of both edges equal
    log_prob = discretized_gaussian_log_likelihood(torch.tensor(1 / 255), means, torch.tensor(0.0))
    assert log_prob.isfinite().all()
    assert torch.autograd.grad(log_prob.sum(), means)[0].isfinite().all()


def test_gradient_of_the_level_mass_deep_in_the_tail():
    # far out, −log mass is (d/σ)²/2 and slowly varying terms, d the distance to the near edge of the bin
    mean, sigma = torch.tensor(0.9, requires_grad=True), 5e-4
    log_prob = discretized_gaussian_log_likelihood(torch.tensor(-1.0), mean, torch.tensor(sigma).log())
    (gradient,) = torch.autograd.grad(log_prob, mean)
    assert gradient.item() == pytest.approx(-(1.9 - 1 / 255) / sigma**2, rel=1e-3)


def test_log_normal_cdf_equals_torch_and_holds_at_the_ends():
    z = torch.linspace(-30, 30, 601, dtype=torch.float64)
    torch.testing.assert_close(log_normal_cdf(z), torch.special.log_ndtr(z), rtol=1e-10, atol=1e-15)
    ends = log_normal_cdf(torch.tensor([-math.inf, 0.0, math.inf]))
    torch.testing.assert_close(ends, torch.tensor([-math.inf, -math.log(2), 0.0]))


@pytest.mark.filterwarnings("ignore:this schedule never reaches noise")
def test_prior_term_equals_torch_distributions():
    short = GaussianDiffusion(torch.full((30,), 0.02))  # its L_T is not next to nothing
    for diffusion in (short, GaussianDiffusion.from_schedule("linear", 50), GaussianDiffusion.from_schedule("cosine")):
        x_0 = grey_images(5, channels=3)
        alpha_bar = diffusion.alphas_cumprod[-1].double()
        posterior = Normal(alpha_bar.sqrt() * x_0.double(), (1 - alpha_bar).sqrt())
        expected = kl_divergence(posterior, Normal(0.0, 1.0)).mean((1, 2, 3)) / math.log(2)
        torch.testing.assert_close(prior_term(diffusion, x_0).double(), expected, rtol=1e-3, atol=1e-7)


# ------------------------------------------------------------------------------------------------ one term
@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("t", [2, 3, 20, 50])
def test_vlb_term_is_the_kl_of_the_two_gaussians(variance, t):
    diffusion = GaussianDiffusion.from_schedule("linear", 50)
    x_0, noise = grey_images(4), torch.randn(4, 1, 6, 6, generator=seeded(1))
    x_t = diffusion.q_sample(x_0, t, noise)
    found = vlb_term(zero_noise, diffusion, x_0, x_t, t, variance, clip_denoised=False).double()
    betas = diffusion.betas.double()
    alpha_bar = (1 - betas).cumprod(0)
    # the posterior by adding precisions, not by DDPM eq. 7
    prior_var, likelihood_var = 1 - alpha_bar[t - 1], betas[t] / (1 - betas[t])
    true_var = 1 / (1 / prior_var + 1 / likelihood_var)
    shift = x_t.double() / (1 - betas[t]).sqrt() / likelihood_var
    true_mean = true_var * (alpha_bar[t - 1].sqrt() * x_0.double() / prior_var + shift)
    pred_mean = true_var * (alpha_bar[t - 1].sqrt() * x_t.double() / alpha_bar[t].sqrt() / prior_var + shift)
    p = Normal(pred_mean, (betas[t] if variance == "beta" else true_var).sqrt())
    expected = kl_divergence(Normal(true_mean, true_var.sqrt()), p).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_vlb_term_at_t_1_is_the_decoder(variance):
    diffusion = GaussianDiffusion.from_schedule("linear", 50)
    x_0 = grey_images(4)
    x_1 = diffusion.q_sample(x_0, 1, torch.randn(x_0.shape, generator=seeded(1)))
    x0_hat = (x_1 / diffusion.sqrt_alphas_cumprod[1]).clamp(-1, 1)  # what zero noise predicts
    sigma = diffusion.betas[1].sqrt() if variance == "beta" else diffusion.posterior_variance[2].sqrt()
    log_prob = discretized_gaussian_log_likelihood(x_0.double(), x0_hat.double(), sigma.double().log())
    found = vlb_term(zero_noise, diffusion, x_0, x_1, 1, variance).double()
    torch.testing.assert_close(found, -log_prob.mean((1, 2, 3)) / math.log(2), rtol=1e-4, atol=1e-5)


def test_vlb_term_of_mixed_timesteps_equals_one_at_a_time():
    diffusion = GaussianDiffusion.from_schedule("linear", 50)
    x_0, t = grey_images(5, channels=3), torch.tensor([1, 2, 1, 50, 7])
    x_t = diffusion.q_sample(x_0, t, torch.randn(x_0.shape, generator=seeded(1)))
    together = vlb_term(zero_noise, diffusion, x_0, x_t, t)
    alone = [vlb_term(zero_noise, diffusion, x_0[i : i + 1], x_t[i : i + 1], int(t[i]))[0] for i in range(5)]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_vlb_term_of_gaussian_data_averages_to_the_closed_form(variance):
    diffusion = GaussianDiffusion.from_schedule("linear", 50)
    data = GaussianMixture(torch.tensor([[0.1]]), torch.tensor([0.15]))
    expected = gaussian_elbo(0.1, 0.15, diffusion, reverse_variances(diffusion, variance)).terms / math.log(2)
    x_0 = data.sample(20_000, seeded())
    x_0 = to_model_range(((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    for t in (1, 2, 5, 25, 50):
        x_t = diffusion.q_sample(x_0, t, torch.randn(x_0.shape, generator=seeded(t)))
        terms = vlb_term(data.noise_model(diffusion), diffusion, x_0, x_t, t, variance, clip_denoised=False)
        mean, error = mean_and_error(terms)
        # at t = 1 the mass of a level is nearly a density times the level's width, 2/255
        target = expected[t - 1].item() + (math.log2(255 / 2) if t == 1 else 0)
        assert abs(mean - target) < 5 * error + 0.003, (t, mean, target, error)


def test_a_table_of_variances():
    diffusion = GaussianDiffusion.from_schedule("linear", 50)
    x_0 = grey_images(3)
    x_t = diffusion.q_sample(x_0, 9, torch.randn(x_0.shape, generator=seeded(1)))
    by_name = vlb_term(zero_noise, diffusion, x_0, x_t, 9, "beta")
    torch.testing.assert_close(vlb_term(zero_noise, diffusion, x_0, x_t, 9, diffusion.betas), by_name)
    by_name, table = (vlb_term(zero_noise, diffusion, x_0, x_t, 9, variance)
                      for variance in ("posterior", reverse_variances(diffusion, "posterior")))  # fmt: skip
    torch.testing.assert_close(table, by_name)
    with pytest.raises(ValueError, match="table of variances"):
        vlb_term(zero_noise, diffusion, x_0, x_t, 9, diffusion.betas[1:])
    with pytest.raises(ValueError, match="positive"):
        vlb_term(zero_noise, diffusion, x_0, x_t, 9, diffusion.posterior_variance)  # β̃_1 = 0 is no decoder


def test_reverse_variances():
    diffusion = GaussianDiffusion.from_schedule("linear", 50)
    torch.testing.assert_close(reverse_variances(diffusion, "beta"), diffusion.betas)
    table = reverse_variances(diffusion, "posterior")
    torch.testing.assert_close(table[2:], diffusion.posterior_variance[2:])
    assert table[1] == diffusion.posterior_variance[2] > 0
    assert diffusion.posterior_variance[1] == 0  # the diffusion's own table is left alone
    with pytest.raises(ValueError, match="'beta', 'posterior'"):
        reverse_variances(diffusion, "learned")
    with pytest.raises(ValueError, match="T = 1"):
        reverse_variances(GaussianDiffusion(torch.tensor([0.999])), "posterior")


@pytest.mark.parametrize("pred_noise", [0.0, 1.0, -1e3, 1e6])
@pytest.mark.parametrize("clip", [True, False])
def test_no_nan_and_finite_gradients_in_float32(pred_noise, clip):
    diffusion = GaussianDiffusion.from_schedule("linear", 1000)
    x_0 = torch.stack([torch.full((1, 4, 4), v) for v in (-1.0, 1.0, -1.0, 1.0)])
    t = torch.tensor([1, 1, 2, 1000])
    x_t = diffusion.q_sample(x_0, t, 4 * torch.ones_like(x_0))
    bias = torch.tensor(pred_noise, requires_grad=True)
    for variance in ("beta", "posterior"):
        terms = vlb_term(lambda x, t: torch.zeros_like(x) + bias, diffusion, x_0, x_t, t, variance, clip)
        assert terms.isfinite().all() and (terms >= -1e-6).all()
        assert torch.autograd.grad(terms.sum(), bias)[0].isfinite()


# ------------------------------------------------------------------------------------------------ the whole
def known_terms(diffusion, x_0, variance):
    """L_0, L_1, … in bits/dim, (B, T), of a model with every mean right: closed forms in float64."""
    sigma2 = reverse_variances(diffusion, variance).double()[2:]
    ratio = diffusion.posterior_variance.double()[2:] / sigma2
    kl = 0.5 * (ratio - 1 - ratio.log()) / math.log(2)
    sigma_1 = reverse_variances(diffusion, variance).double()[1].sqrt()
    one_side = Normal(0.0, 1.0).cdf(1 / 255 / sigma_1)
    open_end = (x_0.abs() == 1).double().flatten(1).mean(1)
    decoder = -(open_end * one_side.log2() + (1 - open_end) * (2 * one_side - 1).log2())
    return torch.cat([decoder[:, None], kl.expand(len(x_0), -1)], dim=1)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("channels", [1, 3])
def test_bits_per_dim_of_a_model_that_knows_x0(variance, channels):
    diffusion = GaussianDiffusion.from_schedule("linear", 60)
    x_0 = grey_images(7, channels)
    result = bits_per_dim(knows(diffusion, x_0), diffusion, x_0, seeded(), variance=variance)
    expected = known_terms(diffusion, x_0, variance)
    torch.testing.assert_close(result.terms.double(), expected, rtol=1e-3, atol=2e-6)
    torch.testing.assert_close(result.total.double(), expected.sum(1) + result.prior.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.prior, prior_term(diffusion, x_0))
    assert result.timesteps.tolist() == [list(range(1, 61))] * 7 and result.weights.tolist() == [1] * 60
    assert result.x0_mse.shape == (7, 60) and result.x0_mse.max() < 1e-6


def test_half_black_images_cost_1_16_bits_in_a_decoder_of_variance_1e_4():
    diffusion = GaussianDiffusion.from_schedule("linear", 1000)
    x_0 = torch.full((1, 1, 2, 4), -1.0)
    x_0[..., 1, :] = LEVELS[100]
    noise = torch.randn(x_0.shape, generator=seeded())
    L_0 = vlb_term(knows(diffusion, x_0), diffusion, x_0, diffusion.q_sample(x_0, 1, noise), 1, "beta")
    assert L_0.item() == pytest.approx(1.16, abs=0.005)


def test_fewer_timesteps_are_an_unbiased_estimate():
    diffusion = GaussianDiffusion.from_schedule("linear", 200)
    x_0 = grey_images(1).expand(3000, -1, -1, -1)
    result = bits_per_dim(knows(diffusion, x_0), diffusion, x_0, seeded(), num_steps=8, batch_size=3000)
    exact = known_terms(diffusion, x_0[:1], "beta").sum().item() + prior_term(diffusion, x_0[:1]).item()
    mean, error = mean_and_error(result.total)
    assert 0 < error < 0.01 * exact
    assert abs(mean - exact) < 5 * error
    edges = timestep_strata(200, 8)
    assert result.weights.sum() == 200 and (result.timesteps[:, 0] == 1).all()
    assert (result.timesteps >= edges[:-1]).all() and (result.timesteps < edges[1:]).all()
    assert len(result.timesteps[:, -1].unique()) == edges[-1] - edges[-2]  # every timestep of a run is drawn


def second_implementation(unet, betas, x_0, noise, t, variance):
    """One term of one image in bits/dim, from the DDPM paper alone: float64, t from 0, as guided-diffusion has it."""
    alphas_cumprod = np.cumprod(1 - betas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    log_variance = math.log(posterior_variance[max(t, 1)])
    model_log_variance = math.log(betas[t]) if variance == "beta" else log_variance
    x_t = math.sqrt(alphas_cumprod[t]) * x_0 + math.sqrt(1 - alphas_cumprod[t]) * noise
    with torch.no_grad():
        eps = unet(torch.from_numpy(x_t).float()[None], torch.tensor([t + 1]))[0].double().numpy()
    x0_hat = np.clip((x_t - math.sqrt(1 - alphas_cumprod[t]) * eps) / math.sqrt(alphas_cumprod[t]), -1, 1)
    from_x0 = betas[t] * math.sqrt(previous[t]) / (1 - alphas_cumprod[t])
    from_xt = (1 - previous[t]) * math.sqrt(1 - betas[t]) / (1 - alphas_cumprod[t])
    model_mean, mean = from_x0 * x0_hat + from_xt * x_t, from_x0 * x_0 + from_xt * x_t
    if t == 0:
        scale = math.exp(0.5 * model_log_variance) * math.sqrt(2)
        upper, lower = (x_0 - model_mean + 1 / 255) / scale, (x_0 - model_mean - 1 / 255) / scale
        cdf = lambda z: torch.special.erfc(torch.from_numpy(-z)).numpy() / 2  # noqa: E731
        mass = np.where(x_0 == -1, cdf(upper), np.where(x_0 == 1, cdf(-lower), cdf(upper) - cdf(lower)))
        tail = (np.abs(x_0 - model_mean) / scale) > 3.5  # there the difference of two CDFs loses its digits
        return np.where(tail, np.nan, -np.log2(np.maximum(mass, 1e-300)))
    ratio = log_variance - model_log_variance
    kl = 0.5 * (np.exp(ratio) - 1 - ratio + (mean - model_mean) ** 2 * math.exp(-model_log_variance))
    return kl.mean() / math.log(2)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_terms_of_the_shipped_model_recomputed_from_the_paper(variance):
    model = NoisePredictor.from_pretrained()
    diffusion = model.diffusion
    x_0 = to_model_range(load_fashion_mnist("test", "sample").images[[3, 441, 808]])
    betas = diffusion.exact_betas.numpy()
    for t in (2, 3, 7, 30, 110, 400, 800, diffusion.num_timesteps):
        noise = torch.randn(x_0.shape, generator=seeded(t))
        found = vlb_term(model, diffusion, x_0, diffusion.q_sample(x_0, t, noise), t, variance)
        images = zip(x_0.double().numpy(), noise.double().numpy(), strict=True)
        expected = [second_implementation(model, betas, x, e, t - 1, variance) for x, e in images]
        torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_decoder_of_the_shipped_model_recomputed_from_the_paper(variance):
    """L_0 of each pixel, but those so far off that the paper's difference of two CDFs has no digits left."""
    model = NoisePredictor.from_pretrained()
    diffusion = model.diffusion
    x_0 = to_model_range(load_fashion_mnist("test", "sample").images[[3]])
    noise = torch.randn(x_0.shape, generator=seeded())
    x_1 = diffusion.q_sample(x_0, 1, noise)
    betas = diffusion.exact_betas.numpy()
    expected = second_implementation(model, betas, x_0[0].double().numpy(), noise[0].double().numpy(), 0, variance)
    ones = torch.ones(1, dtype=torch.long)
    with torch.no_grad():
        mean = diffusion.predict_x0(x_1, 1, model(x_1, ones)).clamp(-1, 1)
    log_scale = 0.5 * reverse_variances(diffusion, variance)[1].log()
    found = -discretized_gaussian_log_likelihood(x_0, mean, log_scale)[0] / math.log(2)
    kept = ~np.isnan(expected)
    assert kept.mean() > 0.98
    torch.testing.assert_close(found.double().numpy()[kept], expected[kept], rtol=1e-3, atol=1e-3)
    total = vlb_term(model, diffusion, x_0, x_1, 1, variance)
    torch.testing.assert_close(total, found.mean()[None], rtol=1e-4, atol=1e-5)


def test_timestep_strata_cover_each_timestep_once():
    for T in (1, 2, 10, 57, 1000):
        for S in {1, 2, 3, T // 2, T - 1, T} & set(range(1, T + 1)):
            edges = timestep_strata(T, S)
            assert edges[0] == 1 and edges[-1] == T + 1 and len(edges) == S + 1 and (edges.diff() > 0).all()
            assert S == 1 or edges[1] == 2  # L_0 has a run of its own
    for bad in (0, 11, -1, 2.0, True):
        with pytest.raises(ValueError, match="1 … 10"):
            timestep_strata(10, bad)


def test_bits_per_dim_depends_on_the_generator_alone():
    diffusion = GaussianDiffusion.from_schedule("linear", 30)
    x_0 = grey_images(5)
    torch.manual_seed(0)
    first = bits_per_dim(zero_noise, diffusion, x_0, seeded(3), num_steps=5)
    torch.manual_seed(1)
    second = bits_per_dim(zero_noise, diffusion, x_0, seeded(3), num_steps=5, progress=True)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(first.total, bits_per_dim(zero_noise, diffusion, x_0, seeded(4), num_steps=5).total)


@pytest.mark.filterwarnings("ignore:this schedule never reaches noise")
def test_the_total_has_the_prior_in_it():
    diffusion = GaussianDiffusion(torch.full((30,), 0.02))  # x_T still shows the image
    result = bits_per_dim(zero_noise, diffusion, grey_images(3), seeded())
    assert (result.prior > 0.05).all()
    torch.testing.assert_close(result.total, result.prior + result.terms.sum(1))


def test_batches_reach_every_image():
    diffusion = GaussianDiffusion.from_schedule("linear", 30)
    x_0, sizes = grey_images(5), []

    def model(x_t, t):
        sizes.append(len(x_t))
        return torch.zeros_like(x_t)

    result = bits_per_dim(model, diffusion, x_0, seeded(), num_steps=4, batch_size=2)
    assert sizes == [2] * 8 + [1] * 4
    assert result.total.isfinite().all() and result.total.shape == (5,)
    torch.testing.assert_close(result.total, result.prior + result.terms @ result.weights)


@pytest.mark.parametrize(
    ("x_0", "message"),
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "float images"),
        (torch.ones(2, 4, 4), r"\(B, C, H, W\)"),
        (torch.ones(0, 1, 4, 4), "float images"),
        (torch.full((2, 1, 4, 4), 300 / 127.5 - 1), "grey levels"),
        (torch.full((2, 1, 4, 4), 0.001), "grey levels"),
        (torch.full((2, 1, 4, 4), math.nan), "grey levels"),
    ],
)
def test_bits_per_dim_refuses_what_is_no_8_bit_image(x_0, message):
    with pytest.raises(ValueError, match=message):
        bits_per_dim(zero_noise, GaussianDiffusion.from_schedule("linear", 30), x_0)


@pytest.mark.parametrize(
    ("x_0", "message"),
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "floats"),
        (torch.full((2, 1, 4, 4), 200.0), "grey levels"),
        (torch.full((2, 1, 4, 4), 8 / 255), "grey levels"),  # scaled to [0, 1]
    ],
)
def test_each_term_refuses_what_is_no_8_bit_image(x_0, message):
    diffusion, x_t = GaussianDiffusion.from_schedule("linear", 30), torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=message):
        vlb_term(zero_noise, diffusion, x_0, x_t, 3)
    with pytest.raises(ValueError, match=message):
        prior_term(diffusion, x_0)


def test_the_bound_of_float64_images_is_that_of_float32_ones():
    diffusion, x_0 = GaussianDiffusion.from_schedule("linear", 30), grey_images(2)
    found = bits_per_dim(zero_noise, diffusion, x_0.double(), seeded())
    assert torch.equal(found.total, bits_per_dim(zero_noise, diffusion, x_0, seeded()).total)


@pytest.mark.parametrize("options", [{"num_steps": 0}, {"num_steps": 31}, {"batch_size": 0}, {"variance": "fixed"}])
def test_bits_per_dim_refuses_bad_options(options):
    with pytest.raises(ValueError, match="must"):
        bits_per_dim(zero_noise, GaussianDiffusion.from_schedule("linear", 30), grey_images(2), **options)


def test_mean_and_error():
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3 and error == pytest.approx((14 / 3) ** 0.5 / 2)
    assert math.isnan(mean_and_error(torch.tensor([1.0]))[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_bits_on_a_gpu():
    diffusion = GaussianDiffusion.from_schedule("linear", 60)
    x_0 = grey_images(4)
    on_cpu = bits_per_dim(zero_noise, diffusion, x_0, seeded())
    on_gpu = bits_per_dim(zero_noise, diffusion.to("cuda"), x_0.cuda(), seeded())
    assert on_gpu.total.is_cuda
    torch.testing.assert_close(on_gpu.total.cpu(), on_cpu.total, rtol=1e-4, atol=1e-4)
