#!/usr/bin/env python3
"""Train every run of a grid with several seeds through train.py; a table and a picture of their results.

    python benchmarks/reproduce.py benchmarks/grids/methods.yaml --data-dir DIR --seeds 0 1 2 --jobs 2

DIR is an image folder with train/ and validation/, or a tar file of one. What follows ` -- ` goes to every train.py, as
`-- --pretrained-path FILE`. A grid is a YAML file:

    train: {flags of all runs}
    runs: {name: {flags of this one}, ...}
    settings: {name: {flags}, ...}          # each run in each of them, if there are any
    classes: 20, images_per_class: 250      # a part of the data, if wanted

Started again it goes on: a run that is complete is not repeated, one that was stopped is resumed. OUTPUT/GRID/ has
results.md, results.png and results.json, of the last epoch of each run, not of its best one.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {
    'eval_top1': 'top-1 %',
    'eval_cosine_cohesion': 'cosine cohesion',
    'eval_cdnv': 'CDNV',
    'eval_nc1': 'NC1',
    'eval_silhouette': 'silhouette',
    'seconds': 'seconds',
    'memory_mb': 'memory, MB',
}


class Grid:
    """The runs of a grid, and what a result is of.

    Args:
        path: YAML file.
        args: Flags of the driver.
    """

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        self.content = yaml.safe_load(path.read_text())
        self.part = {key: self.content.get(key) for key in ('classes', 'images_per_class')}
        self.args = args
        self.flags: dict[str, dict[str, Any]] = {}
        settings = self.content.get('settings') or {'': {}}
        for setting, setting_flags in settings.items():
            for run, flags in self.content['runs'].items():
                name = f'{run}, {setting}' if setting else run
                self.flags[name] = {**self.content['train'], **flags, **setting_flags}

    def setting(self, name: str) -> dict[str, Any]:
        """What a result is of: one of other flags or data is not taken for it."""
        flags = dict(flags=self.flags[name], more=self.args.more)
        return dict(**flags, data=str(self.args.data_dir), device=self.args.device, part=self.part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('grid', type=Path, help='YAML file: flags of all runs, and of each')
    parser.add_argument('--data-dir', type=Path, help='image folder with train/ and validation/, or a tar file of it')
    parser.add_argument('--output', type=Path, default=ROOT / 'output' / 'reproduce', help='where the runs go')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='seeds of each run')
    parser.add_argument('--jobs', type=int, default=1, help='runs at once; they share the cores, or the GPU')
    parser.add_argument('--budget-minutes', type=float, help='stop after this time; says what is left out')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu or cuda')
    argv = sys.argv[1:]
    split = argv.index('--') if '--' in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.more = argv[split + 1 :]

    grid = Grid(args.grid, args)
    if args.data_dir is None and 'dataset' not in grid.content['train']:
        parser.error(f'--data-dir must name the images of {args.grid}')
    if args.data_dir is not None and not args.data_dir.exists():
        parser.error(f'--data-dir must be a folder or tar file that exists, got {args.data_dir}')
    folder = args.output / args.grid.stem
    folder.mkdir(parents=True, exist_ok=True)
    runs = [(name, seed) for seed in args.seeds for name in grid.flags]
    results = {
        item: json.loads(result_file(folder, *item).read_text()) for item in runs if result_file(folder, *item).exists()
    }
    for (name, seed), result in results.items():
        if result['setting'] != grid.setting(name):
            other = result_file(folder, name, seed)
            parser.error(f'{other} is of other flags or data; remove it, or take another --output')

    data = prepare_data(args.data_dir, folder, grid.part)
    started = time.time()
    end = started + 60 * args.budget_minutes if args.budget_minutes else None
    failed = threading.Event()

    def run(name: str, seed: int) -> str | None:
        """Train, unless that is done; returns what is left out."""
        if (name, seed) in results:
            return None
        if failed.is_set() or (end is not None and time.time() + expected_seconds(name, list(results.values())) > end):
            return f'{name}, seed {seed}'
        try:
            metrics = train(folder, data, grid.flags[name], name, seed, args, end)
        except BaseException:
            failed.set()
            raise
        if metrics is None:
            return f'{name}, seed {seed} (stopped on the way)'
        results[name, seed] = {'run': name, 'seed': seed, **metrics, 'setting': grid.setting(name)}
        result_file(folder, name, seed).write_text(json.dumps(results[name, seed]))
        print(f'{time.time() - started:6.0f} s  {name}, seed {seed}: top-1 {metrics["eval_top1"]:.2f}', flush=True)
        return None

    try:
        with ThreadPoolExecutor(args.jobs) as pool:
            left_out = [name for name in pool.map(lambda item: run(*item), runs) if name]
    finally:  # also after Ctrl-C, which ends the runs too, or when one has failed
        failed.set()
        write(folder, grid, args, [results[item] for item in runs if item in results])
    if left_out:
        print(f'Left out, as the time was up (start again to go on): {"; ".join(left_out)}.')


def expected_seconds(name: str, results: list[dict[str, Any]]) -> float:
    """As many as the run took with other seeds; at least as many as the shortest one took."""
    seconds = values_of(name, 'seconds', results)
    return (
        max(seconds) if seconds else min((result['seconds'] for result in results if 'seconds' in result), default=0.0)
    )


def slug(name: str) -> str:
    return name.lower().replace(', ', '-').replace(' ', '_')


def result_file(folder: Path, name: str, seed: int) -> Path:
    return folder / f'{slug(name)}-{seed}.json'


def prepare_data(data: Path | None, folder: Path, part: dict[str, int | None]) -> Path | None:
    """The images as a folder: a tar file is unpacked once, a part of the data is a folder of links."""
    if data is not None and data.is_file():
        unpacked = folder / 'unpacked'
        if not unpacked.exists():
            print(f'Unpacking {data} ...', flush=True)
            partly = folder / 'unpacked.partly'
            shutil.rmtree(partly, ignore_errors=True)
            with tarfile.open(data) as file:
                file.extractall(partly, filter='data')
            partly.rename(unpacked)
        data = next(path.parent for path in sorted(unpacked.glob('**/train')))
    if data is None or not any(part.values()):
        return data
    links = folder / 'data'
    shutil.rmtree(links, ignore_errors=True)  # those of another part
    for split in ('train', 'validation'):
        for source in sorted(path for path in (data / split).iterdir() if path.is_dir())[: part['classes']]:
            (links / split / source.name).mkdir(parents=True)
            for image in sorted(source.iterdir())[: part['images_per_class'] if split == 'train' else None]:
                (links / split / source.name / image.name).symlink_to(image.resolve())
    return links


def train(
    folder: Path,
    data: Path | None,
    flags: dict[str, Any],
    name: str,
    seed: int,
    args: argparse.Namespace,
    end: float | None,
) -> dict[str, float] | None:
    """One run of train.py: its last row, the most memory it had, and its seconds unless it was resumed.

    None if it had to be stopped at the time `end`; it has saved where it is then.
    """
    experiment = f'{slug(name)}-{seed}'
    resumed = (folder / experiment).exists()
    config, memory = folder / f'{experiment}.yaml', folder / f'{experiment}.memory'
    config.write_text(yaml.safe_dump({key: value for key, value in flags.items() if key != 'unmixed'}))
    command = [sys.executable, ROOT / 'benchmarks' / 'measured_train.py', memory, '--config', config, '--seed', seed]
    command += ['--device', args.device, '--output', folder, '--experiment', experiment, '--checkpoint-hist', 1]
    command += ['--resume', 'auto', '--recovery-interval', 200]
    if flags.get('unmixed'):
        command.append('--unmixed')
    if data is not None:
        num_classes = sum(path.is_dir() for path in (data / 'train').iterdir())
        command += ['--data-dir', data, '--num-classes', num_classes]
    command += args.more
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    start = time.time()
    with open(folder / f'{experiment}.log', 'a') as log:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=log, stderr=log, env={**os.environ, 'OMP_NUM_THREADS': str(threads)}
        )
        try:
            status = process.wait(None if end is None else max(1.0, end - time.time()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            return None
    if status:
        raise RuntimeError(f'{name}, seed {seed} failed: see {folder / f"{experiment}.log"}')
    with open(folder / experiment / 'summary.csv') as file:
        *_, last = csv.DictReader(file)
    row = {column: float(last[column]) for column in COLUMNS if last.get(column)}
    seconds = {} if resumed else {'seconds': time.time() - start}
    return {**row, **seconds, **json.loads(memory.read_text())}


def write(folder: Path, grid: Grid, args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    (folder / 'results.json').write_text(
        json.dumps({'grid': grid.content, 'about': about(args), 'results': results}, indent=1)
    )
    text = table(list(grid.flags), results)
    (folder / 'results.md').write_text(f'{about(args)}\n\n{text}')
    if results:
        draw(list(grid.flags), results, folder / 'results.png')
    print(text)


def about(args: argparse.Namespace) -> str:
    versions = ', '.join(f'{name} {version(name)}' for name in ('torch', 'timm', 'timm-synermix'))
    device = torch.cuda.get_device_name() if args.device == 'cuda' else f'{os.cpu_count()} CPU cores'
    jobs = f'{args.jobs} runs at once'
    return f'{date.today()}, {device}, {jobs}, Python {platform.python_version()}, {versions}, {len(args.seeds)} seeds'


def values_of(name: str, column: str, results: list[dict[str, Any]]) -> list[float]:
    return [result[column] for result in results if result['run'] == name and column in result]


def table(names: list[str], results: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, a row for each run."""
    lines = ['| run | seeds | ' + ' | '.join(COLUMNS.values()) + ' |', '| --- ' * (len(COLUMNS) + 2) + '|']
    for name in names:
        cells = [name, str(len(values_of(name, 'eval_top1', results)))]
        for column in COLUMNS:
            values = values_of(name, column, results)
            spread = f' ± {statistics.stdev(values):.2g}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.4g}{spread}' if values else '-')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def draw(names: list[str], results: list[dict[str, Any]], path: Path) -> None:
    """A panel for each of accuracy, cohesion and time: every seed as a dot, their mean as a line."""
    from matplotlib.figure import Figure

    names = [name for name in names if values_of(name, 'eval_top1', results)]
    columns = [
        c for c in ('eval_top1', 'eval_cosine_cohesion', 'eval_cdnv', 'seconds') if values_of(names[0], c, results)
    ]
    figure = Figure(figsize=(3 + 2.6 * len(columns), 0.9 + 0.35 * len(names)), layout='constrained')
    for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True):
        for place, name in enumerate(names):
            values = values_of(name, column, results)
            axes.plot(values, [place] * len(values), 'o', color='#0072B2', alpha=0.6, markersize=5)
            if values:
                axes.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color='#D55E00', linewidth=2)
        axes.set_title(COLUMNS[column], fontsize=10)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis='x', alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == '__main__':
    main()
