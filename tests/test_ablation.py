"""The ablation's command: a run on the sample, going on where it stopped, and bad input."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import ablation

TINY = ["--data", "sample", "--num-train-steps", "2", "--batch-size", "8", "--channels", "8", "--num-images", "100"]


def test_a_run_is_trained_judged_and_not_done_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "DDIM", ablation.DDIM | {"num_inference_steps": 2})
    out = tmp_path / "a.json"
    options = {"data": "sample", "num_train_steps": 2, "batch_size": 8, "channels": 8, "lr": 2e-3, "num_images": 100}
    monkeypatch.setitem(ablation.SAMPLINGS, "DDIM, 50 steps", ablation.DDIM)
    reference = ablation.look(ablation.load_fashion_mnist("train", "sample").images)
    done = ablation.train_and_judge("horizontal flips", options | {"threads": 1}, reference)
    assert done["settings"]["flips"] and set(done["figures"]) == {"DDIM, 50 steps"}
    assert done["figures"]["DDIM, 50 steps"]["frechet_distance"] > 5

    asked = []

    class InThisProcess:  # instead of a pool: what was asked for, and an answer at once
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, name, *_):
            asked.append(name)
            future = ablation.Future()
            future.set_result(done)
            return future

    monkeypatch.setattr(ablation, "ProcessPoolExecutor", InThisProcess)
    assert ablation.main([*TINY, "--out", str(out), "--runs", "target v", "cosine, l1"]) == 0
    assert ablation.main([*TINY, "--out", str(out), "--runs", "target v", "T = 100"]) == 0
    assert asked == ["target v", "cosine, l1", "T = 100"]  # the second call left out what was there
    result = json.loads(out.read_text())
    assert list(result["runs"]) == ["cosine, l1", "target v", "T = 100"]  # in the order of the table
    assert 0 < result["real"]["frechet_distance"]["mean"] < 5
    with pytest.raises(SystemExit) as stopped:
        ablation.main([*TINY, "--lr", "1e-3", "--out", str(out)])
    assert stopped.value.code == 2 and "holds runs of other settings" in capsys.readouterr().err
    assert json.loads(out.read_text()) == result


@pytest.mark.parametrize(
    "wrong,told",
    [
        (["--runs", "cosinus"], "got 'cosinus'"), (["--num-train-steps", "0"], "--num-train-steps must be at least 1"),
        (["--out", "a.txt"], "must be a FILE.json"), (["--data", "no-such-folder"], "no-such-folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(wrong, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        ablation.main([*TINY, "--out", str(tmp_path / "a.json"), *wrong])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and told in error and error.count("\n") == 1
