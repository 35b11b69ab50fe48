"""experiments/guidance_sweep.py: each setting is the guidance that it says, the figures are right, a stopped run goes
on; the file in the book is complete."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from ddpm_tutorial import data, metrics
from ddpm_tutorial.guidance import classifier_free, classifier_guidance
from ddpm_tutorial.metrics import NoisyClassifier
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.results import RESULTS_FOLDER
from ddpm_tutorial.sampling import sample_dpmpp_2m
from experiments import guidance_sweep as sweep

Setting = sweep.Setting


def setting_of(row: dict) -> Setting:
    return Setting(**{name: row[name] for name in Setting._fields})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def networks():
    return NoisePredictor.from_pretrained(), NoisyClassifier.from_pretrained()


@torch.no_grad()
def guided(setting, networks, t):
    """The setting's prediction at t, and what it is made of: without a label, with it, and the classifier's."""
    model, noisy_classifier = networks
    labels, times = torch.tensor([3, 7]), torch.full((2,), t)
    x_t = torch.randn(2, 1, 28, 28, generator=seeded())
    found = sweep.guided_model(setting, model, noisy_classifier, labels)(x_t, times)
    asked = classifier_guidance(model, noisy_classifier, model.diffusion, labels, setting.guidance_scale)
    free = classifier_free(model, labels, setting.guidance_scale)
    return found, free(x_t, times), model(x_t, times, labels), asked(x_t, times)


@pytest.mark.parametrize("clip", [True, False])
def test_setting_without_remedy_is_the_guidance_it_names(networks, clip):
    found, free, conditional, asked = guided(Setting("classifier-free", 3.0, clip=clip), networks, 400)
    assert_close(found, free)
    assert (free - conditional).abs().max() > 0.01 and (free - asked).abs().max() > 0.01
    found, _, _, asked = guided(Setting("classifier", 3.0, clip=clip), networks, 400)
    assert_close(found, asked)


@pytest.mark.parametrize(("t", "inside"), [(200, False), (400, True), (700, False)])
def test_setting_with_an_interval_is_guided_inside_only(networks, t, inside):
    found, free, conditional, _ = guided(Setting("classifier-free", 3.0, interval=[200, 600]), networks, t)
    assert_close(found, free if inside else conditional)


def test_setting_with_rescaling_lies_between(networks):
    found, free, conditional, _ = guided(Setting("classifier-free", 8.0, rescale=0.7), networks, 400)
    assert min((found - other).abs().max() for other in (free, conditional)) > 0.01


def test_clipping_reaches_the_sampler_and_all_settings_share_their_noise(networks, monkeypatch):
    seen = []

    def spy(model, diffusion, shape, **options):
        seen.append(options)
        return sample_dpmpp_2m(lambda x_t, t: torch.zeros_like(x_t), diffusion, shape, **options)

    monkeypatch.setattr(sweep, "sample_dpmpp_2m", spy)
    for setting in (Setting("classifier-free", 1.0), Setting("classifier", 2.0, clip=False)):
        images = sweep.draw(setting, *networks, torch.arange(130) % 10, 2, 5)
        assert images.shape == (130, 1, 28, 28) and images.dtype == torch.uint8
    assert [options["clip_denoised"] for options in seen] == [True, True, False, False]
    assert [len(options["x_T"]) for options in seen] == [100, 30, 100, 30]
    assert torch.equal(seen[0]["x_T"], seen[2]["x_T"]) and not torch.equal(seen[0]["x_T"][:30], seen[1]["x_T"])


def test_variety_is_one_minus_the_mean_correlation_within_a_class():
    a = torch.randint(100, (1, 1, 6, 6), generator=seeded(), dtype=torch.uint8)
    brighter, negative = 2 * a + 20, 250 - a
    assert sweep.variety(torch.cat([a, brighter]), torch.tensor([0, 0])) == pytest.approx(0, abs=1e-9)
    assert sweep.variety(torch.cat([a, negative]), torch.tensor([0, 0])) == pytest.approx(2)
    images = torch.cat([a, brighter, a, negative, brighter])
    two = sweep.variety(images, torch.tensor([0, 0, 1, 1, 1]))  # class 1: pairs of correlation −1, 1 and −1
    assert two == pytest.approx((0 + 4 / 3) / 2)
    noise = torch.randint(256, (40, 1, 28, 28), generator=seeded(1), dtype=torch.uint8)
    assert sweep.variety(noise, torch.zeros(40)) == pytest.approx(1, abs=0.01)


def test_settings_differ_and_come_back_from_json():
    assert all(sweep.SETTINGS.count(setting) == 1 for setting in sweep.SETTINGS)
    for setting in sweep.SETTINGS:
        assert setting_of(json.loads(json.dumps(setting._asdict()))) == setting


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Two settings, few images, and real images from the sample."""
    few = data.ImageData(*(column[:400] for column in data.load_fashion_mnist("train", "sample")[:2]), data.CLASS_NAMES)
    test = data.load_fashion_mnist("test", "sample")
    monkeypatch.setattr(sweep, "load_fashion_mnist", lambda split, source: few if split == "train" else test)
    monkeypatch.setattr(sweep, "SETTINGS", [Setting("classifier-free", 2.0), Setting("classifier", 2.0)])
    monkeypatch.setattr(metrics, "REAL_SUBSETS", 2)
    return ["--num-images", "100", "--num-inference-steps", "1", "--out", str(tmp_path / "sweep.json")]


def test_a_stopped_run_goes_on_and_another_seed_is_refused(quick, monkeypatch, capsys):
    out, draw, drawn = Path(quick[-1]), sweep.draw, []

    def stops_at_the_second(setting, *arguments):
        drawn.append(setting)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(setting, *arguments)

    monkeypatch.setattr(sweep, "draw", stops_at_the_second)
    assert sweep.main(quick) == 130
    first = json.loads(out.read_text())
    assert len(first["rows"]) == 1 and first["machine"]["cpu"]
    assert "/" not in first["command"]  # no folder of this machine
    assert sweep.main(quick) == 0
    result = json.loads(out.read_text())
    assert [setting_of(row) for row in result["rows"]] == sweep.SETTINGS and len(drawn) == 3
    assert result["rows"][0] == first["rows"][0] and result["real"] == first["real"]
    assert all({"mean", "deviation"} == set(figure) for figure in result["real"].values())
    assert set(result["real"]) == set(result["rows"][0]) - set(Setting._fields)
    assert 0.8 < result["real"]["label_agreement"]["mean"] <= 1
    capsys.readouterr()
    assert sweep.main([*quick, "--seed", "1"]) == 2
    assert "seed 0, not 1" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--num-images", "95"], "multiple of 10"), (["--num-images", "90"], "above 96"),
    (["--num-images", "100000"], "at most"),
])  # fmt: skip
def test_bad_counts_get_one_line(quick, arguments, message, capsys):
    assert sweep.main([*quick, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_shipped_file_holds_every_setting():
    result = json.loads((RESULTS_FOLDER / "guidance_sweep.json").read_text())
    assert [setting_of(row) for row in result["rows"]] == sweep.SETTINGS
    assert result["settings"]["num_images"] >= 500 and result["settings"]["num_train_images"] == 60_000
    assert set(result["real"]) == set(result["rows"][0]) - set(Setting._fields)
