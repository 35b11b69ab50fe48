"""What the experiments share: their command line, and a file of results that is made row by row and says how."""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

import ddpm_tutorial
from ddpm_tutorial.command.arguments import Parser
from ddpm_tutorial.files import written_aside
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.results import RESULTS_FOLDER
from ddpm_tutorial.settings import SEED, TEXT, one_of

# Of the settings: the hashes of trained networks, and what a benchmark runs.
MADE_WITH = ("weights", "flow", "classifier", "noisy_classifier", "network", "ddpm_tutorial")
PROCESSES = min(4, os.cpu_count() or 1)


# ------------------------------------------------------------------------------------------ the command line
def results_file(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".json" or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a FILE.json in a folder that exists, got {text}")
    return path


def table_parser(name: str, about: str, table: str | None = None, trains: bool = False) -> Parser:
    """The command's --data and --out and, if it does not train its own networks, --seed and --checkpoint. What is not
    given stays out."""
    parser = Parser(prog=f"python -m experiments.{name}", description=about, argument_default=argparse.SUPPRESS)
    parser.add_argument("--data", type=TEXT, metavar="SOURCE", help="Fashion-MNIST: hub, sample or a folder")
    if not trains:
        parser.add_argument("--seed", type=SEED, metavar="N", help="(default: 0)")
        parser.add_argument("--checkpoint", type=TEXT, metavar="FOLDER", help="(default: the shipped weights)")
    out = RESULTS_FOLDER / f"{table or name}.json"
    parser.add_argument("--out", type=results_file, default=out, metavar="FILE", help="(default: in the results)")
    return parser


def run_command(parser: Parser, argv: list[str] | None, run: Callable[..., None], defaults: dict) -> int:
    """``run(command=…, **options)`` with what is given, else what the file in --out was made with, if that was with the
    same weights, else the ``defaults``. Bad input and damaged files are one line and exit status 2, Ctrl-C is 130."""
    given = vars(parser.parse_args(argv))

    def begin_or_go_on() -> None:
        begun = read_result(given["out"]).get("settings", {})
        if "weights" in begun and begun["weights"] != fingerprint(given.get("checkpoint", NoisePredictor.shipped)):
            begun = {}
        options = defaults | {name: begun[name] for name in defaults if name in begun} | given
        told = (f"--{name.replace('_', '-')} {options[name]}" for name in defaults if options[name] is not None)
        run(command=" ".join([parser.prog, *told, "--data SOURCE"]), **options)

    status = outcome(parser.prog, begin_or_go_on, given["out"])
    if status == 130:
        print(f"stopped; the same command goes on with {given['out']}", file=sys.stderr)
    return status


def cuda_or_cpu() -> torch.device:
    """The device of this process, and of those it starts: a Mac's GPU is left alone, also by ``train``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"
    return device


def parsed_for_device(parser: Parser, argv: list[str] | None) -> dict:
    """The options that are given, with one more: --device, a ``torch.device`` that then holds for the process."""
    found = cuda_or_cpu().type
    parser.add_argument("--device", type=one_of("cuda", "cpu"), default=found, metavar="X", help="cuda or cpu")
    args = vars(parser.parse_args(argv))
    if args["device"] == "cuda" and found == "cpu":
        parser.error("--device: no CUDA GPU is found here")
    if args["device"] == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"
    return args | {"device": torch.device(args["device"])}


def outcome(prog: str, run: Callable[[], None], out: Path) -> int:
    """``run()``, and the exit status of the command ``prog``: 0 with a line on where it wrote, 130 for Ctrl-C, 2 with
    one line for bad input, damaged files and networks that give no numbers."""
    try:
        run()
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


# ---------------------------------------------------------------------------------------- a file of results
def read_result(out: Path) -> dict:
    """What a file holds, {} where there is none. ValueError where it is damaged."""
    if not out.exists():
        return {}
    try:
        result = json.loads(out.read_text(encoding="utf-8"))
        _ = dict(result["settings"]), [dict(row) for row in result.setdefault("rows", [])]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out} is damaged or of another command: {type(error).__name__}: {error}") from error
    return result


def differences(before: dict, now: dict) -> str:
    """In words, the settings of ``now`` that were others ``before``; "" where none was."""
    return "; ".join(f"{name} {before.get(name)}, not {now[name]}" for name in now if before.get(name) != now[name])


def jobs_of(base: dict, runs: dict[str, dict], seeds: Iterable[int]) -> list[dict]:
    """A job for each seed of each run; its ``options`` are ``base`` with what the run changes."""
    return [{"run": name, "options": base | changes, "seed": seed} for seed in seeds for name, changes in runs.items()]


def rows_of(base: dict, runs: dict[str, dict], rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each run that has some, without those that were made when it had other options."""
    found = {
        name: [row for row in rows if (row["run"], row["options"]) == (name, base | changes)]
        for name, changes in runs.items()
    }
    return {name: of_run for name, of_run in found.items() if of_run}


class Table:
    """A file of results, made row by row: a row for each of the ``jobs``, which says what it is about. Rows that are
    there are kept, a new one is written at once.

    ``settings`` are all that the rows depend on. A file that was made with other networks is begun anew; ValueError
    where it was made with other settings, or is damaged.
    """

    def __init__(self, out: Path, command: str, settings: dict, jobs: list[dict]):
        self.out, self.jobs = out, jobs
        self.result = before = read_result(out)
        self.missing = list(jobs)
        if before and any(before["settings"].get(name) != settings.get(name) for name in MADE_WITH):
            print(f"{out} was made with other networks: begun anew", file=sys.stderr)
            self.result = before = {}
        if before:
            self.missing = [job for job in jobs if not any(job.items() <= row.items() for row in before["rows"])]
            names = [name for name in settings if name != "device" or self.missing]
            if changed := differences(before["settings"], {name: settings[name] for name in names}):
                raise ValueError(f"{out} was made with {changed}: delete it, or choose another --out")
        if self.missing or not jobs:
            device = torch.device(settings.get("device", "cpu"))
            self.result = {"rows": [], **before, "settings": settings, "command": command, "machine": machine(device)}

    def __contains__(self, name: str) -> bool:
        return name in self.result

    def __setitem__(self, name: str, value: object) -> None:
        """A part of the file beside its rows."""
        self.result[name] = value
        self.write()

    def add(self, row: dict) -> None:
        def place(row: dict) -> int:
            return next((i for i, job in enumerate(self.jobs) if job.items() <= row.items()), len(self.jobs))

        self["rows"] = sorted([*self.result["rows"], row], key=place)

    def write(self) -> None:
        with written_aside(self.out) as aside:
            aside.write_text(json.dumps(self.result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def fill(
        self,
        make: Callable[[dict], dict],
        cost: Callable[[dict], float] = lambda job: 1,
        processes: int = 1,
        until: float = float("inf"),
    ) -> None:
        """Add what ``make(job)`` finds for each missing job, and print it with an estimate of the time left. Several
        processes make several rows at a time; ``make`` must then be a function of a module. A single one begins no row
        when ``time.monotonic()`` is past ``until``."""
        total, done, began = sum(map(cost, self.missing)), 0.0, time.monotonic()
        for job, figures in _made(make, self.missing, processes, until):
            self.add(job | figures)
            done += cost(job)
            left = (total - done) * (time.monotonic() - began) / done
            told = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in (job | figures).items() if isinstance(value, str | int | float)]  # fmt: skip
            row = f"{self.out.stem}, row {len(self.result['rows'])} of {len(self.jobs)}"
            tqdm.write(f"{row} (about {duration(left)} left): {', '.join(told)}")
            sys.stdout.flush()


def _made(make: Callable, jobs: list[dict], processes: int, until: float) -> Iterator[tuple[dict, dict]]:
    if processes == 1:
        for job in jobs:
            if time.monotonic() > until:
                return
            yield job, make(job)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(make, job): job for job in jobs}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


# ------------------------------------------------------------------------------------- how a table was made
def fingerprint(folder: str | Path) -> str:
    """16 hexadecimal digits of the sha256 of a network's weights."""
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()[:16]


def made_with(checkpoint: str | None, *others: type) -> dict[str, str]:
    """The hashes of a checkpoint (None: the shipped one) and of shipped classifiers, for a table's settings."""
    found = {other.shipped.name: fingerprint(other.shipped) for other in others}
    return {"weights": fingerprint(checkpoint or NoisePredictor.shipped)} | found


def machine(device: torch.device) -> dict:
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        rows = info.read_text(encoding="utf-8").splitlines()
        cpu = next((row.split(":")[1].strip() for row in rows if row.startswith("model name")), cpu)
    libraries = {name: importlib.metadata.version(name) for name in ("torchmetrics", "accelerate", "einops")}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"ddpm_tutorial": ddpm_tutorial.__version__, "torch": torch.__version__} | libraries,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


# --------------------------------------------------------------------------------------------- what needs no judge
def pixel_figures(images: Tensor, real: Tensor) -> dict[str, float]:
    """Of uint8 images (N, C, H, W): the share of black pixels (grey level 0), that of real images, and how a dot grid
    stands out, over how it does in real images: the power of the pattern whose sign changes from pixel to pixel, across
    and down, over the power of the four next lower ones. 1 is right."""

    def dots(images: Tensor) -> float:
        power = torch.fft.fft2(images[:10_000].double()).abs().square().mean((0, 1))  # (H, W)
        i, j = (size // 2 for size in power.shape)
        return (power[i, j] / power[i - 2 : i, j - 2 : j].mean()).item()

    black, real_black = ((part == 0).double().mean().item() for part in (images, real))
    return {"black": black, "real_black": real_black, "pixel_frequency": dots(images) / dots(real)}
