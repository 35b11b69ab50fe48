"""Pictures for the notebooks: image grids, strips and animations. Nothing here computes a result."""

import base64
import hashlib
import html
import inspect
import io
import math
import operator
import textwrap
from collections.abc import Iterable, Sequence
from importlib.metadata import metadata
from pathlib import Path
from string import Template

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from matplotlib.animation import AbstractMovieWriter, FuncAnimation
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path as Line
from PIL import Image
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.module import register_module_forward_hook

from .data import to_uint8
from .unet import UNet, sinusoidal_embedding


def _displayable(images: Tensor) -> Tensor:
    """uint8 images as they are; floats are taken to be in [−1, 1]. (N, C, H, W) uint8 on the CPU."""
    images = images.detach().cpu()
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (N, 1 or 3, H, W), got {tuple(images.shape)}")
    return images if images.dtype == torch.uint8 else to_uint8(images)


def show_images(
    images: Tensor,
    *,
    columns: int = 10,
    titles: Sequence[str] | None = None,
    row_labels: Sequence[str] | None = None,
    size: float = 0.8,
) -> plt.Figure:
    """Images (N, C, H, W), uint8 or float in [−1, 1], in rows of ``columns``, each ``size`` inches wide.

    ``titles`` stand over the first row, or over each image where there are N; ``row_labels`` stand left of the rows.
    """
    images = _displayable(images)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(rearrange(image, "c h w -> h w c"), cmap="gray", vmin=0, vmax=255)
    for axis, title in zip(axes.flat, titles or (), strict=False):
        axis.set_title(title, fontsize=9)
    for axis, label in zip(axes[:, 0], row_labels or (), strict=False):
        axis.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")

    def inches(texts: list[plt.Text], side: str) -> float:
        return max((getattr(t.get_window_extent(), side) / figure.dpi + 0.1 for t in texts if t.get_text()), default=0)

    # Texts are measured and each image gets its place in inches: a layout engine would shrink images to fit labels.
    labels, headings = [axis.yaxis.label for axis in axes[:, 0]], [axis.title for axis in axes.flat]
    height, gap = size * images.shape[2] / images.shape[3], 0.06
    left, top = inches(labels, "width"), inches(headings, "height")
    above = top if titles is not None and len(titles) > columns else 0  # of the rows after the first
    across = max(size, inches(headings, "width")) + gap
    down = max(height + above + gap, inches(labels, "height"))
    width, total = left + columns * across, top - above + rows * down
    figure.set_size_inches(width, total)
    for i, axis in enumerate(axes.flat):
        x, y = left + i % columns * across, total - top - i // columns * down - height
        axis.set_position((x / width, y / total, size / width, height / total))
    return figure


def show_points(clouds: Sequence[Tensor], titles: Sequence[str], *, limit: float = 3, size: float = 2) -> plt.Figure:
    """Clouds of 2-D points (N, 2) side by side, on equal axes from −limit to limit."""
    figure, axes = plt.subplots(
        1, len(clouds), figsize=(size * len(clouds), size + 0.3), squeeze=False, layout="constrained"
    )
    for axis, points, title in zip(axes[0], clouds, titles, strict=True):
        axis.scatter(*points.detach().cpu().T, s=2, alpha=0.4)
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
        axis.set_title(title, fontsize=10)
    return figure


def animate_images(
    frames: Iterable[Tensor], titles: Sequence[str], *, columns: int = 8, fps: int = 10
) -> FuncAnimation:
    """An animation of image batches (N, C, H, W), one batch a frame, as a grid of ``columns``. ``play`` shows it."""
    from torchvision.utils import make_grid  # slow to import, so only where it is used

    grids = [rearrange(make_grid(_displayable(f), nrow=columns, pad_value=128), "c h w -> h w c") for f in frames]
    height, width = grids[0].shape[:2]
    scale, title_height = max(1, 320 // width), 24  # whole screen pixels for each image pixel: sharp, and small files
    size = (width * scale, height * scale + title_height)
    figure = plt.figure(figsize=(size[0] / 80, size[1] / 80), dpi=80)
    axis = figure.add_axes((0, 0, 1, height * scale / size[1]))
    picture = axis.imshow(grids[0], interpolation="nearest")
    axis.set_axis_off()
    title = axis.set_title(titles[0], fontsize=11, pad=4)

    def draw(i: int):
        picture.set_data(grids[i])
        title.set_text(titles[i])
        return picture, title

    animation = FuncAnimation(figure, draw, frames=len(grids), interval=1000 / fps)
    plt.close(figure)  # the notebook shows the animation, not its first frame too
    return animation


def animate_points(clouds: Iterable[Tensor], titles: Sequence[str]) -> FuncAnimation:
    """An animation of 2-D point clouds (N, 2) in the square [−3, 3]², one cloud a frame, ten frames a second."""
    clouds = [points.detach().cpu() for points in clouds]
    figure, axis = plt.subplots(figsize=(4, 4.3), dpi=80, layout="constrained")
    axis.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
    dots = axis.scatter(*clouds[0].T, s=2, alpha=0.4)
    title = axis.set_title(titles[0])

    def draw(i: int):
        dots.set_offsets(clouds[i])
        title.set_text(titles[i])
        return dots, title

    animation = FuncAnimation(figure, draw, frames=len(clouds), interval=100)
    plt.close(figure)
    return animation


class _Frames(AbstractMovieWriter):
    """Keeps the frames of an animation as pictures."""

    def setup(self, fig: plt.Figure, outfile: str, dpi: float | None = None) -> None:
        super().setup(fig, outfile, dpi)
        self.pictures: list[Image.Image] = []

    def grab_frame(self, **_) -> None:
        pixels = io.BytesIO()
        self.fig.savefig(pixels, format="rgba", dpi=self.dpi)
        self.pictures.append(Image.frombytes("RGBA", self.frame_size, pixels.getvalue()))

    def finish(self) -> None:
        pass


FILM = """<div class="film" id="$id" style="max-width: ${width}px">
<div style="overflow: hidden; aspect-ratio: $width / $height"><img alt="$alt" src="$source"
style="display: block; width: ${columns}00%; max-width: none; height: auto; padding: 0"></div>
<div class="film-controls" style="display: flex; gap: 0.6em"><button type="button">Play</button>
<input type="range" min="0" max="$last" value="0" aria-label="Picture of the film" style="flex: 1; min-width: 0"></div>
<script>{
  const [picture, button, slider] = ["img", "button", "input"].map((name) => document.querySelector("#$id " + name));
  let timer = 0;
  const show = () => {
    const i = +slider.value, x = (i % $columns) / $columns, y = Math.floor(i / $columns) / $rows;
    picture.style.transform = "translate(" + -100 * x + "%, " + -100 * y + "%)";
  };
  const stop = () => { clearInterval(timer); timer = 0; button.textContent = "Play"; };
  const step = () => { slider.value = +slider.value + 1; show(); if (+slider.value >= $last) stop(); };
  slider.oninput = () => { stop(); show(); };
  button.onclick = () => {
    if (timer) return stop();
    if (+slider.value >= $last) { slider.value = 0; show(); }
    timer = setInterval(step, $interval);
    button.textContent = "Pause";
  };
}</script></div>"""


def play(animation: FuncAnimation, alt: str):
    """The animation with its controls, as HTML that needs no other file and no network. ``alt`` says what it shows.

    All frames are one picture, of which the page shows a part. It moves when it is asked to, not before.
    """
    from IPython.display import HTML

    frames = _Frames()
    animation.save("", writer=frames, dpi=animation._fig.dpi)
    count, (width, height) = len(frames.pictures), frames.pictures[0].size
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    strip = Image.new("RGBA", (columns * width, rows * height))
    for i, picture in enumerate(frames.pictures):
        strip.paste(picture, (i % columns * width, i // columns * height))
    file = io.BytesIO()
    strip.save(file, "webp", lossless=True)
    source = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return HTML(
        Template(FILM).substitute(
            id=f"film-{hashlib.sha256(file.getvalue()).hexdigest()[:12]}", width=width, height=height, columns=columns,
            rows=rows, alt=html.escape(alt), source=source, last=count - 1, interval=round(animation._interval),
        )
    )  # fmt: skip


def show_source(function) -> None:
    """Show the source of a function, a class or a method of a module of the package, highlighted, with a link to it."""
    from IPython.display import Code, Markdown, display

    file = f"{__package__}/{Path(inspect.getsourcefile(inspect.unwrap(function))).name}"
    repository = metadata(__package__)["Project-URL"].removeprefix("Repository, ")
    display(Code(textwrap.dedent(inspect.getsource(function)), language="python"))
    display(Markdown(f"`{function.__qualname__}` in [{file}]({repository}/blob/main/{file})"))


def _operation(node: fx.Node, layer: nn.Module | None) -> str:
    """What a node of a traced graph does, in words."""
    name = getattr(node.target, "__name__", str(node.target))
    if isinstance(layer, nn.Conv2d) or name == "conv2d":
        weight, stride = (layer.weight, layer.stride) if layer else (node.args[1].meta["tensor_meta"], node.args[3])
        return "×".join(map(str, weight.shape[2:])) + " convolution" + (", stride 2" if 2 in stride else "")
    constants = [str(argument) for argument in node.args if isinstance(argument, (int, float))]
    symbols = {"add": " ".join([*constants, "+"]), "mul": "×", "getattr": "transpose"}  # the attribute is .mT
    return type(layer).__name__ if layer else symbols.get(name, name.replace("_", " "))


def draw_block(block: nn.Module, *inputs: Tensor, axis: plt.Axes | None = None) -> plt.Figure:
    """A module, or one of its methods, as a diagram of what it does with these ``inputs``.

    ``torch.fx`` traces the module and runs it. Each box is an operation and the shape that it puts out, blue where it
    has learnt weights. The longest path is the middle column; shortcuts and the embedding go beside it.
    """
    root = getattr(block, "__self__", block)
    tracer = fx.Tracer(autowrap_functions=(rearrange, sinusoidal_embedding))
    tracer.is_leaf_module = lambda m, name: isinstance(m, nn.Embedding) or fx.Tracer.is_leaf_module(tracer, m, name)
    tracer.traced_func_name = "forward" if root is block else block.__name__
    root = nn.Sequential(root) if tracer.is_leaf_module(root, "") else root
    graph = fx.GraphModule(root, tracer.trace(root))
    with torch.no_grad():
        ShapeProp(graph).propagate(*inputs)

    def origins(node: fx.Node) -> list[fx.Node]:
        """The boxes a value comes from: picking and splitting get no box, weights and sizes are no values."""
        if "tensor_meta" not in node.meta or node.op == "get_attr":
            return []
        hidden = node.op == "output" or node.target in (operator.getitem, "chunk")
        return [o for source in node.all_input_nodes for o in origins(source)] if hidden else [node]

    boxes = [node for node in graph.graph.nodes if origins(node) == [node]]
    sources = {n: list(dict.fromkeys(o for source in n.all_input_nodes for o in origins(source))) for n in boxes}
    users = {n: [user for user in boxes if n in sources[user]] for n in boxes}
    row, column, node = {}, {}, boxes[0]
    for n in reversed(boxes):  # rows count from the output up, so a box stands just above where it is needed
        row[n] = 1 + max((row[user] for user in users[n]), default=-1)
    while node:  # the longest path from the first input is column 0
        column[node] = 0
        node = max(users[node], key=row.get, default=None)
    for n in boxes:  # what comes from the first input or goes straight into its column is right of it, others left
        straight = not sources[n] and all(column.get(user) == 0 for user in users[n])
        side = 1 if straight or any(column[source] >= 0 for source in sources[n]) else -1
        while n not in column or any((column[n], row[n]) == (column[o], row[o]) for o in column if o is not n):
            column[n] = column.get(n, 0) + side

    def free(col: int, top: int, bottom: int) -> bool:  # no box stands in this column in rows bottom … top
        return not any(column[n] == col and bottom <= row[n] <= top for n in boxes)

    left, right, rows, step, lanes = min(column.values()), max(column.values()), max(row.values()) + 1, 1.35, []
    axis = axis or plt.subplots(figsize=(2.3 * (right - left + 1.5), 0.62 * rows), layout="constrained")[1]
    for n in boxes:
        x, y, layer = step * column[n], row[n], graph.get_submodule(n.target) if n.op == "call_module" else None
        text = n.target if n.op == "placeholder" else _operation(n, layer)
        learnt = "convolution" in text or (layer and any(True for _ in layer.parameters()))
        color = "white" if n.op == "placeholder" else "#bcd6ee" if learnt else "#dddddd"
        text = f"{n.target}: {text}" if layer and not n.target.isdigit() else text
        text += "\n" + "×".join(map(str, n.meta["tensor_meta"].shape))
        axis.add_patch(plt.Rectangle((x - 0.5, y - 0.3), 1, 0.6, facecolor=color, edgecolor="#444444"))
        axis.text(x, y, text, ha="center", va="center", fontsize=8, color="#222222")
        for source in sources[n]:
            u, v, toward = step * column[source], row[source], 0.5 if column[source] > column[n] else -0.5
            if u == x and free(column[n], v - 1, y + 1):  # straight down
                path = [(u, v - 0.3), (x, y + 0.3)]
            elif u != x and free(column[source], v - 1, y):  # down, then across
                path = [(u, v - 0.3), (u, y), (x + toward, y)]
            elif u != x and free(column[n], v, y + 1):  # across, then down
                path = [(u - toward, v), (x, v), (x, y + 0.3)]
            else:  # around the boxes between, each line in its own lane
                out = 0.5 if column[source] >= 0 else -0.5
                lanes.append(out)
                lane = u + out + 0.2 * lanes.count(out) * out
                path = [(u + out, v), (lane, v), (lane, y), (x + (out if u == x else toward), y)]
            axis.add_patch(FancyArrowPatch(path=Line(path), arrowstyle="->", mutation_scale=10, color="#7c7c7c"))
    axis.set(xlim=(step * left - 0.7, step * right + 0.7), ylim=(-0.5, rows - 0.5))
    axis.set_axis_off()
    return axis.figure


def draw_unet(model: UNet, image_size: int = 28) -> plt.Figure:
    """The U-Net as a diagram. Each box shows the shape (channels × height × width) that it puts out, measured by a
    forward pass on one image of ``image_size``; a row is a resolution, and grey lines are the skip connections. Where
    pixels are folded, the top row is the full resolution, and the head is in it.
    """
    shapes: dict[nn.Module, str] = {}
    hook = register_module_forward_hook(lambda part, _, out: shapes.update({part: "×".join(map(str, out.shape[1:]))}))
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            x_t = torch.zeros(1, model.in_channels, image_size, image_size, device=device)
            model(x_t, torch.ones(1, dtype=torch.long, device=device))
    finally:
        hook.remove()
    down, up = [s for level in model.down for s in level], [s for level in model.up for s in level]
    levels, blocks, p, head = len(model.down), len(model.down[0]), model.patch_size, model.head
    rows = [0] + [i // blocks for i in range(len(down))] + [levels] * len(model.middle)
    rows += [levels - 1 - i // blocks for i in range(len(up))] + [0]
    parts = [model.conv_in, *down, *model.middle, *up, model.conv_out]
    last, middle, top = len(parts) - 1, (len(parts) - 1) / 2, 1.2 if head is None else 2.2  # top: of what is told
    figure, axis = plt.subplots(figsize=(1.15 * len(parts) + 0.4, levels + top + 1.2), layout="constrained")
    colors = {"convolution": "#dddddd", "residual block": "#bcd6ee", "residual block + attention": "#f6cf9b"}
    colors |= {} if head is None else {"head": "#d8c7e8"}

    def box(x: float, y: float, text: str, color: str, width: float = 0.96) -> None:
        axis.add_patch(plt.Rectangle((x - width / 2, y - 0.3), width, 0.6, facecolor=color, edgecolor="#444444"))
        axis.text(x, y, text, ha="center", va="center", fontsize=8, color="#222222")

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str = "#7c7c7c", style: str = "-") -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "linestyle": style})

    image = f"{model.in_channels}×{image_size}×{image_size}"
    box(0, 1.2, f"$x_t$\n{image}", "white")
    box(last, top, f"output\n{image}", "white")
    embedding = "$t$ → sinusoids → MLP" + ("" if model.label_emb is None else "  +  label → table")
    told = "to every block" + ("" if head is None else " and the head")
    box(middle, top, f"{embedding}\n{model.time_mlp[2].out_features}, {told}", "#d9ecd0", 3.0)
    arrow((0, 0.9), (0, 0.3))
    arrow((last, 0.3), (last, 0.9))
    if head is not None:
        box(last, 1.2, f"head\n{shapes[head]}", colors["head"])
        arrow((last, 1.5), (last, top - 0.3))
        arrow((0.48, 1.2), (last - 0.48, 1.2), "#888888", "--")
        axis.text(0.08, 0.6, f"fold {p}×{p}", fontsize=8, va="center")
        maps = f"{model.conv_out.out_channels // p**2}×{image_size}×{image_size}"
        axis.text(last - 0.08, 0.6, f"unfold {p}×{p}: {maps}", fontsize=8, va="center", ha="right")
    for i, (part, row) in enumerate(zip(parts, rows, strict=True)):
        kind = "convolution"
        if hasattr(part, "block"):
            attends = any(p.numel() for p in part.attention.parameters())
            kind = "residual block + attention" if attends else "residual block"
        box(i, -row, f"{['in', 'out'][i == last] if kind == 'convolution' else 'block'}\n{shapes[part]}", colors[kind])
        if i and rows[i - 1] == row:
            arrow((i - 0.52, -row), (i - 0.48, -row))
        elif i and row > rows[i - 1]:
            arrow((i - 1, -rows[i - 1] - 0.3), (i - 0.5, -row))
            axis.text(i - 1.1, -row + 0.45, "" if row == levels else "half size", fontsize=8, ha="right", va="center")
        elif i:
            arrow((i - 0.5, -rows[i - 1]), (i, -row - 0.3))
            axis.text(i + 0.1, -row - 0.55, "" if row == levels - 1 else "double size", fontsize=8, va="center")
    for i in range(len(down)):  # the last block of a level has a straight line; the earlier ones pass above it
        y, over = -rows[1 + i], blocks - 1 - i % blocks
        left, right = 1 + i, last - 1 - i
        if over:
            y += 0.3 + 0.09 * over
            axis.plot([left, left, right], [y - 0.09 * over, y, y], "--", color="#888888", linewidth=1)
            arrow((right, y), (right, y - 0.09 * over - 0.02), "#888888")
        else:
            arrow((left + 0.48, y), (right - 0.48, y), "#888888", "--")
    for name, color in colors.items():
        axis.scatter([], [], marker="s", s=80, color=color, edgecolor="#444444", label=name)
    axis.plot([], [], "--", color="#888888", label="skip connection")
    axis.legend(loc="lower center", ncols=5, fontsize=8, frameon=False, bbox_to_anchor=(0.5, -0.08))
    axis.set(xlim=(-0.7, last + 0.7), ylim=(-levels - 0.6, top + 0.4))
    axis.set_axis_off()
    return figure
