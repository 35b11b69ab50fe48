"""experiments/ladder_flow.py: rows of two networks, and timesteps that lie evenly on the straight path."""

import json
from functools import partial

import torch
from small_run import first_images

from ddpm_tutorial import metrics
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.flow import straight_beta_schedule
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import sample_ddim
from ddpm_tutorial.toy import GaussianMixture
from ddpm_tutorial.unet import UNet
from experiments import ladder, ladder_flow
from experiments.common import fingerprint


def test_steps_even_on_the_path_are_those_of_the_straight_schedule():
    """Of a linear model's own timesteps the nearest, so nearly the same points as by the exact model of the other."""
    mixture = GaussianMixture(torch.tensor([[-1.0, 0.5], [1.2, -0.3]]), torch.tensor([0.3, 0.2]))
    linear, straight = GaussianDiffusion.from_schedule(), GaussianDiffusion(straight_beta_schedule(1000))
    x_T = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    sampler = partial(sample_ddim, num_inference_steps=8, clip_denoised=False, x_T=x_T)

    def end(sampler, diffusion):
        *_, last = sampler(mixture.noise_model(diffusion), diffusion, x_T.shape)
        return last.x_t

    wanted = end(sampler, straight)
    near, far = ((found - wanted).abs().mean() for found in
                 (end(partial(sampler, spacing="u"), linear), end(sampler, linear)))  # fmt: skip
    assert near < 0.01 and far > 5 * near


def test_two_networks_at_every_cost(tmp_path, monkeypatch):
    for seed, target in enumerate(("v", "velocity")):
        torch.manual_seed(seed)
        unet = UNet(channels=8, num_heads=1, patch_size=2, num_classes=10)
        NoisePredictor(unet, GaussianDiffusion.from_schedule("linear", 24), target).save_pretrained(tmp_path / target)
    monkeypatch.setattr(ladder, "load_fashion_mnist", first_images(1000))
    monkeypatch.setattr(ladder, "BATCH_SIZE", 100)
    monkeypatch.setattr(ladder_flow, "EVALUATIONS", (1, 3))
    monkeypatch.setattr(metrics, "REAL_SUBSETS", 2)
    out, flow, options = tmp_path / "a.json", tmp_path / "velocity", ["--checkpoint", str(tmp_path / "v")]
    options += ["--flow", str(flow), "--num-images", "100", "--data", "sample", "--out", str(out)]
    assert ladder_flow.main(options) == 0
    result = json.loads(out.read_text())
    assert result["settings"]["weights"] == fingerprint(tmp_path / "v")
    assert result["settings"]["flow"] == fingerprint(flow) and "real" in result
    rows = result["rows"]
    assert [row["allowed"] for row in rows] == [1] * 4 + [3] * 6  # one evaluation has no step of Heun's method
    assert all(row["evaluations"] == row["allowed"] for row in rows)
    assert len({row["frechet_distance"] for row in rows[4:]}) == 6  # networks, steps and samplers differ
