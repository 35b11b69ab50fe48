"""experiments/progress.py: a training is looked at where its table says, once, and its images lie beside the table."""

import json

import numpy as np
import pytest
from small_run import first_images

from experiments import progress


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "load_fashion_mnist", first_images(500))
    monkeypatch.setattr(progress, "NUM_IMAGES", 100)
    monkeypatch.setattr(progress, "SAMPLER", progress.SAMPLER | {"num_inference_steps": 2})
    monkeypatch.setattr(progress, "shipped_config", lambda: {"channels": 8, "patch_size": 2, "num_classes": 10})
    return ["--data", "sample", "--out", str(tmp_path / "a.json"), "--num-train-steps"]


def test_a_training_is_looked_at_six_times(tiny, tmp_path, monkeypatch, capsys):
    assert progress.main([*tiny, "30"]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["step"] for row in found["rows"]] == [1, 2, 4, 10, 20, 30]
    losses = [row["loss"] for row in found["rows"]]
    assert losses[0] > losses[-1] > 0 and found["real"]["frechet_distance"]["mean"] < 10
    with np.load(tmp_path / "a.npz") as file:
        assert file["images"].shape == (6, 10, 1, 28, 28) and file["steps"].tolist() == [1, 2, 4, 10, 20, 30]
        assert len({image.tobytes() for image in file["images"][:, 0]}) > 1
    monkeypatch.setattr(progress, "train", lambda *_: pytest.fail("trained twice"))
    assert progress.main([*tiny, "30"]) == 0 and json.loads((tmp_path / "a.json").read_text()) == found
    (tmp_path / "a.json").write_text(json.dumps({name: value for name, value in found.items() if name != "real"}))
    with pytest.raises(pytest.fail.Exception, match="trained twice"):  # it had stopped before its images were written
        progress.main([*tiny, "30"])
    assert progress.main([*tiny, "31"]) == 2
    assert "num_train_steps 30, not 31" in capsys.readouterr().err


def test_a_run_whose_moments_would_fall_together_is_refused(tiny, capsys):
    with pytest.raises(SystemExit) as stopped:
        progress.main([*tiny, "29"])
    assert stopped.value.code == 2 and "30 … " in capsys.readouterr().err
