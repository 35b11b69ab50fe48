"""experiments/ablation.py and choices.py: runs on the sample, seeds and their spread, going on where it stopped, bad
input."""

import json

import pytest
import torch
from small_run import first_images

from ddpm_tutorial.optimizer import Muon
from experiments import ablation, choices, common

TINY = ["--data", "sample", "--num-train-steps", "2", "--batch-size", "8", "--channels", "8", "--num-images", "100"]


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    for module in (ablation, choices):
        monkeypatch.setattr(module, "load_fashion_mnist", first_images(500))


@pytest.fixture
def asked(monkeypatch):
    """What would be trained; nothing is."""
    jobs = []

    def made(make, missing, processes, until):
        for job in missing:
            jobs.append((job["run"], job["seed"]))
            figures = {"DDIM, 50 steps": {"frechet_distance": 3.0 + job["seed"]}}
            yield job, {"figures": figures, "frechet_distance": 3.0 + job["seed"]}

    monkeypatch.setattr(common, "_made", made)
    return jobs


def test_a_run_is_trained_and_judged(monkeypatch):
    for how in (ablation.DDIM, *ablation.FURTHER["linear, l2"].values()):
        monkeypatch.setitem(how, "num_inference_steps", 2)
    options = {"num_train_steps": 2, "batch_size": 8, "channels": 8, "lr": 2e-3, "num_images": 100, "threads": 1}
    reference = ablation.look(ablation.load_fashion_mnist("train", "sample").images)
    figures = {}
    for run in ("horizontal flips", "linear, l2"):
        job = {"run": run, "options": ablation.BASE | ablation.RUNS[run], "seed": 0}
        figures[run] = ablation.train_and_judge(job, options, "sample", reference)["figures"]
    assert set(figures["horizontal flips"]) == {"DDIM, 50 steps"}
    assert figures["horizontal flips"]["DDIM, 50 steps"]["frechet_distance"] > 5
    assert set(figures["linear, l2"]) == {"DDIM, 50 steps", *ablation.FURTHER["linear, l2"]}


def test_no_run_is_done_twice_and_seeds_are_put_together(asked, tmp_path, capsys):
    out = tmp_path / "a.json"
    assert ablation.main([*TINY, "--out", str(out), "--runs", "target v", "cosine, l1", "--seeds", "2"]) == 0
    assert asked == [("cosine, l1", 0), ("target v", 0), ("cosine, l1", 1), ("target v", 1)]
    assert ablation.main([*TINY, "--out", str(out), "--runs", "target v", "--seeds", "3"]) == 0
    assert asked[4:] == [("target v", 2)]  # the second call left out what was there
    result = json.loads(out.read_text())
    assert list(result["runs"]) == ["cosine, l1", "target v"]  # in the order of the table
    run = result["runs"]["target v"]
    assert run["seeds"] == 3 and run["options"]["target"] == "v"
    assert run["figures"]["DDIM, 50 steps"]["frechet_distance"] == {"mean": 4.0, "deviation": 1.0}
    assert 0 < result["real"]["frechet_distance"]["mean"] < 5
    assert len(ablation.RUNS) == 17 and len(result["settings"]["classifier"]) == 16
    assert ablation.main([*TINY, "--lr", "1e-3", "--out", str(out)]) == 2
    assert "lr 0.006, not 0.001" in capsys.readouterr().err
    assert json.loads(out.read_text()) == result


def test_choices_take_their_time_and_change_what_they_say(monkeypatch):
    images, labels, _ = choices.load_fashion_mnist("train", "sample")
    tiny = choices.BASE | {"channels": 8, "batch_size": 4}
    began = choices.time.process_time()
    model, steps = choices.train_for(1.0, tiny, 0, images[:50], labels[:50])
    assert steps > 2 and 1 < choices.time.process_time() - began < 10
    assert model.unet.head is not None and model.target == "v"
    made, optimizers = [], choices.make_optimizers
    monkeypatch.setattr(choices, "make_optimizers", lambda *a, **b: made.append(optimizers(*a, **b)) or made[-1])
    bare, _ = choices.train_for(0.2, tiny | choices.RUNS["Adam, no head"], 0, images[:50], labels[:50])
    assert bare.unet.head is None and not any(isinstance(part, Muon) for part in made[0])
    assert bare(torch.zeros(2, 1, 28, 28), torch.tensor([1, 2])).shape == (2, 1, 28, 28)


def test_choices_are_put_together(asked, tmp_path):
    out = tmp_path / "a.json"
    options = ["--data", "sample", "--seconds", "2", "--out", str(out), "--runs", "Muon", "Adam"]
    assert choices.main([*options, "--seeds", "1"]) == 0 and choices.main(options) == 0
    assert sorted(asked) == [(name, seed) for name in ("Adam", "Muon") for seed in range(3)]
    found = json.loads(out.read_text())["runs"]
    assert list(found) == ["Adam", "Muon"] and found["Adam"]["options"]["optimizer"] == "adam"
    assert found["Muon"]["figures"]["frechet_distance"] == {"mean": 4.0, "deviation": 1.0}


@pytest.mark.parametrize("module", [ablation, choices])
def test_a_run_of_other_options_is_made_again(module, asked, tmp_path, monkeypatch):
    """A name says what a run was only as long as the name means the same."""
    name = "Adam" if module is choices else "target v"
    options = ["--data", "sample", "--out", str(tmp_path / "a.json"), "--runs", name, "--seeds", "1"]
    for _ in range(2):
        assert module.main(options) == 0
    assert len(asked) == 1
    monkeypatch.setitem(module.RUNS, name, module.RUNS[name] | {"lr": 0.5})
    assert module.main(options) == 0 and len(asked) == 2
    found = json.loads((tmp_path / "a.json").read_text())
    assert len(found["rows"]) == 2 and found["runs"][name]["seeds"] == 1
    assert found["runs"][name]["options"]["lr"] == 0.5


@pytest.mark.parametrize(
    "wrong,told",
    [
        (["--runs", "cosinus"], "got 'cosinus'"), (["--num-train-steps", "0"], "--num-train-steps: must be"),
        (["--out", "a.txt"], "must be a FILE.json"), (["--data", "no-such-folder"], "no-such-folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(wrong, told, tmp_path, capsys):
    try:
        status = ablation.main([*TINY, "--out", str(tmp_path / "a.json"), *wrong])
    except SystemExit as stopped:
        status = stopped.code
    error = capsys.readouterr().err
    assert status == 2 and told in error and error.count("\n") == 1
