"""The results of a grid as a table and as a picture."""

import statistics
from pathlib import Path
from typing import Any

COLUMNS = {
    'eval_top1': 'top-1 %',
    'eval_cosine_cohesion': 'cosine cohesion',
    'eval_cdnv': 'CDNV',
    'eval_nc1': 'NC1',
    'eval_silhouette': 'silhouette',
    'seconds': 'seconds',
    'memory_mb': 'memory, MB',  # of the GPU, or of the main process
}
DRAWN = ['eval_top1', 'eval_cosine_cohesion', 'eval_cdnv', 'eval_nc1', 'seconds']


def values_of(name: str, column: str, results: list[dict[str, Any]]) -> list[float]:
    """A column of the results of one run, a value for each seed that has it."""
    return [result[column] for result in results if result['run'] == name and column in result]


def table(names: list[str], results: list[dict[str, Any]], columns: dict[str, str] = COLUMNS) -> str:
    """Mean and standard deviation over the seeds, a row for each run."""
    lines = ['| run | seeds | ' + ' | '.join(columns.values()) + ' |', '| --- ' * (len(columns) + 2) + '|']
    for name in names:
        cells = [name, str(len(values_of(name, 'eval_top1', results)))]
        for column in columns:
            values = values_of(name, column, results)
            spread = f' ± {statistics.stdev(values):.2g}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.4g}{spread}' if values else '-')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def paired_table(against: dict[str, str], results: list[dict[str, Any]], columns: dict[str, str] = COLUMNS) -> str:
    """Differences of runs from others, with Student's 95 % intervals over the seeds that both have; '' for none."""
    from scipy.stats import t  # slow to import

    values = {(result['run'], result['seed']): result for result in results}
    lines = ['| difference | seeds | ' + ' | '.join(columns.values()) + ' |', '| --- ' * (len(columns) + 2) + '|']
    for name, other in against.items():
        seeds = [seed for run, seed in values if run == name and (other, seed) in values]
        cells = [f'{name} - {other}', str(len(seeds))]
        for column in columns:
            pairs = [(values[name, seed].get(column), values[other, seed].get(column)) for seed in seeds]
            gains = [one - two for one, two in pairs if one is not None and two is not None]
            interval = ''
            if len(gains) > 1:
                interval = f' ± {t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / len(gains) ** 0.5:.2g}'
            cells.append(f'{statistics.mean(gains):+.3g}{interval}' if gains else '-')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n' if against else ''


def draw(names: list[str], results: list[dict[str, Any]], path: Path) -> None:
    """A panel for each of accuracy, cohesion and time: every seed as a dot, their mean as a line."""
    from matplotlib.figure import Figure

    names = [name for name in names if values_of(name, 'eval_top1', results)]
    columns = [column for column in DRAWN if any(values_of(name, column, results) for name in names)]
    figure = Figure(figsize=(3 + 2.6 * len(columns), 0.9 + 0.35 * len(names)), layout='constrained')
    for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True):
        for place, name in enumerate(names):
            values = values_of(name, column, results)
            axes.plot(values, [place] * len(values), 'o', color='#0072B2', alpha=0.6, markersize=5)
            if values:
                axes.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color='#D55E00', linewidth=2)
        finish(axes, COLUMNS[column], grid='x')
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
    figure.savefig(path, dpi=120)


def finish(axes: Any, title: str, xlabel: str = '', grid: str = 'both') -> None:
    """The look that the panels of all pictures share."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.grid(axis=grid, alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)


def legend_below(figure: Any, axes: Any) -> None:
    """What the lines of a panel, and so of all, stand for."""
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize=9, frameon=False)
