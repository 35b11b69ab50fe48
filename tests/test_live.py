"""The live figures in a real browser: the samplers against PyTorch, step by step, and each figure used as a reader does.

Needs Chromium (as tests/test_site.py), and what ``make test`` installs: onnx, and npm for onnxruntime-web. The figures
stand on a page of this test's own; tests/test_site.py looks at the pages of the book.
"""

import functools
import http.server
import math
import os
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from ddpm_tutorial.diffusion import SCHEDULES, GaussianDiffusion
from ddpm_tutorial.editing import keep_known, resample
from ddpm_tutorial.guidance import classifier_free
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import ddim_timesteps, sample_ddim, sample_ddpm, sample_dpmpp_2m, sample_heun

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "book" / "_static" / "live"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
CI = os.environ.get("CI") == "true"  # there everything is installed, and a skip would hide a fault
NAMES = sorted(path.stem for path in SCRIPTS.glob("*.js") if f'"{path.stem}"' in (SCRIPTS / "live.js").read_text())
PAGE = """<!doctype html><html lang="en" data-theme="light"><title>live</title><meta name="viewport"
content="width=device-width"><link rel="icon" href="data:,"><link rel="stylesheet" href="/live/live.css">
<script type="module" src="/live/live.js"></script><main><h1>live</h1>{}</main></html>"""
ROUNDING = 5e-4  # of one evaluation between two processors, and of the steps that follow; pixels run from −1 to 1
GREY_LEVEL = 2 / 255

pytestmark = pytest.mark.skipif(not CHROMIUM and not CI, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def predictor():
    """The network as it goes to the browser."""
    live = pytest.importorskip("tools.live") if not CI else __import__("tools.live").live
    return live.rounded(NoisePredictor.from_pretrained().eval())


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server of the scripts, of what ``make book`` adds to them, and of one page with every figure."""
    live = pytest.importorskip("tools.live") if not CI else __import__("tools.live").live
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(SCRIPTS, folder / "live")
    said = live.build(folder / "live" / "built")
    if "left out" in said and not CI:
        pytest.skip(said)
    boxes = "".join(f'<div class="live" data-live="{name}">without scripts: {name}</div>' for name in NAMES)
    (folder / "index.html").write_text(PAGE.format(boxes), encoding="utf-8")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser, address):
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.requests, page.errors = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(address)
    yield page
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith((address, "data:", "blob:"))] == []
    context.close()


# ------------------------------------------------------------------------------------------ the samplers, against PyTorch
# Runs a sampler of samplers.js from the noise given: `call` is its line, in which all that PyTorch got has the same name.
# randn hands out the noise that PyTorch drew, in its order.
IN_BROWSER = """async ({ call, drawn, given }) => {
    const js = await import("/live/samplers.js"), { network } = await import("/live/network.js");
    const net = await network();
    const randn = () => Float32Array.from(drawn.shift());
    const arrays = Object.fromEntries(Object.entries(given).map(([name, x]) => [name, Float32Array.from(x)]));
    const model = (labels) => (x_t, t) => net.model(x_t, t, labels);
    const names = { ...js, ...net, ...arrays, model, randn };
    const steps = new Function(...Object.keys(names), "return " + call)(...Object.values(names));
    const all = [];
    for await (const { t, x_t, pred_x0 } of steps) all.push({ t, x_t: [...x_t], pred_x0: [...pred_x0] });
    return all;
}"""


@pytest.fixture
def draws(monkeypatch):
    """What the samplers draw in this test, in order."""
    import ddpm_tutorial.editing
    import ddpm_tutorial.sampling

    drawn, source = [], torch.Generator().manual_seed(3)

    def randn_like(x, generator=None):
        drawn.append(torch.randn(x.shape, generator=source))
        return drawn[-1]

    monkeypatch.setattr(ddpm_tutorial.sampling, "randn_like", randn_like)
    monkeypatch.setattr(ddpm_tutorial.editing, "randn_like", randn_like)
    return drawn


def flat(x):
    return x.flatten().tolist()


def same_steps(page, wanted, call, drawn, **given):
    """Every step in the browser is PyTorch's: t, x_t and pred_x0."""
    wanted = list(wanted)
    arguments = {"call": call, "drawn": [flat(x) for x in drawn], "given": {k: flat(x) for k, x in given.items()}}
    got = page.evaluate(IN_BROWSER, arguments)
    assert [step["t"] for step in got] == [step.t for step in wanted]
    for ours, theirs in zip(got, wanted, strict=True):
        for name in ("x_t", "pred_x0"):
            exact = getattr(theirs, name).flatten()
            torch.testing.assert_close(torch.tensor(ours[name]), exact, rtol=0, atol=ROUNDING)


@pytest.fixture(scope="module")
def x_T():
    return torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


SAMPLERS = {
    "ddim": (partial(sample_ddim, num_inference_steps=12), "sample_ddim", "{ num_inference_steps: 12 }"),
    "ddim, eta": (partial(sample_ddim, num_inference_steps=7, eta=0.6), "sample_ddim",
                  "{ num_inference_steps: 7, eta: 0.6, randn }"),
    "ddpm, from 20": (partial(sample_ddpm, start=20), "sample_ddpm", "{ start: 20, randn }"),
    "heun": (partial(sample_heun, num_inference_steps=6), "sample_heun", "{ num_inference_steps: 6 }"),
    "dpmpp-2m": (partial(sample_dpmpp_2m, num_inference_steps=10), "sample_dpmpp_2m", "{ num_inference_steps: 10 }"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_is_pytorchs(page, predictor, x_T, draws, name):
    sampler, function, options = SAMPLERS[name]
    labels = torch.tensor([3, 9])
    wanted = list(sampler(classifier_free(predictor, labels), predictor.diffusion, x_T.shape, x_T=x_T))
    same_steps(page, wanted, f"{function}(model([3, 9]), diffusion, x_T, {options})", draws, x_T=x_T)


@pytest.mark.parametrize("scale", [0, 2.5])
def test_guidance_is_pytorchs(page, predictor, x_T, draws, scale):
    guided = classifier_free(predictor, torch.tensor([3, 9]), scale)
    wanted = sample_dpmpp_2m(guided, predictor.diffusion, x_T.shape, x_T=x_T, num_inference_steps=5)
    call = (
        f"sample_dpmpp_2m(classifier_free(net_model, [3, 9], null_label, {scale}), diffusion, x_T, "
        "{ num_inference_steps: 5 })"
    ).replace("net_model", "((x_t, t, labels) => model(labels)(x_t, t))")
    same_steps(page, wanted, call, draws, x_T=x_T)
