"""Run the chapters again, a processor core each, and write their outputs in place:

    python tools/run_notebooks.py [--cache FOLDER] [BEGINNING-OF-NAME...]

A notebook is replaced only when all its cells ran. With ``--cache`` none is replaced: the outputs go into a cache of
jupyter-cache, from which ``jupyter-book build`` takes them.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import nbformat
from check import slowest_first
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient

BOOK = Path(__file__).parents[1] / "book"
SECONDS = 600  # for one cell; a busy machine takes several times as long as an idle one
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a warning of the kernel's debugger


def run(path: Path) -> tuple[nbformat.NotebookNode, float]:
    """The notebook with fresh outputs, and the seconds that it took."""
    began = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(BOOK)}}
    NotebookClient(notebook, timeout=SECONDS, resources=resources, record_timing=False, coalesce_streams=True).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # no version, so that a run changes outputs only
    return notebook, time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="put the outputs there, leave the notebooks alone")
    parser.add_argument("chapters", nargs="*", default=[""], metavar="BEGINNING-OF-NAME", help="default: all")
    args = parser.parse_args()
    paths = [path for path in BOOK.glob("*.ipynb") if path.name.startswith(tuple(args.chapters))]
    if not paths:
        sys.exit(f"no chapter in {BOOK} begins with any of {args.chapters}")
    paths = slowest_first(sorted(paths))
    cache = args.cache and get_cache(args.cache)
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // len(paths))))
    with ProcessPoolExecutor(min(cores, len(paths))) as pool:
        running = {pool.submit(run, path): path for path in paths}
        failed = 0
        for done in as_completed(running):
            path = running[done]
            if error := done.exception():
                failed += 1
                print(f"{path.name}: {error}", file=sys.stderr, flush=True)
                continue
            notebook, seconds = done.result()
            if cache:
                cache.cache_notebook_bundle(CacheBundleIn(notebook, str(path)), check_validity=False)
            else:
                aside = path.with_suffix(".writing")
                nbformat.write(notebook, aside)
                aside.replace(path)
            print(f"{path.name}: {seconds:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
