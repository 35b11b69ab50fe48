"""The built site in a real browser, with no network: formulas, pictures, quizzes, narrow screens.

Needs ``make book`` and Chromium (found on the PATH, or named by the environment variable CHROMIUM).
"""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_build" / "html"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
CHAPTERS = [path.stem for path in sorted((ROOT / "book").glob("*.ipynb"))]
PAGES = [*CHAPTERS, "index", "notation", "references"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]

KNOWN_ERRORS = [
    "THEBE_JS_URL",  # sphinx-thebe, which Jupyter Book always loads, declares its constant twice on a page
    # jupyterquiz reads MathJax.version[0] half a second after the page, which on a slow machine is before MathJax has
    # come. It would have typeset the quiz; ours hold no formulas.
    "Cannot read properties of undefined (reading '0')",
]

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.skipif(not SITE.is_dir(), reason="the site is not built (make book)"),
]


@pytest.fixture(scope="module")
def address():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Opens a page of the site; requests to anywhere else fail at once. Errors of scripts are collected."""
    contexts = []

    def open_page(name, width=1280, color_scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=color_scheme)
        contexts.append(context)
        context.route(lambda url: not url.startswith(address), lambda route: route.abort())
        page = context.new_page()
        page.script_errors = []
        page.on("pageerror", lambda error: page.script_errors.append(str(error)))
        page.goto(f"{address}/book/{name}.html", wait_until="load")
        page.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise")
        page.evaluate("() => window.MathJax?.startup?.promise")
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", PAGES)
def test_page_reads_well(open_page, name):
    page = open_page(name)
    assert page.title() and page.locator("article h1").count() == 1
    local = "(i.src.startsWith('data:') || i.src.startsWith(location.origin))"
    unseen = "(i.complete && i.naturalWidth === 0 && i.loading !== 'lazy')"
    broken = page.evaluate(f"() => Array.from(document.images).filter(i => {local} && {unseen}).length")
    assert broken == 0
    text = page.locator("article").inner_text()
    assert "$$" not in text and "\\tag" not in text and "\\frac" not in text
    assert "Traceback" not in text and "<details>" not in text and "| :" not in text  # a table that stayed text
    assert page.locator("mjx-merror, .MathJax_Error").count() == 0
    assert not [error for error in page.script_errors if not any(known in error for known in KNOWN_ERRORS)]


@pytest.mark.parametrize("name", CHAPTERS)
def test_formulas_are_set_without_a_network(open_page, name):
    page = open_page(name)
    assert page.locator("mjx-container").count() > 20
    heights = "() => Array.from(document.querySelectorAll('article mjx-container')).map(m => m.offsetHeight)"
    assert sum(height > 5 for height in page.evaluate(heights)) > 20


@pytest.mark.parametrize("name", PAGES)
def test_narrow_screen_does_not_scroll_sideways(open_page, name):
    page = open_page(name, width=390)
    assert page.evaluate("() => document.scrollingElement.scrollWidth") <= 392


@pytest.mark.parametrize("name", CHAPTERS)
def test_quiz_marks_answers(open_page, name):
    page = open_page(name)
    quiz = page.locator(".Quiz").first
    quiz.scroll_into_view_if_needed()
    page.locator(".Quiz label.MCButton").first.click()
    page.wait_for_function("() => Array.from(document.querySelectorAll('.Feedback')).some(f => f.innerText.length > 5)")


def test_solutions_unfold(open_page):
    page = open_page(CHAPTERS[0])
    details = page.locator("article details").first
    assert not details.evaluate("d => d.open")
    details.locator("summary").click()
    assert details.evaluate("d => d.open") and len(details.inner_text()) > 40


def test_dark_theme_changes_the_page(open_page):
    colors = []
    for scheme in ("light", "dark"):
        page = open_page(CHAPTERS[0], color_scheme=scheme)
        page.evaluate(f"() => {{ document.documentElement.dataset.theme = '{scheme}' }}")
        colors.append(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
    assert colors[0] != colors[1]


@pytest.mark.parametrize("name", CHAPTERS)
def test_wide_formulas_scroll_from_their_beginning(open_page, name):
    page = open_page(name, width=400)
    page.wait_for_selector("mjx-container[display=true]")
    cut = page.evaluate(
        """() => [...document.querySelectorAll("div.math mjx-container[display=true]")].filter(formula =>
        formula.getBoundingClientRect().left < formula.parentElement.getBoundingClientRect().left - 1).length"""
    )
    assert cut == 0
