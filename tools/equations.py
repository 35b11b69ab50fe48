"""Write book/equations.md, the ledger of all numbered equations, from the notebooks and book/equations.yml:

    python tools/equations.py

Each equation with the code that computes it, and the tests and checking cells that go red if it is wrong.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
import yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "book" / "equations.md"
HEAD = """\
# Every equation, and what would notice

Each numbered equation of the book stands here with the code that computes it, and with the tests and the checking cells
that go red if it is wrong. This page is made from the notebooks and a list, `book/equations.yml`; a test compares it
with both, so no equation can be missing, and no function, test or cell named here can have gone.

A number leads to the equation in its chapter. The number of a cell is its id in the notebook.
"""


class Equation(NamedTuple):
    number: str
    formula: str  # its TeX, without the tag
    section: str  # the number of the section that it stands in


def chapters() -> dict[str, tuple[str, list[Equation], set[str]]]:
    """Of each notebook that numbers equations, by its name: title, equations in their order, ids of its code cells."""
    found = {}
    for path in sorted((ROOT / "book").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        title = re.match("# (.*)", cells[0].source)[1]
        equations, section = [], ""
        for cell in cells:
            if cell.cell_type != "markdown":
                continue
            text = re.sub("```.*?```", "", cell.source, flags=re.S)
            for heading, formula in re.findall(r"^## (\d+\.\d+) |\$\$(.*?)\$\$", text, re.M | re.S):
                section = heading or section
                if tag := re.search(r"\\tag\{([^}]*)\}", formula):
                    formula = formula.replace(tag[0], "").strip()
                    equations.append(Equation(tag[1], re.sub(r"(\n *)+", "\n", formula), section))
        if equations:
            found[path.name] = title, equations, {cell.id for cell in cells if cell.cell_type == "code"}
    return found


def mapping() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "book" / "equations.yml").read_text(encoding="utf-8"))


def definitions(path: Path) -> Iterator[str]:
    """The functions of a module, "Class.method" those of a class."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef):
                yield f"{node.name}.{part.name}" if part is not node else part.name


def places() -> dict[str, Path]:
    """Where each function of the package, "elbo.normal_kl", and each test is."""
    package = {f"{path.stem}.{name}": path for path in ROOT.glob("ddpm_tutorial/*.py") for name in definitions(path)}
    return package | {name: path for path in ROOT.glob("tests/test_*.py") for name in definitions(path)}


def page() -> str:
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]
    base, where, entries = f"{config['url']}/blob/{config['branch']}", places(), mapping()

    def told(name: str) -> str:
        if re.match(r"\d\d-", name):
            return f"cell {name}"
        path = where[name].relative_to(ROOT).as_posix()
        return f"[`{name}`]({base}/{path})"

    parts = [HEAD]
    for name, (title, equations, _) in chapters().items():
        parts.append(f"## Chapter {title}\n\n[Open the chapter]({name})\n")
        for number, formula, section in equations:
            entry = entries[number]
            red = ", ".join(map(told, entry["red"]))
            why = f"\n- Note: {entry['why']}" if "why" in entry else ""
            parts.append(
                f"**({number})**, in section {section}\n\n$$\n{formula}\n$$\n\n"
                f"- Computed by {told(entry['code'])}\n- Goes red: {red}{why}\n"
            )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {sum(len(equations) for _, equations, _ in chapters().values())} equations", file=sys.stderr)
