#!/usr/bin/env python3
"""Train every run of a grid with several seeds through train.py, and put their results in one table.

    python benchmarks/reproduce.py benchmarks/grids/variants.yaml --data-dir DIR --seeds 0 1 2 --jobs 2

Started again it goes on: a run that is complete is not repeated, one that was killed is resumed. The table is
OUTPUT/GRID/results.md, with every single result in results.json: of the last epoch, not of the best one.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
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
    'memory_mb': 'host memory, MB',
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('grid', type=Path, help='YAML file: flags of all runs, and of each')
    parser.add_argument('--data-dir', type=Path, required=True, help='folder with train/ and validation/')
    parser.add_argument('--output', type=Path, default=ROOT / 'output' / 'reproduce', help='where the runs go')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='seeds of each run')
    parser.add_argument('--jobs', type=int, default=1, help='runs at once; they share the cores, or the GPU')
    parser.add_argument('--budget-minutes', type=float, help='start no run that would not end within this time')
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    args = parser.parse_args()

    grid = yaml.safe_load(args.grid.read_text())
    folder = args.output / args.grid.stem
    folder.mkdir(parents=True, exist_ok=True)
    data = subset(args.data_dir, folder / 'data', grid.get('classes'), grid.get('images_per_class'))
    todo = [(name, seed) for seed in args.seeds for name in grid['runs']]
    end = time.time() + 60 * args.budget_minutes if args.budget_minutes else float('inf')
    started = time.time()

    def result_file(name: str, seed: int) -> Path:
        return folder / f'{slug(name)}-{seed}.json'

    def setting(name: str) -> dict[str, Any]:
        """What a result is of."""
        return dict(
            flags={**grid['train'], **grid['runs'][name]}, data=str(args.data_dir), device=args.device, part=part
        )

    part = {key: grid.get(key) for key in ('classes', 'images_per_class')}
    results = {item: json.loads(result_file(*item).read_text()) for item in todo if result_file(*item).exists()}
    for (name, seed), result in results.items():
        if result['setting'] != setting(name):
            parser.error(f'{result_file(name, seed)} is of other flags or data; remove it, or take another --output')
    failed = threading.Event()

    def run(name: str, seed: int) -> str | None:
        """Train, unless that is done; returns what is left out."""
        if (name, seed) in results:
            return None
        longest = max((result.get('seconds', 0.0) for result in list(results.values())), default=0.0)
        if failed.is_set() or time.time() + longest > end:
            return f'{name}, seed {seed}'
        try:
            metrics = train(folder, data, setting(name)['flags'], name, seed, args)
        except BaseException:
            failed.set()
            raise
        results[name, seed] = {'run': name, 'seed': seed, **metrics, 'setting': setting(name)}
        result_file(name, seed).write_text(json.dumps(results[name, seed]))
        print(f'{time.time() - started:6.0f} s  {name}, seed {seed}: top-1 {metrics["eval_top1"]:.2f}', flush=True)
        return None

    try:
        with ThreadPoolExecutor(args.jobs) as pool:
            left_out = [name for name in pool.map(lambda item: run(*item), todo) if name]
    finally:  # also after Ctrl-C, which ends the runs too, or when one has failed
        failed.set()
        write(folder, grid, args, [results[item] for item in todo if item in results])
    if left_out:
        print(f'Left out, as the time was up: {"; ".join(left_out)}.')


def write(folder: Path, grid: dict[str, Any], args: argparse.Namespace, results: list[dict]) -> None:
    content = {'grid': grid, 'about': about(args), 'results': results}
    (folder / 'results.json').write_text(json.dumps(content, indent=1))
    text = table(list(grid['runs']), results)
    (folder / 'results.md').write_text(f'{about(args)}\n\n{text}')
    print(text)


def slug(name: str) -> str:
    return name.lower().replace(', ', '-').replace(' ', '_')


def subset(root: Path, folder: Path, classes: int | None, images_per_class: int | None) -> Path:
    """A folder of links to the first classes, and to the first training images of each."""
    if classes is None and images_per_class is None:
        return root
    shutil.rmtree(folder, ignore_errors=True)  # links of another size of it
    for split in ('train', 'validation'):
        for source in sorted(path for path in (root / split).iterdir() if path.is_dir())[:classes]:
            (folder / split / source.name).mkdir(parents=True, exist_ok=True)
            for image in sorted(source.iterdir())[: images_per_class if split == 'train' else None]:
                (folder / split / source.name / image.name).symlink_to(image.resolve())
    return folder


def train(folder: Path, data: Path, flags: dict[str, Any], name: str, seed: int, args: argparse.Namespace) -> dict:
    """One run of train.py: its last row, the most memory it had, and its seconds unless it was resumed."""
    resumed = (folder / f'{slug(name)}-{seed}').exists()
    config = folder / f'{slug(name)}-{seed}.yaml'
    config.write_text(yaml.safe_dump(flags))
    num_classes = sum(path.is_dir() for path in (data / 'train').iterdir())
    command = [sys.executable, ROOT / 'train.py', '--config', config, '--data-dir', data, '--seed', seed]
    command += ['--num-classes', num_classes, '--device', args.device, '--output', folder, '--checkpoint-hist', 1]
    command += ['--experiment', f'{slug(name)}-{seed}', '--resume', 'auto', '--recovery-interval', 200]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    start = time.time()
    with open(folder / f'{slug(name)}-{seed}.log', 'a') as log:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=log, stderr=log, env={**os.environ, 'OMP_NUM_THREADS': str(threads)}
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f'{name}, seed {seed} failed: see {folder / f"{slug(name)}-{seed}.log"}')
    with open(folder / f'{slug(name)}-{seed}' / 'summary.csv') as file:
        *_, last = csv.DictReader(file)
    row = {column: float(last[column]) for column in COLUMNS if last.get(column)}
    seconds = {} if resumed else {'seconds': time.time() - start}
    return {**row, **seconds, 'memory_mb': usage.ru_maxrss / 1024}


def about(args: argparse.Namespace) -> str:
    versions = ', '.join(f'{name} {version(name)}' for name in ('torch', 'timm', 'timm-synermix'))
    device = torch.cuda.get_device_name() if args.device == 'cuda' else f'{os.cpu_count()} CPU cores'
    return f'{date.today()}, {device}, Python {platform.python_version()}, {versions}, {len(args.seeds)} seeds'


def table(names: list[str], results: list[dict]) -> str:
    """Mean and standard deviation over the seeds, a row for each run."""
    lines = ['| run | seeds | ' + ' | '.join(COLUMNS.values()) + ' |', '| --- ' * (len(COLUMNS) + 2) + '|']
    for name in names:
        rows = [result for result in results if result['run'] == name]
        cells = [f'{name}', str(len(rows))]
        for column in COLUMNS:
            values = [row[column] for row in rows if column in row]
            spread = f' ± {statistics.stdev(values):.2g}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.4g}{spread}' if values else '-')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
