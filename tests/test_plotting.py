"""Pictures: the right images in the right places, animations that need no other file."""

import matplotlib
import pytest
import torch
from PIL import Image, ImageSequence

from ddpm_tutorial.plotting import animate_images, animate_points, play, save_gif, show_images, show_points, show_source
from ddpm_tutorial.quiz import show_quiz

matplotlib.use("Agg")


@pytest.fixture
def images(generator):
    return torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8, generator=generator)


def test_grid_shows_each_image_in_reading_order(images):
    figure = show_images(images, columns=3, titles=["a", "b", "c"], row_labels=["first", "second", "third"])
    shown = [axis for axis in figure.axes if axis.images]
    assert len(figure.axes) == 9 and len(shown) == 7
    for axis, image in zip(shown, images, strict=True):
        assert (axis.images[0].get_array() == image[0].numpy()).all()
        assert axis.images[0].get_clim() == (0, 255)  # one scale for all, not each its own
    assert [axis.get_title() for axis in figure.axes[:4]] == ["a", "b", "c", ""]
    assert figure.axes[3].get_ylabel() == "second"


def test_floats_are_taken_to_be_in_model_range():
    figure = show_images(torch.tensor([-1.0, 0.0, 1.0, 5.0]).view(4, 1, 1, 1))
    assert [int(axis.images[0].get_array()[0, 0]) for axis in figure.axes] == [0, 128, 255, 255]


def test_colour_images(generator):
    figure = show_images(torch.rand(2, 3, 8, 8, generator=generator))
    assert figure.axes[0].images[0].get_array().shape == (8, 8, 3)


def test_wrong_shape_is_an_error(images):
    for bad in (images[0], images.expand(7, 2, 28, 28)):
        with pytest.raises(ValueError, match="1 or 3, H, W"):
            show_images(bad)


def test_points_are_drawn_on_equal_axes(generator):
    clouds = [torch.randn(50, 2, generator=generator) for _ in range(3)]
    figure = show_points(clouds, ["a", "b", "c"])
    for axis, cloud in zip(figure.axes, clouds, strict=True):
        assert torch.allclose(torch.tensor(axis.collections[0].get_offsets().data).float(), cloud)
        assert axis.get_xlim() == axis.get_ylim() == (-3, 3)


def test_animation_is_one_gif_frame_each_and_html_without_a_network(images, tmp_path):
    frames = [images, 255 - images, images.flip(0)]
    animation = animate_images(frames, ["one", "two", "three"], columns=4)
    save_gif(animation, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        pictures = [frame.convert("L").tobytes() for frame in ImageSequence.Iterator(film)]
    assert len(pictures) == 3 and len(set(pictures)) == 3
    html = play(animation).data
    assert html.count("data:image/png;base64") == 3
    assert "<img" in html and "▶" in html and "http" not in html and "fa-play" not in html


def test_point_animation(generator):
    animation = animate_points([torch.randn(10, 2, generator=generator) for _ in range(2)], ["a", "b"])
    assert play(animation).data.count("data:image/png;base64") == 2


def test_show_source_shows_the_code(capsys):
    show_source(show_points)
    assert "def show_points" in capsys.readouterr().out


def test_unknown_quiz_names_the_known_ones():
    with pytest.raises(ValueError, match="no quiz '99'; the chapters with one are 01, 02"):
        show_quiz("99")
