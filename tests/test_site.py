"""The built site in a real browser: formulas, pictures, quizzes, every width, both themes, screen readers, weights, no
request to another host.

Needs ``make book`` and Chromium (found on the PATH, or named by the environment variable CHROMIUM). Each page is opened
once, and its tests follow each other on it, those that leave it changed last.
FONTCONFIG_FILE=$PWD/tests/dejavu.conf hides all fonts but one family.
"""

import functools
import gzip
import re
import xml.etree.ElementTree
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import CHROMIUM, CI, launched, served

LAPTOP = {"width": 1280, "height": 900}
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

# Code, printed outputs and formulas that scroll sideways; formulas whose beginning no scrolling shows.
SCROLLS = """() => [...document.querySelectorAll("article :is(div.cell_input pre, div.cell_output pre, div.math)")]
    .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 60))"""
BEGINS_OUTSIDE = """() => [...document.querySelectorAll("div.math mjx-container[display=true]")].filter(formula =>
    formula.getBoundingClientRect().left < formula.parentElement.getBoundingClientRect().left - 1)
    .map(e => e.textContent.slice(0, 60))"""

# Whether the pictures that are seen smaller than they are, and no others, are buttons with a name.
SMALL_ONES_OPEN = """() => [...document.querySelectorAll("article .cell_output img[width]:not(.film img, .live img)")]
    .every(picture => (picture.clientWidth < 0.95 * picture.getAttribute("width")) ===
                      picture.matches("[role=button][aria-haspopup=dialog][alt]:not([alt=''])"))"""

# Goes through the page to its end, so that all of it is loaded; returns the pictures that are not.
THROUGH = """async () => {
    document.querySelectorAll("details").forEach(d => d.open = true);
    for (let y = 0; y < document.body.scrollHeight; y += innerHeight) {
        scrollTo({top: y, behavior: "instant"});
        await new Promise(done => { requestAnimationFrame(done); setTimeout(done, 500); });
    }
    const images = [...document.images];
    images.forEach(i => i.loading = "eager");  // one that no scrolling shows would be waited for without end
    await Promise.all(images.map(i => i.complete || new Promise(done => {
        i.onload = i.onerror = done;
        setTimeout(done, 30_000);
    })));
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
    """An open page with its formulas set; it notes the requests that it makes, those before anybody scrolls or presses
    anything too, and the errors of its scripts.

    The parameter is its name, or "name without FILE", and the site then lacks that file. No other host can be reached.
    """
    name, _, missing = request.param.partition(" without ")
    context = browser.new_context(color_scheme="light", reduced_motion="reduce", viewport=LAPTOP)
    # without motion nothing is on its way when it is measured
    context.route(lambda url: not url.startswith(address) or missing and missing in url, lambda route: route.abort())
    page = context.new_page()
    page.requests, page.script_errors = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("websocket", lambda socket: page.requests.append(socket.url))
    page.on("pageerror", lambda error: page.script_errors.append(str(error)))
    assert page.goto(f"{address}{name}.html", wait_until="networkidle").ok
    page.evaluate("() => window.MathJax?.startup?.promise")
    page.first_view = [urlsplit(url).path for url in page.requests if url.startswith(address)]
    yield page
    context.close()


@on_each(PAGES)
def test_page_reads_well(page):
    assert page.title() and page.locator("article h1").count() == 1
    text = page.locator("article").inner_text()
    assert "$$" not in text and "\\tag" not in text and "\\frac" not in text
    assert "Traceback" not in text and "<details>" not in text and "| :" not in text  # a table that stayed text
    assert page.locator("mjx-merror, .MathJax_Error").count() == 0


@on_each([*PAGES, "index"])
def test_first_view_is_light(page):
    """As a server sends it (gzip)."""
    limit = 400_000 if page.url.endswith("index.html") else 700_000
    assert sum(map(compressed_size, page.first_view)) < limit


@functools.cache
def compressed_size(path):
    body = (SITE / path.lstrip("/")).read_bytes()
    return min(len(body), len(gzip.compress(body)))


@on_each(CHAPTERS)
def test_formulas_are_set_without_a_network(page):
    heights = "() => Array.from(document.querySelectorAll('article mjx-container')).map(m => m.offsetHeight)"
    assert sum(height > 5 for height in page.evaluate(heights)) > 20


@on_each(CHAPTERS)
def test_quiz_marks_answers(page):
    marks_an_answer(page)


@on_each(CHAPTERS)
def test_questions_are_named_groups_that_the_keyboard_answers(page):
    questions = page.locator(".Quiz")
    assert questions.count() == page.get_by_role("group", name=re.compile(r"\w.*\w")).and_(questions).count() > 3
    assert page.locator(".Feedback[role=status]").count() == questions.count()
    question = page.locator(".Quiz:has(input[type=radio])").last
    question.locator("input").first.focus()
    page.keyboard.press("ArrowDown")
    question.locator(".Feedback").filter(has_text=re.compile(r"\w{3}")).wait_for()
    chosen = question.locator("label:has(:focus-visible)")
    assert chosen.evaluate("label => getComputedStyle(label).outlineStyle") == "solid"


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
@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1440, 1920])
def test_nothing_is_cut(page, width):
    """The page never scrolls sideways; on a laptop nothing in it does, on a phone formulas do from their beginning."""
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    text = "() => document.createElement('canvas').getContext('2d').measureText('text').width"
    assert page.evaluate(text) > 5, "without fonts nothing is wide"
    assert page.evaluate("() => document.scrollingElement.scrollWidth") <= width
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate(BEGINS_OUTSIDE) == []
    page.wait_for_function(SMALL_ONES_OPEN)
    if width >= 1280 and page.url.split("/book/")[1][0].isdigit():
        assert page.evaluate(SCROLLS) == []


@on_each(CHAPTERS[:1])
def test_small_figure_opens_in_its_own_size(page):
    page.set_viewport_size({"width": 390, "height": 800})
    figure = page.locator("article .cell_output img[role=button]").first
    figure.press("Enter")
    large = page.get_by_role("dialog").get_by_role("img")
    assert large.evaluate("picture => picture.offsetWidth") == int(figure.get_attribute("width")) > 390
    assert page.evaluate("() => document.scrollingElement.scrollWidth") <= 390
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    assert figure.evaluate("picture => picture === document.activeElement")
    figure.click()
    large.click()
    page.get_by_role("dialog").wait_for(state="detached")


@on_each([*CHAPTERS, "index"])
def test_equations_of_live_figures_are_links(page, address):
    figures = page.locator(".live")
    for i in range(figures.count()):
        figures.nth(i).scroll_into_view_if_needed()
        text = figures.nth(i).locator(".live-explain")
        named = re.findall(r"\(\d+\.\d+\w?\)", text.inner_text())
        links = text.locator("a[href*='#eq-']")
        assert named and links.all_inner_texts() == named
        for link in links.evaluate_all("links => links.map(link => link.href)"):
            path, anchor = link.removeprefix(address).split("#")
            assert f'id="{anchor}"' in (SITE / path).read_text(encoding="utf-8"), link


@on_each(CHAPTERS)
def test_code_and_output_of_a_solution_are_in_its_fold(page):
    assert page.locator("article .tag_solution").count() == page.locator("article details .tag_solution").count()


def set_theme(page, theme):
    page.emulate_media(color_scheme=theme)
    page.wait_for_function("theme => document.documentElement.dataset.theme === theme", arg=theme, timeout=60_000)


@on_each([*PAGES, "search", "genindex"])
def test_nothing_fails_and_no_other_host_is_asked(page, address):
    """All of the page: unfolded, scrolled to its end, in both themes."""
    colors = []
    for theme in ("light", "dark"):
        set_theme(page, theme)
        colors.append(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
    assert colors[0] != colors[1]
    assert page.evaluate(THROUGH) == []
    assert [url for url in page.requests if not url.startswith((address, "data:", "blob:"))] == []
    assert page.script_errors == []


@on_each(CHAPTERS[:1])
def test_paper_is_light_and_has_all_of_the_text(page):
    look = """selector => { const style = getComputedStyle(document.querySelector(selector));
                            return [style.opacity, style.color, style.animationName]; }"""
    set_theme(page, "dark")
    page.emulate_media(color_scheme="dark", media="print")
    page.evaluate("() => dispatchEvent(new Event('beforeprint'))")
    text = page.evaluate(look, "article p")
    assert page.evaluate("() => document.documentElement.dataset.theme") == "light"
    assert page.locator("article details:not([open])").count() == 0
    assert page.evaluate(look, "details.hide > :not(summary)") == page.evaluate(look, ".MultipleChoiceQn") == text
    page.emulate_media(media="screen")
    page.evaluate("() => dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("() => document.documentElement.dataset.theme") == "dark"


# axe takes its time for every element. A formula has hundreds, all of the text's own colour: five formulas stay. Code
# has thousands, of a few dozen colours: a block with none but those of the blocks before it becomes plain text.
LESS = """() => {
    [...document.querySelectorAll("mjx-container")].slice(5).forEach(formula => formula.replaceChildren());
    const seen = new Set(), unseen = kind => !seen.has(kind) && seen.add(kind);
    for (const code of document.querySelectorAll(".highlight > pre")) {
        const place = code.parentElement.parentElement.className;
        const kinds = [...code.querySelectorAll("*")].map(part => `${part.className} in ${place}`);
        if (!kinds.filter(unseen).length) code.textContent = code.textContent;
    }
}"""


@on_each(PAGES)
def test_screen_readers_find_nothing_serious(page):
    """In both themes; between these only the colours differ."""
    if not AXE.is_file() and not CI:
        pytest.skip("axe-core is not installed (npm ci)")
    page.set_viewport_size(LAPTOP)
    page.evaluate(LESS)
    page.evaluate(AXE.read_text(encoding="utf-8"))
    for theme, rules in (("light", None), ("dark", ["color-contrast", "link-in-text-block"])):
        set_theme(page, theme)
        options = {"resultTypes": ["violations"]} | ({"runOnly": rules} if rules else {})
        found = page.evaluate("options => axe.run(options).then(r => r.violations)", options)
        serious = [(v["id"], n["html"]) for v in found for n in v["nodes"] if v["impact"] in ("serious", "critical")]
        assert serious == [], theme


@on_each([f"{CHAPTERS[0]} without tex-chtml.js"])
def test_quiz_works_before_mathjax_has_come(page):
    marks_an_answer(page)
    assert page.script_errors == []


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
