"""The training loop: it learns, its parts are what they say, and what is not finite is not used."""

import contextlib
import functools
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_run import CONFIG, new_model, weights
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_tutorial import data as data_module
from ddpm_tutorial import optimizer as optimizer_module
from ddpm_tutorial import training
from ddpm_tutorial.checkpoint import TrainState, save_checkpoint
from ddpm_tutorial.data import to_model_range
from ddpm_tutorial.losses import simple_loss
from ddpm_tutorial.optimizer import make_optimizers
from ddpm_tutorial.settings import TrainConfig
from ddpm_tutorial.training import EMA, learning_rate, train, train_steps, training_batches


# --------------------------------------------------------------------------------------------- the loop
def test_loss_falls_below_predicting_no_noise(data):
    """A network that predicts 0 has loss 1; the first steps must leave that well behind."""
    config = TrainConfig(num_train_steps=60, batch_size=32, lr=3e-3, warmup_steps=5)
    losses = [state.loss.item() for state in train(new_model(image_size=28), *data, config)]
    assert losses[0] == pytest.approx(1, abs=0.05)
    assert sum(losses[-10:]) / 10 < 0.6


@pytest.mark.parametrize("target", ["noise", "v", "x_0"])
@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_the_first_loss_is_that_of_zeros_beside_what_the_target_wants(data, target, loss):
    """A fresh network gives zeros, so that its loss is known from the batch alone."""
    model, config = new_model(image_size=28, target=target), replace(CONFIG, loss=loss)
    _, x_0, t, noise, _ = next(training_batches(model, *data, config, done=0))
    signal = model.diffusion.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    wanted = {"noise": noise, "v": signal * noise - (1 - signal**2).sqrt() * x_0, "x_0": x_0}[target]
    expected = wanted.square().mean() if loss == "l2" else wanted.abs().mean()
    assert_close(next(train(model, *data, config)).loss, expected, rtol=1e-4, atol=0)


def test_same_seed_same_weights_other_seed_other_weights(crops):
    def end(seed):
        *_, last = train(new_model(), *crops, TrainConfig(num_train_steps=3, batch_size=16, seed=seed))
        return weights(last.model)

    assert torch.equal(end(0), end(0))
    assert not torch.equal(end(0), end(1))


def test_global_seed_is_left_alone(crops):
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = new_model()
    torch.manual_seed(5)
    list(train(model, *crops, TrainConfig(num_train_steps=2, batch_size=8)))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
def test_each_optimizer_and_loss_trains(crops, optimizer, loss):
    config = TrainConfig(num_train_steps=3, batch_size=8, optimizer=optimizer, loss=loss)
    states = list(train(new_model(), *crops, config))
    assert [state.step for state in states] == [1, 2, 3]
    assert all(math.isfinite(state.loss) for state in states)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_after_full_precision_in_one_process(data, precision):
    config = TrainConfig(num_train_steps=3, batch_size=8, warmup_steps=0)
    full = [state.loss.item() for state in train(new_model(image_size=28), *data, config)]
    *_, last = half = list(train(new_model(image_size=28), *data, replace(config, precision=precision)))
    assert weights(last.model).dtype == torch.float32 and weights(last.model).isfinite().all()
    assert [state.loss.item() for state in half] == pytest.approx(full, abs=0.02)
    assert half[-1].loss != full[-1]  # it was another precision


def test_without_its_option_nothing_is_compiled(crops, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    next(train(new_model(), *crops, TrainConfig(num_train_steps=1, batch_size=8)))


def test_compiled_network_is_one_graph_compiled_once(data, monkeypatch):
    """With labels on the CPU, too; and for the whole process nothing is set, such as errors to be passed over."""
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=counter, fullgraph=True))
    config = TrainConfig(num_train_steps=2, batch_size=8)
    torch._dynamo.reset()
    settings = torch._dynamo.config.save_config()
    compiled, plain = (
        list(train(new_model(image_size=28, target="v", channel_mults=(1,)), *data, replace(config, compile=asked)))
        for asked in (True, False)
    )
    assert counter.frame_count == 1 and torch._dynamo.config.save_config() == settings
    assert [state.loss.item() for state in compiled] == pytest.approx([state.loss.item() for state in plain], rel=1e-5)


def test_forward_and_loss_are_one_graph(data):
    model = new_model(image_size=28, target="v", channel_mults=(1,))

    @functools.partial(torch.compile, backend="eager", fullgraph=True)
    def loss_of(x_0, t, noise, y):
        output = model.unet(model.diffusion.q_sample(x_0, t, noise), t, y)
        return simple_loss(output, model.wanted(x_0, t, noise))

    torch._dynamo.reset()
    noise = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert loss_of(torch.zeros_like(noise), torch.tensor([1, 5, 500, 1000]), noise, data[1][:4]).isfinite()


@pytest.mark.parametrize("when", ["at once", "when called"])
def test_where_torch_cannot_compile_the_network_runs_as_it_is(crops, monkeypatch, when):
    def not_here(*inputs):
        raise RuntimeError("no compiler")

    config = TrainConfig(num_train_steps=1, batch_size=8)
    plain = next(train(new_model(), *crops, config))
    monkeypatch.setattr(torch, "compile", not_here if when == "at once" else lambda model: not_here)
    with pytest.warns(UserWarning, match="no compiler"):
        assert torch.equal(next(train(new_model(), *crops, replace(config, compile=True))).loss, plain.loss)


def test_fused_optimizer_equals_the_plain_one(crops, monkeypatch):
    config = TrainConfig(num_train_steps=4, batch_size=8, optimizer="adam")
    *_, fused = train(new_model(), *crops, config)
    assert fused.optimizers[0].param_groups[0]["fused"]
    monkeypatch.setattr(training, "make_optimizers", lambda unet, config, fused: make_optimizers(unet, config, None))
    *_, plain = train(new_model(), *crops, config)
    assert_close(weights(fused.model), weights(plain.model), rtol=0, atol=1e-5)


def test_without_classes_labels_are_not_needed(crops):
    model = new_model(num_classes=None)
    states = list(train(model, crops[0], None, CONFIG))
    assert len(states) == CONFIG.num_train_steps


def test_bad_data_is_refused_before_the_first_step(data):
    images, labels = data
    for bad_images, bad_labels, message in [
        (images, None, "needs labels"),
        (images, labels[:-1], "one for each of the 70 images, got 69"),
        (images, labels.float(), r"labels must be integers \(B,\) or captions \(B, L\), got torch.float32"),
        (images, labels + 1, "0 … 9.*got 1 … 10"),
        (images, labels - 1, "0 … 9.*got -1 … 8"),
        (images.float(), labels, "uint8"),
        (images.double() / 255, labels, "uint8 or float32"),
        (images.float() * torch.nan, labels, "finite"),
        (images[:10], labels[:10], "1 … 10 .*got 16"),
        (images.repeat(1, 3, 1, 1), labels, r"draws images \(1, 28, 28\) .*, and these are \(3, 28, 28\)"),
        (images[:, :, :26], labels, "26×28.*divisible by 4: 24 or 28 or 32"),
        (images[:, :, :24, :24], labels, r"draws images \(1, 28, 28\) .*, and these are \(1, 24, 24\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(new_model(image_size=28), bad_images, bad_labels, CONFIG)


def test_labels_of_a_model_without_classes_are_refused(data):
    with pytest.raises(ValueError, match="a model without classes takes no labels"):
        train(new_model(image_size=28, num_classes=None), *data, CONFIG)


@pytest.mark.parametrize("dtype, num_classes", [(torch.int8, 128), (torch.int8, 200), (torch.uint8, 256)])
def test_small_integers_are_labels_too(crops, dtype, num_classes):
    """The null label, and the bound that labels are compared with, need not fit into their type."""
    images, labels = crops
    config = replace(CONFIG, num_train_steps=2, label_dropout=0.5)
    *_, small = train(new_model(num_classes=num_classes), images, labels.to(dtype), config)
    *_, last = train(new_model(num_classes=num_classes), images, labels, config)
    assert torch.equal(weights(small.model), weights(last.model))


def test_float_data_goes_in_as_it_is(crops):
    """Images already scaled train the same network as uint8 ones: latents need no other loop."""
    images, labels = crops
    config = replace(CONFIG, num_train_steps=3)
    *_, scaled = train(new_model(), to_model_range(images), labels, config)
    *_, last = train(new_model(), images, labels, config)
    assert torch.equal(weights(scaled.model), weights(last.model))


def test_gradient_is_clipped(data):
    """With SGD's memory removed (one step of plain gradient), the step is as long as lr times the clipped norm."""
    config = TrainConfig(num_train_steps=1, batch_size=16, grad_clip=0.01, warmup_steps=0)
    state = next(train(new_model(image_size=28), *data, config))
    clipped = torch.stack([p.grad.norm() for p in state.model.parameters() if p.grad is not None]).norm()
    assert state.grad_norm > 0.1  # the norm before clipping is what is reported
    assert_close(clipped.item(), 0.01, rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------ what is not finite is not used
def everything(state):
    """Weights, averaged weights, and the optimizers' moments and counts: copies."""
    kept = [entries for optimizer in state.optimizers for entries in optimizer.state.values()]
    moments = [entry.flatten() for entries in kept for entry in entries.values()]
    return torch.cat([weights(state.model), weights(state.ema), *moments]).clone()


def broken_at(step, how, monkeypatch):
    """From now on the loss of this step, or its gradient alone, is not finite."""
    good, calls = training.simple_loss, iter(range(1, 1000))

    def loss(output, *others):
        broken = next(calls) == step
        if broken and how == "gradient":
            output.register_hook(lambda gradient: gradient * math.inf)
        return good(output, *others) * (math.nan if broken and how == "loss" else 1)

    monkeypatch.setattr(training, "simple_loss", loss)


@pytest.mark.parametrize("optimizer,fused", [("muon", True), ("adam", True), ("muon", None), ("adam", None)])
@pytest.mark.parametrize(
    "precision,how", [("no", "loss"), ("no", "gradient"), ("bf16", "loss"), ("bf16", "gradient"), ("fp16", "loss")]
)
def test_step_that_is_not_finite_stops_the_run_and_leaves_everything(
    crops, monkeypatch, optimizer, fused, precision, how
):
    """Not fused is Adam where it is unsafe, on Apple's GPUs."""
    monkeypatch.setattr(training, "_fastest", lambda device: (torch.channels_last, fused))
    config = replace(CONFIG, optimizer=optimizer, precision=precision)
    broken_at(3, how, monkeypatch)
    states = train(new_model(), *crops, config)
    next(states)
    state = next(states)
    before = everything(state)
    with pytest.raises(FloatingPointError, match="step 3: the loss or its gradient is not finite"):
        next(states)
    assert torch.equal(everything(state), before)


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])  # the last two: with a finite gradient
def test_infinite_loss_leaves_the_weights(crops, loss):
    model = new_model()
    with torch.no_grad():
        model.unet.head.conv_out.bias.fill_(float("inf"))
    before = weights(model)
    with pytest.raises(FloatingPointError, match="step 1"):
        next(train(model, *crops, replace(CONFIG, loss=loss)))
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_on_a_gpu_the_step_is_left_out_at_once_and_the_error_comes_when_the_loss_is_read(
    crops, tmp_path, monkeypatch, how
):
    """A GPU, played by a CPU on which nothing is read during the steps."""
    check = TrainState.check
    monkeypatch.setattr(TrainState, "check", lambda self: None)
    broken_at(3, how, monkeypatch)
    model = new_model()
    states = train(model, *crops, CONFIG)
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
        save_checkpoint(later, tmp_path, {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(FloatingPointError, match="step 3: "):
        list(states)  # at the end at the latest


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
    model = new_model(image_size=28, target=target, num_classes=num_classes)
    probabilities = training.timestep_probabilities(model.diffusion, target)  # once a run, from the tables
    monkeypatch.setattr(training, "timestep_probabilities", lambda *_: probabilities)
    monkeypatch.setattr(training, "processes", lambda: place)
    monkeypatch.setattr(training, "_fastest", lambda device: (torch.channels_last, True))
    monkeypatch.setattr(training, "_autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(training, "seeded_generator", lambda *key, device=None: None if device else seeded(*key))
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)

    labels = data[1] if num_classes else None
    states = train_steps(model, data[0], labels, replace(CONFIG, num_train_steps=9), None)
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
        return list(training_batches(new_model(image_size=28), *data, config, done=2))

    shares = [batches(rank, 3) for rank in range(3)]
    for (step, *whole), *parts in zip(batches(0, 1), *shares, strict=True):
        for i, tensor in enumerate(whole):
            assert torch.equal(torch.stack([part[1 + i] for part in parts], dim=1).flatten(0, 1), tensor)
        assert step == parts[0][0]
        assert all(part[2].min() < 200 and part[2].max() > 800 for part in parts)


def test_processes_do_not_send_each_other_the_tables(crops, monkeypatch):
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
        next(train(new_model(), *crops, CONFIG))
    assert sent == [False, False]


def test_no_two_parts_of_a_run_share_a_stream(crops, monkeypatch):
    keys, real = [], data_module.seeded_generator

    def noted(*key, device="cpu"):
        keys.append(key)
        return real(*key, device=device)

    for module in (training, data_module):
        monkeypatch.setattr(module, "seeded_generator", noted)
    list(train(new_model(), *crops, CONFIG))
    assert len(keys) == len(set(keys)) == 2 * 8 + 2  # eight steps within two epochs


# ------------------------------------------------------------------------------------- learning rate, EMA
def rates(**options):
    config = TrainConfig(lr=2.0, **options)
    return [learning_rate(step, config) for step in range(1, config.num_train_steps + 1)]


def test_learning_rate_warms_up_stays_and_cools_down():
    rate = rates(num_train_steps=1000, warmup_steps=100, cooldown=0.3)
    assert rate[:100] == pytest.approx([2 * step / 101 for step in range(1, 101)])
    assert set(rate[100:700]) == {2.0}
    assert rate[700:] == pytest.approx([2 * left / 301 for left in range(300, 0, -1)])


@pytest.mark.parametrize("cooldown", [0.1, 0.3, 0.6])
def test_until_the_cool_down_the_rate_does_not_depend_on_the_number_of_steps(cooldown):
    short, long = (rates(num_train_steps=n, warmup_steps=20, cooldown=cooldown) for n in (500, 5000))
    constant = round(500 * (1 - cooldown))
    assert short[:constant] == long[:constant] and short[constant] < long[constant]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"warmup_steps": 0, "cooldown": 0.0}, [2, 2, 2, 2]),
        ({"warmup_steps": 3, "cooldown": 0.0}, [0.5, 1, 1.5, 2]),
        ({"warmup_steps": 0, "cooldown": 1.0}, [1.6, 1.2, 0.8, 0.4]),
        ({"warmup_steps": 0, "cooldown": 0.5}, [2, 2, 4 / 3, 2 / 3]),
        ({"warmup_steps": 1, "cooldown": 1.0}, [1, 1.2, 0.8, 0.4]),
        ({"warmup_steps": 1000, "cooldown": 0.3}, [2 * step / 1001 for step in (1, 2, 3, 4)]),
        ({"warmup_steps": 0, "cooldown": 0.3, "num_train_steps": 1}, [2 / 1.3]),
        ({"warmup_steps": 0, "cooldown": 1.0, "num_train_steps": 1}, [1]),
    ],
)
def test_learning_rate_at_the_edges(options, expected):
    assert rates(**{"num_train_steps": 4} | options) == pytest.approx(expected)


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


@pytest.mark.parametrize(
    "option,value",
    [
        ("num_train_steps", 0), ("batch_size", 0), ("lr", 0.0), ("lr", float("nan")), ("lr", -1.0),
        ("warmup_steps", -1), ("grad_clip", 0.0), ("ema_decay", 1.0), ("label_dropout", 1.5), ("loss", "l3"),
        ("optimizer", "sgd"), ("precision", "fp8"), ("seed", -1), ("cooldown", -0.1), ("cooldown", 1.1),
    ],
)  # fmt: skip
def test_config_names_what_is_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .*got"):
        TrainConfig(**{option: value})


def test_every_setting_of_the_config_is_used():
    """A field that the loop never reads would be an option that passes in silence."""
    source = "".join(open(module.__file__, encoding="utf-8").read() for module in (training, optimizer_module))
    for name in TrainConfig.__dataclass_fields__:
        assert f"config.{name}" in source, name


@pytest.fixture
def cuda_graphs(monkeypatch):
    """CUDA's streams and graphs where there are none: ``play`` is what a graph replays, ``begin`` begins to record."""
    stream, here = SimpleNamespace(wait_stream=lambda other: None), SimpleNamespace(play=None)
    here.begin = lambda graph, stream: contextlib.nullcontext()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: here.play()))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: here.begin(graph, stream))
    return here


def test_what_is_recorded_gives_each_call_its_own_answer(cuda_graphs):
    calls = []

    def double(x, nothing):
        calls.append(x)
        return (2 * x,)

    def play():
        recorded.found[0].copy_(2 * recorded.given[0])

    recorded, cuda_graphs.play = training.Recorded(double), play
    answers = [recorded(torch.tensor(float(i)), None)[0] for i in range(7)]
    assert torch.equal(torch.stack(answers), 2.0 * torch.arange(7))
    assert len(calls) == 4  # three as usual, and while it was recorded


def test_what_cannot_be_recorded_goes_on_as_usual(cuda_graphs):
    def begin(graph, stream):
        raise RuntimeError("operation not permitted")

    recorded, cuda_graphs.begin = training.Recorded(lambda x: (2 * x,)), begin
    with pytest.warns(UserWarning, match="not permitted") as told:
        answers = [recorded(torch.tensor(float(i)))[0] for i in range(7)]
    assert torch.equal(torch.stack(answers), 2.0 * torch.arange(7)) and len(told) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")
def test_recorded_steps_are_the_usual_ones(crops, monkeypatch):
    def end():
        *_, last = train(new_model(), *crops, TrainConfig(num_train_steps=8, batch_size=16))
        return weights(last.model)

    recorded = end()
    monkeypatch.setattr(training, "Recorded", lambda update: update)
    assert_close(recorded, end(), rtol=1e-3, atol=1e-3)
