"""Fashion-MNIST from each source, IDX files that are others' or not what they should be, scaling, batches."""

import gzip
import hashlib
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_tutorial import data
from ddpm_tutorial.command.evaluate import measure_samples
from ddpm_tutorial.data import (
    CLASS_NAMES,
    IDX_FILES,
    SAMPLE_FOLDER,
    ImageData,
    batch_indices,
    load_fashion_mnist,
    load_images,
    read_idx,
    seeded_generator,
    to_model_range,
    to_uint8,
)
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.unet import UNet

FULL = Path(os.environ.get("FASHION_MNIST_FOLDER", "/usr/share/datasets/fashion-mnist"))  # Debian's package
needs_full = pytest.mark.skipif(not FULL.is_dir(), reason="the full Fashion-MNIST is not installed")


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, split: str, images: np.ndarray, labels: np.ndarray, names=None) -> None:
    for name, array in zip(names or IDX_FILES[split], (images, labels), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(idx_bytes(array))


DIGITS = np.arange(20 * 784).reshape(20, 28, 28) % 256, np.arange(20) % 10  # in the place of MNIST


@pytest.fixture
def idx_folder(tmp_path):
    """A folder of four small IDX files: 20 images that count upwards."""
    for split in IDX_FILES:
        write_idx(tmp_path, split, *DIGITS)
    return tmp_path


@pytest.fixture
def fashion_folder(idx_folder, monkeypatch):
    """The same folder, as if these were the bytes of Fashion-MNIST."""
    pixels, labels = (array.astype(np.uint8).tobytes() for array in DIGITS)
    monkeypatch.setattr(data, "FASHION_SHA256", dict.fromkeys(IDX_FILES, hashlib.sha256(pixels + labels).hexdigest()))
    return idx_folder


# ----------------------------------------------------------------------------------------------- sources
@pytest.mark.parametrize("split,per_class,sha256", [("train", 500, "3e4733ae"), ("test", 100, "22489d48")])
def test_shipped_sample(split, per_class, sha256):
    images, labels, class_names = load_fashion_mnist(split, "sample")
    assert images.shape == (10 * per_class, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [per_class] * 10
    assert class_names == CLASS_NAMES
    assert images.min() == 0 and images.max() == 255 and images.float().std() > 50
    # what the datasets library reads from the same files
    assert hashlib.sha256(images.numpy().tobytes() + bytes(labels.tolist())).hexdigest().startswith(sha256)


def test_shipped_sample_is_at_most_4_mb():
    assert sum(path.stat().st_size for path in SAMPLE_FOLDER.glob("*.parquet")) <= 4_000_000


def test_shipped_sample_needs_no_cache_and_shows_no_progress(monkeypatch, capfd):
    monkeypatch.setattr(data, "_read_sample", data._read_sample.__wrapped__)  # not what other tests have read
    for library in ("datasets", "huggingface_hub"):  # what would make a cache, and progress bars
        monkeypatch.setitem(sys.modules, library, None)
    assert len(load_fashion_mnist("test", "sample").images) == 1000
    assert capfd.readouterr() == ("", "")


@needs_full
@pytest.mark.parametrize("split,count", [("train", 60_000), ("test", 10_000)])
def test_sample_is_taken_from_the_full_data(split, count):
    images, labels, _ = load_fashion_mnist(split, FULL)
    assert images.shape == (count, 1, 28, 28) and labels.bincount().tolist() == [count // 10] * 10
    sample, sample_labels, _ = load_fashion_mnist(split, "sample")
    per_class = len(sample) // 10
    first = torch.cat([(labels == c).nonzero().flatten()[:per_class] for c in range(10)]).sort().values
    assert torch.equal(images[first], sample) and torch.equal(labels[first], sample_labels)
    assert load_images(FULL, split).class_names == CLASS_NAMES


def test_idx_folder_plain_and_gzipped_are_equal(fashion_folder):
    images, labels, class_names = load_fashion_mnist("train", fashion_folder)
    assert images.flatten()[:300].tolist() == [i % 256 for i in range(300)]
    assert labels.tolist() == [i % 10 for i in range(20)] and class_names == CLASS_NAMES
    for name in IDX_FILES["train"]:
        path = fashion_folder / name
        (fashion_folder / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    zipped, zipped_labels, _ = load_fashion_mnist("train", str(fashion_folder))
    assert torch.equal(zipped, images) and torch.equal(zipped_labels, labels)


def test_environment_variable_sets_the_default_source(fashion_folder, monkeypatch):
    monkeypatch.setenv("DDPM_TUTORIAL_DATA", str(fashion_folder))
    assert len(load_fashion_mnist("test").images) == 20
    assert len(load_fashion_mnist("test", "sample").images) == 1000  # an argument comes first


def test_unreachable_hub_says_so_and_names_the_other_sources(monkeypatch, tmp_path):
    monkeypatch.delenv("DDPM_TUTORIAL_DATA", raising=False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ConnectionError, match="'sample'.*folder of Fashion-MNIST's IDX files.*DDPM_TUTORIAL_DATA"):
        load_fashion_mnist("train")


def test_load_images_gives_fashion_mnist_unchanged(fashion_folder):
    for source in ("sample", fashion_folder):
        expected, got = load_fashion_mnist("test", source), load_images(source, "test")
        assert torch.equal(got.images, expected.images) and torch.equal(got.labels, expected.labels)
        assert got.class_names == CLASS_NAMES
    scaled = load_images("sample", "test", image_size=32, channels=3).images
    assert scaled.shape == (1000, 3, 32, 32) and torch.equal(scaled[:, 0], scaled[:, 2])
    assert (scaled.float().mean() - load_images("sample", "test").images.float().mean()).abs() < 2


# ---------------------------------------------------------------------------------- IDX files of other images
def test_digits_are_not_called_clothes(idx_folder):
    """MNIST's files have the names, the sizes and the labels of Fashion-MNIST's."""
    images, labels, class_names = load_images(idx_folder)
    assert images.shape == (20, 1, 28, 28) and labels.tolist() == [i % 10 for i in range(20)]
    assert class_names == tuple("0123456789")
    with pytest.raises(ValueError, match="not those of Fashion-MNIST's train split; load_images"):
        load_fashion_mnist("train", idx_folder)


def test_digits_are_not_judged_as_clothes(idx_folder):
    unet, diffusion = UNet(channels=8, num_classes=10), GaussianDiffusion.from_schedule()
    digits = NoisePredictor(unet, diffusion, class_names=load_images(idx_folder).class_names)
    with pytest.raises(ValueError, match="knows Fashion-MNIST only"):
        measure_samples(digits, str(idx_folder), seed=0)
    clothes = NoisePredictor(unet, diffusion, class_names=CLASS_NAMES)
    with pytest.raises(ValueError, match="not those of Fashion-MNIST's train split"):
        measure_samples(clothes, str(idx_folder), seed=0)


def test_one_other_pixel_or_label_is_not_fashion_mnist(fashion_folder):
    for position in range(2):
        path = fashion_folder / IDX_FILES["train"][position]
        good = path.read_bytes()
        path.write_bytes(good[:-1] + b"\x01")
        assert load_images(fashion_folder).class_names == tuple("0123456789")
        path.write_bytes(good)


def test_idx_files_of_another_size_and_other_classes(tmp_path):
    """As EMNIST's letters, whose labels are 1 … 26."""
    labels = np.arange(52) % 26 + 1
    write_idx(tmp_path, "train", np.ones((52, 64, 48)), labels)
    images, numbers, class_names = load_images(tmp_path)
    assert images.shape == (52, 1, 64, 48) and numbers.tolist() == (labels - 1).tolist()
    assert class_names == tuple(str(i) for i in range(1, 27))
    assert load_images(tmp_path, image_size=28, channels=3).images.shape == (52, 3, 28, 28)


LAYOUTS = {
    "Kaggle's names": "train-images.idx3-ubyte train-labels.idx1-ubyte",
    "Kaggle's folders": " ".join(f"{name}/{name}" for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")),
    "torchvision's root": "FashionMNIST/raw/train-images-idx3-ubyte FashionMNIST/raw/train-labels-idx1-ubyte",
    "torchvision's folder": "raw/train-images-idx3-ubyte raw/train-labels-idx1-ubyte",
    "EMNIST's names": "emnist-letters-train-images-idx3-ubyte emnist-letters-train-labels-idx1-ubyte",
    "upper case": "TRAIN-IMAGES-IDX3-UBYTE Train-Labels.idx1-ubyte",
    "a folder a split": "train/train-images-idx3-ubyte train/train-labels-idx1-ubyte",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_idx_files(tmp_path, layout):
    write_idx(tmp_path, "train", *DIGITS, names=LAYOUTS[layout].split())
    assert load_images(tmp_path).images.flatten()[:300].tolist() == [i % 256 for i in range(300)]
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte nor"):
        load_images(tmp_path, "test")


def test_of_several_idx_files_the_nearest_or_none(tmp_path):
    for name in ("FashionMNIST", "MNIST"):
        write_idx(tmp_path / name / "raw", "train", *DIGITS)
    with pytest.raises(ValueError, match="several IDX files of train images: .*FashionMNIST.* and .*MNIST"):
        load_images(tmp_path)
    assert len(load_images(tmp_path / "MNIST").images) == 20
    write_idx(tmp_path, "train", DIGITS[0][:9], DIGITS[1][:9])
    for name in IDX_FILES["train"]:  # as torchvision leaves them
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert len(load_images(tmp_path).images) == 9


# --------------------------------------------------------------------------------------------- bad files
def test_wrong_split_and_missing_files(tmp_path, idx_folder):
    with pytest.raises(ValueError, match="'train' or 'test', got 'valid'"):
        load_fashion_mnist("valid", "sample")
    with pytest.raises(ValueError, match="'train' or 'test', got 'valid'"):
        load_images(idx_folder, "valid")
    with pytest.raises(FileNotFoundError, match="no such folder.*'hub' or 'sample'"):
        load_fashion_mnist("train", tmp_path / "nowhere")
    (idx_folder / IDX_FILES["test"][1]).unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte nor"):
        load_fashion_mnist("test", idx_folder)


@pytest.mark.parametrize("load", [load_fashion_mnist, lambda split, source: load_images(source, split)])
def test_source_that_is_empty_or_a_file(load, idx_folder):
    with pytest.raises(ValueError, match="the source is empty"):
        load("train", "")
    with pytest.raises(NotADirectoryError, match="is a file, not a folder"):
        load("train", idx_folder / IDX_FILES["train"][0])


@pytest.mark.parametrize("keep", [0, 3, 9, 15, 16, 5000])
def test_truncated_idx_file(idx_folder, keep):
    path = idx_folder / IDX_FILES["train"][0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="train-images.*(truncated|not an IDX file)"):
        load_fashion_mnist("train", idx_folder)


def test_truncated_and_damaged_gzip(idx_folder):
    whole = gzip.compress((idx_folder / IDX_FILES["train"][0]).read_bytes())
    (idx_folder / IDX_FILES["train"][0]).unlink()
    path = idx_folder / f"{IDX_FILES['train'][0]}.gz"
    for damaged in (whole[: len(whole) // 2], whole[:40] + b"\0" * 40 + whole[80:], whole[:1], b"\x1f\x8b"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="train-images"):
            load_fashion_mnist("train", idx_folder)


def test_mislabelled_and_foreign_files(idx_folder):
    images, labels = (idx_folder / name for name in IDX_FILES["train"])
    good_labels = labels.read_bytes()

    labels.write_bytes(images.read_bytes())  # images where labels should be
    with pytest.raises(ValueError, match="expected 00 00 08 01"):
        load_images(idx_folder)
    labels.write_bytes(idx_bytes(np.arange(19) % 10))  # one label too few
    with pytest.raises(ValueError, match="one label each.*19 labels"):
        load_images(idx_folder)
    labels.write_bytes(good_labels + b"\0")
    with pytest.raises(ValueError, match="too long"):
        load_images(idx_folder)
    labels.write_bytes(idx_bytes(np.zeros(0)))
    images.write_bytes(idx_bytes(np.zeros((0, 28, 28))))
    with pytest.raises(ValueError, match=r"\(0, 28, 28\) and 0 labels"):
        load_images(idx_folder)
    images.write_bytes(b"\x89PNG\r\n\x1a\n and more")
    with pytest.raises(ValueError, match="not an IDX file"):
        load_images(idx_folder)


def test_header_that_claims_a_huge_size_is_an_error(tmp_path):
    path = tmp_path / "huge"
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1) + b"\0" * 10)
    with pytest.raises(ValueError, match="truncated"):
        read_idx(path, 3)


def test_what_was_found_in_one_line():
    two = ImageData(torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).byte(), torch.tensor([0, 1]), ("cat", "dog"))
    assert two.describe() == "2 images of 4×5 in colour, values 0 … 119, 2 classes (cat, dog)"
    one = ImageData(two.images[:1, :1], None, ())
    one.left_out = "6 files with other endings (.heic)"
    told = "1 image of 4×5 in grey, values 0 … 19, without labels; left out: 6 files with other endings (.heic)"
    assert one.describe() == told
    many = ImageData(two.images, two.labels, tuple(str(i) for i in range(11)))
    assert many.describe().endswith("11 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …)")


# ------------------------------------------------------------------------------------ scaling and batches
def test_scaling_there_and_back_is_exact():
    levels = torch.arange(256, dtype=torch.uint8)
    scaled = to_model_range(levels)
    assert scaled.min() == -1 and scaled.max() == 1
    assert torch.equal(to_uint8(scaled), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    with pytest.raises(ValueError, match="uint8"):
        to_model_range(scaled)
    with pytest.raises(ValueError, match="floats in .* got torch.uint8"):
        to_uint8(levels)


def test_batches_cover_each_epoch_once_and_continue_anywhere():
    stream = batch_indices(23, 5, seed=7)
    batches = [next(stream) for _ in range(12)]  # 4 a epoch: three image indices are left out of each
    for epoch in range(3):
        seen = torch.cat(batches[4 * epoch : 4 * epoch + 4])
        assert len(seen.unique()) == 20 and seen.min() >= 0 and seen.max() < 23
    assert not torch.equal(batches[0], batches[4])
    for first in (0, 1, 4, 7):
        again = batch_indices(23, 5, seed=7, first_step=first)
        for expected in batches[first:]:
            assert torch.equal(next(again), expected)


def test_batch_size_must_fit():
    for size in (0, 24):
        with pytest.raises(ValueError, match="1 … 23"):
            next(batch_indices(23, size, seed=0))


def test_seeded_generators_differ_for_neighbours_and_for_zeros_at_the_end():
    keys = [(a, b) for a in range(20) for b in range(20)]
    keys += [(0,), (5,), (0, 5, 0), (0, 5, 0, 0), (5, 0, 0), (2**32,), (2**63 - 1,), (2**63 - 1, 0), (2**127,)]
    draws = {tuple(torch.rand(3, generator=seeded_generator(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)
    assert seeded_generator(7, 1).initial_seed() == seeded_generator(np.int64(7), np.int64(1)).initial_seed()
    assert max(seeded_generator(seed).initial_seed() for seed in range(9)) > 2**60  # more than 32 bits


def test_streams_are_those_of_numpys_mersenne_twister():
    """All 624 words of the state, to the last bit. NumPy's gives its last word before it makes new ones."""
    key = (2**64 + 5, 3)
    twister = np.random.MT19937(np.random.SeedSequence(key[0], spawn_key=key[1:]))
    drawn = torch.empty(2000, dtype=torch.int64).random_(0, 2**20, generator=seeded_generator(*key))
    assert drawn.tolist() == (twister.random_raw(2001)[1:] % 2**20).tolist()


def test_seeds_that_share_their_low_32_bits_have_streams_of_their_own(monkeypatch):
    """What torch's CPU generator keeps of a seed is its low half alone; here all keys have the same one."""
    generate = np.random.SeedSequence.generate_state

    class SameLowHalf(np.random.SeedSequence):
        def generate_state(self, n_words, dtype=np.uint32):
            words = generate(self, n_words, dtype)
            return words >> np.uint64(32) << np.uint64(32) | np.uint64(7) if dtype is np.uint64 else words

    monkeypatch.setattr(np.random, "SeedSequence", SameLowHalf)
    one, two = seeded_generator(0, 1), seeded_generator(0, 2)
    assert one.initial_seed() % 2**32 == two.initial_seed() % 2**32 and one.initial_seed() != two.initial_seed()
    alone = [torch.randn(5, generator=torch.Generator().manual_seed(g.initial_seed())) for g in (one, two)]
    assert torch.equal(*alone)  # torch's own rule
    assert not torch.equal(torch.randn(5, generator=one), torch.randn(5, generator=two))


@pytest.mark.parametrize("key", [(-1,), (0, -1), (1.5,), ("7",), (None,), (2**128,), (0, 2**32)])
def test_seeds_that_are_no_integers_in_range_are_refused(key):
    """Larger ones would share a stream: NumPy reads 2**32 as the two parts 0 and 1."""
    with pytest.raises(ValueError, match=r"seed must be an integer in 0 … 2\*\*.* got "):
        seeded_generator(*key)
