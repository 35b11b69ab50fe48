"""Pictures: the right images in the right places, animations that need no other file."""

import base64
import io
import re

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.patches import FancyArrowPatch
from PIL import Image

from ddpm_tutorial.editing import resample
from ddpm_tutorial.plotting import (
    animate_images,
    animate_points,
    draw_block,
    draw_unet,
    play,
    show_images,
    show_points,
    show_source,
)
from ddpm_tutorial.quiz import show_quiz
from ddpm_tutorial.unet import Downsample, Head, ResidualBlock, SelfAttention, UNet

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


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


def test_animation_is_a_picture_each_in_html_without_a_network(images):
    frames = [images, 255 - images, images.flip(0)]
    animation = animate_images(frames, ["one", "two", "three"], columns=4)
    html = play(animation, "three pictures").data
    assert 'alt="three pictures"' in html and 'max="2"' in html and "http" not in html
    shown = frames_of(html, columns=2)
    assert len(shown) == 4 and len({frame.tobytes() for frame in shown}) == 4  # the last one is empty


def frames_of(html, columns):
    """The frames of a film as pictures, out of the one that holds all of them."""
    data = re.search(r"data:image/webp;base64,([^\"]*)", html)[1]
    strip = Image.open(io.BytesIO(base64.b64decode(data)))
    width, height = map(int, re.search(r"aspect-ratio: (\d+) / (\d+)", html).groups())
    corners = [(x, y) for y in range(0, strip.height, height) for x in range(0, columns * width, width)]
    return [strip.crop((x, y, x + width, y + height)) for x, y in corners]


def test_point_animation(generator):
    animation = animate_points([torch.randn(10, 2, generator=generator) for _ in range(2)], ["a", "b"])
    one, two = frames_of(play(animation, "a film").data, columns=2)
    assert one.tobytes() != two.tobytes()


def test_show_source_shows_the_code(capsys):
    show_source(show_points)
    assert "def show_points" in capsys.readouterr().out


def test_show_source_takes_off_a_methods_indentation_and_links_to_its_file(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    show_source(UNet.forward)
    code, link = shown
    assert code.data.startswith("def forward(self")
    assert link.data.startswith("`UNet.forward` in [ddpm_tutorial/unet.py](https://github.com/")
    assert link.data.endswith("/blob/main/ddpm_tutorial/unet.py)")


def test_show_source_of_a_checked_function_links_to_the_functions_own_file(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    show_source(resample)  # its wrapper is written in sampling.py
    assert shown[1].data.startswith("`resample` in [ddpm_tutorial/editing.py](")


def test_unknown_quiz_names_the_known_ones():
    with pytest.raises(ValueError, match="no quiz '99'; the chapters with one are 01, 02"):
        show_quiz("99")


@pytest.mark.parametrize("label", [None, "t", "a label longer than two images"])
@pytest.mark.parametrize("titled", [0, 3, 7])
def test_labels_and_titles_take_their_own_room(images, label, titled):
    """Each image is ``size`` inches wide and high, whatever is written beside it, and no text covers another."""
    figure = show_images(
        images, columns=3, size=0.7, row_labels=label and [label] * 3, titles=["some title\n$x_t$"] * titled
    )
    figure.canvas.draw()
    inches = [axis.get_window_extent().transformed(figure.dpi_scale_trans.inverted()) for axis in figure.axes]
    assert all(abs(box.width - 0.7) < 1e-6 and abs(box.height - 0.7) < 1e-6 for box in inches)
    assert abs(inches[0].y0 - inches[3].y1) < (0.15 if titled <= 3 else 0.6)  # no tall gap between rows
    texts = [axis.yaxis.label for axis in figure.axes] + [axis.title for axis in figure.axes]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    boxes += [axis.get_window_extent() for axis in figure.axes]
    assert all(0 <= box.x0 and 0 <= box.y0 for box in boxes)
    assert all(box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def drawn(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def arrows(figure) -> set[tuple[str, str]]:
    """The pairs of boxes (by their text) that an arrow joins, found from where it starts and ends."""
    axis = figure.axes[0]
    centres = [(text.get_text(), *text.get_position()) for text in axis.texts]

    def touched(point):
        near = [t for t, x, y in centres if abs(point[0] - x) < 0.51 and abs(point[1] - y) < 0.31]
        assert len(near) == 1
        return near[0]

    lines = [patch._path_original.vertices for patch in axis.patches if isinstance(patch, FancyArrowPatch)]
    return {(touched(line[0]), touched(line[-1])) for line in lines}


@pytest.mark.parametrize(
    ("block", "shapes"),
    [
        (ResidualBlock(16, 8, 12), [(2, 16, 6, 6), (2, 12)]),
        (SelfAttention(8, 2), [(1, 8, 3, 5)]),
        (Head(4, 1, 12), [(2, 4, 6, 6), (2, 1, 6, 6), (2, 12)]),
    ],
    ids=["residual block", "attention", "head"],
)
def test_no_line_of_a_diagram_runs_through_a_box(block, shapes):
    axis = draw_block(block, *map(torch.zeros, shapes)).axes[0]
    boxes = [patch.get_bbox() for patch in axis.patches if isinstance(patch, plt.Rectangle)]
    lines = [patch._path_original.vertices for patch in axis.patches if isinstance(patch, FancyArrowPatch)]
    assert boxes and lines
    for line in lines:
        for start, end in zip(line[:-1], line[1:], strict=True):
            for share in torch.linspace(0, 1, 101).tolist():
                x, y = start + share * (end - start)
                assert not any(b.x0 + 0.01 < x < b.x1 - 0.01 and b.y0 + 0.01 < y < b.y1 - 0.01 for b in boxes)


def test_diagram_of_the_head_has_the_image_beside_the_maps():
    flow = arrows(draw_block(Head(4, 1, 12), *map(torch.zeros, [(2, 4, 6, 6), (2, 1, 6, 6), (2, 12)])))
    assert ("maps\n2×4×6×6", "cat\n2×5×6×6") in flow and ("x\n2×1×6×6", "cat\n2×5×6×6") in flow
    assert ("conv1: 3×3 convolution\n2×16×6×6", "×\n2×16×6×6") in flow


@pytest.mark.parametrize("patch_size", [1, 2])
def test_diagram_of_the_unet_shows_the_head_where_there_is_one(patch_size):
    axis = draw_unet(UNet(in_channels=3, channels=8, patch_size=patch_size)).axes[0]
    places = {text.get_text(): text.get_position() for text in axis.texts if text.get_text()}
    lines = [(text.xyann, text.xy) for text in axis.texts if isinstance(text, plt.Annotation)]
    level = [(start, end) for start, end in lines if start[1] == end[1] > 0]
    assert "output\n3×28×28" in places and ("head\n3×28×28" in places) == (patch_size == 2) == bool(level)
    if patch_size == 2:
        x, y = places["head\n3×28×28"]
        ((start, end),) = level  # the image goes straight to the head
        assert start == (places["$x_t$\n3×28×28"][0] + 0.48, y) and end == (x - 0.48, y)
        assert "fold 2×2" in places and "unfold 2×2: 12×28×28" in places and "out\n48×14×14" in places


def test_diagram_of_a_residual_block_is_its_data_flow():
    figure = draw_block(ResidualBlock(16, 8, 12), torch.zeros(2, 16, 6, 6), torch.zeros(2, 12))
    flow = arrows(figure)
    assert len(drawn(figure)) == 2 + 5 + 3 + 1 + 3 + 1  # inputs, layers, SiLU, 1 + scale, × + +, shortcut
    assert ("x\n2×16×6×6", "shortcut: 1×1 convolution\n2×8×6×6") in flow
    assert ("x\n2×16×6×6", "norm1: GroupNorm\n2×16×6×6") in flow
    assert ("emb: Linear\n2×16", "1 +\n2×8×1×1") in flow
    assert ("norm2: GroupNorm\n2×8×6×6", "×\n2×8×6×6") in flow
    assert ("1 +\n2×8×1×1", "×\n2×8×6×6") in flow
    assert ("emb: Linear\n2×16", "+\n2×8×6×6") in flow


def test_diagram_draws_the_shortcut_around_attention_and_no_size_as_a_value():
    flow = arrows(draw_block(SelfAttention(8, 2), torch.zeros(1, 8, 3, 5)))
    assert ("x\n1×8×3×5", "+\n1×8×3×5") in flow
    assert ("rearrange\n3×1×2×15×4", "scaled dot product attention\n1×2×15×4") in flow
    assert ("x\n1×8×3×5", "rearrange\n1×8×3×5") not in flow  # its height and width alone go there
    assert len(flow) == 8


def test_diagram_of_a_method_a_single_layer_and_several_on_one_figure():
    model = UNet(channels=8, num_classes=3)
    flow = arrows(draw_block(model._embed, torch.tensor([5]), torch.tensor([1])))
    assert ("labels\n1", "label_emb: LabelEmbedding\n1×32") in flow and ("t\n1", "sinusoidal embedding\n1×8") in flow
    figure, axes = plt.subplots(1, 2)
    assert draw_block(Downsample(4, 8), torch.zeros(1, 4, 6, 6), axis=axes[0]) is figure
    assert drawn(figure) == ["input\n1×4×6×6", "3×3 convolution, stride 2\n1×8×3×3"]
    draw_block(torch.nn.PixelUnshuffle(2), torch.zeros(1, 4, 6, 6), axis=axes[1])
    assert [t.get_text() for t in axes[1].texts] == ["input\n1×4×6×6", "PixelUnshuffle\n1×16×3×3"]
