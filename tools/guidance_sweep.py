"""Measure guidance: python tools/guidance_sweep.py [--help]. Chapter 7 shows what it writes.

Every setting of guidance draws as many images of each class from the same noise. ``ddpm_tutorial.metrics`` judges them,
and random subsets of as many real test images. Rows are written one by one: a run that was stopped goes on with the
same command.
"""

import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import torch
from measure import machine, write_json
from resumable import add_options, fingerprint, read_started, run_checked
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_tutorial.arguments import Parser
from ddpm_tutorial.data import load_fashion_mnist, seeded_generator, to_model_range
from ddpm_tutorial.diffusion import SHIPPED_WEIGHTS
from ddpm_tutorial.evaluation import of_subsets
from ddpm_tutorial.guidance import (
    NoiseModel,
    NoisyClassifier,
    classifier_free,
    classifier_guidance,
    guided_between,
    rescaled,
)
from ddpm_tutorial.metrics import Classifier, Seen, look, sample_figures
from ddpm_tutorial.sampling import ddim_timesteps, sample_dpmpp_2m, sample_images
from ddpm_tutorial.trained import Trained, load_trained

BATCH_SIZE = 100


class Setting(NamedTuple):
    """One row: the method, its scale, and at most one remedy."""

    method: str  # "classifier-free" or "classifier"
    guidance_scale: float
    interval: tuple[int, int] | None = None  # guided at low < t ≤ high only, the conditional model elsewhere
    rescale: float = 0.0
    clip: bool = True


SETTINGS = [
    *(Setting("classifier-free", scale) for scale in (1.0, 8.0, 2.0, 4.0, 0.0, 1.5)),
    *(Setting("classifier-free", 8.0, interval=pair) for pair in ((200, 600), (600, 1000), (0, 200))),
    Setting("classifier-free", 8.0, clip=False),
    Setting("classifier-free", 8.0, rescale=0.7),
    Setting("classifier-free", 4.0, interval=(200, 600)),
    *(Setting("classifier", scale) for scale in (1.0, 2.0, 4.0, 8.0)),
]


def guided_model(setting: Setting, trained: Trained, noisy_classifier: NoisyClassifier, labels: Tensor) -> NoiseModel:
    """The noise model of a setting, for these labels (B,)."""
    model, diffusion = trained.model, trained.diffusion
    conditional = classifier_free(model, labels)
    if setting.method == "classifier":
        return classifier_guidance(model, noisy_classifier, diffusion, labels, setting.guidance_scale)
    guided = classifier_free(model, labels, setting.guidance_scale)
    if setting.interval:
        return guided_between(*setting.interval, guided, conditional)
    if setting.rescale:
        return rescaled(guided, conditional, diffusion, setting.rescale)
    return guided


def draw(setting: Setting, trained: Trained, noisy_classifier, labels: Tensor, steps: int, seed: int, bar) -> Tensor:
    """An image for each label, uint8 (N, C, H, W). The first noise is the same for every setting."""
    x_T, batches = torch.randn(len(labels), *trained.image_shape, generator=seeded_generator(seed)), []
    for start, wanted in zip(x_T.split(BATCH_SIZE), labels.to(trained.device).split(BATCH_SIZE), strict=True):
        model = guided_model(setting, trained, noisy_classifier, wanted)
        options = {"num_inference_steps": steps, "clip_denoised": setting.clip, "x_T": start}
        batches.append(sample_images(sample_dpmpp_2m(model, trained.diffusion, start.shape, **options)))
        bar.update(len(start))
    return torch.cat(batches).cpu()


def variety(images: Tensor, labels: Tensor) -> float:
    """1 − the correlation of the pixels of two images of one class: the mean over pairs, then over classes. 0: one
    picture, up to brightness and contrast. uint8 images (N, C, H, W), labels (N,)."""
    found = []
    for label in labels.unique():
        pixels = images[labels == label].flatten(1).double()
        correlation = torch.corrcoef(pixels)
        others = ~torch.eye(len(pixels), dtype=torch.bool)
        found.append(1 - correlation[others].nanmean().item())  # an image of one grey has no correlation
    return statistics.mean(found)


def figures(images: Tensor, labels: Tensor, classifier: Classifier, reference: Seen, seed: int) -> dict[str, float]:
    """What the judge says of uint8 images (N, C, H, W) made for labels (N,), and what needs no judge."""
    x = to_model_range(images)
    return sample_figures(look(images, classifier), labels, reference, seed) | {
        "variety": variety(images, labels),
        "contrast": x.flatten(1).std(dim=1).mean().item(),
        "white": (images >= 250).double().mean().item(),
    }


def key(row: dict) -> Setting:
    """The setting that a row of the file belongs to."""
    values = {name: row[name] for name in Setting._fields}
    return Setting(**values | {"interval": tuple(row["interval"]) if row["interval"] else None})


def run(num_images: int, steps: int, data: str | None, seed: int, out: Path) -> None:
    trained, classifier = load_trained(None), Classifier.from_pretrained()
    trained.model.requires_grad_(False).to(memory_format=torch.channels_last)
    classifier.to(trained.device)
    train, test = load_fashion_mnist("train", data), load_fashion_mnist("test", data)
    noisy_classifier = NoisyClassifier.from_pretrained().requires_grad_(False).to(trained.device)
    fewest = test.labels.bincount().min().item()
    if not classifier.num_features < num_images <= 10 * fewest or num_images % 10:
        raise ValueError(
            f"--num-images must be a multiple of 10, above {classifier.num_features} and at most {10 * fewest} for "
            f"this data, got {num_images}"
        )
    ddim_timesteps(trained.diffusion.num_timesteps, steps)  # says what is wrong
    settings = {
        "num_images": num_images,
        "seed": seed,
        "sampler": "dpmpp-2m",
        "num_inference_steps": steps,
        "device": trained.device.type,
        "num_train_images": len(train.images),
        "num_test_images": len(test.images),
        "weights": fingerprint(SHIPPED_WEIGHTS / "model.safetensors"),
        "classifier": fingerprint(Classifier.shipped / "model.safetensors"),
        "noisy_classifier": fingerprint(NoisyClassifier.shipped / "model.safetensors"),
    }
    result = read_started(out, settings, key)
    result["command"] = (
        f"python tools/guidance_sweep.py --num-images {num_images} --num-inference-steps {steps} --data SOURCE "
        f"--seed {seed}"
    )
    result["machine"] = machine(trained.device)
    reference, labels = look(train.images, classifier), torch.arange(num_images) % 10
    if "real" not in result:

        def figures_of(chosen: Tensor) -> dict[str, float]:
            return figures(test.images[chosen], test.labels[chosen], classifier, reference, seed)

        result["real"] = of_subsets(figures_of, test.labels, num_images, seed)
        write_json(out, result)
    done = {key(row) for row in result["rows"]}
    missing = [setting for setting in SETTINGS if setting not in done]
    with tqdm(total=num_images * len(missing), unit="image", mininterval=1, disable=None) as bar:
        for setting in missing:
            images = draw(setting, trained, noisy_classifier, labels, steps, seed, bar)
            row = setting._asdict() | figures(images, labels, classifier, reference, seed)
            result["rows"].append(row)
            write_json(out, result)
            bar.write(describe(row))


def describe(row: dict) -> str:
    remedy = [f"t in {row['interval']}"] * bool(row["interval"]) + ["rescaled"] * bool(row["rescale"])
    name = " ".join([row["method"], f"{row['guidance_scale']:g}", *remedy, *["unclipped"] * (not row["clip"])])
    return (
        f"{name:34} Fréchet {row['frechet_distance']:6.2f}   label {row['label_agreement']:5.1%}   precision "
        f"{row['precision']:.2f}   recall {row['recall']:.2f}   variety {row['variety']:.2f}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="guidance_sweep.py", description="Guidance at several scales, judged beside real images.")
    parser.add_argument("--num-images", type=int, default=500, metavar="N", help="images a setting (default: 500)")
    parser.add_argument("--num-inference-steps", type=int, default=15, dest="steps", metavar="N",
                        help="steps of DPM-Solver++(2M) (default: 15)")  # fmt: skip
    add_options(parser, "guidance_sweep")
    return run_checked(parser, parser.parse_args(argv), run)


if __name__ == "__main__":
    sys.exit(main())
