"""Run the project's checks and say in a few lines how they went: python tools/check.py STAGE...

Stages run to the end even when one fails; the exit status is 0 only if all passed. ``book`` builds the site from
scratch, runs every notebook in it, and takes each warning as an error. ``pages`` builds it from the committed outputs,
which ``notebooks`` compares with fresh ones; ``site`` looks at what either has built. Tests and notebooks share the
processor's cores: one process a core, one thread each.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_build" / "html" / "index.html"
BIN = Path(sys.executable).parent
# Nothing here needs the hub, and a look at it should fail at once; the other silences a warning of the debugger.
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
NOTEBOOKS = sorted(map(str, (ROOT / "book").glob("*.ipynb")))
PYTEST = [sys.executable, "-m", "pytest", "-q", "--color=no", "-n", str(min(os.cpu_count() or 1, 8)), "--dist"]
BUILD = [str(BIN / "jupyter-book"), "build", ".", "-W", "-n", "--keep-going", "--all", "--quiet"]
NO_RUN = ROOT / "_build" / "_config.yml"  # _config.yml, but for the execution of the notebooks
STAGES = {
    "lint": ("ruff: code and notebooks", [str(BIN / "ruff"), "check", "--quiet", "."]),
    "tests": ("pytest: the package", [*PYTEST, "worksteal", "tests", "--ignore=tests/test_site.py"]),
    "book": ("jupyter-book: run the chapters, build the site, warnings are errors", BUILD),
    "pages": (
        "jupyter-book: build the site of the committed outputs, warnings are errors",
        [*BUILD, "--config", str(NO_RUN)],
    ),
    "notebooks": (
        "nbval: committed outputs equal fresh ones",
        [*PYTEST, "loadfile", "--nbval", "--nbval-cell-timeout=300", *NOTEBOOKS],
    ),
    "site": ("the built site, in a browser (Chromium)", [*PYTEST, "worksteal", "-rs", "tests/test_site.py"]),
}


def run(stage: str) -> tuple[bool, float, str]:
    """Run one stage; returns whether it passed, its seconds, and the runner's own closing line, if it has one."""
    title, command = STAGES[stage]
    print(f"\n=== {stage}: {title}", flush=True)
    if stage in ("book", "pages"):
        shutil.rmtree(ROOT / "_build", ignore_errors=True)
        config = (ROOT / "_config.yml").read_text()
        NO_RUN.parent.mkdir()
        NO_RUN.write_text(config.replace("execute_notebooks: force", 'execute_notebooks: "off"'))
    environment = ENVIRONMENT | ({"OMP_NUM_THREADS": "1"} if "pytest" in command else {})
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    closing = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        if re.search(r"\d+ (passed|failed|error)", line):
            closing = line.strip(" =\n")
    return process.wait() == 0, time.perf_counter() - began, closing


def main() -> int:
    stages = sys.argv[1:]
    if not stages or any(stage not in STAGES for stage in stages):
        print(f"usage: check.py STAGE..., of {', '.join(STAGES)}; got {stages}", file=sys.stderr)
        return 2
    results = {stage: run(stage) for stage in stages}
    print("\nsummary")
    for stage, (passed, seconds, closing) in results.items():
        print(f"  {'ok    ' if passed else 'FAILED'}  {stage:10s} {seconds:5.0f} s  {closing}")
    failed = sum(not passed for passed, _, _ in results.values())
    print(f"stages: {len(results) - failed} passed, {failed} failed")
    if any(results.get(stage, [False])[0] for stage in ("book", "pages")):
        print(f"\nthe book: {SITE.as_uri()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
