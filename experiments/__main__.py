"""Make the tables of the shipped weights again: python -m experiments [--data SOURCE] [--only NAME...].

One experiment after the other (``make results``); what is there already, made with the same settings and weights, is
not made again, so a stopped run goes on with the same command. Tables that were made on a GPU and lie in the results
keep their settings.
"""

import argparse
import sys
import time

from ddpm_tutorial.command.arguments import Parser
from ddpm_tutorial.settings import TEXT, one_of

from . import ablation, choices, editing, evaluation, guidance_sweep, ladder, ladder_flow, progress, samples
from .benchmark import __main__ as benchmark
from .common import duration

# The command, and about how many minutes it takes on two cores.
EXPERIMENTS = {
    "evaluation": (evaluation.main, 45),
    "samples": (samples.main, 2),
    "editing": (editing.main, 5),
    "guidance_sweep": (guidance_sweep.main, 15),
    "ladder": (ladder.main, 150),
    "ladder_flow": (ladder_flow.main, 15),
    "ablation": (ablation.main, 90),
    "choices": (choices.main, 150),
    "progress": (progress.main, 15),
    "benchmark": (benchmark.main, 20),
    "recipe": (lambda argv: benchmark.main(["--recipe", *argv]), 15),
}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments", description="Make the tables of the shipped weights again.",
                    argument_default=argparse.SUPPRESS)  # fmt: skip
    parser.add_argument("--data", type=TEXT, metavar="SOURCE", help="Fashion-MNIST: hub, sample or a folder")
    parser.add_argument("--only", type=one_of(*EXPERIMENTS), nargs="+", metavar="NAME", help=", ".join(EXPERIMENTS))
    args = vars(parser.parse_args(argv))
    names = [name for name in EXPERIMENTS if name in args.get("only", EXPERIMENTS)]
    left, failed = {name: EXPERIMENTS[name][1] for name in names}, []
    for i, name in enumerate(names, start=1):
        print(f"[{i}/{len(names)}] {name}: about {duration(60 * left[name])} if all of it is to be made, "
              f"{duration(60 * sum(left.values()))} for all that follows", flush=True)  # fmt: skip
        began, data = time.monotonic(), ["--data", args["data"]] if "data" in args and name != "benchmark" else []
        status = EXPERIMENTS[name][0](data)
        if status == 130:
            return status
        if status:
            failed.append(name)
        del left[name]
        print(f"[{i}/{len(names)}] {name}: {'failed' if status else 'done'} in {duration(time.monotonic() - began)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
