"""Nothing of the package makes float64 on the model's device: Apple's GPUs have none. The device is a pretended one."""

import contextlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from pretend_mps import DEVICE, OnDevice, PretendMPS
from torch.testing import assert_close

from ddpm_tutorial import training
from ddpm_tutorial.data import seeded_generator, to_model_range
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.editing import keep_known, resample
from ddpm_tutorial.elbo import bits_per_dim, mean_and_error, vlb_term
from ddpm_tutorial.guidance import classifier_free, classifier_guidance, guided_between, rescaled
from ddpm_tutorial.metrics import Classifier, NoisyClassifier, Seen, look, sample_figures
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import SAMPLERS, sample_ddim
from ddpm_tutorial.unet import UNet

SHAPE = (2, 1, 8, 8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def on_mps():
    with PretendMPS():
        yield


@pytest.fixture
def model():
    """A small network that gives v, every weight random; on the CPU."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(channels=8, patch_size=2, num_classes=3).eval().requires_grad_(False)
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return NoisePredictor(unet, GaussianDiffusion.from_schedule(), "v", (1, 8, 8))


def test_the_device_has_its_rules(on_mps):
    x = torch.ones(3, device=DEVICE)
    assert x.device == DEVICE and (x + x.sum()).cpu().tolist() == [4, 4, 4] and x[1].item() == 1
    assert x.cpu().double().dtype == torch.float64
    for wrong in (
        lambda: x.double(),
        lambda: x.to("cpu", torch.float64),
        lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE),
        lambda: torch.ones(2).double().to(DEVICE),
    ):
        with pytest.raises(TypeError, match="float64"):
            wrong()
    with pytest.raises(RuntimeError, match="one device"):
        x + torch.ones(3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name, model, on_mps):
    labels, x_T = torch.tensor([0, 2]), torch.randn(SHAPE, generator=seeded(1))
    options = {"start": 3} if name == "ddpm" else {"num_inference_steps": 3}

    def sample(device):
        guided = classifier_free(model.to(device), labels.to(device), 2.0)
        *_, last = SAMPLERS[name](guided, model.diffusion, SHAPE, x_T=x_T, generator=seeded(), **options)
        return last.x_t

    expected, found = sample("cpu"), sample(DEVICE)
    assert isinstance(found, OnDevice)
    assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_every_wrapper(model, on_mps):
    diffusion = model.to(DEVICE).diffusion
    labels = torch.tensor([0, 2]).to(DEVICE)
    classifier = NoisyClassifier(num_classes=3, channels=8, image_size=8).to(DEVICE).requires_grad_(False)
    plain, strong = classifier_free(model, labels), classifier_free(model, labels, 3.0)
    asked = classifier_guidance(plain, classifier, diffusion, labels, 2.0)
    between = guided_between(300, 900, rescaled(strong, plain, diffusion), asked)
    masked = keep_known(between, diffusion, torch.zeros(SHAPE), torch.ones(8, 8).bool())
    sampler = partial(sample_ddim, masked, diffusion, SHAPE, num_inference_steps=2)
    x_T = torch.randn(SHAPE, generator=seeded(), device=DEVICE)
    *_, last = resample(sampler, diffusion, x_T, num_loops=2, generator=seeded(3))
    assert_close(last.x_t.cpu(), torch.zeros(SHAPE), atol=1e-4, rtol=0)


def test_the_bound(model, on_mps):
    x_0 = to_model_range(torch.randint(256, SHAPE, generator=seeded(2), dtype=torch.uint8))

    def bound(device):
        place = model.to(device), model.diffusion, x_0.to(device)
        term = vlb_term(*place, torch.full(SHAPE, 0.5, device=device), torch.tensor([1, 1000]).to(device), "posterior")
        return mean_and_error(bits_per_dim(*place, seeded(), num_steps=3).total), mean_and_error(term)

    assert_close(torch.tensor(bound(DEVICE)), torch.tensor(bound("cpu")), atol=1e-4, rtol=1e-4)


def test_the_judge_and_figures_of_features_on_the_device(on_mps):
    images = torch.randint(256, (4, 1, 28, 28), generator=seeded(), dtype=torch.uint8)
    judge, layouts = Classifier.from_pretrained().to(DEVICE), []
    judge.body[3].register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].is_contiguous()))
    seen = look(images, judge)
    assert layouts == [True]  # channels-last is unsafe there
    assert not isinstance(seen.features, OnDevice)
    assert_close(seen.features, look(images).features, atol=1e-4, rtol=1e-4)
    here = Seen(torch.randn(20, 4, generator=seeded()), torch.randn(20, 3, generator=seeded(1)))
    there, labels = Seen(*(part.to(DEVICE) for part in here)), torch.arange(20) % 3
    found, expected = sample_figures(there, labels.to(DEVICE), there), sample_figures(here, labels, here)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_training(model, on_mps, monkeypatch, optimizer):
    images, labels = torch.randint(256, (8, 1, 8, 8), generator=seeded(), dtype=torch.uint8), torch.arange(8) % 3
    config = training.TrainConfig(num_train_steps=2, batch_size=4, warmup_steps=0, optimizer=optimizer)
    place = SimpleNamespace(device=DEVICE, num_processes=1, process_index=0)
    monkeypatch.setattr(training, "processes", lambda: place)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which asks for real devices
    monkeypatch.setattr(training, "seeded_generator", lambda *seeds, device="cpu": seeded_generator(*seeds))
    *_, last = training.train(model.requires_grad_(True), images, labels, config)
    assert isinstance(last.loss, OnDevice) and last.loss.isfinite()
