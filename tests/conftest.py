import os

import pytest
import torch

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
