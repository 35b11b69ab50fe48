"""The tables that chapters show: they load, say how they were made, and were made with the weights that are shipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddpm_tutorial.data import CLASS_NAMES
from ddpm_tutorial.drawing import read_samples
from ddpm_tutorial.flow import SHIPPED_FLOW
from ddpm_tutorial.metrics import Classifier, NoisyClassifier
from ddpm_tutorial.results import RESULTS_FOLDER, load_results
from ddpm_tutorial.words import EMOJI_WEIGHTS
from experiments import __main__ as experiments
from experiments.common import Table, cuda_or_cpu, fingerprint, made_with, pixel_figures

NAMES = sorted(path.stem for path in RESULTS_FOLDER.glob("*.json"))
TRAIN_THEIR_OWN = ("ablation", "choices", "benchmark", "progress", "emoji", "latents")


def test_every_table_loads():
    assert {"evaluation-10000", "evaluation-bits", "samples"} <= set(NAMES)
    for name in NAMES:
        assert load_results(name) == json.loads((RESULTS_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_a_table_was_made_with_the_weights_that_are_shipped(name):
    settings = load_results(name)["settings"]
    assert ("weights" in settings) != name.startswith(TRAIN_THEIR_OWN)
    shipped_now = made_with(None, Classifier, NoisyClassifier)
    others = (("flow", SHIPPED_FLOW), ("emoji", EMOJI_WEIGHTS))
    shipped_now |= {network: fingerprint(folder) for network, folder in others if network in settings}
    for network, shipped in shipped_now.items():
        assert settings.get(network, shipped) == shipped, f"{name}.json was made with another {network}: make results"


@pytest.mark.parametrize("name", NAMES)
def test_a_table_says_how_it_was_made(name):
    result = load_results(name)
    assert result["command"].startswith("python -m experiments.") and result["settings"]["device"] in ("cpu", "cuda")
    assert {"cpu", "gpu", "threads", "versions", "date"} <= set(result["machine"])
    assert {"ddpm_tutorial", "torch"} <= set(result["machine"]["versions"])
    assert "seed" in result["settings"] or all("seed" in row for row in result["rows"])


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="no results 'evaluations'; there are .*evaluation-10000"):
        load_results("evaluations")


def test_the_samples_are_of_every_class():
    images, labels = read_samples(RESULTS_FOLDER / "samples.npz")
    assert images.shape == (2000, 1, 28, 28)
    assert torch.bincount(labels).tolist() == [200] * len(CLASS_NAMES)


@pytest.fixture
def asked(monkeypatch):
    """What ``python -m experiments`` runs, each in no time; "samples" fails."""
    calls = []

    def main_of(name):
        return lambda argv: calls.append((name, *argv)) or 2 * (name == "samples")

    plan = {name: (main_of(name), minutes) for name, (_, minutes) in experiments.EXPERIMENTS.items()}
    monkeypatch.setattr(experiments, "EXPERIMENTS", plan)
    return calls


def test_all_experiments_run_one_after_the_other_with_the_data(asked, capsys):
    assert experiments.main(["--data", "sample"]) == 1  # one failed, and the others ran
    assert [call[0] for call in asked] == list(experiments.EXPERIMENTS)
    assert all(call[1:] == (("--data", "sample") if call[0] != "benchmark" else ()) for call in asked)
    out, error = capsys.readouterr()
    assert "[1/11] evaluation" in out and error == "failed: samples\n"


def test_only_some_experiments_and_bad_names(asked, capsys):
    assert experiments.main(["--only", "ladder", "editing"]) == 0
    assert asked == [("editing",), ("ladder",)]
    with pytest.raises(SystemExit) as stopped:
        experiments.main(["--only", "ladders"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_command_starts_in_the_repository():
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "--help"], cwd=root, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0 and "ladder" in done.stdout, done.stderr


def test_rows_come_in_the_order_of_the_jobs_and_none_is_lost(tmp_path):
    out, jobs = tmp_path / "a.json", [{"n": n, "kind": [n, 1]} for n in range(4)]
    Table(out, "first", {"seed": 0}, jobs[2:]).fill(lambda job: {"square": job["n"] ** 2})
    table = Table(out, "second", {"seed": 0}, jobs[:3])
    assert table.missing == jobs[:2]
    table.fill(lambda job: {"square": job["n"] ** 2})
    assert json.loads(out.read_text())["rows"] == [job | {"square": job["n"] ** 2} for job in jobs]
    assert Table(out, "third", {"seed": 0}, jobs).result["command"] == "second"  # nothing was made by the third


def test_a_dot_grid_is_seen_in_the_pixel_figures():
    real = torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)) // 4
    dots = real.clone()
    dots[..., ::2, ::2] += 100
    found, same = pixel_figures(dots, real), pixel_figures(real, real)
    assert found["pixel_frequency"] > 10 and same["pixel_frequency"] == 1
    assert same["black"] == same["real_black"] == (real == 0).double().mean() > found["black"]


def test_the_front_page_says_what_the_table_says():
    text = " ".join((Path(__file__).parents[1] / "book" / "index.md").read_text(encoding="utf-8").split())
    table = load_results("evaluation-10000")
    ours, real = ({name: figure["mean"] for name, figure in table[of].items()} for of in ("generated", "real"))
    count, steps = f"{table['num_images']:,} samples", f"in {table['num_inference_steps']} steps"
    distances = [f"distance of {ours['frechet_distance']:.2f}", f"lie at {real['frechet_distance']:.2f}"]
    shares = [f"in {ours['label_agreement']:.0%} of them", f"in {real['label_agreement']:.0%} of real ones"]
    for said in (count, steps, *distances, *shares):
        assert said in text, said


def test_a_table_without_jobs_that_goes_on_says_who_wrote_it_last(tmp_path):
    Table(tmp_path / "a.json", "first", {"seed": 0}, []).write()
    assert Table(tmp_path / "a.json", "second", {"seed": 0}, []).result["command"] == "second"


def test_without_cuda_no_other_gpu_is_taken(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_or_cpu().type == "cpu" and os.environ["ACCELERATE_USE_CPU"] == "1"
