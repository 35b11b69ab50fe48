"""Classifier-free guidance: its two ends, its formula, its one batched call; label dropout."""

import pytest
import torch
from torch.testing import assert_close

from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.guidance import classifier_free, drop_labels
from ddpm_tutorial.sampling import sample_ddim
from ddpm_tutorial.unet import UNet


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def unet():
    """A small class-conditional U-Net whose every weight is random, so that the label changes the output."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet(channels=8, num_classes=4).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


@pytest.fixture
def batch():
    x_t = torch.randn(3, 1, 8, 8, generator=seeded(1))
    return x_t, torch.tensor([1, 40, 1000]), torch.tensor([0, 3, 2])


class Counting:
    """ε(x, t, label) = (label + 1) x + t, and a record of the batch size and labels of each call."""

    num_classes = 4

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, labels):
        self.calls.append((len(x_t), labels.tolist()))
        return (labels + 1)[:, None] * x_t + t[:, None]


def test_scale_1_is_the_conditional_model_and_0_the_unconditional(unet, batch):
    x_t, t, labels = batch
    assert torch.equal(classifier_free(unet, labels)(x_t, t), unet(x_t, t, labels))
    assert torch.equal(classifier_free(unet, labels, 1)(x_t, t), unet(x_t, t, labels))
    assert torch.equal(classifier_free(unet, labels, 0)(x_t, t), unet(x_t, t))
    assert not torch.allclose(unet(x_t, t), unet(x_t, t, labels), atol=1e-3)  # the two differ at all


@pytest.mark.parametrize("scale", [-1.0, 0.5, 0.999999, 2.0, 7.5])
def test_other_scales_follow_the_formula(unet, batch, scale):
    x_t, t, labels = batch
    with_label, without = unet(x_t, t, labels), unet(x_t, t)
    w = scale - 1  # arXiv:2207.12598, eq. 6: (1 + w) ε_label − w ε
    assert_close(classifier_free(unet, labels, scale)(x_t, t), (1 + w) * with_label - w * without, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale, calls", [(0, [(2, [4, 4])]), (1, [(2, [3, 1])]), (3.0, [(4, [3, 1, 4, 4])])])
def test_one_call_a_step_of_the_right_size(scale, calls):
    model, x_t, t = Counting(), torch.tensor([[1.0], [2.0]]), torch.tensor([10, 20])
    guided = classifier_free(model, torch.tensor([3, 1]), scale)(x_t, t)
    assert model.calls == calls
    with_label, without = torch.tensor([[14.0], [24.0]]), torch.tensor([[15.0], [30.0]])
    assert_close(guided, without + scale * (with_label - without))


def test_a_guided_model_is_a_model_for_samplers(unet, batch):
    _, _, labels = batch
    diffusion = GaussianDiffusion.from_schedule("linear", 50)

    def sample(model):
        *_, last = sample_ddim(model, diffusion, (3, 1, 8, 8), num_inference_steps=5, generator=seeded())
        return last.x_t

    conditional = sample(lambda x_t, t: unet(x_t, t, labels))
    assert torch.equal(sample(classifier_free(unet, labels)), conditional)
    assert not torch.allclose(sample(classifier_free(unet, labels, 4.0)), conditional, atol=1e-3)


def test_a_model_without_classes_is_refused():
    with pytest.raises(ValueError, match="class-conditional"):
        classifier_free(UNet(channels=8), torch.tensor([0]))


@pytest.mark.parametrize("labels", [[0, 4], [-1, 0]])
def test_labels_out_of_range_are_refused(labels):
    """4 is the null label of 4 classes: guidance adds it itself, so it is not a label to ask for."""
    with pytest.raises(ValueError, match=r"labels must lie in 0 … 3, got"):
        classifier_free(Counting(), torch.tensor(labels))


# ---------------------------------------------------------------------------------------- label dropout
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_drop_labels_drops_that_share(probability):
    count = 40_000
    labels = torch.randint(10, (count,), generator=seeded(1))
    dropped = drop_labels(labels, probability, 10, seeded(2))
    share = (dropped == 10).float().mean().item()
    assert abs(share - probability) < 4 * (probability * (1 - probability) / count) ** 0.5
    kept = dropped != 10
    assert torch.equal(dropped[kept], labels[kept])  # the others are as they were
    per_class = torch.stack([(dropped[labels == k] == 10).float().mean() for k in range(10)])
    assert (per_class - probability).abs().max() < 4.5 * (probability * (1 - probability) / (count / 11)) ** 0.5


def test_drop_labels_at_the_edges():
    labels = torch.arange(1000) % 10
    assert torch.equal(drop_labels(labels, 0.0, 10, seeded()), labels)
    assert torch.equal(drop_labels(labels, 1.0, 10, seeded()), torch.full_like(labels, 10))


def test_drop_labels_is_reproducible_and_leaves_its_input():
    labels = torch.arange(1000) % 10
    before = labels.clone()
    first, again = drop_labels(labels, 0.3, 10, seeded(7)), drop_labels(labels, 0.3, 10, seeded(7))
    assert torch.equal(first, again) and torch.equal(labels, before)
    assert not torch.equal(first, drop_labels(labels, 0.3, 10, seeded(8)))


@pytest.mark.parametrize("probability", [-0.1, 1.5, float("nan")])
def test_drop_labels_refuses_a_bad_probability(probability):
    with pytest.raises(ValueError, match="probability of dropping a label"):
        drop_labels(torch.tensor([0]), probability, 10)
