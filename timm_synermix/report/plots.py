"""The pictures of a report and of the trackers, as matplotlib figures that touch no global state of matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

Points = tuple[Tensor, Tensor]  # [N, 2] or [N, D], and the classes [N]


def feature_map(
    sets: Sequence[tuple[str, Tensor, Tensor]], class_names: Sequence[str] | None = None, max_classes: int = 10
) -> Figure:
    """Draw features in the plane in which the class means spread most, one panel per set, a colour per class.

    Each set is centred and divided by the root mean square norm of its features. The plane (PCA of the class means of
    all sets) and the limits are shared, so that panels compare; sets whose features differ in length each have their
    own plane.

    Args:
        sets: Of each panel the title, features `[N, D]` and their classes `[N]`. Features that are not finite are left
            out.
        class_names: Names of the classes; default is their numbers.
        max_classes: Draw at most so many classes, spread evenly over those present.

    Returns:
        The figure.
    """
    if not sets or max_classes < 1:
        raise ValueError(f'sets must not be empty and max_classes be positive, got {len(sets)} sets, {max_classes=}.')
    present = torch.cat([target.cpu() for _, _, target in sets]).unique()
    classes = present[torch.linspace(0, len(present) - 1, min(max_classes, len(present))).long()]
    scaled = [_scaled(feature, target, classes) for _, feature, target in sets]
    shared = len({feature.shape[1] for feature, _ in scaled}) == 1
    planes = [_plane(scaled, classes)] * len(sets) if shared else [_plane([part], classes) for part in scaled]
    panels = [(feature @ plane, target) for (feature, target), plane in zip(scaled, planes, strict=True)]

    columns = min(len(sets), 3)
    rows = -(-len(sets) // columns)
    figure, axes = _figure(4 * columns, 4.2 * rows + 0.3, rows, columns)
    title = 'Features in the plane in which the class means spread most'
    if not shared:
        title = 'Features, each panel in its own plane: the features differ in length'
    figure.suptitle(fill(title, 48 * columns), fontsize=11, x=0.01, ha='left')
    for axis, (name, _, _), panel, limits in zip(axes, sets, panels, _limits(panels, shared), strict=False):
        _scatter(axis, panel, classes, class_names, limits[0][1] - limits[0][0])
        axis.spines[:].set(visible=True, color='lightgrey')
        axis.set(title=short(name, 40), xticks=[], yticks=[], aspect='equal', xlim=limits[0], ylim=limits[1])
    for axis in axes[len(sets) :]:
        axis.remove()
    return figure


def _scaled(feature: Tensor, target: Tensor, classes: Tensor) -> Points:
    """The finite features of some classes, centred and with a root mean square norm of 1, in float64."""
    feature, target = feature.detach().cpu().double(), target.cpu()
    kept = torch.isin(target, classes) & feature.isfinite().all(1)
    feature, target = feature[kept], target[kept]
    if len(feature):
        feature = feature - feature.mean(0)
        norm = feature.square().sum(1).mean().sqrt()
        feature = feature / norm.clamp(min=torch.finfo(torch.float64).tiny)
    return feature, target


def _plane(sets: Sequence[Points], classes: Tensor) -> Tensor:
    """Principal directions `[D, 2]` of the class means of all sets; with D = 1 the second one is zero."""
    means = [feature[target == c].mean(0) for feature, target in sets for c in classes if c in target]
    if not means:
        return torch.eye(sets[0][0].shape[1], 2, dtype=torch.float64)
    centered = torch.stack(means)
    centered = centered - centered.mean(0)
    _, scale, directions = torch.linalg.svd(centered, full_matrices=False)
    if (scale > 1e-6).sum() < 2:  # the means are on one line: the images decide on the second direction
        images = torch.cat([feature for feature, _ in sets])
        directions = torch.linalg.svd(torch.cat([1e3 * centered, images]), full_matrices=False).Vh
    return torch.nn.functional.pad(directions[:2].T, (0, 2 - min(2, len(directions))))


def _limits(panels: Sequence[Points], shared: bool) -> list[list[list[float]]]:
    """Of each panel the limits `[[x0, x1], [y0, y1]]` of a square that holds its points, or those of all panels."""
    if shared:
        return _limits([(torch.cat([points for points, _ in panels]), panels[0][1])], False) * len(panels)
    limits = []
    for points, _ in panels:
        low, high = (points.amin(0), points.amax(0)) if len(points) else (torch.zeros(2), torch.zeros(2))
        half = 0.54 * (high - low).max() or torch.tensor(1.0)
        limits.append(torch.stack([(low + high) / 2 - half, (low + high) / 2 + half], dim=1).tolist())
    return limits


def _scatter(axis: Axes, panel: Points, classes: Tensor, class_names: Sequence[str] | None, width: float) -> None:
    """Draw points `[N, 2]` by class in a panel of a width, and the names at the class means."""
    import matplotlib
    from matplotlib.patheffects import withStroke

    points, target = panel
    colours = matplotlib.colormaps['tab10' if len(classes) <= 10 else 'turbo'].resampled(max(10, len(classes)))
    size = min(12.0, max(2.0, 6000 / max(1, len(points))))
    for i, c in enumerate(classes.tolist()):
        x, y = points[target == c].T.numpy()
        axis.scatter(x, y, s=size, color=colours(i), alpha=0.55, linewidths=0)
    present = [(i, c) for i, c in enumerate(classes.tolist()) if c in target]
    names = [short(class_name(c, class_names), 14) for _, c in present]
    places = _apart([points[target == c].mean(0).tolist() for _, c in present], names, width)
    for (i, _), name, (x, y) in zip(present, names, places, strict=True):  # after all points, to stand above them
        text = axis.text(x, y, name, ha='center', va='center', weight='bold', fontsize=9, in_layout=False)
        text.set(color=colours(i), path_effects=[withStroke(linewidth=3, foreground='white')])
    if not len(points):
        axis.text(0, 0, 'no features to draw', ha='center')


def _apart(places: Sequence[list[float]], names: Sequence[str], width: float) -> list[list[float]]:
    """Places of labels in a panel of a width, moved up where they would lie on a lower one."""
    moved: dict[int, list[float]] = {}
    for i in sorted(range(len(places)), key=lambda i: places[i][1]):
        x, y = places[i]
        for j, (other_x, other_y) in moved.items():  # from the lowest to the highest
            beside = abs(x - other_x) > 0.012 * width * (len(names[i]) + len(names[j]))
            if not beside and abs(y - other_y) < 0.042 * width:
                y = other_y + 0.042 * width
        moved[i] = [x, y]
    return [moved[i] for i in range(len(places))]


def curve(title: str, runs: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Figure:
    """Draw one quantity over the epochs, a line per run.

    Args:
        title: Name of the quantity.
        runs: Of each run the name, the epochs and the values; values that are not finite leave a gap. A run without
            values keeps its colour and stays out of the legend.

    Returns:
        The figure.
    """
    from matplotlib.ticker import MaxNLocator

    lines, names = [], []
    figure, (axis,) = _figure(4, 2.5 + 0.16 * (len(runs) if len(runs) > 1 else 0))
    for i, (name, epochs, values) in enumerate(runs):
        value = torch.tensor(values, dtype=torch.float64)
        value[~value.isfinite()] = torch.nan
        if not value.isfinite().any():
            continue
        lines += axis.plot(epochs, value.numpy(), color=f'C{i % 10}', linestyle=('-', '--', '-.', ':')[i % 4])
        names.append(short(name, 50))
        if len(epochs) <= 20:  # a single epoch has no line
            lines[-1].set(marker='o', markersize=3)
    if len(runs) > 1:
        figure.legend(lines, names, loc='outside lower left', fontsize=7.5, frameon=False)
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
    figure, (axis,) = _figure(4.6, 0.8 + 0.21 * len(bars))
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
    figure, (axis,) = _figure(size + 0.2, size)
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
    figure, axes = _figure(8, sum(heights) + 0.35 * len(rows), len(rows), height_ratios=heights)
    figure.set_facecolor('none')
    for axis, (name, frame) in zip(axes, frames.items(), strict=True):
        axis.imshow(frame.numpy(), interpolation='nearest')
        axis.set_title(short(name, 80), loc='left', fontsize=10, color='#808080')
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


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Figure, list[Axes]]:
    """A figure of a size in inches, and its panels row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid).flatten().tolist()
    for axis in axes:
        axis.spines[['top', 'right']].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes
