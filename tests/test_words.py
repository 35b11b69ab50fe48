"""ddpm_tutorial/words.py; captions in the U-Net, guidance and training; experiments/emoji.py at a tiny size."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpm_tutorial.data import seeded_generator
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.guidance import classifier_free, drop_labels
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.settings import TrainConfig
from ddpm_tutorial.training import train, training_batches
from ddpm_tutorial.unet import UNet, sinusoidal_embedding
from ddpm_tutorial.words import EMOJI_FOLDER, captions_of, load_emoji, vocabulary_of, words_of
from experiments import emoji as experiment

NULL = 6


@pytest.fixture(scope="module")
def emoji():
    return load_emoji()


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    unet = UNet(in_channels=3, channels=8, patch_size=2, num_classes=NULL)
    for weight in unet.parameters():  # the last layer starts at zero, and would answer all labels alike
        torch.nn.init.normal_(weight, std=0.1)
    return NoisePredictor(unet, GaussianDiffusion.from_schedule("cosine"), "v", (3, 8, 8), tuple("abcdef")).eval()


@pytest.fixture
def noisy():
    return torch.randn(2, 3, 8, 8, generator=seeded_generator(0)), torch.tensor([10, 900])


# ----------------------------------------------------------------------------------------------- the data
def test_the_emoji_are_whole_and_on_white(emoji):
    assert emoji.images.shape == (1911, 3, 32, 32) and emoji.images.dtype == torch.uint8
    assert len(emoji.names) == len(set(emoji.names)) == len(emoji.groups) == len(emoji.captions) == 1911
    red, square = (emoji.images[emoji.names.index(name)].float() for name in ("red heart", "blue square"))
    assert (red[:, 0, 0] == 255).all()  # the corner is background
    assert red[0, 16, 16] > 200 and red[1:, 16, 16].max() < 80
    assert square[2, 16, 16] > square[0, 16, 16] + 50
    assert emoji.groups[emoji.names.index("red heart")] == "heart"


def test_the_licences_lie_beside_the_images():
    assert "Apache License" in (EMOJI_FOLDER / "LICENSE-APACHE").read_text(encoding="utf-8")
    notice = (EMOJI_FOLDER / "NOTICE").read_text(encoding="utf-8")
    for part in ("Noto Emoji", "emoji-datasource-google 16.0.0", "Cal Henderson", "emojibase-data", "UNICODE LICENSE"):
        assert part in notice
    assert sum(path.stat().st_size for path in EMOJI_FOLDER.iterdir()) < 4e6


def test_words_and_their_vocabulary(emoji):
    assert words_of("Woman’s Cat-face, woman: 2") == ["woman", "s", "cat", "face", "2"]
    assert vocabulary_of(["red apple", "green apple", "apple apple", "red"]) == ("apple", "red")
    assert list(emoji.vocabulary) == sorted(set(emoji.vocabulary))
    row = emoji.captions[emoji.names.index("cat with tears of joy")].tolist()
    null = len(emoji.vocabulary)
    assert [emoji.vocabulary[word] for word in row if word != null] == words_of("cat with tears of joy face")
    assert row[-1] == null and not (emoji.captions == null).all(dim=1).any()
    counts = torch.bincount(emoji.captions.flatten(), minlength=null + 1)[:null]
    assert counts.min() == 2


def test_captions_of_texts():
    vocabulary = ("apple", "green", "red")
    assert captions_of(["Red apple", "green", ""], vocabulary).tolist() == [[2, 0], [1, 3], [3, 3]]
    assert captions_of([""], vocabulary).tolist() == [[3]]
    none = captions_of([], vocabulary)
    assert none.shape == (0, 1) and none.dtype == torch.long
    with pytest.raises(ValueError, match="'apples' is not one of the 3 words known; near ones: apple"):
        captions_of(["red apples"], vocabulary)
    with pytest.raises(ValueError, match="list of them, got one: 'red'"):
        captions_of("red", vocabulary)


# ------------------------------------------------------------------------- noise in colour and at other sizes
def test_the_mean_of_many_numbers_is_seen_longer():
    """(11.1): the mean of n numbers has the signal of one and 1/n of the noise's variance."""
    diffusion, x_0 = GaussianDiffusion.from_schedule(), torch.full((20_000, 3, 4, 4), 0.5)
    means = diffusion.q_sample(x_0, 200, torch.randn(x_0.shape, generator=seeded_generator(0))).flatten(1).mean(1)
    alpha_bar = diffusion.alphas_cumprod[200]
    std = ((1 - alpha_bar) / 48).sqrt().item()
    torch.testing.assert_close(means.mean(), 0.5 * alpha_bar.sqrt(), rtol=0, atol=5 * std / 20_000**0.5)
    torch.testing.assert_close(means.std().item(), std, rtol=5 / 40_000**0.5, atol=0)


def test_a_larger_image_needs_more_noise():
    """(11.2): an image of twice the side, at a quarter of the signal-to-noise ratio, shows as much in means of 2×2."""
    snr = 3.0
    small, large = snr / (1 + snr), snr / 4 / (1 + snr / 4)  # alpha-bar
    image = torch.randn(1, 1, 8, 8, generator=seeded_generator(0))
    noise = torch.randn(4000, 1, 16, 16, generator=seeded_generator(1))
    noisy = large**0.5 * image.repeat_interleave(2, 2).repeat_interleave(2, 3) + (1 - large) ** 0.5 * noise
    means = torch.nn.functional.avg_pool2d(noisy, 2) * (small / large) ** 0.5  # the small image's signal
    std = (1 - small) ** 0.5
    torch.testing.assert_close(means.mean(0, keepdim=True), small**0.5 * image, rtol=0, atol=6 * std / 4000**0.5)
    torch.testing.assert_close(means.std(0).mean().item(), std, rtol=0.01, atol=0)


# ----------------------------------------------------------------------------- captions in the network
def test_a_caption_is_the_mean_of_its_words(predictor, noisy):
    x_t, t = noisy
    captions = torch.tensor([[1, 4, NULL, NULL], [5, NULL, NULL, 0]])
    table = predictor.unet.label_emb.weight
    expected = torch.stack([table[[1, 4]].mean(0), table[[0, 5]].mean(0)])
    time_only = predictor.unet.time_mlp(sinusoidal_embedding(t, 8))
    torch.testing.assert_close(predictor.unet._embed(t, captions), time_only + expected)
    assert not torch.allclose(predictor(x_t, t, captions), predictor(x_t, t))


def test_a_class_is_a_caption_of_one_word_and_no_word_is_the_null_label(predictor, noisy):
    x_t, t = noisy
    labels = torch.tensor([2, 5])
    for caption in (labels[:, None], torch.stack([labels, torch.full_like(labels, NULL)], dim=1)):
        torch.testing.assert_close(predictor(x_t, t, caption), predictor(x_t, t, labels), rtol=0, atol=0)
    torch.testing.assert_close(predictor(x_t, t, torch.full((2, 3), NULL)), predictor(x_t, t))


@pytest.mark.parametrize("labels", [torch.zeros(2, 0, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long),
                                    torch.zeros(2, 1, 1, dtype=torch.long), torch.full((2, 2), NULL + 1),
                                    torch.zeros(2, 2)])  # fmt: skip
def test_captions_that_do_not_fit_are_refused(predictor, noisy, labels):
    with pytest.raises(ValueError, match="labels must"):
        predictor(*noisy, labels)


def test_guidance_on_words(predictor, noisy):
    x_t, t = noisy
    captions = torch.tensor([[1, 4], [3, NULL]])
    with_words, without = predictor(x_t, t, captions), predictor(x_t, t)
    torch.testing.assert_close(classifier_free(predictor, captions, 1)(x_t, t), with_words)
    torch.testing.assert_close(classifier_free(predictor, captions, 0)(x_t, t), without)
    guided = classifier_free(predictor, captions, 3)(x_t, t)
    torch.testing.assert_close(guided, without + 3 * (with_words - without))
    with pytest.raises(ValueError, match=f"0 … {NULL}"):
        classifier_free(predictor, captions + 3)


def test_dropping_a_caption_drops_all_its_words():
    captions = torch.arange(4000).view(1000, 4) % NULL
    dropped = drop_labels(captions, 0.3, NULL, seeded_generator(0))
    gone = (dropped == NULL).any(dim=1)
    assert (dropped[gone] == NULL).all() and torch.equal(dropped[~gone], captions[~gone])
    assert 0.25 < gone.float().mean() < 0.35
    assert torch.equal(drop_labels(captions[:, 0], 0.3, NULL, seeded_generator(0)) == NULL, gone)  # as for labels


# ------------------------------------------------------------------------------------------ training
def test_a_batch_has_the_captions_of_its_images(predictor):
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 3, 8, 8)
    captions = torch.stack([torch.arange(20) % 5, torch.arange(20) % 3, torch.full((20,), NULL)], dim=1)
    config = TrainConfig(2, batch_size=10, label_dropout=0.0)
    for _, x_0, t, _, y in training_batches(predictor, images, captions, config, 0):
        number = ((x_0[:, 0, 0, 0] + 1) * 127.5).round().long()
        assert y.shape == (10, 3) and t.shape == (10,)
        assert torch.equal(y, captions[number])


def test_training_moves_the_words_that_it_sees_alone(predictor, tmp_path):
    images = torch.randint(256, (8, 3, 8, 8), generator=seeded_generator(0)).to(torch.uint8)
    captions = torch.tensor([[0, 1, NULL], [2, NULL, NULL]]).repeat(4, 1)
    before = predictor.unet.label_emb.weight.detach().clone()
    config = TrainConfig(2, batch_size=8, warmup_steps=0, label_dropout=0.0)
    *_, state = train(predictor, images, captions, config)
    moved = (predictor.unet.label_emb.weight.cpu() != before).any(dim=1)
    assert moved.tolist() == [True, True, True, False, False, False, False]

    model = state.ema.module.cpu()  # a checkpoint keeps the vocabulary, and answers captions as before
    model.save_pretrained(tmp_path)
    again = NoisePredictor.from_pretrained(tmp_path)
    x_t, t = torch.randn(8, 3, 8, 8), torch.full((8,), 500)
    assert again.class_names == tuple("abcdef")
    torch.testing.assert_close(again(x_t, t, captions), model(x_t, t, captions))


@pytest.mark.parametrize("captions", [torch.full((8, 2), NULL + 1), torch.zeros(7, 2, dtype=torch.long),
                                      torch.zeros(8, 0, dtype=torch.long)])  # fmt: skip
def test_training_refuses_captions_that_do_not_fit(predictor, captions):
    images = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="labels must"):
        next(train(predictor, images, captions, TrainConfig(1, batch_size=8)))


# ---------------------------------------------------------------------------------- the experiment
def test_a_subset_fills_a_batch():
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)
    few = experiment.subset(images, 20, 32)
    assert len(few) == 40 and len(few.unique()) == 20 and len(experiment.subset(images, 40, 32)) == 40
    assert set(few.unique().tolist()) < set(experiment.subset(images, 40, 32).unique().tolist())


def test_copies_are_told_from_new_images():
    images = torch.randint(256, (40, 3, 8, 8), generator=seeded_generator(0)).to(torch.uint8)
    seen = images[experiment.shuffled(40)[:20]]
    new = torch.randint(256, (10, 3, 8, 8), generator=seeded_generator(1)).to(torch.uint8)
    rows = experiment.memory_rows({"plain-20-5": torch.cat([seen[:10], new]), "plain-40-5": new}, images, 8)
    assert [row["samples"] for row in rows] == ["new images", "plain", "new images", "plain"]
    assert rows[1]["copies"] in (0.5, 0.55) and rows[1]["q5"] == 0 and rows[1]["passes"] == 2
    assert rows[3]["copies"] < 0.3 and abs(rows[3]["q50"] - rows[2]["q50"]) < 8


def test_the_experiment_leaves_weights_and_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(experiment, "SUBSETS", (4, 1911))
    monkeypatch.setattr(experiment, "SHOWN", ("red heart",))
    out = tmp_path / "emoji"
    options = ["--num-train-steps", "2", "--channels", "8", "--batch-size", "8", "--num-samples", "2"]
    assert experiment.main(["--out", str(out), "--device", "cpu", *options]) == 0
    model = NoisePredictor.from_pretrained(out)
    assert model.class_names == load_emoji().vocabulary and model.image_shape == (3, 32, 32)
    stored = load_file(out / "model.safetensors")
    assert stored["betas"].dtype == torch.float64 and stored["label_emb.weight"].dtype == torch.float16
    assert torch.equal(model.diffusion.exact_betas, GaussianDiffusion.from_schedule("cosine").exact_betas)
    samples = {}
    for part in ("words", "4", "1911"):
        samples |= np.load(out / f"{part}.npz")
    assert samples.pop("seconds") > 0
    assert set(samples) == {"words-1911-2", *(f"plain-{n}-{step}" for n in (4, 1911) for step in (1, 2, 4))}
    assert samples["plain-4-4"].shape == (2, 3, 32, 32) and samples["plain-4-4"].dtype == np.uint8
    assert set(np.load(out / "emoji.npz")) == set(samples)
    rows = json.loads((out / "emoji.json").read_text())["rows"]
    assert len(rows) == len(samples) + 2 and rows[-1]["passes"] == round(4 * 8 / 1911, 1)
    told = json.loads((out / "training.json").read_text())
    assert told["memory_steps"] == 4 and told["command"] == (
        "python -m experiments.emoji --num-train-steps 2 --channels 8 --batch-size 8 --num-samples 2 --out FOLDER"
    )
    assert (out / "captions.png").exists()
    weights = (out / "model.safetensors").stat().st_mtime_ns
    (out / "4.npz").unlink()
    monkeypatch.setattr(experiment, "pace", lambda *_: pytest.fail("its steps are known"))
    options[:2] = ["--minutes", "1"]
    assert experiment.main(["--out", str(out), "--device", "cpu", "--only", "memory", *options]) == 0
    assert set(np.load(out / "4.npz")) == {"seconds", *(f"plain-4-{step}" for step in (1, 2, 4))}

    options[options.index("--channels") + 1] = "16"
    assert experiment.main(["--out", str(out), "--device", "cpu", *options]) == 2
    assert "was begun with channels 8, not 16: choose" in capsys.readouterr().err
    assert (out / "model.safetensors").stat().st_mtime_ns == weights
