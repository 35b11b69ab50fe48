"""Checkpoints: a stopped run goes on exactly, and no crash, full disk or damaged file makes one that lies."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_run import CONFIG, new_model, weights
from torch.testing import assert_close

from ddpm_tutorial import checkpoint
from ddpm_tutorial.checkpoint import STATE_FILE, read_training_info, save_checkpoint
from ddpm_tutorial.command.train import WriteError, train_to_folder
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.training import train

METADATA = {"step": "1", "averaged": "1", "scaler": "{}"}


def saved(steps, stops, folder):
    """All states of a run that is saved at these steps, each into a folder of its own."""
    states = []
    for state in steps:
        states.append(state)
        if state.step in stops:
            save_checkpoint(state, folder / str(state.step), {})
    return states


@pytest.fixture(scope="module")
def one_step(crops, tmp_path_factory):
    """The checkpoint of a first step; whoever damages it works on a copy."""
    folder = tmp_path_factory.mktemp("one step")
    save_checkpoint(next(train(new_model(), *crops, CONFIG)), folder, {})
    return folder


@pytest.fixture
def checkpoint_folder(one_step, tmp_path):
    return shutil.copytree(one_step, tmp_path / "copy")


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_resumed_run_equals_an_uninterrupted_one(crops, tmp_path, optimizer):
    config = replace(CONFIG, optimizer=optimizer)
    whole = saved(train(new_model(), *crops, config), (1, 3, 6), tmp_path)
    for stop in (1, 3, 6):
        rest = list(train(new_model(seed=99), *crops, config, resume_from=tmp_path / str(stop)))
        assert [state.step for state in rest] == list(range(stop + 1, 9))
        assert torch.equal(weights(rest[-1].model), weights(whole[-1].model))
        assert torch.equal(weights(rest[-1].ema), weights(whole[-1].ema))
        assert [s.loss.item() for s in rest] == [s.loss.item() for s in whole[stop:]]


def test_a_run_made_longer_before_its_cool_down_equals_one_that_was_longer_from_the_start(crops, tmp_path):
    longer = replace(CONFIG, num_train_steps=12)
    *_, whole = train(new_model(), *crops, longer)
    ends = []
    saved(train(new_model(), *crops, CONFIG), (4, 7), tmp_path)
    for stop in (4, 7):  # CONFIG cools down over its last 0.3: from step 6 on
        *_, last = train(new_model(seed=99), *crops, longer, resume_from=tmp_path / str(stop))
        ends.append([torch.equal(*map(weights, pair)) for pair in zip(last[4:6], whole[4:6], strict=True)])
    assert ends == [[True, True], [False, False]]


def test_checkpoint_holds_the_ema_weights_and_the_diffusion(crops, tmp_path):
    model = new_model()
    *_, last = train(model, *crops, CONFIG)
    save_checkpoint(last, tmp_path, {"note": "kept"})
    loaded = NoisePredictor.from_pretrained(tmp_path)
    assert torch.equal(weights(loaded), weights(last.ema)) and not torch.equal(weights(loaded), weights(last.model))
    assert torch.equal(loaded.diffusion.exact_betas, model.diffusion.exact_betas)
    if (maps := Path("/proc/self/maps")).exists():  # Windows would not let go of a file that is still mapped
        assert str(tmp_path) not in maps.read_text(encoding="utf-8")
    assert read_training_info(tmp_path) == {"note": "kept", "step": 8}
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "training.json", STATE_FILE,
    }  # fmt: skip


def test_failed_write_leaves_the_old_checkpoint(crops, tmp_path, monkeypatch):
    """A disk that fills while the new files are written: the old ones stay, and nothing is left behind."""
    model = new_model()
    states = train(model, *crops, CONFIG)
    save_checkpoint(next(states), tmp_path, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def disk_is_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(NoisePredictor, "save_pretrained", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(next(states), tmp_path, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "damage",
    ["truncated", "nonsense", "another program's", "other network", "other diffusion", "other target", "missing"],
)
def test_damaged_checkpoint_is_refused(crops, checkpoint_folder, damage):
    path, other = checkpoint_folder / STATE_FILE, new_model()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "nonsense":
        path.write_bytes(b"not a checkpoint")
    elif damage == "another program's":
        save_file({"weight": torch.zeros(3)}, path)
    elif damage == "other network":
        other = new_model(channels=24)
    elif damage == "other diffusion":
        other = new_model(schedule="cosine")
    elif damage == "other target":
        other = new_model(target="v")
    else:
        path.unlink()
    kind = FileNotFoundError if damage == "missing" else ValueError
    with pytest.raises(kind, match=STATE_FILE):
        next(train(other, *crops, CONFIG, resume_from=checkpoint_folder))


@pytest.mark.parametrize("content", ["", "{", "5", "[]"])
def test_damaged_training_json_is_refused(tmp_path, content):
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(ValueError, match="training.json"):
        read_training_info(tmp_path)


def test_fp16_resumes_with_the_scale_of_the_loss(crops, tmp_path):
    """The scale has moved away from its first value, by a gradient that overflowed."""
    config = replace(CONFIG, precision="fp16", num_train_steps=4)
    whole = []
    model = new_model()
    for state in train(model, *crops, config):
        if state.step == 1:
            state.scaler.update(new_scale=256.0)
        if state.step == 2:
            save_checkpoint(state, tmp_path, {})
        whole.append(state)
    rest = list(train(new_model(seed=99), *crops, config, resume_from=tmp_path))
    assert rest[-1].scaler.state_dict() == whole[-1].scaler.state_dict()
    assert rest[-1].scaler.get_scale() == 256
    assert torch.equal(weights(rest[-1].model), weights(whole[-1].model))


def test_fp16_step_that_overflows_is_left_out(crops):
    """Its gradient is not finite, its loss is: the weights stay, the scale is halved, the run goes on."""
    model = new_model()
    states = train(model, *crops, replace(CONFIG, precision="fp16"))
    state = next(states)
    before, scale = weights(model).clone(), 2.0**127  # float32's largest power of two: any gradient overflows
    state.scaler.update(new_scale=scale)
    state = next(states)
    assert state.loss.isfinite() and not state.grad_norm.isfinite()
    assert torch.equal(weights(model), before) and state.scaler.get_scale() == scale / 2


# ---------------------------------------------------------------------------------------- crashes, full disks
EVERY_FOUR = {"checkpoint_every": 4, "sample_every": 0}


@pytest.fixture(scope="module")
def whole(crops, tmp_path_factory):
    """The network of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train_to_folder(new_model(), *crops, CONFIG, folder, **EVERY_FOUR)
    return NoisePredictor.from_pretrained(folder)


@pytest.mark.parametrize("moves", [0, 1, 2, 3])
def test_crash_between_two_moves(crops, whole, tmp_path, monkeypatch, moves):
    """A crash after so many of a checkpoint's files are in place: the folder loads, and resuming makes it whole."""

    class Crash(BaseException):
        pass

    out = tmp_path / "out"
    good, done = checkpoint.moved, []

    def crashing(path, target):
        if len(done) == 4 + moves:  # the four files of step 4 went well
            raise Crash
        done.append(target.name)
        good(path, target)

    monkeypatch.setattr(checkpoint, "moved", crashing)
    with pytest.raises(Crash):
        train_to_folder(new_model(), *crops, CONFIG, out, **EVERY_FOUR)
    monkeypatch.setattr(checkpoint, "moved", good)
    assert done[0] == "training.json" and done[3] == STATE_FILE
    NoisePredictor.from_pretrained(out)

    # A run that has nothing left to do writes no checkpoint: still, model and state must be of one step.
    train_to_folder(new_model(), *crops, replace(CONFIG, num_train_steps=4), out, resume=True, **EVERY_FOUR)
    assert read_training_info(out)["step"] == 4
    assert_same_model_as_state(out)
    train_to_folder(new_model(), *crops, CONFIG, out, resume=True, **EVERY_FOUR)
    assert_same_model_as_state(out)
    assert torch.equal(weights(NoisePredictor.from_pretrained(out)), weights(whole))


def assert_same_model_as_state(folder):
    state, model = load_file(folder / STATE_FILE), load_file(folder / "model.safetensors")
    assert model.keys() == {name[4:] for name in state if name.startswith("ema.")}
    for name, value in model.items():
        assert_close(value, state[f"ema.{name}"], rtol=0, atol=0)


def test_full_disk_stops_the_run_and_keeps_the_checkpoint(crops, tmp_path, monkeypatch):
    """safetensors has an error of its own for it."""
    good = checkpoint.save_file

    def disk_is_full_at_step_8(tensors, path, metadata):
        if metadata["step"] == "8":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        good(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", disk_is_full_at_step_8)
    with pytest.raises(WriteError, match="step 8: .*No space left"):
        train_to_folder(new_model(), *crops, CONFIG, tmp_path, **EVERY_FOUR)
    assert read_training_info(tmp_path)["step"] == 4 and not list(tmp_path.glob(".writing-*"))
    assert_same_model_as_state(tmp_path)


def test_state_without_all_moments_is_refused(crops, checkpoint_folder):
    path = checkpoint_folder / STATE_FILE
    tensors = {name: value for name, value in load_file(path).items() if "optimizer.up.0" not in name}
    save_file(tensors, path, metadata=METADATA)
    with pytest.raises(ValueError, match="damaged.*optimizer"):
        next(train(new_model(), *crops, CONFIG, resume_from=checkpoint_folder))


# ------------------------------------------------------------------------------------------ values, platforms
@pytest.mark.parametrize(
    "damage", ["nan", "int8", "no exp_avg_sq", "no momentum", "other shape", "another's", *METADATA]
)
def test_state_that_would_not_go_on_is_refused(crops, checkpoint_folder, damage):
    tensors, metadata = load_file(checkpoint_folder / STATE_FILE), dict(METADATA)
    name = next(name for name in tensors if name.endswith("exp_avg"))
    if damage == "nan":
        tensors[name].view(-1)[0] = float("nan")
    elif damage == "int8":
        tensors[name] = tensors[name].to(torch.int8)
    elif damage == "no exp_avg_sq":
        del tensors[f"{name}_sq"]
    elif damage == "no momentum":
        del tensors[next(name for name in tensors if name.endswith("momentum_buffer"))]
    elif damage == "other shape":
        tensors[name] = torch.zeros(1)
    elif damage == "another's":
        tensors["other.weight"] = torch.zeros(1)
    else:
        metadata[damage] = "-1"
    save_file(tensors, checkpoint_folder / STATE_FILE, metadata=metadata)
    with pytest.raises(ValueError, match=f"{STATE_FILE} is damaged"):
        next(train(new_model(), *crops, CONFIG, resume_from=checkpoint_folder))


@pytest.mark.parametrize("optimizer,other", [("muon", "adam"), ("adam", "muon")])
def test_the_state_of_another_optimizer_is_refused(crops, tmp_path, optimizer, other):
    config = replace(CONFIG, optimizer=optimizer)
    save_checkpoint(next(train(new_model(), *crops, config)), tmp_path, {})
    needed = {"muon": "Muon and Adam", "adam": "Adam"}[other]
    with pytest.raises(ValueError, match=f"{STATE_FILE} is damaged.*the optimizers' state is not that of {needed}$"):
        next(train(new_model(), *crops, replace(config, optimizer=other), resume_from=tmp_path))


def test_weights_that_are_not_finite_replace_no_checkpoint(crops, tmp_path):
    model = new_model()
    states = train(model, *crops, CONFIG)
    save_checkpoint(next(states), tmp_path, {})
    state = next(states)
    with torch.no_grad():
        state.ema.module.unet.head.conv_out.bias[0] = float("inf")
    with pytest.raises(FloatingPointError, match="step 2: ema.head.conv_out.bias is not finite"):
        save_checkpoint(state, tmp_path, {})
    assert read_training_info(tmp_path)["step"] == 1 and not list(tmp_path.glob(".writing-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc/self")
def test_rules_of_windows(crops, tmp_path, monkeypatch):
    """There only a file open for writing can be flushed, and none that is open, or mapped into memory, be replaced."""
    import fcntl  # Windows has none

    sync, replace_file, checked = os.fsync, os.replace, []

    def fsync(descriptor):
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        sync(descriptor)

    def replacing(source, target):
        held = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
        maps = open("/proc/self/maps", encoding="utf-8").read()
        for path in map(os.path.realpath, (source, target)):
            assert path not in held and path not in maps, path
        checked.append(Path(target).name)
        replace_file(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replacing)
    options = {"checkpoint_every": 4, "sample_every": 4}
    train_to_folder(new_model(), *crops, replace(CONFIG, num_train_steps=4), tmp_path, **options)
    (tmp_path / "samples" / "step-000004.png").unlink()  # so that resuming reads the model, too
    train_to_folder(new_model(), *crops, CONFIG, tmp_path, resume=True, **options)
    assert checked.count(STATE_FILE) == 2 and "step-000004.png" in checked
    assert checked.count("model.safetensors") == 4  # each into the folder aside, then into its place
