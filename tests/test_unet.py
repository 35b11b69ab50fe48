"""The U-Net: each block, and the whole network, against a second forward pass written with loops and plain tensors;
its start at zero; its inputs; and the diagram drawn from it."""

import json
import math

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from pretend_mps import DEVICE, PretendMPS
from torch.testing import assert_close

from ddpm_tutorial.plotting import draw_unet
from ddpm_tutorial.unet import (
    Downsample,
    Head,
    ResidualBlock,
    SelfAttention,
    UNet,
    Upsample,
    group_norm,
    sinusoidal_embedding,
)

CONFIGS = {
    "smallest": {"channels": 8},
    "labels": {"channels": 8, "num_classes": 3, "patch_size": 2},
    "colour, three levels": {"in_channels": 3, "channels": 16, "channel_mults": (1, 2, 3), "num_res_blocks": 2},
    "attention everywhere": {"channels": 16, "attention_levels": (0, 1), "num_heads": 2, "num_res_blocks": 2},
    "colour, folded": {"in_channels": 3, "channels": 8, "patch_size": 2},
    "colour, folded by four": {"in_channels": 3, "channels": 8, "channel_mults": (1,), "patch_size": 4},
    "one level": {"channels": 48, "channel_mults": (1,), "attention_levels": (), "patch_size": 4},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(module, seed: int = 0):
    """Every parameter random, so that no zero-initialised layer hides a mistake."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.requires_grad_(False)


def fresh(seed: int = 0, **options) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet(**options)


def inputs(model, size=(8, 8), batch=3):
    x_t = torch.randn(batch, model.in_channels, *size, generator=seeded(1))
    return x_t, torch.tensor([1, 40, 1000, 7, 500])[:batch]


# ------------------------------------------------------------- a second forward pass, from names and formulas alone
def plain_group_norm(x, weight, bias):
    groups = max(g for g in (1, 2, 4, 8, 16, 32) if x.shape[1] % g == 0)
    out = torch.empty_like(x)
    for b in range(len(x)):
        for channels in torch.arange(x.shape[1]).chunk(groups):
            values = x[b, channels]
            variance = ((values - values.mean()) ** 2).mean()
            out[b, channels] = (values - values.mean()) / (variance + 1e-5).sqrt()
    return out * weight[:, None, None] + bias[:, None, None]


def silu(x):
    return x / (1 + torch.exp(-x))


def plain_block(w, x, emb):
    h = silu(plain_group_norm(x, w["norm1.weight"], w["norm1.bias"]))
    h = F.conv2d(h, w["conv1.weight"], w["conv1.bias"], 1, 1)
    modulation = silu(emb) @ w["emb.weight"].T + w["emb.bias"]
    scale, shift = modulation[:, : h.shape[1], None, None], modulation[:, h.shape[1] :, None, None]
    h = silu(plain_group_norm(h, w["norm2.weight"], w["norm2.bias"]) * (1 + scale) + shift)
    if "shortcut.weight" in w:
        x = torch.einsum("bchw,oc->bohw", x, w["shortcut.weight"][:, :, 0, 0]) + w["shortcut.bias"][:, None, None]
    return x + F.conv2d(h, w["conv2.weight"], w["conv2.bias"], 1, 1)


def plain_head(w, maps, x, emb):
    h = F.conv2d(torch.cat([maps, x], 1), w["conv1.weight"], w["conv1.bias"], 1, 1)
    modulation = silu(emb) @ w["emb.weight"].T + w["emb.bias"]
    h = silu(h * (1 + modulation[:, :16, None, None]) + modulation[:, 16:, None, None])
    h = silu(F.conv2d(h, w["conv2.weight"], w["conv2.bias"], 1, 1))
    return F.conv2d(h, w["conv_out.weight"], w["conv_out.bias"], 1, 1)


def plain_attention(w, x, heads):
    B, C, H, W = x.shape
    d = C // heads
    tokens = plain_group_norm(x, w["norm.weight"], w["norm.bias"]).reshape(B, C, H * W).transpose(1, 2)  # (B, N, C)
    qkv = tokens @ w["to_qkv.weight"][:, :, 0, 0].T + w["to_qkv.bias"]
    q, k, v = qkv[..., :C], qkv[..., C : 2 * C], qkv[..., 2 * C :]
    out = torch.zeros_like(tokens)
    for head in range(heads):
        own = slice(head * d, (head + 1) * d)
        logits = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(d)
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        out[..., own] = weights @ v[..., own]
    out = out @ w["to_out.weight"][:, :, 0, 0].T + w["to_out.bias"]
    return x + out.transpose(1, 2).reshape(B, C, H, W)


def plain_embedding(t, dim):
    rows = []
    for value in t.tolist():
        angles = [value * 10_000 ** (-2 * i / dim) for i in range(dim // 2)]
        rows.append([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    return torch.tensor(rows)


def plain_unet(state, options, x_t, t, labels=None):
    """The whole network from its state dict, its options and the formulas of chapter 4."""
    options = {
        "channel_mults": (1, 2), "num_res_blocks": 1, "attention_levels": (1,), "num_heads": 4, "patch_size": 1,
        "num_classes": None, **options,
    }  # fmt: skip
    p, heads, levels = options["patch_size"], options["num_heads"], len(options["channel_mults"])

    def part(prefix):
        return {name[len(prefix) + 1 :]: value for name, value in state.items() if name.startswith(prefix + ".")}

    def conv(name, x, stride=1):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, 1)

    def stage(name, x, attend):
        x = plain_block(part(f"{name}.block"), x, emb)
        return plain_attention(part(f"{name}.attention"), x, heads) if attend else x

    w = part("time_mlp")
    emb = silu(plain_embedding(t, options["channels"]) @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
    if options["num_classes"] is not None:
        labels = [options["num_classes"]] * len(t) if labels is None else labels.tolist()
        emb = emb + torch.stack([state["label_emb.weight"][label] for label in labels])

    x = torch.cat([x_t[:, c : c + 1, i::p, j::p] for c in range(x_t.shape[1]) for i in range(p) for j in range(p)], 1)
    x, skips = conv("conv_in", x), []
    for level in range(levels):
        for i in range(options["num_res_blocks"]):
            x = stage(f"down.{level}.{i}", x, level in options["attention_levels"])
            skips.append(x)
        if level + 1 < levels:
            x = conv(f"downsample.{level}", x, stride=2)
    x = stage("middle.1", stage("middle.0", x, True), False)
    for up in range(levels):
        for i in range(options["num_res_blocks"]):
            x = torch.cat([x, skips.pop()], 1)
            x = stage(f"up.{up}.{i}", x, levels - 1 - up in options["attention_levels"])
        if up + 1 < levels:
            x = conv(f"upsample.{up}", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    x = conv("conv_out", silu(plain_group_norm(x, state["norm_out.weight"], state["norm_out.bias"])))

    out = torch.empty(len(x_t), x.shape[1] // p**2, *x_t.shape[2:])
    for n in range(x.shape[1]):
        out[:, n // p**2, n // p % p :: p, n % p :: p] = x[:, n]
    return out if p == 1 else plain_head(part("head"), out, x_t, emb)


# ---------------------------------------------------------------------------------------------- the blocks
@pytest.mark.parametrize("dim", [2, 8, 64])
def test_sinusoidal_embedding_is_the_formula(dim):
    t = torch.tensor([1, 2, 137, 1000])
    assert_close(sinusoidal_embedding(t, dim), plain_embedding(t, dim), atol=2e-4, rtol=0)  # float32 at angle 1000


def test_sinusoidal_embedding_likeness_depends_on_the_gap_alone():
    e = sinusoidal_embedding(torch.arange(1, 1001), 64)
    assert_close((e * e).sum(1), torch.full((1000,), 32.0))
    assert_close((e[:-50] * e[50:]).sum(1), (e[0] @ e[50]).expand(950), atol=2e-3, rtol=0)


def test_sinusoidal_embedding_follows_max_period():
    e = sinusoidal_embedding(torch.tensor([3]), 4, max_period=100)
    assert_close(e[0], torch.tensor([math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)]))


@pytest.mark.parametrize(("channels", "groups"), [(8, 8), (24, 8), (48, 16), (64, 32), (96, 32)])
def test_group_norm(channels, groups):
    norm = randomised(group_norm(channels))
    assert norm.num_groups == groups
    x = torch.randn(2, channels, 5, 7, generator=seeded(2)) * 3 + 1
    assert_close(norm(x), plain_group_norm(x, norm.weight, norm.bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("wide_in", "wide_out"), [(16, 16), (24, 16), (16, 48)])
def test_residual_block_is_its_formula(wide_in, wide_out):
    block = randomised(ResidualBlock(wide_in, wide_out, 12))
    x, emb = torch.randn(2, wide_in, 5, 7, generator=seeded(3)), torch.randn(2, 12, generator=seeded(4))
    assert_close(block(x, emb), plain_block(block.state_dict(), x, emb), atol=1e-4, rtol=1e-4)


def test_residual_block_starts_as_its_shortcut():
    x, emb = torch.randn(2, 16, 6, 6, generator=seeded(5)), torch.randn(2, 12, generator=seeded(6))
    assert torch.equal(ResidualBlock(16, 16, 12)(x, emb), x)
    block = ResidualBlock(16, 24, 12)
    assert torch.equal(block(x, emb), block.shortcut(x))
    assert block.shortcut.kernel_size == (1, 1)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_self_attention_is_its_formula(heads):
    attention = randomised(SelfAttention(16, heads))
    x = torch.randn(2, 16, 3, 5, generator=seeded(7))
    assert_close(attention(x), plain_attention(attention.state_dict(), x, heads), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("colours", "maps"), [(1, 4), (3, 12)])
def test_head_is_its_formula(colours, maps):
    head = randomised(Head(maps, colours, 12))
    (given, x), emb = torch.randn(2, 2, maps, 5, 7, generator=seeded(13)), torch.randn(2, 12, generator=seeded(14))
    out = head(given, x[:, :colours], emb)
    assert out.shape == (2, colours, 5, 7)
    assert_close(out, plain_head(head.state_dict(), given, x[:, :colours], emb), atol=1e-3, rtol=1e-4)


def test_head_starts_at_zero_and_knows_no_patches():
    """Shifted by one pixel, its answer is the same, shifted: a layer on folded pixels would move by patches."""
    maps, x, emb = (torch.randn(2, c, 12, 12, generator=seeded(c)) for c in (4, 1, 12))
    emb = emb[:, :, 0, 0]
    assert not Head(4, 1, 12)(maps, x, emb).any()
    head = randomised(Head(4, 1, 12))
    moved = head(maps.roll(1, 3), x.roll(1, 3), emb)
    assert_close(moved[..., 4:-3], head(maps, x, emb)[..., 3:-4], atol=1e-3, rtol=1e-4)


def test_self_attention_starts_as_the_identity():
    x = torch.randn(2, 16, 4, 4, generator=seeded(8))
    assert torch.equal(SelfAttention(16, 4)(x), x)


def test_downsample_halves_and_upsample_doubles():
    x = torch.randn(2, 8, 6, 10, generator=seeded(9))
    down, up = randomised(Downsample(8, 12)), randomised(Upsample(8, 12))
    assert down(x).shape == (2, 12, 3, 5)
    assert_close(down(x), F.conv2d(x, down.weight, down.bias, padding=1)[:, :, ::2, ::2], atol=1e-5, rtol=1e-5)
    enlarged = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(up(x), F.conv2d(enlarged, up.weight, up.bias, padding=1), atol=1e-5, rtol=1e-5)


def test_upsample_leaves_no_checkerboard():
    flat = randomised(Upsample(8, 3))(torch.ones(1, 8, 6, 6))[:, :, 1:-1, 1:-1]
    assert_close(flat, flat[:, :, :1, :1].expand_as(flat), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------- the same blocks in diffusers and in torch itself
def copied(reference, **parts):
    """The reference module with the weights of ours, given by the reference's names."""
    reference.load_state_dict({name: value for name, value in parts.items() if value is not None})
    return reference.requires_grad_(False)


@pytest.mark.parametrize("dim", [8, 64])
def test_sinusoidal_embedding_is_that_of_diffusers(dim):
    t = torch.tensor([1, 2, 137, 999, 1000])
    expected = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert_close(sinusoidal_embedding(t, dim), expected, atol=2e-4, rtol=0)  # float32 at angle 1000


@pytest.mark.parametrize(("wide_in", "wide_out"), [(16, 16), (32, 16), (16, 48)])
def test_residual_block_is_that_of_diffusers(wide_in, wide_out):
    ours = randomised(ResidualBlock(wide_in, wide_out, 12))
    theirs = ResnetBlock2D(
        in_channels=wide_in, out_channels=wide_out, temb_channels=12, time_embedding_norm="scale_shift", eps=1e-5,
        groups=math.gcd(32, wide_in), groups_out=math.gcd(32, wide_out),
    )  # fmt: skip
    names = {"emb": "time_emb_proj", "shortcut": "conv_shortcut"}
    weights = {".".join([names.get(n.split(".")[0], n.split(".")[0]), n.split(".")[1]]): p for n, p in
               ours.state_dict().items()}  # fmt: skip
    copied(theirs, **weights)
    x, emb = torch.randn(2, wide_in, 6, 5, generator=seeded(3)), torch.randn(2, 12, generator=seeded(4))
    assert_close(ours(x, emb), theirs(x, emb), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("heads", [1, 4])
def test_self_attention_is_that_of_diffusers_and_of_torch(heads):
    ours = randomised(SelfAttention(16, heads))
    x = torch.randn(2, 16, 3, 5, generator=seeded(7))
    w = {name: value.flatten(1) if value.ndim == 4 else value for name, value in ours.state_dict().items()}
    (q, k, v), (q_bias, k_bias, v_bias) = w["to_qkv.weight"].chunk(3), w["to_qkv.bias"].chunk(3)

    theirs = Attention(
        16, heads=heads, dim_head=16 // heads, bias=True, norm_num_groups=16, residual_connection=True, eps=1e-5
    )
    copied(
        theirs, **{
            "group_norm.weight": w["norm.weight"], "group_norm.bias": w["norm.bias"], "to_q.weight": q,
            "to_k.weight": k, "to_v.weight": v, "to_q.bias": q_bias, "to_k.bias": k_bias, "to_v.bias": v_bias,
            "to_out.0.weight": w["to_out.weight"], "to_out.0.bias": w["to_out.bias"],
        }
    )  # fmt: skip
    assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)

    layer = copied(
        torch.nn.MultiheadAttention(16, heads, batch_first=True), **{
            "in_proj_weight": w["to_qkv.weight"], "in_proj_bias": w["to_qkv.bias"],
            "out_proj.weight": w["to_out.weight"], "out_proj.bias": w["to_out.bias"],
        }
    )  # fmt: skip
    tokens = ours.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
    out = layer(tokens, tokens, tokens, need_weights=False)[0]
    assert_close(ours(x), x + out.transpose(1, 2).reshape(x.shape), atol=1e-4, rtol=1e-4)


def test_downsample_and_upsample_are_those_of_diffusers():
    x = torch.randn(2, 8, 6, 10, generator=seeded(9))
    for ours, theirs in (
        (Downsample(8, 12), Downsample2D(8, use_conv=True, out_channels=12, padding=1)),
        (Upsample(8, 12), Upsample2D(8, use_conv=True, out_channels=12)),
    ):
        randomised(ours)
        copied(theirs.conv, **ours.state_dict())
        assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_folding_is_that_of_torch():
    """A network whose layers between folding and unfolding do nothing: what remains is pixel-unshuffle and -shuffle."""
    model = UNet(in_channels=3, channels=16, channel_mults=(1,), attention_levels=(), patch_size=2)
    seen = {}
    model.conv_in.register_forward_pre_hook(lambda _, inputs: seen.update(folded=inputs[0]))
    replaced = torch.randn(1, 48, 4, 4, generator=seeded(11))
    model.conv_out.register_forward_hook(lambda *_: replaced)
    model.head.register_forward_pre_hook(lambda _, inputs: seen.update(maps=inputs[0], x_t=inputs[1]))
    x_t = torch.randn(1, 3, 8, 8, generator=seeded(12))
    model(x_t, torch.tensor([5]))
    assert torch.equal(seen["folded"], F.pixel_unshuffle(x_t, 2))
    assert torch.equal(seen["maps"], F.pixel_shuffle(replaced, 2)) and seen["x_t"] is x_t  # four maps a colour


# ------------------------------------------------------------------------------------------- the whole network
@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
@pytest.mark.parametrize("name", CONFIGS)
def test_unet_is_the_second_forward_pass(name, size):
    model = randomised(UNet(**CONFIGS[name]))
    x_t, t = inputs(model, size)
    out = model(x_t, t)
    assert out.shape == x_t.shape
    expected = plain_unet(model.state_dict(), CONFIGS[name], x_t, t)
    assert_close(out, expected, atol=1e-3 * expected.std().item(), rtol=1e-3)
    if model.num_classes is not None:
        labels = torch.tensor([2, 0, 3])
        expected = plain_unet(model.state_dict(), CONFIGS[name], x_t, t, labels)
        assert_close(model(x_t, t, labels), expected, atol=1e-3 * expected.std().item(), rtol=1e-3)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_has_the_shape_of_the_input(channels, patch_size):
    model = UNet(in_channels=channels, channels=8, patch_size=patch_size)
    for size in ((8, 8), (8, 24), (32, 16)):
        x_t, t = inputs(model, size)
        assert model(x_t, t).shape == x_t.shape
    assert model(x_t[:0], t[:0]).shape == (0, *x_t.shape[1:])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_network_gives_zero(name):
    model = UNet(**CONFIGS[name])
    assert not model(*inputs(model)).any()


def test_output_depends_on_time_label_and_every_pixel():
    model = randomised(UNet(channels=8, num_classes=3))
    x_t, t = inputs(model)
    out, labels = model(x_t, t), torch.tensor([0, 1, 2])
    assert (model(x_t, t % 1000 + 1) - out).abs().amax((1, 2, 3)).min() > 1e-3
    assert (model(x_t, t, labels) - out).abs().amax((1, 2, 3)).min() > 1e-3
    assert torch.equal(model(x_t, t, torch.full((3,), 3)), out)  # without labels, the null label
    x = x_t.clone().requires_grad_()
    model(x, t)[:, 0, 0, 0].sum().backward()
    assert (x.grad != 0).all()


def test_one_image_does_not_depend_on_the_others_of_its_batch():
    model = randomised(UNet(channels=16, patch_size=2))
    x_t, t = inputs(model)
    assert_close(model(x_t, t)[:1], model(x_t[:1], t[:1]), atol=1e-4, rtol=1e-4)


def test_gradient_wakes_from_the_outside_in():
    """Step 1 reaches the last convolution alone, step 2 the shortcuts and each branch's zero layer, step 3 all."""
    model = fresh(channels=24, num_classes=3, patch_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x_t, t = inputs(model, batch=5)
    noise, labels, reached = torch.randn(x_t.shape, generator=seeded(10)), torch.tensor([0, 1, 2, 3, 0]), []
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(x_t, t, labels), noise).backward()
        reached.append({n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0})
        optimizer.step()
    names = {name for name, _ in model.named_parameters()}
    assert reached[0] == {"head.conv_out.weight", "head.conv_out.bias"}
    assert {n for n in names if n.endswith(("conv2.weight", "to_out.weight"))} <= reached[1]
    assert {n for n in names if n.startswith("head.")} <= reached[1]
    assert not any(n.endswith(("block.conv1.weight", "to_qkv.weight")) for n in reached[1])
    assert reached[2] == names
    assert (model.label_emb.weight.grad.abs().amax(1) > 0).all()  # every label given, and the null label


def test_parameters_are_counted_by_hand():
    def conv(a, b, k=3):
        return k * k * a * b + b

    def block(a, b, emb):
        shortcut = 0 if a == b else conv(a, b, 1)
        return 2 * a + conv(a, b) + (emb + 1) * 2 * b + 2 * b + conv(b, b) + shortcut

    def attention(c):
        return 2 * c + conv(c, 3 * c, 1) + conv(c, c, 1)

    emb = 4 * 48
    expected = (48 + 1) * emb + (emb + 1) * emb + 11 * emb + conv(4, 48)  # time, labels, in
    expected += block(48, 48, emb) + conv(48, 96) + block(96, 96, emb) + attention(96)  # down
    expected += 2 * block(96, 96, emb) + attention(96)  # middle
    expected += block(192, 96, emb) + attention(96) + conv(96, 48) + block(96, 48, emb)  # up
    expected += 2 * 48 + conv(48, 4 * 4)  # out: four maps of 2×2 pixels
    expected += conv(4 + 1, 16) + (emb + 1) * 2 * 16 + conv(16, 16) + conv(16, 1)  # head
    model = UNet(channels=48, patch_size=2, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_parameter_names_are_those_of_shipped_checkpoints():
    """A renamed layer would make every published file unreadable."""
    block = [f"{p}.{q}" for p in ("norm1", "conv1", "emb", "norm2", "conv2") for q in ("weight", "bias")]
    attention = [f"attention.{p}.{q}" for p in ("norm", "to_qkv", "to_out") for q in ("weight", "bias")]
    shortcut = ["block.shortcut.weight", "block.shortcut.bias"]
    plain = [f"block.{name}" for name in block]
    stages = {
        "down.0.0": plain, "down.1.0": plain + attention, "middle.0": plain + attention, "middle.1": plain,
        "up.0.0": plain + shortcut + attention, "up.1.0": plain + shortcut,
    }  # fmt: skip
    expected = {f"{stage}.{name}" for stage, names in stages.items() for name in names} | {"label_emb.weight"}
    for layer in ("time_mlp.0", "time_mlp.2", "conv_in", "downsample.0", "upsample.0", "norm_out", "conv_out"):
        expected |= {f"{layer}.weight", f"{layer}.bias"}
    assert set(UNet(channels=8, num_classes=3).state_dict()) == expected
    for layer in ("head.conv1", "head.emb", "head.conv2", "head.conv_out"):
        expected |= {f"{layer}.weight", f"{layer}.bias"}
    model = UNet(channels=8, num_classes=3, patch_size=2)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()} == expected
    assert not list(model.buffers())  # no schedule, no tables


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("x_shape", "t_shape", "message"),
    [
        ((2, 3, 8, 8), (2,), r"x_t must be \(B, 1, H, W\), got \(2, 3, 8, 8\)"),
        ((2, 8, 8), (2,), r"x_t must be \(B, 1, H, W\), got \(2, 8, 8\)"),
        ((2, 1, 8, 10), (2,), "divisible by 4, got 8×10"),
        ((2, 1, 6, 8), (2,), "divisible by 4, got 6×8"),
        ((2, 1, 8, 8), (3,), r"t must be \(2,\).*got \(3,\)"),
        ((2, 1, 8, 8), (), r"t must be \(2,\).*got \(\)"),
        ((2, 1, 8, 8), (2, 1), r"t must be \(2,\).*got \(2, 1\)"),
    ],
)
def test_wrong_shapes_are_refused(x_shape, t_shape, message):
    with pytest.raises(ValueError, match=message):
        UNet(channels=8, patch_size=2)(torch.zeros(x_shape), torch.ones(t_shape, dtype=torch.long))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 4], r"labels must lie in 0 … 3 \(3 is the null label\), got 0 … 4"),
        ([-1, 0], r"got -1 … 0"),
        ([0], r"labels must be \(2,\), one an image; got \(1,\)"),
    ],
)
def test_wrong_labels_are_refused(labels, message):
    model = UNet(channels=8, num_classes=3)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor(labels))


def test_labels_without_classes_are_refused():
    with pytest.raises(ValueError, match="without num_classes"):
        UNet(channels=8)(torch.zeros(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1]))


def test_integers_of_any_size_are_timesteps_and_labels():
    model = randomised(UNet(channels=8, num_classes=3))
    x_t, t, labels = torch.randn(2, 1, 8, 8, generator=seeded()), torch.tensor([1, 100]), torch.tensor([0, 3])
    expected = model(x_t, t, labels)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert_close(model(x_t, t.to(dtype), labels.to(dtype)), expected)


@pytest.mark.parametrize("t", [[1.0, 2.0], [True, True]])
def test_timesteps_that_are_no_integers_are_refused(t):
    t = torch.tensor(t)
    with pytest.raises(ValueError, match=f"t must be integers, got {t.dtype}"):
        UNet(channels=8)(torch.zeros(2, 1, 8, 8), t)


def test_wrong_kinds_of_inputs_are_refused():
    model, x_t, t = UNet(channels=8, num_classes=3), torch.zeros(2, 1, 8, 8), torch.tensor([1, 2])
    for call, message in (
        (lambda: model(x_t, 5), r"t must be \(2,\), one an image; got 5"),
        (lambda: model(x_t, t, 1), r"labels must be \(2,\), one an image; got 1"),
        (lambda: model(x_t, t, torch.zeros(2)), "labels must be integers, got torch.float32"),
        (lambda: model(x_t, t, torch.zeros(2).bool()), "labels must be integers, got torch.bool"),
        (lambda: model(x_t.byte(), t), "x_t must be floats, got torch.uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_nothing_is_read_from_another_device():
    with PretendMPS() as mode:
        model = UNet(channels=8, num_classes=3).to(DEVICE)
        x_t, t, labels = torch.zeros(2, 1, 8, 8, device=DEVICE), torch.tensor([1, 2]).to(DEVICE), torch.ones(2).long()
        labels = labels.to(DEVICE)
        mode.waits.clear()
        model(x_t, t, labels)
        assert mode.waits == []


def test_compiles_as_one_graph_on_the_cpu():
    model = UNet(channels=8, channel_mults=(1,), attention_levels=(), num_classes=3).eval()
    given = torch.randn(1, 1, 2, 2), torch.tensor([7]), torch.tensor([3])
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(*given), model(*given))


@pytest.mark.parametrize(
    "options",
    [{name: value} for name in ("in_channels", "channels", "num_res_blocks", "num_heads", "patch_size", "num_classes")
     for value in (0, -1, 1.5, "x", True, 10**9)]
    + [{"channel_mults": mults} for mults in ((), 5, None, "12", ["a"], (1, 0), (1, 0.3), (-1,))]
    + [{"attention_levels": levels} for levels in ((7,), (-1,), 1, None, "x", (0.5,))],
    ids=str,
)  # fmt: skip
def test_a_network_that_cannot_be_is_refused_by_name(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=name):
        UNet(**{"channels": 8} | options)


def test_an_odd_width_has_no_sines_and_cosines():
    with pytest.raises(ValueError, match="channels must be even.*got 5"):
        UNet(channels=5, channel_mults=(8,))


def test_one_level_may_keep_the_default_attention():
    """Checkpoints of ``train --channel-mults 1`` say so."""
    model = UNet(channels=8, channel_mults=(1,))
    assert not any(stage.attention.__class__ is SelfAttention for stages in model.down for stage in stages)


@pytest.mark.parametrize(
    "options", [{"channels": 12}, {"channels": 8, "num_heads": 8}, {"channels": 6, "channel_mults": (4, 5)}]
)
def test_width_that_does_not_split_into_heads_is_refused(options):
    with pytest.raises(ValueError, match="divisible by 2 · num_heads"):
        UNet(**options)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_makes_the_same_network(name):
    model = UNet(**CONFIGS[name])
    assert model.config.items() >= {n: list(v) if type(v) is tuple else v for n, v in CONFIGS[name].items()}.items()
    again = UNet(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert again.config == model.config


# --------------------------------------------------------------------------------------------- the diagram
@pytest.mark.parametrize("name", CONFIGS)
def test_diagram_shows_the_measured_shapes(name):
    model = UNet(**CONFIGS[name])
    figure = draw_unet(model, image_size=16)
    texts = " ".join(text.get_text() for text in figure.axes[0].texts)
    plt.close(figure)
    side, widths = 16 // model.patch_size, [m * model.channels for m in CONFIGS[name].get("channel_mults", (1, 2))]
    for level, width in enumerate(widths):
        assert f"{width}×{side >> level}×{side >> level}" in texts
    assert f"{model.in_channels}×16×16" in texts
    assert not any(module._forward_hooks for module in model.modules())  # it takes its hooks away
