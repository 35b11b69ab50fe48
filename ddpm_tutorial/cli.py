"""The command line: ``ddpm-tutorial train``, ``sample`` and ``evaluate`` (chapters 5, 6 and 2).

Exit status: 0 done, 1 failed while running, 2 bad input (one line says what), 130 or 143 stopped by a signal.
"""

import contextlib
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read when torch is imported; no effect off Apple's MPS

from .arguments import RUN_DEFAULTS, build_parser

if TYPE_CHECKING:  # torch takes seconds to import: each command does it once its options are read
    import torch

    from .diffusion import GaussianDiffusion
    from .training import TrainConfig
    from .unet import UNet


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(build_parser().parse_args(argv))
    command = args.pop("command")
    try:
        return {"train": run_train, "sample": run_sample, "evaluate": run_evaluate}[command](**args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:  # ConnectionError and FileNotFoundError are OSErrors
        from .training import WriteError

        return _fail(command, error, 1 if isinstance(error, WriteError) else 2)
    except FloatingPointError as error:
        return _fail(command, error, 1)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return _fail(command, str(error).splitlines()[0], 1)


def _fail(command: str, error: Exception | str, status: int) -> int:
    print(f"ddpm-tutorial {command}: error: {error}", file=sys.stderr)
    return status


def _at_least(least: int, **options: int) -> None:
    for name, value in options.items():
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


class Checkpoint(NamedTuple):
    """A trained U-Net on the best device, its diffusion, and what it was trained on."""

    model: "UNet"
    diffusion: "GaussianDiffusion"
    device: "torch.device"
    image_shape: tuple[int, int, int]
    class_names: Sequence[str]


def _load(folder: str | None) -> Checkpoint:
    """The checkpoint in a folder (None: the shipped one). ValueError where its files do not fit each other."""
    from .checkpoint import INFO_FILE, read_training_info
    from .data import CLASS_NAMES
    from .diffusion import SHIPPED_WEIGHTS, GaussianDiffusion
    from .training import processes
    from .unet import UNet

    folder = SHIPPED_WEIGHTS if folder is None else Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: it holds no config.json")
    device = processes().device
    model, diffusion = UNet.from_pretrained(folder).to(device), GaussianDiffusion.from_pretrained(folder).to(device)
    info = read_training_info(folder) if (folder / INFO_FILE).exists() else {}
    shape = tuple(info.get("image_shape") or (model.in_channels, 28, 28))  # without a word, it was Fashion-MNIST
    classes = model.num_classes or 0
    class_names = info.get("class_names") or (CLASS_NAMES if classes == 10 else tuple(map(str, range(classes))))
    if len(class_names) != classes or len(shape) != 3 or shape[0] != model.in_channels:
        raise ValueError(
            f"{folder}: the network has {classes} classes and {model.in_channels} channels, "
            f"{INFO_FILE} names {len(class_names)} classes and images of shape {shape}"
        )
    return Checkpoint(model, diffusion, device, shape, class_names)


# ------------------------------------------------------------------------------------------------- train
def run_train(
    out: Path, log_every: int, checkpoint_every: int, sample_every: int, resume: bool = False, **given
) -> int:
    import torch

    from .data import load_images
    from .diffusion import GaussianDiffusion
    from .training import processes, train_to_folder
    from .unet import UNet

    _at_least(1, log_every=log_every, checkpoint_every=checkpoint_every)
    _at_least(0, sample_every=sample_every)
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
        schedule=run["schedule"] if config.target == "v" else None,
        num_timesteps=run["num_timesteps"],
    )
    place = processes()
    count = f"{len(data.images)} images of {len(data.class_names)} classes" if labels is not None else (
        f"{len(data.images)} images without labels")  # fmt: skip
    size = sum(p.numel() for p in model.parameters()) / 1e6
    place.print(f"{count}, a U-Net of {size:.2f} million parameters on {place.num_processes} × {place.device.type}")

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
    checkpoint: str | None,
    labels: list[str] | None,
    num_images: int,
    sampler: str,
    num_inference_steps: int | None,
    guidance_scale: float,
    seed: int,
    out: Path,
) -> int:
    import torch

    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png or .npz, got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {out.parent}")
    _at_least(1, num_images=num_images)
    trained = _load(checkpoint)
    if not trained.class_names and labels:
        raise ValueError("this checkpoint was trained without labels; leave --labels out")
    wanted = [parse_label(label, trained.class_names) for label in labels or range(len(trained.class_names))] or [0]
    all_labels = torch.tensor([wanted[i % len(wanted)] for i in range(num_images)])
    images = draw_images(trained, all_labels, sampler, num_inference_steps, guidance_scale, seed)
    save_images(images, all_labels, out, columns=max(10, len(wanted)) if len(wanted) > 1 else 10)
    print(f"{num_images} images in {out}")
    return 0


def draw_images(
    trained: Checkpoint,
    labels: "torch.Tensor",
    sampler: str,
    num_inference_steps: int | None,
    guidance_scale: float,
    seed: int,
) -> "torch.Tensor":
    """One image for each label, uint8 (N, C, H, W). ValueError names the option that is wrong."""
    import torch
    from tqdm.auto import tqdm

    from .data import seeded_generator
    from .guidance import classifier_free
    from .sampling import SAMPLERS, ddim_timesteps, sample_images

    _at_least(0, seed=seed)
    if not math.isfinite(guidance_scale):
        raise ValueError(f"--guidance-scale must be a finite number, got {guidance_scale}")
    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    options = {}
    if num_inference_steps is not None:
        if sampler == "ddpm":
            raise ValueError("--num-inference-steps belongs to the other samplers; ddpm always takes all T steps")
        ddim_timesteps(trained.diffusion.num_timesteps, num_inference_steps)  # says what is wrong before the bar begins
        options = {"num_inference_steps": num_inference_steps}
    generator, batches = seeded_generator(seed), []
    with tqdm(total=len(labels), unit="image", mininterval=1) as bar:
        for batch in labels.split(200):
            noise_model = trained.model
            if trained.class_names:
                noise_model = classifier_free(trained.model, batch.to(trained.device), guidance_scale)
            shape = (len(batch), *trained.image_shape)
            steps = SAMPLERS[sampler](noise_model, trained.diffusion, shape, generator=generator, **options)
            batches.append(sample_images(steps).cpu())
            bar.update(len(batch))
    return torch.cat(batches)


def parse_label(text: str | int, class_names: Sequence[str]) -> int:
    """A class number, or the beginning of a class name that fits only one, upper or lower case, without signs."""

    def plain(name: str) -> str:
        return "".join(c for c in name.lower() if c.isalnum())

    text, names = str(text), [plain(name) for name in class_names]
    found = [i for i, name in enumerate(names) if plain(text) and name == plain(text)]
    if not found and text.isdecimal():
        found = [int(text)] if int(text) < len(names) else []
    elif not found and plain(text):
        found = [i for i, name in enumerate(names) if name.startswith(plain(text))]
    if len(found) != 1:
        known = [f"{i} {name}" for i, name in enumerate(class_names)]
        known = known if len(known) <= 20 else [*known[:20], f"… {len(names) - 1}"]
        raise ValueError(f"unknown label {text!r}; the labels are {', '.join(known)}")
    return found[0]


def save_images(images, labels, out: Path, columns: int) -> None:
    """Write uint8 images (N, C, H, W) as a PNG grid or, with their labels, as an NPZ file."""
    import numpy as np
    from torchvision.utils import save_image

    from .checkpoint import written_aside

    with written_aside(out) as aside:
        if out.suffix == ".png":
            save_image(images.float() / 255, aside, nrow=columns)
        else:
            np.savez_compressed(aside, images=images.numpy(), labels=labels.numpy())


# ---------------------------------------------------------------------------------------------- evaluate
def run_evaluate(
    checkpoint: str | None, data: str | None, metric: str, num_images: int, seed: int, out: Path | None, **options
) -> int:
    from .checkpoint import written_aside

    if metric not in ("bits-per-dim", "samples"):
        raise ValueError(f"--metric must be bits-per-dim or samples, got {metric!r}")
    _at_least(0, num_images=num_images, num_steps=options["num_steps"], seed=seed)
    if out is not None and (out.suffix != ".json" or not out.parent.is_dir()):
        raise ValueError(f"--out must be a FILE.json in a folder that exists, got {out}")
    measure = measure_bits if metric == "bits-per-dim" else measure_samples
    report = {"metric": metric, "seed": seed} | measure(_load(checkpoint), data, num_images, seed, **options)
    if out is not None:
        with written_aside(out) as aside:
            aside.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure_bits(
    trained: Checkpoint, data: str | None, num_images: int, seed: int, split: str, num_steps: int, **_
) -> dict:
    """Print the bound of real images, term by term, and return the figures."""
    import torch

    from .data import load_images, seeded_generator, to_model_range
    from .elbo import bits_per_dim, mean_and_error

    channels, height, width = trained.image_shape
    images = load_images(data, split, height if height == width else None, channels).images
    if num_images > len(images):
        raise ValueError(f"--num-images must be at most {len(images)}, the size of the {split} split; got {num_images}")
    generator = seeded_generator(seed)
    chosen = torch.randperm(len(images), generator=generator)[: num_images or len(images)]
    x_0 = to_model_range(images[chosen]).to(trained.device)
    result = bits_per_dim(
        trained.model, trained.diffusion, x_0, generator, num_steps=num_steps or None, progress=True
    )

    first = (result.terms * (result.timesteps == 1)) @ result.weights
    middle = result.total - result.prior - first
    parts = {"total": result.total, "L_T": result.prior, "L_1_to_T-1": middle, "L_0": first}
    names = ("mean", "standard_error")
    figures = {part: dict(zip(names, mean_and_error(bits), strict=True)) for part, bits in parts.items()}
    print(f"bits/dim without labels, {len(x_0)} {split} images, {len(result.weights)} timesteps each:")
    for name, figure in figures.items():
        print(f"  {name:10s} {figure['mean']:8.4f} ± {figure['standard_error']:.4f}")
    return {"split": split, "num_images": len(x_0), "num_steps": len(result.weights), "bits_per_dim": figures}


def measure_samples(
    trained: Checkpoint, data: str | None, num_images: int, seed: int, samples: Path | None, sampler: str,
    num_inference_steps: int | None, guidance_scale: float, **_,
) -> dict:  # fmt: skip
    """Print the figures of samples beside those of as many real test images, and return them."""
    import torch

    from .data import CLASS_NAMES, load_images
    from .metrics import Classifier, compare, look

    if list(trained.class_names) != list(CLASS_NAMES) or trained.image_shape != (1, 28, 28):
        raise ValueError("--metric samples knows Fashion-MNIST only: its classifier was trained on those ten classes")
    train, test = load_images(data, "train"), load_images(data, "test")
    classifier = Classifier.from_pretrained().to(trained.device)
    if samples is not None:
        images, labels = read_samples(samples)
        made = {"samples": samples.name}
    else:
        count, least = num_images or len(test.images), classifier.num_features + 1
        if not least <= count <= len(test.images):
            raise ValueError(f"--num-images must lie in {least} … {len(test.images)} for --metric samples, got {count}")
        labels = torch.arange(count) % len(CLASS_NAMES)
        images = draw_images(trained, labels, sampler, num_inference_steps, guidance_scale, seed)
        made = {
            "sampler": sampler, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
        }  # fmt: skip
    seen = [look(pictures, classifier) for pictures in (images, train.images, test.images)]
    figures = compare(seen[0], labels, seen[1], seen[2], test.labels, seed)
    print(f"{len(images)} samples, beside as many real test images; distances to {len(train.images)} training images:")
    for name, generated in figures["generated"].items():
        print(f"  {name:26s} {generated:9.4f}   real {figures['real'][name]:9.4f}")
    print(f"  Fréchet distance over the real one: {figures['frechet_ratio']:.1f}")
    return {**made, "num_images": len(images), "num_train_images": len(train.images), **figures}


def read_samples(path: Path) -> tuple["torch.Tensor", "torch.Tensor"]:
    """The images uint8 (N, C, H, W) and labels (N,) of a FILE.npz that ``sample`` wrote."""
    import zipfile

    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a FILE.npz with images and labels: {error}") from error
    if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path} must hold uint8 images (N, C, H, W) and labels (N,), got {images.dtype} {tuple(images.shape)} "
            f"and {tuple(labels.shape)}"
        )
    return images, labels


if __name__ == "__main__":
    raise SystemExit(main())
