"""The command line: ``ddpm-tutorial train``, ``sample`` and ``evaluate`` (chapters 5, 6 and 8).

Exit status: 0 done, 1 failed while running, 2 bad input (one line says what), 130 or 143 stopped by a signal.
"""

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read when torch is imported; no effect off Apple's MPS

from .arguments import RUN_DEFAULTS, at_least, build_parser

if TYPE_CHECKING:  # torch takes seconds to import: each command does it once its options are read
    from .training import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(build_parser().parse_args(argv))
    command = args.pop("command")
    try:
        return {"train": run_train, "sample": run_sample, "evaluate": run_evaluate}[command](**args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:  # ConnectionError and FileNotFoundError are OSErrors
        from .training import WriteError

        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return _fail(command, error, 1 if isinstance(error, WriteError) or full else 2)
    except FloatingPointError as error:
        return _fail(command, error, 1)
    except RuntimeError as error:
        if not any(text in str(error) for text in ("out of memory", "can't allocate memory")):
            raise
        return _fail(command, str(error).splitlines()[0], 1)


def _fail(command: str, error: Exception | str, status: int) -> int:
    print(f"ddpm-tutorial {command}: error: {error}", file=sys.stderr)
    return status


# ------------------------------------------------------------------------------------------------- train
def run_train(
    out: Path, log_every: int, checkpoint_every: int, sample_every: int, resume: bool = False, **given
) -> int:
    import torch

    from .data import load_images
    from .diffusion import GaussianDiffusion
    from .training import processes, train_to_folder
    from .unet import UNet

    at_least(1, log_every=log_every, checkpoint_every=checkpoint_every)
    at_least(0, sample_every=sample_every)
    run, config, saved = _settings(out, resume, given)
    data = load_images(run["data"], "train", run["image_size"], run["image_channels"])
    labels = None if run["unconditional"] else data.labels
    trained_on = {
        "image_shape": list(data.images.shape[1:]),
        "class_names": None if labels is None else list(data.class_names),
    }
    for name, value in trained_on.items():
        if saved.get(name, value) != value:
            raise ValueError(f"the run in {out} has {name} {saved[name]}, and the data {value}: other data")
    diffusion = GaussianDiffusion.from_schedule(run["schedule"], run["num_timesteps"])
    torch.manual_seed(config.seed)  # the initial weights
    model = UNet(
        in_channels=data.images.shape[1],
        channels=run["channels"],
        channel_mults=run["channel_mults"],
        num_res_blocks=run["num_res_blocks"],
        patch_size=run["patch_size"],
        num_classes=None if labels is None else len(data.class_names),
        target=config.target,
        schedule=run["schedule"],
        num_timesteps=run["num_timesteps"],
    )
    place = processes()
    unused = "; labels not used" if labels is None and data.labels is not None else ""
    size = sum(p.numel() for p in model.parameters()) / 1e6
    place.print(f"{data.describe()}{unused}")
    place.print(f"a U-Net of {size:.2f} million parameters on {place.num_processes} × {place.device.type}")

    with _signals() as stopped:  # finish the step, write a checkpoint, then stop
        last = train_to_folder(
            model, diffusion, data.images, labels, config, out,
            info={"run": run, **trained_on}, resume=resume, log_every=log_every, checkpoint_every=checkpoint_every,
            sample_every=sample_every, should_stop=lambda: bool(stopped),
        )  # fmt: skip
        place.wait_for_everyone()  # the main process may still be writing
        place.destroy_process_group()
    if last < config.num_train_steps:  # the signal may have come to another process
        number = stopped[0] if stopped else signal.SIGTERM
        place.print(f"stopped at step {last} of {config.num_train_steps}; --resume goes on from there ({out})")
        return 128 + number
    place.print(f"done: step {last}; sample with: ddpm-tutorial sample --checkpoint {out} --out samples.png")
    return 0


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM, kept in a list instead of ending the process."""
    caught: list[int] = []
    before = {n: signal.signal(n, lambda n, _frame: caught.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _settings(out: Path, resume: bool, given: dict) -> tuple[dict, "TrainConfig", dict]:
    """What the run depends on: its RUN_DEFAULTS and its TrainConfig; and the training.json it goes on from."""
    from dataclasses import asdict

    from .checkpoint import INFO_FILE, read_training_info
    from .training import TrainConfig

    saved = read_training_info(out) if resume else {"run": {}, "config": {}}
    try:
        run, config = RUN_DEFAULTS | saved["run"], asdict(TrainConfig(**saved["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{out / INFO_FILE} is damaged or not of a run of this command: {error}") from error
    if resume:
        free = ("data", "num_train_steps", "compile")  # the data may have moved, and a run may be made longer
        before = run | config
        changed = [f"--{k.replace('_', '-')}" for k, v in given.items() if k not in free and before[k] != v]
        if changed:
            raise ValueError(f"the run in {out} was started with another {', '.join(changed)}; --resume keeps its own")
    run = {name: given.get(name, value) for name, value in run.items()}
    return run, TrainConfig(**{name: given.get(name, value) for name, value in config.items()}), saved


# ------------------------------------------------------------------------------------------------ sample
def run_sample(
    out: Path, checkpoint: str | None = None, labels: list[str] | None = None, num_images: int = 100, **sampling
) -> int:
    import torch

    from .trained import (
        BATCH_SIZE,
        check_out,
        draw_batches,
        draw_chain,
        load_trained,
        parse_label,
        save_chain,
        save_images,
    )

    check_out(out)
    at_least(1, num_images=num_images)
    if out.suffix == ".gif" and num_images > BATCH_SIZE:
        raise ValueError(f"--num-images must be at most {BATCH_SIZE} for a GIF, got {num_images}")
    if out.suffix == ".gif" and "batch_size" in sampling:
        raise ValueError("--batch-size has no meaning for a GIF: its images are drawn together")
    trained = load_trained(checkpoint)
    if not trained.class_names and labels:
        raise ValueError("this checkpoint was trained without labels; leave --labels out")
    wanted = [parse_label(label, trained.class_names) for label in labels or range(len(trained.class_names))] or [0]
    all_labels = torch.tensor([wanted[i % len(wanted)] for i in range(num_images)])
    columns = len(wanted) * max(1, 10 // len(wanted))  # each column one class
    if out.suffix == ".gif":
        save_chain(draw_chain(trained, all_labels, **sampling), out, columns)
    else:
        save_images(draw_batches(trained, all_labels, **sampling), all_labels, out, columns, trained.class_names)
    print(f"{num_images} images in {out}")
    return 0


# ---------------------------------------------------------------------------------------------- evaluate
def run_evaluate(
    checkpoint: str | None = None,
    data: str | None = None,
    metric: str = "bits-per-dim",
    seed: int = 0,
    out: Path | None = None,
    **options,
) -> int:
    from .checkpoint import written_aside
    from .evaluation import measure_bits, measure_samples
    from .trained import load_trained

    if metric not in ("bits-per-dim", "samples"):
        raise ValueError(f"--metric must be bits-per-dim or samples, got {metric!r}")
    at_least(0, num_images=options.get("num_images", 0), seed=seed)
    if out is not None and (out.suffix != ".json" or not out.parent.is_dir()):
        raise ValueError(f"--out must be a FILE.json in a folder that exists, got {out}")
    measure, chosen, taken = measure_bits, f"--metric {metric}", {"num_images", "split", "num_steps"}
    if metric == "samples":
        measure, taken = measure_samples, set(options) - {"split", "num_steps"}
        if "samples" in options:
            chosen, taken = "--samples FILE", {"samples", "repeats", "features"}
    if other := [f"--{name.replace('_', '-')}" for name in options if name not in taken]:
        raise ValueError(f"{', '.join(other)} has no meaning with {chosen}")
    report = {"metric": metric, "seed": seed} | measure(load_trained(checkpoint), data, seed, **options)
    if out is not None:
        with written_aside(out) as aside:
            aside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
