"""experiments/ladder.py: the rows are what they say, a stopped run goes on, and bad options are refused in one line."""

import json
from functools import partial

import pytest
import torch
from small_run import first_images

from ddpm_tutorial import metrics
from ddpm_tutorial.data import load_fashion_mnist
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.results import RESULTS_FOLDER
from ddpm_tutorial.sampling import path_timesteps, sample_ddpm
from ddpm_tutorial.unet import UNet
from experiments import ladder

N = 100  # the classifier has 96 features, and the distance needs more images than that

EACH = len(ladder.SOLVERS) - 1  # rows for a number of evaluations below T; σ² = β takes all T alone


@pytest.fixture
def small(monkeypatch):
    """A small untrained network with T = 12 and 1,000 training images; returns how to run the command on them."""
    torch.manual_seed(0)
    unet = UNet(channels=8, num_heads=1, patch_size=2, num_classes=10)
    model = NoisePredictor(unet, GaussianDiffusion.from_schedule("cosine", 12)).eval()
    monkeypatch.setattr(ladder.NoisePredictor, "from_pretrained", lambda folder: model)
    monkeypatch.setattr(ladder, "load_fashion_mnist", first_images(1000))
    monkeypatch.setattr(ladder, "EVALUATIONS", (3, 4, 12))
    monkeypatch.setattr(ladder, "AGAIN", ("DDPM (DDIM, η = 1)", 12))
    monkeypatch.setattr(ladder, "NUM_SEEDS", 2)
    monkeypatch.setattr(ladder, "BATCH_SIZE", N)
    monkeypatch.setattr(metrics, "REAL_SUBSETS", 3)

    def run(out, *options):
        return ladder.main(["--num-images", str(N), "--data", "sample", "--out", str(out), *map(str, options)])

    return run


def rows_of(path):
    return {(row["sampler"], row["allowed"]): row for row in json.loads(path.read_text())["rows"]}


def test_rows_cost_what_they_say_and_come_in_order_of_cost(small, tmp_path):
    assert small(tmp_path / "a.json") == 0
    rows = rows_of(tmp_path / "a.json")
    assert len(rows) == 2 * EACH + 2 and [name for name, allowed in rows if allowed == 12] == list(ladder.ALL_STEPS)
    diffusion = ladder.NoisePredictor.from_pretrained(None).diffusion
    for (name, allowed), row in rows.items():
        cost = {
            "Heun": allowed - 1 + allowed % 2,
            "DPM-Solver++(2M), even in u": len(path_timesteps(diffusion, allowed)),
        }
        assert row["evaluations"] == cost.get(name, allowed), name
        assert row["frechet_distance"] > 0 and 1 <= row["inception_score"] <= 10 and 0 <= row["label_agreement"] <= 1
        assert row["seconds"] > 0 and row["processor_seconds"] > 0
    costs = [allowed for _, allowed in rows]
    assert costs == sorted(costs)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_strided_ddpm_over_all_timesteps_is_ddpm(small, tmp_path):
    """With T evaluations it draws the same noise: the same images but for rounding."""
    model, labels = ladder.NoisePredictor.from_pretrained(None), torch.arange(20) % 10
    strided = ladder.solver("DDPM (DDIM, η = 1)", 12)
    one, two, other = (
        ladder.draw(sampler, model, labels, 0)[0].int()
        for sampler in (strided, sample_ddpm, partial(sample_ddpm, variance="beta"))
    )
    assert (one - two).abs().max() <= 1 and (one - other).abs().float().mean() > 1


def test_the_table_in_the_book_is_complete():
    rows = rows_of(RESULTS_FOLDER / "ladder.json")
    assert list(rows) == [tuple(job.values()) for job in ladder.ladder(1000)]


def test_a_row_is_drawn_with_other_seeds(small, tmp_path, monkeypatch):
    """Once, and not where its cost is left out; each seed gives other images."""
    drawn, draw = [], ladder.draw
    monkeypatch.setattr(ladder, "draw", lambda *options: drawn.append(draw(*options)) or drawn[-1])
    monkeypatch.setattr(ladder, "AGAIN", ("Heun", 4))
    monkeypatch.setattr(ladder, "NUM_SEEDS", 3)
    assert small(tmp_path / "a.json", "--max-evaluations", 3) == 0
    assert "other_seeds" not in json.loads((tmp_path / "a.json").read_text())
    drawn.clear()
    assert small(tmp_path / "a.json", "--max-evaluations", 4) == 0
    images = [row[0] for row in drawn[EACH:]]
    assert len({image.numpy().tobytes() for image in images}) == 3
    other = json.loads((tmp_path / "a.json").read_text())["other_seeds"]
    assert (other["sampler"], other["allowed"], other["number"]) == ("Heun", 4, 3)
    assert other["frechet_distance"]["deviation"] > 0
    drawn.clear()
    assert small(tmp_path / "a.json", "--max-evaluations", 4) == 0 and not drawn


def test_every_row_starts_from_the_same_noise(small, monkeypatch, tmp_path):
    seen, free = [], ladder.classifier_free

    def recording(model, labels, *rest):
        noise_model = free(model, labels, *rest)

        def call(x_t, t):
            if t[0] == 12:
                seen.append(x_t.clone())
            return noise_model(x_t, t)

        return call

    monkeypatch.setattr(ladder, "classifier_free", recording)
    assert small(tmp_path / "a.json", "--max-evaluations", 4) == 0
    assert len(seen) == 2 * EACH
    assert all(torch.equal(x_T, seen[0]) for x_T in seen)
    assert abs(seen[0].std() - 1) < 0.02


def test_a_stopped_run_goes_on_where_it_was(small, monkeypatch, tmp_path, capsys):
    out, draw, left = tmp_path / "a.json", ladder.draw, 3

    def stops(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(ladder, "draw", stops)
    assert small(out) == 130
    assert "the same command goes on" in capsys.readouterr().err
    before = rows_of(out)
    assert len(before) == 3

    calls = []
    monkeypatch.setattr(ladder, "draw", lambda *a: calls.append(a) or draw(*a))
    assert small(out, "--max-evaluations", 4) == 0
    rows = rows_of(out)
    assert len(calls) == 2 * EACH - 3 and len(rows) == 2 * EACH
    assert {key: rows[key] for key in before} == before  # as they were, to the digit of the timing

    calls.clear()
    assert small(out, "--max-evaluations", 4) == 0 and calls == []
    whole = tmp_path / "whole.json"
    assert small(whole, "--max-evaluations", 4) == 0
    for key, row in rows_of(whole).items():
        assert row["frechet_distance"] == pytest.approx(rows[key]["frechet_distance"], rel=1e-4)


def test_other_settings_are_refused(small, tmp_path, capsys):
    out = tmp_path / "a.json"
    assert small(out, "--max-evaluations", 3) == 0
    before = out.read_bytes()
    capsys.readouterr()
    assert small(out, "--seed", 1, "--num-images", N + 1) == 2
    error = capsys.readouterr().err
    assert f"num_images {N}, not {N + 1}; seed 0, not 1" in error and error.count("\n") == 1
    assert out.read_bytes() == before
    assert ladder.main(["--data", "sample", "--out", str(out), "--max-evaluations", "3"]) == 0  # its own settings
    assert out.read_bytes() == before


def test_a_file_of_other_weights_is_begun_anew(small, monkeypatch, tmp_path, capsys):
    out = tmp_path / "a.json"
    assert small(out, "--max-evaluations", 3) == 0
    before = json.loads(out.read_text())
    out.write_text(json.dumps(before | {"settings": before["settings"] | {"weights": "0" * 16, "num_images": 7}}))
    assert small(out, "--max-evaluations", 3) == 0
    assert "other networks: begun anew" in capsys.readouterr().err
    after = json.loads(out.read_text())
    assert after["settings"] == before["settings"] and len(after["rows"]) == len(before["rows"])


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": {}, "rows": [1]}', '{"settings": 1, "rows": []}'])
def test_a_damaged_file_is_refused_and_kept(small, tmp_path, capsys, text):
    out = tmp_path / "a.json"
    out.write_text(text)
    assert small(out) == 2
    error = capsys.readouterr().err
    assert "damaged" in error and error.count("\n") == 1
    assert out.read_text() == text


def test_real_images_in_a_samplers_place_reach_the_floor(small, monkeypatch, tmp_path):
    test = load_fashion_mnist("test", "sample")
    labels = torch.arange(N) % 10
    chosen = torch.stack([(test.labels == k).nonzero()[i // 10, 0] for i, k in enumerate(labels)])
    monkeypatch.setattr(metrics, "REAL_SUBSETS", 8)
    monkeypatch.setattr(ladder, "draw", lambda *arguments: (test.images[chosen], 3, 1.0, 1.0))
    assert small(tmp_path / "a.json", "--max-evaluations", 3) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    row, real = result["rows"][0], result["real"]
    for name in ("frechet_distance", "inception_score", "label_agreement"):
        assert abs(row[name] - real[name]["mean"]) < 6 * real[name]["deviation"], name
    noise = torch.randint(256, (N, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(ladder, "draw", lambda *arguments: (noise, 3, 1.0, 1.0))
    assert small(tmp_path / "b.json", "--max-evaluations", 3) == 0
    worse = json.loads((tmp_path / "b.json").read_text())["rows"][0]
    assert worse["frechet_distance"] > 5 * real["frechet_distance"]["mean"]


@pytest.mark.parametrize("options, complaint", [
    (["--num-images", "96"], "--num-images must lie in 97 … 1000"),
    (["--num-images", "1001"], "--num-images must lie in 97 … 1000"),
    (["--data", "no-such-folder"], "no-such-folder"),
])  # fmt: skip
def test_bad_values_are_one_line_and_status_2(small, tmp_path, capsys, options, complaint):
    assert small(tmp_path / "a.json", *options) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [
    ["--max-evaluations", "4"], ["--seed", "-1"], ["--out", "no-such-folder/a.json"], ["--out", "a.txt"],
    ["--num-images", "many"], ["--nonsense"],
])  # fmt: skip
def test_bad_options_are_one_line_and_status_2(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        ladder.main(options)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
