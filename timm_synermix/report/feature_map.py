"""A picture of features in the plane, for a report and for the trackers."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from timm_synermix.report.plots import class_name, create_figure, short, unknown_glyphs

_PANEL = 3.7  # inches, at least


class _Points(NamedTuple):
    """Features `[N, D]` or points `[N, 2]`, float64, their classes `[N]`, and whether each is typical of its class."""

    values: Tensor
    target: Tensor
    typical: Tensor


def feature_map(
    sets: Sequence[tuple[str, Tensor, Tensor]], class_names: Sequence[str] | None = None, max_classes: int = 10
) -> Figure:
    """Draw features in the plane in which the class means spread most, one panel per set, a colour per class.

    Each set is centred and divided by the root mean square norm of its features. The plane (PCA of the class means of
    all sets) and the limits are shared, so that panels compare; sets whose features differ in length each have their
    own plane. Images that lie five times as far from the median of their class as is usual have no say in any of this;
    outside of the limits they are crosses at the frame.

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
    shared = len({part.values.shape[1] for part in scaled}) == 1
    planes = [_plane(scaled, classes)] * len(sets) if shared else [_plane([part], classes) for part in scaled]
    panels = [part._replace(values=part.values @ plane) for part, plane in zip(scaled, planes, strict=True)]
    names = [short(class_name(c, class_names), 14) for c in classes.tolist()]
    groups = [panels] if shared else [[panel] for panel in panels]
    placed = [item for group in groups for item in _place_labels(group, classes, names)]

    columns = min(len(sets), 3)
    rows = -(-len(sets) // columns)
    figure, axes = create_figure(4 * columns, 4.2 * rows + 0.3, rows, columns)
    title = 'Features in the plane in which the class means spread most'
    if not shared:
        title = 'Features, each panel in its own plane: the features differ in length'
    figure.suptitle(fill(title, 48 * columns), fontsize=11, x=0.01, ha='left')
    for axis, (name, _, _), panel, (limits, labels) in zip(axes, sets, panels, placed, strict=False):
        axis.spines[:].set(visible=True, color='lightgrey')
        axis.set(title=short(name, 40), xticks=[], yticks=[], aspect='equal', xlim=limits[0], ylim=limits[1])
        _draw(axis, panel, classes, limits, names, labels)
    for axis in axes[len(sets) :]:
        axis.remove()
    return figure


def _scaled(feature: Tensor, target: Tensor, classes: Tensor) -> _Points:
    """The finite features of some classes, those that are typical centred and with a root mean square norm of 1."""
    feature, target = feature.detach().cpu().double(), target.cpu()
    kept = torch.isin(target, classes) & feature.isfinite().all(1)
    feature, target = feature[kept], target[kept]
    typical = _typical(feature, target)
    if len(feature):
        feature = feature - feature[typical].mean(0)
        norm = feature[typical].square().sum(1).mean().sqrt()
        feature = feature / norm.clamp(min=torch.finfo(torch.float64).tiny)
    return _Points(feature, target, typical)


def _typical(feature: Tensor, target: Tensor, reach: float = 5.0) -> Tensor:
    """Which images lie no further from the median of their class than `reach` times the usual distance."""
    distance = torch.zeros(len(feature), dtype=torch.float64)
    usual = torch.zeros(len(feature), dtype=torch.float64)
    for c in target.unique():
        of_class = target == c
        median = torch.from_numpy(np.median(feature[of_class].numpy(), axis=0))
        distance[of_class] = (feature[of_class] - median).norm(dim=1)
        usual[of_class] = float(np.median(distance[of_class].numpy()))
    return distance <= reach * usual.clamp(min=float(np.median(distance.numpy())) if len(distance) else 0)


def _plane(sets: Sequence[_Points], classes: Tensor) -> Tensor:
    """Principal directions `[D, 2]` of the class means of all sets; with D = 1 the second one is zero."""
    means = [part.values[part.typical & (part.target == c)].mean(0) for part in sets for c in classes.tolist()
             if c in part.target]  # fmt: skip
    if not means:
        return torch.eye(sets[0].values.shape[1], 2, dtype=torch.float64)
    centered = torch.stack(means)
    centered = centered - centered.mean(0)
    _, scale, directions = torch.linalg.svd(centered, full_matrices=False)
    if (scale > 1e-6).sum() < 2:  # the means are on one line: the images decide on the second direction
        images = torch.cat([part.values[part.typical] for part in sets])
        directions = torch.linalg.svd(torch.cat([1e3 * centered, images]), full_matrices=False).Vh
    return torch.nn.functional.pad(directions[:2].T, (0, 2 - min(2, len(directions))))


def _limits(panels: Sequence[_Points], zoom: float) -> Tensor:
    """The limits `[[x0, x1], [y0, y1]]` of a square that holds the typical points of all panels; zoom widens it."""
    points = torch.cat([panel.values[panel.typical] for panel in panels])
    low, high = (points.amin(0), points.amax(0)) if len(points) else (torch.zeros(2), torch.zeros(2))
    half = 0.54 * zoom * (high - low).max() or torch.tensor(1.0)
    return torch.stack([(low + high) / 2 - half, (low + high) / 2 + half], dim=1)


_Label = tuple[int, tuple[float, float], tuple[float, float]]  # index of its class, its centre, end of the line to it
_Placed = tuple[list[list[float]], list[_Label]]


def _place_labels(panels: Sequence[_Points], classes: Tensor, names: Sequence[str]) -> list[_Placed]:
    """The limits that panels share, and labels that cover no points; the limits are as narrow as that allows."""
    sizes = _label_sizes(names)
    for zoom in (1.0, 1.15, 1.3, 1.5, 1.8):
        limits = _limits(panels, zoom)
        found = [_free_places(panel, classes, sizes, limits) for panel in panels]
        if all(free for _, free in found):
            break
    return [(limits.tolist(), labels) for labels, _ in found]


def _label_sizes(names: Sequence[str]) -> list[tuple[float, float]]:
    """Width and height of each label, as a share of the panel's."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(weight='bold', size=9)
    with unknown_glyphs():
        widths = [text_to_path.get_text_width_height_descent(name, font, ismath=False)[0] for name in names]
    return [((width + 4) / (72 * _PANEL), 13 / (72 * _PANEL)) for width in widths]


def _free_places(
    panel: _Points, classes: Tensor, sizes: Sequence[tuple[float, float]], limits: Tensor, cells: int = 150
) -> tuple[list[_Label], bool]:
    """Labels near the means of their classes, and whether they cover no points and each other; on a grid of cells."""
    low, width = limits[:, 0].numpy(), (limits[0, 1] - limits[0, 0]).item()
    unit = np.clip((panel.values.numpy() - low) / width, 0, 1)
    taken, _, _ = np.histogram2d(unit[:, 0], unit[:, 1], bins=cells, range=[[0, 1], [0, 1]])
    taken = sum(np.roll(taken, shift, (0, 1)) for shift in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)))  # dots are wide
    labels: list[_Label] = []
    free = True
    for i, c in enumerate(classes.tolist()):
        of_class = panel.typical & (panel.target == c)
        if not of_class.any():
            continue
        mean = unit[of_class.numpy()].mean(0)
        size = np.minimum(np.ceil(np.array(sizes[i]) * cells).astype(int), cells - 2)
        total = np.pad(taken.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # sums over boxes are differences of four of it
        w, h = size
        covered = total[w:, h:] - total[:-w, h:] - total[w:, :-h] + total[:-w, :-h]  # by the box that begins at a cell
        x, y = (np.arange(n) + s / 2 for n, s in zip(covered.shape, size, strict=True))
        away = np.hypot(x[:, None] - mean[0] * cells, y[None] - mean[1] * cells)
        edge = np.ones(covered.shape, dtype=bool)
        edge[1:-1, 1:-1] = False  # a box does not touch the frame
        best = np.unravel_index(np.argmin(1e4 * covered + away + 1e12 * edge), covered.shape)
        free &= bool(covered[best] < 0.5)
        taken[best[0] : best[0] + w, best[1] : best[1] + h] += 1e6
        centre = (np.array(best) + size / 2) / cells
        end = np.clip(mean, centre - size / 2 / cells, centre + size / 2 / cells)  # of the box the nearest to the mean
        labels.append((i, tuple(centre * width + low), tuple(end * width + low)))
    return labels, free


def _draw(
    axis: Axes, panel: _Points, classes: Tensor, limits: list[list[float]], names: Sequence[str], labels: list[_Label]
) -> None:
    """Draw points by class, and the names of the classes beside them, tied to their means."""
    import matplotlib
    from matplotlib.patheffects import withStroke

    colours = matplotlib.colormaps['tab10' if len(classes) <= 10 else 'turbo'].resampled(max(10, len(classes)))
    size = min(12.0, max(2.0, 6000 / max(1, len(panel.values))))
    low, high = torch.tensor(limits, dtype=torch.float64).T
    inside = ((panel.values >= low) & (panel.values <= high)).all(1)
    for i, c in enumerate(classes.tolist()):
        of_class = panel.target == c
        x, y = panel.values[of_class & inside].T.numpy()
        axis.scatter(x, y, s=size, color=colours(i), alpha=0.55, linewidths=0)
        x, y = panel.values[of_class & ~inside].clamp(low, high).T.numpy()
        if len(x):
            axis.scatter(x, y, s=25, color=colours(i), marker='x', linewidths=1, clip_on=False)
    for i, centre, end in labels:
        mean = panel.values[panel.typical & (panel.target == classes[i])].mean(0).tolist()
        axis.plot(*zip(mean, end, strict=True), color=colours(i), linewidth=0.8, zorder=0.5)  # below the points
        text = axis.text(*centre, names[i], ha='center', va='center', weight='bold', fontsize=9, in_layout=False)
        text.set(color=colours(i), path_effects=[withStroke(linewidth=2, foreground='white')])
    if not len(panel.values):
        axis.text(0, 0, 'no features to draw', ha='center')
