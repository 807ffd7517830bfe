#!/usr/bin/env python3
"""Accuracy and cohesion against beta, from the results of benchmarks/grids/beta.yaml.

    python benchmarks/beta_curves.py output/reproduce/beta/results.json output/reproduce/equal_compute/results.json

A run without SynerMix in any of the files, `none` or `MixUp`, is the curve's beta 0. beta.png is beside the first file.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tables import COLUMNS

DRAWN = ['eval_top1', 'eval_cosine_cohesion', 'eval_cdnv', 'eval_nc1']
MIXERS = {0.0: 'SynerMix-Intra', 1.0: 'SynerMix (MixUp)'}  # by the alpha of MixUp
STYLES = {0: 'o-', 2: 'v--', 4: 's--'}  # by P; 0 is all


def curves(results: list[dict[str, Any]]) -> dict[tuple[str, int], dict[float, list[dict[str, Any]]]]:
    """Results by beta, of each mixer and P; those without SynerMix are of beta 0 and every P that is 0."""
    found: dict[tuple[str, int], dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        flags = result['flags']
        beta = flags['synermix_beta'] if flags.get('synermix') else 0.0
        found[MIXERS[flags.get('mixup', 0.0)], flags.get('synermix_num_mixed', 0)][beta].append(result)
    return found


def main() -> None:
    paths = [Path(path) for path in sys.argv[1:]]
    first, *others = [json.loads(path.read_text())['results'] for path in paths]
    epochs = first[0]['flags']['epochs']
    plain = [one for results in others for one in results if one['run'] in ('none', 'MixUp')]
    found = curves(first + [one for one in plain if one['flags']['epochs'] == epochs])
    figure = Figure(figsize=(12, 3.6), layout='constrained')
    for axes, column in zip(figure.subplots(1, len(DRAWN)), DRAWN, strict=True):
        for (mixer, num_mixed), points in sorted(found.items()):
            betas = sorted(points)
            values = [statistics.mean(one[column] for one in points[beta]) for beta in betas]
            color = f'C{list(MIXERS.values()).index(mixer)}'
            label = f'{mixer}, P {num_mixed or "all"}'
            axes.plot(betas, values, STYLES[num_mixed], color=color, label=label, markersize=5, fillstyle='none')
        axes.set_title(COLUMNS[column], fontsize=10)
        axes.set_xlabel('beta')
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize=9, frameon=False)
    figure.savefig(paths[0].with_name('beta.png'), dpi=120)


if __name__ == '__main__':
    main()
