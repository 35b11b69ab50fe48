"""A processor that rounds differently, for `tools/check.py portable`: IPython runs this file before a notebook's first
cell when the environment variable IPYTHONDIR names the folder above `profile_default`.

What sums many products (convolutions, matrix products, attention, norms) gets an error of up to one unit in the last
place, which depends on the value alone. So the same call gives the same result twice, as on a real machine.
"""

import torch
import torch.nn.functional as F


def _rounded(function):
    def rounded(*args, **kwargs):
        out = function(*args, **kwargs)
        if not isinstance(out, torch.Tensor) or out.dtype != torch.float32:  # torch.fx draws graphs of no tensors
            return out
        with torch.no_grad():
            up = (out.detach() * 1e5).frac().abs() > 0.5  # as good as a coin, and the same for the same value
            error = torch.where(up, torch.nextafter(out.detach(), torch.tensor(torch.inf)) - out.detach(), 0)
        return out + error

    return rounded


for name in ("conv2d", "linear", "scaled_dot_product_attention", "group_norm"):
    setattr(F, name, _rounded(getattr(F, name)))
torch.Tensor.__matmul__ = _rounded(torch.Tensor.__matmul__)
torch.cdist = _rounded(torch.cdist)
