"""``ddpm-tutorial evaluate``: the bound of real images; what a classifier sees in samples (chapters 2 and 8)."""

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..data import CLASS_NAMES, load_fashion_mnist, load_images, seeded_generator, to_model_range
from ..drawing import draw_images, read_samples
from ..elbo import bits_per_dim, mean_and_error
from ..files import check_writable, written_aside
from ..metrics import (
    Classifier,
    InceptionV3,
    accuracy_trained_on,
    balanced_subset,
    look,
    nearest_figures,
    of_subsets,
    sample_figures,
    spread,
)
from ..predictor import NoisePredictor
from ..training import processes


def run(
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
    if out is not None:
        check_writable(out)
    measure, show = METRICS[metric]
    model = NoisePredictor.from_pretrained(checkpoint).to(processes().device)
    report = {"metric": metric, "seed": seed} | measure(model, data, seed, **options)
    if out is not None:  # before anything is printed: the figures took time
        with written_aside(out) as aside:
            aside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)
    return 0


def measure_bits(
    model: NoisePredictor, data: str | None, seed: int, num_images: int = 200, split: str = "test", num_steps: int = 50
) -> dict:
    """The figures of the bound of real images, term by term. FloatingPointError where they are not finite."""
    channels, height, width = model.image_shape
    images = load_images(data, split, height if height == width else None, channels).images
    if num_images > len(images):
        raise ValueError(f"--num-images must be at most {len(images)}, the size of the {split} split; got {num_images}")
    generator = seeded_generator(seed)
    if images.shape[1:] != model.image_shape:
        raise ValueError(f"the network draws {model.image_shape}, the data has {tuple(images.shape[1:])}")
    chosen = torch.randperm(len(images), generator=generator)[: num_images or len(images)]
    x_0 = to_model_range(images[chosen]).to(model.device)
    result = bits_per_dim(model, model.diffusion, x_0, generator, num_steps=num_steps or None, progress=True)

    first = (result.terms * (result.timesteps == 1)) @ result.weights
    middle = result.total - result.prior - first
    parts = {"total": result.total, "L_T": result.prior, "L_1_to_T-1": middle, "L_0": first}
    figures = {}
    for part, bits in parts.items():
        mean, error = mean_and_error(bits)
        figures[part] = {"mean": mean, "standard_error": error if math.isfinite(error) else None}  # one image has none
    if not result.total.isfinite().all():
        raise FloatingPointError("the bound is not finite: the training of this network went wrong")
    return {"split": split, "num_images": len(x_0), "num_steps": len(result.weights), "bits_per_dim": figures}


def print_bits(report: dict) -> None:
    num_images, num_steps = report["num_images"], report["num_steps"]
    print(f"bits/dim without labels, {num_images} {report['split']} images, {num_steps} timesteps each:")
    for name, figure in report["bits_per_dim"].items():
        error = figure["standard_error"]
        print(f"  {name:10s} {figure['mean']:8.4f}" + ("" if error is None else f" ± {error:.4f}"))


def measure_samples(
    model: NoisePredictor, data: str | None, seed: int, num_images: int = 200, samples: Path | None = None,
    repeats: int = 1, features: str = "own", **sampling,
) -> dict:  # fmt: skip
    """The figures of samples beside those of as many real test images.

    ``repeats`` sets of samples are drawn, with the options of ``drawing.draw_images``, or made of the given ones; the
    real ones are random subsets of the test set. Each set has as many of each class as there are. Each figure is a mean
    and a standard deviation over the sets (over one set, for the classifier trained on them).
    """
    if list(model.class_names) != list(CLASS_NAMES) or model.image_shape != (1, 28, 28):
        raise ValueError("--metric samples knows Fashion-MNIST only: its classifier was trained on those ten classes")
    train, test = load_fashion_mnist("train", data), load_fashion_mnist("test", data)
    judge = _judge(features, model.device)
    if samples is None:
        made = {"sampler": "ddim", "num_inference_steps": None, "guidance_scale": 1.0, "eta": None, "spacing": None}
        made |= sampling
        count = num_images or len(test.images)
    else:
        made, (images, labels) = {"samples": samples.name}, read_samples(samples)
        _check_samples(samples, images, labels)
        count = len(images) // repeats
    least = judge.num_features + 1
    if not least <= count <= len(test.images):
        raise ValueError(f"between {least} and {len(test.images)} images can be judged beside this data, got {count}")
    if samples is None:
        labels = torch.arange(count) % len(CLASS_NAMES)
        drawn = [(draw_images(model, labels, **made, seed=seed + i), labels) for i in range(repeats)]
    else:
        order = labels.argsort(stable=True)  # every set gets as many of each class
        sets = [order[i::repeats][:count].sort().values for i in range(repeats)]
        drawn = [(images[chosen], labels[chosen]) for chosen in sets]

    print(f"judging {repeats} × {count} samples and the real images beside them …", file=sys.stderr)
    reference = look(train.images, judge)

    def measure(images: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
        figures = sample_figures(look(images, judge), labels if features == "own" else None, reference, seed)
        return figures | nearest_figures(images, train.images, seed)

    generated = spread([measure(*images_and_labels, seed + i) for i, images_and_labels in enumerate(drawn)])
    real = of_subsets(
        lambda chosen, seed: measure(test.images[chosen], test.labels[chosen], seed), test.labels, count, seed
    )
    others = balanced_subset(train.labels, count, seeded_generator(seed, 0))
    for figures, images, labels in (generated, *drawn[0]), (real, train.images[others], train.labels[others]):
        accuracy = accuracy_trained_on(images, labels, test.images, test.labels)
        figures["accuracy_trained_on"] = {"mean": accuracy, "deviation": None}
    ratio = generated["frechet_distance"]["mean"] / real["frechet_distance"]["mean"]
    sizes = {"features": features, "num_images": count, "repeats": len(drawn), "num_train_images": len(train.images)}
    return made | sizes | {"generated": generated, "real": real, "frechet_ratio": ratio}


def _judge(features: str, device: torch.device) -> Classifier | InceptionV3:
    if features == "own":
        return Classifier.from_pretrained().to(device)
    try:
        return InceptionV3(device)
    except OSError as error:
        raise ConnectionError(
            f"the weights of Inception-v3, which torch-fidelity downloads, could not be had ({error}); --features own "
            "needs no network"
        ) from error


def _check_samples(path: Path, images: Tensor, labels: Tensor) -> None:
    if images.shape[1:] != (1, 28, 28):
        raise ValueError(f"{path} must hold grey images of 28×28, (N, 1, 28, 28), got {tuple(images.shape)}")
    found = set(labels.tolist())
    if not found <= set(range(len(CLASS_NAMES))):
        raise ValueError(f"the labels in {path} must be 0 … {len(CLASS_NAMES) - 1}, got {min(found)} … {max(found)}")
    if missing := [name for k, name in enumerate(CLASS_NAMES) if k not in found]:
        raise ValueError(
            f"{path} must hold all ten classes, as the real images beside it do: missing is {', '.join(missing)}"
        )


def print_figures(report: dict) -> None:
    count, num_train_images = report["num_images"], report["num_train_images"]
    print(f"{count} samples, beside as many real test images; distances to {num_train_images} training images:")
    for name, figure in report["generated"].items():
        told = ["{mean:9.4f}".format(**f) + (f" ± {f['deviation']:.4f}" if f["deviation"] is not None else " " * 9)
                for f in (figure, report["real"][name])]  # fmt: skip
        print(f"  {name:24s} {told[0]}   real {told[1]}".rstrip())
    print(f"  Fréchet distance over the real one: {report['frechet_ratio']:.1f}")


METRICS = {"bits-per-dim": (measure_bits, print_bits), "samples": (measure_samples, print_figures)}
