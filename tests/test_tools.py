"""What contributors run on the book: the checks, and those of portability."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tools import check

ROUNDING = Path(__file__).parents[1] / "tools" / "rounding" / "profile_default" / "startup" / "rounding.py"


def test_other_rounding_is_small_and_repeats_and_keeps_gradients(monkeypatch):
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 5))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    before = layers(x)
    for name in ("conv2d", "linear", "scaled_dot_product_attention", "group_norm"):
        monkeypatch.setattr(F, name, getattr(F, name))  # so that each is put back after the test
    monkeypatch.setattr(torch, "cdist", torch.cdist)
    monkeypatch.setattr(torch.Tensor, "__matmul__", torch.Tensor.__matmul__)
    runpy.run_path(str(ROUNDING))
    after = layers(x)
    assert not torch.equal(before, after) and torch.equal(after, layers(x))
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)
    assert not torch.equal(x.flatten(1) @ x.flatten(1).T, torch.mm(x.flatten(1), x.flatten(1).T))
    after.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layers.parameters())


@pytest.mark.parametrize("stages, lanes", [
    (["book", "site"], [[], ["book", "site"]]), (["tests", "pages", "site"], [["pages", "site"], ["tests"]]),
])  # fmt: skip
def test_the_site_is_looked_at_when_it_is_built(monkeypatch, stages, lanes):
    ran = []
    monkeypatch.setattr(check, "run_stages", lambda stages, say: ran.append(stages) or {})
    monkeypatch.setattr("sys.argv", ["check.py", *stages])
    assert check.main() == 0 and sorted(ran) == sorted(lanes)
