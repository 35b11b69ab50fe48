"""Inpainting against what is known exactly: the known pixels, two correlated Gaussian pixels, and four in a row."""

import math
from functools import partial

import pytest
import torch
from small_run import new_model
from torch.testing import assert_close

from ddpm_tutorial.data import load_fashion_mnist, to_model_range, to_uint8
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.editing import add_noise, keep_known, pull_known, resample
from ddpm_tutorial.guidance import classifier_free
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import SAMPLERS, sample_ddim, sample_dpmpp_2m, sample_heun

RHO, A = 0.9, 1.0
COVARIANCE = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def last(steps):
    return list(steps)[-1].x_t


@pytest.fixture(scope="module")
def diffusion():
    return GaussianDiffusion.from_schedule("linear", 1000)


def gaussian_noise(diffusion, covariance):
    """The exact noise predictor of N(0, covariance): ε = √(1 − ᾱ_t) Σ_t⁻¹ x_t."""

    def model(x_t, t):
        alpha_bar = diffusion.alphas_cumprod[t[0]].double()
        noisy = alpha_bar * covariance + (1 - alpha_bar) * torch.eye(len(covariance), dtype=torch.float64)
        return ((1 - alpha_bar).sqrt() * x_t.double() @ torch.linalg.inv(noisy)).to(x_t)

    return model


# ------------------------------------------------------------------------------------------- the known part
@pytest.fixture(scope="module")
def real():
    return load_fashion_mnist("test", source="sample").images[:3]


@pytest.fixture(scope="module")
def mask():
    return torch.rand(1, 1, 28, 28, generator=seeded(7)) < 0.5


@pytest.fixture(scope="module")
def network():
    """A small class-conditional U-Net with random weights: what it would draw does not matter here."""
    unet = new_model(channels=8).unet
    for i, parameter in enumerate(unet.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=seeded(i))
    return NoisePredictor(unet, GaussianDiffusion.from_schedule(), "v").eval().requires_grad_(False)


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("name, options", [
    ("ddim", {"num_inference_steps": 1}), ("ddim", {"num_inference_steps": 4}),
    ("ddim", {"num_inference_steps": 4, "eta": 1.0}), ("heun", {"num_inference_steps": 3}),
    ("dpmpp-2m", {"num_inference_steps": 4}),
])  # fmt: skip
def test_known_pixels_come_out_exactly_and_the_others_do_not(name, options, loops, real, mask, network):
    diffusion = network.diffusion
    known, g = to_model_range(real), seeded()
    guided = classifier_free(network, torch.tensor([7, 8, 9]), 2.0)
    for noise_model in (network, guided):
        masked = keep_known(noise_model, diffusion, known, mask)
        sampler = partial(SAMPLERS[name], masked, diffusion, known.shape, generator=g, **options)
        x_T = torch.randn(known.shape, generator=g)
        images = to_uint8(last(resample(sampler, diffusion, x_T, num_loops=loops, generator=g)))
        where = mask.expand(real.shape)
        assert torch.equal(images[where], real[where])
        assert (images[~where] != real[~where]).float().mean() > 0.2


def test_known_pixels_come_out_exactly_of_ancestral_sampling(real, mask):
    diffusion, known = GaussianDiffusion.from_schedule("linear", 50), to_model_range(real)
    masked = keep_known(lambda x_t, t: x_t, diffusion, known, mask)
    images = to_uint8(last(SAMPLERS["ddpm"](masked, diffusion, known.shape, generator=seeded())))
    where = mask.expand(real.shape)
    assert torch.equal(images[where], real[where])


def test_the_model_answers_for_the_unknown_pixels_only(diffusion):
    x_t, t = torch.randn(4, 3, generator=seeded()), torch.full((4,), 300)
    known, mask = torch.tensor([0.5, 0.0, -0.5]), torch.tensor([True, False, True])
    noise = keep_known(lambda x, t: 10 * x, diffusion, known, mask)(x_t, t)
    assert_close(noise[:, 1], 10 * x_t[:, 1])
    x_0 = diffusion.predict_x0(x_t, t, noise)
    assert_close(x_0[:, [0, 2]], known[[0, 2]].expand(4, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_known_pixels_follow_the_forward_process_of_the_input(eta, diffusion):
    """At each t they are N(√ᾱ_t k_0, 1 − ᾱ_t): the marginals that DDIM's family shares, with the true x_0."""
    count, known = 40_000, torch.tensor([0.6])
    masked = keep_known(lambda x, t: torch.zeros_like(x), diffusion, known, torch.tensor([True]))
    steps = sample_ddim(masked, diffusion, (count, 1), num_inference_steps=10, eta=eta, generator=seeded())
    for step in list(steps)[:-1]:
        alpha_bar = diffusion.alphas_cumprod[step.t].double()
        variance = 1 - alpha_bar
        x = step.x_t.double()
        # 0.01: x_T is pure noise, without √ᾱ_T k_0
        assert abs(x.mean() - 0.6 * alpha_bar.sqrt()) < 4.5 * (variance / count) ** 0.5 + 0.01 * variance.sqrt()
        assert abs(x.var() - variance) < 4.5 * variance * (2 / count) ** 0.5


@pytest.mark.parametrize("wrapper", [keep_known, pull_known])
def test_known_and_mask_must_fit_the_images(wrapper, diffusion):
    x_t, t = torch.zeros(1, 2), torch.tensor([3])
    for known, mask in ((torch.zeros(4, 2), torch.ones(2)), (torch.zeros(2), torch.ones(4, 2))):
        model = wrapper(lambda x, t: x, diffusion, known, mask.bool())
        with pytest.raises(ValueError, match=r"must be \(1, 2\), as x_t, or expand to it; got .*\(4, 2\)"):
            model(x_t, t)


def test_mask_must_be_boolean(diffusion):
    with pytest.raises(ValueError, match="known must be floats, got torch.uint8"):
        keep_known(lambda x, t: x, GaussianDiffusion.from_schedule(), torch.zeros(1, 2).byte(), torch.ones(1, 2).bool())
    for wrapper in (keep_known, pull_known):
        with pytest.raises(ValueError, match="mask must be boolean.*got torch.float32"):
            wrapper(lambda x, t: x, diffusion, torch.zeros(2), torch.ones(2))


# ------------------------------------------------------------- what comes out: two Gaussian pixels, exactly
def exact_law(diffusion, num_inference_steps, eta, loops):
    """Mean (2,) and covariance (2, 2) of the completed pair: each step is affine, so they follow a recursion."""
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - diffusion.exact_betas).cumprod(0)])
    unit = torch.eye(2, dtype=torch.float64)
    mean, cov = torch.zeros(2, dtype=torch.float64), unit
    timesteps = [round(1000 * (1 - i / num_inference_steps)) for i in range(num_inference_steps)] + [0]
    for t, s in zip(timesteps[:-1], timesteps[1:], strict=True):
        now, then = alpha_bar[t], alpha_bar[s]
        to_x0 = now.sqrt() * COVARIANCE @ torch.linalg.inv(now * COVARIANCE + (1 - now) * unit)
        to_x0[0], const = 0, torch.tensor([A, 0.0], dtype=torch.float64)  # x̂_0 of the first pixel is A
        sigma2 = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        old = ((1 - then - sigma2).clamp(min=0) / (1 - now)).sqrt()  # of x_t − √ᾱ_t x̂_0
        gain = then.sqrt() - old * now.sqrt()
        for loop in range(loops):
            if loop:
                mean, cov = (now / then).sqrt() * mean, now / then * cov + (1 - now / then) * unit
            step = gain * to_x0 + old * unit
            mean, cov = step @ mean + gain * const, step @ cov @ step.T + sigma2 * unit
    return mean, cov


def complete_pair(diffusion, num_inference_steps, eta, loops, count=40_000):
    masked = keep_known(
        gaussian_noise(diffusion, COVARIANCE), diffusion, torch.tensor([A, 0.0]), torch.tensor([True, False])
    )
    g = seeded(1)
    options = {"num_inference_steps": num_inference_steps, "eta": eta, "clip_denoised": False, "generator": g}
    sampler = partial(sample_ddim, masked, diffusion, (count, 2), **options)
    return last(resample(sampler, diffusion, torch.randn(count, 2, generator=g), num_loops=loops, generator=g))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("loops", [1, 2, 4])
def test_law_of_the_completion_is_the_exact_recursion(diffusion, eta, loops):
    x = complete_pair(diffusion, 20, eta, loops).double()
    mean, cov = exact_law(diffusion, 20, eta, loops)
    assert_close(x[:, 0], torch.full((len(x),), A, dtype=torch.float64), atol=1e-5, rtol=0)
    assert abs(x[:, 1].mean() - mean[1]) < 4.5 * (cov[1, 1] / len(x)) ** 0.5
    assert abs(x[:, 1].var() - cov[1, 1]) < 4.5 * cov[1, 1] * (2 / len(x)) ** 0.5


def missing(p, points=100_000):
    """∫ (ᾱ² (1 − ρ²) / (1 − ρ² ᾱ²))^{p/2} dᾱ: what small steps leave out of the mean ρA (chapter 9)."""
    x = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    return ((x**2 * (1 - RHO**2) / (1 - RHO**2 * x**2)) ** (p / 2)).mean().item()


@pytest.mark.parametrize("eta, loops", [(0.0, 1), (0.0, 2), (0.0, 6), (1.0, 1), (1.0, 2), (1.0, 3)])
def test_what_is_missing_of_the_mean_in_the_limit_of_small_steps(diffusion, eta, loops):
    mean, _ = exact_law(diffusion, 1000, eta, loops)
    assert_close(mean[1].item(), RHO * A * (1 - missing(loops * (1 + eta) / 2)), atol=4e-3, rtol=0)


def test_one_ancestral_pass_in_closed_form():
    c = math.sqrt(1 - RHO**2)
    assert missing(1) == pytest.approx(c / (1 + c), abs=1e-6)


def test_replacement_is_far_from_the_truth_and_loops_close_the_gap(diffusion):
    truth_mean, truth_variance = RHO * A, 1 - RHO**2
    laws = [exact_law(diffusion, 200, 1.0, loops) for loops in (1, 2, 5, 10)]
    means, variances = [m[1].item() for m, _ in laws], [c[1, 1].item() for _, c in laws]
    assert means[0] < 0.72 * truth_mean and variances[0] > 1.6 * truth_variance
    gaps = [truth_mean - mean for mean in means]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.1 * gaps[0]
    assert abs(variances[-1] - truth_variance) < 0.15 * truth_variance


@pytest.mark.parametrize("t", [1, 100, 400, 1000])
def test_the_pull_with_the_right_variance_is_the_conditional_score(diffusion, t):
    """Of two Gaussian pixels, x_0's variance given x_t is the same everywhere: Var(k_0 | x_t) in place of the 1 − ᾱ_t
    of pixels without correlation makes the score that of q(x_t | k_0 = A) exactly."""
    x_t, times = torch.randn(6, 2, generator=seeded(3)), torch.full((6,), t)
    model = gaussian_noise(diffusion, COVARIANCE)
    plain, mask = model(x_t, times), torch.tensor([True, False])
    added = pull_known(model, diffusion, torch.tensor([A, 9.0]), mask)(x_t, times) - plain
    alpha_bar = diffusion.alphas_cumprod[t].double()
    noisy = alpha_bar * COVARIANCE + (1 - alpha_bar) * torch.eye(2, dtype=torch.float64)
    right = (COVARIANCE - alpha_bar * COVARIANCE @ torch.linalg.inv(noisy) @ COVARIANCE)[0, 0]
    mean = alpha_bar.sqrt() * A * COVARIANCE[0]  # of x_t given k_0 = A
    cov = noisy - alpha_bar * torch.outer(COVARIANCE[0], COVARIANCE[0])
    expected = (1 - alpha_bar).sqrt() * (x_t.double() - mean) @ torch.linalg.inv(cov)
    assert_close(plain + (1 - alpha_bar) / right * added, expected.float(), atol=2e-3, rtol=2e-3)


def test_one_pass_with_the_pull_comes_nearer_than_without(diffusion):
    model, known, mask = gaussian_noise(diffusion, COVARIANCE), torch.tensor([A, 0.0]), torch.tensor([True, False])
    masked = keep_known(pull_known(model, diffusion, known, mask), diffusion, known, mask)
    options = {"num_inference_steps": 100, "eta": 1.0, "clip_denoised": False, "generator": seeded(4)}
    x = last(sample_ddim(masked, diffusion, (20_000, 2), **options))
    assert_close(x[:, 0], torch.full((len(x),), A), atol=1e-5, rtol=0)
    # without the pull 0.63; the law of 1 − ᾱ_t by its affine recursion: mean 0.8594, deviation 0.4297
    assert abs(x[:, 1].mean() - 0.8594) < 4.5 * 0.43 / len(x) ** 0.5 and abs(x[:, 1].std() - 0.4297) < 0.011


def test_four_pixels_in_a_row_come_near_their_conditional_law(diffusion):
    """A small image: neighbours correlate, the two on the left are known. One pass is off, ten loops are not far."""
    place = torch.arange(4, dtype=torch.float64)
    covariance = torch.exp(-((place[:, None] - place) ** 2) / 4)
    known, g = torch.tensor([0.8, -0.4, 0.0, 0.0]), seeded(2)
    of_known = covariance[2:, :2] @ torch.linalg.inv(covariance[:2, :2])
    truth = of_known @ known[:2].double()
    truth_cov = covariance[2:, 2:] - of_known @ covariance[:2, 2:]
    mask, error = torch.tensor([True, True, False, False]), {}
    for loops in (1, 10):
        masked = keep_known(gaussian_noise(diffusion, covariance), diffusion, known, mask)
        options = {"num_inference_steps": 100, "eta": 1.0, "clip_denoised": False, "generator": g}
        sampler = partial(sample_ddim, masked, diffusion, (4000, 4), **options)
        x = last(resample(sampler, diffusion, torch.randn(4000, 4, generator=g), num_loops=loops, generator=g))
        assert_close(x[:, :2], known[:2].expand(4000, 2), atol=1e-5, rtol=0)
        unknown = x[:, 2:].double()
        error[loops] = ((unknown.mean(0) - truth).norm().item(), (unknown.T.cov() - truth_cov).norm().item())
    assert error[10][0] < 0.5 * error[1][0] and error[10][1] < 0.5 * error[1][1], error


# ------------------------------------------------------------------------------------------- going back and forth
@pytest.mark.parametrize("sampler, same", [(sample_ddim, sample_ddim), (sample_heun, sample_heun),
                                           (sample_dpmpp_2m, sample_ddim)])  # fmt: skip
def test_one_loop_is_the_sampler_itself(sampler, same, diffusion):
    """Or DDIM, for the solver that remembers its last step."""
    model, x_T, exact = gaussian_noise(diffusion, COVARIANCE), torch.randn(5, 2, generator=seeded()), sampler is same
    sampler, same = (
        partial(one, model, diffusion, x_T.shape, num_inference_steps=7, clip_denoised=False) for one in (sampler, same)
    )
    for ours, theirs in zip(resample(sampler, diffusion, x_T, num_loops=1), same(x_T=x_T), strict=True):
        assert ours.t == theirs.t
        assert torch.equal(ours.x_t, theirs.x_t) if exact else torch.allclose(ours.x_t, theirs.x_t, atol=1e-4)


def test_each_step_down_is_taken_num_loops_times(diffusion):
    times = []

    def model(x_t, t):
        times.append(t[0].item())
        return x_t

    sampler = partial(sample_ddim, model, diffusion, (2, 2), num_inference_steps=4)
    steps = list(resample(sampler, diffusion, torch.zeros(2, 2), num_loops=3, generator=seeded()))
    assert times == [1000] * 3 + [750] * 3 + [500] * 3 + [250] * 3
    assert [step.t for step in steps] == [750] * 3 + [500] * 3 + [250] * 3 + [0] * 3
    with pytest.raises(ValueError, match="num_loops must be an integer of at least 1.*got 0"):
        resample(sampler, diffusion, torch.zeros(2, 2), num_loops=0)  # at the call
    with pytest.raises(ValueError, match=r"shape asked for, \(2, 2\), got \(2, 3\)"):
        resample(sampler, diffusion, torch.zeros(2, 3), num_loops=2)


def test_add_noise_is_the_forward_steps_together(diffusion):
    """From s to t in one jump: mean and variance of t − s steps of DDPM eq. 2, one after the other."""
    for s, t in ((0, 1), (0, 400), (400, 425), (999, 1000), (30, 30)):
        mean, variance = 1.0, 0.0
        for beta in diffusion.exact_betas[s:t].tolist():
            mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        ones, zeros = torch.ones(1, 1), torch.zeros(1, 1)
        assert add_noise(diffusion, ones, s, t, zeros).item() == pytest.approx(mean, abs=1e-5)
        assert add_noise(diffusion, zeros, s, t, ones).item() == pytest.approx(math.sqrt(variance), abs=1e-4)
    for s, t in ((5, 4), (-1, 4)):
        with pytest.raises(ValueError, match=f"got {s} and t = {t}"):
            add_noise(diffusion, ones, s, t, zeros)
    with pytest.raises(ValueError, match=r"one shape, got \(1, 1\) and \(2, 1\)"):
        add_noise(diffusion, ones, 0, 4, torch.zeros(2, 1))


def test_the_same_generators_give_the_same_completion(diffusion):
    pairs = [complete_pair(diffusion, 5, 1.0, 2, count=10) for _ in range(2)]
    assert torch.equal(*pairs)
