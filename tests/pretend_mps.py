"""A device that is not there, with the rules of Apple's "mps": its tensors compute on the CPU.

It goes by the name "meta", which torch has everywhere (and "mps" on a Mac only)."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")
MAY_MIX = {"aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put_"}  # take tensors of two devices


class OnDevice(Tensor):
    """A tensor on the device; ``inner`` is what it holds."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __repr__(self, **_) -> str:
        return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class PretendMPS(TorchDispatchMode):
    """With this, ``torch.zeros(2, device=DEVICE)`` and ``x.to(DEVICE)`` work. Errors are those of the real one: float64
    on the device is a TypeError, and an operation on tensors of both devices a RuntimeError. ``waits`` has the
    operations for which a host would wait: reading a value, and copying between the two."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = run(function, args, kwargs or {})
        given, made = next(iter(args), None), isinstance(out, Tensor | int | float)
        if isinstance(given, Tensor) and made and isinstance(given, OnDevice) != isinstance(out, OnDevice):
            self.waits.append(function._schema.name)
        return out


def run(function, args, kwargs):
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [value for value in tensors if isinstance(value, OnDevice)]
    name = function._schema.name
    wanted = kwargs.get("device")
    to_device = bool(there) if wanted is None else torch.device(wanted) == DEVICE
    if there and name not in MAY_MIX and any(value.ndim and not isinstance(value, OnDevice) for value in tensors):
        raise RuntimeError(f"{name}: expected all tensors on one device, found the pretended one and cpu")
    kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
    cast = kwargs.get("dtype") == torch.float64 and any(value.dtype != torch.float64 for value in there)
    if cast or (to_device and kwargs.get("dtype") == torch.float64):  # .to("cpu", float64) casts before it copies
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    inner_args, inner_kwargs = tree_map_only(OnDevice, lambda value: value.inner, (args, kwargs))
    out = function(*inner_args, **inner_kwargs)
    if name.endswith("_"):
        return args[0] if function._schema.returns else None
    if not to_device:
        return out
    if any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in tree_flatten(out)[0]):
        raise TypeError(f"{name} makes float64, which the MPS framework doesn't support")
    return tree_map_only(Tensor, OnDevice, out)
