"""Run the chapters again and write their outputs in place: python tools/run_notebooks.py [BEGINNING-OF-NAME...]

A notebook is replaced only when all its cells ran.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

BOOK = Path(__file__).parents[1] / "book"
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a warning of the kernel's debugger

wanted = tuple(sys.argv[1:]) or ("",)
paths = sorted(path for path in BOOK.glob("*.ipynb") if path.name.startswith(wanted))
if not paths:
    sys.exit(f"no chapter in {BOOK} begins with any of {wanted}")
for path in paths:
    began = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(BOOK)}}, record_timing=False)
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}  # no version, so that a run changes outputs only
    aside = path.with_suffix(".writing")
    nbformat.write(notebook, aside)
    aside.replace(path)
    print(f"{path.name}: {time.perf_counter() - began:.0f} s, {path.stat().st_size / 1e6:.1f} MB", flush=True)
