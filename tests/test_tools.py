"""What contributors run on the book: the checks, and those of portability."""

import http.client
import re
import runpy
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tools import check, links

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


LEAVES_A_CHILD = """import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, "1 passed", flush=True)
{}"""


@pytest.mark.parametrize("end, limit, passed, closing", [
    ("", 30, True, r"\d+ 1 passed"), ("child.wait()", 5, False, "stopped: not done after 0 minutes"),
])  # fmt: skip
def test_a_command_is_not_waited_for_without_end(monkeypatch, end, limit, passed, closing):
    """Neither for one that hangs, nor for what one leaves behind; and what was begun by one that hangs is ended."""
    monkeypatch.setattr(check, "LIMIT", limit)
    monkeypatch.setattr(check, "LAST_WORDS", 1)
    said, began = [], time.perf_counter()
    result = check.run([sys.executable, "-c", LEAVES_A_CHILD.format(end)], {}, said.append)
    assert result[0] == passed and re.fullmatch(closing, result[1]) and time.perf_counter() - began < 20
    pid = int(said[0].split()[0])
    while running(pid) and not passed:
        assert time.perf_counter() - began < 20
        time.sleep(0.05)
    if passed:
        psutil.Process(pid).kill()


def running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("answer, dead", [
    (urllib.error.HTTPError("", 404, "", {}, None), "404"), (urllib.error.HTTPError("", 403, "", {}, None), ""),
    (urllib.error.URLError("Name or service not known"), "Name or service"), (TimeoutError(), ""),
    (http.client.BadStatusLine("?"), ""),
])  # fmt: skip
def test_only_what_is_gone_is_a_dead_link(monkeypatch, answer, dead):
    def urlopen(*_, **__):
        raise answer

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    found = links.dead("https://example.org")
    assert dead in found and bool(found) == bool(dead)
