"""The command line: killed, stopped and resumed in processes of their own; bad input within this one, for speed."""

import errno
import functools
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_run import weights as weights_of

from ddpm_tutorial import metrics
from ddpm_tutorial.checkpoint import STATE_FILE
from ddpm_tutorial.command import evaluate, main
from ddpm_tutorial.command import sample as sample_command
from ddpm_tutorial.command import train as train_command
from ddpm_tutorial.command.sample import parse_label, save_images
from ddpm_tutorial.data import CLASS_NAMES, SOURCE_VARIABLE, ImageData, load_fashion_mnist
from ddpm_tutorial.drawing import read_samples
from ddpm_tutorial.files import locked
from ddpm_tutorial.metrics import label_agreement, look
from ddpm_tutorial.predictor import NoisePredictor

COMMAND = [sys.executable, "-m", "ddpm_tutorial"]
SMALL = ["--data", "sample", "--channels", "16", "--batch-size", "8", "--sample-every", "0", "--log-every", "5"]


def run(*arguments):
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def fails(capsys):
    """The error line of a command that must exit with 2 and print one line on the standard error, no traceback."""

    def fails(*arguments):
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        lines = capsys.readouterr().err.splitlines()
        assert status == 2 and len(lines) == 1 and "error: " in lines[0], lines
        return lines[0]

    return fails


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "small"
    command = ["train", "--out", out, "--num-train-steps", 12, "--checkpoint-every", 4, *SMALL]
    assert main([str(argument) for argument in command]) == 0
    return out


def weights(folder):
    return weights_of(NoisePredictor.from_pretrained(folder))


posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and shells of Unix")


# ------------------------------------------------------------------------------------------------- train
def test_help_names_every_option(capsys):
    def told(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        return capsys.readouterr().out

    assert "train" in (commands := told("--help")) and "sample" in commands
    text = told("train", "--help")
    for option in ("--data", "--out", "--resume", "--num-train-steps", "--batch-size", "--lr", "--seed", "--schedule"):
        assert option in text


WITHOUT_TORCH = """
import contextlib, sys
from ddpm_tutorial.command import main
with contextlib.suppress(SystemExit):
    main(sys.argv[1:])
assert not {"torch", "numpy"} & set(sys.modules), "slow"
"""


@pytest.mark.parametrize("arguments", ["--help", "train --help", "--version", "tran", "sample --seed x"])
def test_what_needs_no_torch_does_not_wait_for_it(arguments):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 0 and (done.stdout or "error: " in done.stderr), done.stderr


@posix
def test_killed_at_random_moments_and_resumed_gives_the_same_weights(trained, tmp_path):
    """SIGKILL, as often as it takes: every resumed run goes on from the last whole checkpoint."""
    out, moments = tmp_path / "killed", random.Random(0)
    command = ["train", "--out", out, "--num-train-steps", 12, "--checkpoint-every", 4, *SMALL]
    kills = 0
    while kills < 2:
        resume = ["--resume"] if (out / STATE_FILE).exists() else []
        process = subprocess.Popen([*COMMAND, *map(str, command), *resume], stderr=subprocess.DEVNULL)
        deadline = time.time() + 300
        before = (out / STATE_FILE).stat().st_mtime_ns if resume else 0
        while process.poll() is None and time.time() < deadline:
            if (out / STATE_FILE).exists() and (out / STATE_FILE).stat().st_mtime_ns != before:
                break  # a checkpoint has been written: kill a little later
            time.sleep(0.02)
        time.sleep(moments.random() * 0.5)
        process.kill()
        process.wait()
        kills += 1
        if json.loads((out / "training.json").read_text())["step"] == 12:
            break
    run(*command, "--resume")
    assert torch.equal(weights(out), weights(trained))
    steps = [line.split(",")[0] for line in (out / "log.csv").read_text().splitlines()]
    assert steps == ["step", "4", "5", "8", "10", "12"]
    assert not list(out.glob(".writing*"))


@posix
def test_interrupt_leaves_a_checkpoint_that_goes_on(tmp_path, capsys):
    out = tmp_path / "stopped"
    command = [*COMMAND, *map(str, ["train", "--out", out, "--num-train-steps", 100_000, *SMALL])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out / "log.csv").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in output and "Traceback" not in errors
    step = json.loads((out / "training.json").read_text())["step"]
    assert f"stopped at step {step}" in output
    assert f"done: step {step + 1}" in done(capsys, "train", "--out", out, "--resume", "--num-train-steps", step + 1)


@posix
def test_a_closed_terminal_ends_a_run_as_ctrl_c_does(tmp_path, capsys, monkeypatch, harmless):
    """In this process: the signal comes with the row of step 5, and the next step is the last."""
    write_row = train_command._append_row

    def hung_up(*row):
        write_row(*row)
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(train_command, "_append_row", hung_up)
    command = ["train", "--out", tmp_path / "stopped", "--num-train-steps", 8, *SMALL]
    assert main([str(argument) for argument in command]) == 129
    assert "stopped at step 6 of 8; --resume goes on" in capsys.readouterr().out
    assert json.loads((tmp_path / "stopped" / "training.json").read_text())["step"] == 6


@posix
def test_two_processes_are_one_run(tmp_path):
    """accelerate launch, stopped by SIGTERM, then torchrun --resume: the losses and weights of one process alone."""
    steps = 32
    options = [*SMALL[:-1], 1, "--num-train-steps", steps, "--checkpoint-every", 8]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([str(a) for a in ("train", "--out", one, *options)]) == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    bin_folder = Path(sys.executable).parent
    launch = [bin_folder / "accelerate", "launch", "--multi_gpu", "--num_processes", 2]
    launch += ["--main_process_port", free_port()]
    process = subprocess.Popen(
        [str(a) for a in (*launch, "-m", "ddpm_tutorial", "train", "--out", two, *options)], env=environment,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while process.poll() is None and not ((two / "log.csv").exists() and len((two / "log.csv").read_bytes()) > 100):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    info = json.loads((two / "training.json").read_text())
    assert f"stopped at step {info['step']} of {steps}" in output and info["step"] < steps, output
    assert "on 2 × cpu" in output and output.count("images of 28×28 in grey") == 1  # only one of them speaks

    launch = [bin_folder / "torchrun", "--nproc_per_node", 2, "--master_port", free_port()]
    done = subprocess.run(
        [str(a) for a in (*launch, "-m", "ddpm_tutorial", "train", "--out", two, *options, "--resume")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and f"done: step {steps}" in done.stdout, done.stderr
    rows = [[line.split(",")[:3] for line in (out / "log.csv").read_text().splitlines()[1:]] for out in (one, two)]
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]] and len(rows[0]) == steps
    assert [float(r[2]) for r in rows[1]] == pytest.approx([float(r[2]) for r in rows[0]], abs=1e-4)
    torch.testing.assert_close(weights(one), weights(two), rtol=0, atol=1e-3)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@posix
def test_full_disk_in_a_process_of_its_own(tmp_path):
    """No file may grow beyond 300 kB: the state's does."""
    command = " ".join(map(str, [*COMMAND, "train", "--out", tmp_path / "run", "--num-train-steps", 3, *SMALL]))
    done = subprocess.run(["bash", "-c", f"ulimit -f 300; {command}"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "step 3: " in done.stderr and "could not be written to (" in done.stderr
    assert "Nothing was saved before" in done.stderr and "--resume" not in done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"log.csv"}


@pytest.fixture
def harmless():
    """Signals that nobody keeps must not end the tests."""
    numbers = [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@posix
def test_signals_are_kept_and_those_that_do_not_exist_or_are_ignored_left_alone(monkeypatch, harmless):
    def kept(*numbers):
        with train_command._signals() as caught:
            for number in numbers:
                os.kill(os.getpid(), number)
        return caught

    hang_up, user = signal.SIGHUP, signal.SIGUSR1
    assert kept(*harmless) == [hang_up, signal.SIGTERM, signal.SIGINT]
    signal.signal(hang_up, signal.SIG_IGN)  # as nohup does
    assert kept(hang_up) == [] and signal.getsignal(hang_up) == signal.SIG_IGN
    monkeypatch.delattr(signal, "SIGHUP")  # as on Windows
    monkeypatch.setattr(signal, "SIGBREAK", user, raising=False)
    assert kept(user) == [user]


@posix
@pytest.mark.parametrize("command", [["train"], ["sample"], ["evaluate"]])
def test_ctrl_c_within_an_import_has_no_traceback(tmp_path, command):
    """In place of torch, a module that is interrupted and then fails in its own way."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    1 / 0\n"
    )
    done = subprocess.run(
        [*COMMAND, *command, "--out", tmp_path / "x.json"], env=os.environ | {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "")


def test_a_second_run_is_refused_before_the_data_is_read(trained, fails):
    with locked(trained):
        told = fails("train", "--out", trained, "--resume", "--data", "nowhere")
    assert f"another run is writing to {trained}" in told


def done(capsys, *arguments):
    """What a command that ends well has printed."""
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_a_run_knows_its_data_and_its_intervals(colour_folder, tmp_path, capsys, fails, monkeypatch):
    small = ["--channels", 8, "--batch-size", 8, "--sample-every", 0, "--log-every", 1, "--checkpoint-every", 3]
    run = ["train", "--out", tmp_path / "run", "--num-train-steps"]
    monkeypatch.setenv(SOURCE_VARIABLE, os.path.relpath(colour_folder))
    done(capsys, *run, 2, *small)
    monkeypatch.delenv(SOURCE_VARIABLE)
    monkeypatch.chdir(tmp_path)
    done(capsys, *run, 4, "--resume")  # the same data and intervals, from another folder, without the variable
    steps = [line.split(",")[0] for line in (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]]
    assert steps == ["1", "2", "3", "4"]
    done(capsys, *run, 6, "--resume", "--log-every", 100)
    info = json.loads((tmp_path / "run" / "training.json").read_text())
    assert info["run"]["data"] == str(colour_folder) and info["num_images"] == 60
    assert [info["run"][f"{name}_every"] for name in ("log", "checkpoint", "sample")] == [100, 3, 0]

    for steps in (6, 2):
        assert f"{tmp_path / 'run'} is at step 6 already" in done(capsys, *run, steps, "--resume")
    shutil.copytree(colour_folder, tmp_path / "moved")
    done(capsys, *run, 7, "--resume", "--data", tmp_path / "moved")  # the same images elsewhere
    picture = tmp_path / "moved" / "Red shirts" / "0.png"
    Image.open(picture).rotate(180).save(picture)
    told = fails(*run, 8, "--resume")
    assert "was trained on other data: checksum " in told and f"from {tmp_path / 'moved'}" in told
    picture.unlink()
    told = fails(*run, 8, "--resume", "--data", tmp_path / "moved")
    assert f"num_images 60 from {tmp_path / 'moved'}, and now 59 from {tmp_path / 'moved'}" in told


@pytest.fixture(scope="module")
def colour_folder(tmp_path_factory):
    """Fashion-MNIST in colour: three classes, 20 pictures each, 28×28 RGB."""
    folder = tmp_path_factory.mktemp("colour")
    images, labels, _ = load_fashion_mnist("test", "sample")
    for label, name in enumerate(("Red shirts", "green trousers", "blue pullovers")):
        (folder / name).mkdir()
        for i, image in enumerate(images[labels == label][:20, 0]):
            picture = np.zeros((28, 28, 3), np.uint8)
            picture[..., label] = image.numpy()
            Image.fromarray(picture).save(folder / name / f"{i}.png")
    return folder


def test_pictures_in_colour_train_resume_and_sample(colour_folder, tmp_path, fails, capsys):
    def command(*arguments):
        assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err

    small = ["--channels", 16, "--batch-size", 8, "--image-size", 32, "--sample-every", 5]
    command("train", "--data", colour_folder, "--out", tmp_path / "run", "--num-train-steps", 5, *small)
    found = "60 images of 32×32 in colour, values 0 … 255, 3 classes (Red shirts, blue pullovers, green trousers)\n"
    assert found in capsys.readouterr().out
    info = json.loads((tmp_path / "run" / "training.json").read_text())
    assert info["image_shape"] == [3, 32, 32]
    assert info["class_names"] == ["Red shirts", "blue pullovers", "green trousers"]
    assert Image.open(tmp_path / "run" / "samples" / "step-000005.png").size == (3 * 34 + 2, 8 * 34 + 2)
    command("train", "--out", tmp_path / "run", "--resume", "--num-train-steps", 7, "--sample-every", 0)

    sample = ["sample", "--checkpoint", tmp_path / "run", "--num-inference-steps", 2, "--num-images", 3]
    command(*sample, "--labels", "green", "red", "--out", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["images"].shape == (3, 3, 32, 32) and arrays["labels"].tolist() == [2, 0, 2]
    command(*sample, "--out", tmp_path / "x.png")
    assert np.asarray(Image.open(tmp_path / "x.png")).std(axis=2).max() > 10  # it has colours
    assert "the labels are 0 Red shirts, 1 blue" in fails(*sample, "--labels", "bag", "--out", tmp_path / "y.png")
    command("evaluate", "--checkpoint", tmp_path / "run", "--data", colour_folder, "--split", "train", "--num-images",
            2, "--num-steps", 2)  # fmt: skip

    run = ["train", "--out", tmp_path / "run", "--resume", "--num-train-steps", 9]
    assert "other data" in fails(*run, "--data", "sample")
    assert "another --image-size" in fails(*run, "--image-size", 28)
    new = ["train", "--out", tmp_path / "new", "--data", colour_folder, "--num-train-steps", 1]
    assert "30×30, and this U-Net needs sizes divisible by 4: 28 or 32" in fails(*new, "--image-size", 30)
    assert "1 (grey) or 3 (colour), got 2" in fails(*new, "--image-channels", 2)


def test_pictures_without_classes(colour_folder, tmp_path, capsys, fails):
    run = ["train", "--data", colour_folder / "green trousers", "--out", tmp_path / "run", "--image-channels", 1]
    run += ["--num-train-steps", 2, "--channels", 16, "--batch-size", 8, "--sample-every", 0]
    assert main([str(a) for a in run]) == 0
    assert "20 images of 28×28 in grey, values 0 … 150, without labels\n" in capsys.readouterr().out
    sample = ["sample", "--checkpoint", tmp_path / "run", "--num-inference-steps", 2, "--num-images", 2]
    assert main([str(a) for a in (*sample, "--out", tmp_path / "x.npz")]) == 0
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["images"].shape == (2, 1, 28, 28)
    assert "trained without labels" in fails(*sample, "--labels", 0, "--out", tmp_path / "x.npz")


@pytest.mark.parametrize("info", [{}, {"run": 5, "config": {}}, {"run": {}, "config": {"speed": 1}}, {"run": {}}])
def test_foreign_training_json(trained, tmp_path, fails, info):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "training.json").write_text(json.dumps(info))
    assert "training.json" in fails("train", "--out", tmp_path / "run", "--resume")


def test_full_disk_is_no_bad_input(monkeypatch, capsys):
    def too_much(**options):
        raise OSError(errno.ENOSPC, "No space left on device", "x.png")

    monkeypatch.setattr(sample_command, "run", too_much)
    assert main(["sample", "--out", "x.png"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("CUDA out of memory. Tried 20 GiB\nand more"), "CUDA out of memory. Tried 20 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory\n"), "DefaultCPUAllocator: can't allocate memory"),
        (RuntimeError("Overflow when unpacking long long\nand more"), "Overflow when unpacking long long"),
        (MemoryError(), "MemoryError"),
        (OverflowError("too large\nand more"), "too large"),
    ],
)
def test_out_of_memory_is_one_line(monkeypatch, capsys, error, message):
    def too_much(**options):
        raise error

    monkeypatch.setattr(sample_command, "run", too_much)
    assert main(["sample", "--out", "x.png"]) == 1
    assert capsys.readouterr().err == f"ddpm-tutorial sample: error: {message}\n"


def test_bad_input_of_train(trained, tmp_path, fails):
    out = ["--out", tmp_path / "new"]
    assert "no such folder" in fails("train", *out, "--data", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "neither train-images-idx3-ubyte" in fails("train", *out, "--data", tmp_path / "empty")
    assert "--batch-size: must be a whole number in 1 … 1000000000, got 0" in fails("train", *out, "--batch-size", 0)
    assert "--batch-size: must be a whole number in 1 … 1000000000, got 'many'" in fails(
        "train", *out, "--batch-size", "many")  # fmt: skip
    assert "batch_size must lie in 1 … 5000" in fails("train", *out, "--data", "sample", "--batch-size", 5001)
    for option, value in (("lr", "nan"), ("lr", 0), ("cooldown", 1.5), ("optimizer", "adamw"), ("target", "score"),
                          ("seed", 2**63), ("seed", -1), ("channels", 0), ("channels", 10**9), ("channel-mults", 0),
                          ("patch-size", -2), ("num-res-blocks", 0), ("image-size", "1e30"), ("num-timesteps", 10**30),
                          ("log-every", 0), ("sample-every", -1), ("batch-size", 10**30), ("warmup-steps", 0.5),
                          ("data", ""), ("out", ""), ("schedule", "lin"), ("loss", "l3"), ("ema-decay", 1),
                          ("image-channels", 2)):  # fmt: skip
        assert f"argument --{option}: must be " in fails("train", *out, f"--{option}", value)
    assert "divisible by" in fails("train", *out, "--data", "sample", "--channels", 14)
    assert "--out" in fails("train")
    assert "unrecognized arguments: --batchsize" in fails("train", *out, "--batchsize", 3)
    assert "no checkpoint" in fails("train", *out, "--resume")
    assert "already holds a checkpoint" in fails("train", "--out", trained, *SMALL)
    for option, value in (("lr", 5), ("optimizer", "adam"), ("target", "noise"), ("cooldown", 0.5)):
        told = fails("train", "--out", trained, "--resume", f"--{option}", value)
        assert f"started with another --{option}; --resume keeps its own" in told
    assert not (tmp_path / "new").exists()


def test_folder_that_cannot_be_written_to(tmp_path, fails):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):  # told before the data, which is not there, is read
        assert "file is a file; --out is a folder" in fails("train", "--out", out, "--data", tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ sample
def test_sample_npz_holds_images_and_labels(trained, tmp_path, capsys):
    """Drawn in this process and in one of its own."""
    for command, name in ((run, "a"), (functools.partial(done, capsys), "b")):
        command("sample", "--checkpoint", trained, "--labels", "sneaker", "8", "--num-images", 5,
                "--num-inference-steps", 3, "--out", tmp_path / f"{name}.npz")  # fmt: skip
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a["images"].shape == (5, 1, 28, 28) and a["images"].dtype == np.uint8
        assert a["labels"].tolist() == [7, 8, 7, 8, 7]
        assert (a["images"] == b["images"]).all()  # the same seed


def test_sample_png_from_the_shipped_weights(tmp_path, capsys):
    done(capsys, "sample", "--num-images", 20, "--num-inference-steps", 4, "--guidance-scale", 2,
         "--out", tmp_path / "grid.png")  # fmt: skip
    assert Image.open(tmp_path / "grid.png").size == (10 * 30 + 2, 2 * 30 + 2)


def sample(trained, *arguments):
    few = ["--num-inference-steps", 3] if "--sampler" not in arguments else []
    assert main([str(a) for a in ("sample", "--checkpoint", trained, *few, *arguments)]) == 0


def test_labels_scale_eta_and_seed_reach_the_images(tmp_path):
    """With the shipped weights: the classes are those asked for, and each option changes the images."""
    few = ["sample", "--labels", "sneaker", "bag", "trouser", "--num-images", 12, "--num-inference-steps", 8]

    def drawn(name, *options):
        assert main([str(a) for a in (*few, *options, "--out", tmp_path / f"{name}.npz")]) == 0
        return read_samples(tmp_path / f"{name}.npz")

    images, labels = drawn("plain")
    assert labels.tolist() == [7, 8, 1] * 4
    assert label_agreement(look(images).logits, labels) > 0.7
    for options in (
        ["--seed", 1], ["--eta", 1], ["--guidance-scale", 3], ["--sampler", "heun"], ["--spacing", "u"],
        ["--labels", "coat"],
    ):  # fmt: skip
        others, _ = drawn("other", *options)
        assert (others.int() - images.int()).abs().float().mean() > 1, options


def test_sample_single_files_grid_npz_and_gif_are_the_same_images(trained, tmp_path):
    options = ["--labels", "t-shirt", "ankle", "--num-images", 3, "--seed", 4]
    for out in ("singles", "grid.png", "x.npz", "x.gif"):
        sample(trained, *options, "--out", tmp_path / out)
    names = ["00000_t-shirt-top.png", "00001_ankle-boot.png", "00002_t-shirt-top.png"]
    assert sorted(os.listdir(tmp_path / "singles")) == names
    with np.load(tmp_path / "x.npz") as arrays:
        images = arrays["images"][:, 0]
        assert arrays["images"].dtype == np.uint8 and arrays["labels"].tolist() == [0, 9, 0]
    grid, chain = Image.open(tmp_path / "grid.png"), Image.open(tmp_path / "x.gif")
    assert grid.mode == "L" and grid.size == chain.size == (3 * 30 + 2, 32)
    assert chain.n_frames == 4  # x_T and three steps
    chain.seek(3)
    assert chain.info["duration"] == 3000
    last = np.asarray(chain.convert("L"))
    for i, name in enumerate(names):
        place = (slice(2, 30), slice(2 + 30 * i, 30 + 30 * i))
        assert (np.asarray(Image.open(tmp_path / "singles" / name)) == images[i]).all()
        assert (np.asarray(grid)[place] == images[i]).all() and (last[place] == images[i]).all()


def test_three_labels_are_nine_columns_and_the_batch_size_changes_nothing(trained, tmp_path):
    options = ["--labels", 1, 7, 9, "--num-images", 20, "--num-inference-steps", 1]
    sample(trained, *options, "--out", tmp_path / "a.png")
    sample(trained, *options, "--out", tmp_path / "b.png", "--batch-size", 6)
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("a.png", "b.png"))
    assert one.shape == (3 * 30 + 2, 9 * 30 + 2) and abs(one - two).max() <= 1


@pytest.mark.parametrize("damage", ["nan", "int8", "large"])
def test_what_is_not_finite_is_no_image_and_no_figure(trained, tmp_path, capsys, damage):
    shutil.copytree(trained, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "model.safetensors")
    if damage == "nan":
        weights["head.conv_out.bias"][0] = float("nan")
    else:
        betas = {"betas": weights.pop("betas")}
        weights = {name: w.to(torch.int8) if damage == "int8" else w * 1e30 for name, w in weights.items()} | betas
    save_file(weights, tmp_path / "run" / "model.safetensors", metadata={"format": "pt"})
    few = ["--num-inference-steps", 2, "--num-images", 2]
    for arguments in (
        ["sample", *few, "--out", "x.png"], ["sample", *few, "--out", "x.gif"],
        ["evaluate", "--data", "sample", "--num-images", 2, "--num-steps", 2, "--out", "x.json"],
    ):  # fmt: skip
        arguments[-1] = tmp_path / arguments[-1]
        status = main([str(a) for a in (*arguments, "--checkpoint", tmp_path / "run")])
        assert status == (2 if damage == "int8" else 1)
        told = capsys.readouterr().err.splitlines()[-1]
        assert ("is of torch.int8" if damage == "int8" else "not finite") in told
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    "names, endings",
    [
        (["C", "C#", "C++"], ["0-c", "1-c", "2-c"]),
        (["\N{DOG FACE}", "cat"], ["0", "1-cat"]),
        (["a" * 300, "a" * 300 + "b"], ["0-" + "a" * 40, "1-" + "a" * 40]),
        (["../../etc", "T-shirt/top"], ["etc", "t-shirt-top"]),
    ],
)
def test_file_names_tell_classes_apart(tmp_path, names, endings):
    images = torch.zeros(len(names), 1, 8, 8, dtype=torch.uint8)
    save_images([images], torch.arange(len(names)), tmp_path / "new", 10, names)
    assert sorted(os.listdir(tmp_path / "new")) == [f"{i:05d}_{ending}.png" for i, ending in enumerate(endings)]


def test_images_are_written_as_they_come(trained, tmp_path):
    """A generator of batches that stops half-way: what was drawn before is whole, and nothing else is there."""

    def batches():
        yield torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
        assert sorted(os.listdir(tmp_path / "new")) == ["00000_a.png", "00001_b-c.png"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_images(batches(), torch.tensor([0, 1, 0]), tmp_path / "new", 10, ["A", "B / C!"])
    assert Image.open(tmp_path / "new" / "00001_b-c.png").size == (28, 28)
    assert len(os.listdir(tmp_path / "new")) == 2


def test_ddpm_sampler_takes_all_steps(tmp_path, capsys):
    """Of a network with T = 30: its chain is x_T and 30 steps."""
    done(capsys, "train", "--out", tmp_path / "run", "--num-train-steps", 1, "--num-timesteps", 30, *SMALL)
    done(capsys, "sample", "--checkpoint", tmp_path / "run", "--num-images", 1, "--sampler", "ddpm",
         "--out", tmp_path / "chain.gif")  # fmt: skip
    assert Image.open(tmp_path / "chain.gif").n_frames == 31


def test_bad_input_of_sample(trained, tmp_path, fails):
    out = ["--checkpoint", trained, "--out", tmp_path / "x.png"]
    assert "unknown label 'hat'" in fails("sample", *out, "--labels", "hat")
    assert "unknown label '10'" in fails("sample", *out, "--labels", 10)
    assert "must be one of ddim, ddpm, heun, dpmpp-2m" in fails("sample", *out, "--sampler", "euler")
    for count in (0, 200_000_000):
        assert f"a whole number in 1 … 1000000, got {count}" in fails("sample", *out, "--num-images", count)
    assert "1 … 1000" in fails("sample", *out, "--num-inference-steps", 1001)
    assert "--num-inference-steps: must be" in fails("sample", *out, "--num-inference-steps", 0)
    assert "always takes all T" in fails("sample", *out, "--sampler", "ddpm", "--num-inference-steps", 5)
    for seed in (-1, 10**30):
        assert "--seed: must be" in fails("sample", *out, "--seed", seed)
    for scale in ("nan", "inf", "1e300", "-101"):
        assert "--guidance-scale: must be a number in -100 … 100" in fails("sample", *out, "--guidance-scale", scale)
    assert "--batch-size: must be" in fails("sample", *out, "--batch-size", 0)
    assert "'t' may be T-shirt/top or Trouser" in fails("sample", *out, "--labels", "t")
    assert "--eta: must be a number in 0 … 1, got 1.5" in fails("sample", *out, "--eta", 1.5)
    assert "--eta: must be a number in 0 … 1, got nan" in fails("sample", *out, "--eta", "nan")
    assert "belongs to the sampler ddim" in fails("sample", *out, "--eta", 0.5, "--sampler", "heun")
    elsewhere = ["sample", "--checkpoint", trained, "--out"]
    assert "must end in .png, .npz or .gif, or be a folder" in fails(*elsewhere, tmp_path / "x.jpg")
    assert "at most 200 for a GIF, got 201" in fails(*elsewhere, tmp_path / "x.gif", "--num-images", 201)
    assert "must end in .png" in fails(*elsewhere, tmp_path / ".png")
    assert "no meaning for a GIF" in fails(*elsewhere, tmp_path / "x.gif", "--batch-size", 5)
    (tmp_path / "is.png").mkdir()
    assert "is a folder" in fails(*elsewhere, tmp_path / "is.png")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    assert "exists already" in fails(*elsewhere, tmp_path / "full")
    assert "exists already" in fails(*elsewhere, tmp_path / "full" / "mine")
    judging = ("evaluate", "--metric", "samples", "--data", "sample", "--samples", tmp_path / "none.npz")
    assert f"no such file: {tmp_path / 'none.npz'}" in fails(*judging)
    fails(*elsewhere, tmp_path / "new", "--eta", 2)
    assert not (tmp_path / "new").exists() and os.listdir(tmp_path / "full") == ["mine"]
    assert "no such folder" in fails("sample", "--checkpoint", trained, "--out", tmp_path / "no" / "x.png")
    for long in ("x" * 249, "x" * 245 + ".png"):  # as a folder or a file; what is written aside has a longer name
        assert "nothing can be written to" in fails(*elsewhere, tmp_path / long)
    assert "no such folder" in fails("sample", "--checkpoint", tmp_path / "nowhere", "--out", tmp_path / "x.png")
    assert "no checkpoint in" in fails("sample", "--checkpoint", tmp_path / "full", "--out", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


class Broken(io.StringIO):
    def write(self, text):
        raise OSError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("kind", ["ascii", "cp1251", "broken", "closed", "none"])
def test_standard_streams_end_no_command(monkeypatch, tmp_path, kind):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=kind if kind in ("ascii", "cp1251") else "utf-8") for _ in "ab"]
    if kind == "broken":
        streams = [Broken(), Broken()]
    elif kind == "closed":
        [stream.close() for stream in streams]
    elif kind == "none":
        streams = [None, None]
    report = {"split": "é", "num_images": 1, "num_steps": 1, "bits_per_dim": {"×": {"mean": 1, "standard_error": 1}}}
    monkeypatch.setitem(evaluate.METRICS, "bits-per-dim", (lambda *_, **__: report, evaluate.print_bits))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", streams[0])
        patched.setattr(sys, "stderr", streams[1])
        assert main(["evaluate", "--out", str(tmp_path / "x.json")]) == 0
        for arguments, status in ((["train", "--help"], 0), (["sample", "--eta", "×"], 2)):
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert stop.value.code == status
    assert json.loads((tmp_path / "x.json").read_text())["split"] == "é"
    if kind in ("ascii", "cp1251"):
        printed, told = (stream.buffer.getvalue().decode(kind) for stream in streams)
        assert "bits/dim without labels, 1 ? test images" in printed.replace("? images", "? test images")
        assert "usage: ddpm-tutorial train" in printed and "got '?'" in told


def test_evaluate_writes_its_file_before_it_prints(monkeypatch, tmp_path):
    def show(report):
        assert json.loads((tmp_path / "x.json").read_text())["figure"] == 5
        shown.append(report)

    shown = []
    monkeypatch.setitem(evaluate.METRICS, "bits-per-dim", (lambda *_, **__: {"figure": 5}, show))
    assert main(["evaluate", "--out", str(tmp_path / "x.json")]) == 0 and len(shown) == 1


def test_evaluate_gives_the_bound_as_json(trained, tmp_path, capsys):
    arguments = ["evaluate", "--checkpoint", trained, "--data", "sample", "--num-images", 6, "--num-steps", 5]
    assert main([str(a) for a in [*arguments, "--out", tmp_path / "bits.json"]]) == 0
    report = json.loads((tmp_path / "bits.json").read_text())
    assert report["num_images"] == 6 and report["num_steps"] == 5 and report["split"] == "test"
    parts = {name: figure["mean"] for name, figure in report["bits_per_dim"].items()}
    assert parts["total"] == pytest.approx(parts["L_T"] + parts["L_1_to_T-1"] + parts["L_0"], rel=1e-5)
    assert 1 < parts["total"] < 30 and report["bits_per_dim"]["total"]["standard_error"] > 0
    assert f"{parts['total']:.4f}" in capsys.readouterr().out


def test_bad_input_of_evaluate(trained, tmp_path, fails):
    data = ["--checkpoint", trained, "--data", "sample"]
    assert "must be one of bits-per-dim, samples, got 'fid'" in fails("evaluate", *data, "--metric", "fid")
    assert "at most 1000" in fails("evaluate", *data, "--num-images", 1001)
    assert "1 … 1000" in fails("evaluate", *data, "--num-images", 1, "--num-steps", 1001)
    assert "--num-steps: must be" in fails("evaluate", *data, "--num-steps", -1)
    assert "must be one of test, train, got 'valid'" in fails("evaluate", *data, "--split", "valid")
    (tmp_path / "folder.json").mkdir()
    for out in ("x.txt", "folder.json", "no/x.json", "x" * 245 + ".json"):
        assert "--out" in (told := fails("evaluate", *data, "--out", tmp_path / out)) or "can be written" in told
    told = fails("evaluate", *data, "--sampler", "ddim", "--eta", 1)
    assert "--sampler, --eta has no meaning with --metric bits-per-dim" in told


def test_damaged_checkpoint_of_sample(trained, tmp_path, fails):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((trained / name).read_bytes())
    for name in ("model.safetensors", "config.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        assert "damaged" in fails("sample", "--checkpoint", folder, "--out", tmp_path / "x.png")
        (folder / name).write_bytes(whole)


def test_existing_picture_survives_a_failed_command(trained, tmp_path, fails):
    picture = tmp_path / "x.png"
    picture.write_bytes(b"mine")
    fails("sample", "--checkpoint", trained, "--out", picture, "--num-inference-steps", 2000)
    assert picture.read_bytes() == b"mine" and os.listdir(tmp_path) == ["x.png"]


def test_label_names():
    texts = ("7", "Sneaker", "t-shirt", "T-shirt/top", "ankle boot", "BAG", "dr")
    assert [parse_label(text, CLASS_NAMES) for text in texts] == [7, 7, 0, 0, 9, 8, 3]
    for bad in ("", "-", "11", "-1", "1.0", "sneakers"):
        with pytest.raises(ValueError, match="unknown label"):
            parse_label(bad, CLASS_NAMES)
    with pytest.raises(ValueError, match="label 's' may be Sandal or Shirt or Sneaker"):
        parse_label("s", CLASS_NAMES)
    assert parse_label("10", ["1", "10", "2"]) == 1  # a name comes before a number
    with pytest.raises(ValueError, match="unknown label '-1'"):
        parse_label("-1", ["0", "1", "2"])
    assert parse_label("-1", ["0", "-1", "1"]) == 1
    with pytest.raises(ValueError, match="19 n19, … 199$"):
        parse_label("x", [f"n{i}" for i in range(200)])


# ------------------------------------------------------------------------------------ evaluate --metric samples
@pytest.fixture
def few(monkeypatch):
    """A thousand training images in place of 5,000, and three subsets of real images in place of ten."""

    def first(split, source):
        data = load_fashion_mnist(split, source)
        return ImageData(data.images[:1000], data.labels[:1000], data.class_names)

    monkeypatch.setattr(evaluate, "load_fashion_mnist", first)
    monkeypatch.setattr(metrics, "REAL_SUBSETS", 3)


def test_evaluate_judges_given_samples_beside_real_images(few, tmp_path, capsys):
    data = load_fashion_mnist("train", source="sample")
    np.savez(tmp_path / "copies.npz", images=data.images[:300].numpy(), labels=data.labels[:300].numpy())
    arguments = ["--metric", "samples", "--data", "sample", "--samples", tmp_path / "copies.npz"]
    printed = done(capsys, "evaluate", *arguments, "--out", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["num_images"] == 300 and figures["num_train_images"] == 1000
    generated, real = figures["generated"], figures["real"]
    assert generated["label_agreement"]["mean"] > 0.85 and real["label_agreement"]["mean"] > 0.85
    assert generated["label_agreement"]["deviation"] is None and real["label_agreement"]["deviation"] > 0
    assert 0.3 < figures["frechet_ratio"] < 3  # real images: about the distance of other real images
    assert generated["nearest_median"]["mean"] == 0 < real["nearest_1_percent"]["mean"]  # found out
    assert real["nearest_1_percent"]["mean"] < 0.7 * real["nearest_median"]["mean"]
    assert all(set(generated) == set(real) and f["accuracy_trained_on"]["mean"] > 0.25 for f in (generated, real))
    assert all(name in printed for name in generated)


@pytest.mark.parametrize("order", ["by class", "in turn"])
def test_a_file_is_divided_into_balanced_sets(few, tmp_path, monkeypatch, order):
    """``sample`` writes the classes in turn: with every other image, a set would have half of them."""
    monkeypatch.setattr(evaluate, "accuracy_trained_on", lambda *sets: 0.5)  # it takes longer than all others
    data = load_fashion_mnist("train", source="sample")
    chosen = data.labels.argsort(stable=True).view(10, -1)[:, :60]  # 60 of each class
    chosen = (chosen if order == "by class" else chosen.T).flatten()
    labels = data.labels[chosen].to(torch.int32)
    np.savez(tmp_path / "some.npz", images=data.images[chosen].numpy(), labels=labels.numpy())
    arguments = ["--metric", "samples", "--data", "sample", "--samples", tmp_path / "some.npz", "--repeats", 2]
    assert main([str(a) for a in ("evaluate", *arguments, "--out", tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["num_images"], figures["repeats"]) == (300, 2) and figures["frechet_ratio"] < 3


def test_evaluate_draws_samples_of_the_checkpoint(few, trained, tmp_path, capsys):
    done(capsys, "evaluate", "--checkpoint", trained, "--metric", "samples", "--data", "sample", "--num-images", 100,
         "--repeats", 2, "--sampler", "dpmpp-2m", "--num-inference-steps", 2,
         "--out", tmp_path / "figures.json")  # fmt: skip
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["frechet_ratio"] > 3  # hardly trained at all
    assert (figures["sampler"], figures["num_inference_steps"], figures["repeats"]) == ("dpmpp-2m", 2, 2)
    assert figures["generated"]["inception_score"]["deviation"] > 0


def test_bad_input_of_evaluate_samples(trained, tmp_path, fails):
    arguments = ["evaluate", "--checkpoint", trained, "--metric", "samples", "--data", "sample"]
    assert "between 97 and 1000 images can be judged beside this data, got 96" in fails(*arguments, "--num-images", 96)
    assert "got 1001" in fails(*arguments, "--num-images", 1001)
    for repeats in (0, 200_000_000):
        assert "--repeats: must be a whole number in 1 … 1000" in fails(*arguments, "--repeats", repeats)
    assert "--split has no meaning with --metric samples" in fails(*arguments, "--split", "test")
    told = fails(*arguments, "--samples", "x.npz", "--sampler", "heun", "--guidance-scale", 2)
    assert "--sampler, --guidance-scale has no meaning with --samples FILE" in told
    told = fails(*arguments, "--samples", "x.npz", "--num-images", 200)
    assert "--num-images has no meaning with --samples FILE" in told
    good, cut = np.zeros((200, 1, 28, 28), np.uint8), tmp_path / "cut.npz"
    np.savez_compressed(cut, images=good, labels=np.arange(200) % 10)
    cut.write_bytes(cut.read_bytes()[:60] + b"\0" * 40 + cut.read_bytes()[100:])
    np.save(tmp_path / "array.npy", good)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name, contents in (("no.npz", b"PK no zip"), ("empty.npz", b""), ("cut.npz", None), ("array.npz", None)):
        if contents is not None:
            (tmp_path / name).write_bytes(contents)
        told = fails(*arguments, "--samples", tmp_path / name)
        assert "is damaged or holds no images and labels as sample writes them" in told and "pickle" not in told
    assert "is a folder" in fails(*arguments, "--samples", tmp_path)
    np.savez(tmp_path / "other.npz", images=np.zeros((3, 28, 28)), labels=np.zeros(3))
    assert "must hold uint8 images (N, C, H, W)" in fails(*arguments, "--samples", tmp_path / "other.npz")
    np.savez(tmp_path / "float.npz", images=good, labels=np.arange(200) % 10.0)
    assert "integer labels (N,), got torch.uint8" in fails(*arguments, "--samples", tmp_path / "float.npz")
    for name, shape, labels, told in (
        (
            "large",
            (200, 1, 32, 32),
            torch.arange(200) % 10,
            "grey images of 28×28, (N, 1, 28, 28), got (200, 1, 32, 32)",
        ),
        ("colour", (200, 3, 28, 28), torch.arange(200) % 10, "got (200, 3, 28, 28)"),
        ("labels", (200, 1, 28, 28), torch.arange(200) % 11, "must be 0 … 9, got 0 … 10"),
        ("one", (200, 1, 28, 28), torch.full((200,), 7), "missing is T-shirt/top, Trouser"),
    ):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros(shape, np.uint8), labels=labels.numpy())
        assert told in fails(*arguments, "--samples", tmp_path / f"{name}.npz")


def test_an_empty_folder_is_asked_whether_a_file_can_be_written_in_it(trained, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(sample_command, "check_writable", asked.append)
    for name in ("new", "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        out = tmp_path / name
        done(capsys, "sample", "--checkpoint", trained, "--num-images", 1, "--num-inference-steps", 1, "--out", out)
    assert asked == [tmp_path / "new", tmp_path / "there" / "image.png"]


def test_a_folder_called_sample_does_not_take_the_samples_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("sample").mkdir()
    done(capsys, "train", "--out", "run", "--num-train-steps", 1, *SMALL)
    assert json.loads(Path("run", "training.json").read_text())["run"]["data"] == "sample"
    done(capsys, "train", "--out", "run", "--resume", "--num-train-steps", 1)


def test_one_image_has_no_standard_error(trained, tmp_path, capsys):
    out = tmp_path / "bits.json"
    few = ("--data", "sample", "--num-images", 1, "--num-steps", 2)
    told = done(capsys, "evaluate", "--checkpoint", trained, *few, "--out", out)
    found = json.loads(out.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert found["bits_per_dim"]["total"]["standard_error"] is None and "±" not in told
