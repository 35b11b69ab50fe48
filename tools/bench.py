"""Measure speed against other libraries' networks, on this machine: python tools/bench.py [--help].

Writes benchmark-cpu.json or benchmark-cuda.json into the package's results (chapter 5 shows them) and prints them.
Every candidate runs once a round, in an order that rotates; figures are medians over the rounds, and each ratio is
the median of the rounds' ratios, with quartiles: what else the machine does hits both sides of a ratio alike. Peers
train by the loop of ``ddpm_tutorial.training``, written out in ``peer_steps``; ours, at its fastest, by ``train``.

With --recipe: how long our whole recipe and the Hugging Face notebook's take to the same held-out noise error.
"""

import argparse
import math
import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from measure import (
    machine,
    memory_of,
    peak_tasks,
    reason,
    run_rounds,
    sampling_task,
    settings,
    spread,
    training_task,
    write_json,
)
from peers import PEERS, Candidate, candidates, operations, parameters
from recipe import recipe_benchmark

from ddpm_tutorial.arguments import Parser
from ddpm_tutorial.results import RESULTS_FOLDER


# --------------------------------------------------------------------------------------------------- the table
def make_table(nets: list[Candidate], costs: list, times: dict, failed: dict, peaks: dict, batch_size: int) -> dict:
    """From seconds a call to rates, ratios and shares of the peak."""
    rate = {key: [batch_size / wall for wall, _ in runs] for key, runs in times.items()}
    cpu = {key: [used for _, used in runs] for key, runs in times.items()}
    peak_rates = {n: spread([work / wall for wall, _ in times["peak", n]]) for n, (work, _) in peaks.items()}
    best_peak = max((p["median"] for p in peak_rates.values()), default=math.nan)

    def best(net: Candidate, mode: str) -> tuple | None:
        keys = [k for k in rate if k[0] == net.name and k[1] == mode]
        return max(keys, key=lambda k: statistics.median(rate[k]), default=None)

    def ratio(mine: tuple | None, other: tuple | None) -> dict | None:
        if mine not in rate or other not in rate:
            return None
        wall = [a / b for a, b in zip(rate[mine], rate[other], strict=True)]
        used = [b / a for a, b in zip(cpu[mine], cpu[other], strict=True)]
        return {**spread(wall), "by_cpu_time": spread(used)["median"], "settings": [mine[2], other[2]]}

    rows = []
    for net, (forward, training, size) in zip(nets, costs, strict=True):
        row = {
            "name": net.name, "family": net.family, "kind": net.kind, "parameters": size,
            "operations_ratio": round(forward / costs[0][0], 4), "parameters_ratio": round(size / costs[0][2], 4),
            "forward_gflop": round(forward / 1e9, 4), "training_gflop": round(training / 1e9, 4),
        }  # fmt: skip
        for mode, work in (("train", training), ("sample", forward)):
            row[mode] = {}
            for key in [k for k in (*rate, *failed) if k[:2] == (net.name, mode)]:
                if key in failed:
                    row[mode][key[2]] = {"failed": failed[key]}
                    continue
                done = spread(rate[key])
                row[mode][key[2]] = {
                    "images_per_second": done,
                    "cpu_seconds_per_image": float(f"{statistics.median(cpu[key]) / batch_size:.4g}"),
                    "gflop_per_second": round(done["median"] * work / 1e9, 2),
                    "share_of_peak": round(done["median"] * work / best_peak, 4),
                }
            eager = ratio((nets[0].name, mode, "eager"), (net.name, mode, "eager"))
            row[mode]["ours_faster"] = {"eager": eager, "best": ratio(best(nets[0], mode), best(net, mode))}
        rows.append(row)
    return {
        "summary": [summarise(row) for row in rows], "candidates": rows, "peaks": peak_rates, "best_peak": best_peak,
        "goals": goals(rows, ratio, best, nets),
    }  # fmt: skip


def summarise(row: dict) -> dict:
    """The row of chapter 5's table: each network in its faster setting, and how many times as fast ours is."""

    def rate(mode: str) -> int | None:
        entries = [e for name, e in row[mode].items() if name != "ours_faster" and "failed" not in e]
        return round(max((e["images_per_second"]["median"] for e in entries), default=0)) or None

    def faster(mode: str) -> float | None:
        ratio = row[mode]["ours_faster"]["best"]
        return ratio and round(ratio["median"], 2)

    return {
        "network": row["name"], "parameters": row["parameters"], "GFLOP": round(row["forward_gflop"], 2),
        "trains": rate("train"), "evaluates": rate("sample"),
        "ours trains": faster("train"), "ours evaluates": faster("sample"),
    }  # fmt: skip


def goals(rows: list[dict], ratio, best, nets: list[Candidate]) -> dict:
    """Our fastest training over the fastest peer of the same operations, and over eager diffusers of the same."""
    same = {row["name"]: row["train"]["ours_faster"]["best"] for row in rows if row["kind"] == "operations"}
    measured = {name: r for name, r in same.items() if r is not None}
    nearest = min(measured, key=lambda name: measured[name]["median"], default=None)
    diffusers = next(net.name for net in nets if (net.family, net.kind) == ("diffusers", "operations"))
    return {
        "fastest_peer_at_equal_operations": nearest,
        "training_ratio_to_it": measured.get(nearest),
        "training_ratio_to_eager_diffusers": ratio(best(nets[0], "train"), (diffusers, "train", "eager")),
    }


def print_table(result: dict) -> None:
    about = result["machine"]
    print(f"\n{about['gpu'] or about['cpu']}, {about['threads']} threads; torch {about['versions']['torch']}; ", end="")
    print(f"{result['options']['rounds']} rounds, batch {result['options']['batch_size']}")
    print(f"\n{'network':25s}{'params':>8s}{'GFLOP':>7s}{'= ours':>8s}  {'training images/s':>19s} {'peak':>5s}"
          f"  {'sampling images/s':>19s}  {'ours is faster: train':>22s} {'sample':>8s} {'MB/step':>8s}")  # fmt: skip
    print(f"{'':48s}  {'eager':>9s} {'fast':>9s} {'':>5s}  {'eager':>9s} {'fast':>9s}")
    for row in result["candidates"]:
        same = {"operations": row["operations_ratio"], "parameters": row["parameters_ratio"]}.get(row["kind"])

        def speed(mode: str, setting: str, row=row) -> str:
            entry = row[mode].get(setting, {})
            return f"{entry['images_per_second']['median']:9.1f}" if "images_per_second" in entry else "   failed"

        def faster(mode: str, row=row) -> str:
            r = row[mode]["ours_faster"]["best"]
            return "-" if r is None else f"{r['median']:.2f}" + (f" ({r['q1']:.2f}–{r['q3']:.2f})" * (mode == "train"))

        share = row["train"].get("fast", {}).get("share_of_peak")
        memory = row.get("step_memory")
        print(f"{row['name']:25s}{row['parameters'] / 1e6:7.2f}M{row['forward_gflop']:7.3f}"
              f"{'' if same is None else f'{same:.2f}×':>8s}  {speed('train', 'eager')} {speed('train', 'fast')} "
              f"{'' if share is None else f'{share:.0%}':>5s}  {speed('sample', 'eager')} {speed('sample', 'fast')}  "
              f"{faster('train'):>22s} {faster('sample'):>8s} "
              f"{f'{memory / 2**20:.0f}' if isinstance(memory, int) else '-':>8s}")  # fmt: skip
    print("\nmeasured peaks, GFLOP/s:")
    for name, p in result["peaks"].items():
        print(f"  {name:50s}{p['median'] / 1e9:10.1f}  ({p['q1'] / 1e9:.1f}–{p['q3'] / 1e9:.1f})")
    failures = {r["name"] + " " + m + " " + s: e["failed"] for r in result["candidates"] for m in ("train", "sample")
                for s, e in r[m].items() if e and "failed" in e}  # fmt: skip
    for name, why in failures.items():
        print(f"failed: {name}: {why}")
    for name, r in result["goals"].items():
        told = f"{r['median']} ({r['q1']}–{r['q3']})" if isinstance(r, dict) else r
        print(f"{name.replace('_', ' ')}: {told}")


def speed_benchmark(args: argparse.Namespace, device: torch.device) -> None:
    nets = candidates(quick=args.quick)
    costs = [(*operations(model), parameters(model)) for model in (net.build() for net in nets)]
    batch_size = 2 if args.quick else 64
    ways = settings(device, args.compile)
    peaks = peak_tasks(device, batch_size, args.quick)
    tasks = {("peak", name): lambda call=call: call for name, (_, call) in peaks.items()}
    for net in nets:
        for name, way in ways.items():
            for mode, task in (("train", training_task), ("sample", sampling_task)):
                tasks[net.name, mode, name] = lambda t=task, n=net, w=way: t(n, w, batch_size, device)
    result = {
        "machine": machine(device),
        "options": {"rounds": 0, "batch_size": batch_size, "quick": args.quick},
        "settings": {name: asdict(way) for name, way in ways.items()},
        "peers": {name: about for name, (_, _, about) in PEERS.items()},
        "memory": "bytes by which one training step in the fast setting raises the peak: "
        + ("of allocated GPU memory" if device.type == "cuda" else "resident set of a process that does only that"),
    }
    memory = memory_of(nets[: 1 if args.quick else None], ways["fast"], batch_size, device)

    def after_round(times: dict, failed: dict) -> None:
        result.update(make_table(nets, costs, times, failed, peaks, batch_size))
        result["options"]["rounds"] = len(next(iter(times.values())))
        for row, value in zip(result["candidates"], memory, strict=False):  # --quick measures one
            row["step_memory"] = value
        write_json(args.out, result)  # after every round: a run that is stopped leaves what it has

    run_rounds(tasks, args.rounds, device, args.quick, after_round)
    print_table(result)


# ------------------------------------------------------------------------------------------------- the command
def parse(argv: list[str] | None) -> tuple[argparse.Namespace, torch.device]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = Parser(prog="bench.py", description="Speed against other libraries' networks, on this machine.")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of every measurement (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: four networks, tiny batches, 2 rounds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a .json file (default: in the package's results)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=device.type == "cuda",
                        help="torch.compile in the fast setting (default: on a GPU only; minutes)")  # fmt: skip
    parser.add_argument("--recipe", action="store_true", help="the whole recipe against the notebook's, instead")
    parser.add_argument("--seconds", type=float, metavar="S", help="--recipe: training time of each (default: 300)")
    args = parser.parse_args(argv)
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.seconds is not None and not (args.recipe and 0 < args.seconds < math.inf):
        parser.error(f"--seconds must be a positive number and belongs to --recipe, got {args.seconds}")
    if args.recipe and args.rounds is not None:
        parser.error("--rounds does not belong to --recipe")
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.seconds = args.seconds or 300.0
    name = f"benchmark-{'recipe-' if args.recipe else ''}{device.type}.json"
    args.out = args.out or RESULTS_FOLDER / name
    if args.out.suffix != ".json" or not args.out.parent.is_dir():
        parser.error(f"--out must be a FILE.json in a folder that exists, got {args.out}")
    return args, device


def main(argv: list[str] | None = None) -> int:
    args, device = parse(argv)
    try:
        (recipe_benchmark if args.recipe else speed_benchmark)(args, device)
    except (ValueError, OSError) as error:
        print(f"bench.py: error: {reason(error)}", file=sys.stderr)
        return 2
    print(f"\nwrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
