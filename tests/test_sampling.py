"""Samplers against exact oracles: Gaussian data, the DDPM = DDIM(1) identity, and diffusers."""

import inspect
import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from torch.testing import assert_close

from ddpm_tutorial.diffusion import GaussianDiffusion, beta_schedule
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import (
    SAMPLERS,
    SampleStep,
    ddim_timesteps,
    path_timesteps,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_heun,
    sample_images,
)
from ddpm_tutorial.toy import GaussianMixture

MEAN, STD = torch.tensor([0.5, -1.0]), 0.4  # the Gaussian data of the exact tests
THEIR_NAMES = {"linear": "linear", "quadratic": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_model(diffusion):
    return GaussianMixture(MEAN[None], torch.tensor([STD])).noise_model(diffusion)


def run(steps):
    """The sample at the end of a sampler."""
    return list(steps)[-1].x_t


class Recorded:
    """A model whose inputs and outputs are kept, so that another implementation can be fed the same ones."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, x_t, t):
        self.calls.append((x_t, t, self.model(x_t, t)))
        return self.calls[-1][2]


def recorded_noise():
    """Its outputs are random."""
    generator = seeded(1)
    return Recorded(lambda x_t, t: torch.randn(x_t.shape, generator=generator))


# ----------------------------------------------------- exact output law on Gaussian data, in float64
def exact_law(betas, timesteps, sigma2, ddim: bool):
    """Mean (2,), variance and slope of the last x_t, when ε_θ is exact for N(MEAN, STD² I) and x_T ~ N(0, I).

    Every step is x' = a x + b + σ z, so m' = a m + b and v' = a² v + σ². ``sigma2(t, t_next)`` is the step's σ².
    """
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    mean, variance, slope = torch.zeros(2, dtype=torch.float64), 1.0, 1.0
    for t, t_next in zip(timesteps, [*timesteps[1:], 0], strict=True):
        now, then, s2 = alpha_bar[t], alpha_bar[t_next], sigma2(alpha_bar, t, t_next)
        gain = (1 - now).sqrt() / (now * STD**2 + 1 - now)  # ε(x) = gain · (x − √ᾱ_t MEAN)
        if ddim:  # DDIM eq. 12: x' = √(ᾱ'/ᾱ) x + k ε
            linear = (then / now).sqrt()
            k = (1 - then - s2).clamp(min=0).sqrt() - linear * (1 - now).sqrt()
        else:  # DDPM algorithm 2: x' = (x − β/√(1 − ᾱ) ε)/√α
            alpha = now / then
            linear, k = 1 / alpha.sqrt(), -(1 - alpha) / ((1 - now) * alpha).sqrt()
        a, b = linear + k * gain, -k * gain * now.sqrt() * MEAN.double()
        mean, variance, slope = a * mean + b, a**2 * variance + s2, a * slope
    return mean, variance, slope


def assert_law(samples, mean, variance):
    """Sample mean and variance of (N, 2) within 4.5 standard errors."""
    count = len(samples)
    assert ((samples.double().mean(0) - mean).abs() < 4.5 * (variance / count) ** 0.5).all()
    assert ((samples.double().var(0) - variance).abs() < 4.5 * variance * (2 / count) ** 0.5).all()


def posterior(alpha_bar, t, t_next):
    return (1 - alpha_bar[t_next]) / (1 - alpha_bar[t]) * (1 - alpha_bar[t] / alpha_bar[t_next])


def beta_unless_last(alpha_bar, t, t_next):
    return 1 - alpha_bar[t] / alpha_bar[t_next] if t_next > 0 else 0.0


@pytest.mark.parametrize("variance, sigma2", [("posterior", posterior), ("beta", beta_unless_last)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_output_law_is_the_exact_recursion(variance, sigma2, schedule):
    betas = beta_schedule(schedule, 40)
    diffusion = GaussianDiffusion(betas)
    samples = run(
        sample_ddpm(
            gaussian_model(diffusion), diffusion, (40_000, 2), clip_denoised=False, variance=variance,
            generator=seeded(),
        )
    )  # fmt: skip
    mean, var, _ = exact_law(betas, list(range(40, 0, -1)), sigma2, ddim=False)
    assert_law(samples, mean, var)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_inference_steps", [1, 2, 7, 50, 200])
def test_ddim_output_law_is_the_exact_recursion(eta, num_inference_steps):
    betas = beta_schedule("linear", 200)
    diffusion = GaussianDiffusion(betas)
    x_T = torch.randn(40_000, 2, generator=seeded(5))
    steps = sample_ddim(
        gaussian_model(diffusion), diffusion, x_T.shape, num_inference_steps=num_inference_steps, eta=eta,
        clip_denoised=False, x_T=x_T, generator=seeded(),
    )  # fmt: skip
    samples = run(steps)
    timesteps = ddim_timesteps(200, num_inference_steps)
    mean, var, slope = exact_law(betas, timesteps, lambda *step: eta**2 * posterior(*step), ddim=True)
    assert_law(samples, mean, var)
    if eta == 0:  # no noise: the sample is an affine function of x_T, point by point
        assert_close(samples, (mean + slope * x_T).float(), atol=2e-4, rtol=0)


def test_few_deterministic_steps_give_too_small_a_variance():
    """The recursion is the oracle because the ideal is not: with few steps DDIM's spread is well off the data's."""
    betas = beta_schedule("linear", 200)
    laws = [exact_law(betas, ddim_timesteps(200, n), lambda *step: 0.0, ddim=True)[1] for n in (2, 10, 200)]
    assert laws[0] < laws[1] < laws[2] < STD**2
    assert laws[0] < 0.5 * STD**2 and laws[2] > 0.9 * STD**2


# -------------------------------------------------------------------------- the same steps another way
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_with_eta_1_and_every_step_is_ddpm(clip, schedule):
    diffusion = GaussianDiffusion.from_schedule(schedule, 100)
    model = gaussian_model(diffusion)
    ddpm = sample_ddpm(model, diffusion, (16, 2), clip_denoised=clip, generator=seeded(3))
    ddim = sample_ddim(
        model, diffusion, (16, 2), num_inference_steps=100, eta=1.0, clip_denoised=clip, generator=seeded(3)
    )
    count = 0
    for a, b in zip(ddpm, ddim, strict=True):
        assert a.t == b.t
        assert_close(a.x_t, b.x_t, atol=1e-4, rtol=1e-4)
        assert_close(a.pred_x0, b.pred_x0, atol=1e-3, rtol=1e-3)
        count += 1
    assert count == 100


def their_scheduler(kind, schedule, clip, num_timesteps=1000, **options):
    scale = 1000 / num_timesteps
    return kind(
        num_train_timesteps=num_timesteps, beta_schedule=THEIR_NAMES[schedule], beta_start=scale * 1e-4,
        beta_end=scale * 0.02, clip_sample=clip, timestep_spacing="trailing", **options,
    )  # fmt: skip


def assert_same_steps(ours, model, scheduler, num_inference_steps, **step_options):
    """Each step of ``ours`` equals diffusers' from the same x_t, model output and generator. Their t is ours − 1."""
    scheduler.set_timesteps(num_inference_steps)
    arrived = list(ours)
    assert [t[0].item() - 1 for _, t, _ in model.calls] == scheduler.timesteps.tolist()
    assert [step.t for step in arrived] == [t[0].item() for _, t, _ in model.calls][1:] + [0]
    for step, (x_t, t, output) in zip(arrived, model.calls, strict=True):
        theirs = scheduler.step(output, t[0].item() - 1, x_t, **step_options)
        scale = max(1.0, step.pred_x0.abs().max().item())  # unclipped, x_0 is large where ᾱ_t is small
        assert_close(step.pred_x0 / scale, theirs.pred_original_sample / scale, atol=2e-4, rtol=0)
        assert_close(step.x_t, theirs.prev_sample, atol=1e-3 if not clip_of(scheduler) else 1e-4, rtol=1e-3)


def clip_of(scheduler):
    return scheduler.config.clip_sample


@pytest.mark.parametrize("schedule", THEIR_NAMES)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance, theirs", [("posterior", "fixed_small"), ("beta", "fixed_large")])
def test_ddpm_steps_equal_diffusers(schedule, clip, variance, theirs):
    diffusion, model = GaussianDiffusion.from_schedule(schedule, 100), recorded_noise()
    shape, generator = (2, 1, 4, 4), seeded(4)
    torch.randn(shape, generator=generator)  # ours draws x_T first; theirs starts after it
    ours = sample_ddpm(model, diffusion, shape, clip_denoised=clip, variance=variance, generator=seeded(4))
    scheduler = their_scheduler(DDPMScheduler, schedule, clip, 100, variance_type=theirs)
    assert_same_steps(ours, model, scheduler, 100, generator=generator)


@pytest.mark.parametrize("schedule", THEIR_NAMES)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_inference_steps", [1, 10, 40])
def test_ddim_steps_equal_diffusers(schedule, clip, eta, num_inference_steps):
    diffusion, model = GaussianDiffusion.from_schedule(schedule), recorded_noise()
    shape, generator = (2, 1, 4, 4), seeded(4)
    torch.randn(shape, generator=generator)
    ours = sample_ddim(
        model, diffusion, shape, num_inference_steps=num_inference_steps, eta=eta, clip_denoised=clip,
        generator=seeded(4),
    )  # fmt: skip
    scheduler = their_scheduler(DDIMScheduler, schedule, clip)
    options = {"eta": eta, "use_clipped_model_output": True, "generator": generator}
    assert_same_steps(ours, model, scheduler, num_inference_steps, **options)


def test_ddim_with_eta_1_is_the_strided_ddpm_of_diffusers():
    diffusion, model, generator = GaussianDiffusion.from_schedule("linear"), recorded_noise(), seeded(4)
    torch.randn(2, 1, 4, 4, generator=generator)
    ours = sample_ddim(model, diffusion, (2, 1, 4, 4), num_inference_steps=20, eta=1.0, generator=seeded(4))
    scheduler = their_scheduler(DDPMScheduler, "linear", True, variance_type="fixed_small")
    assert_same_steps(ours, model, scheduler, 20, generator=generator)


# ------------------------------------------------------------------------- second-order solvers of DDIM's ODE
class Counted:
    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, x_t, t):
        self.calls += 1
        return self.model(x_t, t)


THEIR_SOLVERS = {"ddim": DDIMScheduler, "heun": HeunDiscreteScheduler, "dpmpp-2m": DPMSolverMultistepScheduler}


@torch.no_grad()
def solved_by_diffusers(name, model, diffusion, x_T, num_inference_steps, clip=False):
    options = {} if name == "dpmpp-2m" else {"clip_sample": clip}  # theirs of that name clips for other models only
    step_options = {"use_clipped_model_output": clip} if name == "ddim" else {}
    scheduler = THEIR_SOLVERS[name](trained_betas=diffusion.betas[1:].numpy(), timestep_spacing="trailing", **options)
    scheduler.set_timesteps(num_inference_steps)
    x = x_T / diffusion.sqrt_alphas_cumprod[-1] if name == "heun" else x_T  # there they follow x / sqrt(alpha_bar)
    for t in scheduler.timesteps:
        noise = model(scheduler.scale_model_input(x, t), torch.full((len(x),), int(t) + 1))
        x = scheduler.step(noise, t, x, **step_options).prev_sample
    return x


@pytest.mark.parametrize("schedule", ["linear", "quadratic"])
@pytest.mark.parametrize("num_inference_steps", [1, 2, 10, 25])
@pytest.mark.parametrize("name", ["heun", "dpmpp-2m"])
def test_second_order_solvers_equal_diffusers(name, num_inference_steps, schedule):
    diffusion = GaussianDiffusion.from_schedule(schedule)
    model, x_T = Counted(gaussian_model(diffusion)), torch.randn(5, 2, generator=seeded())
    options = {"num_inference_steps": num_inference_steps, "clip_denoised": False, "x_T": x_T}
    ours = run(SAMPLERS[name](model, diffusion, (5, 2), **options))
    assert model.calls == (2 * num_inference_steps - 1 if name == "heun" else num_inference_steps)
    theirs = solved_by_diffusers(name, model, diffusion, x_T, num_inference_steps)
    assert_close(ours, theirs, atol=2e-4 if name == "heun" else 2e-3, rtol=1e-3)


@pytest.mark.parametrize("name, clip", [*itertools.product(THEIR_SOLVERS, [False]), ("ddim", True), ("heun", True)])
def test_solvers_equal_diffusers_on_the_shipped_network(name, clip):
    model = NoisePredictor.from_pretrained()
    diffusion = model.diffusion
    x_T = torch.randn(2, 1, 28, 28, generator=seeded())
    ours = run(SAMPLERS[name](model, diffusion, x_T.shape, num_inference_steps=8, clip_denoised=clip, x_T=x_T))
    theirs = solved_by_diffusers(name, model, diffusion, x_T, 8, clip)
    assert ours.std() > 0.3  # images, not a constant
    assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("clip", [True, False])
def test_strided_ddpm_equals_diffusers_on_the_shipped_network(clip):
    model = Recorded(NoisePredictor.from_pretrained())
    diffusion = model.model.diffusion
    x_T = torch.randn(2, 1, 28, 28, generator=seeded())
    options = {"clip_denoised": clip, "x_T": x_T, "generator": seeded(5)}
    ours = sample_ddim(model, diffusion, x_T.shape, num_inference_steps=12, eta=1.0, **options)
    scheduler = their_scheduler(DDPMScheduler, "linear", clip, variance_type="fixed_small")
    assert_same_steps(ours, model, scheduler, 12, generator=seeded(5))


def test_ddim_is_of_first_order_and_both_solvers_of_second():
    """On Gaussian data the ODE's path is known, x_t = √ᾱ MEAN + √(ᾱ STD² + 1 − ᾱ) · z. Compared at t = 200, half the
    step leaves half the error, or a quarter."""
    diffusion = GaussianDiffusion(beta_schedule("linear", 1000))
    z = torch.randn(200, 2, generator=seeded())

    def path(t):
        a = diffusion.alphas_cumprod[t]
        return a.sqrt() * MEAN + (a * STD**2 + 1 - a).sqrt() * z

    def error(sampler, count):
        model = gaussian_model(diffusion)
        steps = sampler(model, diffusion, (200, 2), num_inference_steps=count, clip_denoised=False, x_T=path(1000))
        return next((step.x_t - path(200)).abs().mean().item() for step in steps if step.t == 200)

    for sampler, order in ((sample_ddim, 1), (sample_heun, 2), (sample_dpmpp_2m, 2)):
        rate = torch.tensor(error(sampler, 25) / error(sampler, 50)).log2().item()
        assert abs(rate - order) < 0.35, (sampler.__name__, rate)


# ------------------------------------------------------------------------------------------- timesteps
@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 100, 1000])
def test_ddim_timesteps_start_at_T_and_strictly_fall(num_timesteps):
    for count in range(1, num_timesteps + 1):
        timesteps = ddim_timesteps(num_timesteps, count)
        assert len(timesteps) == count and timesteps[0] == num_timesteps and timesteps[-1] >= 1
        gaps = [a - b for a, b in itertools.pairwise([*timesteps, 0])]
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1  # as even as integers allow
    assert timesteps == list(range(num_timesteps, 0, -1))


@pytest.mark.parametrize("count", [0, -3, 1001, 2.5, True])
def test_ddim_timesteps_refuse_a_bad_count(count):
    with pytest.raises(ValueError, match="num_inference_steps"):
        ddim_timesteps(1000, count)


def test_steps_even_in_u_visit_the_timesteps_that_lie_nearest():
    diffusion = GaussianDiffusion.from_schedule("linear", 1000)
    alpha_bar = diffusion.alphas_cumprod.double()
    u = (1 - alpha_bar).sqrt() / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())
    visited = path_timesteps(diffusion, 8)
    assert visited[0] == 1000 and (u[visited] - torch.arange(8, 0, -1) / 8).abs().max() < 0.01
    many = path_timesteps(diffusion, 1000)  # the first steps in u are longer than a thousandth
    assert many[0] == 1000 and many[-1] == 1 and all(a > b for a, b in itertools.pairwise(many)) and len(many) < 1000
    mixture, x_T = GaussianMixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.1, 0.1])), torch.randn(4, 1)
    for sampler in (sample_ddim, sample_heun, sample_dpmpp_2m):
        options = {"num_inference_steps": 8, "spacing": "u", "x_T": x_T}
        steps = sampler(mixture.noise_model(diffusion), diffusion, x_T.shape, **options)
        assert [step.t for step in steps] == [*visited[1:], 0]
        steps = sampler(mixture.noise_model(diffusion), diffusion, x_T.shape, start=300, **options)
        assert [step.t for step in steps] == [*(t for t in visited if t < 300), 0]
    for count in (0, -3, 1001, 2.5):
        with pytest.raises(ValueError, match="num_inference_steps must be an integer in 1 … 1000"):
            path_timesteps(diffusion, count)
    with pytest.raises(ValueError, match="spacing must be 't' or 'u', got 'log'"):
        sample_ddim(mixture.noise_model(diffusion), diffusion, x_T.shape, spacing="log")


# --------------------------------------------------------------------------------- contract of samplers
@pytest.mark.parametrize("name", SAMPLERS)
def test_same_generator_same_sample_and_another_seed_another(name):
    diffusion = GaussianDiffusion.from_schedule("linear", 50)
    model = gaussian_model(diffusion)
    options = {"eta": 0.5} if name == "ddim" else {}

    def sample(seed):
        return run(SAMPLERS[name](model, diffusion, (8, 2), generator=seeded(seed), **options))

    before = torch.get_rng_state()
    assert torch.equal(sample(0), sample(0))
    assert not torch.allclose(sample(0), sample(1))
    assert torch.equal(torch.get_rng_state(), before)  # the global seed is never touched


@pytest.mark.parametrize("name", SAMPLERS)
def test_x_T_replaces_the_first_noise(name):
    diffusion, model = GaussianDiffusion.from_schedule("linear", 50), recorded_noise()
    x_T = torch.randn(3, 2, generator=seeded(9))
    first = next(SAMPLERS[name](model, diffusion, x_T.shape, x_T=x_T, generator=seeded()))
    x_t, t, _ = model.calls[0]
    assert torch.equal(x_t, x_T) and t.tolist() == [50] * 3 and not t.is_floating_point()
    assert isinstance(first, SampleStep) and first.x_t.shape == x_T.shape


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_are_lazy_and_keep_no_graph(name):
    evaluations = 2 if name == "heun" else 1  # a step
    diffusion, weight = GaussianDiffusion.from_schedule("linear", 50), torch.ones(1, requires_grad=True)
    calls = []

    def model(x_t, t):
        calls.append(t)
        return weight * x_t

    steps = SAMPLERS[name](model, diffusion, (2, 1, 4, 4), generator=seeded())
    assert calls == []
    for count, step in enumerate(steps, start=1):
        assert len(calls) == evaluations * count and not step.x_t.requires_grad and not step.pred_x0.requires_grad
        assert torch.is_grad_enabled()  # the caller's code between steps is not under no_grad
        if count == 3:
            break
    assert len(calls) == evaluations * 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_clipping_keeps_pred_x0_in_range_and_the_last_step_is_pred_x0(name):
    diffusion = GaussianDiffusion.from_schedule("linear", 50)
    for clip in (True, False):
        options = {} if name == "ddpm" else {"num_inference_steps": 50}
        sampler, model = SAMPLERS[name], recorded_noise()
        steps = list(sampler(model, diffusion, (4, 2), clip_denoised=clip, generator=seeded(), **options))
        largest = max(step.pred_x0.abs().max().item() for step in steps)
        assert (largest <= 1) == clip
        assert_close(steps[-1].x_t, steps[-1].pred_x0)  # β̃_1 = 0, and x_0 has no noise left
        assert [step.t for step in steps] == list(range(49, -1, -1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_x_T_of_another_shape_is_refused(name):
    diffusion = GaussianDiffusion.from_schedule("linear", 50)
    with pytest.raises(ValueError, match=r"x_T must have the shape asked for, \(2, 3\), got \(3, 2\)"):
        SAMPLERS[name](recorded_noise(), diffusion, (2, 3), x_T=torch.zeros(3, 2))


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_bad_eta_is_refused(eta):
    with pytest.raises(ValueError, match="eta must lie in"):
        sample_ddim(recorded_noise(), GaussianDiffusion.from_schedule("linear", 50), (1, 2), eta=eta)


def test_unknown_variance_is_refused():
    with pytest.raises(ValueError, match="'posterior' or 'beta', got 'learned'"):
        sample_ddpm(recorded_noise(), GaussianDiffusion.from_schedule("linear", 50), (1, 2), variance="learned")


def test_more_steps_than_T_are_refused():
    with pytest.raises(ValueError, match=r"num_inference_steps must be an integer in 1 … 50 \(T\), got 51"):
        sample_ddim(recorded_noise(), GaussianDiffusion.from_schedule("linear", 50), (1, 2), num_inference_steps=51)


def test_sample_images_are_the_last_step_as_uint8():
    def steps():
        yield SampleStep(1, torch.full((1, 1, 2, 2), 0.3), torch.zeros(1, 1, 2, 2))
        yield SampleStep(0, torch.tensor([-7.0, -1.0, 0.0, 3.0]).view(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))

    images = sample_images(steps())
    assert images.dtype == torch.uint8 and images.flatten().tolist() == [0, 0, 128, 255]


def test_sample_images_from_a_sampler():
    diffusion = GaussianDiffusion.from_schedule("linear", 50)
    images = sample_images(
        sample_ddim(recorded_noise(), diffusion, (3, 1, 4, 4), num_inference_steps=5, generator=seeded())
    )
    assert images.shape == (3, 1, 4, 4) and images.dtype == torch.uint8


# --------------------------------------------------------------------------------------- starting part-way
@pytest.mark.parametrize("name", SAMPLERS)
def test_start_takes_the_rest_of_the_same_steps(name):
    """Stopped on the way and started again from there, a sampler without memory and noise goes the same way."""
    diffusion = GaussianDiffusion.from_schedule("linear", 60)
    model = gaussian_model(diffusion)
    options = {"clip_denoised": False} | ({} if name == "ddpm" else {"num_inference_steps": 12})
    whole = list(SAMPLERS[name](model, diffusion, (5, 2), generator=seeded(), **options))
    half_way = whole[len(whole) // 2]
    rest = list(
        SAMPLERS[name](model, diffusion, (5, 2), x_T=half_way.x_t, start=half_way.t, generator=seeded(), **options)
    )
    assert [step.t for step in rest] == [step.t for step in whole if step.t < half_way.t]
    if name in ("ddim", "heun"):
        assert_close(rest[-1].x_t, whole[-1].x_t)


def test_a_short_first_step_does_not_multiply_the_errors_of_the_model():
    """From 501 on the list 1000, 900 … the first step is 1 long and the next 100. An error that changes its sign from
    one timestep to the next must not be carried on along that line."""
    diffusion = GaussianDiffusion.from_schedule("linear", 1000)
    exact = gaussian_model(diffusion)

    def erring(x_t, t):
        return exact(x_t, t) + 0.01 * (-1.0) ** t[:, None]

    def error(start):
        x_start = torch.randn(200, 2, generator=seeded())
        options = {"num_inference_steps": 10, "clip_denoised": False, "x_T": x_start, "start": start}
        ends = [list(sample_dpmpp_2m(model, diffusion, (200, 2), **options))[-1].x_t for model in (exact, erring)]
        return (ends[0] - ends[1]).abs().mean().item()

    assert error(501) < 2 * error(500)


@pytest.mark.parametrize("name", SAMPLERS)
def test_start_between_two_timesteps(name):
    diffusion, model = GaussianDiffusion.from_schedule("linear", 60), recorded_noise()
    options = {} if name == "ddpm" else {"num_inference_steps": 6}
    steps = SAMPLERS[name](model, diffusion, (2, 2), x_T=torch.zeros(2, 2), start=33, generator=seeded(), **options)
    assert [step.t for step in steps] == (list(range(32, -1, -1)) if name == "ddpm" else [30, 20, 10, 0])
    assert model.calls[0][1].tolist() == [33, 33]


@pytest.mark.parametrize("name", SAMPLERS)
def test_start_needs_x_T_and_a_timestep_of_the_chain(name):
    diffusion = GaussianDiffusion.from_schedule("linear", 60)
    for start in (0, 61, -1, 2.5, True):
        with pytest.raises(ValueError, match=rf"start must lie in 1 … 60 \(T\), got {start}"):
            SAMPLERS[name](recorded_noise(), diffusion, (1, 2), x_T=torch.zeros(1, 2), start=start)
    with pytest.raises(ValueError, match="start=30 needs x_T"):
        SAMPLERS[name](recorded_noise(), diffusion, (1, 2), start=30)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("x_T", [None, torch.zeros(3, 2)])
def test_generators_are_one_or_one_an_image(name, x_T):
    diffusion = GaussianDiffusion.from_schedule("linear", 60)
    for bad in ([seeded()], 4 * [seeded()], 0, 3 * [0], "123"):
        with pytest.raises(ValueError, match="generator must be one, or 3, one for each image; got"):
            SAMPLERS[name](recorded_noise(), diffusion, (3, 2), x_T=x_T, generator=bad)
    SAMPLERS[name](recorded_noise(), diffusion, (3, 2), x_T=x_T, generator=[seeded(), None, seeded()])


@pytest.mark.parametrize("name", SAMPLERS)
def test_arguments_are_refused_at_the_call(name):
    """Before the first step is asked for; the model is not called, and no noise is drawn."""
    diffusion, model, generator = GaussianDiffusion.from_schedule("linear", 60), recorded_noise(), seeded()
    before = generator.get_state()
    with pytest.raises(TypeError, match="num_steps"):
        SAMPLERS[name](model, diffusion, (1, 2), num_steps=5)
    with pytest.raises(TypeError, match="shape"):
        SAMPLERS[name](model, diffusion)
    for shape in (3, None, (2, -1), (2, 1.5)):
        with pytest.raises(ValueError, match="shape must be that of the samples"):
            SAMPLERS[name](model, diffusion, shape)
    for x_T in (torch.zeros(1, 2).byte(), torch.zeros(1, 2).long(), [[0.0, 0.0]]):
        with pytest.raises(ValueError, match="x_T must be floats"):
            SAMPLERS[name](model, diffusion, (1, 2), x_T=x_T)
    SAMPLERS[name](model, diffusion, (1, 2), generator=generator)
    assert not model.calls and torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_check_leaves_a_sampler_its_signature_and_its_source(name):
    sampler = SAMPLERS[name]
    source = inspect.getsource(sampler)
    assert list(inspect.signature(sampler).parameters)[:3] == ["model", "diffusion", "shape"]
    assert f"def {sampler.__name__}(" in source and "yield SampleStep(" in source
    assert sampler.__doc__.startswith(("Ancestral", "DDIM", "Heun", "DPM"))


def test_samples_that_begin_part_way_have_the_data_s_law():
    """x_start drawn from q(x_t) is exact, so the law at the end is the recursion from there."""
    betas, start = beta_schedule("linear", 200), 120
    diffusion = GaussianDiffusion(betas)
    data = MEAN + STD * torch.randn(40_000, 2, generator=seeded(1))
    x_start = diffusion.q_sample(data, start, torch.randn(data.shape, generator=seeded(2)))
    steps = sample_ddpm(
        gaussian_model(diffusion), diffusion, data.shape, clip_denoised=False, x_T=x_start, start=start,
        generator=seeded(3),
    )  # fmt: skip
    samples = run(steps)
    assert ((samples.mean(0) - MEAN).abs() < 0.02).all() and ((samples.std(0) - STD).abs() < 0.02).all()


# ------------------------------------------------------------------------------ one generator for each image
@pytest.mark.parametrize("name", SAMPLERS)
def test_with_a_generator_each_an_image_does_not_depend_on_the_others(name):
    diffusion = GaussianDiffusion.from_schedule("linear", 30)
    model = gaussian_model(diffusion)
    options = {"eta": 1.0} if name == "ddim" else {}
    options |= {} if name == "ddpm" else {"num_inference_steps": 6}

    def draw(seeds):
        generators = [seeded(seed) for seed in seeds]
        return run(SAMPLERS[name](model, diffusion, (len(seeds), 2), generator=generators, **options))

    together = draw([5, 6, 7, 8])
    assert_close(draw([7]), together[2:3])
    assert_close(torch.cat([draw([5, 6, 7]), draw([8])]), together)
    assert not torch.allclose(together[0], together[1])
