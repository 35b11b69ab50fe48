"""The network trained by flow matching beside the shipped one, for chapter 10: python -m experiments.ladder_flow.

Both draw as many images for each number of network evaluations, from the same noise and for the same labels: by Euler's
method, which is DDIM, with timesteps even in t and even on the straight path, and by Heun's. That one goes along σ, as
in the other ladder, where a step even on the path would begin with nearly all of σ; so it has those even in t alone.
"""

import sys
from functools import partial
from itertools import product
from pathlib import Path

from torch import Tensor

from ddpm_tutorial.flow import SHIPPED_FLOW
from ddpm_tutorial.metrics import Classifier
from ddpm_tutorial.settings import TEXT, whole

from .common import fingerprint, made_with, run_command, table_parser
from .ladder import draw, fill, ready, solver

DEFAULTS = {"num_images": 1000, "seed": 0}
EVALUATIONS = (1, 2, 4, 8, 20, 50)
SAMPLERS = {"Euler": "DDIM, η = 0", "Heun": "Heun"}  # as ``ladder`` calls them


def ladder() -> list[dict]:
    """What each row is about, the cheapest first. Of one or two evaluations Heun's method makes one step, Euler's."""
    names = "allowed", "network", "even_in", "sampler"
    rows = product(EVALUATIONS, ("shipped", "flow"), (("t", "Euler"), ("u", "Euler"), ("t", "Heun")))
    return [dict(zip(names, (allowed, network, *how), strict=True)) for allowed, network, how in rows
            if how != ("t", "Heun") or allowed > 2]  # fmt: skip


def run(
    command: str, out: Path, num_images: int, seed: int, data: str | None = None, checkpoint: str | None = None,
    flow: str | None = None, until: float = float("inf"),
) -> None:  # fmt: skip
    flow = flow or SHIPPED_FLOW
    networks = {"shipped": ready(checkpoint), "flow": ready(flow)}

    def drawn(job: dict, labels: Tensor, seed: int) -> tuple[Tensor, int, float, float]:
        sampler = partial(solver(SAMPLERS[job["sampler"]], job["allowed"]), spacing=job["even_in"])
        return draw(sampler, networks[job["network"]], labels, seed)

    fill(ladder(), drawn, made_with(checkpoint, Classifier) | {"flow": fingerprint(flow)}, command=command, out=out,
         num_images=num_images, seed=seed, data=data, until=until)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = table_parser("ladder_flow", "The network trained by flow matching beside the shipped one.", "ladder-flow")
    parser.add_argument("--flow", type=TEXT, metavar="FOLDER", help="(default: the shipped weights of chapter 10)")
    parser.add_argument("--num-images", type=whole(), metavar="N", help="images a row (default: 1000)")
    return run_command(parser, argv, run, DEFAULTS)


if __name__ == "__main__":
    sys.exit(main())
