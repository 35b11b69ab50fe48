"""Muon, an optimiser for matrices, and which weights it moves (chapter 5).

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, kellerjordan.github.io/posts/muon.
"""

import math

import torch
from torch import Tensor, nn

from .settings import TrainConfig
from .unet import UNet

MUON_MOMENTUM = 0.95
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # Jordan's c₁, c₃, c₅: steep at 0, so five iterations are enough


class Muon(torch.optim.Optimizer):
    """Momentum SGD whose step is made orthogonal: W ← W − lr · 0.2 √(longer side) · orthogonal(momentum), eq. 5.5.

    Every direction of a matrix moves as much as every other, where the gradient alone moves a few. A convolution's
    weight (out, in, 3, 3) is the matrix out × (in · 9). The factor gives an entry of the step Adam's usual size, so
    Adam's learning rates fit (Liu et al., 2025, arXiv:2502.16982, eq. 4). Parameters have two dimensions or more.

    A step is left out where the tensor ``found_inf`` is 1, which torch's fused optimisers read, too.
    """

    def __init__(self, params, lr: float, momentum: float = MUON_MOMENTUM):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for weights in same_shape(group["params"]):
                for weight in weights:
                    if not self.state[weight]:
                        self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                means = [self.state[weight]["momentum_buffer"] for weight in weights]
                mean, gradient = torch.stack(means), torch.stack([weight.grad for weight in weights])
                new_mean = mean.lerp(gradient, 1 - group["momentum"])
                ahead = gradient.lerp(new_mean, group["momentum"])  # Nesterov's
                matrix = ahead.flatten(2)  # (weights, out, rest)
                step = 0.2 * math.sqrt(max(matrix.shape[1:])) * orthogonal(matrix).view_as(ahead)
                if found_inf is not None:
                    step, new_mean = step.masked_fill(found_inf > 0, 0), mean.where(found_inf > 0, new_mean)
                torch._foreach_sub_(weights, (group["lr"] * step).unbind())
                torch._foreach_copy_(means, new_mean.unbind())


def same_shape(weights: list[Tensor]) -> list[list[Tensor]]:
    """The weights, those of one shape together: one product of stacked matrices is faster than many small ones."""
    found = {}
    for weight in weights:
        found.setdefault(weight.shape, []).append(weight)
    return list(found.values())


def orthogonal(matrix: Tensor) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ, (…, M, N), nearly: its singular values go to 0.7 … 1.2. Each of five steps of
    Newton and Schulz takes every singular value g to c₁ g + c₃ g³ + c₅ g⁵, by products of matrices alone (eq. 5.6)."""
    c1, c3, c5 = NEWTON_SCHULZ
    x = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    for _ in range(5):
        gram = wide @ wide.mT
        wide = c1 * wide + (c3 * gram + c5 * gram @ gram) @ wide
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT


def hidden_matrices(unet: UNet) -> list[nn.Parameter]:
    """The weights that Muon moves: all convolutions and linear layers but the first and the last, and those that read
    the time and the label. Adam moves these, and all biases and scales of norms."""
    last = unet.conv_out if unet.head is None else unet.head.conv_out
    outer = {unet.conv_in.weight, last.weight, *unet.time_mlp.parameters()}
    if unet.label_emb is not None:
        outer.add(unet.label_emb.weight)
    return [weight for weight in unet.parameters() if weight.ndim > 1 and weight not in outer]


def make_optimizers(unet: UNet, config: TrainConfig, fused: bool | None) -> list[torch.optim.Optimizer]:
    """Adam for all, or Muon for the ``hidden_matrices`` and Adam for the rest. ``fused`` is Adam's."""
    inner = hidden_matrices(unet) if config.optimizer == "muon" else []
    chosen = set(inner)
    rest = [weight for weight in unet.parameters() if weight not in chosen]
    lr, cuda = config.lr, rest[0].is_cuda
    if cuda:  # there the rate lies on the GPU too, so that a step can be recorded
        lr = torch.tensor(lr, device=rest[0].device)
    adam = torch.optim.Adam(rest, lr=lr, fused=fused, capturable=cuda)
    return [Muon(inner, lr), adam] if inner else [adam]
