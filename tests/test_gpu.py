"""experiments/gpu.py at a tiny size on the CPU: what it leaves is whole, and the experiments understand it."""

import json

import pytest
import torch

from ddpm_tutorial import metrics
from ddpm_tutorial.data import load_fashion_mnist
from ddpm_tutorial.predictor import NoisePredictor
from experiments import gpu, guidance_sweep, ladder
from experiments.benchmark import __main__ as benchmark
from experiments.common import fingerprint

TINY = ["--minutes", "0.1", "--device", "cpu", "--data", "sample", "--channels", "8", "--num-images", "100"]


def few(split, source):
    data = load_fashion_mnist(split, source)
    return data._replace(images=data.images[:1000], labels=data.labels[:1000])


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(ladder, "EVALUATIONS", (2, 3))
    monkeypatch.setattr(guidance_sweep, "SETTINGS", guidance_sweep.SETTINGS[:1])
    monkeypatch.setattr(metrics, "REAL_SUBSETS", 2)
    for module in (ladder, guidance_sweep):
        monkeypatch.setattr(module, "load_fashion_mnist", few)
    # every table gets a row, in whatever time
    monkeypatch.setattr(gpu, "UNTIL", dict.fromkeys(gpu.UNTIL, 100) | {"training": 0.5})
    monkeypatch.setattr(benchmark, "candidates", lambda quick, all=benchmark.candidates: all(quick)[:1])


def test_a_folder_of_weights_and_results(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu"
    assert gpu.main([*TINY, "--out", str(out)]) == 0
    model = NoisePredictor.from_pretrained(out / "weights")
    assert model.unet.channels == 8 and model.target == "v"
    assert json.loads((out / "weights" / "training.json").read_text())["step"] > 1
    assert {path.name for path in (out / "results").iterdir()} == {
        "ladder.json", "guidance_sweep.json", "benchmark-cpu.json",
    }  # fmt: skip
    found = json.loads((out / "results" / "ladder.json").read_text())
    assert found["settings"]["weights"] == fingerprint(out / "weights") and found["settings"]["num_images"] == 100
    assert len(found["rows"]) == 2 * (len(ladder.SOLVERS) - 1)  # σ² = β has a row of all T steps only
    assert found["command"].startswith("python -m experiments.gpu --minutes 0.1") and "sample" not in found["command"]
    (ours,) = json.loads((out / "results" / "benchmark-cpu.json").read_text())["candidates"]
    assert ours["train"]["eager"]["images_per_second"]["median"] > 0

    # shipped, it is kept: by the experiment's own command, without its options
    monkeypatch.setattr(NoisePredictor, "shipped", out / "weights")
    monkeypatch.setattr(ladder, "draw", lambda *_: pytest.fail("a row was made twice"))
    before = (out / "results" / "ladder.json").read_bytes()
    assert ladder.main(["--data", "sample", "--out", str(out / "results" / "ladder.json")]) == 0
    assert (out / "results" / "ladder.json").read_bytes() == before


def test_what_has_no_time_left_is_left_out(tiny, tmp_path, monkeypatch):
    out = tmp_path / "gpu"
    monkeypatch.setattr(gpu, "UNTIL", dict.fromkeys(gpu.UNTIL, 0.0) | {"training": 0.5})
    assert gpu.main([*TINY, "--out", str(out)]) == 0
    assert json.loads((out / "results" / "ladder.json").read_text())["rows"] == []
    (ours,) = json.loads((out / "results" / "benchmark-cpu.json").read_text())["candidates"]
    assert ours["train"]["fast"] == {"failed": "no time was left"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("options", [["--device", "cuda"], ["--minutes", "0"], ["--device", "tpu"]])
def test_bad_input_is_one_line_and_status_2(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path / "gpu"), *options])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
