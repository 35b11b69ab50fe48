"""Measure chapter 9's editing on real test images and write editing.json into the package's results:

    python tools/editing_figures.py

Half-known images are completed with and without going back and forth; image-to-image changes a garment's class at
several strengths. Each figure is written as soon as it is known, and a second call goes on from there.
"""

import argparse
import json
import platform
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_tutorial.checkpoint import written_aside
from ddpm_tutorial.data import load_fashion_mnist, seeded_generator, to_model_range, to_uint8
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.editing import keep_known, resample
from ddpm_tutorial.guidance import classifier_free
from ddpm_tutorial.metrics import Classifier, label_agreement, look
from ddpm_tutorial.results import RESULTS_FOLDER
from ddpm_tutorial.sampling import sample_ddim
from ddpm_tutorial.unet import UNet

OUT = RESULTS_FOLDER / "editing.json"
# with the true label or without, steps, eta, loops
COMPLETIONS = [
    (False, 25, 0.0, 1), (False, 25, 1.0, 1), (False, 25, 1.0, 2), (False, 25, 1.0, 5), (False, 125, 1.0, 1),
    (True, 25, 1.0, 1), (True, 25, 1.0, 5),
]  # fmt: skip
CHANGES = {(0, 3): "T-shirt to dress", (7, 9): "sneaker to ankle boot"}
STRENGTHS = [0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0]


class Measure:
    def __init__(self, num_images: int):
        self.model, self.diffusion = UNet.from_pretrained(), GaussianDiffusion.from_pretrained()
        self.judge, test = Classifier.from_pretrained(), load_fashion_mnist("test", source="sample")
        chosen = torch.randperm(len(test.images), generator=seeded_generator(0))[:num_images]
        self.x_0, self.labels = to_model_range(test.images[chosen]), test.labels[chosen]
        self.all, self.all_labels = to_model_range(test.images), test.labels
        self.mask = torch.zeros(1, 1, 28, 28, dtype=torch.bool)
        self.mask[..., :14] = True  # the left half is known

    def agreement(self, x: Tensor, labels: Tensor) -> float:
        return label_agreement(look(to_uint8(x), self.judge).logits, labels)

    def figures_of(self, x: Tensor) -> dict:
        seam = (x[..., 14] - x[..., 13]).abs().mean().item()
        error = (x - self.x_0)[..., 14:].square().mean().sqrt().item()
        return {"label_agreement": self.agreement(x, self.labels), "seam": seam, "error": error}

    def completion(self, with_label: bool, steps: int, eta: float, loops: int) -> dict:
        model = classifier_free(self.model, self.labels) if with_label else self.model
        model = keep_known(model, self.diffusion, self.x_0, self.mask)
        generator, shape = seeded_generator(1), self.x_0.shape
        sampler = partial(
            sample_ddim, model, self.diffusion, shape, num_inference_steps=steps, eta=eta, generator=generator
        )
        x_T = torch.randn(shape, generator=generator)
        walk = resample(sampler, self.diffusion, x_T, num_loops=loops, generator=generator)
        for step in tqdm(walk, total=steps * loops, desc=f"{steps} steps, eta {eta:g}, {loops} loops", mininterval=5):
            last = step
        return self.figures_of(last.x_t.clamp(-1, 1))

    def change(self, old: int, new: int, strength: float) -> dict:
        x_0 = self.all[self.all_labels == old][: len(self.x_0) // 4]
        start, generator = round(strength * self.diffusion.num_timesteps), seeded_generator(2)
        x_start = self.diffusion.q_sample(x_0, start, torch.randn(x_0.shape, generator=generator))
        labels = torch.full((len(x_0),), new)
        *_, last = sample_ddim(
            classifier_free(self.model, labels, 2.0), self.diffusion, x_0.shape, x_T=x_start, start=start,
            num_inference_steps=20,
        )  # fmt: skip
        pairs = torch.stack([x_0.flatten(1), last.x_t.flatten(1)], dim=1)  # (N, 2, pixels)
        similarity = sum(torch.corrcoef(pair)[0, 1].item() for pair in pairs) / len(pairs)
        return {"label_agreement": self.agreement(last.x_t, labels), "similarity": similarity}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--num-images", type=int, default=100,
        help="images to complete, and a quarter of that of each class to change (default: 100)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT, help="(default: the package's results)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    measure = Measure(options.num_images)
    report = {
        "command": f"python tools/editing_figures.py --num-images {options.num_images}",
        "machine": f"{platform.machine()}, one CPU core, torch {torch.__version__.split('+')[0]}",
        "num_images": options.num_images, "seed": [0, 1, 2], "real": measure.figures_of(measure.x_0), "rows": [],
    }  # fmt: skip
    if options.out.exists():
        before = json.loads(options.out.read_text())
        if all(before[name] == report[name] for name in ("command", "real")):
            report = before
    jobs = [("completion", dict(zip(("with_label", "steps", "eta", "loops"), c, strict=True))) for c in COMPLETIONS]
    jobs += [("change", {"old": old, "new": new, "strength": s}) for old, new in CHANGES for s in STRENGTHS]
    for kind, settings in jobs:
        row = {"kind": kind} | settings
        if not any(row.items() <= done.items() for done in report["rows"]):
            report["rows"].append(row | getattr(measure, kind)(**settings))
            with written_aside(options.out) as aside:
                aside.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
