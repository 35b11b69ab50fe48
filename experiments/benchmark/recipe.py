"""How long our whole recipe and the Hugging Face notebook's take to the same held-out error: ``--recipe``."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import ddpm_tutorial
from ddpm_tutorial.data import load_fashion_mnist, seeded_generator, to_model_range
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.metrics import Classifier, frechet_distance, look
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import sample_dpmpp_2m, sample_images
from ddpm_tutorial.settings import TrainConfig
from ddpm_tutorial.training import train
from ddpm_tutorial.unet import UNet

from ..common import Table, fingerprint
from .measure import Setting, note, peer_steps, synchronise
from .peers import NotebookUNet, shipped_config


class Racer:
    """A training run that advances by slices of its own time, and its error after each."""

    def __init__(self, name: str, steps: Iterator, network: Callable[[], nn.Module], budget: float):
        self.name, self.steps, self.network, self.budget = name, steps, network, budget
        self.seconds, self.count, self.done = 0.0, 0, False
        self.curve: list[tuple[float, float]] = []

    def advance(self, until: float, device: torch.device) -> None:
        began, before = time.perf_counter(), self.seconds
        while self.seconds < until and not self.done:
            self.done = next(self.steps, self) is self
            self.count += not self.done
            synchronise(device)
            self.seconds = before + time.perf_counter() - began


def reach(curve: list[tuple[float, float]], target: float) -> float | None:
    """The first time at which the curve of (seconds, error) is at ``target``, linear between its points."""
    for (s0, e0), (s1, e1) in zip([curve[0], *curve], curve, strict=False):
        if e1 <= target:
            return s1 if e0 <= target else s0 + (s1 - s0) * (e0 - target) / (e0 - e1)
    return None


def held_out_error(images: Tensor, diffusion: GaussianDiffusion, device) -> Callable[[nn.Module], float]:
    """Mean squared noise error on the images, at stratified t and with noise that never change."""
    x_0, n = to_model_range(images), len(images)
    generator = seeded_generator(2026)
    t = (1 + (torch.arange(n) * diffusion.num_timesteps) // n)[torch.randperm(n, generator=generator)].to(device)
    noise = torch.randn(x_0.shape, generator=generator).to(device)
    x_t = diffusion.q_sample(x_0.to(device), t, noise)

    @torch.no_grad()
    def error(model: nn.Module) -> float:
        training = model.training
        model.eval()
        pairs = zip(x_t.split(100), t.split(100), noise.split(100), strict=True)
        total = sum((model(x, s) - e).square().mean(dim=(1, 2, 3)).sum() for x, s, e in pairs)
        model.train(training)
        return float(total) / n

    return error


def sample_distances(racers: list[Racer], diffusion, images: Tensor, test_images: Tensor, quick: bool) -> dict:
    """Fréchet distance to the training images of each network's samples, and of as many real images."""
    count, num_steps = (100, 2) if quick else (300, 20)
    classifier = Classifier.from_pretrained().to(images.device)
    reference, found = look(images, classifier).features, {}
    for racer in racers:
        note(f"samples of {racer.name}")
        network, parts = racer.network().eval(), []
        generator = seeded_generator(1, device=images.device)
        for _ in range(0, count, 100):
            options = {"num_inference_steps": num_steps, "generator": generator}
            parts.append(sample_images(sample_dpmpp_2m(network, diffusion, (100, 1, 28, 28), **options)))
        found[racer.name] = frechet_distance(reference, look(torch.cat(parts), classifier).features)
    found["real test images"] = frechet_distance(reference, look(test_images[:count], classifier).features)
    return {"num_images": count, "sampler": f"dpmpp-2m, {num_steps} steps", "frechet_distance": found}


def our_recipe(budget: float, name: str, diffusion, images: Tensor, seconds_per_step: float) -> Racer:
    """The package's recipe for the shipped network, in as many steps as ``budget`` seconds allow, without classes."""
    steps = max(2, round(budget / seconds_per_step))
    precision = "bf16" if images.is_cuda else "no"
    config = TrainConfig(steps, warmup_steps=min(200, steps // 20), precision=precision)
    torch.manual_seed(0)
    model = NoisePredictor(UNet(**shipped_config() | {"num_classes": None}), diffusion, "v").to(images.device)
    states, latest = train(model, images, None, config), []

    def watched() -> Iterator:
        for state in states:
            latest[:] = [state]
            yield state

    return Racer(name, watched(), lambda: latest[0].ema.module if latest else model, budget)


def recipe_benchmark(
    command: str, out: Path, device: torch.device, seconds: float = 300.0, data: str | None = None, quick: bool = False
) -> None:
    """Ours in two budgets, the whole time and a fifth of it: a schedule that ends at its budget has its best error
    there, so the shorter run shows what a fifth of the time is worth."""
    images = load_fashion_mnist("train", data).images.to(device)
    test_images = load_fashion_mnist("test", data).images[: 100 if quick else 500]
    about = {
        "seconds": seconds, "seed": 0, "num_train_images": len(images), "device": device.type,
        "network": shipped_config(), "classifier": fingerprint(Classifier.shipped),
        "ddpm_tutorial": ddpm_tutorial.__version__,
    }  # fmt: skip
    table = Table(out, command, about, [])
    if "targets" in table:
        return
    diffusion = GaussianDiffusion.from_schedule().to(device)
    error = held_out_error(test_images[: 20 if quick else None], diffusion, device)
    probe = our_recipe(1e6, "probe", diffusion, images, 1.0)
    probe.advance(1e-9, device)
    warm, count = probe.seconds, 2 if quick else 10
    for _ in range(count):
        probe.advance(probe.seconds + 1e-9, device)
    pace = (probe.seconds - warm) / count
    torch.manual_seed(0)
    net, batch = NotebookUNet(), 16 if quick else 128
    steps = peer_steps(net, diffusion, images, Setting(), batch, loss="huber", grad_clip=None)
    net.to(device)
    theirs = Racer("notebook", steps, lambda: net, seconds)
    ours = [our_recipe(seconds * share, name, diffusion, images, pace)
            for share, name in ((1, "ours, the same time"), (0.2, "ours, a fifth of the time"))]  # fmt: skip
    racers, checkpoints = [theirs, *ours], 4 if quick else 20
    for i in range(checkpoints + 1):
        note(f"checkpoint {i}/{checkpoints}")
        for racer in racers:
            racer.advance(racer.budget * i / checkpoints, device)
            racer.curve.append((round(racer.seconds, 3), round(error(racer.network()), 6)))
    for racer in ours:  # the schedule's end, where the pace was overestimated
        racer.advance(1.5 * racer.budget, device)
        racer.curve.append((round(racer.seconds, 3), round(error(racer.network()), 6)))
    targets = {}
    for share in (0.25, 0.5, 1.0):
        level = min(e for s, e in theirs.curve[1:] if s <= max(share * theirs.seconds, theirs.curve[1][0]))
        took = {racer.name: reach(racer.curve, level) for racer in racers}
        base = took["notebook"] or None  # 0: it never got better than at its start
        shares = {k: round(v / base, 4) if base and v is not None else None for k, v in took.items()}
        targets[f"{share:.0%}"] = {"error": level, "seconds": took, "share_of_notebook_time": shares}
    samples = sample_distances(racers, diffusion, images, test_images, quick)
    note("")
    table.result |= {
        "samples": samples,
        "curves": {r.name: {"steps": r.count, "seconds_and_error": r.curve} for r in racers},
        "targets": targets,
    }
    table.write()
    for racer in racers:
        print(f"{racer.name}: {racer.count} steps, held-out error {racer.curve[-1][1]:.4f}")
    print(f"Fréchet distance of {samples['num_images']} samples: {samples['frechet_distance']}")
