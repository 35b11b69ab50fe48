"""The networks that the benchmark compares with ours, and the width at which each costs as much as ours does.

``NotebookUNet`` is our own reading of the network in Hugging Face's "The Annotated Diffusion Model" (N. Rogge,
K. Rasul, 2022), written from its description for this comparison.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_tutorial.files import SHIPPED_WEIGHTS
from ddpm_tutorial.unet import UNet, sinusoidal_embedding

IMAGE = (1, 28, 28)
SHIPPED = "ours (shipped)"


# ------------------------------------------------------------------------------------- the notebook's network
class StandardizedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1 (Qiao et al., 2019, arXiv:1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) * (variance + 1e-5).rsqrt()
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class NotebookBlock(nn.Module):
    """Twice convolution, GroupNorm, SiLU; the time scales and shifts the first norm; a residual connection."""

    def __init__(self, width_in: int, width: int, time_width: int):
        super().__init__()
        self.time = nn.Linear(time_width, 2 * width)
        self.conv1 = StandardizedConv2d(width_in, width, 3, padding=1)
        self.conv2 = StandardizedConv2d(width, width, 3, padding=1)
        self.norm1, self.norm2 = (nn.GroupNorm(math.gcd(4, width), width) for _ in range(2))
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = rearrange(self.time(F.silu(time)), "b (two c) -> two b c 1 1", two=2)
        h = F.silu(self.norm1(self.conv1(x)) * (scale + 1) + shift)
        return self.shortcut(x) + F.silu(self.norm2(self.conv2(h)))


class NotebookAttention(nn.Module):
    """A residual branch: one-group norm, then linear or full attention with 4 heads of 32 channels."""

    def __init__(self, width: int, linear: bool, heads: int = 4, head_width: int = 32):
        super().__init__()
        self.linear, self.heads, self.scale = linear, heads, head_width**-0.5
        self.norm = nn.GroupNorm(1, width)
        self.to_qkv = nn.Conv2d(width, 3 * heads * head_width, 1, bias=False)
        self.to_out = nn.Conv2d(heads * head_width, width, 1)
        self.norm_out = nn.GroupNorm(1, width) if linear else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        qkv = self.to_qkv(self.norm(x))
        q, k, v = rearrange(qkv, "b (three heads d) h w -> three b heads d (h w)", three=3, heads=self.heads)
        if self.linear:
            context = einsum(k.softmax(dim=-1), v, "b heads d n, b heads e n -> b heads d e")
            out = einsum(context, q.softmax(dim=-2) * self.scale, "b heads d e, b heads d n -> b heads e n")
        else:
            weights = einsum(q * self.scale, k, "b heads d i, b heads d j -> b heads i j").softmax(dim=-1)
            out = einsum(weights, v, "b heads i j, b heads d j -> b heads d i")
        out = rearrange(out, "b heads d (h w) -> b (heads d) h w", h=height)
        return x + self.norm_out(self.to_out(out))


class Unshuffle(nn.Sequential):
    """Half the size: 2×2 pixels into channels, then a 1×1 convolution."""

    def __init__(self, width_in: int, width: int):
        super().__init__(nn.PixelUnshuffle(2), nn.Conv2d(4 * width_in, width, 1))


class NotebookUNet(nn.Module):
    """(B, 1, 28, 28), t (B,) → the predicted noise. Each level: two blocks, linear attention, a change of size."""

    def __init__(self, width: int = 28, mults: tuple[int, ...] = (1, 2, 4), channels: int = 1):
        super().__init__()
        widths = [width, *(width * mult for mult in mults)]
        self.width, time_width = width, 4 * width
        self.time_mlp = nn.Sequential(nn.Linear(width, time_width), nn.GELU(), nn.Linear(time_width, time_width))
        self.conv_in = nn.Conv2d(channels, width, 1)

        def level(a: int, b: int, resize: nn.Module) -> nn.ModuleList:
            blocks = [NotebookBlock(a, b, time_width), NotebookBlock(a, b, time_width)]
            return nn.ModuleList([*blocks, NotebookAttention(b, linear=True), resize])

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            coarsest, finest = i == len(mults) - 1, i == 0
            self.down.append(level(a, a, nn.Conv2d(a, b, 3, padding=1) if coarsest else Unshuffle(a, b)))
            grow = [] if finest else [nn.Upsample(scale_factor=2, mode="nearest")]
            self.up.insert(0, level(b + a, b, nn.Sequential(*grow, nn.Conv2d(b, a, 3, padding=1))))
        last = widths[-1]
        self.middle1, self.middle2 = NotebookBlock(last, last, time_width), NotebookBlock(last, last, time_width)
        self.attention = NotebookAttention(last, linear=False)
        self.block_out = NotebookBlock(2 * width, width, time_width)
        self.conv_out = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time_mlp(sinusoidal_embedding(t, self.width))
        x = first = self.conv_in(x)
        skips = []
        for block1, block2, attention, resize in self.down:
            skips.append(x := block1(x, time))
            skips.append(x := attention(block2(x, time)))
            x = resize(x)
        x = self.middle2(self.attention(self.middle1(x, time)), time)
        for block1, block2, attention, resize in self.up:
            x = block1(torch.cat([x, skips.pop()], dim=1), time)
            x = resize(attention(block2(torch.cat([x, skips.pop()], dim=1), time)))
        return self.conv_out(self.block_out(torch.cat([x, first], dim=1), time))


# --------------------------------------------------------------------------------------------- the candidates
class Diffusers(nn.Module):
    """``UNet2DModel`` as a module of (x, t) that returns a tensor."""

    def __init__(self, width: int):
        from diffusers import UNet2DModel

        super().__init__()
        self.net = UNet2DModel(
            sample_size=28,
            in_channels=1,
            out_channels=1,
            block_out_channels=(width, 2 * width, 4 * width),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            norm_num_groups=math.gcd(8, width),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t, return_dict=False)[0]


def lucidrains(width: int) -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    return Unet(dim=width, dim_mults=(1, 2, 4), channels=1)


# What builds each peer, its default width, and what the default is.
PEERS = {
    "diffusers": (Diffusers, 32, "UNet2DModel, widths 32-64-128, two layers a block, attention at 7×7"),
    "lucidrains": (lucidrains, 28, "denoising_diffusion_pytorch.Unet(dim=28, dim_mults=(1, 2, 4), channels=1)"),
    "notebook": (NotebookUNet, 28, "The Annotated Diffusion Model's network, dim 28, our reading of it"),
}


@dataclass(frozen=True)
class Candidate:
    """A network to measure, a module of (x, t). ``kind``: default, operations or parameters (what is matched)."""

    name: str
    family: str
    kind: str
    width: int

    def build(self) -> nn.Module:
        if self.family == "ours":
            return shipped_unet() if self.name == SHIPPED else wide_unet()
        return PEERS[self.family][0](self.width)


def shipped_config() -> dict:
    """What the shipped U-Net is built with."""
    return json.loads((SHIPPED_WEIGHTS / "config.json").read_text(encoding="utf-8"))["unet"]


def shipped_unet() -> UNet:
    return UNet(**shipped_config())


def wide_unet() -> UNet:
    return UNet(channels=64, patch_size=2, num_classes=10)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def operations(model: nn.Module, shape: tuple[int, ...] = IMAGE) -> int:
    """Floating-point operations of one evaluation of one image. Counted on the CPU (the meta device takes twice as
    long)."""
    return operations_of(lambda: model(torch.zeros(1, *shape), torch.ones(1, dtype=torch.long)))


def operations_of(call: Callable[[], object]) -> int:
    """Floating-point operations of a call: matrix products, convolutions and attention."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@cache
def matched_width(peer: str, kind: str) -> int:
    """The even width at which the peer is nearest to our shipped U-Net in "operations" or "parameters"."""
    make, default, _ = PEERS[peer]

    @cache
    def size(width: int) -> int:
        model = make(width) if width else shipped_unet()  # width 0: ours
        return parameters(model) if kind == "parameters" else operations(model)

    def off(width: int) -> float:
        return abs(math.log(size(width) / size(0)))

    # Both sizes grow almost as the width squared: guess, then go downhill.
    width = max(8, 2 * round(default * math.sqrt(size(0) / size(default)) / 2))
    while True:
        best = min((w for w in (width - 2, width, width + 2) if w >= 6), key=off)
        if best == width:
            return width
        width = best


def candidates(quick: bool = False) -> list[Candidate]:
    """Ours, and each peer at its default and matched to our shipped U-Net in operations and in parameters; if
    ``quick``, only what the goals need: our shipped one and the peers matched in operations."""
    found = [
        Candidate(SHIPPED, "ours", "default", shipped_unet().channels),
        Candidate("ours (channels 64)", "ours", "default", 64),
    ]
    for peer, (_, default, _) in PEERS.items():
        marks = {"default": "", "operations": " = ops", "parameters": " = params"}
        kinds = ["operations"] if quick else list(marks)
        widths = {kind: default if kind == "default" else matched_width(peer, kind) for kind in kinds}
        found += [Candidate(f"{peer} {width}{marks[kind]}", peer, kind, width) for kind, width in widths.items()]
    return [found[0], *found[2:]] if quick else found
