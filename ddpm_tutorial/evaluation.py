"""What ``ddpm-tutorial evaluate`` measures: the bound of real images; what a classifier sees in samples (chapter 8)."""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .data import CLASS_NAMES, ImageData, load_fashion_mnist, load_images, seeded_generator, to_model_range
from .elbo import bits_per_dim, mean_and_error
from .metrics import (
    Classifier,
    InceptionV3,
    Seen,
    accuracy_trained_on,
    balanced_subset,
    look,
    nearest_neighbours,
    sample_figures,
)
from .trained import Trained, draw_images, read_samples

REAL_SUBSETS = 10  # random subsets of the test set for the real floor


def measure_bits(
    trained: Trained, data: str | None, seed: int, num_images: int = 200, split: str = "test", num_steps: int = 50
) -> dict:
    """The figures of the bound of real images, term by term. FloatingPointError where they are not finite."""
    channels, height, width = trained.image_shape
    images = load_images(data, split, height if height == width else None, channels).images
    if num_images > len(images):
        raise ValueError(f"--num-images must be at most {len(images)}, the size of the {split} split; got {num_images}")
    generator = seeded_generator(seed)
    if images.shape[1:] != trained.image_shape:
        raise ValueError(f"the network draws {trained.image_shape}, the data has {tuple(images.shape[1:])}")
    chosen = torch.randperm(len(images), generator=generator)[: num_images or len(images)]
    x_0 = to_model_range(images[chosen]).to(trained.device)
    result = bits_per_dim(trained.model, trained.diffusion, x_0, generator, num_steps=num_steps or None, progress=True)

    first = (result.terms * (result.timesteps == 1)) @ result.weights
    middle = result.total - result.prior - first
    parts = {"total": result.total, "L_T": result.prior, "L_1_to_T-1": middle, "L_0": first}
    names = ("mean", "standard_error")
    figures = {part: dict(zip(names, mean_and_error(bits), strict=True)) for part, bits in parts.items()}
    if not result.total.isfinite().all():
        raise FloatingPointError("the bound is not finite: the training of this network went wrong")
    return {"split": split, "num_images": len(x_0), "num_steps": len(result.weights), "bits_per_dim": figures}


def print_bits(report: dict) -> None:
    num_images, num_steps = report["num_images"], report["num_steps"]
    print(f"bits/dim without labels, {num_images} {report['split']} images, {num_steps} timesteps each:")
    for name, figure in report["bits_per_dim"].items():
        print(f"  {name:10s} {figure['mean']:8.4f} ± {figure['standard_error']:.4f}")


def measure_samples(
    trained: Trained, data: str | None, seed: int, num_images: int = 200, samples: Path | None = None, repeats: int = 1,
    features: str = "own", sampler: str = "ddim", num_inference_steps: int | None = None, guidance_scale: float = 1.0,
    eta: float | None = None,
) -> dict:  # fmt: skip
    """The figures of samples beside those of as many real test images.

    ``repeats`` sets of samples are drawn, or made of the given ones, each of every ``repeats``-th; the real ones are
    random subsets of the test set, equally many of each class. Each figure is a mean and a standard deviation over
    the sets (over one set, for the classifier trained on them).
    """
    if list(trained.class_names) != list(CLASS_NAMES) or trained.image_shape != (1, 28, 28):
        raise ValueError("--metric samples knows Fashion-MNIST only: its classifier was trained on those ten classes")
    train, test = load_fashion_mnist("train", data), load_fashion_mnist("test", data)
    judge = _judge(features, trained.device)
    if samples is None:
        options = {"sampler": sampler, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        options["eta"] = eta
        made = options
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
        drawn = [(draw_images(trained, labels, **options, seed=seed + i), labels) for i in range(repeats)]
    else:
        sets = [slice(i, repeats * count, repeats) for i in range(repeats)]  # a file sorted by class stays balanced
        drawn = [(images[chosen], labels[chosen]) for chosen in sets]

    print(f"judging {repeats} × {count} samples and the real images beside them …", file=sys.stderr)
    reference = look(train.images, judge)

    def measure(images: Tensor, labels: Tensor) -> dict[str, float]:
        distances, _ = nearest_neighbours(images[:1000], train.images)
        figures = sample_figures(look(images, judge), labels if features == "own" else None, reference, seed)
        return figures | {"nearest_training_image": distances.median().item()}

    generated = spread([measure(*images_and_labels) for images_and_labels in drawn])
    real = of_subsets(lambda chosen: measure(test.images[chosen], test.labels[chosen]), test.labels, count, seed)
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


def spread(sets: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation of each figure over several sets; the deviation of one set is None."""
    table = {name: [figures[name] for figures in sets] for name in sets[0]}
    return {
        name: {"mean": statistics.mean(v), "deviation": statistics.stdev(v) if len(v) > 1 else None}
        for name, v in table.items()
    }


def of_subsets(figures: Callable[[Tensor], dict], labels: Tensor, count: int, seed: int) -> dict:
    """The ``spread`` of ``figures(indices)`` over random subsets of ``count`` images with these labels, classes alike:
    the figures of real images, which those of as many samples stand beside. One subset, where it takes all images."""
    number = REAL_SUBSETS if count < len(labels) else 1
    return spread([figures(balanced_subset(labels, count, seeded_generator(seed, i))) for i in range(number)])


def real_figures(test: ImageData, reference: Seen, count: int, seed: int = 0, judge: Classifier | None = None) -> dict:
    """``of_subsets`` of what a judge (default: the shipped one) sees in real test images; each image is seen once."""
    held_out = look(test.images, judge)

    def figures(chosen: Tensor) -> dict[str, float]:
        return sample_figures(Seen(*(seen[chosen] for seen in held_out)), test.labels[chosen], reference, seed)

    return of_subsets(figures, test.labels, count, seed)


def print_figures(report: dict) -> None:
    count, num_train_images = report["num_images"], report["num_train_images"]
    print(f"{count} samples, beside as many real test images; distances to {num_train_images} training images:")
    for name, figure in report["generated"].items():
        told = ["{mean:9.4f}".format(**f) + (f" ± {f['deviation']:.4f}" if f["deviation"] is not None else " " * 9)
                for f in (figure, report["real"][name])]  # fmt: skip
        print(f"  {name:24s} {told[0]}   real {told[1]}".rstrip())
    print(f"  Fréchet distance over the real one: {report['frechet_ratio']:.1f}")


METRICS = {"bits-per-dim": (measure_bits, print_bits), "samples": (measure_samples, print_figures)}
