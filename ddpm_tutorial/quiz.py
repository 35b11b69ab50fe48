"""The quiz at the end of each chapter, marked in the page itself by ``jupyterquiz``."""

import json
from pathlib import Path

from jupyterquiz import display_quiz

QUIZ_FOLDER = Path(__file__).parent / "quizzes"
COLORS = {"--jq-multiple-choice-bg": "#24527a", "--jq-many-choice-bg": "#24527a", "--jq-numeric-bg": "#24527a"}


def show_quiz(chapter: str) -> None:
    """Show the questions of ``quizzes/<chapter>.json`` (chapter "01" … ), in jupyterquiz's format."""
    path = QUIZ_FOLDER / f"{chapter}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in QUIZ_FOLDER.glob("*.json")))
        raise ValueError(f"no quiz {chapter!r}; the chapters with one are {known}")
    display_quiz(json.loads(path.read_text(encoding="utf-8")), shuffle_answers=False, max_width=720, colors=COLORS)
