"""Fashion-MNIST from each source, IDX files that are not what they should be, scaling, batches."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_tutorial.data import (
    CLASS_NAMES,
    IDX_FILES,
    SAMPLE_FOLDER,
    batch_indices,
    load_fashion_mnist,
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


def test_seeded_generators_differ_for_neighbours():
    draws = {tuple(torch.rand(3, generator=seeded_generator(a, b)).tolist()) for a in range(20) for b in range(20)}
    assert len(draws) == 400
