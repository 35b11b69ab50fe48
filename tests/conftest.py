import functools
import os

import pytest
import torch

from ddpm_tutorial import data as data_module
from ddpm_tutorial.data import load_fashion_mnist

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests need no network, and must not wait for one


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def data():
    """Images and labels: not a whole number of batches of 16, and two epochs within 8 steps."""
    images, labels, _ = load_fashion_mnist("test", "sample")
    return images[:70], labels[:70]


@pytest.fixture(scope="session")
def crops(data):
    """The middle of these images, 8×8: sooner trained on, and drawn, where it does not matter what is seen."""
    return data[0][:, :, 8:16, 8:16], data[1]


@pytest.fixture(scope="session", autouse=True)
def _sample_is_read_once():
    """The shipped sample is 6,000 PNG files in two parquet files: they are decoded once, and each test gets a copy."""
    read = data_module._read_sample
    kept = functools.cache(read)
    data_module._read_sample = functools.wraps(read)(lambda split: tuple(array.copy() for array in kept(split)))
    yield
    data_module._read_sample = read
