"""A training in a folder: its log, grids and checkpoints, stopped and gone on with; one process at a time."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import CONFIG, new_model, weights
from tqdm import tqdm

from ddpm_tutorial import training
from ddpm_tutorial.checkpoint import STATE_FILE, TrainState
from ddpm_tutorial.command import train as command
from ddpm_tutorial.command.train import in_main_process, train_to_folder
from ddpm_tutorial.files import locked
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.training import train


def test_run_in_a_folder_writes_log_samples_and_checkpoint(crops, tmp_path):
    last = train_to_folder(new_model(), *crops, CONFIG, tmp_path, log_every=3, checkpoint_every=4, sample_every=5)
    assert last == 8
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [3, 4, 6, 8]  # each 3 steps, and with each checkpoint
    assert all(0 < float(row["loss"]) < 2 for row in rows)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-000005.png", "step-000008.png"]
    assert json.loads((tmp_path / "training.json").read_text())["config"]["batch_size"] == 16


def test_stopped_folder_goes_on_and_its_log_has_no_row_twice(crops, tmp_path):
    options = {"log_every": 1, "checkpoint_every": 2, "sample_every": 0}
    train_to_folder(new_model(), *crops, CONFIG, tmp_path / "whole", **options)
    calls = iter(range(100))
    stopped = train_to_folder(
        new_model(), *crops, CONFIG, tmp_path / "parts", should_stop=lambda: next(calls) == 4, **options
    )
    assert stopped == 5
    extra = "6,0,0.5,0.1,1e-3,9\r\n"  # a row after the checkpoint, as a killed run leaves it
    with (tmp_path / "parts" / "log.csv").open("a") as file:
        file.write(extra)
    assert train_to_folder(new_model(), *crops, CONFIG, tmp_path / "parts", resume=True, **options) == 8
    logs = [list(csv.DictReader((tmp_path / n / "log.csv").read_text().splitlines())) for n in ("whole", "parts")]
    assert [(r["step"], r["loss"]) for r in logs[0]] == [(r["step"], r["loss"]) for r in logs[1]]
    whole, parts = (NoisePredictor.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert torch.equal(weights(whole), weights(parts))


def test_folder_with_a_checkpoint_is_not_overwritten(crops, tmp_path):
    train_to_folder(new_model(), *crops, CONFIG, tmp_path, sample_every=0)
    before = (tmp_path / STATE_FILE).read_bytes()
    with pytest.raises(ValueError, match="already holds a checkpoint.*--resume"):
        train_to_folder(new_model(), *crops, CONFIG, tmp_path, sample_every=0)
    assert (tmp_path / STATE_FILE).read_bytes() == before


def test_stop_writes_the_checkpoint_and_draws_no_samples(crops, tmp_path):
    """Between SIGTERM and SIGKILL there may be little time."""
    train_to_folder(new_model(), *crops, CONFIG, tmp_path, sample_every=1, should_stop=lambda: True)
    assert (tmp_path / STATE_FILE).exists() and not (tmp_path / "samples").exists()


def test_a_run_that_is_killed_or_stopped_between_grid_and_checkpoint_loses_no_grid(crops, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(state, *others):
        if state.step == 8:
            raise Killed
        good(state, *others)

    good, grid = command.save_checkpoint, "samples/step-000008.png"
    options = {"checkpoint_every": 2, "sample_every": 4}
    train_to_folder(new_model(), *crops, CONFIG, tmp_path / "whole", **options)
    monkeypatch.setattr(command, "save_checkpoint", killed)
    with pytest.raises(Killed):
        train_to_folder(new_model(), *crops, CONFIG, tmp_path / "killed", **options)
    monkeypatch.setattr(command, "save_checkpoint", good)
    assert (tmp_path / "killed" / grid).exists()  # drawn before the checkpoint, and by the next run again

    calls, stopped = iter(range(100)), tmp_path / "stopped"
    train_to_folder(new_model(), *crops, CONFIG, stopped, should_stop=lambda: next(calls) == 7, **options)
    assert not (stopped / grid).exists()  # between SIGTERM and SIGKILL there may be little time
    assert train_to_folder(new_model(), *crops, CONFIG, stopped, resume=True, **options) == 8
    whole, drawn = (np.asarray(Image.open(tmp_path / name / grid)).astype(int) for name in ("whole", "stopped"))
    assert abs(whole - drawn).max() <= 1


@pytest.mark.parametrize("damage", [b"\x80\n", b"a,b\n1,2\n", b"%sx,1,1,1,1,1\n", b"%s1,1\n", b'%s"1\n', b"\0\0\n"])
def test_damaged_log_is_set_aside_before_the_first_step(crops, tmp_path, capsys, damage):
    train_to_folder(new_model(), *crops, replace(CONFIG, num_train_steps=1), tmp_path, sample_every=0)
    header = (tmp_path / "log.csv").read_bytes().splitlines(keepends=True)[0]
    damage = damage.replace(b"%s", header)
    (tmp_path / "log.csv").write_bytes(damage)

    def stop():
        assert (tmp_path / "log.csv.damaged").read_bytes() == damage
        return True

    train_to_folder(new_model(), *crops, CONFIG, tmp_path, sample_every=0, resume=True, should_stop=stop)
    assert "it is log.csv.damaged now" in capsys.readouterr().err
    lines = (tmp_path / "log.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].encode() == header.strip() and [line.split(",")[0] for line in lines[1:]] == ["2"]


def test_rows_of_a_run_stopped_between_them_are_those_of_one_that_was_not(crops, tmp_path, monkeypatch):
    """Rows are means since the row before. A kill forgets what was since the checkpoint, which has a row of its own."""
    options = {"log_every": 3, "checkpoint_every": 4, "sample_every": 0}
    train_to_folder(new_model(), *crops, CONFIG, tmp_path / "whole", **options)
    losses = [state.loss.item() for state in train(new_model(), *crops, CONFIG)]
    calls = iter(range(100))

    def kill():
        if next(calls) == 4:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        train_to_folder(new_model(), *crops, CONFIG, tmp_path / "killed", should_stop=kill, **options)
    train_to_folder(new_model(), *crops, CONFIG, tmp_path / "killed", resume=True, **options)
    rows = [list(csv.DictReader((tmp_path / n / "log.csv").open(encoding="utf-8"))) for n in ("whole", "killed")]
    assert [[row["step"], row["loss"]] for row in rows[0]] == [[row["step"], row["loss"]] for row in rows[1]]
    for row, steps in zip(rows[0], ([0, 1, 2], [3], [4, 5], [6, 7]), strict=True):
        assert float(row["loss"]) == pytest.approx(sum(losses[i] for i in steps) / len(steps), abs=2e-6)


def test_what_others_keep_in_the_folder_stays(crops, tmp_path):
    names = (".writing-my-thesis.txt", "notes/.writing-a", "samples/.writing-b", "other/.writing-checkpoint/x")
    mine = [tmp_path / name for name in names]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    train_to_folder(new_model(), *crops, CONFIG, tmp_path, sample_every=4)
    train_to_folder(new_model(), *crops, CONFIG, tmp_path, sample_every=4, resume=True)
    assert all(path.read_text(encoding="utf-8") == "mine" for path in mine)


def test_the_bar_moves_with_every_step(crops, tmp_path, monkeypatch):
    moved = []

    class Bar(tqdm):
        def update(self, n=1):
            moved.append(n)
            return super().update(n)

    monkeypatch.setattr(command, "tqdm", Bar)
    train_to_folder(new_model(), *crops, CONFIG, tmp_path, sample_every=0)
    assert moved == [1] * 8


def test_where_the_main_process_refuses_the_others_do(monkeypatch):
    """The others run nothing, and hear of it by a broadcast."""

    def refuse():
        raise ValueError("another run")

    with pytest.raises(ValueError, match="another run"):
        in_main_process(refuse)
    monkeypatch.setattr(command, "processes", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(command, "broadcast_object_list", lambda failed: [ValueError(f"heard beside {failed}")])
    with pytest.raises(ValueError, match=r"heard beside \[None\]"):
        in_main_process(lambda: pytest.fail("it is for the main process"))


def test_half_a_row_and_files_left_behind_go(crops, tmp_path):
    options = {"log_every": 1, "sample_every": 0}
    calls = iter(range(100))
    train_to_folder(new_model(), *crops, CONFIG, tmp_path, should_stop=lambda: next(calls) == 3, **options)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("4")  # cut off within the row of step 45, say
    (tmp_path / ".writing-checkpoint").mkdir()
    (tmp_path / ".writing-checkpoint" / "file").touch()
    (tmp_path / ".writing-log.csv").touch()
    train_to_folder(new_model(), *crops, CONFIG, tmp_path, resume=True, **options)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 9)]
    assert all(None not in row.values() for row in rows)
    assert not list(tmp_path.glob("**/.writing-*"))


def test_loss_that_is_not_finite_leaves_a_checkpoint_that_goes_on(crops, tmp_path, monkeypatch):
    options = {"checkpoint_every": 2, "sample_every": 0}
    whole = tmp_path / "whole"
    train_to_folder(new_model(), *crops, CONFIG, whole, **options)
    good = training.simple_loss
    count = iter(range(100))
    monkeypatch.setattr(training, "simple_loss", lambda *a: good(*a) * (float("nan") if next(count) == 4 else 1))
    with pytest.raises(FloatingPointError, match="step 5: the loss or its gradient"):
        train_to_folder(new_model(), *crops, CONFIG, tmp_path / "broken", **options)
    monkeypatch.setattr(training, "simple_loss", good)
    train_to_folder(new_model(), *crops, CONFIG, tmp_path / "broken", resume=True, **options)
    assert torch.equal(
        weights(NoisePredictor.from_pretrained(whole)), weights(NoisePredictor.from_pretrained(tmp_path / "broken"))
    )


def test_finished_run_resumes_to_nothing(crops, tmp_path):
    train_to_folder(new_model(), *crops, CONFIG, tmp_path, sample_every=0)
    for num_train_steps in (8, 2):
        config = replace(CONFIG, num_train_steps=num_train_steps)
        assert train_to_folder(new_model(), *crops, config, tmp_path, sample_every=0, resume=True) == 8


def test_a_run_in_a_folder_asks_before_each_row_and_checkpoint(crops, tmp_path, monkeypatch):
    """Beside the loop, which on a GPU asks at the end only: no row or checkpoint is of a step after a bad one."""
    asked = []
    monkeypatch.setattr(TrainState, "check", lambda self: asked.append(self.step))
    config = replace(CONFIG, num_train_steps=7)
    train_to_folder(new_model(), *crops, config, tmp_path, log_every=3, checkpoint_every=5, sample_every=0)
    assert sorted(asked) == [1, 2, 3, 3, 4, 5, 5, 5, 6, 6, 7, 7, 7]  # save_checkpoint asks for itself, too


def test_a_second_run_in_a_folder_is_refused(crops, tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match=f"another run is writing to {tmp_path}"):
        train_to_folder(new_model(), *crops, CONFIG, tmp_path)
    assert not list(tmp_path.iterdir())
    train_to_folder(new_model(), *crops, replace(CONFIG, num_train_steps=1), tmp_path, sample_every=0)
    assert not (tmp_path / ".lock").exists()
