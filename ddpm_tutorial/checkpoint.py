"""Checkpoints: a folder that sampling loads, and from which a stopped run goes on exactly (chapter 5)."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .diffusion import GaussianDiffusion
from .unet import UNet

STATE_FILE = "state.safetensors"  # everything that resuming needs, in one file, replaced in one move
INFO_FILE = "training.json"
ASIDE = ".writing-"  # the prefix of what is being written; a killed run leaves it behind


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
    (``info``), and the state to resume from. OSError where that fails, FloatingPointError where a step was not finite;
    the checkpoint before then stays.

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
    metadata = {
        "step": str(state.step),
        "averaged": str(state.ema.n_averaged),
        "scaler": json.dumps(state.scaler.state_dict()),
    }
    aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=folder))
    try:
        save_file(tensors, aside / STATE_FILE, metadata=metadata)
        state.ema.module.save_pretrained(aside)
        diffusion.save_pretrained(aside)
        (aside / INFO_FILE).write_text(json.dumps(info | {"step": state.step}, indent=2) + "\n")
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
        metadata = file.metadata()
        step, averaged = int(metadata["step"]), int(metadata["averaged"])
        scale = json.loads(metadata.get("scaler", "{}"))
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name in file.keys():
            group, _, rest = name.partition(".")
            groups[group][rest] = file.get_tensor(name)
        parameters, moments = list(model.parameters()), {}
        for name, value in groups["optimizer"].items():
            index, _, entry = name.partition(".")
            if value.ndim:  # in the parameter's memory layout, which a fused optimizer takes for granted
                value = torch.empty_like(parameters[int(index)]).copy_(value)
            moments.setdefault(int(index), {})[entry] = value
        if len(moments) != len(parameters):
            raise ValueError(f"the optimizer's state is of {len(moments)} parameters")
        model.load_state_dict(groups["model"])
        ema.module.load_state_dict(groups["ema"])
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        if scale and scaler.is_enabled():
            scaler.load_state_dict(scale)
    ema.n_averaged = averaged
    return step


def repair_model(folder: str | Path) -> None:
    """Where a crash left a newer model.safetensors beside an older state, write it again from the state."""
    folder, info = Path(folder), read_training_info(folder)
    with _reading_state(folder) as file:
        step = int(file.metadata()["step"])
        if info.get("step") == step:
            return
        ema = {name: file.get_tensor(f"ema.{name}") for name in _names(file, "ema.")}
    with written_aside(folder / "model.safetensors") as aside:
        save_file(ema, aside, metadata={"format": "pt"})
    with written_aside(folder / INFO_FILE) as aside:
        aside.write_text(json.dumps(info | {"step": step}, indent=2) + "\n")


def read_training_info(folder: str | Path) -> dict:
    """The contents of a checkpoint's training.json."""
    path = Path(folder) / INFO_FILE
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint in {folder}: {path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path} is not a checkpoint's {INFO_FILE}")
    return info


# ------------------------------------------------------------------------------------------- files, safely
@contextlib.contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A path beside ``out`` to write to; it takes the place of ``out`` when all went well, else it goes."""
    aside = out.with_name(ASIDE + out.name)
    try:
        yield aside
        _replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


def remove_left_behind(folder: Path) -> None:
    """Remove what a run that was killed while it wrote has left in its folder."""
    for path in list(folder.glob(f"**/{ASIDE}*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _replace(path: Path, target: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # its contents are on the disk before its name is
    os.replace(path, target)


def _names(file, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in file.keys() if name.startswith(prefix)]


@contextlib.contextmanager
def _reading_state(folder: str | Path):
    """The open state file of a checkpoint; whatever is wrong in it becomes a ValueError that names it."""
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged or is not a checkpoint of this network: {reason}") from error
