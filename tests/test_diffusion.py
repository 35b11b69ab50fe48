"""Chapter 1's module: schedules, tables, the forward process and its exact posterior."""

import math
import warnings

import pytest
import torch
from diffusers import DDPMScheduler
from pretend_mps import DEVICE, PretendMPS
from torch.testing import assert_close

from ddpm_tutorial.diffusion import SCHEDULES, GaussianDiffusion, beta_schedule, cosine_beta_schedule, randn_like

# The names that diffusers gives to the same schedules, at T = 1000 where no scaling applies.
DIFFUSERS = {"linear": "linear", "quadratic": "scaled_linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}


@pytest.fixture(params=list(SCHEDULES))
def diffusion(request):
    return GaussianDiffusion.from_schedule(request.param, 1000)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_those_of_diffusers(name):
    theirs = DDPMScheduler(1000, beta_schedule=DIFFUSERS[name], clip_sample=False)
    ours = GaussianDiffusion.from_schedule(name, 1000)
    assert_close(ours.betas[1:], theirs.betas, rtol=2e-4, atol=1e-7)  # theirs are computed in float32
    assert_close(ours.alphas_cumprod[1:], theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [50, 100, 300, 1000, 4000])
def test_every_schedule_reaches_noise_at_every_length(name, num_timesteps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusion = GaussianDiffusion.from_schedule(name, num_timesteps)
    assert diffusion.betas.shape == (num_timesteps + 1,)
    assert diffusion.alphas_cumprod[-1].sqrt() < 0.05


def test_unscaled_linear_schedule_of_300_steps_is_reported():
    """The published trap: DDPM's betas on 300 steps keep a fifth of the signal."""
    with pytest.warns(UserWarning, match="never reaches noise"):
        diffusion = GaussianDiffusion(torch.linspace(1e-4, 0.02, 300))
    assert diffusion.alphas_cumprod[-1].sqrt() == pytest.approx(0.22, abs=0.005)


def test_tables_have_entry_0_for_clean_data(diffusion):
    assert len(diffusion.betas) == len(diffusion.alphas_cumprod) == 1001
    assert diffusion.betas[0] == 0 and diffusion.alphas[0] == 1 and diffusion.alphas_cumprod[0] == 1
    assert diffusion.posterior_variance[1] == 0
    assert all(table.dtype == torch.float32 for table in diffusion.buffers())
    x_0 = torch.randn(3, 2)
    assert_close(diffusion.q_sample(x_0, 0, torch.randn(3, 2)), x_0)


def test_alphas_cumprod_is_the_product_in_float64():
    betas = torch.rand(1000, dtype=torch.float64) * 0.02 + 1e-5
    product, expected = 1.0, []
    for beta in betas.tolist():
        product *= 1 - beta
        expected.append(product)
    assert_close(GaussianDiffusion(betas).alphas_cumprod[1:], torch.tensor(expected), rtol=1e-6, atol=0)


def test_chained_steps_have_the_moments_of_the_closed_form():
    """Every chain starts at its own fixed point, so mean and variance of q(x_t | x_0) are compared exactly."""
    diffusion, count = GaussianDiffusion.from_schedule("linear", 200), 40_000
    start = torch.tensor([-1.0, 0.5])
    for t, x_t in diffusion.q_chain(start.expand(count, 2), torch.Generator().manual_seed(1)):
        if t in (1, 20, 100, 200):
            alpha_bar_t = diffusion.alphas_cumprod[t].item()
            variance = 1 - alpha_bar_t
            error = (x_t.mean(0) - math.sqrt(alpha_bar_t) * start) / math.sqrt(variance / count)
            assert error.abs().max() < 4
            error = (x_t.var(0) - variance) / (variance * math.sqrt(2 / (count - 1)))
            assert error.abs().max() < 4


def test_chained_mean_and_variance_follow_the_recursion_exactly(diffusion):
    """Without sampling: m_t = √α_t m_{t−1} and v_t = α_t v_{t−1} + β_t, in float64, give √ᾱ_t and 1 − ᾱ_t."""
    mean, variance = 1.0, 0.0
    betas = diffusion.exact_betas.tolist()
    for t, beta in enumerate(betas, start=1):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        if t % 100 == 0:
            assert_close(diffusion.sqrt_alphas_cumprod[t].item(), mean, rtol=1e-5, atol=1e-9)
            assert_close(diffusion.sqrt_one_minus_alphas_cumprod[t].item() ** 2, variance, rtol=1e-5, atol=0)


def test_posterior_equals_bayes_rule_on_a_grid():
    """q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0), integrated numerically."""
    diffusion = GaussianDiffusion.from_schedule("linear", 100)
    for t, x_0, x_t in [(2, 0.4, 0.1), (30, -1.0, 0.7), (100, 0.9, -2.0)]:
        before, beta = diffusion.alphas_cumprod[t - 1].double(), diffusion.betas[t].double()
        grid = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
        log_density = -((x_t - (1 - beta).sqrt() * grid) ** 2) / (2 * beta)
        log_density -= (grid - before.sqrt() * x_0) ** 2 / (2 * (1 - before))
        weight = log_density.softmax(0)
        mean = (weight * grid).sum()
        variance = (weight * (grid - mean) ** 2).sum()
        got_mean, got_variance = diffusion.q_posterior(torch.tensor([x_0]), torch.tensor([x_t]), t)
        assert_close(got_mean.item(), mean.item(), rtol=1e-4, atol=1e-5)
        assert_close(got_variance.item(), variance.item(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_posterior_equals_that_of_diffusers(name, generator):
    theirs = DDPMScheduler(1000, beta_schedule=DIFFUSERS[name], clip_sample=False, prediction_type="sample")
    ours = GaussianDiffusion.from_schedule(name, 1000)
    x_0, x_t = torch.randn(2, 4, 1, 8, 8, generator=generator)
    for t in (2, 17, 500, 999):
        step = theirs.step(x_0, t - 1, x_t, generator=torch.Generator().manual_seed(3))
        mean, variance = ours.q_posterior(x_0, x_t, t)
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(3))
        # Theirs are products in float32: 1 − ᾱ_t is 4e-5 at the cosine's first steps, known to a few parts in 1,000.
        assert_close(mean + variance.sqrt() * noise, step.prev_sample, rtol=0, atol=3e-3)


def test_posterior_at_the_first_step_is_x0():
    diffusion = GaussianDiffusion.from_schedule("linear")
    x_0, x_1 = torch.randn(2, 5, 3)
    mean, variance = diffusion.q_posterior(x_0, x_1, 1)
    assert_close(mean, x_0)
    assert variance == 0


def test_predict_x0_and_predict_noise_invert_q_sample(diffusion, generator):
    x_0, noise = torch.randn(2, 64, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.randint(1, 1000, (64,), generator=generator)  # below T: there cosine leaves 5e-5 of the signal
    x_t = diffusion.q_sample(x_0, t, noise)
    assert_close(diffusion.predict_x0(x_t, t, noise), x_0, rtol=0, atol=1e-6)
    assert_close(diffusion.predict_noise(x_t, t, x_0), noise, rtol=0, atol=1e-6)


def test_integer_t_equals_a_batch_of_it(diffusion, generator):
    x_0, noise = torch.randn(2, 4, 2, generator=generator)
    batch = torch.full((4,), 321)
    assert_close(diffusion.q_sample(x_0, 321, noise), diffusion.q_sample(x_0, batch, noise))
    mean, variance = diffusion.q_posterior(x_0, noise, batch)
    assert mean.shape == (4, 2) and variance.shape == (4, 1)
    assert_close(mean, diffusion.q_posterior(x_0, noise, 321)[0])


def test_snr_falls(diffusion):
    snr = diffusion.snr()
    assert math.isinf(snr[0]) and (snr[1:].diff() < 0).all()


def test_bad_input_says_what_is_allowed():
    diffusion = GaussianDiffusion.from_schedule("linear", 1000)
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="unknown schedule 'cosin'.*linear, cosine"):
        beta_schedule("cosin", 1000)
    with pytest.raises(ValueError, match="at least 21"):
        beta_schedule("linear", 10)
    for count in (0, -5, 2.5, True):
        with pytest.raises(ValueError, match="integer of at least 1"):
            cosine_beta_schedule(count)
    for betas in ([0.1, 1.2], [0.0, 0.1], [float("nan")]):
        with pytest.raises(ValueError, match=r"\(0, 1\)"):
            GaussianDiffusion(torch.tensor(betas))
    with pytest.raises(ValueError, match=r"shape \(T,\)"):
        GaussianDiffusion(torch.zeros(2, 2))
    for t in (-1, 1001, torch.tensor([1, 2, 3, 1001])):
        with pytest.raises(ValueError, match="0 … 1000"):
            diffusion.q_sample(x, t, x)
    with pytest.raises(ValueError, match="1 … 1000"):
        diffusion.predict_noise(x, 0, x)
    for t in (torch.tensor([1, 2]), torch.ones(4), torch.ones(4).bool(), torch.tensor(3), True, 2.5, "3", None):
        with pytest.raises(ValueError, match=r"shape \(4,\)"):
            diffusion.q_sample(x, t, x)
    with pytest.raises(ValueError, match="one shape"):
        diffusion.q_sample(x, 1, torch.zeros(4, 3))
    for count in (0, 10**30):
        with pytest.raises(ValueError, match="num_timesteps must be an integer of at least 1, at most 1000000, got"):
            beta_schedule("linear", count)
    with pytest.raises(ValueError, match="unknown schedule"):
        beta_schedule([], 1000)


def test_integers_of_any_size_are_timesteps():
    diffusion, x = GaussianDiffusion.from_schedule("linear", 100), torch.randn(2, 3)
    expected = diffusion.q_sample(x, torch.tensor([1, 100]), x)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(diffusion.q_sample(x, torch.tensor([1, 100], dtype=dtype), x), expected)


def test_images_that_are_no_floats_are_refused():
    """uint8 images would be taken for numbers of 0 … 255, where the formulas want [−1, 1]."""
    diffusion, bytes_, x = GaussianDiffusion.from_schedule("linear"), torch.zeros(2, 3).byte(), torch.zeros(2, 3)
    pairs = ("q_step", "q_sample", "predict_x0", "predict_noise", "mean_from_noise", "predict_v", "x0_from_v")
    for name in pairs:
        for first, second in ((bytes_, x), (x, bytes_)):
            with pytest.raises(ValueError, match=r"must be floats, got torch.uint8 \(data.to_model_range"):
                getattr(diffusion, name)(first, 5, second)
    with pytest.raises(ValueError, match="floats"):
        diffusion.q_posterior(bytes_, x, 5)
    with pytest.raises(ValueError, match="floats"):
        randn_like(bytes_)


def test_the_range_of_t_is_not_read_from_another_device():
    """On a GPU the host would wait for it, in every step."""
    with PretendMPS() as mode:
        diffusion, x = GaussianDiffusion.from_schedule("linear").to(DEVICE), torch.ones(2, 3, device=DEVICE)
        t = torch.tensor([5, 7]).to(DEVICE)
        mode.waits.clear()
        diffusion.q_sample(x, t, x)
        assert mode.waits == []
        x.sum().item()
        assert mode.waits == ["aten::_local_scalar_dense"]


def test_noise_from_a_generator_each_is_that_of_each_alone():
    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    x = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    noise = randn_like(x, [seeded(seed) for seed in (3, 4, 5)])
    assert noise.shape == x.shape and noise.dtype == x.dtype
    for i in range(3):
        assert torch.equal(noise[i], randn_like(x[i], seeded(3 + i)))  # to the last bit
    with pytest.raises(ValueError, match="3 items need as many generators, got 2"):
        randn_like(x, [seeded(0), seeded(1)])
