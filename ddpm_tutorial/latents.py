"""Latents: an autoencoder, so that the diffusion works on 4×7×7 numbers instead of 28×28 pixels (chapter 12).

The variational autoencoder of Kingma, Welling, 2013, arXiv:1312.6114, in the place that Stable Diffusion gives it
(Rombach et al., 2022, arXiv:2112.10752). The diffusion is that of all other chapters: ``training.train`` takes latents
as it takes images.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import batch_indices, seeded_generator, to_model_range
from .diffusion import check_counts, check_floats
from .elbo import normal_kl
from .files import SHIPPED_WEIGHTS, Pretrained
from .unet import Downsample, Upsample, group_norm

SHIPPED_LATENTS = SHIPPED_WEIGHTS / "latents"  # the folders autoencoder and diffusion
KL_WEIGHT = 1e-5  # of the nats of one image's KL, beside the mean squared error of its pixels


class Block(nn.Module):
    """x (B, C, H, W) → same: two 3×3 convolutions, each after GroupNorm and SiLU, added to x."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            group_norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            group_norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Autoencoder(nn.Module, Pretrained):
    """Images (B, in_channels, H, W) in [−1, 1] ↔ latents (B, latent_channels, H/4, W/4) of variance 1.

    ``posterior`` is q(z | x), ``encode`` its mean times ``scale``, ``decode`` the way back. ``scale`` is the one factor
    that gives all latents together variance 1, as 0.18215 does in Stable Diffusion; ``fit_scale`` finds it.
    """

    shipped = SHIPPED_LATENTS / "autoencoder"

    def __init__(self, in_channels: int = 1, channels: int = 32, latent_channels: int = 4, scale: float = 1.0):
        super().__init__()
        check_counts(in_channels=in_channels, channels=channels, latent_channels=latent_channels)
        if not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.in_channels, self.channels = in_channels, channels
        self.latent_channels, self.scale = latent_channels, scale
        wide = 2 * channels
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            Block(channels), Downsample(channels, wide),
            Block(wide), Downsample(wide, wide),
            group_norm(wide), nn.SiLU(), nn.Conv2d(wide, 2 * latent_channels, 3, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, wide, 3, padding=1),
            Block(wide), Upsample(wide, wide),
            Block(wide), Upsample(wide, channels),
            Block(channels), group_norm(channels), nn.SiLU(), nn.Conv2d(channels, in_channels, 3, padding=1),
        )  # fmt: skip

    @property
    def config(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels, "channels": self.channels, "latent_channels": self.latent_channels,
            "scale": self.scale,
        }  # fmt: skip

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | x), each (B, latent_channels, H/4, W/4), before the scale."""
        check_floats(x=x)
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(f"x must be (B, {self.in_channels}, H, W), H and W divisible by 4, got {tuple(x.shape)}")
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction from z = mean + standard deviation · noise, and the mean and log variance of q(z | x)."""
        mean, log_variance = self.posterior(x)
        return self.decoder(mean + (log_variance / 2).exp() * noise), mean, log_variance

    def encode(self, x: Tensor) -> Tensor:
        return self.scale * self.posterior(x)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Images in about [−1, 1]: ``data.to_uint8`` clips them."""
        return self.decoder(latents / self.scale)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """The latents of uint8 images (N, C, H, W), on the network's device."""
        device = next(self.parameters()).device
        return torch.cat([self.encode(to_model_range(part.to(device))) for part in images.split(500)])

    def fit_scale(self, images: Tensor) -> None:
        """Set ``scale`` so that the latents of these uint8 images have standard deviation 1, over all their entries."""
        self.scale /= self.encode_images(images).std().item()


def kl_to_standard(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(q(z | x) ‖ N(0, I)) of each image, in nats, eq. 12.3: (B, …) twice → (B,)."""
    zero = torch.zeros((), device=mean.device)
    return normal_kl(mean, log_variance, zero, zero).flatten(1).sum(1)


def autoencoder_loss(model: Autoencoder, x: Tensor, noise: Tensor, kl_weight: float = KL_WEIGHT) -> Tensor:
    """Mean squared error of the pixels + kl_weight · KL in nats, the mean over the batch, eq. 12.4. A bound on
    −log p(x), up to constants, where the decoder's variance is kl_weight · (number of pixels) / 2."""
    reconstruction, mean, log_variance = model(x, noise)
    return F.mse_loss(reconstruction.float(), x) + kl_weight * kl_to_standard(mean.float(), log_variance.float()).mean()


def train_autoencoder(
    model: Autoencoder,
    images: Tensor,
    num_train_steps: int,
    batch_size: int = 128,
    lr: float = 2e-3,
    kl_weight: float = KL_WEIGHT,
    seed: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """Train on uint8 ``images`` (N, C, H, W), on the network's device. Yields (step, loss). AdamW, the learning rate in
    one cycle. The model is in evaluation mode at the end; then ``fit_scale``."""
    device = next(model.parameters()).device
    images = images.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_train_steps)
    batches = batch_indices(len(images), batch_size, seed)
    size = (batch_size, model.latent_channels, images.shape[2] // 4, images.shape[3] // 4)
    generator = seeded_generator(seed, 1, device=device)
    model.train()
    for step in range(1, num_train_steps + 1):
        x = to_model_range(images[next(batches).to(device)])
        loss = autoencoder_loss(model, x, torch.randn(size, generator=generator, device=device), kl_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield step, loss.detach()
    model.eval()
