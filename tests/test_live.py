"""The live figures in a real browser: the samplers against PyTorch, step by step, and each figure used once.

Needs ``make book`` and Chromium, as tests/test_site.py, which looks at the pages of the book. Here the figures stand on
a page of this test's own: the scripts as they are now, the networks that the book was built with.
"""

import importlib
import math
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, CI, launched, served

from ddpm_tutorial.data import CLASS_NAMES
from ddpm_tutorial.diffusion import SCHEDULES, GaussianDiffusion
from ddpm_tutorial.editing import keep_known, resample
from ddpm_tutorial.guidance import classifier_free
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import ddim_timesteps, sample_ddim, sample_ddpm, sample_dpmpp_2m, sample_heun
from ddpm_tutorial.toy import GaussianMixture
from ddpm_tutorial.words import EMOJI_WEIGHTS, captions_of, load_emoji

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "book" / "_static" / "live"
BUILT = ROOT / "_build" / "html" / "_static" / "live" / "built"
NAMES = re.findall(r'"(\w+)"', re.search(r"NAMES = \[(.*?)\]", (SCRIPTS / "live.js").read_text(encoding="utf-8"))[1])
PAGE = """<!doctype html><html lang="en" data-theme="light"><title>live</title><meta name="viewport"
content="width=device-width"><link rel="icon" href="data:,"><link rel="stylesheet" href="/live/live.css">
<script type="module" src="/live/live.js"></script><main><h1>live</h1>{}</main></html>"""
ROUNDING = 5e-4  # of one evaluation between two processors, and of the steps that follow; pixels run from −1 to 1
GREY_LEVEL = 2 / 255
WISH = "Blue cat, blue face"

pytestmark = [
    pytest.mark.skipif(not CHROMIUM and not CI, reason="Chromium is not installed"),
    pytest.mark.skipif(not (BUILT / "emoji.onnx").is_file() and not CI, reason="not built (make book)"),
]


@pytest.fixture(scope="module")
def live():
    """tools/live.py; skipped where what it imports is not installed."""
    return importlib.import_module("tools.live") if CI else pytest.importorskip("tools.live", exc_type=ImportError)


@pytest.fixture(scope="module")
def predictor(live):
    """The network as it goes to the browser."""
    return live.rounded(NoisePredictor.from_pretrained().eval())


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server of the scripts, of what ``make book`` adds to them, and of one page with every figure."""
    folder = tmp_path_factory.mktemp("live-site")
    shutil.copytree(SCRIPTS, folder / "live")
    shutil.copytree(BUILT, folder / "live" / "built")
    boxes = "".join(f'<div class="live" data-live="{name}">without scripts: {name}</div>' for name in NAMES)
    (folder / "index.html").write_text(PAGE.format(boxes), encoding="utf-8")
    with served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser, address):
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.requests, page.errors = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(address)
    yield page
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith((address, "data:", "blob:"))] == []
    context.close()


# ---------------------------------------------------------------------------------------- the samplers, against PyTorch
# Runs a sampler of samplers.js. `call` is the line that calls it; what PyTorch got has the same name there, and randn
# hands out the noise that PyTorch drew, in its order.
IN_BROWSER = """async ({ call, drawn, given, which }) => {
    const js = await import("/live/samplers.js"), { network } = await import("/live/network.js");
    const { caption_of } = await import("/live/words.js");
    const net = await network(which);
    const randn = () => Float32Array.from(drawn.shift());
    const arrays = Object.fromEntries(Object.entries(given).map(([name, x]) => [name, Float32Array.from(x)]));
    const model = (labels) => (x_t, t) => net.model(x_t, t, labels);
    const names = { ...js, ...net, ...arrays, model, randn, net, caption_of };
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


def same_steps(page, wanted, call, drawn, which="model", within=ROUNDING, **given):
    """Every step in the browser is PyTorch's: t, x_t and pred_x0."""
    wanted = list(wanted)
    given = {name: flat(x) for name, x in given.items()}
    arguments = {"call": call, "drawn": [flat(x) for x in drawn], "given": given, "which": which}
    got = page.evaluate(IN_BROWSER, arguments)
    assert [step["t"] for step in got] == [step.t for step in wanted]
    for ours, theirs in zip(got, wanted, strict=True):
        for name in ("x_t", "pred_x0"):
            exact = getattr(theirs, name).flatten()
            torch.testing.assert_close(torch.tensor(ours[name]), exact, rtol=0, atol=within)


@pytest.fixture(scope="module")
def x_T():
    return torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


SAMPLERS = {
    "ddim": (partial(sample_ddim, num_inference_steps=6), "sample_ddim", "{ num_inference_steps: 6 }"),
    "ddim, eta": (partial(sample_ddim, num_inference_steps=4, eta=0.6), "sample_ddim",
                  "{ num_inference_steps: 4, eta: 0.6, randn }"),
    "ddpm, from 8": (partial(sample_ddpm, start=8), "sample_ddpm", "{ start: 8, randn }"),
    "heun": (partial(sample_heun, num_inference_steps=4), "sample_heun", "{ num_inference_steps: 4 }"),
    "dpmpp-2m": (partial(sample_dpmpp_2m, num_inference_steps=5), "sample_dpmpp_2m", "{ num_inference_steps: 5 }"),
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
        f"sample_dpmpp_2m(classifier_free(net.model, [3, 9], null_label, {scale}), diffusion, x_T, "
        "{ num_inference_steps: 5 })"
    )
    same_steps(page, wanted, call, draws, x_T=x_T)


@pytest.mark.parametrize(("text", "start", "within"), [(WISH, 960, ROUNDING), ("", 960, ROUNDING), (WISH, 1000, 0.02)])
def test_emoji_are_pytorchs(live, page, draws, text, start, within):
    """At T the cosine schedule leaves 1/20,000 of the image: what float32 rounds of the noise is seen in the guess."""
    predictor = live.rounded(NoisePredictor.from_pretrained(EMOJI_WEIGHTS))
    x_T = torch.randn(1, *predictor.image_shape, generator=torch.Generator().manual_seed(0))
    guided = classifier_free(predictor, captions_of([text], predictor.class_names), 3)
    wanted = sample_ddim(guided, predictor.diffusion, x_T.shape, x_T=x_T, num_inference_steps=4, start=start)
    call = f"""(() => {{
        const caption = caption_of("{text}", class_names);
        const guided = classifier_free(net.model, [caption], caption.map(() => null_label), 3);
        return sample_ddim(guided, diffusion, x_T, {{ num_inference_steps: 4, start: {start} }});
    }})()"""
    same_steps(page, wanted, call, draws, "emoji", within, x_T=x_T)


@pytest.mark.parametrize("loops", [1, 2])
def test_painting_is_pytorchs(page, predictor, x_T, draws, loops):
    known = torch.linspace(-1, 1, x_T.numel()).view(x_T.shape)
    mask = torch.zeros(x_T.shape, dtype=torch.bool)
    mask[..., :14] = True
    masked = keep_known(predictor, predictor.diffusion, known, mask)
    sampler = partial(sample_ddim, masked, predictor.diffusion, x_T.shape, num_inference_steps=4, eta=1.0)
    wanted = list(resample(sampler, predictor.diffusion, x_T, num_loops=loops))
    call = f"""(() => {{
        const masked = keep_known(model([null_label, null_label]), diffusion, known, mask);
        const sampler = (x_T, start) =>
            sample_ddim(masked, diffusion, x_T, {{ num_inference_steps: 4, eta: 1, start, randn }});
        return resample(sampler, diffusion, x_T, {{ num_loops: {loops}, randn }});
    }})()"""
    same_steps(page, wanted, call, draws, x_T=x_T, known=known, mask=mask.float())


def test_sampler_begins_part_way_as_pytorchs(page, predictor, x_T, draws):
    """Image to image, and without clipping."""
    diffusion, labels, images = predictor.diffusion, torch.tensor([3, 9]), x_T.clamp(-1, 1)
    x_start = diffusion.q_sample(images, 600, x_T)
    options = {"num_inference_steps": 20, "start": 600, "clip_denoised": False}
    wanted = sample_ddim(classifier_free(predictor, labels), diffusion, x_T.shape, x_T=x_start, **options)
    call = """sample_ddim(model([3, 9]), diffusion, diffusion.q_sample(images, 600, x_T),
                          { num_inference_steps: 20, start: 600, clip_denoised: false })"""
    same_steps(page, wanted, call, draws, x_T=x_T, images=images)


def test_16_bits_draw_the_same(predictor, x_T):
    """What the rounded weights change in a sample is less than a grey level."""
    exact, labels = NoisePredictor.from_pretrained().eval(), torch.tensor([3, 9])
    first, second = (
        list(sample_ddim(classifier_free(model, labels), model.diffusion, x_T.shape, x_T=x_T, num_inference_steps=8))
        for model in (exact, predictor)
    )
    difference = (first[-1].x_t - second[-1].x_t).abs()
    assert 0 < difference.max() < GREY_LEVEL


FORMULAS = """async ({ points, count }) => {
    const js = await import("/live/samplers.js"), { GaussianMixture } = await import("/live/mixture.js");
    const mixture = new GaussianMixture([[-1.5, -1], [1.5, -1], [0, 1.6]], 0.2);
    const linear = new js.Diffusion(js.SCHEDULES.linear(1000));
    const draws = js.generator(1)(count);
    return {
        betas: Object.fromEntries(Object.entries(js.SCHEDULES).map(([name, of]) => [name, of(1000)])),
        score: [1, 300, 1000].map((t) => [...mixture.score(linear, Float32Array.from(points), t)]),
        noise: [...mixture.noise_model(linear)(Float32Array.from(points), 300)],
        timesteps: [1, 7, 16, 100].map((count) => js.ddim_timesteps(1000, count)),
        slerp: [...js.slerp(Float32Array.of(1, 0), Float32Array.of(0, 2), 0.5)],
        mean: draws.reduce((a, b) => a + b) / count, square: draws.reduce((a, b) => a + b * b, 0) / count,
        again: js.generator(1)(3).every((z, i) => z === draws[i]),
    };
}"""


def test_formulas_are_pytorchs(page):
    """Schedules, the mixture's score, timesteps, slerp; and noise is normal."""
    points = torch.randn(20, 2, generator=torch.Generator().manual_seed(1)) * 2
    count = 40_000
    got = page.evaluate(FORMULAS, {"points": flat(points), "count": count})
    for name, betas in got["betas"].items():
        betas = torch.tensor(betas, dtype=torch.float64)
        torch.testing.assert_close(betas, SCHEDULES[name](1000), rtol=1e-9, atol=1e-12)
    assert list(got["betas"]) == list(SCHEDULES)
    diffusion = GaussianDiffusion.from_schedule("linear", 1000)
    mixture = GaussianMixture(torch.tensor([[-1.5, -1.0], [1.5, -1.0], [0.0, 1.6]]), torch.full((3,), 0.2))
    for t, score in zip((1, 300, 1000), got["score"], strict=True):
        exact = mixture.score(diffusion, points, t).flatten()
        torch.testing.assert_close(torch.tensor(score), exact, rtol=1e-4, atol=1e-4)
    exact = mixture.noise_model(diffusion)(points, 300).flatten()
    torch.testing.assert_close(torch.tensor(got["noise"]), exact, rtol=1e-4, atol=1e-4)
    assert got["timesteps"] == [ddim_timesteps(1000, n) for n in (1, 7, 16, 100)]
    assert got["slerp"] == pytest.approx([0.5**0.5, 2**0.5])
    assert abs(got["mean"]) < 4 / count**0.5 and abs(got["square"] - 1) < 4 * (2 / count) ** 0.5 and got["again"]


# --------------------------------------------------------------------------------------------- each figure, used once
def figure(page, name):
    box = page.locator(f'.live[data-live="{name}"]')
    box.scroll_into_view_if_needed()
    page.wait_for_selector(f'.live[data-live="{name}"][data-mounted]')
    return box


def pixels(box, index):
    """The levels of red in a figure's picture, (H·W,); where it is grey, those of grey."""
    script = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 0)"
    return torch.tensor(box.locator("canvas").nth(index).evaluate(script))


def press(box, name):
    box.get_by_role("button", name=name, exact=True).click()


def press_and_stop(box, name, shown):
    """Press the button, and Stop as soon as the figure says ``shown``: in the page, where nothing passes unseen."""
    script = """(box, [name, shown]) => new Promise((done, failed) => {
        const button = (text) => [...box.querySelectorAll("button")].find((b) => b.textContent === text);
        const watch = new MutationObserver(() => {
            if (!box.textContent.includes(shown) || !button("Stop")) return;
            watch.disconnect();
            button("Stop").click();
            done();
        });
        watch.observe(box, { childList: true, characterData: true, subtree: true });
        button(name).click();
        setTimeout(() => failed(new Error(`${shown} was never shown`)), 30_000);
    })"""
    box.evaluate(script, [name, shown])
    finished(box, "Stopped")


def finished(box, text):
    """Wait for what the figure says when it is done."""
    box.locator("[role=status]").filter(has_text=text).wait_for()


def slide(box, name, *keys):
    slider = box.get_by_role("slider", name=name)
    slider.focus()
    for key in keys:
        slider.press(key)
    return slider.get_attribute("aria-valuetext")


def test_nothing_is_loaded_before_it_is_asked_for(browser, address):
    page = browser.new_page()
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    for name in NAMES:
        figure(page, name)
    page.wait_for_timeout(300)
    assert {url.rsplit("/", 1)[-1] for url in requests if "/built/" in url} == {"images.png"}
    press(figure(page, "draw"), "Draw")
    finished(figure(page, "draw"), "Drawn")
    loaded = [url.rsplit("/", 1)[-1] for url in requests if "/built/" in url]
    runtime = ["ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm", "ort.wasm.min.mjs"]
    assert sorted(loaded) == ["images.png", "model.json", "model.onnx", *runtime]  # each once
    page.close()


def test_draw(page):
    box = figure(page, "draw")
    noise = pixels(box, 0)
    assert box.get_by_role("option").all_inner_texts() == list(CLASS_NAMES)
    box.get_by_role("combobox", name="Garment").select_option("Trouser")
    press(box, "Draw")
    finished(box, "Drawn: Trouser. 25 evaluations")
    drawn = pixels(box, 0)
    border = drawn.view(28, 28)[:, [0, -1]]  # the left and the right one of trousers, from any noise, are black
    assert noise.float().std() > 60 and border.max() < 30
    assert torch.equal(drawn, pixels(box, 1))  # at the end x_t is the guess
    assert slide(box, "Look back", "Home") == "0" and (pixels(box, 0) - drawn).abs().float().mean() > 30


def test_drawing_can_be_stopped_and_begun_again(page):
    box = figure(page, "draw")
    press_and_stop(box, "Draw", "t = 9")
    page.wait_for_timeout(200)
    stopped = pixels(box, 0)
    page.wait_for_timeout(300)
    assert torch.equal(pixels(box, 0), stopped)
    assert slide(box, "Look back", "Home") == "0" and not torch.equal(pixels(box, 0), stopped)
    press(box, "Draw")
    finished(box, "Drawn")


def test_schedule(page):
    box = figure(page, "schedule")
    assert slide(box, "t =", "Home", *["PageUp"] * 3, "ArrowRight") == "301"
    captions = box.locator("figcaption").all_inner_texts()
    for name, caption in zip(SCHEDULES, captions, strict=False):
        abar = GaussianDiffusion.from_schedule(name, 1000).alphas_cumprod[301].item()
        assert name in caption and f"= {abar:.4f}" in caption
        assert float(caption.split("SNR = ")[1]) == pytest.approx(abar / (1 - abar), rel=5e-3)
    before = pixels(box, 0)
    slide(box, "t =", "Home")
    assert "∞" in box.locator("figcaption").first.inner_text() and not torch.equal(pixels(box, 0), before)
    assert all(torch.equal(pixels(box, i), pixels(box, 0)) for i in range(4))  # the real image, in each


def test_score(page):
    box = figure(page, "score")
    canvas = box.locator("canvas")
    area = canvas.bounding_box()
    canvas.click(position={"x": area["width"] * 0.9, "y": area["height"] * 0.9})
    assert slide(box, "x =") == slide(box, "y =").lstrip("-")  # on the diagonal, below the middle
    press_and_stop(box, "Walk", "Walking")
    page.emulate_media(reduced_motion="reduce")
    press(box, "Walk")
    finished(box, "At t = 0")
    page.emulate_media(reduced_motion="no-preference")
    x, y = float(slide(box, "x =")), float(slide(box, "y ="))
    assert math.hypot(x - 1.5, y + 1) < 1  # at the cluster on the lower right


def test_ddim(page):
    box = figure(page, "ddim")
    press(box, "Draw")
    finished(box, "Drawn with 20 steps, η = 0.0. 20 evaluations")
    once = pixels(box, 1)
    press(box, "Draw")
    finished(box, "Drawn with 20 steps")
    page.wait_for_function("() => document.querySelectorAll('.live[data-live=ddim] canvas').length === 4")
    assert torch.equal(pixels(box, 1), once)  # no fresh noise
    slide(box, "Steps", "Home", "ArrowRight", "ArrowRight")
    finished(box, "Drawn with 3 steps, η = 0.0. 3 evaluations")
    slide(box, "η", "End")
    finished(box, "Drawn with 3 steps, η = 1.0")
    assert not torch.equal(pixels(box, 1), once) and torch.equal(pixels(box, 3 + 2), once)


def test_slerp(page):
    box = figure(page, "slerp")
    press(box, "Draw")
    finished(box, "Drawn with ψ = 0.50. 12 evaluations of 3 images")
    ends = pixels(box, 0), pixels(box, 2)
    assert slide(box, "ψ =", "Home") == "0.00"
    finished(box, "Drawn with ψ = 0.00")
    assert torch.equal(pixels(box, 1), ends[0]) and torch.equal(pixels(box, 2), ends[1])


def test_guidance(page):
    box = figure(page, "guidance")
    slide(box, "s =", "Home")
    press(box, "Draw")
    finished(box, "Drawn with s = 0.0. 12 evaluations of 10 images")
    assert all((pixels(box, k) - pixels(box, 0)).abs().max() <= 1 for k in range(10))  # labels are ignored
    slide(box, "s =", *["ArrowRight"] * 4)
    finished(box, "Drawn with s = 2.0. 12 evaluations of 20 images")
    assert (pixels(box, 1) - pixels(box, 8)).abs().float().mean() > 20  # a trouser is no bag


def test_edit(page):
    box = figure(page, "edit")
    press(box, "Nothing")
    real = pixels(box, 0)
    canvas = box.get_by_role("application")
    canvas.focus()
    for key in ("ArrowUp", "ArrowLeft", " "):
        canvas.press(key)
    page.keyboard.press("Tab")
    assert (pixels(box, 0) != real).sum() == 9  # the brush
    area = canvas.bounding_box()
    page.mouse.move(area["x"] + area["width"] / 2, area["y"] + 5)
    page.mouse.down()
    page.mouse.move(area["x"] + area["width"] - 5, area["y"] + 5, steps=8)
    page.mouse.up()
    assert (pixels(box, 0) != real).sum() > 30
    press(box, "Right half")
    slide(box, "Loops", "Home")
    press(box, "Complete")
    finished(box, "Completed: 392 of 784 pixels. 25 evaluations")
    done, known = pixels(box, 1).view(28, 28), real.view(28, 28)
    assert (done - known).abs()[:, :14].max() <= 1 and (done - known).abs()[:, 14:].float().mean() > 5


def test_strength(page):
    box = figure(page, "strength")
    press(box, "Draw")
    finished(box, "Drawn with strength 0.6. 12 evaluations of 2 images")
    far = (pixels(box, 2) - pixels(box, 0)).abs().float().mean()
    slide(box, "Strength", "Home")
    finished(box, "Drawn with strength 0.1. 2 evaluations")
    assert (pixels(box, 2) - pixels(box, 0)).abs().float().mean() < far


def test_words(page):
    box = figure(page, "words")
    text, noise = box.get_by_role("textbox", name="Words"), pixels(box, 0)
    text.fill("a Dogs")
    press(box, "Draw")
    finished(box, "It did not work: “dogs” is not one of the 562 words known, which are listed below; near ones: dog.")
    assert box.get_by_text("dog, dollar").count() == 1  # in the list
    examples = box.get_by_role("combobox", name="Examples")
    *wishes, _ = examples.get_by_role("option").all_inner_texts()
    captions_of(wishes, load_emoji().vocabulary)  # ValueError if it did not know one
    examples.select_option("blue circle")
    finished(box, "Drawn: blue circle, s = 3.0. 25 evaluations of 2 images")
    drawn = pixels(box, 0)
    assert torch.equal(drawn, pixels(box, 1)) and not torch.equal(drawn, noise)
    text.fill("flag")
    text.press("Enter")
    finished(box, "Drawn: flag, s = 3.0")
    assert slide(box, "Look back", "Home") == "0" and torch.equal(pixels(box, 0), noise)  # the same for other words
    slide(box, "s =", "Home")
    finished(box, "Drawn: flag, s = 0.0. 25 evaluations,")
    without = pixels(box, 0)
    examples.select_option("no words")
    finished(box, "Drawn: no words, s = 0.0")
    assert torch.equal(pixels(box, 0), without) and not torch.equal(without, drawn)
    press_and_stop(box, "Another noise", "Drawing")


# --------------------------------------------------------------------------------------------- on every reader's screen
@pytest.mark.parametrize("width", [320, 390, 768])
def test_figures_fit_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    for name in NAMES:
        figure(page, name)
    assert page.evaluate("() => document.scrollingElement.scrollWidth") <= width
    outside = (
        """all => all.filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert page.locator(".live *").evaluate_all(outside) == []


def test_every_control_has_a_name_and_every_picture_its_words(page):
    for name in NAMES:
        box = figure(page, name)
        for role in ("button", "slider", "combobox", "textbox", "img", "progressbar", "application"):
            assert box.get_by_role(role).count() == box.get_by_role(role, name=re.compile(r"\S")).count(), (name, role)
        assert re.search(r"\(\d\.\d+\)", box.inner_text()), "no equation is named"


def test_without_movement_only_the_end_is_shown(page):
    page.emulate_media(reduced_motion="reduce")
    box = figure(page, "draw")
    seen = """() => { window.seen = new Set(); const text = document.querySelector(".live[data-live=draw] figcaption");
        new MutationObserver(() => window.seen.add(text.textContent)).observe(text, { childList: true }); }"""
    page.evaluate(seen)
    press(box, "Draw")
    finished(box, "Drawn")
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate("() => [...window.seen]") == ["xt, t = 0"]


def test_what_is_missing_is_said(browser, address):
    """A build without a network has no model.json; then a second press tries again."""
    page = browser.new_page()
    page.route("**/model.json", lambda route: route.fulfill(status=404))
    page.goto(address)
    box = figure(page, "draw")
    press(box, "Draw")
    finished(box, "It did not work: this copy of the book was built without the network.")
    page.unroute("**/model.json")
    press(box, "Draw")
    finished(box, "Drawn")
    page.close()


def test_without_scripts_the_still_figure_stays(browser, address):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(address)
    assert [box.inner_text() for box in page.locator(".live").all()] == [f"without scripts: {name}" for name in NAMES]
    page.context.close()


def test_the_book_asks_for_figures_that_there_are():
    pages = [*(ROOT / "book").glob("*.md"), *(ROOT / "book").glob("*.ipynb")]
    text = "".join(path.read_text(encoding="utf-8") for path in pages)
    assert set(re.findall(r'data-live=\\?"(.*?)\\?"', text)) == set(NAMES)
