"""Images of every kind that people have in folders and on the hub: read right, or refused by name."""

import io
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_tutorial.data import load_images

GREY = np.array([[0, 255, 256, 257], [1000, 32768, 65534, 65535]], np.uint16)  # 16 bits, and what they are of 8:
EIGHT = np.array([[0, 0, 1, 1], [3, 128, 255, 255]], np.uint8)


def save_picture(path, colour, size=(40, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def png(depth: int, kind: int, pixels: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of ``depth`` bits; ``kind`` is 0 grey, 2 colour, 4 grey and alpha, 6 colour and alpha."""
    rows = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    height, width = pixels.shape[0], pixels.shape[1] * max(1, 8 // depth)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def tiff(pixels: np.ndarray, mode: str = "", changed: dict[int, tuple[int, int]] | None = None) -> bytes:
    """A TIFF, with the values of some of its tags changed from one to another."""
    picture = Image.frombytes(mode, pixels.shape[::-1], pixels.tobytes()) if mode else Image.fromarray(pixels)
    picture.save(file := io.BytesIO(), "TIFF", tiffinfo={274: 1, 339: 1})
    data = file.getvalue()
    for tag, values in (changed or {}).items():
        old, new = (struct.pack("<HHIHH", tag, 3, 1, value, 0) for value in values)
        assert data.count(old) == 1
        data = data.replace(old, new)
    return data


@pytest.fixture
def picture_folder(tmp_path):
    """Two classes, in colour, of one size: three red pictures and two blue ones."""
    for i in range(3):
        save_picture(tmp_path / "photos" / "red" / f"{i}.png", (250 - i, 0, 10))
    for i in range(2):
        save_picture(tmp_path / "photos" / "blue" / f"{i}.jpg", (0, 0, 200))
    return tmp_path / "photos"


# ------------------------------------------------------------------------------------------------ folders
def test_folder_with_a_sub_folder_a_class(picture_folder):
    data = load_images(picture_folder)
    images, labels, class_names = data
    assert images.shape == (5, 3, 30, 40) and images.dtype == torch.uint8
    assert class_names == ("blue", "red") and labels.tolist() == [0, 0, 1, 1, 1]
    assert images[2:, :, 0, 0].tolist() == [[250, 0, 10], [249, 0, 10], [248, 0, 10]]  # in the order of their names
    assert data.describe() == "5 images of 30×40 in colour, values 0 … 250, 2 classes (blue, red)"


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


@pytest.mark.parametrize(
    "train,test", [("train", "test"), ("Train", "TEST"), ("training", "testing"), ("Training", "Testing")]
)
def test_splits_are_sub_folders(picture_folder, tmp_path, train, test):
    with pytest.raises(ValueError, match="all of it is the split train"):
        load_images(picture_folder, "test")
    picture_folder.rename(tmp_path / train)
    save_picture(tmp_path / test / "blue" / "0.png", (0, 0, 9), (5, 4))
    assert len(load_images(tmp_path).images) == 5
    images, _, class_names = load_images(tmp_path, "test")
    assert images.shape == (1, 3, 4, 5) and class_names == ("blue",)
    with pytest.raises(ValueError, match=f"no split valid; it has {', '.join(sorted((train, test)))}"):
        load_images(tmp_path, "valid")
    for name in ("val", "Valid", "validation"):
        save_picture(tmp_path / name / "red" / "0.png", 7, (6, 4))
        assert load_images(tmp_path, "valid").images.shape == (1, 3, 4, 6)
        (tmp_path / name).rename(tmp_path / f".{name}")


@pytest.mark.parametrize(
    "also,told",
    [
        ("cats/0.png", "has the splits test, train beside cats"),
        ("0.png", "has the splits test, train beside 0.png"),
        ("Training/red/0.png", "has the splits Training, test, train beside each other"),
        ("train/test/0.png", "is a split and has the splits test"),
    ],
)
def test_splits_beside_something_else_are_refused(picture_folder, tmp_path, also, told):
    picture_folder.rename(tmp_path / "train")
    save_picture(tmp_path / "test" / "red" / "0.png", 0)
    save_picture(tmp_path / also, 0)
    with pytest.raises(ValueError, match=told):
        load_images(tmp_path)


def test_class_with_sub_folders_or_without_images_is_refused(picture_folder):
    save_picture(picture_folder / "red" / "old" / "0.png", 0)
    with pytest.raises(ValueError, match=r"photos.red holds sub-folders \(old\), and a class is a folder of images"):
        load_images(picture_folder)
    with pytest.raises(ValueError, match=r"photos holds sub-folders \(blue, red\)"):
        load_images(picture_folder.parent)
    (picture_folder / "red" / "old").rename(picture_folder / "green")
    (picture_folder / "green" / "0.png").rename(picture_folder / "green" / "0.heic")
    with pytest.raises(ValueError, match=r"photos.green holds no images \(has 1 file with other endings \(.heic\)\)"):
        load_images(picture_folder)
    (picture_folder / "green" / "0.heic").unlink()
    with pytest.raises(ValueError, match=r"class folder .*green holds no images \(is empty\)"):
        load_images(picture_folder)


def test_litter_of_systems_and_programs_is_no_class_and_no_image(picture_folder):
    expected = load_images(picture_folder)
    (picture_folder / ".ipynb_checkpoints").mkdir()
    for name in ("__MACOSX/red", "red/.ipynb_checkpoints", "@eaDir", ".git"):
        save_picture(picture_folder / name / "0.png", 0)
    for name in ("._x.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        for folder in (picture_folder, picture_folder / "red"):
            (folder / name).write_bytes(b"no image")
    data = load_images(picture_folder)
    assert torch.equal(data.images, expected.images) and data.describe() == expected.describe()
    assert len(load_images(picture_folder / "red").images) == 3


def test_links_are_followed_but_not_round(picture_folder, tmp_path):
    (picture_folder / "crimson").symlink_to(picture_folder / "red", target_is_directory=True)
    for place in (picture_folder, picture_folder / "red"):
        (place / "loop").symlink_to(place, target_is_directory=True)
    (picture_folder / "blue" / "up").symlink_to("..", target_is_directory=True)
    (picture_folder / "self").symlink_to("self")
    images, labels, class_names = load_images(picture_folder)
    assert class_names == ("blue", "crimson", "red") and labels.bincount().tolist() == [2, 3, 3]
    (picture_folder / "red" / "gone.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="gone.png is no image that can be read: .*No such file"):
        load_images(picture_folder)


def test_files_with_other_endings_are_told(picture_folder):
    (picture_folder / "labels.csv").write_text("no image")
    for name in ("a.HEIC", "b.heic", "README"):
        (picture_folder / "red" / name).write_text("no image")
    told = load_images(picture_folder).describe()
    assert told.endswith("2 classes (blue, red); left out: 4 files with other endings (.csv, .heic, none)")


@pytest.mark.parametrize("name", ["x.jfif", "x.JPE", "x.gif", "x.BMP", "x.webp", "x.tif", "x.pgm"])
def test_endings_of_images(tmp_path, name):
    picture = Image.new("L", (6, 4), 200)
    picture.save(tmp_path / name, {".jpe": "JPEG", ".jfif": "JPEG"}.get((tmp_path / name).suffix.lower()))
    images = load_images(tmp_path, channels=1).images
    assert images.shape == (1, 1, 4, 6) and (images.int() - 200).abs().max() < 3


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp", "x.tif"])
def test_file_of_several_images_is_refused(tmp_path, name):
    first, *others = [Image.new("RGB", (6, 4), (90 * i, 0, 0)) for i in range(3)]
    first.save(tmp_path / name, save_all=True, append_images=others)
    with pytest.raises(ValueError, match=f"{name} is no image that can be read: it holds 3 images"):
        load_images(tmp_path)


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
    (tmp_path / "empty" / "x.heic").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"images, nor .*; it has 1 file with other endings \(.heic\)"):
        load_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="1 .grey. or 3 .colour., got 2"):
        load_images("sample", channels=2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        load_images("sample", image_size=0)


# ----------------------------------------------------------------------------------------------- pictures
SIXTEEN_BITS = {
    "grey.png": png(16, 0, GREY),
    "colour.png": png(16, 2, np.stack([GREY] * 3, -1)),
    "little.tif": tiff(GREY),
    "big.tiff": tiff(GREY.astype(">u2"), "I;16B"),
    "grey.pgm": b"P5 4 2 65535\n" + GREY.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_16_bits_are_scaled_to_8(tmp_path, name):
    (tmp_path / name).write_bytes(SIXTEEN_BITS[name])
    images = load_images(tmp_path).images
    assert len(images[0]) == 3 if "colour" in name else 1
    assert images[0, 0].tolist() == EIGHT.tolist()


def test_png_of_16_bits_in_the_mode_of_older_pillows(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(SIXTEEN_BITS["grey.png"])

    def open_as_i(path):
        picture = Image.fromarray(GREY.astype(np.int32))
        picture.format = "PNG"
        return picture

    monkeypatch.setattr(Image, "open", open_as_i)
    assert load_images(tmp_path).images[0, 0].tolist() == EIGHT.tolist()


def test_16_bits_are_turned_upright(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(GREY, changed={274: (1, 6)}))
    assert load_images(tmp_path).images[0, 0].tolist() == np.rot90(EIGHT, -1).tolist()


@pytest.mark.parametrize(
    "name,content,told",
    [
        ("x.tif", tiff(GREY.astype(np.int32)), "32-bit integer numbers"),
        ("x.tif", tiff(np.ones((2, 4), np.int32)), "32-bit integer numbers"),
        ("x.tif", tiff((GREY / 65535).astype(np.float32)), "floating point numbers"),
        ("x.tif", tiff(GREY, changed={262: (1, 0)}), "signed, or 12 bits, or 0 is white"),
        ("x.tif", tiff(GREY, changed={258: (16, 12)}), "signed, or 12 bits, or 0 is white"),
        ("x.tif", tiff(EIGHT, changed={339: (1, 2)}), "signed, or 12 bits, or 0 is white"),
        ("x.png", png(16, 0, GREY // 16), "almost black: .*x.png has the highest value, 4095 of 65535"),
    ],
)
def test_grey_levels_whose_white_is_not_known_are_refused(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told if "x.png" in told else f"x.tif is no image that can be read: .*{told}"):
        load_images(tmp_path)


def test_one_black_image_of_16_bits_among_others_is_black(tmp_path):
    (tmp_path / "0.png").write_bytes(png(16, 0, GREY * 0))
    (tmp_path / "1.png").write_bytes(png(16, 0, GREY))
    assert load_images(tmp_path).images[:, 0].tolist() == [[[0] * 4] * 2, EIGHT.tolist()]


def hidden(mode: str) -> Image.Image:
    """Four pixels: opaque, half transparent, and two whose colours no viewer shows."""
    pixels = np.array([[[40, 40, 40, 255], [40, 40, 40, 128]], [[90, 90, 90, 0], [200, 200, 200, 0]]], np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode,name", [("RGBA", "x.png"), ("LA", "x.png"), ("RGBA", "x.webp"), ("RGBA", "x.tif")])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_pixels_are_white(tmp_path, mode, name, channels):
    hidden(mode).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    images = load_images(tmp_path, channels=channels).images
    assert images.shape[1] == channels
    for channel in images[0]:
        assert channel.tolist() == [[40, 147], [255, 255]]  # 40 / 2 + 255 / 2
    size = load_images(tmp_path).images.shape[1]
    assert size == (1 if mode == "LA" else 3)  # without a choice, as they are


@pytest.mark.parametrize("name", ["x.gif", "x.png"])
def test_transparent_colour_of_a_palette_is_white(tmp_path, name):
    picture = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    picture.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0])
    picture.save(tmp_path / name, transparency=1)
    assert load_images(tmp_path).images[0].permute(1, 2, 0).tolist() == [[[10, 20, 30], [255, 255, 255], [0, 200, 0]]]


@pytest.mark.parametrize("depth,kind,key", [(8, 0, [7]), (8, 2, [7] * 3), (16, 0, [7 * 257])])
def test_transparent_colour_of_a_png_is_white(tmp_path, depth, kind, key):
    pixels = np.array([[7, 0, 9]], np.uint8) if depth == 8 else np.array([[7, 0, 9]], np.uint16) * 257
    pixels = pixels if kind == 0 else np.stack([pixels] * 3, -1)
    if depth == 16:
        pixels[0, 2] = 40000  # a set that is not almost black
    transparent = (b"tRNS", struct.pack(f">{len(key)}H", *key))
    (tmp_path / "x.png").write_bytes(png(depth, kind, pixels, transparent))
    assert load_images(tmp_path).images[0, 0].tolist() == [[255, 0, 9 if depth == 8 else 156]]


@pytest.mark.parametrize(
    "depth,kind,pixels,key", [(16, 2, np.stack([GREY] * 3, -1), [257] * 3), (4, 0, np.array([[0x4E]], np.uint8), [4])]
)
def test_transparent_colour_that_would_be_missed_is_refused(tmp_path, depth, kind, pixels, key):
    transparent = (b"tRNS", struct.pack(f">{len(key)}H", *key))
    (tmp_path / "x.png").write_bytes(png(depth, kind, pixels, transparent))
    with pytest.raises(ValueError, match="x.png.*transparent colour is not of 8 bits; save it with an alpha channel"):
        load_images(tmp_path)


def test_pictures_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_images(tmp_path).images.shape == (1, 3, 40, 30)


# ------------------------------------------------------------------------------------------------ the hub
RED_AND_BLUE = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]


@pytest.fixture
def hub(monkeypatch):
    """``hub(columns, kinds)`` stands for the hub; what was asked is in ``hub.asked``."""

    def hold(columns: dict, **kinds):
        known = {"img": datasets.Image(), "mask": datasets.Image()} | kinds
        features = {name: known.get(name, datasets.Value("int64")) for name in columns}
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        hold.asked = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *name, split: hold.asked.append((*name, split)) or table)

    return hold


def test_data_set_of_the_hub(hub):
    """By the columns that datasets says are images and class labels, whatever their names."""
    hub({"id": [7, 8], "img": RED_AND_BLUE, "kind": [1, 0]}, kind=datasets.ClassLabel(names=["cat", "dog"]))
    data = load_images("somebody/pets", "test")
    images, labels, class_names = data
    assert hub.asked == [("somebody/pets", "test")]
    assert images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]] and images.shape == (2, 3, 4, 6)
    assert labels.tolist() == [1, 0] and class_names == ("cat", "dog")
    assert data.describe().endswith("2 classes (cat, dog); left out: the column id")

    load_images("somebody/pets:small, plain")
    assert hub.asked[-1] == ("somebody/pets", "small, plain", "train")
    hub({"id": [7, 8], "img": RED_AND_BLUE})
    assert load_images("somebody/pets").labels is None
    hub({"id": [7, 8]})
    with pytest.raises(ValueError, match="no column of images; it has id"):
        load_images("somebody/pets")


@pytest.mark.parametrize(
    "column,kind,values,names,labels",
    [
        ("label", "int64", [5, -3], ("-3", "5"), [1, 0]),
        ("Class", "uint8", [10, 9], ("9", "10"), [1, 0]),
        ("labels", "string", ["dog", "cat"], ("cat", "dog"), [1, 0]),
        ("target", "bool", [True, False], ("False", "True"), [1, 0]),
        ("label", "float32", [0.5, 1.0], (), None),
        ("caption", "string", ["a dog", "a cat"], (), None),
    ],
)
def test_labels_that_are_integers_or_text(hub, column, kind, values, names, labels):
    hub({"img": RED_AND_BLUE, column: values}, **{column: datasets.Value(kind)})
    data = load_images("somebody/pets")
    assert data.class_names == names and (labels is None or data.labels.tolist() == labels)
    assert (f"left out: the column {column}" in data.describe()) == (labels is None)


@pytest.mark.parametrize(
    "columns,kinds,told",
    [
        ({"label": [0, None]}, {"label": datasets.ClassLabel(names=["a"])}, "1 of 2 images without a label .* label"),
        ({"label": [0, -1]}, {"label": datasets.ClassLabel(names=["a"])}, "1 of 2 images without a label"),
        ({"label": ["a", ""]}, {"label": datasets.Value("string")}, "1 of 2 images without a label"),
        ({"label": [None, None]}, {}, "the split train of somebody/pets has 2 of 2 images without a label"),
        ({"mask": RED_AND_BLUE}, {}, "several columns of images, img and mask: save those of one"),
        ({"img": [RED_AND_BLUE[0], None]}, {}, "somebody/pets, image 1 is no image that can be read: it is missing"),
        ({"img": []}, {}, "the split train of somebody/pets is empty"),
    ],
)
def test_data_sets_of_the_hub_that_are_refused(hub, columns, kinds, told):
    hub({"img": RED_AND_BLUE} | columns, **kinds)
    with pytest.raises(ValueError, match=told):
        load_images("somebody/pets")


@pytest.mark.parametrize(
    "error,told",
    [
        (RuntimeError(), "could not be read: RuntimeError$"),
        (datasets.exceptions.DatasetGenerationError("two\nlines"), "could not be read: two lines$"),
        (ValueError("Config name is missing.\nPlease pick one among ['a', 'b']"),
         r"pick one among \['a', 'b'\]; choose one as somebody/pets:CONFIGURATION$"),
        (ValueError('Unknown split "train". Should be one of [\'all\'].'), "Should be one of .'all'.*$"),
    ],
)  # fmt: skip
def test_hub_that_does_not_answer_is_one_line(monkeypatch, error, told):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError, match="^there is no folder somebody/pets, and the hub's .*" + told):
        load_images("somebody/pets")


@pytest.mark.parametrize("source", "data/mnist ./mnist ../mnist /nowhere/mnist data/a/b data\\a mnist".split())
def test_mistyped_path_is_not_asked_of_the_hub(monkeypatch, tmp_path, source):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="no such folder: .*owner/name"):
        load_images(source)


def test_unreachable_data_set_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ConnectionError, match="no folder nobody/nothing, and the hub's could not be read"):
        load_images("nobody/nothing")
