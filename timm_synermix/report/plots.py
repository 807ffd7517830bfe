"""The pictures of a report, as matplotlib figures that touch no global state of matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor


class Line(NamedTuple):
    """A line of a curve: of a run and of a quantity, each by its place among those of the report and of the plot."""

    run: int
    quantity: int
    epochs: Sequence[float]
    values: Sequence[float]


_STYLES: tuple[Literal['-', '--', ':', '-.'], ...] = ('-', '--', ':', '-.')


def run_colours(num_runs: int) -> list[str]:
    """A colour per run, the same in every curve."""
    import matplotlib
    from matplotlib.colors import to_hex

    colours = matplotlib.colormaps['tab10' if num_runs <= 10 else 'turbo'].resampled(max(10, num_runs))
    return [to_hex(colours(i)) for i in range(num_runs)]


def curve(title: str, quantities: Sequence[str], lines: Sequence[Line], num_runs: int = 1) -> Figure:
    """Draw quantities that belong together over the epochs.

    Several runs differ in colour, and their quantities in style; the colours are explained by the page, once for all
    curves. Of one run the quantities differ in both.

    Args:
        title: What the quantities have in common.
        quantities: Their names, for the legend; one needs none.
        lines: Values that are not finite leave a gap.
        num_runs: Runs in the report.

    Returns:
        The figure.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure, (axis,) = create_figure(4, 2.6)
    colours = run_colours(max(num_runs, len(quantities)))
    for line in lines:
        value = torch.tensor(line.values, dtype=torch.float64)
        value[~value.isfinite()] = torch.nan
        colour = colours[line.run if num_runs > 1 else line.quantity]
        (drawn,) = axis.plot(line.epochs, value.numpy(), color=colour, linestyle=_STYLES[line.quantity % 4])
        if len(line.epochs) <= 20:  # a single epoch has no line
            drawn.set(marker='o', markersize=3)
    if len(quantities) > 1:
        handles = [
            Line2D([], [], color='dimgrey' if num_runs > 1 else colours[i], linestyle=_STYLES[i % 4], label=name)
            for i, name in enumerate(quantities)
        ]
        axis.legend(handles=handles, fontsize=8, frameon=False)
    axis.set_title(short(title, 50), fontsize=10)
    axis.set_xlabel('epoch', fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.grid(alpha=0.3)
    return figure


def cohesion_bars(title: str, cohesion: Tensor, class_names: Sequence[str] | None = None, num: int = 10) -> Figure:
    """Draw the cosine cohesion of the tightest and of the loosest classes as bars.

    Args:
        title: What the classes are measured on.
        cohesion: Cosine cohesion of each class `[C]`, NaN for classes without images, which are left out.
        class_names: Names of the classes.
        num: How many of the best and how many of the worst; with at most twice as many classes, all are drawn.
    """
    order = [c for c in cohesion.argsort(descending=True).tolist() if cohesion[c].isfinite()]
    best, worst = (order[:num], order[-num:]) if len(order) > 2 * num else (order, [])
    bars = [*best, None, *worst] if worst else best
    figure, (axis,) = create_figure(4.6, 0.8 + 0.21 * len(bars))
    for row, c in enumerate(bars):
        if c is None:
            axis.text(0.01, row, f'{len(order) - 2 * num} classes between', va='center', fontsize=8, style='italic')
            continue
        axis.barh(row, cohesion[c].item(), color='C0' if c in best else 'C1', height=0.75)
        axis.text(cohesion[c].item() + 0.01, row, f'{cohesion[c].item():.3f}', va='center', fontsize=8)
    names = ['' if c is None else short(class_name(c, class_names), 22) for c in bars]
    axis.set_yticks(range(len(bars)), names)
    axis.set(xlim=(0, 1.13), ylim=(max(len(bars), 1) - 0.5, -0.5), xticks=[0, 0.25, 0.5, 0.75, 1])
    axis.set_title(short(title, 44), fontsize=10)
    axis.set_xlabel('cosine cohesion', fontsize=8)
    return figure


def confusion_matrix(title: str, share: Tensor, names: Sequence[str]) -> Figure:
    """Draw which class means the images are nearest to, as per cent of each class; colours show the wrong ones.

    Args:
        title: What the classes are measured on.
        share: `[K, K]`, in row a and column b the share of the images of class a that are nearest to the mean of b.
        names: Names of the K classes.
    """
    wrong = share.clone().fill_diagonal_(torch.nan)
    top = wrong.nan_to_num(0).max().item() or 1.0
    size = 1.6 + 0.33 * len(names)
    figure, (axis,) = create_figure(size + 0.2, size)
    axis.imshow(wrong.numpy(), cmap='Blues', vmin=0, vmax=top)
    for row, values in enumerate(share.tolist()):
        for column, value in enumerate(values):
            colour = 'grey' if row == column else 'white' if value > 0.6 * top else 'black'
            if value >= 0.005 or row == column:
                axis.text(column, row, f'{100 * value:.0f}', ha='center', va='center', color=colour, fontsize=7.5)
    labels = [short(name, 18) for name in names]
    axis.set_xticks(range(len(names)), labels, rotation=60, ha='right', rotation_mode='anchor')
    axis.set_yticks(range(len(names)), labels)
    axis.set_title(short(title, 44), fontsize=10)
    axis.set_xlabel('nearest class mean', fontsize=8)
    axis.set_ylabel('class, per cent of its images', fontsize=8)
    return figure


def image_rows(rows: Mapping[str, Tensor], max_images: int = 8) -> Figure:
    """Draw rows of images under their names, on a transparent ground that suits light and dark pages.

    Args:
        rows: Images `[M, C, H, W]` in `[0, 1]`; other than three channels are shown by the first one.
        max_images: Images drawn of each row.
    """
    frames = {name: _side_by_side(images[:max_images]) for name, images in rows.items()}
    heights = [8 * len(frame) / frame.shape[1] for frame in frames.values()]
    figure, axes = create_figure(8, sum(heights) + 0.35 * len(rows), len(rows), height_ratios=heights)
    figure.set_facecolor('none')
    for axis, (name, frame) in zip(axes, frames.items(), strict=True):
        axis.imshow(frame.numpy(), interpolation='nearest')
        axis.set_title(short(name, 80), loc='left', fontsize=11, color='#808080')
        axis.axis('off')
    return figure


def _side_by_side(images: Tensor) -> Tensor:
    """Images `[M, C, H, W]` as one RGBA picture `[H, M * (W + gap), 4]`, with transparent gaps."""
    images = images.detach().cpu().float().nan_to_num(0).clamp(0, 1)
    images = images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
    opaque = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
    framed = torch.nn.functional.pad(opaque, (0, 1 + images.shape[-1] // 32))
    return framed.permute(2, 0, 3, 1).flatten(1, 2)


def to_array(figure: Figure, dpi: int = 110) -> np.ndarray:
    """The picture of a figure as pixels `[H, W, 3]`, uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with unknown_glyphs():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@contextmanager
def unknown_glyphs() -> Iterator[None]:
    """Draw without a warning for each letter of a class name that the font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')
        yield


def class_name(c: int, names: Sequence[str] | None) -> str:
    """The name of a class, or its number where it has none."""
    return str(names[c]) if names is not None and c < len(names) else str(c)


def short(text: str, width: int) -> str:
    """Text for a figure: on one line, cut to a width in characters, and without formulas."""
    text = ' '.join(text.split())
    text = text if len(text) <= width else text[: width - 1] + '…'
    return text.replace('$', r'\$')


def create_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of a size in inches, and its panels row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid).flatten().tolist()
    for axis in axes:
        axis.spines[['top', 'right']].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes
