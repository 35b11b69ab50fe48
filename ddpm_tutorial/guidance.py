"""Guidance: wrappers around a noise model, so that samplers never see labels (chapter 7)."""

from collections.abc import Callable

import torch
from torch import Tensor

NoiseModel = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, …), t (B,)) -> predicted noise (B, …)


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
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"labels must lie in 0 … {num_classes - 1}, got {labels.min().item()} … {labels.max().item()}"
        )
    null = torch.full_like(labels, num_classes)

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        if guidance_scale in (0, 1):
            return model(x_t, t, labels if guidance_scale == 1 else null)
        both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([labels, null]))
        with_label, without = both.chunk(2)
        return without + guidance_scale * (with_label - without)

    return guided
