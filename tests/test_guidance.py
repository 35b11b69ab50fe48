"""Classifier-free guidance: its two ends, its formula, its one batched call; label dropout. Classifier guidance: equal
to the exact conditional model. The remedies; the classifier of noisy images."""

import pytest
import torch
from torch.testing import assert_close

from ddpm_tutorial.data import load_fashion_mnist, to_model_range
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.guidance import (
    classifier_free,
    classifier_guidance,
    drop_labels,
    guided_between,
    rescaled,
)
from ddpm_tutorial.metrics import NoisyClassifier, train_classifier
from ddpm_tutorial.sampling import SAMPLERS, sample_ddim
from ddpm_tutorial.toy import GaussianMixture
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
    diffusion = GaussianDiffusion.from_schedule("linear", 1000)

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


@pytest.mark.parametrize("labels", [torch.tensor([0.7, 3.9]), torch.tensor([True, False])])
def test_only_integers_are_dropped(labels):
    with pytest.raises(ValueError, match="labels must be integers, got torch"):
        drop_labels(labels, 0.5, 10)


# --------------------------------------------------------------------------------- classifier guidance, exactly
class Toy:
    """Three classes in the plane, not equally frequent, the last of two blobs: p(label | x_t) and all predictors are
    closed forms."""

    diffusion = GaussianDiffusion.from_schedule("linear", 100)
    means, stds = torch.tensor([[0.0, 1.0], [-1.0, -0.5], [1.0, -0.5], [2.0, 0.0]]), torch.tensor([0.5, 0.3, 0.6, 0.2])
    frequency = torch.tensor([0.5, 0.3, 0.2])
    classes = (
        GaussianMixture(means[:1], stds[:1]),
        GaussianMixture(means[1:2], stds[1:2]),
        GaussianMixture(means[2:], stds[2:], torch.tensor([0.75, 0.25])),
    )
    everything = GaussianMixture(means, stds, torch.tensor([0.5, 0.3, 0.15, 0.05])).noise_model(diffusion)

    @classmethod
    def classifier(cls, x_t, t):
        """Bayes' rule: log p(label) + log q(x_t | label), (B, 3), the logits up to a constant."""
        return torch.stack([c.log_prob(cls.diffusion, x_t, t) for c in cls.classes], dim=1) + cls.frequency.log()

    @classmethod
    def conditional(cls, x_t, t, labels):
        predictions = torch.stack([c.noise_model(cls.diffusion)(x_t, t) for c in cls.classes], dim=1)  # (B, 3, 2)
        return predictions[torch.arange(len(x_t)), labels]

    @classmethod
    def guided(cls, labels, scale):
        return classifier_guidance(cls.everything, cls.classifier, cls.diffusion, labels, scale)


@pytest.fixture
def points():
    x_t = 1.5 * torch.randn(60, 2, generator=seeded(3))
    return x_t, torch.arange(1, 61), torch.arange(60) % 3


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, -1.0])
def test_exact_classifier_turns_the_unconditional_model_into_the_conditional(points, scale):
    """Scale 1: the score of the product is the conditional score. Any scale: eq. 6 of classifier-free guidance."""
    x_t, t, labels = points
    unconditional, conditional = Toy.everything(x_t, t), Toy.conditional(x_t, t, labels)
    assert (unconditional - conditional).abs().max() > 0.5
    expected = unconditional + scale * (conditional - unconditional)
    assert_close(Toy.guided(labels, scale)(x_t, t), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_classifier_guidance_works_in_every_sampler_without_gradients(name):
    labels, x_T = torch.arange(30) % 3, torch.randn(30, 2, generator=seeded(4))
    options = {} if name == "ddpm" else {"num_inference_steps": 10}

    def sample(model):
        fixed = {"x_T": x_T, "clip_denoised": False, "generator": seeded()}
        *_, last = SAMPLERS[name](model, Toy.diffusion, x_T.shape, **fixed, **options)
        return last.x_t

    found = sample(Toy.guided(labels, 1.0))
    assert not found.requires_grad and not x_T.requires_grad
    assert_close(found, sample(lambda x_t, t: Toy.conditional(x_t, t, labels)), atol=1e-3, rtol=1e-3)


def test_classifier_guidance_leaves_no_gradients_behind(batch):
    x_t, t, labels = batch
    diffusion, network = GaussianDiffusion.from_schedule("linear", 1000), torch.nn.Linear(64, 4)
    guided = classifier_guidance(
        lambda x, t: torch.zeros_like(x), lambda x, t: network(x.flatten(1)), diffusion, labels, 2.0
    )(x_t, t)
    assert guided.shape == x_t.shape and not guided.requires_grad and not x_t.requires_grad
    assert guided.abs().max() > 0 and all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_classifier_guidance_refuses_labels_out_of_range(labels):
    with pytest.raises(ValueError, match=r"labels must lie in 0 … 2, got"):
        Toy.guided(torch.tensor(labels), 1.0)(torch.zeros(2, 2), torch.tensor([5, 5]))


# ------------------------------------------------------------------------------------------------- the remedies
@pytest.mark.parametrize("t, inside", [(1, False), (20, False), (21, True), (60, True), (61, False)])
def test_guided_between_asks_one_model_at_each_timestep(t, inside):
    model = guided_between(20, 60, lambda x_t, t: x_t + 1, lambda x_t, t: x_t - 1)
    x_t = torch.zeros(3, 2)
    assert torch.equal(model(x_t, torch.full((3,), t)), torch.full((3, 2), 1.0 if inside else -1.0))


@pytest.mark.parametrize("pair", [(5, 5), (6, 5)])
def test_guided_between_refuses_an_empty_interval(pair):
    with pytest.raises(ValueError, match="interval .* must not be empty"):
        guided_between(*pair, None, None)


@pytest.mark.parametrize("strength", [0.0, 0.7, 1.0])
def test_rescaled_brings_each_image_to_the_spread_of_the_plain_one(strength):
    diffusion = GaussianDiffusion.from_schedule("linear", 100)
    aim, modest, x_t = torch.randn(3, 4, 1, 6, 6, generator=seeded(5))
    aim = aim * torch.tensor([1.0, 2.0, 3.0, 0.5]).view(4, 1, 1, 1)  # another spread in each image
    t = torch.full((4,), 30)
    models = [lambda x, t, x_0=x_0: diffusion.predict_noise(x, t, x_0) for x_0 in (aim, modest)]
    x_0 = diffusion.predict_x0(x_t, t, rescaled(*models, diffusion, strength)(x_t, t))
    for got, guided, plain in zip(x_0, aim, modest, strict=True):
        assert_close(got, guided * (strength * plain.std() / guided.std() + 1 - strength), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_rescaled_refuses_a_bad_strength(strength):
    with pytest.raises(ValueError, match="strength of rescaling"):
        rescaled(None, None, None, strength)


# -------------------------------------------------------------------------------- the classifier of noisy images
def test_noisy_classifier_sees_through_some_noise_and_not_through_all():
    diffusion, test = GaussianDiffusion.from_schedule(), load_fashion_mnist("test", source="sample")
    classifier, x_0 = NoisyClassifier.from_pretrained(), to_model_range(test.images)
    assert not classifier.training
    noise = torch.randn(x_0.shape, generator=seeded(8))

    @torch.no_grad()
    def share(t):
        found = classifier(diffusion.q_sample(x_0, t, noise), torch.full((len(x_0),), t)).argmax(1)
        return (found == test.labels).float().mean().item()

    assert share(1) > 0.8 and share(300) > 0.7 and share(1000) < 0.25


@torch.no_grad()
def test_noisy_classifier_takes_each_images_own_timestep():
    classifier, x_t = NoisyClassifier.from_pretrained(), torch.randn(3, 1, 28, 28, generator=seeded())
    t = torch.tensor([1, 500, 1000])
    one_by_one = torch.cat([classifier(x_t[i : i + 1], t[i : i + 1]) for i in range(3)])
    assert_close(classifier(x_t, t), one_by_one, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(classifier(x_t, t.flip(0)), one_by_one, atol=1e-2)


@torch.no_grad()
def test_noisy_classifier_is_trained_on_noised_images():
    """Trained with a diffusion it knows the class of noisy images."""
    diffusion = GaussianDiffusion.from_schedule("linear", 100)
    labels = torch.arange(640) % 2
    images = (labels * 200 + 20).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()  # dark or light
    torch.manual_seed(0)
    model = NoisyClassifier(num_classes=2, channels=32, image_size=8)
    with torch.enable_grad():
        losses = [loss for _, loss in train_classifier(model, images, labels, 4, 64, diffusion=diffusion)]
    assert len(losses) == 40 and not model.training
    x_0, t = to_model_range(images), torch.full((640,), 30)
    x_t = diffusion.q_sample(x_0, t, torch.randn(x_0.shape, generator=seeded(1)))
    assert (model(x_t, t).argmax(1) == labels).float().mean() > 0.97


def test_noisy_classifier_refuses_images_of_another_size():
    with pytest.raises(ValueError, match=r"x_t must be \(B, 1, 28, 28\) and t \(B,\), got \(2, 1, 32, 32\) and \(2,\)"):
        NoisyClassifier()(torch.zeros(2, 1, 32, 32), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"got \(2, 1, 28, 28\) and \(1,\)"):
        NoisyClassifier()(torch.zeros(2, 1, 28, 28), torch.tensor([1]))
    for options, got in (({"image_size": 30}, "30 and 32"), ({"channels": 31}, "28 and 31")):
        with pytest.raises(ValueError, match=f"multiple of 4 and channels of 2, got {got}"):
            NoisyClassifier(**options)
    for options in ({"image_size": 0}, {"channels": 0}, {"num_classes": -1}, {"in_channels": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be an integer of at least 1"):
            NoisyClassifier(**options)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_not_finite_is_refused(scale, unet):
    labels, diffusion = torch.tensor([0]), GaussianDiffusion.from_schedule()
    for call in (
        lambda: classifier_free(unet, labels, scale),
        lambda: classifier_guidance(unet, NoisyClassifier(), diffusion, labels, scale),
    ):
        with pytest.raises(ValueError, match="guidance_scale must be a finite number, got -?(nan|inf)"):
            call()


def test_labels_may_be_any_integers(unet, batch):
    x_t, t, labels = batch
    expected = classifier_free(unet, labels, 2.0)(x_t, t)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(classifier_free(unet, labels.to(dtype), 2.0)(x_t, t), expected)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_one_label_an_image(scale):
    """Too few labels would guide the first images only."""
    diffusion, x_t, t = GaussianDiffusion.from_schedule("linear"), torch.zeros(3, 1, 8, 8), torch.tensor([5, 5, 5])
    labels, model = torch.tensor([0, 1]), UNet(channels=8, num_classes=2)
    classifier = NoisyClassifier(num_classes=2, channels=8, image_size=8)
    for guided in (
        classifier_free(model, labels, scale),
        classifier_guidance(model, classifier, diffusion, labels, scale),
    ):
        with pytest.raises(ValueError, match=r"labels must be \(3,\), one an image; got \(2,\)"):
            guided(x_t, t)
    for bad in (torch.tensor(1), torch.tensor([0.0, 1.0]), torch.tensor([True, False])):
        with pytest.raises(ValueError, match=r"labels must be integers \(B,\) or captions \(B, L\), got torch"):
            classifier_free(model, bad)
