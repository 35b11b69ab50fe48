"""Pictures for the notebooks: image grids, strips and animations. Nothing here computes a result."""

import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from matplotlib.animation import FuncAnimation, PillowWriter
from torch import Tensor
from torchvision.utils import make_grid

from .data import to_uint8
from .unet import UNet


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
    extra = 0.25 if titles is not None and len(titles) > columns else 0
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns, (size + extra) * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(rearrange(image, "c h w -> h w c"), cmap="gray", vmin=0, vmax=255)
    for axis, title in zip(axes.flat, titles or (), strict=False):
        axis.set_title(title, fontsize=9)
    for axis, label in zip(axes[:, 0], row_labels or (), strict=False):
        axis.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
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
    """An animation of image batches (N, C, H, W), one batch a frame, as a grid of ``columns``.

    Show it with ``play``, or write a GIF with ``save_gif``.
    """
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


def animate_points(
    clouds: Iterable[Tensor], titles: Sequence[str], *, limit: float = 3, fps: int = 10
) -> FuncAnimation:
    """An animation of 2-D point clouds (N, 2), one cloud a frame."""
    clouds = [points.detach().cpu() for points in clouds]
    figure, axis = plt.subplots(figsize=(4, 4.3), dpi=80, layout="constrained")
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    dots = axis.scatter(*clouds[0].T, s=2, alpha=0.4)
    title = axis.set_title(titles[0])

    def draw(i: int):
        dots.set_offsets(clouds[i])
        title.set_text(titles[i])
        return dots, title

    animation = FuncAnimation(figure, draw, frames=len(clouds), interval=1000 / fps)
    plt.close(figure)
    return animation


BUTTONS = {
    "minus": "−", "fast-backward": "⏮", "step-backward": "◂", "play fa-flip-horizontal": "◀", "pause": "❚❚",
    "play": "▶", "step-forward": "▸", "fast-forward": "⏭", "plus": "+",
}  # fmt: skip


def play(animation: FuncAnimation):
    """The animation with its controls, as HTML that needs no other file and no network (matplotlib's own takes the
    signs on its buttons from an icon font on the web; here they are characters)."""
    from IPython.display import HTML

    html = re.sub(r"<link[^>]*font-awesome[^>]*>", "", animation.to_jshtml(default_mode="once"))
    return HTML(re.sub(r'<i class="fa fa-([^"]*)"></i>', lambda icon: BUTTONS[icon.group(1)], html))


def save_gif(animation: FuncAnimation, path: str | Path, fps: int = 10) -> None:
    """Write the animation as a GIF."""
    animation.save(str(path), writer=PillowWriter(fps=fps))


def show_source(function) -> None:
    """Show the source of a function or class of the package, highlighted."""
    from IPython.display import Code, display

    display(Code(inspect.getsource(function), language="python"))


def draw_unet(model: UNet, image_size: int = 28) -> plt.Figure:
    """The U-Net as a diagram. Each box shows the shape (channels × height × width) that it puts out, measured by a
    forward pass on one image of ``image_size``; a row is a resolution, and grey lines are the skip connections.
    """
    shapes, hooks = {}, []
    down, up = [s for level in model.down for s in level], [s for level in model.up for s in level]
    for part in (model.conv_in, *down, *model.middle, *up, model.conv_out):
        keep = lambda part, _, out: shapes.update({part: "×".join(map(str, out.shape[1:]))})  # noqa: E731
        hooks.append(part.register_forward_hook(keep))
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            x_t = torch.zeros(1, model.in_channels, image_size, image_size, device=device)
            model(x_t, torch.ones(1, dtype=torch.long, device=device))
    finally:
        for hook in hooks:
            hook.remove()

    levels, blocks = len(model.down), len(model.down[0])
    rows = [0] + [i // blocks for i in range(len(down))] + [levels] * len(model.middle)
    rows += [levels - 1 - i // blocks for i in range(len(up))] + [0]
    parts = [model.conv_in, *down, *model.middle, *up, model.conv_out]
    figure, axis = plt.subplots(figsize=(1.15 * len(parts) + 0.4, 1.0 * levels + 2.4), layout="constrained")
    colors = {"convolution": "#dddddd", "residual block": "#bcd6ee", "residual block + attention": "#f6cf9b"}

    def box(x: float, y: float, text: str, color: str, width: float = 0.96) -> None:
        axis.add_patch(plt.Rectangle((x - width / 2, y - 0.3), width, 0.6, facecolor=color, edgecolor="#444444"))
        axis.text(x, y, text, ha="center", va="center", fontsize=8)

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str = "#222222", style: str = "-") -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "linestyle": style})

    image = f"{model.in_channels}×{image_size}×{image_size}"
    last, middle = len(parts) - 1, (len(parts) - 1) / 2
    box(0, 1.2, f"$x_t$\n{image}", "white")
    box(last, 1.2, f"predicted noise\n{image}", "white", 1.15)
    embedding = "$t$ → sinusoids → MLP" + ("" if model.label_emb is None else "  +  label → table")
    box(middle, 1.2, f"{embedding}\n{model.time_mlp[2].out_features}, to every block", "#d9ecd0", 3.0)
    folding = f"fold {model.patch_size}×{model.patch_size}" if model.patch_size > 1 else ""
    arrow((0, 0.9), (0, 0.3))
    arrow((last, 0.3), (last, 0.9))
    axis.text(0.08, 0.6, folding, fontsize=8, va="center")
    axis.text(last - 0.08, 0.6, folding and "un" + folding, fontsize=8, va="center", ha="right")
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
    axis.legend(loc="lower center", ncols=4, fontsize=8, frameon=False, bbox_to_anchor=(0.5, -0.08))
    axis.set(xlim=(-0.7, last + 0.7), ylim=(-levels - 0.6, 1.6))
    axis.set_axis_off()
    return figure
