"""Loading networks with their weights: what is shipped, what was saved, and what does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_tutorial.guidance import NoisyClassifier
from ddpm_tutorial.metrics import Classifier
from ddpm_tutorial.unet import UNet

NETWORKS = {UNet: {"channels": 8}, Classifier: {"num_features": 8}, NoisyClassifier: {"channels": 8, "image_size": 8}}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_shipped_weights_are_the_default(network, capsys):
    model = network.from_pretrained()
    assert not model.training and capsys.readouterr() == ("", "")
    shipped = load_file(network.shipped / "model.safetensors")
    assert all(torch.equal(tensor, shipped[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("network", NETWORKS)
def test_saved_and_loaded_is_the_same(network, tmp_path):
    model = network(**NETWORKS[network])
    model.save_pretrained(tmp_path)
    loaded = network.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys() and not loaded.training
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def lose_a_tensor(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if name.endswith("weight"))]
    save_file(tensors, path, metadata={"format": "pt"})


def cut_the_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def change_the_width(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    name = next(name for name in ("channels", "num_features") if name in config)
    path.write_text(json.dumps(config | {name: 16}))


def write_no_object(folder):
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("damage", [lose_a_tensor, cut_the_weights, change_the_width, write_no_object])
def test_what_does_not_fit_is_refused(network, damage, tmp_path):
    network(**NETWORKS[network]).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"is damaged or holds no {network.__name__} of this package"):
        network.from_pretrained(tmp_path)


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_that_are_no_numbers_or_not_finite_are_refused(network, tmp_path):
    network(**NETWORKS[network]).save_pretrained(tmp_path)
    path, tensors = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight"))
    for dtype in (torch.int8, torch.bool):
        save_file(tensors | {name: tensors[name].to(dtype)}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"{tmp_path} is damaged.*{name} is of {dtype}, not torch.float32"):
            network.from_pretrained(tmp_path)
    for value in (float("nan"), float("inf")):
        save_file(tensors | {name: torch.full_like(tensors[name], value)}, path, metadata={"format": "pt"})
        with pytest.raises(FloatingPointError, match=f"{name} is not finite"):
            network.from_pretrained(tmp_path)
    save_file({name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}, path)
    assert network.from_pretrained(tmp_path).state_dict()[name].dtype == torch.float32


@pytest.mark.parametrize(
    "damage", [{"num_heads": -4}, {"channel_mults": []}, {"num_heads": 0}, {"channels": "x"}, {"wings": 2}]
)
def test_a_configuration_that_makes_no_network_is_refused(damage, tmp_path):
    UNet(channels=8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for text in (json.dumps(config | damage), "[" * 100_000):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="is damaged or holds no UNet of this package"):
            UNet.from_pretrained(tmp_path)


def test_a_place_that_is_no_folder_and_no_name_on_the_hub_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    for place in ("nowhere", "runs/b", "a/b/c", tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=f"no such folder: {place}"):
            UNet.from_pretrained(place)
    with pytest.raises(FileNotFoundError, match="no checkpoint in runs/a: it holds no config.json"):
        UNet.from_pretrained("runs/a")
