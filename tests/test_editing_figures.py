"""experiments/editing.py: each row is what it says, a stopped run goes on, bad options are refused in one line."""

import json

import pytest
import torch

from ddpm_tutorial.results import RESULTS_FOLDER
from experiments import editing


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command with one cheap row of each kind; its file, and how to run it."""
    monkeypatch.setattr(editing, "COMPLETIONS", [(True, True, 2, 1.0, 1)])
    monkeypatch.setattr(editing, "CHANGES", [(7, 9)])
    monkeypatch.setattr(editing, "STRENGTHS", [0.002])
    out = tmp_path / "a.json"
    return out, lambda *options: editing.main(["--data", "sample", "--out", str(out), *map(str, options)])


def test_rows_are_made_once_and_beside_real_images(command, monkeypatch):
    out, run = command
    assert run("--num-images", 8) == 0
    result = json.loads(out.read_text())
    completion, change = result["rows"]
    assert completion["kind"] == "completion" and completion["with_label"] and completion["pull"]
    assert completion["error"] > 0 == result["real"]["error"]
    # two steps of noise leave a sneaker as it was
    assert change["similarity"] > 0.99 and change["label_agreement"] == 0
    monkeypatch.setattr(editing.Measure, "change", lambda *_: pytest.fail("a row was made twice"))
    assert run("--num-images", 8) == 0 and json.loads(out.read_text()) == result


def test_the_known_half_stays_and_only_the_other_is_judged(command, monkeypatch):
    seen = []
    monkeypatch.setattr(editing.Measure, "figures_of", lambda self, x: seen.append((self, x)) or {"seam": 1.0})
    command[1]("--num-images", 4)
    (measure, real), (_, made) = seen
    assert torch.equal(real, measure.x_0)
    torch.testing.assert_close(made[..., :14], measure.x_0[..., :14], atol=1e-5, rtol=0)
    assert (made[..., 14:] - measure.x_0[..., 14:]).abs().mean() > 0.05
    without = measure.completion(True, False, 2, 1.0, 1)
    assert without == {"seam": 1.0} and not torch.equal(seen[-1][1], made)  # the pull does something


def test_bad_input_is_one_line(command, capsys):
    out, run = command
    assert run("--num-images", 3) == 2
    assert "must lie in 4 … 1000 for this data, got 3" in capsys.readouterr().err
    assert run("--num-images", 8) == 0
    assert run("--num-images", 9) == 2
    assert "num_images 8, not 9" in capsys.readouterr().err


def test_the_file_of_the_book_is_complete():
    rows = json.loads((RESULTS_FOLDER / "editing.json").read_text())["rows"]
    assert all(any(job.items() <= row.items() for row in rows) for job in editing.jobs())
