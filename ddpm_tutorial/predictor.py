"""What is trained, and what a checkpoint is: a network, what its output means, and its diffusion (chapters 3 and 4)."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .diffusion import GaussianDiffusion, check_counts
from .files import SHIPPED_WEIGHTS, Pretrained, filled
from .settings import TARGETS
from .unet import UNet


class NoisePredictor(nn.Module, Pretrained):
    """ε_θ(x_t, t, label): noisy images (B, C, H, W), t (B,), labels (B,) → the predicted noise, same shape.

    ``target`` is what the output of ``unet`` stands for: "noise", "v", "x_0" or "velocity"; the formulas of chapters
    3 and 10 make noise of it. From v, ε = √(1 − ᾱ_t) x_t + √ᾱ_t v (4.8): at large t, where x_t is nearly all noise,
    only a rest is left to the network. It keeps the ``diffusion`` that it is trained with, so that samplers refuse
    another, and what it draws: ``image_shape`` (C, H, W), 28×28 unless told, and ``class_names``, numbers unless told
    (() without labels).
    """

    shipped = SHIPPED_WEIGHTS

    def __init__(
        self,
        unet: UNet,
        diffusion: GaussianDiffusion,
        target: str = "noise",
        image_shape: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
    ):
        super().__init__()
        num_classes = unet.num_classes or 0
        image_shape = (unet.in_channels, 28, 28) if image_shape is None else tuple(image_shape)
        if isinstance(class_names, str):  # a text is a sequence of texts, too
            raise ValueError(f"class_names must be a list of texts, got one: {class_names!r}")
        class_names = tuple(map(str, range(num_classes)) if class_names is None else class_names)
        if target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
        if len(image_shape) != 3 or image_shape[0] != unet.in_channels:
            raise ValueError(f"image_shape must be ({unet.in_channels}, H, W), as the U-Net's, got {image_shape}")
        check_counts(**{f"image_shape[{i}]": size for i, size in enumerate(image_shape)})
        if len(class_names) != num_classes:
            raise ValueError(f"the U-Net has {num_classes} classes, and class_names are {len(class_names)}")
        if not all(isinstance(name, str) for name in class_names) or len(set(class_names)) < num_classes:
            raise ValueError(f"class_names must be texts, no two alike, got {', '.join(map(repr, class_names))}")
        self.unet, self.diffusion, self.target = unet, diffusion, target
        self.image_shape, self.class_names, self.num_classes = image_shape, class_names, unet.num_classes

    @property
    def device(self) -> torch.device:
        return self.diffusion.betas.device

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Without labels, the network's answer for the null label."""
        self.diffusion.check_timesteps(t, x_t)
        return self.to_noise(self.unet(x_t, t, labels), x_t, t)

    def to_noise(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that the network's output stands for. Shapes (B, …), t (B,)."""
        if self.target == "v":
            return self.diffusion.noise_from_v(x_t, t, output)
        if self.target == "velocity":
            return self.diffusion.noise_from_velocity(x_t, t, output)
        return output if self.target == "noise" else self.diffusion.predict_noise(x_t, t, output)

    def wanted(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network's output should be where x_t is x_0 with this noise: what training compares it with."""
        if self.target == "v":
            return self.diffusion.predict_v(x_0, t, noise)
        if self.target == "velocity":
            return noise - x_0
        return noise if self.target == "noise" else x_0

    # ------------------------------------------------------------------------------------- its two files
    def contents(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = {
            "unet": self.unet.config, "target": self.target,
            "image_shape": list(self.image_shape), "class_names": list(self.class_names),
        }  # fmt: skip
        return config, {**self.unet.state_dict(), "betas": self.diffusion.exact_betas}

    @classmethod
    def of_contents(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> "NoisePredictor":
        if "channel_mults" in config:
            raise ValueError("it is of an earlier version, whose U-Net was another one: train it again")
        tensors, config = dict(tensors), dict(config)
        betas = tensors.pop("betas")
        if betas.dtype != torch.float64:  # rounded, they are another schedule
            raise ValueError(f"betas must be float64, got {betas.dtype}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a schedule that never reaches noise: that was told when it was trained
            diffusion = GaussianDiffusion(betas)
        return cls(filled(UNet(**config.pop("unet")), tensors), diffusion, **config)
