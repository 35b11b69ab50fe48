"""Muon against its formulas, through the singular value decomposition, and against torch's; which weights it moves."""

import math

import pytest
import torch
from torch.testing import assert_close

from ddpm_tutorial.optimizer import Muon, hidden_matrices, make_optimizers, orthogonal
from ddpm_tutorial.settings import TrainConfig
from ddpm_tutorial.unet import UNet

SHAPES = {"tall": (40, 12), "wide": (12, 40), "square": (24, 24), "a row": (1, 9)}


def randn(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def with_singular_values(shape, values, seed=0):
    """U diag(values) Vᵀ (M, N), float64, and U Vᵀ."""
    U, _, Vh = torch.linalg.svd(randn(*shape, seed=seed, dtype=torch.float64), full_matrices=False)
    return U * values @ Vh, U, Vh


def through_svd(matrix):
    """What ``orthogonal`` should give, from the singular values alone: each goes through Jordan's polynomial."""
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U * s @ Vh


# ---------------------------------------------------------------------------------------------- orthogonal
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_singular_values_go_to_about_one_and_directions_stay(shape):
    """From a two-hundredth of the largest up; U and V are those of the matrix."""
    values = torch.logspace(0, -2.3, min(shape), dtype=torch.float64)
    matrix, U, Vh = with_singular_values(shape, values)
    for scale in (1e-3, 1, 1e3):  # its length does not matter
        found = orthogonal(scale * matrix)
        assert found.shape == shape
        inner = U.mT @ found @ Vh.mT  # diagonal, where U and V have stayed
        assert ((inner.diag() > 0.6) & (inner.diag() < 1.3)).all()
        assert_close(inner, inner.diag().diag(), rtol=0, atol=1e-6)
        assert_close(found, through_svd(matrix), rtol=0, atol=1e-3)  # 1e-7 beside the norm


def test_of_an_orthogonal_matrix_it_is_nearly_the_matrix():
    matrix, U, Vh = with_singular_values((12, 40), torch.ones(12, dtype=torch.float64))
    found = orthogonal(7 * matrix)
    share = (found * (U @ Vh)).sum() / 12
    assert_close(found, share * U @ Vh, rtol=0, atol=1e-6)
    assert 0.7 < share < 1.2


def test_nothing_is_made_of_zero():
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


# ----------------------------------------------------------------------------------------------------- Muon
@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (8, 4, 3, 3), (40, 2, 3, 3), (1, 8, 3, 3)], ids=str)
def test_two_steps_are_those_of_a_second_implementation(shape):
    """Momentum 0.95, Nesterov's look ahead, the step through the singular value decomposition."""
    weight = torch.nn.Parameter(randn(*shape, dtype=torch.float64))
    optimizer, expected, mean = Muon([weight], lr=0.03), weight.detach().clone(), torch.zeros(shape).double()
    for seed in (1, 2):
        gradient = weight.grad = randn(*shape, seed=seed, dtype=torch.float64)
        optimizer.step()
        mean = 0.95 * mean + 0.05 * gradient
        matrix = (0.95 * mean + 0.05 * gradient).reshape(shape[0], -1)
        expected -= 0.03 * 0.2 * math.sqrt(max(matrix.shape)) * through_svd(matrix).reshape(shape)
        assert_close(weight.detach(), expected, rtol=0, atol=1e-5)
        assert_close(optimizer.state[weight]["momentum_buffer"], mean)


@pytest.mark.parametrize("shape", [(64, 64), (64, 16, 3, 3), (16, 64, 3, 3), (192, 64, 1, 1)], ids=str)
def test_an_entry_of_the_step_has_adams_usual_size(shape):
    """A root mean square of 0.2 times the learning rate, at any shape and any length of the gradient; as nearly as
    singular values come to 1."""
    for scale in (1e-4, 1e4):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = scale * randn(*shape)
        Muon([weight], lr=0.5).step()
        assert weight.square().mean().sqrt().item() == pytest.approx(0.5 * 0.2, rel=0.3)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_it_is_torchs_muon_within_the_rounding_of_bfloat16():
    ours, theirs = (torch.nn.Parameter(randn(20, 48)) for _ in range(2))
    options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw", "momentum": 0.95, "nesterov": True}
    optimizers = Muon([ours], lr=0.1), torch.optim.Muon([theirs], lr=0.1, **options)
    start = ours.detach().clone()
    for seed in (1, 2, 3):
        ours.grad = theirs.grad = randn(20, 48, seed=seed)
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < 0.03 * (theirs - start).norm()


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (40, 2, 3, 3)], ids=str)
def test_the_layout_of_a_convolution_changes_nothing(shape):
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = torch.nn.Parameter(randn(*shape).contiguous(memory_format=layout))
        optimizer = Muon([weight], lr=0.1)
        for seed in (1, 2):
            weight.grad = randn(*shape, seed=seed).contiguous(memory_format=layout)
            optimizer.step()
        assert weight.is_contiguous(memory_format=layout)
        weights.append(weight.detach())
    assert_close(*weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient", [math.nan, math.inf, 1.0])
def test_found_inf_leaves_weights_and_momentum_as_they_are(gradient):
    weight = torch.nn.Parameter(randn(8, 4, 3, 3))
    optimizer = Muon([weight], lr=0.1)
    weight.grad = randn(8, 4, 3, 3, seed=1)
    optimizer.step()
    before, mean = weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()
    weight.grad.view(-1)[5] = gradient
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(weight, before) and torch.equal(optimizer.state[weight]["momentum_buffer"], mean)
    weight.grad = randn(8, 4, 3, 3, seed=1)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(weight, before) and not torch.equal(optimizer.state[weight]["momentum_buffer"], mean)


# ------------------------------------------------------------------------------------------- which weights it moves
BLOCK = ["block.conv1", "block.emb", "block.conv2"]
ATTENTION = ["attention.to_qkv", "attention.to_out"]
INNER = {
    "down.0.0": BLOCK, "down.1.0": BLOCK + ATTENTION, "middle.0": BLOCK + ATTENTION, "middle.1": BLOCK,
    "up.0.0": [*BLOCK, "block.shortcut", *ATTENTION], "up.1.0": [*BLOCK, "block.shortcut"],
}  # fmt: skip


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_hidden_matrices_are_these(patch_size, num_classes):
    expected = {f"{stage}.{layer}.weight" for stage, layers in INNER.items() for layer in layers}
    expected |= {"downsample.0.weight", "upsample.0.weight"}
    if patch_size > 1:  # then the last layer is the head's
        expected |= {"conv_out.weight", "head.conv1.weight", "head.emb.weight", "head.conv2.weight"}
    unet = UNet(channels=8, patch_size=patch_size, num_classes=num_classes)
    names = {weight: name for name, weight in unet.named_parameters()}
    found = [names[weight] for weight in hidden_matrices(unet)]
    assert set(found) == expected and len(found) == len(expected)
    left = {
        name for name in names.values() if name not in expected and not name.endswith("bias") and "norm" not in name
    }
    outer = {"conv_in.weight", "time_mlp.0.weight", "time_mlp.2.weight"}
    outer |= {"conv_out.weight" if patch_size == 1 else "head.conv_out.weight"}
    assert left == outer | ({"label_emb.weight"} if num_classes else set())


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_each_parameter_has_one_optimizer(optimizer, fused):
    unet = UNet(channels=8, patch_size=2, num_classes=3)
    optimizers = make_optimizers(unet, TrainConfig(optimizer=optimizer, lr=0.123), fused)
    assert [type(o) for o in optimizers] == ([Muon] if optimizer == "muon" else []) + [torch.optim.Adam]
    moved = [weight for o in optimizers for group in o.param_groups for weight in group["params"]]
    assert len(moved) == len(set(moved)) and set(moved) == set(unet.parameters())
    assert all(group["lr"] == 0.123 for o in optimizers for group in o.param_groups)
    assert optimizers[-1].defaults["fused"] == fused and optimizers[-1].defaults["weight_decay"] == 0
    if optimizer == "muon":
        assert optimizers[0].param_groups[0]["params"] == hidden_matrices(unet)
