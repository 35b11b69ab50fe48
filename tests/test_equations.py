"""The ledger of equations, the references and the notation: complete, and nothing in them that is not there."""

import re
from collections import Counter
from pathlib import Path

import nbformat
import pytest

from tools import equations

ROOT = Path(__file__).parents[1]
CHAPTERS, ENTRIES, PLACES = equations.chapters(), equations.mapping(), equations.places()
CELLS = {cell for _, _, cells in CHAPTERS.values() for cell in cells}
TUTORIALS = "## Tutorials worth reading"


def read(name):
    return (ROOT / "book" / name).read_text(encoding="utf-8")


def texts():
    """The Markdown of each notebook and page, by its name."""
    for path in sorted((ROOT / "book").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        yield path.name, "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for path in sorted((ROOT / "book").glob("*.md")):
        yield path.name, path.read_text(encoding="utf-8")


def test_every_numbered_equation_has_an_entry_and_no_entry_is_of_none():
    numbers = [equation.number for _, found, _ in CHAPTERS.values() for equation in found]
    assert len(numbers) > 120
    assert set(numbers) == set(ENTRIES) and len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("number", ENTRIES)
def test_what_an_entry_names_exists(number):
    entry = ENTRIES[number]
    assert set(entry) <= {"code", "red", "why"} and entry["red"] and "code" in entry
    for name in [entry["code"], *entry["red"]]:
        assert name in CELLS or name in PLACES, f"({number}) names {name}"
    for name in entry["red"]:
        assert name in CELLS or name.startswith("test_"), f"({number}): {name} is no test and no cell"


def test_what_no_test_or_output_compares_is_not_named():
    """A cell that is named must assert, or print what nbval compares."""
    named = {name for entry in ENTRIES.values() for name in entry["red"] if name in CELLS}
    for path in (ROOT / "book").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.get("id") in named:
                compared = "nbval-ignore-output" not in cell.metadata.get("tags", [])
                prints = any(output.output_type == "stream" for output in cell.outputs)
                assert "assert " in cell.source or (compared and prints), cell.id


def test_test_names_lead_to_one_file():
    found = Counter(name for path in (ROOT / "tests").glob("test_*.py") for name in set(equations.definitions(path)))
    for name in {name for entry in ENTRIES.values() for name in entry["red"] if name.startswith("test_")}:
        assert found[name] == 1, name


def test_page_is_what_the_generator_gives():
    assert read("equations.md") == equations.page(), "run python tools/equations.py"


def test_numbers_and_sections_that_the_text_names_exist():
    known = set(ENTRIES)
    book = dict(texts())
    sections = set(re.findall(r"^## (\d+\.\d+) ", "\n".join(book.values()), re.M))
    for name, text in book.items():
        text = re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$", "", text, flags=re.S)
        for number in re.findall(r"\((\d+\.\d+[a-z])\)|(?:[Ee]quation|[Ee]q\.) (\d+\.\d+[a-z]?)\b", text):
            assert set(number) - {""} <= known, f"{name}: {number}"
        if name == "glossary.md":
            assert set(re.findall(r"[Ss]ection (\d+\.\d+)", text)) <= sections


def test_every_paper_that_is_cited_is_listed_and_every_listed_one_is_cited():
    cited = set()
    for name, text in texts():
        if name != "references.md":
            cited |= set(re.findall(r"(?:arxiv\.org/(?:abs|pdf)/|arXiv:)(\d{4}\.\d{4,5})", text))
    papers, tutorials = read("references.md").split(TUTORIALS)
    entries = re.findall(r"arXiv:(\d{4}\.\d{4,5})\]\(https://arxiv\.org/abs/(\d{4}\.\d{4,5})\)", papers)
    assert all(said == linked for said, linked in entries)
    listed = [said for said, _ in entries]
    assert len(set(listed)) == len(listed)
    assert cited - set(listed) - set(re.findall(r"abs/(\d{4}\.\d{4,5})", tutorials)) == set(), "cited, not listed"
    assert set(listed) - cited == set(), "listed, not cited"


def test_every_entry_of_the_references_has_a_link():
    slides = 0
    for entry in re.findall(r"^- .*?(?=^- |^#|\Z)", read("references.md"), re.M | re.S):
        slides += "Slides" in entry
        assert "](https://" in entry or "Slides" in entry, entry
    assert slides == 1


def test_a_symbol_has_one_row():
    rows = re.findall(r"^\| (\$[^|]*?) \|", read("notation.md").split("## Other conventions")[0], re.M)
    symbols = [symbol for row in rows for symbol in re.findall(r"\$([^$]+)\$", row)]
    assert len(symbols) > 100
    names = {re.sub(r"[ ,;=].*", "", symbol) for symbol in symbols}
    assert {r"\bar\alpha_t", r"\gamma_t", r"\lambda_t", "s", "d", r"\rho", r"\ell"} <= names
