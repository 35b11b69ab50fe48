"""Chapter 3's weights against the KL divergence they come from, and the losses against their definitions."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from ddpm_tutorial.diffusion import SCHEDULES, GaussianDiffusion
from ddpm_tutorial.losses import (
    LOSSES,
    draw_timesteps,
    min_snr_weights,
    simple_loss,
    timestep_probabilities,
    vlb_weights,
    weighted_noise_loss,
)
from ddpm_tutorial.settings import TARGETS


@pytest.fixture(params=list(SCHEDULES))
def diffusion(request):
    return GaussianDiffusion.from_schedule(request.param, 1000)


def test_losses_are_what_their_names_say(generator):
    pred, noise = 3 * torch.randn(2, 5, 1, 4, 4, generator=generator, dtype=torch.float64)
    error = pred - noise
    huber = torch.where(error.abs() < 1, 0.5 * error**2, error.abs() - 0.5)
    for kind, values in {"l2": error**2, "l1": error.abs(), "huber": huber}.items():
        assert_close(simple_loss(pred, noise, kind), values.mean())


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_refuse_shapes_that_would_broadcast(kind):
    with pytest.raises(ValueError, match=r"\(4, 1\) and \(4,\)"):
        simple_loss(torch.zeros(4, 1), torch.zeros(4), kind)


def test_unknown_loss_is_named():
    with pytest.raises(ValueError, match="'l3'.*l2, l1, huber"):
        simple_loss(torch.zeros(1), torch.zeros(1), "l3")


def test_weighted_loss_with_weight_one_is_l_simple(generator):
    pred, noise = torch.randn(2, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    assert_close(weighted_noise_loss(pred, noise, torch.ones(6)), simple_loss(pred, noise))


def test_weighted_loss_weighs_items_not_pixels(generator):
    pred, noise = torch.randn(2, 3, 1, 2, 2, generator=generator, dtype=torch.float64)
    weight = torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64)
    by_item = [simple_loss(pred[i], noise[i]) for i in range(3)]
    assert_close(weighted_noise_loss(pred, noise, weight), (2 * by_item[1] + 5 * by_item[2]) / 3)
    with pytest.raises(ValueError, match=r"weight must be \(3,\).*\(3, 1\)"):
        weighted_noise_loss(pred, noise, weight[:, None])
    with pytest.raises(ValueError, match="one shape"):
        weighted_noise_loss(pred, noise[:, :, :1], weight)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_vlb_weight_is_what_multiplies_the_error_in_the_kl(diffusion, variance, generator):
    """KL(q(x_{t−1} | x_t, x_0) ‖ p) for two noise predictions; their difference has no constant in it."""
    weights = vlb_weights(diffusion, variance).double()
    for t in [2, 3, 10, 100, 500, 999, 1000]:
        x_0, noise, one, other = torch.randn(4, 1, 8, generator=generator, dtype=torch.float64)
        x_t = diffusion.q_sample(x_0, t, noise)
        mean, posterior_variance = diffusion.q_posterior(x_0, x_t, t)
        sigma = (posterior_variance if variance == "posterior" else diffusion.betas[t]).double().sqrt()
        q = Normal(mean, posterior_variance.double().sqrt())

        def kl(pred_noise, q=q, x_t=x_t, t=t, sigma=sigma):
            # DDPM eq. 11 through x_0 and eq. 7, so that the short cut mean_from_noise is not what is tested
            p_mean, _ = diffusion.q_posterior(diffusion.predict_x0(x_t, t, pred_noise), x_t, t)
            return kl_divergence(q, Normal(p_mean, sigma)).sum()

        expected = weights[t] * ((noise - one).square().sum() - (noise - other).square().sum())
        # The float32 tables carry 6e-8 each; small differences of means over small variances magnify it.
        assert_close(kl(one) - kl(other), expected, rtol=2e-3, atol=1e-4)


def test_vlb_weights_are_differences_of_snr(diffusion):
    """½ (SNR_{t−1}/SNR_t − 1) for σ² = β̃ (Kingma et al., arXiv:2107.00630), from β in float64."""
    betas = diffusion.exact_betas
    alpha_bar = (1 - betas).cumprod(0)
    snr = alpha_bar / (1 - alpha_bar)  # t = 1 … T
    weights = vlb_weights(diffusion)
    assert_close(weights[2:].double(), 0.5 * (snr[:-1] / snr[1:] - 1), rtol=1e-5, atol=0)
    assert weights[0] == 0 and weights[1] == torch.inf


def test_vlb_weights_of_beta_stay_finite_and_relate_by_the_variances(diffusion):
    beta, posterior = vlb_weights(diffusion, "beta"), vlb_weights(diffusion, "posterior")
    assert beta[0] == 0 and beta.isfinite().all()
    assert_close(beta[1], 0.5 / diffusion.alphas[1])  # σ_1² = β_1 = 1 − ᾱ_1
    ratio = diffusion.posterior_variance[2:] / diffusion.betas[2:]
    assert_close(beta[2:] / posterior[2:], ratio)


def test_vlb_weights_refuse_an_unknown_variance(diffusion):
    with pytest.raises(ValueError, match="'posterior' or 'beta', got 'learned'"):
        vlb_weights(diffusion, "learned")


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_caps_the_weight_of_x0_errors(diffusion, gamma):
    """On x_0 errors, which are noise errors over SNR, the factor is min(SNR, γ)."""
    betas = diffusion.exact_betas
    alpha_bar = (1 - betas).cumprod(0)
    snr = alpha_bar / (1 - alpha_bar)
    weights = min_snr_weights(diffusion, gamma)
    assert weights.shape == (1001,) and weights[0] == 0
    assert_close(weights[1:].double() * snr, snr.clamp(max=gamma), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_min_snr_refuses_a_gamma_that_is_not_positive(diffusion, gamma):
    with pytest.raises(ValueError, match="gamma must be positive"):
        min_snr_weights(diffusion, gamma)


@pytest.mark.parametrize("kind", ["l2", "l1", "huber"])
def test_each_loss_has_its_own_optimum(kind, generator):
    """On a skewed law: the mean, the median, and the point where clipped errors balance."""
    draws = torch.randn(20_001, generator=generator, dtype=torch.float64).exp()
    guesses = torch.linspace(0.5, 2.5, 401, dtype=torch.float64)
    best = guesses[torch.stack([simple_loss(g.expand_as(draws), draws, kind) for g in guesses]).argmin()]
    step = 0.005  # of the guesses
    if kind == "l2":
        assert abs(best - draws.mean()) <= step
    elif kind == "l1":
        assert abs(best - draws.median()) <= step
    else:
        force = [(draws - g).clamp(-1, 1).mean() for g in (best - step, best + step)]
        assert force[0] > 0 > force[1]


# --------------------------------------------------------------------------------------- which t are drawn
def test_timesteps_are_drawn_uniformly_or_by_angle():
    diffusion = GaussianDiffusion.from_schedule("linear", 100)
    uniform, by_angle = timestep_probabilities(diffusion), timestep_probabilities(diffusion, "v")
    assert uniform[0] == by_angle[0] == 0
    assert_close(uniform[1:], torch.full((100,), 0.01, dtype=torch.float64))
    angle = diffusion.sqrt_alphas_cumprod.double().acos()  # the same angle, from its cosine
    assert_close(by_angle.cumsum(0), angle / angle[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_draws_have_these_probabilities_and_cover_every_slice(target):
    probabilities = timestep_probabilities(GaussianDiffusion.from_schedule("linear", 100), target)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_timesteps(probabilities, 20, generator) for _ in range(5000)])
    share = torch.bincount(drawn.flatten(), minlength=101) / drawn.numel()
    error = (probabilities / drawn.numel()).sqrt()
    assert ((share - probabilities).abs() <= 4.5 * error).all() and share[0] == 0
    middle = probabilities.cumsum(0)[drawn] - probabilities[drawn] / 2  # where in the distribution each draw lies
    assert ((middle * 20 - torch.arange(20) - 0.5).abs() < 0.5 + 10 * probabilities[drawn]).all()


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="unknown target 'score'; the known ones are noise, v, x_0"):
        timestep_probabilities(GaussianDiffusion.from_schedule("linear"), "score")
