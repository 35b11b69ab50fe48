"""One declaration of each setting: what the command line, Python and a checkpoint's files may hold."""

import argparse
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest

import ddpm_tutorial
from ddpm_tutorial import diffusion, losses, sampling, settings, training
from ddpm_tutorial.checkpoint import read_training_info
from ddpm_tutorial.settings import RunSettings, TrainConfig


def test_names_are_those_of_the_tables_they_stand_for():
    """They are written again only because these modules import torch."""
    assert settings.SCHEDULES == tuple(diffusion.SCHEDULES)
    assert set(settings.LOSSES) == set(losses.LOSSES) and set(settings.SAMPLERS) == set(sampling.SAMPLERS)
    assert set(settings.PRECISIONS) == set(training.PRECISIONS)


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (settings.whole(1, 5), [1, 5], [0, 6, 1.0, True, "1", None, math.nan]),
        (settings.number("above 0", lambda x: x > 0), [1, 0.5], [0, math.nan, math.inf, 10**400, "1", True, None]),
        (settings.one_of("a", "b"), ["a"], ["c", "", ["a"], None, 1]),
        (settings.some(settings.whole()), [[1], [1, 2]], [[], [0], "1", 5, None, ["1"]]),
        (settings.or_none(settings.TEXT), ["x", None], ["", " ", 5, []]),
        (settings.FLAG, [True, False], [1, 0, "true", None]),
    ],
)
def test_kinds(kind, good, bad):
    assert all(kind.allows(value) for value in good)
    for value in bad:
        with pytest.raises(ValueError, match="^it must be .*, got "):
            kind.check("it", value)


def test_kinds_read_options():
    assert settings.whole()("7") == 7 and settings.number("above 0", lambda x: x > 0)("7") == 7.0
    for text in ("0", "1e3", "many", "", "9" * 30, "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number in 1 … 1000000000, got "):
            settings.whole()(text)


DAMAGE = [
    (("run", "data"), 5), (("run", "data"), ""), (("run", "image_size"), "x"), (("run", "image_size"), [28]),
    (("run", "schedule"), []), (("run", "channels"), "x"), (("run", "channels"), None), (("run", "channel_mults"), 5),
    (("run", "channel_mults"), "x"), (("run", "channel_mults"), ["a"]), (("run", "channel_mults"), []),
    (("run", "unconditional"), "no"), (("run", "log_every"), 0), (("run", "wheels"), 4), (("run",), 5),
    (("config", "seed"), 1.5), (("config", "batch_size"), 8.0), (("config", "lr"), math.nan), (("config", "speed"), 1),
    (("config", "compile"), 1), (("config", "cooldown"), 1.5), (("config", "optimizer"), "sgd"),
    (("config", "target"), "v"), (("config", "weight_decay"), 0), (("run", "target"), "score"), (("config",), None),
    (("step",), -1), (("step",), "x"), (("image_shape",), [1, 28]), (("image_shape",), [1, 28, -28]),
    (("image_shape",), "x"), (("class_names",), ["a", "a"]), (("class_names",), {}), (("class_names",), ["a", ""]),
    (("num_images",), 0), (("checksum",), 5),
]  # fmt: skip


@pytest.mark.parametrize("place, value", DAMAGE, ids=lambda part: str(part))
def test_what_a_training_json_must_not_hold_is_named(tmp_path, place, value):
    info = {"run": asdict(RunSettings()), "config": asdict(TrainConfig()), "step": 3, "class_names": ["a", "b"]}
    path = tmp_path / "training.json"
    path.write_text(json.dumps(info), encoding="utf-8")
    assert read_training_info(tmp_path) == info
    holder = info
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    path.write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(ValueError, match="training.json is damaged") as caught:
        read_training_info(tmp_path)
    assert "\n" not in str(caught.value) and (place[-1] in str(caught.value) or len(place) == 1)


@pytest.mark.parametrize(
    "contents", [b"", b"{", b"5", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"step": %s}' % (b"9" * 5000)]
)
def test_a_training_json_that_is_none(tmp_path, contents):
    (tmp_path / "training.json").write_bytes(contents)
    with pytest.raises(ValueError, match="training.json is damaged"):
        read_training_info(tmp_path)


def test_text_files_have_their_encoding_said():
    """Without it, it is the machine's: a Windows code page, say."""
    for path in Path(ddpm_tutorial.__file__).parent.glob("**/*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            text = re.search(r"\.(read|write)_text\(|(?<![\w.])open\(|\.open\(", line)
            binary = re.search(r"""["'][rwa]\+?b["']|Image\.open\(|safe_open\(""", line)
            assert not text or binary or "encoding=" in line, f"{path.name}:{number}: {line.strip()}"
