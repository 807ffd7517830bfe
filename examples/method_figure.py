"""Draw the figure of the method card: how SynerMix trains on one mini-batch.

    python examples/method_figure.py [FILE]

writes `docs/images/method.png`. The points are random, from a fixed seed; the stars are `intra_class_mix` of them.
"""

import io
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Polygon, Rectangle, RegularPolygon
from PIL import Image
from scipy.spatial import ConvexHull
from torch import Tensor

from timm_synermix import intra_class_mix

ROOT = Path(__file__).resolve().parent.parent
COLORS = ['#0072B2', '#D55E00', '#009E73']  # of the classes, from the palette of Okabe and Ito
MARKERS = ['o', '^', 's']
INK, GREY, PALE = '#222222', '#8A8A8A', '#F3F3F3'

TARGET = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 1, 0, 0, 1])  # the mini-batch
SUPPLEMENT = 7  # its image that was drawn because class 2 would have had one image
CENTER = torch.tensor([[0.25, 0.64], [0.75, 0.66], [0.52, 0.31]])  # of the classes in feature space
LAM = 0.62  # of MixUp
TOP, BOTTOM = 34.5, 12.5  # heights of the two rows
SEED = 5602  # one that draws the points apart


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / 'docs' / 'images' / 'method.png'
    draw(path)
    print(f'{path}: {path.stat().st_size / 1000:.0f} kB')


def draw(path: Path) -> None:
    """Draw the figure, 1600 pixels wide, and save it."""
    style = {'font.family': 'DejaVu Sans', 'mathtext.fontset': 'dejavusans', 'text.color': INK}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(10, 4.9), facecolor='white')
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 100), ylim=(0, 49))
        axes.axis('off')
        generator = torch.Generator().manual_seed(SEED)
        draw_images(axes, generator)
        draw_network(axes)
        draw_feature_space(axes, generator)
        draw_losses(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=160)
        plt.close(figure)
    Image.open(buffer).convert('RGB').quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)  # small


def draw_images(axes: Axes, generator: torch.Generator) -> None:
    """The two views of the mini-batch: clean above, augmented and mixed between classes below."""
    label(axes, 9.6, TOP + 8.3, 'clean images $x$', weight='bold')
    label(axes, 9.6, BOTTOM + 8.3, "augmented images $x'$", weight='bold')
    pose = torch.rand(len(TARGET), 4, generator=generator).tolist()
    for i, c in enumerate(TARGET.tolist()):
        x, y = 1.4 + 4.2 * (i % 4), 2.3 - 4.2 * (i // 4)
        tile(axes, x, TOP + y, dashed=i == SUPPLEMENT)
        shape(axes, x, TOP + y, c)
        tile(axes, x, BOTTOM + y)
        j = len(TARGET) - 1 - i  # as timm's Mixup pairs them
        for k, alpha in ((i, LAM), (j, 1 - LAM)):
            dx, dy, size, angle = pose[k]
            move = {'dx': 1.6 * (dx - 0.5), 'dy': 1.6 * (dy - 0.5), 'size': 1 + 0.6 * size, 'angle': 360 * angle}
            shape(axes, x, BOTTOM + y, int(TARGET[k]), alpha=alpha, **move)
    step(axes, 2.5, TOP - 8.0, 1)
    label(axes, 4.2, TOP - 7.0, 'a lone class gets\na second image', ha='left', va='top')
    step(axes, 2.5, BOTTOM - 8.0, 3)
    label(
        axes,
        4.2,
        BOTTOM - 7.0,
        "$\\lambda\\, x'_i + (1 - \\lambda)\\, x'_j$\n(MixUp, CutMix, ...)",
        ha='left',
        va='top',
    )


def draw_network(axes: Axes) -> None:
    """The backbone and the classifier, which both views share, and the arrows between the parts."""
    for x, name in ((22.3, 'backbone'), (69.5, 'classifier')):
        box(axes, x, 5, 9.4, 41.5, name)
        label(axes, x + 4.7, 23.4, '(shared)', color='#555555')
    for y in (TOP, BOTTOM):
        arrow(axes, (18.6, y), (21.9, y))
        arrow(axes, (79.3, y), (83.9, y))
    arrow(axes, (32.1, TOP), (35.0, TOP))
    arrow(axes, (64.3, TOP), (69.1, TOP))
    for i, color in enumerate(COLORS):
        axes.plot(65.1 + 1.5 * i, TOP + 2, '*', color=color, markersize=9, markeredgecolor=INK, markeredgewidth=0.5)
    arrow(axes, (32.1, BOTTOM), (69.1, BOTTOM))
    label(axes, 50.6, BOTTOM + 1.9, 'features of the mixed images')
    label(axes, 50.6, BOTTOM - 2.0, 'soft targets  $\\lambda\\, y_i + (1 - \\lambda)\\, y_j$', color='#555555')


def draw_feature_space(axes: Axes, generator: torch.Generator) -> None:
    """The features of the clean images, and the random convex combination of each class."""
    x, y, width, height = 35.4, 21.1, 28.6, 25.4
    axes.add_patch(Rectangle((x, y), width, height, facecolor='white', edgecolor=GREY, linewidth=1))
    feature = CENTER[TARGET] + 0.1 * torch.randn(len(TARGET), 2, generator=generator)
    weight = torch.rand(len(TARGET), generator=generator)
    mixed, mixed_target = intra_class_mix(feature, TARGET, weight=weight)
    points, stars = (torch.tensor([x, y]) + part * torch.tensor([width, height]) for part in (feature, mixed))
    for star, c in zip(stars.tolist(), mixed_target.tolist(), strict=True):
        if c >= 0:  # the rest is padding
            own = TARGET.eq(c)
            draw_class(axes, c, points[own], star, weight[own])
    step(axes, x + 2, y + height - 2, 2)
    label(axes, x + width / 2, y + height - 2, 'feature space', weight='bold')
    label(axes, x + 1, y + 2.2, '$s_c = \\sum_i w_i f_i$', ha='left', size=11.5)
    axes.plot(x + 12.4, y + 2.3, '*', color='white', markersize=11, markeredgecolor=INK, markeredgewidth=0.9)
    label(axes, x + 13.6, y + 2.1, '$s_c$, one per class', ha='left')


def draw_class(axes: Axes, c: int, points: Tensor, star: list[float], weight: Tensor) -> None:
    """The features of one class, their convex hull, and the synthesised feature inside of it."""
    hull = points[ConvexHull(points).vertices] if len(points) > 2 else points
    axes.add_patch(Polygon(hull.tolist(), facecolor=COLORS[c] + '22', edgecolor=COLORS[c] + '66', linewidth=1))
    for point, share in zip(points.tolist(), (weight / weight.sum()).tolist(), strict=True):
        axes.plot(*zip(point, star, strict=True), color=COLORS[c], linewidth=0.6 + 5 * share, alpha=0.5, zorder=2)
        axes.plot(*point, MARKERS[c], color=COLORS[c], markersize=8, markeredgecolor='white', zorder=3)
    axes.plot(*star, '*', color=COLORS[c], markersize=17, markeredgecolor=INK, markeredgewidth=0.9, zorder=4)


def draw_losses(axes: Axes) -> None:
    """The two losses, and the loss they make."""
    box(axes, 84.3, TOP - 2.9, 13.6, 5.8, r'$L_\mathrm{intra}$', size=13)
    box(axes, 84.3, BOTTOM - 2.9, 13.6, 5.8, r'$L_\mathrm{inter}$', size=13)
    label(axes, 91.1, TOP + 4.6, 'mean over classes')
    label(axes, 91.1, BOTTOM - 4.8, "the recipe's loss")
    middle = (TOP + BOTTOM) / 2
    arrow(axes, (91.1, TOP - 3.3), (91.1, middle + 5.1))
    arrow(axes, (91.1, BOTTOM + 3.3), (91.1, middle - 5.1))
    text = '$L = \\beta\\, L_\\mathrm{intra}$\n$+\\, (1 - \\beta)\\, L_\\mathrm{inter}$'
    box(axes, 82.9, middle - 4.7, 16.4, 9.4, text, size=11.5, face='#FFF6DA')
    step(axes, 82.9, middle + 4.7, 4)


def tile(axes: Axes, x: float, y: float, dashed: bool = False) -> None:
    """The frame of an image."""
    style = {'linestyle': (0, (2.2, 1.4)), 'edgecolor': INK, 'linewidth': 1.6} if dashed else {'edgecolor': GREY}
    axes.add_patch(Rectangle((x, y), 3.8, 3.8, facecolor=PALE, **style))


def shape(
    axes: Axes,
    x: float,
    y: float,
    c: int,
    dx: float = 0,
    dy: float = 0,
    size: float = 1,
    angle: float = 0,
    alpha: float = 1,
) -> None:
    """What an image shows: the sign of its class, moved, scaled and turned, cut off at the frame."""
    center, radius = (x + 1.9 + dx, y + 1.9 + dy), 1.25 * size
    style = {'facecolor': COLORS[c], 'alpha': alpha, 'linewidth': 0}
    patch: Patch
    if c == 0:
        patch = Circle(center, radius, **style)
    else:
        turn = torch.tensor(angle + (0 if c == 1 else 45)).deg2rad().item()
        patch = RegularPolygon(center, 3 if c == 1 else 4, radius=1.15 * radius, orientation=turn, **style)
    axes.add_patch(patch)
    patch.set_clip_path(Rectangle((x, y), 3.8, 3.8, transform=axes.transData))


def box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, size: float = 12, face: str = '#E8EEF4'
) -> None:
    """A part of the network, or a loss."""
    style = 'round,pad=0,rounding_size=0.9'
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=INK, linewidth=1))
    label(axes, x + width / 2, y + height / 2, text, size=size, linespacing=1.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=13, color=INK, linewidth=1.4, shrinkA=0)
    )


def step(axes: Axes, x: float, y: float, number: int) -> None:
    """The number of a step of the paper."""
    axes.add_patch(Circle((x, y), 1.15, facecolor=INK, linewidth=0, zorder=5))
    label(axes, x, y - 0.07, str(number), color='white', size=10, weight='bold', zorder=6)


def label(axes: Axes, x: float, y: float, text: str, size: float = 10.5, **kwargs) -> None:
    axes.text(x, y, text, fontsize=size, **{'ha': 'center', 'va': 'center', **kwargs})


if __name__ == '__main__':
    main()
