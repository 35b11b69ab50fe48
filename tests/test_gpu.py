"""experiments/gpu.py at a tiny size on the CPU: what it leaves is whole, and the experiments understand it."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from small_run import first_images

from ddpm_tutorial import metrics
from ddpm_tutorial.predictor import NoisePredictor
from experiments import emoji, gpu, guidance_sweep, ladder, ladder_flow, latents
from experiments.benchmark import __main__ as benchmark
from experiments.common import fingerprint

TINY = ["--minutes", "0.1", "--device", "cpu", "--data", "sample", "--channels", "8", "--num-images", "100"]


@pytest.fixture
def tiny(monkeypatch):
    """Little of everything; returns what emoji and latents, which have their own tests, were asked for."""
    asked = {}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(ladder, "EVALUATIONS", (2, 3))
    monkeypatch.setattr(ladder, "BATCH_SIZE", 100)
    monkeypatch.setattr(ladder_flow, "EVALUATIONS", (1,))
    monkeypatch.setattr(guidance_sweep, "SETTINGS", guidance_sweep.SETTINGS[:1])
    monkeypatch.setattr(metrics, "REAL_SUBSETS", 2)
    for module in (ladder, guidance_sweep):
        monkeypatch.setattr(module, "load_fashion_mnist", first_images(1000))
    for module in (emoji, latents):
        name = module.__name__.split(".")[-1]
        monkeypatch.setattr(module, "run", lambda name=name, **options: asked.update({name: options}))
    # every table gets a row, in whatever time
    monkeypatch.setattr(gpu, "seconds_for", lambda parts, left: 1.0 if parts[0] in ("shipped", "flow") else 6000.0)
    monkeypatch.setattr(benchmark, "candidates", lambda quick, all=benchmark.candidates: all(quick)[:1])
    return asked


def test_a_folder_of_weights_and_results(tiny, tmp_path, monkeypatch):
    out = tmp_path / "gpu"
    assert gpu.main([*TINY, "--out", str(out)]) == 0
    model, flow = (NoisePredictor.from_pretrained(out / name) for name in ("weights", "weights/flow"))
    assert (model.target, flow.target) == ("v", "velocity") and model.unet.channels == flow.unet.channels == 8
    assert load_file(out / "weights" / "flow" / "model.safetensors")["label_emb.weight"].dtype == torch.float16
    for folder in (out / "weights", out / "weights" / "flow"):
        info = json.loads((folder / "training.json").read_text())
        assert info["step"] == info["config"]["num_train_steps"] > 1
        assert {"config.json", "log.csv"} <= {path.name for path in folder.iterdir()}
    assert tiny["emoji"]["out"] == out / "emoji" and tiny["emoji"]["minutes"] == 100
    assert tiny["latents"]["out"] == out / "latents" and tiny["latents"]["seconds"] == 1800
    assert {path.name for path in (out / "results").iterdir()} == {
        "ladder.json", "ladder-flow.json", "guidance_sweep.json", "benchmark-cpu.json",
    }  # fmt: skip
    found, beside = (json.loads((out / "results" / f"{name}.json").read_text()) for name in ("ladder", "ladder-flow"))
    assert found["settings"]["weights"] == fingerprint(out / "weights") and found["settings"]["num_images"] == 100
    assert beside["settings"]["flow"] == fingerprint(out / "weights" / "flow") and len(beside["rows"]) == 4
    assert len(found["rows"]) == 2 * (len(ladder.SOLVERS) - 1)  # σ² = β has a row of all T steps only
    assert found["command"].startswith("python -m experiments.gpu --minutes 0.1") and "sample" not in found["command"]
    (ours,) = json.loads((out / "results" / "benchmark-cpu.json").read_text())["candidates"]
    assert ours["train"]["eager"]["images_per_second"]["median"] > 0

    # nothing is made twice; shipped, a table is kept: by the experiment's own command, without its options
    monkeypatch.setattr(gpu.command, "run", lambda *_: pytest.fail("a network was trained twice"))
    monkeypatch.setattr(ladder, "draw", lambda *_: pytest.fail("a row was made twice"))
    monkeypatch.setattr(NoisePredictor, "shipped", out / "weights")
    before = (out / "results" / "ladder.json").read_bytes()
    assert gpu.main([*TINY, "--out", str(out), "--only", "flow", "ladder", "shipped"]) == 0
    assert ladder.main(["--data", "sample", "--out", str(out / "results" / "ladder.json")]) == 0
    assert (out / "results" / "ladder.json").read_bytes() == before


def test_a_training_that_was_cut_off_goes_on(tiny, tmp_path, monkeypatch):
    options, save = [*TINY, "--out", str(tmp_path / "gpu"), "--only", "flow"], gpu.command.save_checkpoint

    def save_and_stop(*given):
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "steps_in", lambda *_: 3)
    monkeypatch.setattr(gpu.command, "save_checkpoint", save_and_stop)
    assert gpu.main(options) == 130 and not (tmp_path / "gpu" / "weights").exists()
    monkeypatch.setattr(gpu, "steps_in", lambda *_: pytest.fail("begun again"))
    monkeypatch.setattr(gpu.command, "save_checkpoint", save)
    assert gpu.main(options) == 0
    assert json.loads((tmp_path / "gpu" / "weights" / "flow" / "training.json").read_text())["step"] == 3


def test_a_part_that_fails_does_not_stop_the_others(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji, "run", lambda **_: 1 / 0)
    assert gpu.main([*TINY, "--out", str(tmp_path / "gpu"), "--only", "latents", "emoji", "ladder"]) == 2
    assert "latents" in tiny and re.search("not made: emoji, ladder$", capsys.readouterr().err)  # no weights, no ladder


def test_what_has_no_time_left_is_left_out(tiny, tmp_path, monkeypatch):
    out = tmp_path / "gpu"
    (out / "weights").mkdir(parents=True)
    for path in NoisePredictor.shipped.glob("*.*"):
        (out / "weights" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(gpu, "seconds_for", lambda *_: 0.0)
    assert gpu.main([*TINY, "--out", str(out), "--only", "emoji", "ladder", "benchmark"]) == 2 and not tiny
    assert json.loads((out / "results" / "ladder.json").read_text())["rows"] == []
    (ours,) = json.loads((out / "results" / "benchmark-cpu.json").read_text())["candidates"]
    assert ours["train"]["fast"] == {"failed": "no time was left"}
    monkeypatch.setattr(gpu, "seconds_for", lambda *_: 60.0)
    assert gpu.main([*TINY, "--out", str(out), "--only", "benchmark"]) == 0  # it was not done, so it goes on
    (ours,) = json.loads((out / "results" / "benchmark-cpu.json").read_text())["candidates"]
    assert ours["train"]["eager"]["images_per_second"]["median"] > 0


def test_each_part_has_its_share_of_what_is_left():
    weights = ["shipped", "flow", "emoji", "latents"]
    assert gpu.seconds_for(list(gpu.SHARES), 540) == pytest.approx(243)
    assert gpu.seconds_for(weights, 540) > 290  # 200 passes of the shipped network, at 54,000 images a second
    assert gpu.seconds_for(["latents"], 40) == 40 and gpu.seconds_for(weights[2:], 50) == 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("options", [["--device", "cuda"], ["--minutes", "0"], ["--only", "words"]])
def test_bad_input_is_one_line_and_status_2(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path / "gpu"), *options])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
