"""The site's own Sphinx extension, on a book of two small pages and one notebook."""

import re

import nbformat
import pytest
from sphinx.application import Sphinx

ONE = r"""# 1. The first

$$x = 1 \tag{1.1}$$

## 1.2 A section

As in chapter 2, (2.6a) follows from (1.1), equation 1.1 too; see sections 1.2 and 2.1, chapter 1 and cell 02-001.

- in a list (1.1), *in emphasis (1.1)*
> in a quote (1.1)

| in | table |
|---|---|
| (1.1) | Chapters 2 and 3 |

Not these: (3.75), (1.10),
`(1.1)`, $(1.1)$, [section 2.1](two.ipynb), version 1.1, section 2.10, chapter 20, subsection 2.1.

<details><summary>Solution (1.1)</summary>

Folded (2.6a).

</details>

```
(1.1) chapter 2
```
"""
PAPERS = r"""# 3. Papers

Nor these: [Song](https://arxiv.org/abs/2011.13456), section 2.1, and section 1.2 there. DDPM section 2.1.
Lin et al. (2023), section 2.1. The same, section 2.1 of Nichol. arXiv:2006.11239: section 1.2. But
[a link](https://a.org) ends. Section 1.2 is ours, and so is, after [a link](https://a.org), cell 02-001.
"""


def page(text):
    return re.search('<div class="body".*<div class="sphinxsidebar"', text, re.S)[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Builds it, and gives the links of each page as (text, address)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    cell, text = nbformat.v4.new_code_cell("1 + 1"), nbformat.v4.new_markdown_cell
    cell.id = "02-001"
    title = text("# 2. The second\n\n$$\ny = 2\n\\tag{2.6a}\n$$\n\n## 2.1 A section\n\nBack to (2.6a) and (1.1).")
    notebook = nbformat.v4.new_notebook(cells=[title, cell], metadata={"language_info": {"name": "python"}})
    nbformat.write(notebook, source / "two.ipynb")
    (source / "one.md").write_text(ONE, encoding="utf-8")
    (source / "three.md").write_text(PAPERS, encoding="utf-8")
    (source / "index.md").write_text("# All\n\n```{toctree}\none\ntwo\nthree\n```\n", encoding="utf-8")
    config = {
        "extensions": ["myst_nb", "book_links"], "nb_execution_mode": "off", "html_theme": "basic",
        "myst_enable_extensions": ["dollarmath"],
    }  # fmt: skip
    app = Sphinx(source, None, out, out / "trees", "html", config, status=None, warningiserror=True)
    app.build()
    assert app.statuscode == 0
    return {path.stem: page(path.read_text(encoding="utf-8")) for path in out.glob("*.html")}


def links(html):
    found = re.findall(r'<a class="reference internal" href="([^"]*)">(.*?)</a>', html)
    return [(re.sub("<.*?>", "", text), address) for address, text in found]


def test_what_names_a_place_of_the_book_is_a_link(site):
    here, there = ("(1.1)", "#eq-1-1"), ("(2.6a)", "two.html#eq-2-6a")
    assert links(site["one"]) == [
        ("chapter 2", "two.html"), there, here, ("equation 1.1", "#eq-1-1"),
        ("sections 1.2", "#a-section"), ("2.1", "two.html#a-section"), ("cell 02-001", "two.html#cell-02-001"),
        here, here, here, here, ("Chapters 2", "two.html"), ("3", "three.html"),
        ("section 2.1", "two.html"),  # the author's own
        there,
    ]  # fmt: skip
    assert links(site["two"]) == [("(2.6a)", "#eq-2-6a"), ("(1.1)", "one.html#eq-1-1")]


def test_each_anchor_is_there(site):
    for html in site.values():
        for _, address in links(html):
            name, _, anchor = address.partition("#")
            assert not anchor or f'id="{anchor}"' in (site[name.removesuffix(".html")] if name else html), address


def test_sections_of_papers_are_left_alone(site):
    ours = [("Section 1.2", "one.html#a-section"), ("cell 02-001", "two.html#cell-02-001")]
    assert links(site["three"]) == ours


def test_no_word_is_lost(site):
    text = re.sub("<.*?>", "", site["three"])
    assert "Nor these: Song, section 2.1, and section 1.2 there. DDPM section 2.1." in text
    assert "see sections 1.2 and 2.1, chapter 1 and cell 02-001." in re.sub("<.*?>", "", site["one"])
