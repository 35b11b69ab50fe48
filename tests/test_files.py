"""Files: networks saved, shipped, damaged or on the hub; writing whole or not at all; one run in a folder."""

import re
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ddpm_tutorial import files
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.files import ASIDE, asking_hub, check_writable, locked, reading, written_aside
from ddpm_tutorial.latents import Autoencoder
from ddpm_tutorial.metrics import Classifier, NoisyClassifier
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.unet import UNet

NETWORKS = {
    NoisePredictor: lambda: NoisePredictor(UNet(channels=8, num_classes=3), GaussianDiffusion.from_schedule()),
    Classifier: lambda: Classifier(num_features=8),
    NoisyClassifier: lambda: NoisyClassifier(channels=8, image_size=8),
    Autoencoder: lambda: Autoencoder(channels=8, scale=0.5),
}


# ----------------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize("network", NETWORKS)
def test_the_shipped_weights_are_the_default(network, capsys):
    model = network.from_pretrained()
    assert not model.training and capsys.readouterr() == ("", "")
    shipped, (_, kept) = load_file(network.shipped / "model.safetensors"), model.contents()
    assert shipped.keys() == kept.keys()
    assert all(torch.equal(tensor, shipped[name].to(tensor.dtype)) for name, tensor in kept.items())


@pytest.mark.parametrize("network", NETWORKS)
def test_saved_and_loaded_is_the_same(network, tmp_path):
    model = NETWORKS[network]()
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = network.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.state_dict().keys() == model.state_dict().keys() and not loaded.training
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.contents()[0] == model.contents()[0]


def lose_a_tensor(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if name.endswith("weight"))]
    save_file(tensors, path)


def cut_the_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def change_the_width(folder):
    path = folder / "config.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub('("channels"|"num_features"): 8', r"\1: 16", text), encoding="utf-8")


def write_no_object(folder):
    (folder / "config.json").write_text("[]", encoding="utf-8")


def write_no_json(folder):
    (folder / "config.json").write_text("[" * 100_000, encoding="utf-8")


def write_no_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe")


DAMAGES = [lose_a_tensor, cut_the_weights, change_the_width, write_no_object, write_no_json, write_no_text]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_refused_in_one_line(network, damage, tmp_path):
    NETWORKS[network]().save_pretrained(tmp_path)
    damage(tmp_path)
    message = f"^{tmp_path} is damaged or holds no {network.__name__} of this package: "
    with pytest.raises(ValueError, match=message) as told:
        network.from_pretrained(tmp_path)
    assert "\n" not in str(told.value) and len(str(told.value)) < len(message) + 310


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_that_are_no_numbers_or_not_finite_are_refused(network, tmp_path):
    NETWORKS[network]().save_pretrained(tmp_path)
    path, tensors = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight"))
    for dtype in (torch.int8, torch.bool):
        save_file(tensors | {name: tensors[name].to(dtype)}, path)
        with pytest.raises(ValueError, match=f"{tmp_path} is damaged.*{name} is of {dtype}, not torch.float32"):
            network.from_pretrained(tmp_path)
    for value in (float("nan"), float("inf")):
        save_file(tensors | {name: torch.full_like(tensors[name], value)}, path)
        with pytest.raises(FloatingPointError, match=f"{name} in model.safetensors is not finite"):
            network.from_pretrained(tmp_path)
    save_file(tensors | {name: tensors[name].half()}, path)
    assert network.from_pretrained(tmp_path).contents()[1][name].dtype == torch.float32


def test_a_place_that_is_no_folder_and_no_name_on_the_hub_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "runs" / "a").mkdir(parents=True)
    for place in ("nowhere", "runs/b", "a/b/c", tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=f"no such folder: {place}"):
            NoisePredictor.from_pretrained(place)
    with pytest.raises(FileNotFoundError, match="no checkpoint in runs/a: it holds no config.json"):
        NoisePredictor.from_pretrained("runs/a")


def test_a_folder_takes_no_options_of_a_download(tmp_path):
    NETWORKS[NoisePredictor]().save_pretrained(tmp_path)
    for place in (tmp_path, None):
        with pytest.raises(ValueError, match="revison: for a download from the hub, and .* is a folder"):
            NoisePredictor.from_pretrained(place, revison="v2")


def test_a_name_on_the_hub_is_downloaded_with_its_options(tmp_path, monkeypatch):
    model, asked = NETWORKS[NoisePredictor](), []
    model.save_pretrained(tmp_path)

    def download(repository, name, **options):
        asked.append((repository, name, options))
        return str(tmp_path / name)

    monkeypatch.setattr(files, "hf_hub_download", download)
    loaded = NoisePredictor.from_pretrained("somebody/clothes", revision="v1")
    assert loaded.contents()[0] == model.contents()[0]
    names = "config.json", "model.safetensors"
    assert asked == [("somebody/clothes", name, {"revision": "v1"}) for name in names]


def test_hub_is_asked_twice_at_most_and_quietly():
    from huggingface_hub.utils import http_backoff, logging

    before, level = http_backoff.__kwdefaults__["max_retries"], logging.get_verbosity()
    with pytest.raises(RuntimeError), asking_hub():
        assert http_backoff.__kwdefaults__["max_retries"] == 1
        assert not logging.get_logger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
        raise RuntimeError
    assert (http_backoff.__kwdefaults__["max_retries"], logging.get_verbosity()) == (before, level)


# ---------------------------------------------------------------------------------------- reading and writing
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (TypeError("of two\n  lines"), "x.json is damaged or holds no figures: of two lines"),
        (KeyError("name"), "x.json is damaged or holds no figures: KeyError 'name'"),
        (RecursionError(), "x.json is damaged or holds no figures: RecursionError "),
        (ValueError("x.json must hold seven"), "x.json must hold seven"),
    ],
)
def test_whatever_is_wrong_in_a_file_is_one_line_that_names_it(error, told):
    with pytest.raises(ValueError) as caught, reading("x.json", "figures"):
        raise error
    assert str(caught.value) == told


@pytest.mark.parametrize("error", [
    FileNotFoundError("x.json"), FloatingPointError("not finite"), MemoryError("full"),
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
])  # fmt: skip
def test_what_is_no_damage_of_a_file_stays_what_it_is(error):
    with pytest.raises(type(error)), reading("x.json", "figures"):
        raise error


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    out = tmp_path / "x.txt"
    with written_aside(out) as aside:
        aside.write_text("first", encoding="utf-8")
        assert not out.exists() and aside.parent == tmp_path and aside.name == f"{ASIDE}x.txt"
    with pytest.raises(KeyboardInterrupt), written_aside(out) as aside:
        aside.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert out.read_text(encoding="utf-8") == "first" and list(tmp_path.iterdir()) == [out]
    with pytest.raises(OSError, match="No space left"), written_aside(out):  # in safetensors' words
        raise SafetensorError("I/O error: No space left on device")


def test_where_nothing_can_be_written_is_told_and_nothing_is_left(tmp_path):
    check_writable(tmp_path / "x.txt")
    assert not list(tmp_path.iterdir())
    for out in (tmp_path / "none" / "x.txt", tmp_path / ("x" * 249)):
        with pytest.raises(OSError, match=f"nothing can be written to {out}: "):
            check_writable(out)


HOLDER = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1], timeout=0):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_and_a_killed_one_locks_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):  # a refused one must not let go of the other's lock
            with pytest.raises(ValueError, match=f"another run is writing to {tmp_path}"), locked(tmp_path):
                pass
    finally:
        holder.kill()
        holder.wait()
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())
