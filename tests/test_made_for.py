"""A network with another schedule, T or target than it was made for is refused at the call, however it is wrapped."""

import pytest
import torch

from ddpm_tutorial.diffusion import GaussianDiffusion, check_made_for
from ddpm_tutorial.editing import keep_known
from ddpm_tutorial.elbo import bits_per_dim
from ddpm_tutorial.guidance import NoisyClassifier, classifier_free, classifier_guidance, guided_between, rescaled
from ddpm_tutorial.sampling import SAMPLERS, sample_ddim
from ddpm_tutorial.training import TrainConfig, train
from ddpm_tutorial.unet import UNet

SHAPE, LABELS = (2, 1, 8, 8), torch.tensor([0, 2])
OTHERS = {
    "another schedule": (GaussianDiffusion.from_schedule("cosine"), r"for T = 1000 \(the linear .*T = 1000 \(the cos"),
    "another T": (GaussianDiffusion.from_schedule("linear", 100), r"for T = 1000 .*has T = 100 \(the linear"),
    "a schedule of one's own": (GaussianDiffusion(torch.linspace(1e-4, 0.03, 1000)), r"T = 1000 \(a schedule without"),
}  # fmt: skip


def network(**options) -> UNet:
    return UNet(**{"channels": 8, "num_classes": 3} | options)


def silent(x_t, t):
    """A model that does not say what it was made for."""
    return torch.zeros_like(x_t)


@pytest.mark.parametrize("other, message", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("target", ["noise", "v", "x_0"])
def test_samplers_the_bound_and_training_refuse_another_diffusion(target, other, message):
    unet, images = network(target=target), torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    calls = [lambda sampler=sampler: sampler(unet, other, SHAPE) for sampler in SAMPLERS.values()]
    calls.append(lambda: bits_per_dim(unet, other, torch.zeros(SHAPE) - 1))
    calls.append(lambda: train(unet, other, images, torch.zeros(4).long(), TrainConfig(batch_size=2, target=target)))
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("target", ["v", "x_0"])
def test_training_refuses_another_target(target):
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4).long()
    with pytest.raises(ValueError, match=f"made for the target 'noise', and the configuration has '{target}'"):
        train(network(), GaussianDiffusion.from_schedule(), images, labels, TrainConfig(batch_size=2, target=target))


@pytest.mark.parametrize("other, message", OTHERS.values(), ids=OTHERS)
def test_a_guided_model_is_refused_as_its_network_is(other, message):
    unet = network()
    own, plain = GaussianDiffusion.from_schedule(), classifier_free(unet, LABELS, 2.0)
    classifier = NoisyClassifier(num_classes=3, channels=8, image_size=8)
    masked = (torch.zeros(SHAPE), torch.ones(8, 8).bool())
    guided = [
        plain,
        classifier_guidance(plain, classifier, own, LABELS),
        guided_between(1, 2, plain, silent),
        guided_between(1, 2, silent, plain),
        rescaled(silent, plain, own),
        rescaled(plain, silent, own),
        keep_known(plain, own, *masked),
        guided_between(1, 2, silent, keep_known(rescaled(plain, silent, own), own, *masked)),
    ]
    for model in guided:
        sample_ddim(model, own, SHAPE)
        with pytest.raises(ValueError, match=message):
            sample_ddim(model, other, SHAPE)
    for wrap in (
        lambda: classifier_guidance(plain, classifier, other, LABELS),
        lambda: rescaled(plain, silent, other),
        lambda: rescaled(silent, plain, other),
        lambda: keep_known(plain, other, *masked),
    ):
        with pytest.raises(ValueError, match=message):
            wrap()


def test_what_says_nothing_and_what_fits_pass():
    for name, T in (("cosine", 8), ("sigmoid", 100), ("quadratic", 1000)):
        diffusion = GaussianDiffusion.from_schedule(name, T)
        check_made_for(silent, diffusion)
        check_made_for(network(schedule=name, num_timesteps=T), diffusion)
        check_made_for(network(schedule=name, num_timesteps=T).double(), diffusion.double())
    unet, diffusion = UNet.from_pretrained(), GaussianDiffusion.from_pretrained()
    check_made_for(unet, diffusion, "v")
    check_made_for(unet, GaussianDiffusion.from_schedule("linear", 1000))
    for sampler in SAMPLERS.values():
        sampler(classifier_free(unet, LABELS, 3.0), diffusion, (2, 1, 28, 28))


def test_the_table_is_not_among_the_weights(tmp_path):
    network().save_pretrained(tmp_path)
    assert "signal" not in network().state_dict()
    loaded = UNet.from_pretrained(tmp_path)
    assert torch.equal(loaded.signal, GaussianDiffusion.from_schedule().sqrt_alphas_cumprod)
