"""Results that take longer than a notebook may: the tables that commands wrote for this book."""

import json
from pathlib import Path

RESULTS_FOLDER = Path(__file__).parent / "results"


def load_results(name: str) -> dict:
    """The table ``results/<name>.json``: what ``python -m experiments`` in the repository wrote."""
    path = RESULTS_FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RESULTS_FOLDER.glob("*.json")))
        raise ValueError(f"no results {name!r}; there are {known}")
    return json.loads(path.read_text(encoding="utf-8"))
