"""The command line: killed, stopped and resumed in processes of their own; bad input within this one, for speed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_tutorial import cli
from ddpm_tutorial.cli import parse_label
from ddpm_tutorial.training import STATE_FILE, TrainConfig
from ddpm_tutorial.unet import UNet

COMMAND = [sys.executable, "-m", "ddpm_tutorial"]
SMALL = ["--data", "sample", "--channels", "16", "--batch-size", "8", "--sample-every", "0", "--log-every", "5"]


def run(*arguments, check=True):
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture
def fails(capsys):
    """The error line of a command that must exit with 2 and print one line on the standard error, no traceback."""

    def fails(*arguments):
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        lines = capsys.readouterr().err.splitlines()
        assert status == 2 and len(lines) == 1 and "error: " in lines[0], lines
        return lines[0]

    return fails


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "small"
    run("train", "--out", out, "--num-train-steps", 12, "--checkpoint-every", 4, *SMALL)
    return out


def weights(folder):
    return torch.cat([p.detach().flatten() for p in UNet.from_pretrained(folder).parameters()])


# ------------------------------------------------------------------------------------------------- train
def test_help_names_every_option():
    assert "train" in run("--help").stdout and "sample" in run("--help").stdout
    text = run("train", "--help").stdout
    for option in ("--data", "--out", "--resume", "--num-train-steps", "--batch-size", "--lr", "--seed", "--schedule"):
        assert option in text


def test_bad_input_has_no_traceback_in_a_process_of_its_own(tmp_path):
    done = run("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "new", check=False)
    assert done.returncode == 2 and "no such folder" in done.stderr and "Traceback" not in done.stderr


def test_help_agrees_with_the_config():
    assert set(cli.CONFIG_HELP) == {field.name for field in fields(TrainConfig)}


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
    assert steps == ["step", "5", "10", "12"]
    assert not list(out.glob(".writing*"))


@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_leaves_a_checkpoint_that_goes_on(tmp_path, number, status):
    out = tmp_path / "stopped"
    command = [*COMMAND, *map(str, ["train", "--out", out, "--num-train-steps", 100_000, *SMALL])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out / "log.csv").exists():
        time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "--resume" in output and "Traceback" not in errors
    step = json.loads((out / "training.json").read_text())["step"]
    assert f"stopped at step {step}" in output
    again = run("train", "--out", out, "--resume", "--num-train-steps", step + 1)
    assert f"done: step {step + 1}" in again.stdout


def test_bad_input_of_train(trained, tmp_path, fails):
    out = ["--out", tmp_path / "new"]
    assert "no such folder" in fails("train", *out, "--data", tmp_path / "nowhere")
    assert "neither train-images-idx3-ubyte" in fails("train", *out, "--data", tmp_path)
    assert "batch_size must be at least 1, got 0" in fails("train", *out, "--data", "sample", "--batch-size", 0)
    assert "invalid int value: 'many'" in fails("train", *out, "--batch-size", "many")
    assert "batch_size must lie in 1 … 5000" in fails("train", *out, "--data", "sample", "--batch-size", 5001)
    assert "lr must be a positive number" in fails("train", *out, "--data", "sample", "--lr", "nan")
    assert "unknown schedule 'lin'" in fails("train", *out, "--data", "sample", "--schedule", "lin")
    assert "--log-every must be at least 1" in fails("train", *out, "--data", "sample", "--log-every", 0)
    assert "divisible by" in fails("train", *out, "--data", "sample", "--channels", 15)
    assert "--out" in fails("train")
    assert "unrecognized arguments: --batchsize" in fails("train", *out, "--batchsize", 3)
    assert "no checkpoint" in fails("train", *out, "--resume")
    assert "already holds a checkpoint" in fails("train", "--out", trained, *SMALL)
    assert "started with another --lr" in fails("train", "--out", trained, "--resume", "--lr", 5)
    assert not (tmp_path / "new").exists()


def test_folder_that_cannot_be_written_to(tmp_path, fails):
    (tmp_path / "file").write_text("in the way")
    assert "file" in fails("train", "--out", tmp_path / "file" / "run", "--num-train-steps", 1, *SMALL)


# ------------------------------------------------------------------------------------------------ sample
def test_sample_npz_holds_images_and_labels(trained, tmp_path):
    for name in ("a", "b"):
        run("sample", "--checkpoint", trained, "--labels", "sneaker", "8", "--num-images", 5, "--num-inference-steps",
            3, "--out", tmp_path / f"{name}.npz")  # fmt: skip
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a["images"].shape == (5, 1, 28, 28) and a["images"].dtype == np.uint8
        assert a["labels"].tolist() == [7, 8, 7, 8, 7]
        assert (a["images"] == b["images"]).all()  # the same seed


def test_sample_png_from_the_shipped_weights(tmp_path):
    run("sample", "--num-images", 20, "--num-inference-steps", 4, "--guidance-scale", 2, "--out", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (10 * 30 + 2, 2 * 30 + 2)


def test_ddpm_sampler_takes_all_steps(trained, tmp_path):
    run("sample", "--checkpoint", trained, "--num-images", 1, "--sampler", "ddpm", "--out", tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()


def test_bad_input_of_sample(trained, tmp_path, fails):
    out = ["--checkpoint", trained, "--out", tmp_path / "x.png"]
    assert "unknown label 'hat'" in fails("sample", *out, "--labels", "hat")
    assert "unknown label '10'" in fails("sample", *out, "--labels", 10)
    assert "must be one of ddpm, ddim" in fails("sample", *out, "--sampler", "euler")
    assert "at least 1, got 0" in fails("sample", *out, "--num-images", 0)
    assert "1 … 1000" in fails("sample", *out, "--num-inference-steps", 1001)
    assert "1 … 1000 (T), got 0" in fails("sample", *out, "--num-inference-steps", 0)
    assert "always takes all T" in fails("sample", *out, "--sampler", "ddpm", "--num-inference-steps", 5)
    assert "--seed must be" in fails("sample", *out, "--seed", -1)
    assert "guidance" in fails("sample", *out, "--guidance-scale", "nan")
    assert ".png or .npz" in fails("sample", "--checkpoint", trained, "--out", tmp_path / "x.jpg")
    assert "no such folder" in fails("sample", "--checkpoint", trained, "--out", tmp_path / "no" / "x.png")
    assert "no checkpoint in" in fails("sample", "--checkpoint", tmp_path / "nowhere", "--out", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_evaluate_gives_the_bound_as_json(trained, tmp_path, capsys):
    arguments = ["evaluate", "--checkpoint", trained, "--data", "sample", "--num-images", 6, "--num-steps", 5]
    assert cli.main([str(a) for a in [*arguments, "--out", tmp_path / "bits.json"]]) == 0
    report = json.loads((tmp_path / "bits.json").read_text())
    assert report["num_images"] == 6 and report["num_steps"] == 5 and report["split"] == "test"
    parts = {name: figure["mean"] for name, figure in report["bits_per_dim"].items()}
    assert parts["total"] == pytest.approx(parts["L_T"] + parts["L_1_to_T-1"] + parts["L_0"], rel=1e-5)
    assert 1 < parts["total"] < 30 and report["bits_per_dim"]["total"]["standard_error"] > 0
    assert f"{parts['total']:.4f}" in capsys.readouterr().out


def test_bad_input_of_evaluate(trained, tmp_path, fails):
    data = ["--checkpoint", trained, "--data", "sample"]
    assert "must be bits-per-dim, got 'fid'" in fails("evaluate", *data, "--metric", "fid")
    assert "at most 1000" in fails("evaluate", *data, "--num-images", 1001)
    assert "1 … 1000" in fails("evaluate", *data, "--num-images", 1, "--num-steps", 1001)
    assert "at least 0, got -1" in fails("evaluate", *data, "--num-steps", -1)
    assert "'train' or 'test', got 'valid'" in fails("evaluate", *data, "--split", "valid")
    assert "FILE.json" in fails("evaluate", *data, "--out", tmp_path / "x.txt")


def test_damaged_checkpoint_of_sample(trained, tmp_path, fails):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "diffusion.safetensors"):
        (folder / name).write_bytes((trained / name).read_bytes())
    for name in ("model.safetensors", "diffusion.safetensors", "config.json"):
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
    assert [parse_label(x) for x in ("7", "Sneaker", "t-shirt", "T-shirt/top", "ankle boot", "BAG", "dr")] == [
        7, 7, 0, 0, 9, 8, 3,
    ]  # fmt: skip
    for bad in ("s", "", "-", "11", "sneakers"):
        with pytest.raises(ValueError, match="unknown label"):
            parse_label(bad)
