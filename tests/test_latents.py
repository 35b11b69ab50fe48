"""The autoencoder and diffusion on its latents (chapter 12), and experiments/latents.py at a tiny size."""

import json
import math

import pytest
import torch
from small_run import CONFIG, first_images, new_model
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from ddpm_tutorial import metrics
from ddpm_tutorial.data import load_fashion_mnist, to_model_range
from ddpm_tutorial.guidance import classifier_free
from ddpm_tutorial.latents import SHIPPED_LATENTS, Autoencoder, autoencoder_loss, kl_to_standard, train_autoencoder
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.results import load_results
from ddpm_tutorial.sampling import sample_ddim
from ddpm_tutorial.training import train
from experiments import latents as experiment
from experiments.common import fingerprint


def small(seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(channels=8).eval()


# ---------------------------------------------------------------------------------------------- the autoencoder
def test_images_become_sixteenths_and_come_back(data):
    x = to_model_range(data[0][:3])
    latents = small().encode(x)
    assert latents.shape == (3, 4, 7, 7) and small().decode(latents).shape == x.shape
    assert small().encode(x[..., :20]).shape == (3, 4, 7, 5)


def test_the_kl_is_that_of_torch():
    mean, log_variance = torch.randn(2, 5, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    assert_close(kl_to_standard(mean, log_variance), expected)


def test_the_loss_is_a_negative_elbo_up_to_constants(data):
    """With the decoder's variance kl_weight · D / 2, as its docstring says."""
    model, x = small(), to_model_range(data[0][:6])
    noise = torch.randn(6, 4, 7, 7, generator=torch.Generator().manual_seed(1))
    weight, size = 3e-4, x[0].numel()
    variance = weight * size / 2
    found, mean, log_variance = model(x, noise)
    log_p = Normal(found, math.sqrt(variance)).log_prob(x).sum((1, 2, 3))
    bound = (kl_to_standard(mean, log_variance) - log_p).mean()
    loss = autoencoder_loss(model, x, noise, weight)
    assert_close(loss * size / (2 * variance) + size / 2 * math.log(2 * math.pi * variance), bound)


def test_the_decoder_gets_mean_plus_deviation_times_noise(data):
    model, x = small(), to_model_range(data[0][:2])
    noise = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(2))
    found, mean, log_variance = model(x, noise)
    assert_close(found, model.decoder(mean + log_variance.exp().sqrt() * noise))
    assert_close(model(x, torch.zeros_like(noise))[0], model.decode(model.encode(x)))


def test_one_factor_gives_variance_1_and_changes_no_reconstruction(data):
    model, x = small(), to_model_range(data[0][:5])
    before = model.decode(model.encode(x))
    model.fit_scale(data[0])
    assert model.encode_images(data[0]).std().item() == pytest.approx(1, abs=1e-5) and model.scale != 1
    assert_close(model.decode(model.encode(x)), before, rtol=1e-4, atol=1e-5)
    scale = model.scale
    model.fit_scale(data[0])
    assert model.scale == pytest.approx(scale)
    assert Autoencoder(**model.config).scale == model.scale


def test_it_learns(data):
    losses = [loss.item() for _, loss in train_autoencoder(small(), data[0], 60, batch_size=35)]
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


def test_the_same_seed_gives_the_same_weights(data):
    def after(seed):
        model = small()
        list(train_autoencoder(model, data[0], 3, batch_size=8, seed=seed))
        assert not model.training
        return model.decoder[-1].weight

    assert torch.equal(after(0), after(0)) and not torch.equal(after(0), after(1))


@pytest.mark.parametrize("make, complaint", [
    (lambda: Autoencoder(channels=0), "channels"),
    (lambda: Autoencoder(scale=0.0), "scale must be above 0"),
    (lambda: small().encode(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)), "x must be floats"),
    (lambda: small().encode(torch.zeros(2, 3, 28, 28)), r"x must be \(B, 1, H, W\)"),
    (lambda: small().encode(torch.zeros(2, 1, 28, 26)), "divisible by 4"),
])  # fmt: skip
def test_bad_input_is_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


# ------------------------------------------------------------------------------------- diffusion on its latents
def test_the_same_loop_and_samplers_work_on_latents(data):
    autoencoder = small()
    autoencoder.fit_scale(data[0])
    latents = autoencoder.encode_images(data[0])
    shape = {"in_channels": 4, "patch_size": 1, "channel_mults": [1], "attention_levels": [0]}
    network = new_model(image_size=28, target="v", **shape).unet
    model = NoisePredictor(network, new_model(image_size=28).diffusion, "v", (4, 7, 7))
    *_, last = train(model, latents, data[1], CONFIG)
    assert last.loss.isfinite() and last.model.image_shape == (4, 7, 7)
    guided = classifier_free(last.ema.module, torch.tensor([0, 1]), 2.0)
    *_, end = sample_ddim(guided, model.diffusion, (2, 4, 7, 7), num_inference_steps=3, clip_denoised=False)
    assert autoencoder.decode(end.x_t).shape == (2, 1, 28, 28)


# ---------------------------------------------------------------------------------------------- what is shipped
def test_the_table_was_made_with_the_networks_that_are_shipped():
    (latent,) = (row for row in load_results("latents")["rows"] if row["model"] == "latent")
    assert latent["weights"] == {name: fingerprint(SHIPPED_LATENTS / name) for name in ("autoencoder", "diffusion")}


def test_the_shipped_networks_give_images_back_and_draw_what_is_asked():
    autoencoder, test = Autoencoder.from_pretrained(), load_fashion_mnist("test", "sample")
    model, images = NoisePredictor.from_pretrained(SHIPPED_LATENTS / "diffusion"), test.images[:100]
    latents = autoencoder.encode_images(images)
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    with torch.no_grad():
        error = (autoencoder.decode(latents) - to_model_range(images)).square().mean().sqrt().item()
    lost = load_results("latents")["rows"][0]["reconstruction"]
    assert 127.5 * error == pytest.approx(lost["rms_grey_levels"], rel=0.15)
    labels = torch.arange(100) % 10
    drawn = experiment.draw(model, labels, 0, autoencoder)
    assert metrics.label_agreement(metrics.look(drawn).logits, labels) > 0.5


# ----------------------------------------------------------------------------------------------- the experiment
class Small(Autoencoder):
    def __init__(self, channels: int = 8, **options):
        super().__init__(channels=channels, **options)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(experiment, "load_fashion_mnist", first_images(300))
    monkeypatch.setattr(experiment, "Autoencoder", Small)
    monkeypatch.setattr(experiment, "shipped_config", lambda: {"channels": 8, "patch_size": 2, "num_classes": 10})
    monkeypatch.setattr(metrics, "REAL_SUBSETS", 2)
    monkeypatch.setattr(experiment, "NUM_STEPS", 3)

    def run(out, *options):
        size = ["--batch-size", "16", "--channels", "8", "--num-images", "100"]
        return experiment.main([*size, "--data", "sample", "--device", "cpu", "--out", str(out), *options])

    return run


def test_a_folder_of_weights_and_results(tiny, tmp_path, monkeypatch):
    out = tmp_path / "latents"
    assert tiny(out, "--num-train-steps", "3") == 0
    result = json.loads((out / "latents.json").read_text())
    latent, pixel = result["rows"]
    assert (latent["model"], pixel["model"]) == ("latent", "pixel")
    assert latent["weights"] == {name: fingerprint(out / name) for name in ("autoencoder", "diffusion")}
    assert latent["num_train_steps"] == {"autoencoder": 3, "diffusion": 3} and pixel["num_train_steps"] == {"pixel": 3}
    assert latent["operations"] < pixel["operations"]
    assert latent["reconstruction"]["rms_grey_levels"] > 0 and latent["reconstruction"]["bits_per_dim"] > 0
    assert "sample" not in result["command"] and result["settings"]["num_train_steps"] == 3

    autoencoder = Small.from_pretrained(out / "autoencoder")
    images = experiment.load_fashion_mnist("train", "sample").images
    assert autoencoder.encode_images(images).std().item() == pytest.approx(1, abs=1e-3)
    model = NoisePredictor.from_pretrained(out / "diffusion")
    assert model.image_shape == (4, 7, 7) and model.class_names[1] == "Trouser"
    kept = model.unet.conv_in.weight
    assert torch.equal(kept, kept.half().float()) and model.diffusion.exact_betas.dtype == torch.float64

    monkeypatch.setattr(experiment, "train", lambda *_: pytest.fail("it was trained twice"))
    (out / "latents.json").unlink()
    assert tiny(out, "--num-train-steps", "3") == 0
    again = json.loads((out / "latents.json").read_text())["rows"][0]
    assert again["frechet_distance"] == pytest.approx(latent["frechet_distance"], rel=1e-4)


def test_a_stopped_run_does_not_go_on_with_other_settings(tiny, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "look", stop)
        assert tiny(tmp_path, "--num-train-steps", "3", "--models", "pixel") == 130  # trained, not judged
    monkeypatch.setattr(experiment, "train", lambda *_: pytest.fail("it was trained twice"))
    assert tiny(tmp_path, "--num-train-steps", "5", "--models", "pixel") == 2
    assert "num_train_steps 3, not 5" in capsys.readouterr().err
    assert tiny(tmp_path, "--num-train-steps", "3", "--models", "pixel", "--compile") == 2
    assert "compile False, not True" in capsys.readouterr().err
    assert tiny(tmp_path, "--num-train-steps", "3", "--models", "pixel") == 0


def test_the_best_width_of_the_decoder():
    """Of two kinds of pixels, black and well known, and grey with errors of 0.2: that of the grey ones."""
    found = torch.full((2, 1, 40, 40), -1.0)
    found[1] = 0
    x = found + torch.randn(found.shape, generator=torch.Generator().manual_seed(0)) * 0.2
    x[0] = -1
    width, bits = experiment.best_width([(x[:1], found[:1]), (x[1:], found[1:])])
    assert width == pytest.approx(0.2, rel=0.1)
    grey = math.log2(0.2 * 127.5) + 0.5 * math.log2(2 * math.pi * math.e)  # the entropy of a normal law
    assert bits == pytest.approx((1 + grey) / 2, abs=0.05)  # of a black pixel, half of the law lies below it


def test_each_model_gets_the_seconds(tiny, tmp_path):
    """One row at a time: the same command goes on."""
    assert tiny(tmp_path / "a", "--seconds", "0.6", "--models", "latent") == 0
    (row,) = json.loads((tmp_path / "a" / "latents.json").read_text())["rows"]
    assert set(row["training_seconds"]) == {"autoencoder", "diffusion"}
    assert min(row["num_train_steps"].values()) >= 2
    assert tiny(tmp_path / "a", "--seconds", "0.6") == 0
    rows = json.loads((tmp_path / "a" / "latents.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["latent", "pixel"]


@pytest.mark.parametrize("options, complaint", [
    (["--num-images", "96"], "--num-images must lie in 97 … 300"),
    (["--data", "no-such-folder"], "no-such-folder"),
])  # fmt: skip
def test_bad_values_are_one_line_and_status_2(tiny, tmp_path, capsys, options, complaint):
    assert tiny(tmp_path / "a", *options) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
