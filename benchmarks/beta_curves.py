#!/usr/bin/env python3
"""Accuracy and cohesion against beta, from the results of benchmarks/grids/beta.yaml.

    python benchmarks/beta_curves.py output/reproduce/beta/results.json

beta.png, beside the file, has the means over the seeds.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tables import COLUMNS, finish, legend_below

DRAWN = ['eval_top1', 'eval_cosine_cohesion', 'eval_cdnv', 'eval_nc1']
MIXERS = {0.0: 'SynerMix-Intra', 1.0: 'SynerMix (MixUp)'}  # by the alpha of MixUp
STYLES = {0: 'o-', 2: 'v--', 4: 's--'}  # by P; 0 is all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, help='results.json of the grid')
    path = parser.parse_args().results
    found: dict[tuple[str, int], dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in json.loads(path.read_text())['results']:
        flags = result['flags']
        curve = MIXERS[flags.get('mixup', 0.0)], flags.get('synermix_num_mixed', 0)
        found[curve][flags['synermix_beta']].append(result)
    figure = Figure(figsize=(12, 3.6), layout='constrained')
    for axes, column in zip(figure.subplots(1, len(DRAWN)), DRAWN, strict=True):
        for (mixer, num_mixed), points in sorted(found.items()):
            betas = sorted(points)
            values = [statistics.mean(one[column] for one in points[beta]) for beta in betas]
            color = f'C{list(MIXERS.values()).index(mixer)}'
            label = f'{mixer}, P {num_mixed or "all"}'
            axes.plot(betas, values, STYLES[num_mixed], color=color, label=label, markersize=5, fillstyle='none')
        finish(axes, COLUMNS[column], 'beta')
    legend_below(figure, axes)
    figure.savefig(path.with_name('beta.png'), dpi=120)


if __name__ == '__main__':
    main()
