"""The results of a grid as a table and as a picture."""

import math
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


def pairs_of(name: str, other: str, column: str, results: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """A column of the results of two runs, of each seed that both have."""
    values = {(result['run'], result['seed']): result[column] for result in results if column in result}
    return [
        (value, values[other, seed]) for (run, seed), value in values.items() if run == name and (other, seed) in values
    ]


def gain(name: str, other: str, column: str, results: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean difference of two runs over their seeds, half of its Student's 95 % interval; nan for too few of them."""
    from scipy.stats import t  # slow to import

    gains = [one - two for one, two in pairs_of(name, other, column, results)]
    if len(gains) < 2:
        return (gains[0] if gains else math.nan), math.nan
    half = float(t.ppf(0.975, len(gains) - 1)) * statistics.stdev(gains) / len(gains) ** 0.5
    return statistics.mean(gains), half


def times(name: str, other: str, results: list[dict[str, Any]]) -> float:
    """The seconds of a run in those of another: their seeds' median, as other work may run beside some; or nan."""
    ratios = [one / two for one, two in pairs_of(name, other, 'seconds', results)]
    return statistics.median(ratios) if ratios else math.nan


def paired_table(
    against: dict[str, list[str]], results: list[dict[str, Any]], columns: dict[str, str] = COLUMNS
) -> str:
    """Differences of runs from others, see `gain`, and `times`; '' for none."""
    titles = [title if column != 'seconds' else 'times the seconds' for column, title in columns.items()]
    lines = ['| difference | seeds | ' + ' | '.join(titles) + ' |', '| --- ' * (len(columns) + 2) + '|']
    for name, other in compared(against):
        cells = [f'{name} - {other}', str(len(pairs_of(name, other, 'eval_top1', results)))]
        for column in columns:
            if column == 'seconds':
                value, half, form = times(name, other, results), math.nan, '.2f'
            else:
                value, half, form = *gain(name, other, column, results), '+.3g'
            spread = '' if math.isnan(half) else f' ± {half:.2g}'
            cells.append('-' if math.isnan(value) else f'{value:{form}}{spread}')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n' if against else ''


def compared(against: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(name, other) for name, others in against.items() for other in others]


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


def draw_gains(against: dict[str, list[str]], results: list[dict[str, Any]], path: Path) -> None:
    """What each run gains over the first that it is compared with, with its 95 % interval, against `times`.

    A point without an interval is hollow: that of two seeds would hide the others.
    """
    from matplotlib.figure import Figure

    firsts = {others[0] for others in against.values()}
    costs = {(name, others[0]): times(name, others[0], results) for name, others in against.items()}
    costs = dict(sorted((item for item in costs.items() if not math.isnan(item[1])), key=lambda item: item[1]))
    columns = {'eval_top1': 'top-1, points', 'eval_cosine_cohesion': 'cosine cohesion'}
    first = firsts.pop() if len(firsts) == 1 else ''
    figure = Figure(figsize=(11, 6), layout='constrained')
    for axes, (column, title) in zip(figure.subplots(1, 2), columns.items(), strict=True):
        axes.axhline(0, color='black', linewidth=0.8)
        for number, (pair, cost) in enumerate(costs.items(), start=1):
            mean, half = gain(*pair, column, results)
            few = len(pairs_of(*pair, column, results)) < 3
            label = f'{number}  {pair[0] if first else " - ".join(pair)}'
            look = dict(fmt='o', color=f'C{number % 10}', markerfacecolor='white' if few else None, capsize=3)
            axes.errorbar(cost, mean, None if few else half, label=label, **look)
            axes.annotate(str(number), (cost, mean), (5, 4), textcoords='offset points', fontsize=9)
        over, what = (f' over {first}', f"{first}'s") if first else ('', 'what it is compared with')
        finish(axes, f'gain{over} in {title}', xlabel=f'training time, in times of {what}')
    legend_below(figure, axes, columns=3)
    figure.savefig(path, dpi=120)


def finish(axes: Any, title: str, xlabel: str = '', grid: str = 'both') -> None:
    """The look that the panels of all pictures share."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.grid(axis=grid, alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)


def legend_below(figure: Any, axes: Any, columns: int = 4) -> None:
    """What the lines of a panel, and so of all, stand for."""
    figure.legend(
        *axes.get_legend_handles_labels(), loc='outside lower center', ncols=columns, fontsize=9, frameon=False
    )
