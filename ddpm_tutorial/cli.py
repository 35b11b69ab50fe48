"""The command line: ``ddpm-tutorial train``, ``sample`` and ``evaluate`` (chapters 5, 6 and 8).

Exit status: 0 done, 1 failed while running, 2 bad input (one line says what), 129, 130 or 143 stopped by a signal.
"""

import contextlib
import errno
import hashlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read when torch is imported; no effect off Apple's MPS

# torch takes seconds to import: each command does it once its options are read and checked.
from .arguments import build_parser
from .settings import FREE, RunSettings, TrainConfig

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # where they exist: Windows has the last, others SIGHUP
TOO_LARGE = ("out of memory", "can't allocate memory", "Overflow", "overflow")  # torch's RuntimeErrors say


def main(argv: Sequence[str] | None = None) -> int:
    command = None
    with contextlib.redirect_stdout(Steady(sys.stdout)), contextlib.redirect_stderr(Steady(sys.stderr)):
        try:
            args = vars(build_parser().parse_args(argv))
            command = args.pop("command")
            return {"train": run_train, "sample": run_sample, "evaluate": run_evaluate}[command](**args)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except (ValueError, OSError) as error:  # ConnectionError and FileNotFoundError are OSErrors
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            return _fail(command, error, 1 if full else getattr(error, "exit_status", 2))
        except (FloatingPointError, OverflowError, MemoryError) as error:
            return _fail(command, error, 1)
        except RuntimeError as error:
            if not any(text in str(error) for text in TOO_LARGE):
                raise
            return _fail(command, error, 1)


def _fail(command: str, error: Exception, status: int) -> int:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    print(f"ddpm-tutorial {command}: error: {reason}", file=sys.stderr)
    return status


class Steady:
    """A standard stream that ends no run: without some of its characters where its encoding lacks them, and silent
    where it does not exist, was closed, or can take no more."""

    def __init__(self, stream):
        self.stream = stream
        if stream is None:
            self._give_up()
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (AttributeError, OSError, ValueError):
            self._give_up()
        return len(text)

    def flush(self) -> None:
        """Nothing is kept: each ``write`` flushes."""

    def _give_up(self) -> None:
        nowhere = open(os.devnull, "w", encoding="utf-8")
        with contextlib.suppress(AttributeError, OSError, ValueError):
            os.dup2(nowhere.fileno(), self.stream.fileno())  # for what it still holds, which Python writes at its end
        self.stream = nowhere

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextlib.contextmanager
def _ctrl_c_ends_at_once() -> Iterator[None]:
    """For imports: nothing is written yet, and a KeyboardInterrupt within them may come out as another error."""
    before = signal.signal(signal.SIGINT, lambda number, _frame: os._exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------- train
def run_train(out: Path, resume: bool = False, **given) -> int:
    with _ctrl_c_ends_at_once():
        import torch

        from .checkpoint import check_run_folder, read_training_info, saved_step
        from .data import SOURCE_VARIABLE, load_images
        from .diffusion import GaussianDiffusion
        from .training import in_main_process, processes, train_to_folder
        from .unet import UNet

    in_main_process(lambda: check_run_folder(out, resume))  # before the data is read, which may take minutes
    saved = read_training_info(out) if resume else None
    begun = saved_step(out) if resume else 0
    run, config = _settings(out, saved, given)
    source = run.data or os.environ.get(SOURCE_VARIABLE) or "hub"
    data = load_images(source, "train", run.image_size, run.image_channels)
    labels = None if run.unconditional else data.labels
    trained_on = {
        "image_shape": list(data.images.shape[1:]),
        "class_names": None if labels is None else list(data.class_names),
        "num_images": len(data.images),
        "checksum": _checksum(data),
    }
    for name, value in trained_on.items():
        if saved and saved.get(name, value) != value:
            before = saved["run"].get("data") or "hub"
            raise ValueError(
                f"the run in {out} was trained on other data: {name} {saved[name]} from {before}, and now {value} "
                f"from {source}"
            )
    diffusion = GaussianDiffusion.from_schedule(run.schedule, run.num_timesteps)
    torch.manual_seed(config.seed)  # the initial weights
    model = UNet(
        in_channels=data.images.shape[1],
        channels=run.channels,
        channel_mults=run.channel_mults,
        num_res_blocks=run.num_res_blocks,
        patch_size=run.patch_size,
        num_classes=None if labels is None else len(data.class_names),
        target=config.target,
        schedule=run.schedule,
        num_timesteps=run.num_timesteps,
    )
    place = processes()
    unused = "; labels not used" if labels is None and data.labels is not None else ""
    size = sum(p.numel() for p in model.parameters()) / 1e6
    place.print(f"{data.describe()}{unused}")
    place.print(f"a U-Net of {size:.2f} million parameters on {place.num_processes} × {place.device.type}")

    # A folder is kept as an absolute path: --resume may be given in another one.
    kept = asdict(run) | {"data": os.path.abspath(source) if os.path.isdir(source) else source}
    with _signals() as stopped:  # finish the step, write a checkpoint, then stop
        last = train_to_folder(
            model, diffusion, data.images, labels, config, out,
            info={"run": kept, **trained_on}, resume=resume, log_every=run.log_every,
            checkpoint_every=run.checkpoint_every, sample_every=run.sample_every, should_stop=lambda: bool(stopped),
        )  # fmt: skip
        place.wait_for_everyone()  # the main process may still be writing
        place.destroy_process_group()
    if last < config.num_train_steps:  # the signal may have come to another process
        number = stopped[0] if stopped else signal.SIGTERM
        place.print(f"stopped at step {last} of {config.num_train_steps}; --resume goes on from there ({out})")
        return 128 + number
    if resume and last == begun:
        place.print(f"nothing to do: {out} is at step {last} already; a larger --num-train-steps goes on")
    else:
        place.print(f"done: step {last}; sample with: ddpm-tutorial sample --checkpoint {shlex.quote(str(out))} "
                    "--out samples.png")  # fmt: skip
    return 0


def _settings(out: Path, saved: dict | None, given: dict) -> tuple[RunSettings, TrainConfig]:
    """The settings of a new run, or those ``saved`` of the one in ``out``, with what is ``given``."""
    run, config = RunSettings(), TrainConfig()
    if saved is not None:
        if not {"run", "config"} <= set(saved):
            raise ValueError(f"the training.json in {out} is not of a run of this command: it has no run or no config")
        run, config = RunSettings(**saved["run"]), TrainConfig(**saved["config"])
        before = asdict(run) | asdict(config)
        if changed := [name for name, value in given.items() if name not in FREE and before[name] != value]:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            raise ValueError(f"the run in {out} was started with another {options}; --resume keeps its own")

    def with_given(part):
        return replace(part, **{name: value for name, value in given.items() if hasattr(part, name)})

    return with_given(run), with_given(config)


def _checksum(data) -> str:
    """Of the images and labels, 16 hexadecimal digits."""
    digest = hashlib.sha256(data.images.contiguous().numpy())
    if data.labels is not None:
        digest.update(data.labels.contiguous().numpy())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Ctrl-C, a closed terminal and the like, kept in a list instead of ending the process."""
    caught: list[int] = []
    numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
    before = {
        number: signal.signal(number, lambda number, _frame: caught.append(number))
        for number in numbers
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN  # nohup ignores SIGHUP
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ sample
def run_sample(
    out: Path, checkpoint: str | None = None, labels: list[str] | None = None, num_images: int = 100, **sampling
) -> int:
    with _ctrl_c_ends_at_once():
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
    gif = out.suffix.lower() == ".gif"
    if gif and num_images > BATCH_SIZE:
        raise ValueError(f"--num-images must be at most {BATCH_SIZE} for a GIF, got {num_images}")
    if gif and "batch_size" in sampling:
        raise ValueError("--batch-size has no meaning for a GIF: its images are drawn together")
    trained = load_trained(checkpoint)
    if not trained.class_names and labels:
        raise ValueError("this checkpoint was trained without labels; leave --labels out")
    wanted = [parse_label(label, trained.class_names) for label in labels or range(len(trained.class_names))] or [0]
    all_labels = torch.tensor(wanted)[torch.arange(num_images) % len(wanted)]
    columns = len(wanted) * max(1, 10 // len(wanted))  # each column one class
    if gif:
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
    chosen, taken = f"--metric {metric}", {"num_images", "split", "num_steps"}
    if metric == "samples":
        taken = set(options) - {"split", "num_steps"}
        if "samples" in options:
            chosen, taken = "--samples FILE", {"samples", "repeats", "features"}
    if other := [f"--{name.replace('_', '-')}" for name in options if name not in taken]:
        raise ValueError(f"{', '.join(other)} has no meaning with {chosen}")
    if out is not None and (out.suffix.lower() != ".json" or out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"--out must be a FILE.json in a folder that exists, got {out}")
    with _ctrl_c_ends_at_once():
        from .checkpoint import check_writable, written_aside
        from .evaluation import METRICS
        from .trained import load_trained

    if out is not None:
        check_writable(out)
    measure, show = METRICS[metric]
    report = {"metric": metric, "seed": seed} | measure(load_trained(checkpoint), data, seed, **options)
    if out is not None:  # before anything is printed: the figures took time
        with written_aside(out) as aside:
            aside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
