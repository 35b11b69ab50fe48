"""Speed against other libraries' networks, on this machine: python -m experiments.benchmark [--help].

Writes benchmark-cpu.json or benchmark-cuda.json into the package's results (chapter 5 shows them) and prints them.
Every candidate runs once a round, in an order that rotates; figures are medians over the rounds, and each ratio is
the median of the rounds' ratios, with quartiles: what else the machine does hits both sides of a ratio alike. Peers
train by the loop of ``ddpm_tutorial.training``, written out in ``peer_steps``; ours, at its fastest, by ``train``.

With --recipe: how long our whole recipe and the Hugging Face notebook's take to the same held-out noise error.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import ddpm_tutorial
from ddpm_tutorial.command.arguments import Parser
from ddpm_tutorial.results import RESULTS_FOLDER
from ddpm_tutorial.settings import TEXT, number, whole

from ..common import Table, cuda_or_cpu, outcome, results_file
from .measure import quartiles, run_rounds, sampling_task, settings, training_task
from .peers import PEERS, Candidate, candidates, operations, parameters, shipped_config
from .recipe import recipe_benchmark

LIBRARIES = ("diffusers", "denoising-diffusion-pytorch")


# --------------------------------------------------------------------------------------------------- the table
def make_table(nets: list[Candidate], costs: list, times: dict, failed: dict, batch_size: int) -> dict:
    """From seconds a call to rates and ratios."""
    rate = {key: [batch_size / wall for wall, _ in runs] for key, runs in times.items()}
    cpu = {key: [used for _, used in runs] for key, runs in times.items()}

    def best(net: Candidate, mode: str) -> tuple | None:
        keys = [k for k in rate if k[:2] == (net.name, mode)]
        return max(keys, key=lambda k: statistics.median(rate[k]), default=None)

    def ratio(mine: tuple | None, other: tuple | None) -> dict | None:
        if mine not in rate or other not in rate:
            return None
        wall = [a / b for a, b in zip(rate[mine], rate[other], strict=True)]
        used = [b / a for a, b in zip(cpu[mine], cpu[other], strict=True)]
        return {**quartiles(wall), "by_cpu_time": quartiles(used)["median"], "settings": [mine[2], other[2]]}

    rows = []
    for net, (forward, size) in zip(nets, costs, strict=True):
        row = {
            "name": net.name, "family": net.family, "kind": net.kind, "parameters": size, "gflop": forward / 1e9,
        }  # fmt: skip
        for mode in ("train", "sample"):
            row[mode] = {key[2]: {"failed": failed[key]} for key in failed if key[:2] == (net.name, mode)}
            for key in [k for k in rate if k[:2] == (net.name, mode)]:
                seconds = float(f"{statistics.median(cpu[key]) / batch_size:.4g}")
                row[mode][key[2]] = {"images_per_second": quartiles(rate[key]), "cpu_seconds_per_image": seconds}
            eager = ratio((nets[0].name, mode, "eager"), (net.name, mode, "eager"))
            row[mode]["ours_faster"] = {"eager": eager, "best": ratio(best(nets[0], mode), best(net, mode))}
        rows.append(row)
    return {"summary": [summarise(row) for row in rows], "candidates": rows}


def summarise(row: dict) -> dict:
    """The row of chapter 5's table: each network in its faster setting, and how many times as fast ours is."""

    def rate(mode: str) -> int | None:
        entries = [e for name, e in row[mode].items() if name != "ours_faster" and "failed" not in e]
        return round(max((e["images_per_second"]["median"] for e in entries), default=0)) or None

    def faster(mode: str) -> float | None:
        ratio = row[mode]["ours_faster"]["best"]
        return ratio and round(ratio["median"], 2)

    return {
        "network": row["name"], "parameters": row["parameters"], "GFLOP": round(row["gflop"], 2),
        "trains": rate("train"), "evaluates": rate("sample"),
        "ours trains": faster("train"), "ours evaluates": faster("sample"),
    }  # fmt: skip


def print_table(result: dict) -> None:
    """The summary: a line a network, images a second and how many times as fast ours is."""
    for row in result["summary"]:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    for row in result["candidates"]:
        for mode in ("train", "sample"):
            for setting, entry in row[mode].items():
                if "failed" in entry:
                    print(f"failed: {row['name']}, {mode}, {setting}: {entry['failed']}")


def speed_benchmark(
    command: str, out: Path, device: torch.device, rounds: int = 5, quick: bool = False, compile: bool | None = None,
    until: float = float("inf"),
) -> None:  # fmt: skip
    """``quick``: a few networks, and on a CPU tiny batches."""
    tiny = quick and device.type == "cpu"
    batch_size = 2 if tiny else 64
    ways = settings(device, device.type == "cuda" if compile is None else compile)
    about = {
        "rounds": rounds, "quick": quick, "batch_size": batch_size, "seed": 0, "network": shipped_config(),
        "device": device.type,
    }  # fmt: skip
    table = Table(out, command, about | {"ddpm_tutorial": ddpm_tutorial.__version__}, [])
    cut_short = "no time was left" in json.dumps(table.result.get("candidates", []))
    if table.result.get("options", {}).get("rounds") == rounds and not cut_short:
        return
    nets = candidates(quick=quick)
    costs = [(operations(model), parameters(model)) for model in (net.build() for net in nets)]
    tasks = {}
    for net in nets:
        for name, way in ways.items():
            for mode, task in (("train", training_task), ("sample", sampling_task)):
                tasks[net.name, mode, name] = lambda t=task, n=net, w=way: t(n, w, batch_size, device)
    table.result["machine"]["versions"] |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    table.result |= {
        "options": {"rounds": 0, "batch_size": batch_size},
        "ways": {name: asdict(way) for name, way in ways.items()},
        "peers": {name: about for name, (_, _, about) in PEERS.items()},
    }

    def after_round(times: dict, failed: dict) -> None:
        table.result |= make_table(nets, costs, times, failed, batch_size)
        table.result["options"]["rounds"] += 1
        table.write()  # after every round: a run that is stopped leaves what it has

    run_rounds(tasks, rounds, device, tiny, after_round, until)
    print_table(table.result)


# ------------------------------------------------------------------------------------------------- the command
def main(argv: list[str] | None = None) -> int:
    device = cuda_or_cpu()
    parser = Parser(prog="python -m experiments.benchmark", argument_default=argparse.SUPPRESS,
                    description="Speed against other libraries' networks, on this machine.")  # fmt: skip
    parser.add_argument("--out", type=results_file, metavar="FILE", help="(default: in the results)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: four networks, tiny batches")
    parser.add_argument("--rounds", type=whole(), metavar="N", help="rounds of every measurement (default: 5)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="torch.compile in the fast setting (default: on a GPU only; minutes)")  # fmt: skip
    parser.add_argument("--recipe", action="store_true", help="the whole recipe against the notebook's, instead")
    parser.add_argument("--data", type=TEXT, metavar="SOURCE", help="--recipe: as for the other experiments")
    parser.add_argument("--seconds", type=number("above 0", lambda s: s > 0), metavar="S",
                        help="--recipe: training time of each (default: 300)")  # fmt: skip
    args = vars(parser.parse_args(argv))
    recipe = args.pop("recipe", False)
    other = {"rounds", "compile"} if recipe else {"data", "seconds"}
    if strangers := sorted(other & set(args)):
        parser.error(f"--{strangers[0]} {'does not belong' if recipe else 'belongs'} to --recipe")
    run = recipe_benchmark if recipe else speed_benchmark
    out = args.pop("out", RESULTS_FOLDER / f"benchmark-{'recipe-' * recipe}{device.type}.json")
    told = [f" --{name} {value}" for name, value in args.items() if name in ("rounds", "seconds")]
    told += [f" --{'no-' * (not value)}{name}" for name, value in args.items() if name in ("quick", "compile")]
    command = parser.prog + " --recipe" * recipe + "".join(told)
    return outcome(parser.prog, lambda: run(command=command, out=out, device=device, **args), out)


if __name__ == "__main__":
    sys.exit(main())
