"""A network, what its output means and its diffusion are one thing: it answers with noise by chapter 3's formulas, is
saved and loaded whole, and no other diffusion gets at it, however it is wrapped."""

import json

import pytest
import torch
from pretend_mps import DEVICE, PretendMPS
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ddpm_tutorial.data import CLASS_NAMES
from ddpm_tutorial.diffusion import SCHEDULES, GaussianDiffusion, check_diffusion
from ddpm_tutorial.editing import keep_known, pull_known
from ddpm_tutorial.elbo import bits_per_dim, vlb_term
from ddpm_tutorial.flow import velocity_of
from ddpm_tutorial.guidance import classifier_free, classifier_guidance, guided_between, rescaled
from ddpm_tutorial.metrics import NoisyClassifier
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import SAMPLERS, sample_ddim
from ddpm_tutorial.settings import TARGETS
from ddpm_tutorial.toy import GaussianMixture
from ddpm_tutorial.unet import UNet

SHAPE, LABELS = (2, 1, 8, 8), torch.tensor([0, 2])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def predictor(target="v", diffusion=None, class_names=None, image_shape=(1, 8, 8), **options) -> NoisePredictor:
    """Every weight random, so that labels, t and each pixel count."""
    unet = UNet(**{"channels": 8, "patch_size": 2, "num_classes": 3} | options)
    for i, parameter in enumerate(unet.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=seeded(i))
    diffusion = diffusion or GaussianDiffusion.from_schedule()
    return NoisePredictor(unet, diffusion, target, image_shape, class_names).eval().requires_grad_(False)


# -------------------------------------------------------------------------------------- what its output stands for
@pytest.fixture(params=SCHEDULES)
def drawn(request):
    """t with both ends, x_0, noise, (B, 3, 4, 4) float64, and √ᾱ_t, √(1 − ᾱ_t), (B, 1, 1, 1), computed here."""
    diffusion = GaussianDiffusion.from_schedule(request.param)
    t = torch.tensor([1, 2, 20, 500, 900, 999])  # at T the cosine schedule leaves 5e-5 of x_0, and float32 no digits
    x_0, noise = torch.randn(2, len(t), 3, 4, 4, generator=seeded(), dtype=torch.float64)
    alpha_bar = (1 - diffusion.exact_betas).cumprod(0)[t - 1].view(-1, 1, 1, 1)
    return diffusion, t, x_0, noise, alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_wanted_of_the_network_is_the_noise_again(target, drawn):
    """Training asks for ``wanted``; ``to_noise`` of exactly that is exactly the noise that was drawn."""
    diffusion, t, x_0, noise, signal, sigma = drawn
    model, x_t = predictor(target, diffusion), signal * x_0 + sigma * noise
    formulas = {"noise": noise, "v": signal * noise - sigma * x_0, "x_0": x_0, "velocity": noise - x_0}
    wanted = model.wanted(x_0, t, noise)
    assert_close(wanted, formulas[target], rtol=0, atol=2e-6)  # the tables are float32
    assert_close(model.to_noise(wanted, x_t, t), noise, rtol=0, atol=2e-5 if target == "x_0" else 2e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_any_output_becomes_noise_by_the_formulas(target, drawn):
    diffusion, t, output, x_t, signal, sigma = drawn
    formulas = {"noise": output, "v": sigma * x_t + signal * output, "x_0": (x_t - signal * output) / sigma}
    formulas["velocity"] = (x_t + signal * output) / (signal + sigma)  # chapter 10
    assert_close(predictor(target, diffusion).to_noise(output, x_t, t), formulas[target], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_it_answers_with_the_noise_of_its_networks_output(target):
    diffusion = GaussianDiffusion.from_schedule("cosine", 50)
    model = predictor(target, diffusion)
    x_t, t, labels = torch.randn(4, 1, 8, 8, generator=seeded()), torch.tensor([1, 10, 40, 50]), torch.arange(4)
    for given in (labels, None):
        output = model.unet(x_t, t, given)
        assert torch.equal(model(x_t, t, given), model.to_noise(output, x_t, t))
    assert torch.equal(model(x_t, t), model(x_t, t, torch.full((4,), 3)))  # without labels, the null label
    assert (model(x_t, t, labels)[:3] - model(x_t, t)[:3]).abs().amax((1, 2, 3)).min() > 1e-3


def test_a_fresh_network_that_gives_v_passes_the_noisy_image_on():
    model = NoisePredictor(UNet(channels=16), GaussianDiffusion.from_schedule(), "v")
    x_t, t = torch.randn(2, 1, 8, 8, generator=seeded()), torch.tensor([1, 1000])
    assert_close(model(x_t, t), model.diffusion.sqrt_one_minus_alphas_cumprod[t].view(2, 1, 1, 1) * x_t)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([0, 5], "t must lie in 1 … 100, got values from 0 to 5"),
        ([-1, 5], "from -1 to 5"),
        ([5, 101], "from 5 to 101"),
        ([1.0, 2.0], r"integers of shape \(2,\) .*got torch.float32"),
        ([True, True], "got torch.bool"),
        ([1, 2, 3], r"got torch.int64 of shape \(3,\)"),
    ],
)
def test_wrong_timesteps_are_refused(target, t, message):
    model = predictor(target, GaussianDiffusion.from_schedule("linear", 100))
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(SHAPE), torch.tensor(t))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_read_from_another_device(target):
    with PretendMPS() as mode:
        model = predictor(target).to(DEVICE)
        assert model.device == DEVICE
        x_t, t, labels = torch.zeros(SHAPE, device=DEVICE), torch.tensor([1, 2]).to(DEVICE), LABELS.to(DEVICE)
        mode.waits.clear()
        model(x_t, t, labels)
        assert mode.waits == []


# ------------------------------------------------------------------------------------------ what may be put together
def test_it_says_what_it_draws():
    unet, diffusion = UNet(channels=8, in_channels=3, num_classes=3), GaussianDiffusion.from_schedule()
    model = NoisePredictor(unet, diffusion)
    assert (model.target, model.image_shape, model.class_names) == ("noise", (3, 28, 28), ("0", "1", "2"))
    assert (model.unet, model.diffusion, model.num_classes) == (unet, diffusion, 3)
    named = NoisePredictor(unet, diffusion, "x_0", [3, 8, 16], ["a", "b", "c"])
    assert (named.target, named.image_shape, named.class_names) == ("x_0", (3, 8, 16), ("a", "b", "c"))
    without = NoisePredictor(UNet(channels=8), diffusion)
    assert (without.image_shape, without.class_names, without.num_classes) == ((1, 28, 28), (), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "score"}, "target must be one of noise, v, x_0, velocity, got 'score'"),
        ({"target": []}, r"target must be one of noise, v, x_0, velocity, got \[\]"),
        ({"image_shape": (3, 28, 28)}, r"image_shape must be \(1, H, W\), as the U-Net's, got \(3, 28, 28\)"),
        ({"image_shape": (1, 28)}, r"image_shape must be \(1, H, W\).*got \(1, 28\)"),
        ({"image_shape": (1, 28, "x")}, r"image_shape\[2\] must be an integer of at least 1.*got 'x'"),
        ({"image_shape": (1, -28, 28)}, r"image_shape\[1\] must be an integer of at least 1.*got -28"),
        ({"class_names": ["a", "b"]}, "the U-Net has 3 classes, and class_names are 2"),
        ({"class_names": "abc"}, "class_names must be a list of texts, got one: 'abc'"),
        ({"class_names": ()}, "the U-Net has 3 classes, and class_names are 0"),
        ({"class_names": ["a", "b", "a"]}, "class_names must be texts, no two alike, got 'a', 'b', 'a'"),
        ({"class_names": ["a", "b", 3]}, "class_names must be texts, no two alike, got 'a', 'b', 3"),
        ({"num_classes": None, "class_names": ["a"]}, "the U-Net has 0 classes, and class_names are 1"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        predictor(**options)


# --------------------------------------------------------------------------------------------------- its two files
FILES = {
    "labels": {"class_names": ["T-shirt/top", "été", "3"]},
    "numbers": {"target": "noise", "diffusion": GaussianDiffusion.from_schedule("cosine", 100)},
    "colour, no labels": {"target": "x_0", "in_channels": 3, "num_classes": None, "image_shape": (3, 16, 24)},
}


@pytest.mark.parametrize("options", FILES.values(), ids=FILES)
def test_saved_and_loaded_is_the_same_to_the_last_bit(options, tmp_path):
    model = predictor(**options)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = NoisePredictor.from_pretrained(tmp_path)
    assert not loaded.training and loaded.unet.config == model.unet.config
    for name in ("target", "image_shape", "class_names", "num_classes"):
        assert getattr(loaded, name) == getattr(model, name)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    pairs = [(loaded.diffusion.exact_betas, model.diffusion.exact_betas)]
    pairs += [(value, model.state_dict()[name]) for name, value in loaded.state_dict().items()]
    pairs += zip(loaded.diffusion.buffers(), model.diffusion.buffers(), strict=True)
    assert all(ours.dtype == theirs.dtype and torch.equal(ours, theirs) for ours, theirs in pairs)
    x_t, t = torch.randn(2, *model.image_shape, generator=seeded()), torch.tensor([1, 100])
    assert torch.equal(loaded(x_t, t), model(x_t, t))
    check_diffusion(loaded, model.diffusion)


def test_a_checkpoint_is_what_this_package_documents(tmp_path):
    predictor(class_names=["a", "b", "c"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config.keys() == {"unet", "target", "image_shape", "class_names"}
    assert (config["target"], config["image_shape"], config["class_names"]) == ("v", [1, 8, 8], ["a", "b", "c"])
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == {"betas", *predictor().unet.state_dict()}
    assert tensors["betas"].dtype == torch.float64 and tensors["betas"].shape == (1000,)


def test_weights_of_16_bits_are_half_the_size_and_load_as_float32(tmp_path):
    model, path = predictor(), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    size, tensors = path.stat().st_size, load_file(path)
    save_file({name: value if name == "betas" else value.half() for name, value in tensors.items()}, path)
    loaded = NoisePredictor.from_pretrained(tmp_path)
    assert path.stat().st_size < 0.65 * size
    for name, value in loaded.unet.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, tensors[name].half().float())
    check_diffusion(loaded, model.diffusion)


def test_a_schedule_that_never_reaches_noise_is_told_of_when_it_is_made_not_when_it_is_loaded(tmp_path, recwarn):
    with pytest.warns(UserWarning, match="never reaches noise"):
        diffusion = GaussianDiffusion(torch.linspace(1e-4, 0.02, 300))
    recwarn.clear()
    predictor(diffusion=diffusion).save_pretrained(tmp_path)
    check_diffusion(NoisePredictor.from_pretrained(tmp_path), diffusion)
    assert not recwarn.list


def rewrite(folder, change):
    """config.json, changed by a function."""
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config | {"target": "score"}, "target must be one of noise, v, x_0, velocity, got 'score'"),
        (lambda config: config | {"class_names": ["a"]}, "the U-Net has 3 classes, and class_names are 1"),
        (lambda config: config | {"class_names": ["a"] * 3}, "class_names must be texts, no two alike"),
        (lambda config: config | {"class_names": 5}, "not iterable"),
        (lambda config: config | {"image_shape": [3, 28, 28]}, r"image_shape must be \(1, H, W\)"),
        (lambda config: config | {"image_shape": [1, 28, "x"]}, r"image_shape\[2\] must be an integer"),
        (lambda config: config | {"image_shape": 5}, "not iterable"),
        (lambda config: config | {"wings": 2}, "wings"),
        (lambda config: config | {"unet": 5}, "mapping"),
        (lambda config: config | {"unet": config["unet"] | {"num_heads": -4}}, "num_heads must be an integer"),
        (lambda config: config | {"unet": config["unet"] | {"channel_mults": []}}, "channel_mults must be"),
        (lambda config: config | {"unet": config["unet"] | {"wings": 2}}, "wings"),
        (lambda config: config | {"unet": config["unet"] | {"num_res_blocks": 2}}, "Missing key"),
        (lambda config: config | {"unet": config["unet"] | {"channels": 16}}, "size mismatch"),
        (lambda config: [], "unet"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_line(change, message, tmp_path):
    predictor().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=f"^{tmp_path} is damaged or holds no NoisePredictor of.*{message}") as told:
        NoisePredictor.from_pretrained(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        (None, "betas"),
        (torch.zeros(1000).double(), r"each beta must lie in \(0, 1\)"),
        (torch.full((1000,), float("nan")).double(), r"each beta must lie in \(0, 1\)"),
        (torch.full((2, 5), 0.1).double(), r"betas must have shape \(T,\)"),
        (GaussianDiffusion.from_schedule().exact_betas.half(), "betas must be float64, got torch.float16"),
    ],
)
def test_a_diffusion_that_is_none_is_refused(betas, message, tmp_path):
    """In 16 bits they would be another schedule."""
    predictor().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if name != "betas"}
    save_file(tensors | ({} if betas is None else {"betas": betas}), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path} is damaged or holds no NoisePredictor of .*{message}"):
        NoisePredictor.from_pretrained(tmp_path)


def test_a_checkpoint_of_an_earlier_version_is_refused_with_its_reason(tmp_path):
    """Its config.json was the U-Net's alone, and its diffusion a file of its own."""
    unet = predictor().unet
    config = unet.config | {"target": "v", "schedule": "linear", "num_timesteps": 1000}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(unet.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path} .*: it is of an earlier version, .*: train it again$"):
        NoisePredictor.from_pretrained(tmp_path)


def test_the_shipped_network_knows_what_it_draws():
    model = NoisePredictor.from_pretrained()
    assert model.image_shape == (1, 28, 28) and model.class_names == CLASS_NAMES and model.num_classes == 10
    check_diffusion(model, GaussianDiffusion.from_schedule("linear", 1000))
    x_t, t = torch.randn(2, 1, 28, 28, generator=seeded()), torch.tensor([900, 1000])
    assert (model(x_t, t) - x_t).square().mean() < 0.05  # there nearly all of x_t is noise
    for sampler in SAMPLERS.values():
        sampler(classifier_free(model, LABELS, 3.0), model.diffusion, (2, 1, 28, 28))


# ------------------------------------------------------------------------------------------------- another diffusion
OTHERS = {
    "another schedule": (GaussianDiffusion.from_schedule("cosine"), r"\(T = 1000, betas from 4.13e-05 to 0.999\)"),
    "another T": (GaussianDiffusion.from_schedule("linear", 100), r"\(T = 100, betas from 0.001 to 0.2\)"),
    "a schedule of one's own": (GaussianDiffusion(torch.linspace(1e-4, 0.03, 1000)), "betas from 0.0001 to 0.03"),
}


def silent(x_t, t):
    """A model that has no diffusion of its own."""
    return torch.zeros_like(x_t)


@pytest.mark.parametrize(("other", "message"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("target", TARGETS)
def test_samplers_and_the_bound_refuse_another_diffusion(target, other, message):
    model = predictor(target)
    calls = [lambda sampler=sampler: sampler(model, other, SHAPE) for sampler in SAMPLERS.values()]
    x_0 = torch.zeros(SHAPE) - 1
    calls += [
        lambda: bits_per_dim(model, other, x_0),
        lambda: vlb_term(model, other, x_0, x_0, 1),
        lambda: velocity_of(model, other),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="trained with another diffusion .*" + message):
            call()


@pytest.mark.parametrize(("other", "message"), OTHERS.values(), ids=OTHERS)
def test_a_guided_model_is_refused_as_its_network_is(other, message):
    network = predictor()
    own, plain = network.diffusion, classifier_free(network, LABELS, 2.0)
    classifier = NoisyClassifier(num_classes=3, channels=8, image_size=8)
    masked = (torch.zeros(SHAPE), torch.ones(8, 8).bool())
    guided = [
        plain,
        GaussianMixture(torch.zeros(1, 2), torch.ones(1)).noise_model(own),
        classifier_guidance(plain, classifier, own, LABELS),
        guided_between(1, 2, plain, silent),
        guided_between(1, 2, silent, plain),
        rescaled(silent, plain, own),
        rescaled(plain, silent, own),
        keep_known(plain, own, *masked),
        keep_known(silent, own, *masked),  # what a wrapper computes with its diffusion is wrong with another
        pull_known(silent, own, *masked),
        rescaled(silent, silent, own),
        classifier_guidance(silent, classifier, own, LABELS),
        guided_between(1, 2, silent, keep_known(rescaled(plain, silent, own), own, *masked)),
    ]
    for model in guided:
        assert model.diffusion is own
        sample_ddim(model, own, SHAPE)
        with pytest.raises(ValueError, match=message):
            sample_ddim(model, other, SHAPE)
    for wrap in (
        lambda: classifier_guidance(plain, classifier, other, LABELS),
        lambda: rescaled(plain, silent, other),
        lambda: rescaled(silent, plain, other),
        lambda: keep_known(plain, other, *masked),
        lambda: guided_between(1, 2, plain, classifier_free(predictor(diffusion=other), LABELS)),
        lambda: rescaled(plain, classifier_free(predictor(diffusion=other), LABELS), own),
    ):
        with pytest.raises(ValueError, match=message):
            wrap()


def test_what_has_no_diffusion_and_what_fits_pass():
    for name, T in (("cosine", 8), ("sigmoid", 100), ("quadratic", 1000)):
        diffusion = GaussianDiffusion.from_schedule(name, T)
        check_diffusion(silent, diffusion)
        again = GaussianDiffusion.from_schedule(name, T)  # another object with the same betas
        check_diffusion(predictor(diffusion=diffusion), again)
        check_diffusion(predictor(diffusion=diffusion).double(), again.double())
    assert guided_between(1, 2, silent, silent).diffusion is None
