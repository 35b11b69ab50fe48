"""The training loop: it learns, its parts are what they say, and a stopped run goes on exactly."""

import contextlib
import csv
import functools
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from ddpm_tutorial import data as data_module
from ddpm_tutorial import training
from ddpm_tutorial.data import load_fashion_mnist
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.losses import target_loss
from ddpm_tutorial.training import (
    EMA,
    STATE_FILE,
    TrainConfig,
    TrainState,
    learning_rate,
    save_checkpoint,
    train,
    train_steps,
    train_to_folder,
    training_batches,
)
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


# --------------------------------------------------------------------------------------------- the loop
def test_loss_falls_below_predicting_no_noise(data):
    """A network that predicts 0 has loss 1; the first steps must leave that well behind."""
    config = TrainConfig(num_train_steps=60, batch_size=32, lr=3e-3, warmup_steps=5)
    losses = [state.loss.item() for state in train(*new_run(), *data, config)]
    assert losses[0] == pytest.approx(1, abs=0.05)
    assert sum(losses[-10:]) / 10 < 0.6


def test_same_seed_same_weights_other_seed_other_weights(data):
    def end(seed):
        *_, last = train(*new_run(), *data, TrainConfig(num_train_steps=3, batch_size=16, seed=seed))
        return weights(last.model)

    assert torch.equal(end(0), end(0))
    assert not torch.equal(end(0), end(1))


def test_global_seed_is_left_alone(data):
    torch.manual_seed(5)
    expected = torch.rand(3)
    model, diffusion = new_run()
    torch.manual_seed(5)
    list(train(model, diffusion, *data, TrainConfig(num_train_steps=2, batch_size=8)))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
def test_each_optimizer_and_loss_trains(data, optimizer, loss):
    config = TrainConfig(num_train_steps=3, batch_size=8, optimizer=optimizer, loss=loss)
    states = list(train(*new_run(), *data, config))
    assert [state.step for state in states] == [1, 2, 3]
    assert all(math.isfinite(state.loss) for state in states)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_after_full_precision_in_one_process(data, precision):
    config = TrainConfig(num_train_steps=3, batch_size=8, warmup_steps=0)
    full = [state.loss.item() for state in train(*new_run(), *data, config)]
    *_, last = half = list(train(*new_run(), *data, replace(config, precision=precision)))
    assert weights(last.model).dtype == torch.float32 and weights(last.model).isfinite().all()
    assert [state.loss.item() for state in half] == pytest.approx(full, abs=0.02)
    assert half[-1].loss != full[-1]  # it was another precision


def test_without_its_option_nothing_is_compiled(data, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    next(train(*new_run(), *data, TrainConfig(num_train_steps=1, batch_size=8)))


def test_compiled_network_is_one_graph_compiled_once(data, monkeypatch):
    """With labels on the CPU, too; and for the whole process nothing is set, such as errors to be passed over."""
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=counter, fullgraph=True))
    config = TrainConfig(num_train_steps=2, batch_size=8, target="v")
    torch._dynamo.reset()
    settings = torch._dynamo.config.save_config()
    compiled, plain = (
        list(train(new_model(target="v"), new_run()[1], *data, replace(config, compile=asked)))
        for asked in (True, False)
    )
    assert counter.frame_count == 1 and torch._dynamo.config.save_config() == settings
    assert [state.loss.item() for state in compiled] == pytest.approx([state.loss.item() for state in plain], rel=1e-5)


def test_forward_and_loss_are_one_graph(data):
    model, diffusion = new_model(target="v", channel_mults=(1,)), new_run()[1]

    @functools.partial(torch.compile, backend="eager", fullgraph=True)
    def loss_of(x_0, t, noise, y):
        return target_loss(model(diffusion.q_sample(x_0, t, noise), t, y), noise, t, diffusion, "v")

    torch._dynamo.reset()
    noise = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert loss_of(torch.zeros_like(noise), torch.tensor([1, 5, 500, 1000]), noise, data[1][:4]).isfinite()


@pytest.mark.parametrize("when", ["at once", "when called"])
def test_where_torch_cannot_compile_the_network_runs_as_it_is(data, monkeypatch, when):
    def not_here(*inputs):
        raise RuntimeError("no compiler")

    config = TrainConfig(num_train_steps=1, batch_size=8)
    plain = next(train(*new_run(), *data, config))
    monkeypatch.setattr(torch, "compile", not_here if when == "at once" else lambda model: not_here)
    with pytest.warns(UserWarning, match="no compiler"):
        assert torch.equal(next(train(*new_run(), *data, replace(config, compile=True))).loss, plain.loss)


def test_fused_optimizer_equals_the_plain_one(data, monkeypatch):
    config = TrainConfig(num_train_steps=4, batch_size=8, weight_decay=0.01)
    *_, fused = train(*new_run(), *data, config)
    assert fused.optimizer.param_groups[0]["fused"]

    def plain_adamw(parameters, fused, **options):
        return torch.optim.AdamW(parameters, foreach=False, **options)

    monkeypatch.setitem(training.OPTIMIZERS, "adamw", plain_adamw)
    *_, plain = train(*new_run(), *data, config)
    assert_close(weights(fused.model), weights(plain.model), rtol=0, atol=1e-5)


def test_without_classes_labels_are_not_needed(data):
    model = new_model(num_classes=None)
    states = list(train(model, GaussianDiffusion.from_schedule(), data[0], None, CONFIG))
    assert len(states) == CONFIG.num_train_steps


def test_bad_data_is_refused_before_the_first_step(data):
    images, labels = data
    for bad_images, bad_labels, message in [
        (images, None, "needs labels"),
        (images, labels[:-1], r"labels must be \(70,\)"),
        (images, labels + 1, "0 … 9.*in 1 … 10"),
        (images.float(), labels, "uint8"),
        (images[:10], labels[:10], "1 … 10 .*got 16"),
        (images.repeat(1, 3, 1, 1), labels, "takes 1 channels, and the images have 3"),
        (images[:, :, :26], labels, "26×28.*divisible by 4: 24 or 28 or 32"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(*new_run(), bad_images, bad_labels, CONFIG)


def test_gradient_is_clipped(data):
    """With SGD's memory removed (one step of plain gradient), the step is as long as lr times the clipped norm."""
    config = TrainConfig(num_train_steps=1, batch_size=16, grad_clip=0.01, warmup_steps=0)
    state = next(train(*new_run(), *data, config))
    clipped = torch.stack([p.grad.norm() for p in state.model.parameters() if p.grad is not None]).norm()
    assert state.grad_norm > 0.1  # the norm before clipping is what is reported
    assert_close(clipped.item(), 0.01, rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------ what is not finite is not used
def everything(state):
    """Weights, averaged weights, and the optimizer's moments and counts: copies."""
    moments = [entry.flatten() for entries in state.optimizer.state.values() for entry in entries.values()]
    return torch.cat([weights(state.model), weights(state.ema), *moments]).clone()


def broken_at(step, how, monkeypatch):
    """From now on the loss of this step, or its gradient alone, is not finite."""
    good, calls = training.target_loss, iter(range(1, 1000))

    def loss(pred_noise, *others):
        broken = next(calls) == step
        if broken and how == "gradient":
            pred_noise.register_hook(lambda gradient: gradient * math.inf)
        return good(pred_noise, *others) * (math.nan if broken and how == "loss" else 1)

    monkeypatch.setattr(training, "target_loss", loss)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize(
    "precision,how", [("no", "loss"), ("no", "gradient"), ("bf16", "loss"), ("bf16", "gradient"), ("fp16", "loss")]
)
def test_step_that_is_not_finite_stops_the_run_and_leaves_everything(data, monkeypatch, optimizer, precision, how):
    config = replace(CONFIG, optimizer=optimizer, precision=precision, weight_decay=0.1)
    broken_at(3, how, monkeypatch)
    states = train(*new_run(), *data, config)
    next(states)
    state = next(states)
    before = everything(state)
    with pytest.raises(FloatingPointError, match="step 3: the loss or its gradient is not finite"):
        next(states)
    assert torch.equal(everything(state), before)


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])  # the last two: with a finite gradient
def test_infinite_loss_leaves_the_weights(data, loss):
    model, diffusion = new_run()
    with torch.no_grad():
        model.conv_out.bias.fill_(float("inf"))
    before = weights(model)
    with pytest.raises(FloatingPointError, match="step 1"):
        next(train(model, diffusion, *data, replace(CONFIG, loss=loss)))
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_on_a_gpu_the_step_is_left_out_at_once_and_the_error_comes_when_the_loss_is_read(
    data, tmp_path, monkeypatch, how
):
    """A GPU, played by a CPU on which nothing is read during the steps."""
    check = TrainState.check
    monkeypatch.setattr(TrainState, "check", lambda self: None)
    broken_at(3, how, monkeypatch)
    model, diffusion = new_run()
    states = train(model, diffusion, *data, CONFIG)
    state = [next(states), next(states)][-1]
    moments = everything(state)[2 * len(weights(model)) :]
    before = weights(model)
    state = next(states)
    assert torch.equal(weights(model), before) and weights(state.ema).isfinite().all()
    assert torch.equal(everything(state)[2 * len(weights(model)) :], moments)
    later = [next(states), next(states)][-1]
    assert not torch.equal(weights(model), before) and weights(model).isfinite().all()
    monkeypatch.setattr(TrainState, "check", check)
    with pytest.raises(FloatingPointError, match="step 3: "):
        save_checkpoint(later, diffusion, tmp_path, {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(FloatingPointError, match="step 3: "):
        list(states)  # at the end at the latest


def test_a_run_in_a_folder_asks_before_each_row_and_checkpoint(data, tmp_path, monkeypatch):
    """Beside the loop, which on a GPU asks at the end only: no row or checkpoint is of a step after a bad one."""
    asked = []
    monkeypatch.setattr(TrainState, "check", lambda self: asked.append(self.step))
    config = replace(CONFIG, num_train_steps=7)
    train_to_folder(*new_run(), *data, config, tmp_path, log_every=3, checkpoint_every=5, sample_every=0)
    assert sorted(asked) == [1, 2, 3, 3, 4, 5, 5, 5, 6, 6, 7, 7, 7]  # save_checkpoint asks for itself, too


# ----------------------------------------------------------------------------------- devices and several processes
class Copies(TorchDispatchMode):
    """The copies between devices, and what has been float64, on a device that is not the CPU."""

    def __init__(self):
        super().__init__()
        self.copies, self.doubles = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        devices = {x.device.type for x in (*args, out) if isinstance(x, torch.Tensor) and (x.ndim or x is out)}
        if len(devices) > 1 and "copy" in str(function):
            self.copies.append(out)
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64 and out.device.type != "cpu":
            self.doubles.append(function)
        return out


@pytest.mark.parametrize("target,num_classes", [("v", 10), ("noise", None)])
def test_a_step_reads_nothing_from_the_device_and_copies_to_it_once(data, monkeypatch, target, num_classes):
    """PyTorch's device "meta" has shapes and no numbers: reading one, or asking whether it is true, is an error there.
    So it tells what would wait on a GPU. It takes the GPU's way: channels-last, and a fused optimizer."""
    place = SimpleNamespace(device=torch.device("meta"), num_processes=1, process_index=0)
    seeded = training.seeded_generator
    diffusion = GaussianDiffusion.from_schedule()
    probabilities = training.timestep_probabilities(diffusion, target)  # once a run, from the tables
    monkeypatch.setattr(training, "timestep_probabilities", lambda *_: probabilities)
    monkeypatch.setattr(training, "processes", lambda: place)
    monkeypatch.setattr(training, "_fastest", lambda device: (torch.channels_last, True))
    monkeypatch.setattr(training, "_autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(training, "seeded_generator", lambda *key, device=None: None if device else seeded(*key))
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)

    model = new_model(target=target, num_classes=num_classes)
    labels = data[1] if num_classes else None
    states = train_steps(model, diffusion, data[0], labels, replace(CONFIG, target=target, num_train_steps=9), None)
    next(states)
    with Copies() as seen:
        state = [next(states) for _ in range(2)][-1]
    assert state.loss.device.type == "meta" and state.step == 3
    assert [tuple(copy.shape) for copy in seen.copies] == 2 * [(3 if num_classes else 2, 16)]  # indices, t, labels
    assert not seen.doubles  # there is no float64 on Apple's GPUs
    for number in (state.loss, state.bad_step, state.grad_norm):
        with pytest.raises(RuntimeError, match="meta"):  # the device does refuse
            bool(number)


def test_on_cuda_the_kernels_are_chosen(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    before = torch.get_float32_matmul_precision()
    try:
        assert training._fastest(torch.device("cpu")) == (torch.channels_last, True)
        assert training._fastest(torch.device("mps")) == (torch.contiguous_format, None)
        assert torch.get_float32_matmul_precision() == before and not torch.backends.cudnn.benchmark
        assert training._fastest(torch.device("cuda")) == (torch.channels_last, True)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision(before)


def as_process(rank, world, monkeypatch):
    place = SimpleNamespace(device=torch.device("cpu"), process_index=rank, num_processes=world)
    monkeypatch.setattr(training, "processes", lambda: place)


def test_processes_share_the_batch_of_one(data, monkeypatch):
    """Item by item; and each has noisy images and nearly clean ones."""
    config = replace(CONFIG, batch_size=18, num_train_steps=5)

    def batches(rank, world):
        as_process(rank, world, monkeypatch)
        return list(training_batches(*data, 10, GaussianDiffusion.from_schedule(), config, done=2))

    shares = [batches(rank, 3) for rank in range(3)]
    for (step, *whole), *parts in zip(batches(0, 1), *shares, strict=True):
        for i, tensor in enumerate(whole):
            assert torch.equal(torch.stack([part[1 + i] for part in parts], dim=1).flatten(0, 1), tensor)
        assert step == parts[0][0]
        assert all(part[2].min() < 200 and part[2].max() > 800 for part in parts)


def test_processes_do_not_send_each_other_the_tables(data, monkeypatch):
    """The option has another name in newer versions of PyTorch."""
    sent = []

    class Newer:
        def __new__(cls, network, device_ids, forward_sync_buffers=True):
            return sent.append(forward_sync_buffers) or network

    class Older:
        def __new__(cls, network, device_ids, broadcast_buffers=True):
            return sent.append(broadcast_buffers) or network

    as_process(0, 2, monkeypatch)
    for version in (Newer, Older):
        monkeypatch.setattr(training, "DistributedDataParallel", version)
        next(train(*new_run(), *data, CONFIG))
    assert sent == [False, False]


def test_no_two_parts_of_a_run_share_a_stream(data, monkeypatch):
    keys, real = [], data_module.seeded_generator

    def noted(*key, device="cpu"):
        keys.append(key)
        return real(*key, device=device)

    for module in (training, data_module):
        monkeypatch.setattr(module, "seeded_generator", noted)
    list(train(*new_run(), *data, CONFIG))
    assert len(keys) == len(set(keys)) == 2 * 8 + 2  # eight steps within two epochs


# ------------------------------------------------------------------------------------- learning rate, EMA
def test_learning_rate_warms_up_then_falls_to_zero():
    config = TrainConfig(num_train_steps=1000, warmup_steps=100, lr=2.0)
    rates = [learning_rate(step, config) for step in range(1, 1001)]
    assert rates[0] == pytest.approx(2 / 101) and max(rates) <= 2
    assert rates[99] == pytest.approx(2, rel=0.02) and rates[549] == pytest.approx(1, rel=0.01)
    assert rates[-1] == pytest.approx(0, abs=1e-6)
    assert all(a < b for a, b in zip(rates[:99], rates[1:100], strict=True))
    assert all(a > b for a, b in zip(rates[101:-1], rates[102:], strict=True))


def test_ema_follows_its_recursion():
    """Against the recursion in plain Python: first a copy, then decay min(0.6, (1 + n)/(10 + n))."""
    model = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(model, decay=0.6)
    expected = None
    for n in range(20):
        model.weight.data.fill_(float(n**2))
        ema.update_parameters(model)
        decay = min(0.6, (1 + n) / (10 + n))
        expected = n**2 if expected is None else decay * expected + (1 - decay) * n**2
        assert ema.module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert not ema.module.weight.requires_grad


# ------------------------------------------------------------------------------------------ runs in folders
def test_run_in_a_folder_writes_log_samples_and_checkpoint(data, tmp_path):
    last = train_to_folder(*new_run(), *data, CONFIG, tmp_path, log_every=3, checkpoint_every=4, sample_every=5)
    assert last == 8
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [3, 4, 6, 8]  # each 3 steps, and with each checkpoint
    assert all(0 < float(row["loss"]) < 2 for row in rows)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-000005.png", "step-000008.png"]
    assert json.loads((tmp_path / "training.json").read_text())["config"]["batch_size"] == 16


def test_stopped_folder_goes_on_and_its_log_has_no_row_twice(data, tmp_path):
    options = {"log_every": 1, "checkpoint_every": 2, "sample_every": 0}
    train_to_folder(*new_run(), *data, CONFIG, tmp_path / "whole", **options)
    calls = iter(range(100))
    stopped = train_to_folder(
        *new_run(), *data, CONFIG, tmp_path / "parts", should_stop=lambda: next(calls) == 4, **options
    )
    assert stopped == 5
    extra = "6,0,0.5,0.1,1e-3,9\r\n"  # a row after the checkpoint, as a killed run leaves it
    with (tmp_path / "parts" / "log.csv").open("a") as file:
        file.write(extra)
    assert train_to_folder(*new_run(), *data, CONFIG, tmp_path / "parts", resume=True, **options) == 8
    logs = [list(csv.DictReader((tmp_path / n / "log.csv").read_text().splitlines())) for n in ("whole", "parts")]
    assert [(r["step"], r["loss"]) for r in logs[0]] == [(r["step"], r["loss"]) for r in logs[1]]
    whole, parts = (UNet.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert torch.equal(weights(whole), weights(parts))


def test_folder_with_a_checkpoint_is_not_overwritten(data, tmp_path):
    train_to_folder(*new_run(), *data, CONFIG, tmp_path, sample_every=0)
    before = (tmp_path / STATE_FILE).read_bytes()
    with pytest.raises(ValueError, match="already holds a checkpoint.*--resume"):
        train_to_folder(*new_run(), *data, CONFIG, tmp_path, sample_every=0)
    assert (tmp_path / STATE_FILE).read_bytes() == before


def test_stop_writes_the_checkpoint_and_draws_no_samples(data, tmp_path):
    """Between SIGTERM and SIGKILL there may be little time."""
    train_to_folder(*new_run(), *data, CONFIG, tmp_path, sample_every=1, should_stop=lambda: True)
    assert (tmp_path / STATE_FILE).exists() and not (tmp_path / "samples").exists()


def test_a_run_that_is_killed_or_stopped_between_grid_and_checkpoint_loses_no_grid(data, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(state, *others):
        if state.step == 8:
            raise Killed
        good(state, *others)

    data = data[0][:, :, 8:16, 8:16], data[1]  # a grid of small images is soon drawn
    good, grid = training.save_checkpoint, "samples/step-000008.png"
    options = {"checkpoint_every": 2, "sample_every": 4}
    train_to_folder(*new_run(), *data, CONFIG, tmp_path / "whole", **options)
    monkeypatch.setattr(training, "save_checkpoint", killed)
    with pytest.raises(Killed):
        train_to_folder(*new_run(), *data, CONFIG, tmp_path / "killed", **options)
    monkeypatch.setattr(training, "save_checkpoint", good)
    assert (tmp_path / "killed" / grid).exists()  # drawn before the checkpoint, and by the next run again

    calls, stopped = iter(range(100)), tmp_path / "stopped"
    train_to_folder(*new_run(), *data, CONFIG, stopped, should_stop=lambda: next(calls) == 7, **options)
    assert not (stopped / grid).exists()  # between SIGTERM and SIGKILL there may be little time
    assert train_to_folder(*new_run(), *data, CONFIG, stopped, resume=True, **options) == 8
    whole, drawn = (np.asarray(Image.open(tmp_path / name / grid)).astype(int) for name in ("whole", "stopped"))
    assert abs(whole - drawn).max() <= 1


@pytest.mark.parametrize("damage", [b"\x80\n", b"a,b\n1,2\n", b"%sx,1,1,1,1,1\n", b"%s1,1\n", b'%s"1\n', b"\0\0\n"])
def test_damaged_log_is_set_aside_before_the_first_step(data, tmp_path, capsys, damage):
    train_to_folder(*new_run(), *data, replace(CONFIG, num_train_steps=1), tmp_path, sample_every=0)
    header = (tmp_path / "log.csv").read_bytes().splitlines(keepends=True)[0]
    damage = damage.replace(b"%s", header)
    (tmp_path / "log.csv").write_bytes(damage)

    def stop():
        assert (tmp_path / "log.csv.damaged").read_bytes() == damage
        return True

    train_to_folder(*new_run(), *data, CONFIG, tmp_path, sample_every=0, resume=True, should_stop=stop)
    assert "it is log.csv.damaged now" in capsys.readouterr().err
    lines = (tmp_path / "log.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].encode() == header.strip() and [line.split(",")[0] for line in lines[1:]] == ["2"]


def test_rows_of_a_run_stopped_between_them_are_those_of_one_that_was_not(data, tmp_path, monkeypatch):
    """Rows are means since the row before. A kill forgets what was since the checkpoint, which has a row of its own."""
    options = {"log_every": 3, "checkpoint_every": 4, "sample_every": 0}
    train_to_folder(*new_run(), *data, CONFIG, tmp_path / "whole", **options)
    losses = [state.loss.item() for state in train(*new_run(), *data, CONFIG)]
    calls = iter(range(100))

    def kill():
        if next(calls) == 4:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        train_to_folder(*new_run(), *data, CONFIG, tmp_path / "killed", should_stop=kill, **options)
    train_to_folder(*new_run(), *data, CONFIG, tmp_path / "killed", resume=True, **options)
    rows = [list(csv.DictReader((tmp_path / n / "log.csv").open(encoding="utf-8"))) for n in ("whole", "killed")]
    assert [[row["step"], row["loss"]] for row in rows[0]] == [[row["step"], row["loss"]] for row in rows[1]]
    for row, steps in zip(rows[0], ([0, 1, 2], [3], [4, 5], [6, 7]), strict=True):
        assert float(row["loss"]) == pytest.approx(sum(losses[i] for i in steps) / len(steps), abs=2e-6)


def test_what_others_keep_in_the_folder_stays(data, tmp_path):
    names = (".writing-my-thesis.txt", "notes/.writing-a", "samples/.writing-b", "other/.writing-checkpoint/x")
    data = data[0][:, :, 8:16, 8:16], data[1]
    mine = [tmp_path / name for name in names]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    train_to_folder(*new_run(), *data, CONFIG, tmp_path, sample_every=4)
    train_to_folder(*new_run(), *data, CONFIG, tmp_path, sample_every=4, resume=True)
    assert all(path.read_text(encoding="utf-8") == "mine" for path in mine)


def test_the_bar_moves_with_every_step(data, tmp_path, monkeypatch):
    moved = []

    class Bar(tqdm):
        def update(self, n=1):
            moved.append(n)
            return super().update(n)

    monkeypatch.setattr(training, "tqdm", Bar)
    train_to_folder(*new_run(), *data, CONFIG, tmp_path, sample_every=0)
    assert moved == [1] * 8


def test_where_the_main_process_refuses_the_others_do(monkeypatch):
    """The others run nothing, and hear of it by a broadcast."""

    def refuse():
        raise ValueError("another run")

    with pytest.raises(ValueError, match="another run"):
        training.in_main_process(refuse)
    monkeypatch.setattr(training, "processes", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(training, "broadcast_object_list", lambda failed: [ValueError(f"heard beside {failed}")])
    with pytest.raises(ValueError, match=r"heard beside \[None\]"):
        training.in_main_process(lambda: pytest.fail("it is for the main process"))


def test_half_a_row_and_files_left_behind_go(data, tmp_path):
    options = {"log_every": 1, "sample_every": 0}
    calls = iter(range(100))
    train_to_folder(*new_run(), *data, CONFIG, tmp_path, should_stop=lambda: next(calls) == 3, **options)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("4")  # cut off within the row of step 45, say
    (tmp_path / ".writing-checkpoint").mkdir()
    (tmp_path / ".writing-checkpoint" / "file").touch()
    (tmp_path / ".writing-log.csv").touch()
    train_to_folder(*new_run(), *data, CONFIG, tmp_path, resume=True, **options)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 9)]
    assert all(None not in row.values() for row in rows)
    assert not list(tmp_path.glob("**/.writing-*"))


def test_loss_that_is_not_finite_leaves_a_checkpoint_that_goes_on(data, tmp_path, monkeypatch):
    options = {"checkpoint_every": 2, "sample_every": 0}
    whole = tmp_path / "whole"
    train_to_folder(*new_run(), *data, CONFIG, whole, **options)
    good = training.target_loss
    count = iter(range(100))
    monkeypatch.setattr(training, "target_loss", lambda *a: good(*a) * (float("nan") if next(count) == 4 else 1))
    with pytest.raises(FloatingPointError, match="step 5: the loss or its gradient"):
        train_to_folder(*new_run(), *data, CONFIG, tmp_path / "broken", **options)
    monkeypatch.setattr(training, "target_loss", good)
    train_to_folder(*new_run(), *data, CONFIG, tmp_path / "broken", resume=True, **options)
    assert torch.equal(weights(UNet.from_pretrained(whole)), weights(UNet.from_pretrained(tmp_path / "broken")))


def test_finished_run_resumes_to_nothing(data, tmp_path):
    train_to_folder(*new_run(), *data, CONFIG, tmp_path, sample_every=0)
    for num_train_steps in (8, 2):
        config = replace(CONFIG, num_train_steps=num_train_steps)
        assert train_to_folder(*new_run(), *data, config, tmp_path, sample_every=0, resume=True) == 8


@pytest.mark.parametrize(
    "option,value",
    [
        ("num_train_steps", 0), ("batch_size", 0), ("lr", 0.0), ("lr", float("nan")), ("lr", -1.0),
        ("warmup_steps", -1), ("grad_clip", 0.0), ("ema_decay", 1.0), ("label_dropout", 1.5), ("loss", "l3"),
        ("target", "score"),
        ("optimizer", "sgd"), ("precision", "fp8"), ("seed", -1), ("weight_decay", -0.1),
    ],
)  # fmt: skip
def test_config_names_what_is_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .*got"):
        TrainConfig(**{option: value})


def test_every_setting_of_the_config_is_used():
    """A field that the loop never reads would be an option that passes in silence."""
    source = open(training.__file__, encoding="utf-8").read()
    for name in TrainConfig.__dataclass_fields__:
        assert f"config.{name}" in source, name
