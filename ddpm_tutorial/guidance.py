"""Guidance: wrappers around a noise model, so that samplers never see labels (chapter 7).

Also a classifier of noisy images that classifier guidance can ask.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .diffusion import GaussianDiffusion

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
class GaussianClassifier:
    """p(label | x_t) at every t, where each class is taken for a Gaussian and all have one covariance C: then
    x_t | label ~ N(√ᾱ_t m_label, ᾱ_t C + (1 − ᾱ_t) I), and Bayes' rule does the rest (linear discriminant analysis).

    ``images`` (N, …) float and ``labels`` (N,) give the means, C and the classes' frequencies; ``shrinkage`` is added
    to C's diagonal. Called with x_t (B, …) and t (B,) it gives log p(label, x_t) up to a constant, (B, num_classes).
    """

    def __init__(self, diffusion: GaussianDiffusion, images: Tensor, labels: Tensor, shrinkage: float = 0.01):
        counts = labels.bincount()
        if not counts.all():
            raise ValueError(f"each class needs at least one image, got {counts.tolist()}")
        x = images.flatten(1)
        means = torch.stack([x[labels == k].mean(dim=0) for k in range(len(counts))])  # (K, D)
        offsets = x - means[labels]
        variances, self.axes = torch.linalg.eigh(offsets.T @ offsets / len(x))  # C = axes · diag(variances) · axesᵀ
        self.variances, self.means = variances.clamp(min=0) + shrinkage, means @ self.axes
        self.diffusion, self.log_frequency = diffusion, (counts / len(x)).log()

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        x = x_t.flatten(1) @ self.axes  # along the axes of C the noisy classes' covariance is diagonal at every t
        alpha_bar_t = self.diffusion.at(self.diffusion.alphas_cumprod, t, x)  # (B, 1)
        precision = 1 / (alpha_bar_t * self.variances + 1 - alpha_bar_t)  # (B, D)
        offsets = x[:, None] - alpha_bar_t.sqrt()[..., None] * self.means  # (B, K, D)
        return self.log_frequency - 0.5 * (offsets**2 * precision[:, None]).sum(dim=2)


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"labels must lie in 0 … {num_classes - 1}, got {labels.min().item()} … {labels.max().item()}"
        )
