"""Checkpoints: a folder that sampling loads, and from which a stopped run goes on exactly (chapter 5)."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .diffusion import GaussianDiffusion
from .pretrained import reading
from .settings import check_info, number, whole
from .unet import UNet

STATE_FILE = "state.safetensors"  # everything that resuming needs, in one file, replaced in one move
INFO_FILE = "training.json"
LOCK_FILE = ".lock"  # held while a run writes to its folder; one that a killed run leaves behind locks nothing
ASIDE = ".writing-"  # the prefix of what is being written; a killed run leaves it behind, the next one writes over it
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # what Adam and AdamW keep of each parameter


class TrainState(NamedTuple):
    """Yielded after every training step. ``loss``, ``grad_norm`` and ``bad_step`` are scalars still on the device
    (reading one waits for it); ``model`` has the raw weights, ``ema`` the averaged ones (``ema.module`` is the U-Net
    that samples).
    """

    step: int
    loss: Tensor
    grad_norm: Tensor
    lr: float
    model: UNet
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss, in fp16; disabled otherwise
    bad_step: Tensor  # the first step whose loss or gradient was not finite; 0: all were

    def check(self) -> None:
        """FloatingPointError names the first step that was not finite, if there is one. Waits for the device."""
        if step := self.bad_step.item():
            raise FloatingPointError(
                f"step {step}: the loss or its gradient is not finite, and the weights were left as they were. "
                "Start again with a lower --lr, more --warmup-steps, or --precision no."
            )


def save_checkpoint(state: TrainState, diffusion: GaussianDiffusion, folder: str | Path, info: dict) -> None:
    """Write ``folder``: model.safetensors (EMA weights) and config.json, diffusion.safetensors, training.json
    (``info``), and the state to resume from. OSError where that fails, FloatingPointError where a step or a value was
    not finite; the checkpoint before then stays.

    All files are written aside, then moved into place: training.json first and the state last, so that a crash
    between two moves shows (their steps differ) and ``repair_model`` can mend it.
    """
    state.check()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in state.ema.module.state_dict().items()}
    for index, entries in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise FloatingPointError(f"step {state.step}: {name} is not finite, so no checkpoint of it was written")
    metadata = {
        "step": str(state.step),
        "averaged": str(state.ema.n_averaged),
        "scaler": json.dumps(state.scaler.state_dict()),
    }
    aside = folder / f"{ASIDE}checkpoint"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        save_file(tensors, aside / STATE_FILE, metadata=metadata)
        state.ema.module.save_pretrained(aside)
        diffusion.save_pretrained(aside)
        _write_info(aside / INFO_FILE, info, state.step)
        (aside / "README.md").unlink(missing_ok=True)  # the hub mixin's empty model card
        order = {INFO_FILE: 0, STATE_FILE: 2}
        for path in sorted(aside.iterdir(), key=lambda path: order.get(path.name, 1)):
            _replace(path, folder / path.name)
    except SafetensorError as error:  # what it raises for a full disk
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_state(
    folder: str | Path,
    model: UNet,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> int:
    """Load what ``save_checkpoint`` wrote into the four, and return its step. ValueError for a file that is damaged
    or belongs to another network."""
    with _reading_state(folder) as file:
        step, averaged, scale = _counters(file)
        # Copies: where a part of the file stayed mapped into memory, Windows would let nobody replace it.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        for name, value in tensors.items():
            if not value.is_floating_point() or not value.isfinite().all():
                raise ValueError(f"{name} is not made of finite numbers")
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, value in tensors.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = value
        parameters, moments = list(model.parameters()), {}
        expected = {f"{i}.{name}" for i in range(len(parameters)) for name in MOMENTS}
        # In fp16 the scaler may have left out every step so far: then there is nothing yet.
        if set(groups["optimizer"]) != expected and (groups["optimizer"] or not scaler.is_enabled()):
            raise ValueError(f"the optimizer's state is not that of {len(parameters)} parameters")
        for name, value in groups["optimizer"].items():
            index, _, entry = name.partition(".")
            if entry != "step":  # in the parameter's memory layout, which a fused optimizer takes for granted
                like = parameters[int(index)]
                if value.shape != like.shape:
                    raise ValueError(f"optimizer.{name} is {tuple(value.shape)}, its parameter {tuple(like.shape)}")
                value = torch.empty_like(like).copy_(value)
            moments.setdefault(int(index), {})[entry] = value
        model.load_state_dict(groups["model"])
        ema.module.load_state_dict(groups["ema"])
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        if scale and scaler.is_enabled():
            scaler.load_state_dict(scale)
    ema.n_averaged = averaged
    return step


def saved_step(folder: str | Path) -> int:
    """The step that a run in ``folder`` would go on from."""
    with _reading_state(folder) as file:
        return _counters(file)[0]


def repair_model(folder: str | Path) -> None:
    """Where a crash left a newer model.safetensors beside an older state, write it again from the state."""
    folder, info = Path(folder), read_training_info(folder)
    with _reading_state(folder) as file:
        step = _counters(file)[0]
        if info.get("step") == step:
            return
        ema = {name.removeprefix("ema."): file.get_tensor(name) for name in file.keys() if name.startswith("ema.")}
    with written_aside(folder / "model.safetensors") as aside:
        save_file(ema, aside, metadata={"format": "pt"})
    with written_aside(folder / INFO_FILE) as aside:
        _write_info(aside, info, step)


def read_training_info(folder: str | Path) -> dict:
    """The contents of a checkpoint's training.json. ValueError names what in it is damaged."""
    path = Path(folder) / INFO_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: {path} does not exist")
    with reading(path, "training of this package"):
        info = json.loads(path.read_text(encoding="utf-8"))
        check_info(info)
    return info


# ------------------------------------------------------------------------------------------- files, safely
def check_run_folder(folder: Path, resume: bool) -> None:
    """ValueError or OSError where a run could not write to ``folder``, or would write over another one."""
    if (folder / STATE_FILE).exists() and not resume:
        raise ValueError(f"{folder} already holds a checkpoint: continue it with --resume, or choose another folder")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file; --out is a folder")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"nothing can be written to the folder {there}")
    if folder.is_dir():
        with locked(folder):
            pass


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder: ValueError where another process does. The system lets go of it when the process ends, in
    whatever way."""
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another run is writing to {folder}: wait for its end, or choose another --out") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file; there releasing it does
            (folder / LOCK_FILE).unlink()
        lock.release()


@contextlib.contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A path beside ``out`` to write to; it takes the place of ``out`` when all went well, else it goes."""
    aside = out.with_name(ASIDE + out.name)
    try:
        yield aside
        _replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


def check_writable(out: Path) -> None:
    """OSError where ``written_aside`` could not write ``out``: better before the work than after."""
    aside = out.with_name(ASIDE + out.name)
    try:
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise type(error)(f"nothing can be written to {out}: {error.strerror}") from error


def _replace(path: Path, target: Path) -> None:
    with path.open("r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())  # its contents are on the disk before its name is
    os.replace(path, target)


def _write_info(path: Path, info: dict, step: int) -> None:
    path.write_text(json.dumps(info | {"step": step}, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _reading_state(folder: str | Path):
    """The open state file of a checkpoint; whatever is wrong in it becomes a ValueError that names it."""
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: {path} does not exist")
    with reading(path, "checkpoint of this network"), safe_open(path, framework="pt") as file:
        yield file


def _counters(file) -> tuple[int, int, dict[str, float]]:
    """Beside its tensors the state holds the step, how many weights were averaged, and the scale of the loss."""
    metadata = file.metadata() or {}
    step, averaged = int(metadata["step"]), int(metadata["averaged"])
    scale = json.loads(metadata.get("scaler", "{}"))
    for name, value in {"step": step, "averaged": averaged}.items():
        whole(0).check(name, value)
    for name, value in scale.items():
        number("of at least 0", lambda value: value >= 0).check(name, value)
    return step, averaged, scale
