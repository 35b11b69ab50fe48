"""A Sphinx extension: what the theme leaves undone on the pages of the site.

In the document: boxes, captions and printed sentences get their classes, and the code cells of a solution go under its
fold. In the HTML: a description and a picture for those who share a link, pictures that load when they come into view,
no picture inside the text of a page, names for screen readers, icons without a script, MathJax only where there is a
formula. Beside the pages: a front page at the root, a map for search engines, and a page for addresses that do not
exist.
"""

import base64
import hashlib
import html
import re
from pathlib import Path

from docutils import nodes
from PIL import Image
from sphinx.application import Sphinx

BOXES = ("trap", "rule", "note")
LARGE = 8_000  # characters of a picture inside the page from which it becomes a file
HEAVY = 40_000  # bytes of a PNG from which it is written as WebP, without loss
PICTURE = "_static/social.png"  # what a shared link shows


def mark(app: Sphinx, doctree: nodes.document) -> None:
    """Classes for boxes ("**Trap.** …") and captions ("**Figure 2.3.** …"); a solution's cells go into its fold."""
    for quote in doctree.findall(nodes.block_quote):
        word = re.match(r"\w+", quote.astext())
        if word and word[0].lower() in BOXES and opening(quote[0]):
            quote["classes"] += ["box", word[0].lower()]
    for paragraph in doctree.findall(nodes.paragraph):
        if number := re.match(r"(Figure|Film|Table) (\d+)\.(\d+)\.", opening(paragraph)):
            paragraph["classes"].append("figure-caption")
            paragraph["ids"].append("-".join(number.groups()).lower())
    for output in doctree.findall(nodes.literal_block):
        if "output" in output["classes"] and not re.search(r"\S {2,}\S", output.astext()):  # no columns: it may wrap
            output["classes"].append("prose")
    for cell in list(doctree.findall(nodes.container)):
        if "tag_solution" in cell["classes"] and (fold := fold_before(cell)):
            parent = cell.parent
            parent.remove(fold)
            parent.insert(parent.index(cell) + 1, fold)


def opening(paragraph: nodes.Node) -> str:
    """The bold words that it begins with, if any."""
    first = next((node for node in paragraph.children if node.astext()), None)
    return first.astext() if isinstance(first, nodes.strong) else ""


def fold_before(cell: nodes.Node) -> nodes.Node | None:
    """The end of the fold that this cell follows, with other text of the solution between them at most."""
    siblings = cell.parent.children[: cell.parent.index(cell)]
    return next(
        (node for node in reversed(siblings) if isinstance(node, nodes.raw) and "</details>" in node.astext()), None
    )


def lighter(page: str, folder: Path, root: Path) -> str:
    """The HTML with pictures as files that load when they come into view; ``folder`` is the page's, below ``root``."""

    def to_file(found: re.Match) -> str:
        data = base64.b64decode(re.sub(r"\\?\s", "", found[2]))
        path = root / "_images" / f"{hashlib.sha256(data).hexdigest()[:16]}.{found[1]}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return up(folder, root) + f"_images/{path.name}"

    def size(found: re.Match) -> str:
        tag, source = found[0], re.search(r'src="([^":]+)"', found[0])
        path = folder / source[1] if source else None
        if (
            path
            and path.suffix in (".png", ".webp")
            and path.is_file()
            and " width=" not in tag
            and "style=" not in tag
        ):
            picture = Image.open(path)
            tag = tag.replace("<img", f'<img width="{picture.width}" height="{picture.height}"', 1)
            if path.stat().st_size > HEAVY:
                picture.save(path.with_suffix(".webp"), lossless=True, method=3)
                tag = tag.replace(source[1], source[1].removesuffix(".png") + ".webp")
        return tag if " loading=" in tag else tag.replace("<img", '<img loading="lazy" decoding="async"', 1)

    page = re.sub(rf"data:image/(png|webp);base64,((?:[\w+/=]|\\?\s){{{LARGE},}})", to_file, page)
    page = re.sub(r"<img\b[^>]*>", size, page)
    page = re.sub(r"\s*<link[^>]*fontawesome[^>]*>|\s*<script[^>]*fontawesome[^>]*></script>", "", page)
    if 'class="math' not in page and 'class="output text_latex' not in page and "jupyterquiz" not in page:
        page = re.sub(
            r"\s*<script>window\.MathJax = .*?</script>|\s*<script[^>]*tex-chtml\.js[^>]*></script>", "", page
        )
    return page


def readable(page: str) -> str:
    """The HTML with names that screen readers can use, and without the theme's slips."""
    page = re.sub(r'(<summary)[^>]*aria-label="Toggle hidden content"', r"\1", page)
    page = re.sub(r"<th class=\"head\"><p></p></th>|<th[^>]*>\s*</th>", "<td></td>", page)
    page = page.replace(' title="Search" aria-label="Search"', ' aria-label="Search Ctrl+K"')
    page = page.replace('<meta name="viewport" content="width=device-width, initial-scale=1"/>', "")
    theme = "matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'"
    page = page.replace('localStorage.getItem("mode") || ""', 'localStorage.getItem("mode") || "auto"')
    page = re.sub(
        r"document\.documentElement\.dataset\.theme = .*?;",
        f'document.documentElement.dataset.theme = document.documentElement.dataset.mode == "auto" ? ({theme}) : '
        "document.documentElement.dataset.mode;",
        page,
    )
    page = page.replace('data-default-mode=""', 'data-default-mode="auto"')
    return re.sub(r'alt="[^"]*_images/[^"]*"', 'alt=""', page)


def described(page: str, address: str, base: str, site: str) -> str:
    """The HTML with a title, a description and a picture for search engines and for those who share its link."""
    heading = re.search(r"<article.*?<h1>(.*?)<a class=\"headerlink\"", page, re.DOTALL)
    title = plain(heading[1]) if heading else site
    article = page[heading.end() :] if heading else ""
    texts = (plain(text) for text in re.findall(r"<p>(.*?)</p>", article, re.DOTALL))
    text = next((text for text in texts if len(text) > 80), "")
    if len(text) > 200:
        text = text[:200].rsplit(" ", 1)[0] + " …"
    full = title if title == site else f"{title} · {site}"
    tags = {
        "name=description": text, "property=og:title": full, "property=og:description": text,
        "property=og:type": "article", "property=og:url": base + address, "property=og:site_name": site,
        "property=og:image": base + PICTURE, "name=twitter:card": "summary_large_image",
        "property=og:image:alt": "Garments drawn out of noise by the model of this book",
    }  # fmt: skip
    head = "".join(
        '<meta {}="{}" content="{}" />\n'.format(*name.split("=", 1), html.escape(value))
        for name, value in tags.items()
        if value
    )
    page = re.sub(
        r"<title>.*?</title>", lambda _: f"<title>{html.escape(full)}</title>\n{head}", page, count=1, flags=re.DOTALL
    )
    return re.sub(r'(<link rel="canonical" href=")[^"]*', lambda found: found[1] + base + address, page)


def plain(text: str) -> str:
    text = re.sub(r"\\\((.*?)\\\)", r"\1", re.sub(r"<[^>]*>", "", text), flags=re.DOTALL)
    return " ".join(html.unescape(text).split())


def up(folder: Path, root: Path) -> str:
    return "../" * len(folder.relative_to(root).parts)


def moved_to_root(page: str, folder: str) -> str:
    """The HTML of a page of ``folder`` with its links as they are from the folder above."""

    def link(found: re.Match) -> str:
        address = found[2]
        if address.startswith(("#", "data:", "javascript:", "mailto:", "/")) or ":" in address.split("/")[0]:
            return found[0]
        return found[1] + (address[3:] if address.startswith("../") else f"{folder}/{address}")

    page = re.sub(r'(\b(?:href|src|action)=")([^"]*)', link, page)
    return page.replace('data-content_root="../"', 'data-content_root="./"')


def draw_social(path: Path) -> Image.Image:
    """Samples of the model in the shape that links are shown in."""
    samples = Image.open(path).convert("L")
    picture = Image.new("L", (1200, 630))
    width = 1120
    samples = samples.resize((width, round(width * samples.height / samples.width)), Image.Resampling.LANCZOS)
    picture.paste(samples, ((1200 - width) // 2, (630 - samples.height) // 2))
    return picture


def finish(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    root, base, site = Path(app.outdir), app.config.html_baseurl, app.config.html_title
    addresses = []
    for path in sorted(root.glob("*.html")) + sorted((root / "book").glob("*.html")):
        if path in (root / "index.html", root / "404.html"):
            continue
        address = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        if 'property="og:title"' not in text:  # of an earlier build
            text = readable(lighter(text, path.parent, root))
            text = described(text, "" if address == "book/index.html" else address, base, site)
            path.write_text(text, encoding="utf-8")
        if path.parent != root:
            addresses.append("" if address == "book/index.html" else address)
    draw_social(Path(app.srcdir) / "book" / "samples.png").save(root / PICTURE)
    front = (root / "book" / "index.html").read_text(encoding="utf-8")
    (root / "index.html").write_text(moved_to_root(front, "book"), encoding="utf-8")
    entries = "".join(f"<url><loc>{base}{address}</loc></url>\n" for address in sorted(addresses))
    (root / "sitemap.xml").write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{entries}</urlset>\n', encoding="utf-8"
    )  # fmt: skip
    (root / "robots.txt").write_text(f"User-agent: *\nAllow: /\nSitemap: {base}sitemap.xml\n", encoding="utf-8")
    (root / "404.html").write_text(NOT_FOUND.format(base=base, site=site), encoding="utf-8")


NOT_FOUND = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" /><meta name="viewport" content="width=device-width, initial-scale=1" />
<meta name="robots" content="noindex" /><title>Only noise here · {site}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1.1rem/1.6 system-ui, sans-serif; max-width: 34rem; margin: 15vh auto; padding: 0 1rem }}
</style>
</head>
<body>
<main>
<h1>Only noise here</h1>
<p>There is no page at this address. It may have moved.</p>
<p><a href="{base}">To the front page of {site}</a></p>
</main>
</body>
</html>
"""


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", mark)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
