"""The built site in a real browser: formulas, pictures, quizzes, every width, both themes, screen readers, weights, no
request to another host.

Needs ``make book`` and Chromium (found on the PATH, or named by the environment variable CHROMIUM). Each page is opened
once, and its tests follow each other on it. FONTCONFIG_FILE=$PWD/tests/dejavu.conf hides all fonts but one family.
"""

import functools
import gzip
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest
from browser import CHROMIUM, CI, launched, served

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_build" / "html"
CHAPTERS = [f"book/{path.stem}" for path in sorted((ROOT / "book").glob("[0-9]*.ipynb"))]
PAGES = [f"book/{path.stem}" for kind in ("ipynb", "md") for path in sorted((ROOT / "book").glob(f"*.{kind}"))]
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"

pytestmark = [
    pytest.mark.skipif(not CHROMIUM and not CI, reason="Chromium is not installed"),
    pytest.mark.skipif(not SITE.is_dir() and not CI, reason="the site is not built (make book)"),
]
on_each = functools.partial(pytest.mark.parametrize, "page", indirect=True, scope="module")

# Elements of the text that stick out of the screen and are not in a box that scrolls; those within such an element, and
# MathJax's hidden copies for screen readers, are left out.
CUT_OFF = """() => {
    const wide = e => { const r = e.getBoundingClientRect(); return r.right > innerWidth + 1 || r.left < -1; };
    const scrolls = e => /auto|scroll/.test(getComputedStyle(e).overflowX) && !wide(e);
    const seen = e => e.checkVisibility() && e.offsetWidth > 1 && !e.closest("mjx-assistive-mml");
    const cut = e => { for (let p = e; p.tagName !== "ARTICLE"; p = p.parentElement) if (scrolls(p)) return false;
                       return wide(e) && seen(e); };
    return [...document.querySelectorAll("article *")].filter(e => cut(e) && !cut(e.parentElement))
        .map(e => `${e.tagName}: ${e.textContent.slice(0, 60)}`);
}"""

# Goes through the page to its end, so that all of it is loaded; returns the pictures that are not.
THROUGH = """async () => {
    document.querySelectorAll("details").forEach(d => d.open = true);
    for (let y = 0; y < document.body.scrollHeight; y += innerHeight) {
        scrollTo({top: y, behavior: "instant"});
        await new Promise(requestAnimationFrame);
    }
    const images = [...document.images];
    images.forEach(i => i.loading = "eager");  // one that no scrolling shows would be waited for without end
    await Promise.all(images.map(i => i.complete || new Promise(done => i.onload = i.onerror = done)));
    return images.filter(i => !i.naturalWidth).map(i => i.src);
}"""


@pytest.fixture(scope="module")
def address():
    with served(SITE) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(request, browser, address):
    """An open page with its formulas set; it notes the requests that it makes and the errors of its scripts.

    The parameter is its name, or "name without FILE", and the site then lacks that file. No other host can be reached.
    """
    name, _, missing = request.param.partition(" without ")
    context = browser.new_context(color_scheme="light", reduced_motion="reduce")  # nothing is on its way when measured
    context.route(lambda url: not url.startswith(address) or missing and missing in url, lambda route: route.abort())
    page = context.new_page()
    page.requests, page.script_errors = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("websocket", lambda socket: page.requests.append(socket.url))
    page.on("pageerror", lambda error: page.script_errors.append(str(error)))
    assert page.goto(f"{address}{name}.html", wait_until="load").ok
    page.evaluate("() => window.MathJax?.startup?.promise")
    yield page
    context.close()


@on_each(PAGES)
def test_page_reads_well(page):
    assert page.title() and page.locator("article h1").count() == 1
    text = page.locator("article").inner_text()
    assert "$$" not in text and "\\tag" not in text and "\\frac" not in text
    assert "Traceback" not in text and "<details>" not in text and "| :" not in text  # a table that stayed text
    assert page.locator("mjx-merror, .MathJax_Error").count() == 0


@on_each(CHAPTERS)
def test_formulas_are_set_without_a_network(page):
    heights = "() => Array.from(document.querySelectorAll('article mjx-container')).map(m => m.offsetHeight)"
    assert sum(height > 5 for height in page.evaluate(heights)) > 20


@on_each(CHAPTERS)
def test_quiz_marks_answers(page):
    marks_an_answer(page)


def marks_an_answer(page):
    page.locator(".Quiz label.MCButton").first.click()
    page.wait_for_function("() => Array.from(document.querySelectorAll('.Feedback')).some(f => f.innerText.length > 5)")


@on_each(CHAPTERS)
def test_solutions_unfold(page):
    details = page.locator("article details:not(.hide)").first
    assert not details.evaluate("d => d.open")
    details.locator("summary").click()
    assert details.evaluate("d => d.open") and len(details.inner_text()) > 40


@on_each(PAGES)
@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1920])
def test_page_never_scrolls_sideways(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    text = "() => document.createElement('canvas').getContext('2d').measureText('text').width"
    assert page.evaluate(text) > 5, "without fonts nothing is wide"
    assert page.evaluate("() => document.scrollingElement.scrollWidth") <= width
    assert page.evaluate(CUT_OFF) == []


# A line of code of the package has at most 120 characters; a few outputs and formulas are wider than any page.
CUT = """() => ["div.cell_input pre", ".text_html pre", "div.math"].map(part =>
    [...document.querySelectorAll(`article ${part}`)].filter(e => e.scrollWidth > e.clientWidth + 1)
        .map(e => e.textContent.slice(0, 60)))"""


@on_each(CHAPTERS)
@pytest.mark.parametrize("width", [1280, 1440, 1920])
def test_no_code_and_no_formula_is_cut_on_a_laptop(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(CUT) == [[], [], []]


@on_each(PAGES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_screen_readers_find_nothing_serious(page, theme):
    if not AXE.is_file() and not CI:
        pytest.skip("axe-core is not installed (npm ci)")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme=theme)
    page.wait_for_function("theme => document.documentElement.dataset.theme === theme", arg=theme)
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("() => axe.run({resultTypes: ['violations']}).then(r => r.violations)")
    assert [(v["id"], n["html"]) for v in found for n in v["nodes"] if v["impact"] in ("serious", "critical")] == []


@on_each(CHAPTERS)
def test_code_and_output_of_a_solution_are_in_its_fold(page):
    assert page.locator("article .tag_solution").count() == page.locator("article details .tag_solution").count()


@on_each(CHAPTERS)
def test_wide_formulas_scroll_from_their_beginning(page):
    page.set_viewport_size({"width": 390, "height": 900})
    cut = page.evaluate(
        """() => [...document.querySelectorAll("div.math mjx-container[display=true]")].filter(formula =>
        formula.getBoundingClientRect().left < formula.parentElement.getBoundingClientRect().left - 1).length"""
    )
    assert cut == 0


@on_each([*PAGES, "search", "genindex"])
def test_nothing_fails_and_no_other_host_is_asked(page, address):
    """All of the page: unfolded, scrolled to its end, in both themes."""
    color = None
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.wait_for_function(
            """([theme, before]) => document.documentElement.dataset.theme === theme
            && getComputedStyle(document.body).backgroundColor !== before""", arg=[theme, color], timeout=60_000
        )  # fmt: skip
        color = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert page.evaluate(THROUGH) == []
    assert [url for url in page.requests if not url.startswith((address, "data:", "blob:"))] == []
    assert page.script_errors == []


@on_each([f"{CHAPTERS[0]} without tex-chtml.js"])
def test_quiz_works_before_mathjax_has_come(page):
    marks_an_answer(page)
    assert page.script_errors == []


@pytest.mark.parametrize("name", ["index", *PAGES])
def test_first_view_is_light(name, address, browser):
    """What comes before the reader scrolls or presses anything, in kilobytes as a server sends it (gzip)."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, responses = context.new_page(), []
    page.on("response", lambda response: responses.append(response))
    page.goto(f"{address}{name}.html", wait_until="networkidle")
    bodies = [response.body() for response in responses if response.ok and response.url.startswith(address)]
    context.close()
    sizes = [min(len(body), len(gzip.compress(body))) for body in bodies]
    assert sum(sizes) < (400_000 if name.endswith("index") else 700_000)


def test_search_engines_find_each_page():
    addresses = [e.text for e in xml.etree.ElementTree.parse(SITE / "sitemap.xml").findall(".//{*}loc")]
    assert len(addresses) == len(PAGES) == len(set(addresses))
    assert addresses[0] + "sitemap.xml" in (SITE / "robots.txt").read_text(encoding="utf-8")
    assert addresses[0] in (SITE / "404.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["index", *PAGES])
def test_shared_link_has_title_text_and_picture(name):
    html = (SITE / f"{name}.html").read_text(encoding="utf-8")
    for tag in ("og:title", "og:image", "og:url", "twitter:card"):
        assert html.count(f'="{tag}"') == 1, tag
    heading = re.search(r"<article.*?<h1>(.*?)<a", html, re.DOTALL)[1]
    assert re.search(r'"og:title" content="([^"]*)"', html)[1].startswith(heading.replace("&#39;", "’"))
    assert re.search(r'"og:title" content="([^"]*)"', html)[1].endswith("The annotated DDPM")
    assert len(re.search(r'name="description" content="([^"]*)"', html)[1]) > 60
    assert (SITE / "_static" / "social.png").is_file()


@pytest.mark.parametrize("name", ["index", *PAGES])
def test_links_within_the_site_lead_somewhere(name):
    page = SITE / f"{name}.html"
    html = re.sub(r"<script\b[^>]*>.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in set(re.findall(r'(?:href|src)="([^"#:]*)(#[^"]*)?"', html)):
        address, anchor = link[0].split("?")[0], link[1][1:]
        target = (page.parent / address).resolve() if address else page
        assert target.exists(), link
        if anchor and target.suffix == ".html":
            assert re.search(rf'id="{re.escape(anchor)}"', target.read_text(encoding="utf-8")), link
