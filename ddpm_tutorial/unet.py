"""The U-Net, built from small blocks: a plain network of (x, t, label) (chapter 4).

Ronneberger et al., 2015, arXiv:1505.04597; as used by DDPM (appendix B) and Dhariwal, Nichol, 2021,
arXiv:2105.05233 (scale-shift conditioning, class embedding).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .diffusion import check_counts, check_floats, holds_integers

HEAD_MAPS, HEAD_CHANNELS = 4, 16  # of the head: maps for each colour that it gets, channels that it works with


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
    """t (B,) → (B, dim): cosines and sines at dim/2 frequencies, geometric from 1 to nearly 1/max_period radians
    per timestep.

    Vaswani et al., 2017, arXiv:1706.03762, section 3.5. ``dim`` is even.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with the largest power of two up to 32 as groups that divides the channels (Wu, He, 2018,
    arXiv:1803.08494)."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weight and bias 0, so that its residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """x (B, in, H, W), embedding (B, emb) → (B, out, H, W).

    Two 3×3 convolutions, each after GroupNorm and SiLU. The embedding scales and shifts the second norm. The last
    convolution starts at zero, so the block starts as its shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_channels, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)  # (B, out, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class SelfAttention(nn.Module):
    """x (B, C, H, W) → same: every position looks at every other, in ``heads`` heads of C / heads channels (Vaswani et
    al., 2017, arXiv:1706.03762)."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        q, k, v = rearrange(
            self.to_qkv(self.norm(x)), "b (three heads d) h w -> three b heads (h w) d", three=3, heads=self.heads
        )
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, H·W, d)
        return x + self.to_out(rearrange(out, "b heads (h w) d -> b (heads d) h w", h=height, w=width))


class Downsample(nn.Conv2d):
    """(B, C, H, W) → (B, out, H/2, W/2): a 3×3 convolution with stride 2."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """(B, C, H, W) → (B, out, 2H, 2W): nearest neighbour, then a 3×3 convolution, which leaves no checkerboard."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Module):
    """A residual block and, where asked for, self-attention: what the U-Net repeats at every resolution."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, heads: int = 0):
        super().__init__()
        self.block = ResidualBlock(in_channels, out_channels, emb_channels)
        self.attention = SelfAttention(out_channels, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.block(x, emb))


class Head(nn.Module):
    """maps (B, maps, H, W), x (B, C, H, W), embedding (B, emb) → (B, C, H, W): the last step of a network that works on
    folded pixels, at full resolution.

    Three 3×3 convolutions; the embedding scales and shifts what the first one gives, the last one starts at zero.
    Without it, the pixels of a patch never meet at their own resolution, and a grid of dots stays in the samples.
    """

    def __init__(self, maps: int, in_channels: int, emb_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(maps + in_channels, HEAD_CHANNELS, 3, padding=1)
        self.emb = nn.Linear(emb_channels, 2 * HEAD_CHANNELS)
        self.conv2 = nn.Conv2d(HEAD_CHANNELS, HEAD_CHANNELS, 3, padding=1)
        self.conv_out = zeroed(nn.Conv2d(HEAD_CHANNELS, in_channels, 3, padding=1))

    def forward(self, maps: Tensor, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(torch.cat([maps, x], dim=1))
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)  # (B, channels, 1, 1) each
        h = self.conv2(F.silu(h * (1 + scale) + shift))
        return self.conv_out(F.silu(h))


def way_down(
    widths: Sequence[int], heads: Sequence[int], num_res_blocks: int, emb_channels: int
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The stages of each level, the finest first, and what leads from each to the next."""
    levels, between = nn.ModuleList(), nn.ModuleList()
    for level, width in enumerate(widths):
        stages = [Stage(width, width, emb_channels, heads[level]) for _ in range(num_res_blocks)]
        levels.append(nn.ModuleList(stages))
        if level + 1 < len(widths):
            between.append(Downsample(width, widths[level + 1]))
    return levels, between


def way_up(
    widths: Sequence[int], heads: Sequence[int], num_res_blocks: int, emb_channels: int
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The stages of each level, the coarsest first, and what leads from each to the next. A stage gets twice its
    width: what comes from below, and the skip connection."""
    levels, between = nn.ModuleList(), nn.ModuleList()
    for level, width in reversed(list(enumerate(widths))):
        stages = [Stage(2 * width, width, emb_channels, heads[level]) for _ in range(num_res_blocks)]
        levels.append(nn.ModuleList(stages))
        if level > 0:
            between.append(Upsample(width, widths[level - 1]))
    return levels, between


class LabelEmbedding(nn.Embedding):
    """A vector for each label; the last label is the null label. labels (B,) → (B, D). Of captions (B, L), filled up
    with null labels, the mean over the words that are there → (B, D); without any, the null label's vector."""

    def forward(self, labels: Tensor) -> Tensor:
        vectors = super().forward(labels)
        if labels.ndim == 1:
            return vectors
        there = labels != self.num_embeddings - 1
        there = (there | ~there.any(dim=1, keepdim=True)).to(vectors.dtype)[:, :, None]  # (B, L, 1)
        return (vectors * there).sum(dim=1) / there.sum(dim=1)


class UNet(nn.Module):
    """F(x, t, label): images (B, in_channels, H, W) → as many numbers, same shape. What they mean, and which noise
    belongs to t, it does not know: ``NoisePredictor`` does.

    H and W must be divisible by ``patch_size`` · 2^(levels − 1), where levels = len(channel_mults).

    - ``channels`` · ``channel_mults`` is the width of each level; the resolution halves from level to level.
    - ``num_res_blocks`` residual blocks per level on the way down, and as many on the way up.
    - ``attention_levels``: the levels (0 is the finest) with self-attention, beside the middle one.
    - ``patch_size`` p > 1 folds p×p pixels into channels first (pixel-unshuffle), so nearly all work is at 1/p of the
      size; a ``Head`` ends it at full resolution.
    - ``num_classes`` adds a label embedding with one extra entry, the null label ``num_classes`` ("no label"). A
      caption is several labels in a row, filled up with null labels: its embedding is the mean of theirs.

    The last convolution starts at zero. ``config`` holds the arguments.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: int = 64,
        channel_mults: Sequence[int] = (1, 2),
        num_res_blocks: int = 1,
        attention_levels: Sequence[int] = (1,),
        num_heads: int = 4,
        patch_size: int = 1,
        num_classes: int | None = None,
    ):
        super().__init__()
        config = {
            "in_channels": in_channels, "channels": channels, "channel_mults": channel_mults,
            "num_res_blocks": num_res_blocks, "attention_levels": attention_levels, "num_heads": num_heads,
            "patch_size": patch_size, "num_classes": num_classes,
        }  # fmt: skip
        _check_config(**config)
        self.config = config | {"channel_mults": list(channel_mults), "attention_levels": list(attention_levels)}
        self.in_channels, self.channels = in_channels, channels
        self.patch_size, self.num_classes = patch_size, num_classes
        self.size_divisor = patch_size * 2 ** (len(channel_mults) - 1)
        emb_channels = 4 * channels
        widths = [channels * mult for mult in channel_mults]
        heads = [num_heads if level in attention_levels else 0 for level in range(len(widths))]

        self.time_mlp = nn.Sequential(
            nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        self.label_emb = None if num_classes is None else LabelEmbedding(num_classes + 1, emb_channels)

        self.conv_in = nn.Conv2d(in_channels * patch_size**2, widths[0], 3, padding=1)
        self.down, self.downsample = way_down(widths, heads, num_res_blocks, emb_channels)
        self.middle = nn.ModuleList(
            [Stage(widths[-1], widths[-1], emb_channels, num_heads), Stage(widths[-1], widths[-1], emb_channels)]
        )
        self.up, self.upsample = way_up(widths, heads, num_res_blocks, emb_channels)
        self.norm_out = group_norm(widths[0])
        if patch_size == 1:
            self.conv_out, self.head = zeroed(nn.Conv2d(widths[0], in_channels, 3, padding=1)), None
        else:
            maps = HEAD_MAPS * in_channels
            self.conv_out = nn.Conv2d(widths[0], maps * patch_size**2, 3, padding=1)
            self.head = Head(maps, in_channels, emb_channels)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x_t (B, C, H, W), t (B,) integers, labels (B,) or captions (B, L) integers in 0 … num_classes (None: the null
        label)."""
        p = self.patch_size
        t, labels = self._checked(x_t, t, labels)
        emb = self._embed(t, labels)
        x = rearrange(x_t, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p)
        x = self.conv_in(x)

        skips = []
        for level, stages in enumerate(self.down):
            for stage in stages:
                x = stage(x, emb)
                skips.append(x)
            if level < len(self.downsample):
                x = self.downsample[level](x)

        for stage in self.middle:
            x = stage(x, emb)

        for level, stages in enumerate(self.up):
            for stage in stages:
                x = stage(torch.cat([x, skips.pop()], dim=1), emb)  # (B, 2·width, H, W) in
            if level < len(self.upsample):
                x = self.upsample[level](x)

        x = self.conv_out(F.silu(self.norm_out(x)))
        x = rearrange(x, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)
        return x if self.head is None else self.head(x, x_t, emb)

    def _embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.time_mlp(sinusoidal_embedding(t, self.channels))  # (B, 4·channels)
        if self.label_emb is None:
            return emb
        if labels is None:
            labels = torch.full_like(t, self.num_classes)
        return emb + self.label_emb(labels)

    def _checked(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """t and labels as int64; ValueError for what does not fit. The range of labels is not checked on a GPU, where
        the host would have to wait, nor by ``torch.compile``, whose graph would break."""
        check_floats(x_t=x_t)
        if x_t.ndim != 4 or x_t.shape[1] != self.in_channels:
            raise ValueError(f"x_t must be (B, {self.in_channels}, H, W), got {tuple(x_t.shape)}")
        if x_t.shape[2] % self.size_divisor or x_t.shape[3] % self.size_divisor:
            raise ValueError(
                f"this U-Net takes heights and widths divisible by {self.size_divisor}, "
                f"got {x_t.shape[2]}×{x_t.shape[3]}"
            )
        t = _one_an_image("t", t, x_t)
        if labels is None:
            return t, None
        if self.label_emb is None:
            raise ValueError("labels were given to a U-Net without num_classes")
        labels = _one_an_image("labels", labels, x_t, captions=True)
        if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
            if not 0 <= labels.min() <= labels.max() <= self.num_classes:
                raise ValueError(
                    f"labels must lie in 0 … {self.num_classes} ({self.num_classes} is the null label), "
                    f"got {labels.min().item()} … {labels.max().item()}"
                )
        return t, labels


def _check_config(
    channels: int, channel_mults: Sequence[int], attention_levels: Sequence[int], num_heads: int, num_classes, **counts
) -> None:
    """ValueError names an argument of ``UNet`` that is out of range."""
    check_counts(
        channels=channels, num_heads=num_heads, num_classes=1 if num_classes is None else num_classes, **counts
    )
    if channels % 2:
        raise ValueError(f"channels must be even, half of them for sines of t and half for cosines; got {channels}")
    if not isinstance(channel_mults, Sequence) or not channel_mults:
        raise ValueError(f"channel_mults must be one or more integers, got {channel_mults!r}")
    check_counts(**{f"channel_mults[{i}]": mult for i, mult in enumerate(channel_mults)})
    levels = range(max(2, len(channel_mults)))  # the default, (1,), may stay where there is level 0 only
    if not isinstance(attention_levels, Sequence) or not all(level in levels for level in attention_levels):
        raise ValueError(f"attention_levels must lie in 0 … {len(channel_mults) - 1}, got {attention_levels!r}")
    for width in (channels * mult for mult in channel_mults):
        if width % (2 * num_heads):
            raise ValueError(
                f"each level's width must be divisible by 2 · num_heads = {2 * num_heads}; "
                f"channels={channels} with channel_mults={tuple(channel_mults)} gives {width}"
            )


def _one_an_image(name: str, values: Tensor, x_t: Tensor, captions: bool = False) -> Tensor:
    """``values`` as int64; ValueError where they are not integers (B,), nor (B, L) where ``captions`` are taken."""
    rows = captions and isinstance(values, Tensor) and values.ndim == 2 and values.shape[1] > 0
    if not isinstance(values, Tensor) or (values[:, 0] if rows else values).shape != x_t.shape[:1]:
        given = tuple(values.shape) if isinstance(values, Tensor) else repr(values)
        raise ValueError(f"{name} must be ({x_t.shape[0]},), one an image; got {given}")
    if not holds_integers(values):
        raise ValueError(f"{name} must be integers, got {values.dtype}")
    return values.long()
