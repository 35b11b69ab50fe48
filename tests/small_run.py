"""A training small enough for tests: what several files of them begin with."""

from collections.abc import Callable

import torch

from ddpm_tutorial.data import ImageData, load_fashion_mnist
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.settings import TrainConfig
from ddpm_tutorial.unet import UNet

CONFIG = TrainConfig(num_train_steps=8, batch_size=16, warmup_steps=2, lr=1e-3, ema_decay=0.9)


def new_model(
    seed: int = 0, target: str = "noise", schedule: str = "linear", image_size: int = 8, **options
) -> NoisePredictor:
    torch.manual_seed(seed)
    unet = UNet(**({"channels": 16, "patch_size": 2, "num_classes": 10} | options))
    return NoisePredictor(
        unet, GaussianDiffusion.from_schedule(schedule), target, (unet.in_channels, image_size, image_size)
    )


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def first_images(count: int) -> Callable[[str, str], ImageData]:
    """In the place of ``load_fashion_mnist``: only the first images of a split."""

    def load(split: str, source: str) -> ImageData:
        data = load_fashion_mnist(split, source)
        return data._replace(images=data.images[:count], labels=data.labels[:count])

    return load
