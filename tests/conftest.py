import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests need no network, and must not wait for one


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
