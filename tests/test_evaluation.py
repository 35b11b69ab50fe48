"""experiments/evaluation.py and samples.py: what is drawn and judged, once, and what the files say."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_tutorial.data import CLASS_NAMES
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.drawing import draw_images, read_samples
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.unet import UNet
from experiments import evaluation, samples
from experiments.common import fingerprint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small untrained network with T = 60."""
    torch.manual_seed(0)
    unet = UNet(channels=8, num_heads=1, patch_size=2, num_classes=10)
    folder = tmp_path_factory.mktemp("checkpoint")
    NoisePredictor(unet, GaussianDiffusion.from_schedule("linear", 60), "v", class_names=CLASS_NAMES).save_pretrained(
        folder
    )
    return folder


def test_each_file_is_made_once_of_the_samples_it_names(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "SAMPLER", {"sampler": "dpmpp-2m", "num_inference_steps": 2})
    judged = []

    def measure_samples(model, data, seed, samples, repeats):
        judged.append((read_samples(samples)[0], repeats))
        return {"samples": samples.name, "repeats": repeats, "generated": {}}

    monkeypatch.setattr(evaluation, "measure_samples", measure_samples)
    options = ["--checkpoint", str(checkpoint), "--data", "sample", "--num-images", "20"]
    for _ in range(2):
        assert evaluation.main([*options, "--out", str(tmp_path / "evaluation-10000.json")]) == 0
    assert [repeats for _, repeats in judged] == [1, 5, 1]
    model, labels = NoisePredictor.from_pretrained(checkpoint), torch.arange(20) % 10
    for (images, _), count, guidance_scale in zip(judged, (20, 20, 4), (1.0, 1.0, 1.3), strict=True):
        assert torch.equal(images, draw_images(model, labels[:count], "dpmpp-2m", 2, guidance_scale))
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert set(found) == {f"evaluation-{name}" for name in evaluation.NAMES}
    assert all(result["settings"]["weights"] == fingerprint(checkpoint) for result in found.values())
    bits = found["evaluation-bits"]
    assert (
        bits["num_images"] == 20 and bits["bits_per_dim"]["total"]["mean"] > 0 and "classifier" not in bits["settings"]
    )
    guided = found["evaluation-guided"]
    assert guided["guidance_scale"] == 1.3 and "samples" not in guided and guided["pixels"]["pixel_frequency"] > 0


@pytest.mark.parametrize("name", ["mine.json", "evaluation-bits.json", "evaluation-mine.json"])
def test_another_name_than_that_of_its_files_is_refused(tmp_path, capsys, name):
    """Not that of the bits either, which has another number of images: the command would go on with that."""
    assert evaluation.main(["--data", "sample", "--out", str(tmp_path / name)]) == 2
    assert f"got {name}" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_too_many_images_are_refused_before_one_is_drawn(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "draw_batches", lambda *_, **__: pytest.fail("drawn"))
    monkeypatch.setattr(evaluation, "measure_bits", lambda *_: pytest.fail("measured"))
    options = ["--checkpoint", str(checkpoint), "--data", "sample", "--num-images", "1001"]
    assert evaluation.main([*options, "--out", str(tmp_path / "evaluation-10000.json")]) == 2
    assert "--num-images must be at most 1000 for this data, got 1001" in capsys.readouterr().err


def test_a_network_that_gives_no_numbers_or_has_no_classes_is_refused_in_one_line(checkpoint, tmp_path, capsys):
    model = NoisePredictor.from_pretrained(checkpoint)
    torch.nn.init.constant_(model.unet.conv_in.weight, torch.nan)
    model.save_pretrained(tmp_path / "nan")
    NoisePredictor(UNet(channels=8, num_heads=1), model.diffusion).save_pretrained(tmp_path / "no classes")
    for name, complaint in (("nan", "not finite"), ("no classes", "without labels")):
        options = ["--checkpoint", str(tmp_path / name), "--num-images", "10", "--out", str(tmp_path / "samples.json")]
        assert samples.main(options) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("python -m experiments.samples: error: ") and complaint in error, error


def test_samples_and_the_picture_are_those_of_the_command(checkpoint, tmp_path):
    options = ["--checkpoint", str(checkpoint), "--num-images", "20", "--out", str(tmp_path / "samples.json")]
    assert samples.main(options) == 0
    model = NoisePredictor.from_pretrained(checkpoint)
    images, labels = read_samples(tmp_path / "samples.npz")
    assert torch.equal(images, draw_images(model, torch.arange(20) % 10, "dpmpp-2m")) and labels.tolist() == 2 * [
        *range(10)
    ]
    picture = np.asarray(Image.open(tmp_path / "samples.png"))
    first = draw_images(model, torch.arange(40) % 10, guidance_scale=2.0)[0, 0].numpy()
    assert np.array_equal(picture[6:90:3, 6:90:3], first) and np.array_equal(picture[7:90:3, 8:90:3], first)
    assert json.loads((tmp_path / "samples.json").read_text())["rows"][0]["file"] == "samples.npz"
