"""The tables that chapters show: they load, and hold what the commands write today."""

import json

import pytest
import torch

from ddpm_tutorial.data import CLASS_NAMES
from ddpm_tutorial.results import RESULTS_FOLDER, load_results
from ddpm_tutorial.trained import read_samples


def test_every_table_loads():
    names = [path.stem for path in RESULTS_FOLDER.glob("*.json")]
    assert "evaluation-10000" in names
    for name in names:
        assert load_results(name) == json.loads((RESULTS_FOLDER / f"{name}.json").read_text())


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="no results 'evaluations'; there are .*evaluation-10000"):
        load_results("evaluations")


def test_the_samples_are_of_every_class():
    images, labels = read_samples(RESULTS_FOLDER / "samples.npz")
    assert images.shape == (2000, 1, 28, 28)
    assert torch.bincount(labels).tolist() == [200] * len(CLASS_NAMES)
