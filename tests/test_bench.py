"""experiments/benchmark: the peers are what their sources say, the matching matches, and the table is complete."""

import json

import pytest
import torch
from small_run import first_images

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import peers, recipe


@pytest.mark.parametrize(("peer", "size", "gflop"), [
    ("notebook", 2_020_257, 0.51), ("lucidrains", 2_026_137, 0.51), ("diffusers", 3_939_393, 0.82),
])  # fmt: skip
def test_default_peers_have_the_known_size(peer, size, gflop):
    make, width, _ = peers.PEERS[peer]
    model = make(width)
    assert peers.parameters(model) == size
    assert abs(peers.operations(model) / 1e9 - gflop) < 0.01


def test_the_notebooks_network_predicts_noise_and_learns():
    torch.manual_seed(0)
    model, x = peers.NotebookUNet(12), torch.randn(2, 1, 28, 28)
    pred_noise = model(x, torch.tensor([1, 1000]))
    assert pred_noise.shape == x.shape
    pred_noise.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.ndim > 1)
    assert not torch.equal(model(x, torch.tensor([1, 1])), model(x, torch.tensor([1000, 1000])))


def test_standardised_filters_ignore_scale_and_mean():
    torch.manual_seed(0)
    conv, x = peers.StandardizedConv2d(3, 4, 3, padding=1, bias=False), torch.randn(2, 3, 8, 8)
    before = conv(x)
    conv.weight.data = 5 * conv.weight.data + 2
    torch.testing.assert_close(conv(x), before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize("kind", ["operations", "parameters"])
def test_matched_peers_cost_what_ours_costs(peer, kind):
    measure = peers.parameters if kind == "parameters" else lambda model: peers.operations(model)
    matched = peers.PEERS[peer][0](peers.matched_width(peer, kind))
    assert abs(measure(matched) / measure(peers.shipped_unet()) - 1) < 0.1


def test_time_to_an_error_is_interpolated():
    curve = [(0.0, 1.0), (10.0, 0.5), (20.0, 0.6), (30.0, 0.1)]
    assert recipe.reach(curve, 0.75) == 5
    assert recipe.reach(curve, 0.5) == 10
    assert recipe.reach(curve, 0.35) == 25
    assert recipe.reach(curve, 0.05) is None
    assert recipe.reach(curve, 1.0) == 0


def test_quick_writes_a_complete_table_once(tmp_path, monkeypatch, capsys):
    out = tmp_path / "table.json"
    options = ["--quick", "--rounds", "2", "--out", str(out)]
    assert benchmark.main(options) == 0
    assert " = ops" in capsys.readouterr().out
    table = json.loads(out.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]
    assert table["machine"]["cpu"] and table["machine"]["versions"]["torch"] == torch.__version__
    assert table["command"] == "python -m experiments.benchmark --rounds 2 --quick"
    assert len(table["candidates"]) == 4 and table["options"]["rounds"] == 2
    for row in table["candidates"]:
        for mode in ("train", "sample"):
            for setting in ("eager", "fast"):
                assert row[mode][setting]["images_per_second"]["median"] > 0, (row["name"], mode, setting)
            assert row[mode]["ours_faster"]["best"]["q1"] <= row[mode]["ours_faster"]["best"]["q3"]
    first = table["candidates"][0]
    assert first["train"]["ours_faster"]["best"]["median"] == 1
    monkeypatch.setattr(benchmark, "run_rounds", lambda *_: pytest.fail("measured twice"))
    assert benchmark.main(options) == 0


def test_quick_recipe_times_both(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "load_fashion_mnist", first_images(500))
    out = tmp_path / "recipe.json"
    assert benchmark.main(["--recipe", "--quick", "--seconds", "0.3", "--data", "sample", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    for name, curve in result["curves"].items():
        seconds = [s for s, _ in curve["seconds_and_error"]]
        assert curve["steps"] > 0 and seconds == sorted(seconds), name
    assert set(result["samples"]["frechet_distance"]) == {*result["curves"], "real test images"}
    assert len(result["curves"]) == 3 and result["targets"]["100%"]["seconds"]["notebook"] >= 0


@pytest.mark.parametrize("arguments", [
    ["--rounds", "0"], ["--seconds", "3"], ["--recipe", "--seconds", "-1"], ["--out", "no-such-folder/a.json"],
    ["--out", "a.txt"], ["--recipe", "--rounds", "2"], ["--nonsense"],
])  # fmt: skip
def test_bad_input_is_one_line_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
