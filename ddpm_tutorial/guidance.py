"""Guidance: wrappers around a noise model, so that samplers never see labels (chapter 7)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .diffusion import GaussianDiffusion, NoiseModel, asking, holds_integers


def drop_labels(
    labels: Tensor, probability: float, null_label: int, generator: torch.Generator | None = None
) -> Tensor:
    """Each label replaced by ``null_label`` with this probability (Ho, Salimans, arXiv:2207.12598, algorithm 1); of a
    caption, all words together.

    Training so teaches one network both ε_θ(x_t, t, label) and ε_θ(x_t, t). labels (B,) → same, captions (B, L) → same;
    int64.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"the probability of dropping a label must lie in [0, 1], got {probability}")
    if not holds_integers(labels):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    device = generator.device if generator is not None else labels.device
    drop = torch.rand(labels.shape[:1], generator=generator, device=device) < probability
    return labels.long().masked_fill(drop.to(labels.device).view(-1, *[1] * (labels.ndim - 1)), null_label)


def classifier_free(model, labels: Tensor, guidance_scale: float = 1.0) -> NoiseModel:
    """The guided noise model ε_∅ + s (ε_label − ε_∅), as a function of (x_t, t) (arXiv:2207.12598, eq. 6).

    ``guidance_scale`` s = 1 is the conditional model and 0 the unconditional one, at one evaluation each; any
    other s evaluates both in one batch. The paper's w is s − 1. ``labels`` is (B,), or captions (B, L) filled up with
    the null label; ``model(x_t, t, labels)`` is a class-conditional ``NoisePredictor``.
    """
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:
        raise ValueError("classifier-free guidance needs a class-conditional model (num_classes is None)")
    _check_scale(guidance_scale)
    check_labels(labels.cpu(), num_classes, captions=True)
    labels = labels.long()
    null = torch.full_like(labels, num_classes)

    @asking(model)
    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        _check_one_an_image(labels, x_t)
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
    _check_scale(guidance_scale)

    @asking(model, diffusion=diffusion)
    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        _check_one_an_image(labels, x_t)
        with torch.enable_grad():  # samplers run without gradients
            x = x_t.detach().requires_grad_()
            log_p = classifier(x, t).log_softmax(dim=1)  # (B, num_classes)
            check_labels(labels, log_p.shape[1])
            gradient = torch.autograd.grad(log_p.gather(1, labels.long()[:, None]).sum(), x)[0]  # (B, …)
        return model(x_t, t) + guidance_scale * diffusion.noise_from_score(gradient, t)

    return guided


# ------------------------------------------------------------------------------- remedies against too much guidance
def guided_between(low: int, high: int, guided: NoiseModel, otherwise: NoiseModel) -> NoiseModel:
    """``guided`` at the timesteps low < t ≤ high, ``otherwise`` at all others (Kynkäänniemi et al., 2024,
    arXiv:2404.07724). All of a batch is at one t, as in every sampler."""
    if not low < high:
        raise ValueError(f"the interval low < t ≤ high must not be empty, got low = {low}, high = {high}")

    @asking(guided, otherwise)
    def model(x_t: Tensor, t: Tensor) -> Tensor:
        return guided(x_t, t) if low < t[0] <= high else otherwise(x_t, t)

    return model


def rescaled(guided: NoiseModel, plain: NoiseModel, diffusion: GaussianDiffusion, strength: float = 0.7) -> NoiseModel:
    """``guided`` with its x_0 brought back towards the spread of ``plain``'s, image by image: x_0 is multiplied by
    strength · std(plain x_0)/std(guided x_0) + 1 − strength (Lin et al., 2023, arXiv:2305.08891, section 3.4).
    Calls both models. A factor below 1 draws x_0 towards 0, mid-grey: a black background too."""
    if not 0 <= strength <= 1:
        raise ValueError(f"the strength of rescaling must lie in [0, 1], got {strength}")

    def spread(x_0: Tensor) -> Tensor:
        return x_0.flatten(1).std(dim=1).view(-1, *[1] * (x_0.ndim - 1))  # (B, 1, …, 1)

    @asking(guided, plain, diffusion=diffusion)
    def model(x_t: Tensor, t: Tensor) -> Tensor:
        aim, modest = (diffusion.predict_x0(x_t, t, predict(x_t, t)) for predict in (guided, plain))
        factor = strength * spread(modest) / spread(aim) + 1 - strength
        return diffusion.predict_noise(x_t, t, factor * aim)

    return model


def _check_one_an_image(labels: Tensor, x_t: Tensor) -> None:
    if labels.shape[:1] != x_t.shape[:1]:
        raise ValueError(f"labels must be ({len(x_t)},), one an image; got {tuple(labels.shape)}")


def check_labels(labels: Tensor, num_classes: int, captions: bool = False) -> None:
    """ValueError where they are not integers (B,) below ``num_classes``, or captions (B, L), which may hold the null
    label, ``num_classes``. The range is checked on the CPU only: the host would wait for a GPU."""
    wanted = "(B,) or captions (B, L)" if captions else "(B,)"
    captions = captions and labels.ndim == 2 and labels.shape[1] > 0
    if not (captions or labels.ndim == 1) or not holds_integers(labels):
        raise ValueError(f"labels must be integers {wanted}, got {labels.dtype} {tuple(labels.shape)}")
    labels, largest = labels.long(), num_classes if captions else num_classes - 1  # int8 would compare with −56 for 200
    if labels.device.type == "cpu" and labels.numel() and not 0 <= labels.min() <= labels.max() <= largest:
        raise ValueError(f"labels must lie in 0 … {largest}, got {labels.min().item()} … {labels.max().item()}")


def _check_scale(guidance_scale: float) -> None:
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
