"""Losses on the predicted noise (chapters 3 and 5)."""

import torch.nn.functional as F
from torch import Tensor

LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}


def noise_loss(pred_noise: Tensor, noise: Tensor, kind: str = "l2") -> Tensor:
    """Mean over every element of |ε − ε_θ|² ("l2", L_simple, DDPM eq. 14), |ε − ε_θ| ("l1"), or Huber's loss with
    its corner at 1 ("huber", quadratic inside, linear outside). Equal shapes in, a scalar out.
    """
    if kind not in LOSSES:
        raise ValueError(f"unknown loss {kind!r}; the known ones are {', '.join(LOSSES)}")
    if pred_noise.shape != noise.shape:
        raise ValueError(
            f"prediction and noise must have one shape, got {tuple(pred_noise.shape)} and {tuple(noise.shape)}"
        )
    return LOSSES[kind](pred_noise, noise)
