"""Run the project's checks and say in a few lines how they went: python tools/check.py STAGE...

Stages run to the end even when one fails; the exit status is 0 only if all passed. ``book`` runs every notebook, builds
the site of them from scratch, and takes each warning as an error. ``pages`` builds it from the committed outputs, which
``notebooks`` compares with fresh ones; ``site`` looks at what either has built. Tests and notebooks share the
processor's cores: one process a core, one thread each. ``portable`` is ``notebooks`` on other machines, as far as one
machine can play them: other instruction sets, numbers of threads, and roundings.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
BUILD, SITE = ROOT / "_build", ROOT / "_build" / "html" / "index.html"
BIN, PYTHON = Path(sys.executable).parent, sys.executable
CORES = os.cpu_count() or 1
LIMIT = 30 * 60  # seconds for one command; a slow machine takes a third of this
LAST_WORDS = 10  # seconds for what an ended command has said
# Nothing here needs the hub, and a look at it should fail at once; files are UTF-8, on Windows too; the last silences a
# warning of the debugger.
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
SLOWEST = ("05", "04", "09", "11", "08", "12", "03", "troubleshooting")  # the rest takes less than 30 s each
IN_A_BROWSER = ["tests/test_site.py", "tests/test_live.py"]  # these look at what is built
CACHE = BUILD / ".jupyter_cache"  # where Jupyter Book looks for outputs


def slowest_first(notebooks: list[Path]) -> list[Path]:
    """In the order in which to begin them, so that no core is idle in the end."""
    places = {name: place for place, name in enumerate(SLOWEST)}
    return sorted(notebooks, key=lambda path: places.get(path.stem.split("_")[0], len(places)))


def pytest(distribution: str, *arguments: str, workers: int = min(CORES, 8)) -> list[str]:
    workers = ["-n", str(workers), "--dist", distribution]
    return [PYTHON, "-m", "pytest", "--color=no", *workers, *arguments]


def nbval(workers: int = min(CORES, 8)) -> list[str]:
    options = ["--no-loadscope-reorder", "--nbval", "--nbval-cell-timeout=600"]
    return pytest("loadfile", *options, *map(str, slowest_first(NOTEBOOKS)), workers=workers)


def jupyter_book(execution: str) -> list[str]:
    """The command that builds the site; "cache" takes the outputs out of CACHE, "off" the committed ones."""
    config = BUILD / f"_config-{execution}.yml"
    text = (ROOT / "_config.yml").read_text(encoding="utf-8")
    text = text.replace("execute_notebooks: force", f'execute_notebooks: "{execution}"')
    text = re.sub(r"(?<=: )(book/_ext|tools)(?=[,}])", r"../\1", text)  # a path in it counts from the file's folder
    config.write_text(text, encoding="utf-8")
    options = ["-W", "-n", "--keep-going", "--all", "--quiet", "--config", str(config)]
    return [str(BIN / "jupyter-book"), "build", str(ROOT), *options]


STAGES = {
    "lint": "ruff: code and notebooks",
    "tests": "pytest: the package",
    "book": "the chapters run, the site built of them, warnings are errors",
    "pages": "the site of the committed outputs, warnings are errors",
    "notebooks": "nbval: committed outputs equal fresh ones",
    "site": "the built site, in a browser (Chromium)",
    "portable": "nbval on machines that compute otherwise",
}
# Each instruction set with one thread and with two; MKL_CBWR is of matrix products. The last one is of no real machine:
# it rounds every layer's result up or down by chance, which is more than any two processors differ by.
INSTRUCTION_SETS = {
    "this machine's": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "SSE4.1": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "other rounding": {"IPYTHONDIR": str(ROOT / "tools" / "rounding")},
}


def commands(stage: str) -> list[tuple[str, dict[str, str], list[str]]]:
    """What a stage runs, one after the other: a name ("" for the stage's own), variables, a command."""
    one_thread = {"OMP_NUM_THREADS": "1"}  # a second one would only wait for its turn
    match stage:
        case "lint":
            return [("", {}, [str(BIN / "ruff"), "check", "--quiet", str(ROOT)])]
        case "tests":
            others = [f"--ignore={file}" for file in IN_A_BROWSER]
            return [("", one_thread, pytest("worksteal", "tests", *others))]
        case "notebooks":
            return [("", one_thread, nbval())]
        case "site":
            return [("", one_thread, pytest("worksteal", "-rs", "--timeout=300", *IN_A_BROWSER))]
        case "portable":
            return [
                (f"{name}, {threads} thread{'s' * (threads > 1)}", variables | {"OMP_NUM_THREADS": str(threads)},
                 nbval(max(1, CORES // threads)))
                for name, variables in INSTRUCTION_SETS.items()
                for threads in ((1, 2) if name != "other rounding" else (1,))
            ]  # fmt: skip
        case "book" | "pages":
            shutil.rmtree(BUILD, ignore_errors=True)
            BUILD.mkdir()
            if stage == "pages":
                return [("", one_thread, jupyter_book("off"))]
            run = [PYTHON, str(ROOT / "tools" / "run_notebooks.py"), "--cache", str(CACHE)]
            return [("", {}, run), ("", {}, jupyter_book("cache"))]


def run(command: list[str], variables: dict[str, str], say: Callable[[str], None]) -> tuple[bool, str]:
    """Run one command; returns whether it passed, and the runner's own closing line, if it has one.

    A command that does not end within LIMIT is ended, with all that it began, and has failed.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT | variables, text=True, encoding="utf-8", errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    closing = ""

    def read() -> None:
        nonlocal closing
        for line in process.stdout:
            say(line)
            if re.search(r"\d+ (passed|failed|error)", line):
                closing = line.strip(" =\n")

    # In a thread: whatever a command leaves behind holds its output open, and reading would wait for that.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        status, closing = None, f"stopped: not done after {LIMIT / 60:.0f} minutes"
        for running in (*psutil.Process(process.pid).children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                running.kill()
    reader.join(LAST_WORDS)
    return status == 0, closing


def run_stages(stages: list[str], say: Callable[[str], None]) -> dict[str, tuple[bool, float, str]]:
    """Run stages one after the other; returns, for each, whether it passed, its seconds, and its closing line."""
    results: dict[str, tuple[bool, float, str]] = {}
    for stage in stages:
        say(f"\n=== {stage}: {STAGES[stage]}\n")
        for name, variables, command in commands(stage):
            if name:
                say(f"--- {name}\n")
            began = time.perf_counter()
            passed, closing = run(command, variables, say)
            title = f"{stage}: {name}" if name else stage
            before, seconds, _ = results.get(title, (True, 0.0, ""))
            results[title] = before and passed, seconds + time.perf_counter() - began, closing
            if not passed and stage == "book":
                break  # without all outputs there is nothing to build
    return results


def main() -> int:
    stages = sys.argv[1:]
    if not stages or any(stage not in STAGES for stage in stages):
        print(f"usage: check.py STAGE..., of {', '.join(STAGES)}; got {stages}", file=sys.stderr)
        return 2
    # The site is built and looked at beside the rest, which it does not touch; then what it says is shown in the end.
    beside = [stage for stage in stages if stage in ("pages", "site") and "book" not in stages]
    rest = [stage for stage in stages if stage not in beside]
    show, said = partial(print, end="", flush=True), []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_stages, beside, said.append if rest else show)
        results = run_stages(rest, show) | running.result()
    print("".join(said), end="")
    print("\nsummary")
    for title, (passed, seconds, closing) in results.items():
        print(f"  {'ok    ' if passed else 'FAILED'}  {title:36s} {seconds:5.0f} s  {closing}")
    failed = sum(not passed for passed, _, _ in results.values())
    print(f"stages: {len(results) - failed} passed, {failed} failed")
    if any(results.get(stage, [False])[0] for stage in ("book", "pages")):
        print(f"\nthe book: {SITE.as_uri()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
