"""Fashion-MNIST from each source, IDX files that are not what they should be, scaling, batches."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_tutorial.data import (
    CLASS_NAMES,
    IDX_FILES,
    SAMPLE_FOLDER,
    batch_indices,
    load_fashion_mnist,
    load_images,
    read_idx,
    seeded_generator,
    to_model_range,
    to_uint8,
)

FULL = Path(os.environ.get("FASHION_MNIST_FOLDER", "/usr/share/datasets/fashion-mnist"))  # Debian's package
needs_full = pytest.mark.skipif(not FULL.is_dir(), reason="the full Fashion-MNIST is not installed")


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    """A folder of four small IDX files: 20 images that count upwards."""
    images = np.arange(20 * 784).reshape(20, 28, 28) % 256
    labels = np.arange(20) % 10
    for image_name, label_name in IDX_FILES.values():
        (tmp_path / image_name).write_bytes(idx_bytes(images))
        (tmp_path / label_name).write_bytes(idx_bytes(labels))
    return tmp_path


# ----------------------------------------------------------------------------------------------- sources
@pytest.mark.parametrize("split,per_class", [("train", 500), ("test", 100)])
def test_shipped_sample(split, per_class):
    images, labels, class_names = load_fashion_mnist(split, "sample")
    assert images.shape == (10 * per_class, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [per_class] * 10
    assert class_names == CLASS_NAMES
    assert images.min() == 0 and images.max() == 255 and images.float().std() > 50


def test_shipped_sample_is_at_most_4_mb():
    assert sum(path.stat().st_size for path in SAMPLE_FOLDER.glob("*.parquet")) <= 4_000_000


@needs_full
@pytest.mark.parametrize("split,count", [("train", 60_000), ("test", 10_000)])
def test_sample_is_taken_from_the_full_data(split, count):
    images, labels, _ = load_fashion_mnist(split, FULL)
    assert images.shape == (count, 1, 28, 28) and labels.bincount().tolist() == [count // 10] * 10
    sample, sample_labels, _ = load_fashion_mnist(split, "sample")
    per_class = len(sample) // 10
    first = torch.cat([(labels == c).nonzero().flatten()[:per_class] for c in range(10)]).sort().values
    assert torch.equal(images[first], sample) and torch.equal(labels[first], sample_labels)


def test_idx_folder_plain_and_gzipped_are_equal(idx_folder):
    images, labels, _ = load_fashion_mnist("train", idx_folder)
    assert images.flatten()[:300].tolist() == [i % 256 for i in range(300)]
    assert labels.tolist() == [i % 10 for i in range(20)]
    for name in IDX_FILES["train"]:
        path = idx_folder / name
        (idx_folder / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    zipped, zipped_labels, _ = load_fashion_mnist("train", str(idx_folder))
    assert torch.equal(zipped, images) and torch.equal(zipped_labels, labels)


def test_environment_variable_sets_the_default_source(idx_folder, monkeypatch):
    monkeypatch.setenv("DDPM_TUTORIAL_DATA", str(idx_folder))
    assert len(load_fashion_mnist("test").images) == 20
    assert len(load_fashion_mnist("test", "sample").images) == 1000  # an argument comes first


def test_unreachable_hub_says_so_and_names_the_other_sources(monkeypatch, tmp_path):
    monkeypatch.delenv("DDPM_TUTORIAL_DATA", raising=False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ConnectionError, match="'sample'.*folder of Fashion-MNIST's IDX files.*DDPM_TUTORIAL_DATA"):
        load_fashion_mnist("train")


# --------------------------------------------------------------------------------------------- bad files
def test_wrong_split_and_missing_files(tmp_path, idx_folder):
    with pytest.raises(ValueError, match="'train' or 'test', got 'valid'"):
        load_fashion_mnist("valid", "sample")
    with pytest.raises(FileNotFoundError, match="no such folder.*'hub', 'sample'"):
        load_fashion_mnist("train", tmp_path / "nowhere")
    (idx_folder / IDX_FILES["test"][1]).unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte nor"):
        load_fashion_mnist("test", idx_folder)


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
    for data in (whole[: len(whole) // 2], whole[:40] + b"\0" * 40 + whole[80:], whole[:1], b"\x1f\x8b"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="train-images"):
            load_fashion_mnist("train", idx_folder)


def test_mislabelled_and_foreign_files(idx_folder):
    images, labels = (idx_folder / name for name in IDX_FILES["train"])
    good_labels = labels.read_bytes()

    labels.write_bytes(images.read_bytes())  # images where labels should be
    with pytest.raises(ValueError, match="expected 00 00 08 01"):
        load_fashion_mnist("train", idx_folder)
    labels.write_bytes(idx_bytes(np.arange(19) % 10))  # one label too few
    with pytest.raises(ValueError, match="one label each.*19 labels"):
        load_fashion_mnist("train", idx_folder)
    labels.write_bytes(idx_bytes(np.arange(20)))  # labels of another data set
    with pytest.raises(ValueError, match="0 … 9, got 19"):
        load_fashion_mnist("train", idx_folder)
    labels.write_bytes(good_labels + b"\0")
    with pytest.raises(ValueError, match="too long"):
        load_fashion_mnist("train", idx_folder)
    labels.write_bytes(good_labels)
    images.write_bytes(idx_bytes(np.zeros((20, 32, 32))))
    with pytest.raises(ValueError, match=r"28×28 images.*\(20, 32, 32\)"):
        load_fashion_mnist("train", idx_folder)
    images.write_bytes(b"\x89PNG\r\n\x1a\n and more")
    with pytest.raises(ValueError, match="not an IDX file"):
        load_fashion_mnist("train", idx_folder)


def test_header_that_claims_a_huge_size_is_an_error(tmp_path):
    path = tmp_path / "huge"
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1) + b"\0" * 10)
    with pytest.raises(ValueError, match="truncated"):
        read_idx(path, 3)


# ------------------------------------------------------------------------------------------ other images
def save_picture(path, colour, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def picture_folder(tmp_path):
    """Two classes, in colour, of one size: three red pictures and two blue ones."""
    for i in range(3):
        save_picture(tmp_path / "photos" / "red" / f"{i}.png", (250 - i, 0, 10))
    for i in range(2):
        save_picture(tmp_path / "photos" / "blue" / f"{i}.jpg", (0, 0, 200))
    return tmp_path / "photos"


def test_load_images_gives_fashion_mnist_unchanged(idx_folder):
    for source in ("sample", idx_folder):
        expected, got = load_fashion_mnist("test", source), load_images(source, "test")
        assert torch.equal(got.images, expected.images) and torch.equal(got.labels, expected.labels)
        assert got.class_names == CLASS_NAMES
    scaled = load_images("sample", "test", image_size=32, channels=3).images
    assert scaled.shape == (1000, 3, 32, 32) and torch.equal(scaled[:, 0], scaled[:, 2])
    assert (scaled.float().mean() - load_images("sample", "test").images.float().mean()).abs() < 2


def test_folder_with_a_sub_folder_a_class(picture_folder):
    images, labels, class_names = load_images(picture_folder)
    assert images.shape == (5, 3, 30, 40) and images.dtype == torch.uint8
    assert class_names == ("blue", "red") and labels.tolist() == [0, 0, 1, 1, 1]
    assert images[2:, :, 0, 0].tolist() == [[250, 0, 10], [249, 0, 10], [248, 0, 10]]  # in the order of their names


def test_size_and_channels_are_chosen(tmp_path):
    """The middle square of a picture in three vertical stripes is its middle stripe."""
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, :20], stripes[:, 20:40], stripes[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    (tmp_path / "flat").mkdir()
    Image.fromarray(stripes).save(tmp_path / "flat" / "wide.png")
    save_picture(tmp_path / "flat" / "tall.png", 255, (10, 50), mode="L")
    images, labels, class_names = load_images(str(tmp_path / "flat"), image_size=20, channels=3)
    assert labels is None and class_names == ()
    assert images.shape == (2, 3, 20, 20) and images[0].min() == 255  # "tall" comes first
    assert images[1, :, 10, 10].tolist() == [0, 255, 0] and images[1, 1].min() > 120
    grey = load_images(tmp_path / "flat", image_size=8, channels=1).images
    assert grey.shape == (2, 1, 8, 8) and grey[0].min() == 255 and 130 < grey[1].float().mean() < 160


def test_pictures_that_differ_need_a_size_or_channels(picture_folder):
    save_picture(picture_folder / "red" / "z.png", (1, 2, 3), (41, 30))
    with pytest.raises(ValueError, match="z.png is 30×41 in 3 channels, those before are 30×40.*--image-size"):
        load_images(picture_folder)
    save_picture(picture_folder / "red" / "z.png", 1, mode="L")
    with pytest.raises(ValueError, match="z.png is 30×40 in 1 channel,.*--image-channels"):
        load_images(picture_folder)
    assert load_images(picture_folder, channels=1).images.shape == (6, 1, 30, 40)


def test_splits_are_sub_folders(picture_folder, tmp_path):
    with pytest.raises(ValueError, match="all of it is the split train"):
        load_images(picture_folder, "test")
    picture_folder.rename(tmp_path / "train")
    save_picture(tmp_path / "test" / "blue" / "0.png", (0, 0, 9), (5, 4))
    assert len(load_images(tmp_path).images) == 5
    images, _, class_names = load_images(tmp_path, "test")
    assert images.shape == (1, 3, 4, 5) and class_names == ("blue",)
    with pytest.raises(ValueError, match="no split valid; it has test, train"):
        load_images(tmp_path, "valid")


def test_pictures_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "flat" / "turned.jpg", exif=exif)
    assert load_images(tmp_path / "flat").images.shape == (1, 3, 40, 30)


def test_bad_picture_folders(picture_folder, tmp_path):
    save_picture(picture_folder / "beside.png", (0, 0, 0))
    with pytest.raises(ValueError, match="images beside sub-folders"):
        load_images(picture_folder)
    (picture_folder / "beside.png").unlink()
    (picture_folder / "red" / "broken.png").write_bytes((picture_folder / "red" / "0.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="broken.png is no image"):
        load_images(picture_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds neither train-images-idx3-ubyte nor images"):
        load_images(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such folder.*owner/name"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="1 .grey. or 3 .colour., got 2"):
        load_images("sample", channels=2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        load_images("sample", image_size=0)


def test_data_set_of_the_hub(monkeypatch):
    """By the columns that datasets says are images and class labels, whatever their names."""
    import datasets

    kinds = datasets.ClassLabel(names=["cat", "dog"])
    features = {"id": datasets.Value("int64"), "img": datasets.Image(), "kind": kinds}
    rows = {"id": [7, 8], "img": [Image.new("RGB", (6, 4), c) for c in ("red", "blue")], "kind": [1, 0]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or table)
    images, labels, class_names = load_images("somebody/pets", "test")
    assert asked == [("somebody/pets", "test")]
    assert images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]] and images.shape == (2, 3, 4, 6)
    assert labels.tolist() == [1, 0] and class_names == ("cat", "dog")

    table = table.remove_columns("kind")
    assert load_images("somebody/pets").labels is None
    table = table.remove_columns("img")
    with pytest.raises(ValueError, match="no column of images; it has id"):
        load_images("somebody/pets")


def test_unreachable_data_set_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ConnectionError, match="no folder nobody/nothing, and the hub's could not be read"):
        load_images("nobody/nothing")


# ------------------------------------------------------------------------------------ scaling and batches
def test_scaling_there_and_back_is_exact():
    levels = torch.arange(256, dtype=torch.uint8)
    scaled = to_model_range(levels)
    assert scaled.min() == -1 and scaled.max() == 1
    assert torch.equal(to_uint8(scaled), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    with pytest.raises(ValueError, match="uint8"):
        to_model_range(scaled)


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


@pytest.mark.parametrize("key", [(-1,), (0, -1), (1.5,), ("7",), (None,), (2**128,), (0, 2**32)])
def test_seeds_that_are_no_integers_in_range_are_refused(key):
    """Larger ones would share a stream: NumPy reads 2**32 as the two parts 0 and 1."""
    with pytest.raises(ValueError, match=r"seed must be an integer in 0 … 2\*\*.* got "):
        seeded_generator(*key)
