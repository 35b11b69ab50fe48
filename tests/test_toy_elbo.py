"""gaussian_elbo and mixture_elbo of toy.py: against joint Gaussians, against sampled paths, and against each other."""

import itertools
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.elbo import reverse_variances
from ddpm_tutorial.toy import GaussianMixture, gaussian_elbo, mixture_elbo

MIXTURE = GaussianMixture(torch.tensor([[-1.0], [0.8]]), torch.tensor([0.3, 0.4]), torch.tensor([0.4, 0.6]))


def joint_gaussians(mean, std, diffusion, variances):
    """q(x_0 … x_T) and p_θ(x_0 … x_T) as Gaussians in T + 1 dimensions, built from their linear maps of noise."""
    betas = diffusion.exact_betas
    T = len(betas)
    forward, offset = torch.zeros(T + 1, T + 1).double(), torch.zeros(T + 1).double()
    forward[0, 0], offset[0] = std, mean
    for t in range(1, T + 1):
        forward[t] = (1 - betas[t - 1]).sqrt() * forward[t - 1]
        forward[t, t] = betas[t - 1].sqrt()
        offset[t] = (1 - betas[t - 1]).sqrt() * offset[t - 1]
    covariance = forward @ forward.T
    q = MultivariateNormal(offset, covariance)
    backward, center = torch.zeros(T + 1, T + 1).double(), torch.zeros(T + 1).double()
    backward[T, T] = 1
    for t in range(T, 0, -1):  # E[x_{t−1} | x_t] by regression in the joint law q
        slope = covariance[t - 1, t] / covariance[t, t]
        backward[t - 1] = slope * backward[t]
        backward[t - 1, t - 1] += variances[t].double().sqrt()
        center[t - 1] = offset[t - 1] + slope * (center[t] - offset[t])
    return q, MultivariateNormal(center, backward @ backward.T)


def diffusions():
    """One that reaches noise, and one with an L_T that counts."""
    with pytest.warns(UserWarning, match="never reaches noise"):
        short = GaussianDiffusion(torch.linspace(0.01, 0.1, 25))
    return GaussianDiffusion.from_schedule("linear", 25), short


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.4), (-2.0, 1.5)])
def test_gaussian_elbo_is_the_kl_of_two_joint_gaussians(variance, mean, std, which):
    diffusion = diffusions()[which]
    variances = reverse_variances(diffusion, variance)
    found = gaussian_elbo(mean, std, diffusion, variances)
    q, p = joint_gaussians(mean, std, diffusion, variances)
    # E_q[log q(x_{1:T} | x_0) − log p(x_{0:T})] = KL of the joints + the entropy of x_0
    torch.testing.assert_close(found.bound, kl_divergence(q, p) + found.entropy, rtol=1e-6, atol=1e-6)
    p_0 = Normal(p.mean[0], p.covariance_matrix[0, 0].sqrt())
    data = Normal(torch.tensor(mean).double(), torch.tensor(std).double())
    torch.testing.assert_close(found.nll, kl_divergence(data, p_0) + data.entropy(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.entropy, data.entropy())
    assert found.bound > found.nll - 1e-7 and found.nll > found.entropy - 1e-7 and len(found.terms) == 25


def test_with_the_true_reverse_variance_only_the_prior_is_wrong():
    diffusion = GaussianDiffusion.from_schedule("linear", 50)
    alpha_bar = torch.cat([torch.ones(1), diffusion.alphas_cumprod[1:]]).double()
    marginal = alpha_bar * 0.25 + 1 - alpha_bar
    slope = diffusion.alphas[1:].double().sqrt() * marginal[:-1] / marginal[1:]
    variances = torch.cat([torch.ones(1).double(), marginal[:-1] - slope**2 * marginal[1:]])
    found = gaussian_elbo(0.3, 0.5, diffusion, variances)
    x_T = Normal(0.3 * alpha_bar[-1].sqrt(), marginal[-1].sqrt())
    expected = kl_divergence(x_T, Normal(0.0, 1.0))
    torch.testing.assert_close((found.bound - found.entropy).float(), expected.float(), rtol=1e-3, atol=2e-6)


def test_the_gap_closes_like_1_over_T_with_beta_and_does_not_with_the_posterior_variance():
    def excess(T, variance):
        diffusion = GaussianDiffusion.from_schedule("linear", T)
        found = gaussian_elbo(0.3, 0.5, diffusion, reverse_variances(diffusion, variance))
        return (found.bound - found.entropy).item()

    assert excess(2000, "beta") == pytest.approx(excess(500, "beta") / 4, rel=0.02)
    assert excess(8000, "posterior") > 0.44


def test_mixture_of_one_component_is_the_gaussian():
    one = GaussianMixture(torch.tensor([[0.3]]), torch.tensor([0.5]))
    for diffusion, variance in itertools.product(diffusions(), ("beta", "posterior")):
        variances = reverse_variances(diffusion, variance)
        by_grid, closed = (
            mixture_elbo(one, diffusion, variances, points=801),
            gaussian_elbo(0.3, 0.5, diffusion, variances),
        )
        for a, b in zip(by_grid, closed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_mixture_elbo_equals_the_mean_over_sampled_paths():
    diffusion = GaussianDiffusion.from_schedule("linear", 25)
    variances = reverse_variances(diffusion, "beta")
    found = mixture_elbo(MIXTURE, diffusion, variances, points=801)
    generator = torch.Generator().manual_seed(0)
    x = MIXTURE.sample(50_000, generator)
    model, log_ratio, log_data = MIXTURE.noise_model(diffusion), 0.0, MIXTURE.log_prob(diffusion, x, 0)
    for t, x_t in diffusion.q_chain(x, generator):
        if t > 0:
            x0_hat = diffusion.predict_x0(x_t, t, model(x_t, t))
            mean, _ = diffusion.q_posterior(x0_hat, x_t, t)
            forward = Normal(diffusion.alphas[t].sqrt() * x, diffusion.betas[t].sqrt()).log_prob(x_t)
            log_ratio = log_ratio + (forward - Normal(mean, variances[t].sqrt()).log_prob(x))[:, 0]
        x = x_t
    log_ratio = log_ratio - Normal(0.0, 1.0).log_prob(x)[:, 0]
    error = log_ratio.std().item() / len(x) ** 0.5
    assert abs(log_ratio.mean().item() - found.bound.item()) < 5 * error
    assert abs(-log_data.mean().item() - found.entropy.item()) < 5 * log_data.std().item() / len(x) ** 0.5
    assert found.bound > found.nll > found.entropy
    assert math.isclose(found.terms.sum() + found.prior, found.bound)


def test_mixture_nll_is_that_of_ancestral_samples():
    diffusion = GaussianDiffusion.from_schedule("linear", 25)
    variances = reverse_variances(diffusion, "beta")
    generator, model = torch.Generator().manual_seed(0), MIXTURE.noise_model(diffusion)
    x = torch.randn(200_000, 1, generator=generator)
    for t in range(25, 0, -1):  # every step adds its noise, the last too: a sample of p_θ(x_0)
        mean, _ = diffusion.q_posterior(diffusion.predict_x0(x, t, model(x, t)), x, t)
        x = mean + variances[t].sqrt() * torch.randn(x.shape, generator=generator)
    counts = torch.histc(x, 120, -3, 3) / len(x)
    centers = torch.linspace(-2.975, 2.975, 120)
    data = MIXTURE.log_prob(diffusion, centers[:, None], 0).exp() * 0.05
    cross_entropy = -(data * (counts.clamp(min=1e-6) / 0.05).log()).sum()
    assert cross_entropy.item() == pytest.approx(
        mixture_elbo(MIXTURE, diffusion, variances, points=801).nll.item(), abs=0.01
    )


def test_bad_input():
    diffusion = GaussianDiffusion.from_schedule("linear", 1000)
    with pytest.raises(ValueError, match="1001"):
        gaussian_elbo(0.0, 1.0, diffusion, diffusion.betas[1:])
    with pytest.raises(ValueError, match="spacing"):
        mixture_elbo(MIXTURE, diffusion, diffusion.betas, points=101)
    plane = GaussianMixture(torch.zeros(1, 2), torch.ones(1))
    with pytest.raises(ValueError, match="one dimension"):
        mixture_elbo(plane, diffusion, diffusion.betas)
