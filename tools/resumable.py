"""Tables made row by row (``ladder.py``, ``guidance_sweep.py``): a stopped run goes on with the same command."""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from ddpm_tutorial.arguments import Parser
from ddpm_tutorial.results import RESULTS_FOLDER


def add_options(parser: Parser, table: str) -> None:
    """--data, --seed and --out, the last with results/<table>.json as its default."""
    parser.add_argument("--data", metavar="SOURCE", help="Fashion-MNIST: hub, sample or a folder (default: hub)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of noise and subsets (default: 0)")
    parser.add_argument("--out", type=Path, default=RESULTS_FOLDER / f"{table}.json", metavar="FILE",
                        help="a .json file; rows in it are kept (default: in the package's results)")  # fmt: skip


def run_checked(parser: Parser, args: argparse.Namespace, run: Callable[..., None]) -> int:
    """``run(**args)``; bad input and damaged files are one line and exit status 2, Ctrl-C is 130."""
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    if args.out.suffix != ".json" or not args.out.parent.is_dir():
        parser.error(f"--out must be a FILE.json in a folder that exists, got {args.out}")
    try:
        run(**vars(args))
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from the rows in {args.out}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


def read_started(out: Path, settings: dict, key: Callable[[dict], object]) -> dict:
    """The result that a stopped run has left, or an empty one; ``key`` reads what a row is about. ValueError where the
    file is damaged, or was made with other settings."""
    if not out.exists():
        return {"settings": settings, "rows": []}
    try:
        result = json.loads(out.read_text(encoding="utf-8"))
        before = dict(result["settings"])
        _ = {key(row) for row in result["rows"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out} is damaged or not of this command: {type(error).__name__}: {error}") from error
    changed = [f"{name} {before.get(name)}, not {value}" for name, value in settings.items()
               if before.get(name) != value]  # fmt: skip
    if changed:
        raise ValueError(f"{out} was made with {'; '.join(changed)}: delete it, or choose another --out")
    return result


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
