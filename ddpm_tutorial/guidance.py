"""Guidance: wrappers around a noise model, so that samplers never see labels (chapter 7).

Also the noise-aware classifier that classifier guidance asks, and its training.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from .data import batch_indices, seeded_generator, to_model_range
from .diffusion import SHIPPED_WEIGHTS, GaussianDiffusion
from .unet import Downsample, ResidualBlock, group_norm, sinusoidal_embedding

NoiseModel = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, …), t (B,)) -> predicted noise (B, …)
SHIPPED_NOISY_CLASSIFIER = SHIPPED_WEIGHTS / "noisy_classifier"


def drop_labels(
    labels: Tensor, probability: float, null_label: int, generator: torch.Generator | None = None
) -> Tensor:
    """Each label replaced by ``null_label`` with this probability (Ho, Salimans, arXiv:2207.12598, algorithm 1).

    Training so teaches one network both ε_θ(x_t, t, label) and ε_θ(x_t, t). labels (B,) → (B,).
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"the probability of dropping a label must lie in [0, 1], got {probability}")
    device = generator.device if generator is not None else labels.device
    drop = torch.rand(labels.shape, generator=generator, device=device) < probability
    return labels.masked_fill(drop.to(labels.device), null_label)


def classifier_free(model, labels: Tensor, guidance_scale: float = 1.0) -> NoiseModel:
    """The guided noise model ε_∅ + s (ε_label − ε_∅), as a function of (x_t, t) (arXiv:2207.12598, eq. 6).

    ``guidance_scale`` s = 1 is the conditional model and 0 the unconditional one, at one evaluation each; any
    other s evaluates both in one batch. The paper's w is s − 1. ``labels`` is (B,); ``model(x_t, t, labels)`` is a
    class-conditional ``UNet``.
    """
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:
        raise ValueError("classifier-free guidance needs a class-conditional model (num_classes is None)")
    _check_labels(labels, num_classes)
    null = torch.full_like(labels, num_classes)

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        if guidance_scale in (0, 1):
            return model(x_t, t, labels if guidance_scale == 1 else null)
        both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([labels, null]))
        with_label, without = both.chunk(2)
        return without + guidance_scale * (with_label - without)

    return guided


def classifier_guidance(
    model: NoiseModel,
    classifier: Callable[[Tensor, Tensor], Tensor],
    diffusion: GaussianDiffusion,
    labels: Tensor,
    guidance_scale: float = 1.0,
) -> NoiseModel:
    """The guided noise model ε − s √(1 − ᾱ_t) ∇ log p(label | x_t) (Dhariwal, Nichol, 2021, arXiv:2105.05233, alg. 2).

    ``model(x_t, t)`` is unconditional and ``classifier(x_t, t)`` gives logits (B, num_classes) for *noisy* data, so
    that s = 1 is the conditional model where both are exact. ``labels`` is (B,). One evaluation of the model, and the
    classifier forwards and backwards.
    """

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():  # samplers run without gradients
            x = x_t.detach().requires_grad_()
            log_p = classifier(x, t).log_softmax(dim=1)  # (B, num_classes)
            _check_labels(labels, log_p.shape[1])
            gradient = torch.autograd.grad(log_p.gather(1, labels[:, None]).sum(), x)[0]  # (B, …)
        return model(x_t, t) + guidance_scale * diffusion.noise_from_score(gradient, t)

    return guided


# ------------------------------------------------------------------------------- remedies against too much guidance
def guided_between(low: int, high: int, guided: NoiseModel, otherwise: NoiseModel) -> NoiseModel:
    """``guided`` at the timesteps low < t ≤ high, ``otherwise`` at all others (Kynkäänniemi et al., 2024,
    arXiv:2404.07724, eq. 5). All of a batch is at one t, as in every sampler."""
    if not low < high:
        raise ValueError(f"the interval low < t ≤ high must not be empty, got low = {low}, high = {high}")
    return lambda x_t, t: guided(x_t, t) if low < t[0] <= high else otherwise(x_t, t)


def rescaled(guided: NoiseModel, plain: NoiseModel, diffusion: GaussianDiffusion, strength: float = 0.7) -> NoiseModel:
    """``guided`` with its x_0 brought back towards the spread of ``plain``'s, image by image: x_0 is multiplied by
    strength · std(plain x_0)/std(guided x_0) + 1 − strength (Lin et al., 2023, arXiv:2305.08891, section 3.4)."""
    if not 0 <= strength <= 1:
        raise ValueError(f"the strength of rescaling must lie in [0, 1], got {strength}")

    def spread(x_0: Tensor) -> Tensor:
        return x_0.flatten(1).std(dim=1).view(-1, *[1] * (x_0.ndim - 1))  # (B, 1, …, 1)

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        aim, modest = (diffusion.predict_x0(x_t, t, predict(x_t, t)) for predict in (guided, plain))
        factor = strength * spread(modest) / spread(aim) + 1 - strength
        return diffusion.predict_noise(x_t, t, factor * aim)

    return model


# ------------------------------------------------------------------------------------- a classifier of noisy images
class NoisyClassifier(nn.Module, PyTorchModelHubMixin, library_name="ddpm-tutorial", license="mit"):
    """p(label | x_t): noisy images (B, in_channels, H, W) and t (B,) → logits (B, num_classes).

    The way down of a small U-Net, as in Dhariwal, Nichol (section 4): 2×2 patches, one residual block at half and one
    at a quarter of the size, each told t; then the mean over positions and a linear layer.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, channels: int = 32):
        super().__init__()
        self.in_channels, self.num_classes, self.emb_channels = in_channels, num_classes, 2 * channels
        self.conv_in = nn.Conv2d(4 * in_channels, channels, 3, padding=1)
        self.fine = ResidualBlock(channels, channels, self.emb_channels)
        self.down = Downsample(channels, 2 * channels)
        self.coarse = ResidualBlock(2 * channels, 2 * channels, self.emb_channels)
        self.norm_out = group_norm(2 * channels)
        self.head = nn.Linear(2 * channels, num_classes)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        emb = sinusoidal_embedding(t, self.emb_channels)
        x = self.fine(self.conv_in(F.pixel_unshuffle(x_t, 2)), emb)  # (B, channels, H/2, W/2)
        x = self.coarse(self.down(x), emb)  # (B, 2·channels, H/4, W/4)
        return self.head(F.silu(self.norm_out(x)).mean(dim=(2, 3)))

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_name: str | Path = SHIPPED_NOISY_CLASSIFIER, **options
    ) -> "NoisyClassifier":
        """The classifier saved in a folder or on the hub (default: the shipped one), in evaluation mode."""
        with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints where it loads from
            return super().from_pretrained(str(folder_or_hub_name), strict=True, **options)


def train_noisy_classifier(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    images: Tensor,
    labels: Tensor,
    num_train_steps: int,
    batch_size: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Train ``model(x_t, t)`` on uint8 ``images`` (N, C, H, W) and ``labels`` (N,): each image noised to a t drawn
    evenly from 1 … T, and the cross-entropy of its label. Yields each step's loss.

    AdamW, the learning rate in one cycle. No image is mirrored: p(label | x_t) is that of the generator's data.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_train_steps)
    generator, batches = seeded_generator(seed, 1), batch_indices(len(images), batch_size, seed)
    model.train().to(memory_format=torch.channels_last)
    for _ in range(num_train_steps):
        index = next(batches)
        x_0 = to_model_range(images[index])
        t = torch.randint(1, diffusion.num_timesteps + 1, (batch_size,), generator=generator)
        x_t = diffusion.q_sample(x_0, t, torch.randn(x_0.shape, generator=generator))
        loss = F.cross_entropy(model(x_t.contiguous(memory_format=torch.channels_last), t), labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.detach()
    model.eval()


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"labels must lie in 0 … {num_classes - 1}, got {labels.min().item()} … {labels.max().item()}"
        )
