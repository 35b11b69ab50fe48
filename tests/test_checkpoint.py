"""Checkpoints: a stopped run goes on exactly, and no crash, full disk or damaged file makes one that lies."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ddpm_tutorial import checkpoint
from ddpm_tutorial.checkpoint import STATE_FILE, read_training_info, save_checkpoint
from ddpm_tutorial.data import load_fashion_mnist
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.training import TrainConfig, WriteError, train, train_to_folder
from ddpm_tutorial.unet import UNet

CONFIG = TrainConfig(num_train_steps=8, batch_size=16, warmup_steps=2, lr=1e-3, ema_decay=0.9)


@pytest.fixture(scope="module")
def data():
    images, labels, _ = load_fashion_mnist("test", "sample")
    return images[:70], labels[:70]  # not a whole number of batches, and two epochs within 8 steps


def new_model(seed=0, **options):
    torch.manual_seed(seed)
    return UNet(**({"channels": 16, "patch_size": 2, "num_classes": 10} | options))


def new_run():
    return new_model(), GaussianDiffusion.from_schedule("linear", 1000)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_resumed_run_equals_an_uninterrupted_one(data, tmp_path):
    whole = list(train(*new_run(), *data, CONFIG))
    for stop in (1, 3, 6):
        model, diffusion = new_run()
        for state in train(model, diffusion, *data, CONFIG):
            if state.step == stop:
                save_checkpoint(state, diffusion, tmp_path, {})
                break
        rest = list(train(new_model(seed=99), diffusion, *data, CONFIG, resume_from=tmp_path))
        assert [state.step for state in rest] == list(range(stop + 1, 9))
        assert torch.equal(weights(rest[-1].model), weights(whole[-1].model))
        assert torch.equal(weights(rest[-1].ema), weights(whole[-1].ema))
        assert [s.loss.item() for s in rest] == [s.loss.item() for s in whole[stop:]]


def test_checkpoint_holds_the_ema_weights_and_the_diffusion(data, tmp_path):
    model, diffusion = new_run()
    *_, last = train(model, diffusion, *data, CONFIG)
    save_checkpoint(last, diffusion, tmp_path, {"note": "kept"})
    loaded = UNet.from_pretrained(tmp_path)
    assert torch.equal(weights(loaded), weights(last.ema)) and not torch.equal(weights(loaded), weights(last.model))
    assert torch.equal(GaussianDiffusion.from_pretrained(tmp_path).betas, diffusion.betas)
    assert read_training_info(tmp_path) == {"note": "kept", "step": 8}
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "diffusion.safetensors", "model.safetensors", "training.json", STATE_FILE,
    }  # fmt: skip


def test_failed_write_leaves_the_old_checkpoint(data, tmp_path, monkeypatch):
    """A disk that fills while the new files are written: the old ones stay, and nothing is left behind."""
    model, diffusion = new_run()
    states = train(model, diffusion, *data, CONFIG)
    save_checkpoint(next(states), diffusion, tmp_path, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def disk_is_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GaussianDiffusion, "save_pretrained", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(next(states), diffusion, tmp_path, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["truncated", "nonsense", "another program's", "other network", "missing"])
def test_damaged_checkpoint_is_refused(data, tmp_path, damage):
    model, diffusion = new_run()
    save_checkpoint(next(train(model, diffusion, *data, CONFIG)), diffusion, tmp_path, {})
    path, other = tmp_path / STATE_FILE, new_model()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "nonsense":
        path.write_bytes(b"not a checkpoint")
    elif damage == "another program's":
        save_file({"weight": torch.zeros(3)}, path)
    elif damage == "other network":
        other = new_model(channels=24)
    else:
        path.unlink()
    kind = FileNotFoundError if damage == "missing" else ValueError
    with pytest.raises(kind, match=STATE_FILE):
        next(train(other, diffusion, *data, CONFIG, resume_from=tmp_path))


@pytest.mark.parametrize("content", ["", "{", "5", "[]"])
def test_damaged_training_json_is_refused(tmp_path, content):
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(ValueError, match="training.json"):
        read_training_info(tmp_path)


def test_fp16_resumes_with_the_scale_of_the_loss(data, tmp_path):
    """The scale has moved away from its first value, by a gradient that overflowed."""
    config = replace(CONFIG, precision="fp16", num_train_steps=4)
    whole = []
    model, diffusion = new_run()
    for state in train(model, diffusion, *data, config):
        if state.step == 1:
            state.scaler.update(new_scale=256.0)
        if state.step == 2:
            save_checkpoint(state, diffusion, tmp_path, {})
        whole.append(state)
    rest = list(train(new_model(seed=99), diffusion, *data, config, resume_from=tmp_path))
    assert rest[-1].scaler.state_dict() == whole[-1].scaler.state_dict()
    assert rest[-1].scaler.get_scale() == 256
    assert torch.equal(weights(rest[-1].model), weights(whole[-1].model))


def test_fp16_step_that_overflows_is_left_out(data):
    """Its gradient is not finite, its loss is: the weights stay, the scale is halved, the run goes on."""
    model, diffusion = new_run()
    states = train(model, diffusion, *data, replace(CONFIG, precision="fp16"))
    state = next(states)
    before, scale = weights(model).clone(), 2.0**127  # float32's largest power of two: any gradient overflows
    state.scaler.update(new_scale=scale)
    state = next(states)
    assert state.loss.isfinite() and not state.grad_norm.isfinite()
    assert torch.equal(weights(model), before) and state.scaler.get_scale() == scale / 2


# ---------------------------------------------------------------------------------------- crashes, full disks
@pytest.mark.parametrize("moves", [0, 1, 2, 3, 4])
def test_crash_between_two_moves(data, tmp_path, monkeypatch, moves):
    """A crash after so many of a checkpoint's files are in place: the folder loads, and resuming makes it whole."""

    class Crash(BaseException):
        pass

    whole, out, options = tmp_path / "whole", tmp_path / "out", {"checkpoint_every": 4, "sample_every": 0}
    train_to_folder(*new_run(), *data, CONFIG, whole, **options)
    good, done = checkpoint._replace, []

    def crashing(path, target):
        if target.name != "log.csv":
            if len(done) == 5 + moves:  # the five files of step 4 went well
                raise Crash
            done.append(target.name)
        good(path, target)

    monkeypatch.setattr(checkpoint, "_replace", crashing)
    with pytest.raises(Crash):
        train_to_folder(*new_run(), *data, CONFIG, out, **options)
    monkeypatch.setattr(checkpoint, "_replace", good)
    assert done[0] == "training.json" and done[4] == STATE_FILE
    UNet.from_pretrained(out), GaussianDiffusion.from_pretrained(out)

    # A run that has nothing left to do writes no checkpoint: still, model and state must be of one step.
    train_to_folder(new_model(), new_run()[1], *data, replace(CONFIG, num_train_steps=4), out, resume=True)
    assert read_training_info(out)["step"] == 4
    assert_same_model_as_state(out)
    train_to_folder(*new_run(), *data, CONFIG, out, resume=True, **options)
    assert_same_model_as_state(out)
    assert torch.equal(weights(UNet.from_pretrained(out)), weights(UNet.from_pretrained(whole)))


def assert_same_model_as_state(folder):
    state, model = load_file(folder / STATE_FILE), load_file(folder / "model.safetensors")
    assert model.keys() == {name[4:] for name in state if name.startswith("ema.")}
    for name, value in model.items():
        assert_close(value, state[f"ema.{name}"], rtol=0, atol=0)


def test_full_disk_stops_the_run_and_keeps_the_checkpoint(data, tmp_path, monkeypatch):
    """safetensors has an error of its own for it."""
    good = checkpoint.save_file

    def disk_is_full_at_step_8(tensors, path, metadata):
        if metadata["step"] == "8":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        good(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", disk_is_full_at_step_8)
    with pytest.raises(WriteError, match="step 8: .*No space left"):
        train_to_folder(*new_run(), *data, CONFIG, tmp_path, checkpoint_every=4, sample_every=0)
    assert read_training_info(tmp_path)["step"] == 4 and not list(tmp_path.glob(".writing-*"))
    assert_same_model_as_state(tmp_path)


def test_state_without_all_moments_is_refused(data, tmp_path):
    model, diffusion = new_run()
    save_checkpoint(next(train(model, diffusion, *data, CONFIG)), diffusion, tmp_path, {})
    tensors = {name: value for name, value in load_file(tmp_path / STATE_FILE).items() if "optimizer.3." not in name}
    save_file(tensors, tmp_path / STATE_FILE, metadata={"step": "1", "averaged": "1"})
    with pytest.raises(ValueError, match="damaged.*optimizer"):
        next(train(*new_run(), *data, CONFIG, resume_from=tmp_path))


def test_state_of_before_fp16_was_saved_still_resumes(data, tmp_path):
    """Checkpoints of earlier versions have no scaler in their state."""
    model, diffusion = new_run()
    config = replace(CONFIG, precision="fp16")
    save_checkpoint(next(train(model, diffusion, *data, config)), diffusion, tmp_path, {})
    save_file(load_file(tmp_path / STATE_FILE), tmp_path / STATE_FILE, metadata={"step": "1", "averaged": "1"})
    assert next(train(*new_run(), *data, config, resume_from=tmp_path)).step == 2
    assert json.loads((tmp_path / "training.json").read_text())["step"] == 1


# ------------------------------------------------------------------------------------------ values, platforms
@pytest.mark.parametrize("damage", ["nan", "int8", "no exp_avg_sq", "other shape", "another's", "step", "averaged"])
def test_state_that_would_not_go_on_is_refused(data, tmp_path, damage):
    model, diffusion = new_run()
    save_checkpoint(next(train(model, diffusion, *data, CONFIG)), diffusion, tmp_path, {})
    tensors, metadata = load_file(tmp_path / STATE_FILE), {"step": "1", "averaged": "1"}
    name = next(name for name in tensors if name.endswith("exp_avg"))
    if damage == "nan":
        tensors[name].view(-1)[0] = float("nan")
    elif damage == "int8":
        tensors[name] = tensors[name].to(torch.int8)
    elif damage == "no exp_avg_sq":
        del tensors[f"{name}_sq"]
    elif damage == "other shape":
        tensors[name] = torch.zeros(1)
    elif damage == "another's":
        tensors["other.weight"] = torch.zeros(1)
    else:
        metadata[damage] = "-1"
    save_file(tensors, tmp_path / STATE_FILE, metadata=metadata)
    with pytest.raises(ValueError, match=f"{STATE_FILE} is damaged"):
        next(train(*new_run(), *data, CONFIG, resume_from=tmp_path))


def test_weights_that_are_not_finite_replace_no_checkpoint(data, tmp_path):
    model, diffusion = new_run()
    states = train(model, diffusion, *data, CONFIG)
    save_checkpoint(next(states), diffusion, tmp_path, {})
    state = next(states)
    with torch.no_grad():
        state.ema.module.conv_out.bias[0] = float("inf")
    with pytest.raises(FloatingPointError, match="step 2: ema.conv_out.bias is not finite"):
        save_checkpoint(state, diffusion, tmp_path, {})
    assert read_training_info(tmp_path)["step"] == 1 and not list(tmp_path.glob(".writing-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc/self")
def test_rules_of_windows(data, tmp_path, monkeypatch):
    """There only a file open for writing can be flushed, and none that is open, or mapped into memory, be replaced."""
    import fcntl  # Windows has none

    data = data[0][:, :, 8:16, 8:16], data[1]  # a grid of small images is soon drawn
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
    train_to_folder(*new_run(), *data, replace(CONFIG, num_train_steps=4), tmp_path, **options)
    (tmp_path / "samples" / "step-000004.png").unlink()  # so that resuming reads the model, too
    train_to_folder(*new_run(), *data, CONFIG, tmp_path, resume=True, **options)
    assert checked.count(STATE_FILE) == 2 and checked.count("model.safetensors") == 2 and "step-000004.png" in checked


HOLDER = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1], timeout=0):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_locks_nothing(data, tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):  # a refused one must not let go of the other's lock
            with pytest.raises(ValueError, match=f"another run is writing to {tmp_path}"):
                train_to_folder(*new_run(), *data, CONFIG, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.wait()
    assert (tmp_path / ".lock").exists()
    train_to_folder(*new_run(), *data, replace(CONFIG, num_train_steps=1), tmp_path, sample_every=0)
    assert not (tmp_path / ".lock").exists()
