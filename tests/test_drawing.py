"""Images from a trained model: each from noise of its own, in any batch and among any number; chains; files of them."""

import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from small_run import new_model
from tqdm import tqdm

from ddpm_tutorial import drawing
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.drawing import draw_batches, draw_chain, draw_images, sampler_of_images
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import SampleStep, sample_images


@pytest.fixture(scope="module")
def model():
    """T = 25, labels 0 … 9, every weight random."""
    unet = new_model().unet
    for i, parameter in enumerate(unet.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    return NoisePredictor(unet, GaussianDiffusion.from_schedule("linear", 25), "v").eval().requires_grad_(False)


@pytest.mark.parametrize("count, frames", [(100, 40), (1000, 40), (41, 40), (39, 40), (5, 6), (1, 2)])
def test_a_chain_has_at_most_forty_frames_from_the_noise_to_the_sample(monkeypatch, count, frames):
    def grey(i):
        return torch.tensor([(i % 256) / 127.5 - 1])

    def begin(labels, first):
        return grey(0), (SampleStep(count - i, grey(i), None) for i in range(1, count + 1))

    monkeypatch.setattr(drawing, "sampler_of_images", lambda *_: begin)
    trained = SimpleNamespace(diffusion=SimpleNamespace(num_timesteps=count))
    shown = [frame.item() for frame in draw_chain(trained, torch.tensor([3]))]
    assert len(shown) == frames and shown[0] == 0 and shown[-1] == count % 256
    gaps = [(b - a) % 256 for a, b in itertools.pairwise(shown)]
    assert not gaps or min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


SAMPLING = [("ddim", 4, 1.0, 5, 1.0), ("ddim", 4, 2.0, 5, 0.0), ("heun", 3), ("dpmpp-2m", 3), ("ddpm",)]


@pytest.mark.parametrize("options", SAMPLING)
def test_an_image_is_the_same_in_any_batch_and_among_any_number(model, options):
    labels = torch.arange(7)
    together = draw_images(model, labels, *options).int()
    assert together.shape == (7, 1, 28, 28)
    for other in (draw_images(model, labels, *options, batch_size=3), draw_images(model, labels[:5], *options)):
        difference = (other.int() - together[: len(other)]).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01  # a batch of another size rounds anew
    assert len({image.numpy().tobytes() for image in together}) == 7


def test_the_noise_of_an_image_is_the_same_to_the_last_bit():
    """Each image's generator is its own: a spy in place of the network writes down what it is shown first."""
    seen = []

    class Spy(NoisePredictor):
        def forward(self, x_t, t, labels=None):
            seen.append(x_t)
            return x_t

    spy, drawn = Spy(new_model(num_classes=None).unet, GaussianDiffusion.from_schedule()), []
    for batch_size in (2, 6):
        list(draw_batches(spy, torch.zeros(6), num_inference_steps=1, batch_size=batch_size))
        drawn.append(torch.cat(seen))
        seen.clear()
    assert drawn[0].shape == (6, 1, 28, 28) and torch.equal(*drawn) and abs(drawn[0].std() - 1) < 0.05


def test_labels_scale_and_seed_change_the_images(model):
    labels = torch.arange(4)
    plain = draw_images(model, labels, num_inference_steps=3).int()
    for other in (
        draw_images(model, labels + 1, num_inference_steps=3),
        draw_images(model, labels, num_inference_steps=3, guidance_scale=3.0),
        draw_images(model, labels, num_inference_steps=3, seed=1),
        draw_images(model, labels, num_inference_steps=3, eta=1.0),
    ):
        assert (other.int() - plain).abs().float().mean() > 1


def test_only_one_batch_is_alive_while_they_are_used(model, monkeypatch):
    """Memory does not grow with the number of images: a batch is gone before the next one is drawn."""
    alive, seen = weakref.WeakSet(), []

    def counted(steps):
        seen.append(len(alive))
        images = sample_images(steps)
        alive.add(images)
        return images

    monkeypatch.setattr(drawing, "sample_images", counted)
    batches = draw_batches(model, torch.arange(12) % 10, num_inference_steps=1, batch_size=2)
    assert sum(len(batch) for batch in batches) == 12 and len(seen) == 6 and max(seen) <= 1


def test_the_bar_moves_with_every_step_of_a_sampler(model, monkeypatch):
    moved = []

    class Bar(tqdm):
        def update(self, n=1):
            moved.append(n)
            return super().update(n)

    monkeypatch.setattr(drawing, "tqdm", Bar)
    for draw in (draw_images, draw_chain):
        draw(model, torch.arange(3), num_inference_steps=3)
        assert len(moved) == 3 and sum(moved) == 3 * 25
        moved.clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, "unknown sampler 'euler'; the known ones are ddpm, ddim, "),
        ({"sampler": "ddpm", "num_inference_steps": 5}, "ddpm always takes all T steps"),
        ({"num_inference_steps": 26}, "1 … 25"),
        ({"sampler": "ddpm", "spacing": "u"}, "--spacing belongs to the other samplers"),
        ({"sampler": "heun", "eta": 0.5}, "--eta belongs to the sampler ddim, got 0.5 with heun"),
        ({"eta": 5.0, "num_inference_steps": 5}, "eta"),
        ({"spacing": "x", "num_inference_steps": 5}, "spacing"),
        ({"seed": -1}, "seed"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"batch_size": 0}, "batch_size .* got 0"),
        ({"batch_size": -1}, "batch_size .* got -1"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_the_call(model, options, message):
    with pytest.raises(ValueError, match=message):
        draw_batches(model, torch.arange(3), **options)


def test_no_labels_make_no_images(model):
    with pytest.raises(ValueError, match="the number of labels must be .* at least 1"):
        draw_batches(model, torch.arange(0))


def test_guidance_without_labels_is_refused():
    with pytest.raises(ValueError, match="without labels: --guidance-scale must be 1 here, got 2"):
        sampler_of_images(new_model(num_classes=None), guidance_scale=2.0)
