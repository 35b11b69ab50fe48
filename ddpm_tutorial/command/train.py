"""``ddpm-tutorial train``: a training in a folder, which can be stopped at any moment and goes on exactly (chapter 5).

The folder holds the checkpoint, a log and grids of samples.
"""

import contextlib
import csv
import hashlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor
from tqdm.auto import tqdm

from ..checkpoint import (
    STATE_FILE,
    check_run_folder,
    read_training_info,
    repair_model,
    save_checkpoint,
    saved_step,
)
from ..data import NAMED_SOURCES, chosen_source, load_images, seeded_generator
from ..diffusion import GaussianDiffusion
from ..files import locked, written_aside
from ..guidance import classifier_free
from ..predictor import NoisePredictor
from ..sampling import sample_ddim, sample_images
from ..settings import FREE, RunSettings, TrainConfig, check_info
from ..training import processes, train
from ..unet import UNet

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # where they exist: Windows has the last, others SIGHUP
LOG_FILE = "log.csv"
LOG_COLUMNS = ["step", "epoch", "loss", "grad_norm", "lr", "images_per_second"]


class WriteError(OSError):
    """A run's folder could not be written to: a full disk, say."""

    exit_status = 1


def run(out: Path, resume: bool = False, **given) -> int:
    in_main_process(lambda: check_run_folder(out, resume))  # before the data is read, which may take minutes
    saved = read_training_info(out) if resume else None
    begun = saved_step(out) if resume else 0
    run, config = _settings(out, saved, given)
    source = chosen_source(run.data)
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
    torch.manual_seed(config.seed)  # the initial weights
    unet = UNet(
        in_channels=data.images.shape[1],
        channels=run.channels,
        channel_mults=run.channel_mults,
        num_res_blocks=run.num_res_blocks,
        patch_size=run.patch_size,
        num_classes=None if labels is None else len(data.class_names),
    )
    diffusion = GaussianDiffusion.from_schedule(run.schedule, run.num_timesteps)
    model = NoisePredictor(unet, diffusion, run.target, trained_on["image_shape"], trained_on["class_names"])
    place = processes()
    unused = "; labels not used" if labels is None and data.labels is not None else ""
    size = sum(p.numel() for p in unet.parameters()) / 1e6
    place.print(f"{data.describe()}{unused}")
    place.print(f"a U-Net of {size:.2f} million parameters on {place.num_processes} × {place.device.type}")

    # A folder is kept as an absolute path: --resume may be given in another one.
    named = source in NAMED_SOURCES or not os.path.isdir(source)
    kept = asdict(run) | {"data": source if named else os.path.abspath(source)}
    with _signals() as stopped:  # finish the step, write a checkpoint, then stop
        last = train_to_folder(
            model, data.images, labels, config, out,
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


# --------------------------------------------------------------------------------------- a run in a folder
def train_to_folder(
    model: NoisePredictor,
    images: Tensor,
    labels: Tensor | None,
    config: TrainConfig,
    out: str | Path,
    *,
    info: dict | None = None,
    resume: bool = False,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    sample_every: int = 1000,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Run ``train`` to its end in the folder ``out`` and return the last step, that of the checkpoint where nothing is
    left to do.

    Writes a checkpoint every ``checkpoint_every`` steps, a row of log.csv every ``log_every`` and with each checkpoint
    (its loss a mean since the row before, so a resumed run's is that of one never stopped), a grid of EMA samples under
    samples/ every ``sample_every`` (0: none), and all of them at the end. When ``should_stop()`` is true in any
    process, it ends with a row and a checkpoint. ``resume`` continues from the checkpoint in ``out``; without it a
    folder that holds one is refused, and so is one that another run writes to. ``info`` is written to training.json
    beside the configuration. WriteError where the folder cannot be written to.
    """
    out, main = Path(out), processes().is_main_process
    steps = train(model, images, labels, config, resume_from=out if resume else None)
    info = {**(info or {}), "config": asdict(config)}
    check_info(info)  # what is written can be read

    def grid_is_due(step: int) -> bool:
        return sample_every > 0 and (step % sample_every == 0 or step == config.num_train_steps)

    def prepare() -> None:
        check_run_folder(out, resume)
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(out))
        if resume:
            repair_model(out)
        done = saved_step(out) if resume else 0
        _open_log(out / LOG_FILE, done)
        grid = _grid_path(out, done)
        if resume and grid_is_due(done) and not grid.exists():  # the run was stopped there
            _save_samples(NoisePredictor.from_pretrained(out).to(processes().device), grid)

    with contextlib.ExitStack() as held:
        in_main_process(prepare)
        step = saved_step(out) if resume else 0
        loss_sum, logged, began = 0.0, step, time.perf_counter()
        bar = held.enter_context(
            tqdm(initial=step, total=config.num_train_steps, unit="step", mininterval=1, disable=not main)
        )
        for state in steps:
            step, loss_sum = state.step, loss_sum + state.loss
            stopped = _in_any_process(should_stop(), step)
            last = stopped or step == config.num_train_steps
            keep = last or step % checkpoint_every == 0
            log = keep or step % log_every == 0
            if log:
                state.check()  # in all processes
            try:
                if main and log:
                    loss, seconds = float(loss_sum) / (step - logged), time.perf_counter() - began
                    row = {
                        "step": step,
                        "epoch": round(step * config.batch_size / len(images), 4),
                        "loss": f"{loss:.6f}",
                        "grad_norm": f"{state.grad_norm.item():.4f}",
                        "lr": f"{state.lr:.3e}",
                        "images_per_second": round((step - logged) * config.batch_size / seconds, 1),
                    }
                    _append_row(out / LOG_FILE, row)
                    loss_sum, logged, began = 0.0, step, time.perf_counter()
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                # The grid first: a run that is killed between the two goes on from before, and draws it again.
                if main and grid_is_due(step) and not stopped:
                    _save_samples(state.ema.module, _grid_path(out, step))
                if main and keep:
                    save_checkpoint(state, out, info)
            except OSError as error:
                saved = "What was saved before is whole: make room, then go on with --resume."
                raise WriteError(
                    f"step {step}: {out} could not be written to ({error}). "
                    + (saved if (out / STATE_FILE).exists() else "Nothing was saved before.")
                ) from error
            bar.update()
            if last:
                break
    return step


def in_main_process(action: Callable[[], None]) -> None:
    """Run ``action`` in the main process alone; where it raises ValueError or OSError there, every process does."""
    failed: list[Exception | None] = [None]
    if processes().is_main_process:
        try:
            action()
        except (OSError, ValueError) as error:
            failed = [error]
    if error := broadcast_object_list(failed)[0]:
        raise error


def _in_any_process(flag: bool, step: int) -> bool:
    """Whether the flag is true in one of the processes, so that all of them stop at the same step. Several ask each
    other at every tenth step, because the answer makes the CPU wait for the device."""
    if processes().num_processes == 1:
        return flag
    return step % 10 == 0 and bool(reduce(torch.tensor(float(flag), device=processes().device), "sum") > 0)


def _open_log(path: Path, done: int) -> None:
    """Make the log ready for the rows after step ``done``: later rows, and half a row, left by a run that was killed,
    go. A file that is no log of this program is set aside and told."""
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    try:
        rows = list(csv.reader(whole.decode("utf-8").splitlines(), strict=True))
        keep = [row for row in rows[1:] if int(row[0]) <= done]
        if rows and (rows[0] != LOG_COLUMNS or any(len(row) != len(LOG_COLUMNS) for row in rows)):
            raise ValueError("its columns are others")
    except (ValueError, IndexError, csv.Error) as error:
        aside = path.with_name(f"{path.name}.damaged")
        os.replace(path, aside)
        print(f"{path} is no log of this program ({error}): it is {aside.name} now", file=sys.stderr)
        keep = []
    with written_aside(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([LOG_COLUMNS, *keep])


def _append_row(path: Path, row: dict) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, LOG_COLUMNS).writerow(row)


def _grid_path(out: Path, step: int) -> Path:
    return out / "samples" / f"step-{step:06d}.png"


def _save_samples(model: NoisePredictor, path: Path) -> None:
    """Eight samples of each class, at most ten (or 80 without classes), by 20 DDIM steps from one fixed noise."""
    from torchvision.utils import save_image  # slow to import, so only where it is used

    ask, count = model, 80
    if model.num_classes is not None:
        labels = torch.arange(min(model.num_classes, 10), device=model.device).repeat(8)
        ask, count = classifier_free(model, labels), len(labels)
    shape = (count, *model.image_shape)
    steps = sample_ddim(ask, model.diffusion, shape, num_inference_steps=20, generator=seeded_generator(0))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        save_image(sample_images(steps).float() / 255, aside, nrow=count // 8)
