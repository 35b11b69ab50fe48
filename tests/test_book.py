"""The rules that all notebooks keep, and those of chapters, read from the committed notebooks without running them."""

import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.name[0].isdigit()]  # the others are reference pages


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


REPOSITORY = re.search(r"url: https://github.com/(\S+)", read("_config.yml")).group(1)
PLACES = ["README.md", "CITATION.cff", "pyproject.toml", "book/index.md"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


of_chapters = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def test_seven_chapters_are_in_the_table_of_contents():
    toc = read("_toc.yml")
    assert len(CHAPTERS) >= 7
    assert all(f"book/{path.stem}\n" in toc for path in NOTEBOOKS)
    for path in CHAPTERS:
        assert path.name in read("book/index.md")
        assert path.name in read("README.md")


def test_notebook_is_valid_and_has_stable_metadata(path, notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert path.stat().st_size < 4_000_000


def test_begins_with_title_and_colab_link(path, notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    link = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/book/{path.name}"
    assert link in first.source
    line = r'\nif importlib.util.find_spec\("ddpm_tutorial"\) is None:.*\n    %pip install -q git\+https://github.com/'
    assert re.search(line + REPOSITORY + r"\n", code_cells(notebook)[0].source), "alone in a folder it would not run"
    assert sum(len(re.findall(r"^# ", text, re.M)) for text in markdown(notebook)) == 1


def test_sections_are_numbered_one_after_the_other(path, notebook):
    """A section whose heading is lost takes its text with it, and nothing else would notice."""
    found = re.findall(r"^## (\d+)\.(\d+) ", "\n".join(markdown(notebook)), re.M)
    assert found == [(str(int(path.name[:2])), str(i)) for i in range(1, len(found) + 1)]


def test_code_cells_are_short(notebook):
    lengths = [len(cell.source.strip().splitlines()) for cell in code_cells(notebook)]
    assert max(lengths) <= 12
    assert sorted(lengths)[len(lengths) // 2] <= 8
    assert max(len(line) for cell in code_cells(notebook) for line in cell.source.splitlines()) <= 88


def test_outputs_are_committed_and_free_of_errors(notebook):
    numbers = [cell.execution_count for cell in code_cells(notebook)]
    assert numbers == list(range(1, len(numbers) + 1)), "run from top to bottom, by make notebooks"
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert not any("widget" in kind for kind in output.get("data", {})), "a widget (a progress bar?) needs a kernel"
        text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        assert "Traceback" not in text and "Warning:" not in text
        assert not re.search(r"/(home|root|tmp|work|Users)/\w", text), "a machine's path in an output"


def test_a_cell_whose_text_is_not_compared_asserts_what_is_said_of_it(notebook):
    """nbval does not look at a tagged cell. Quizzes and films may be: they carry an identifier made by chance."""
    for cell in code_cells(notebook):
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            assert re.search(r"^show_quiz\(|^play\(", cell.source, re.M) or "assert " in cell.source, cell.source


def test_text_is_plain_markdown(notebook):
    for text in markdown(notebook):
        assert not re.search(r"^(:::|```\{)|\{(ref|eq|cite|doc|numref|math)\}`", text, re.M), text[:200]
        fenced = re.sub(r"```.*?```", "", text, flags=re.S)
        assert fenced.count("$$") % 2 == 0
        assert text.count("<details>") == text.count("</details>") == text.count("<summary>")


def test_numbered_equations_break_lines_with_cr(notebook):
    """Sphinx puts a formula with a double backslash inside its own environment, in which MathJax refuses \\tag."""
    for formula in re.findall(r"\$\$.*?\$\$", "\n\n".join(markdown(notebook)), re.S):
        assert not (r"\tag" in formula and r"\\" in formula), formula


@of_chapters
def test_opening_says_what_it_takes_as_the_front_page_does(path, notebook):
    opening = notebook.cells[0].source
    row = re.search(rf"\({path.name}\).*\| ([^|]*); (.*) \|", read("book/index.md"))
    form = r"\n\*\*After this chapter you can\*\*\n.*\n\*\*Time:\*\* (\S+ h)\b.*\n\*\*You need:\*\* "
    said = re.search(form, opening, re.S)
    assert said and said[1] == row[1]
    needs = opening[said.end() :].replace("chapter", "")
    assert all(re.search(rf"\b{number}\b", needs) for number in re.findall(r"\d+", row[2]))


@of_chapters
def test_equation_numbers_are_unique(notebook):
    tags = re.findall(r"\\tag\{([^}]*)\}", "\n".join(markdown(notebook)))
    assert len(tags) >= 2 and len(set(tags)) == len(tags)
    for number in set(re.findall(r"\((\d\.\d+)\)", "\n".join(markdown(notebook)))):
        assert number in tags or not number.startswith(tags[0].split(".")[0] + "."), f"({number}) is not an equation"


@of_chapters
def test_has_exercises_with_solutions_a_quiz_and_further_reading(path, notebook):
    text = "\n".join(markdown(notebook))
    assert len(re.findall("<summary>.*[Ss]olution", text)) >= 2
    assert re.search(r"arxiv.org/abs/|arXiv:\d", text) and re.search(r"^## .*[Rr]ead next", text, re.M)
    chapter = path.stem[:2]
    assert any(f'show_quiz("{chapter}")' in cell.source for cell in code_cells(notebook))
    quiz = json.loads(read(f"ddpm_tutorial/quizzes/{chapter}.json"))
    assert len(quiz) >= 4
    for question in quiz:
        answers = question["answers"]
        assert any(answer.get("correct") for answer in answers), question["question"]
        assert all(answer.get("feedback") for answer in answers), question["question"]


@of_chapters
def test_each_figure_has_a_caption_and_a_text_alternative(path, notebook):
    """Figures and films are numbered in order. A caption follows its cell, or the live figure after it."""
    chapter, count = int(path.stem[:2]), 0
    cells = [cell for cell in notebook.cells if not cell.source.startswith('<div class="live"')]
    for cell, after in zip(cells, [*cells[1:], None], strict=True):
        film = re.search(r"^play\(", cell.source, re.M)
        if film or any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            count += 1
            assert after.source.startswith(f"**Figure {chapter}.{count}.** "), f"{cell.id} has no caption"
            told = re.search(r'^alt = "(.*)"$', cell.source, re.M) if film else None
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(told[1] if told else alt) > 40, cell.id
    assert len(re.findall(r"^\*\*Figure [\d.]+\*\*", "\n".join(markdown(notebook)), re.M)) == count


def test_links_between_pages_exist(notebook):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", "\n".join(markdown(notebook))):
        assert (ROOT / "book" / target).exists(), target


def test_references_to_sections_stand_on_one_line():
    """Of "Section" at the end of a line and its number on the next the site makes no link."""
    for path in (ROOT / "book").glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b([Ss]ection|[Cc]hapter)s?( [\d., –]+(and)?)?\n\s*(and )?\d", text), path.name


def test_repository_has_one_name():
    for place in PLACES:
        text = read(place)
        for found in re.findall(r"(?:github\.com|colab\.research\.google\.com/github)/([\w.-]+/ddpm-tutorial)", text):
            assert found == REPOSITORY, place


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflow_may_do_little(path):
    """Actions are pinned to a commit, and no job that runs code of the repository may write."""
    workflow = yaml.safe_load(read(path))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "timeout-minutes" in job
        assert "permissions" not in job or not any("run" in step or "checkout" in step["uses"] for step in job["steps"])
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d\S+", uses) for uses in re.findall("uses: (.+)", read(path)))


def test_names_in_the_notation_exist():
    """Each name in the third column of notation.md is one of the package's, so the table cannot rot."""
    source = "".join(map(read, (ROOT / "ddpm_tutorial").glob("*.py")))
    rows = re.findall(r"^\|[^|]*\|[^|]*\|([^|]*)\|[^|]*\|$", read("book/notation.md"), re.M)
    names = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert len(names) > 20
    assert not {name for name in names if not re.search(rf"\b{name}\b", source)}
