"""Checkpoints: a folder that sampling loads, and from which a stopped run goes on exactly (chapter 5)."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import ASIDE, locked, moved, reading, written_aside
from .optimizer import Muon
from .predictor import NoisePredictor
from .settings import check_info, number, whole

STATE_FILE = "state.safetensors"  # everything that resuming needs, in one file, replaced in one move
INFO_FILE = "training.json"
MOMENTS = {Muon: ("momentum_buffer",), torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq")}  # kept of each parameter


class TrainState(NamedTuple):
    """Yielded after every training step. ``loss``, ``grad_norm`` and ``bad_step`` are scalars still on the device
    (reading one waits for it); ``model`` has the raw weights, ``ema`` the averaged ones (``ema.module`` is the one that
    samples).
    """

    step: int
    loss: Tensor
    grad_norm: Tensor
    lr: float
    model: NoisePredictor
    ema: nn.Module
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler  # of the loss, in fp16; disabled otherwise
    bad_step: Tensor  # the first step whose loss or gradient was not finite; 0: all were

    def check(self) -> None:
        """FloatingPointError names the first step that was not finite, if there is one. Waits for the device."""
        if step := self.bad_step.item():
            raise FloatingPointError(
                f"step {step}: the loss or its gradient is not finite, and the weights were left as they were. "
                "Start again with a lower --lr, more --warmup-steps, or --precision no."
            )


def save_checkpoint(state: TrainState, folder: str | Path, info: dict) -> None:
    """Write ``folder``: config.json and model.safetensors (the predictor with EMA weights), training.json (``info``),
    and the state to resume from. OSError where that fails, FloatingPointError where a step or a value was not finite;
    the checkpoint before then stays.

    All files are written aside, then moved into place: training.json first and the state last, so that a crash
    between two moves shows (their steps differ) and ``repair_model`` can mend it.
    """
    state.check()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"model": state.model.contents()[1], "ema": state.ema.module.contents()[1]}
    kept["optimizer"] = {
        f"{name}.{entry}": torch.as_tensor(value)
        for optimizer, parameters in _moved_by(state.optimizers, state.model)
        for name, parameter in parameters.items()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }
    tensors = {
        f"{group}.{name}": value.detach().cpu().contiguous()
        for group, tensors in kept.items()
        for name, value in tensors.items()
    }
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
        _write_info(aside / INFO_FILE, info, state.step)
        order = {INFO_FILE: 0, STATE_FILE: 2}
        for path in sorted(aside.iterdir(), key=lambda path: order.get(path.name, 1)):
            moved(path, folder / path.name)
    except SafetensorError as error:  # what it raises for a full disk
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_state(
    folder: str | Path,
    model: NoisePredictor,
    ema: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
) -> int:
    """Load what ``save_checkpoint`` wrote into these, and return its step. ValueError for a file that is damaged or
    belongs to another network, or to one with another diffusion."""
    with _reading_state(folder) as file:
        step, averaged, scale = _counters(file)
        target = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["target"]
        if target != model.target:
            raise ValueError(f"its network gives {target}, and the one given {model.target}")
        # Copies: where a part of the file stayed mapped into memory, Windows would let nobody replace it.
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name in file.keys():
            value = file.get_tensor(name).clone()
            if not value.is_floating_point() or not value.isfinite().all():
                raise ValueError(f"{name} is not made of finite numbers")
            group, _, rest = name.partition(".")
            groups[group][rest] = value
        for group in ("model", "ema"):
            if not torch.equal(groups[group].pop("betas"), model.diffusion.exact_betas):
                raise ValueError(f"its diffusion is not the one given ({model.diffusion.describe()})")
        _load_moments(model, optimizers, groups["optimizer"], may_be_empty=scaler.is_enabled())
        model.unet.load_state_dict(groups["model"])
        ema.module.unet.load_state_dict(groups["ema"])
        if scale and scaler.is_enabled():
            scaler.load_state_dict(scale)
    ema.n_averaged = averaged
    return step


def _moved_by(
    optimizers: list[torch.optim.Optimizer], model: NoisePredictor
) -> list[tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]]:
    """Each optimiser with its parameters, in its order, by their names in the U-Net."""
    names = {parameter: name for name, parameter in model.unet.named_parameters()}
    return [
        (optimizer, {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]})
        for optimizer in optimizers
    ]


def _load_moments(
    model: NoisePredictor, optimizers: list[torch.optim.Optimizer], kept: dict[str, Tensor], may_be_empty: bool
) -> None:
    """``kept``, by the names of parameters, into the optimisers. In fp16 the scaler may have left out every step so
    far: then there is nothing yet."""
    if not kept and may_be_empty:
        return
    moved_by = _moved_by(optimizers, model)
    expected = {f"{name}.{entry}" for o, parameters in moved_by for name in parameters for entry in MOMENTS[type(o)]}
    if set(kept) != expected:
        raise ValueError(f"the optimizers' state is not that of {' and '.join(type(o).__name__ for o in optimizers)}")
    for optimizer, parameters in moved_by:
        state = {
            index: {entry: _laid_out(f"{name}.{entry}", kept, parameter) for entry in MOMENTS[type(optimizer)]}
            for index, (name, parameter) in enumerate(parameters.items())
        }
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _laid_out(name: str, kept: dict[str, Tensor], parameter: nn.Parameter) -> Tensor:
    """A moment in its parameter's memory layout, which a fused optimizer takes for granted; a count as it is."""
    if name.endswith(".step"):
        return kept[name]
    if kept[name].shape != parameter.shape:
        raise ValueError(f"{name} is {tuple(kept[name].shape)}, its parameter {tuple(parameter.shape)}")
    return torch.empty_like(parameter).copy_(kept[name])


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
        save_file(ema, aside)
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
    scale = json.loads(metadata["scaler"])
    for name, value in {"step": step, "averaged": averaged}.items():
        whole(0).check(name, value)
    for name, value in scale.items():
        number("of at least 0", lambda value: value >= 0).check(name, value)
    return step, averaged, scale
