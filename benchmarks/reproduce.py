#!/usr/bin/env python3
"""Train every run of a grid with several seeds through train.py; a table and a picture of their results.

    python benchmarks/reproduce.py benchmarks/grids/methods.yaml --data-dir DIR --seeds 0 1 2 --jobs 2

DIR is an image folder with train/ and validation/, or a tar file of one. What follows ` -- ` goes to every train.py, as
`-- --pretrained-path FILE`. A grid is a YAML file:

    train: {flags of all runs}
    runs: {name: {flags of this one}, ...}
    settings: {name: {flags}, ...}          # each run in each of them, if there are any
    classes: 20, images_per_class: 250      # a part of the data, if wanted; the latter in train/ and in validation/
    validate_on_rest: true                  # the other training images of these classes join validation/
    mean_of_last: 5                         # results are the mean of so many evaluations, instead of the last alone
    against: {name: [name, ...], ...}       # which run is compared with which others, seed by seed
    scripts: {name: 'file.py word', ...}    # of this folder, what trains a run instead of measured_train.py

Started again it goes on: a run that is complete is not repeated, one that was stopped is resumed. OUTPUT/GRID/ has
results.md, results.png and results.json, of the end of each run, not of its best epoch; and gains.png, of each run
against the first that it is compared with. On a CPU that multiplies bfloat16 (AMX, AVX512-BF16) runs are in bfloat16
and channels_last, unless the grid says otherwise.
"""

import argparse
import csv
import json
import math
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
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from tables import draw, draw_gains, paired_table, table

from timm_synermix.utils.files import replacing

ROOT = Path(__file__).resolve().parents[1]


class Grid:
    """The runs of a grid.

    Args:
        path: YAML file.
        device: What the runs are on, see `native_precision`.

    Raises:
        ValueError: The file is no grid, it leaves no images to validate on, two runs have one name for their files, or
            a setting hides a run's flag.
    """

    def __init__(self, path: Path, device: str = 'cuda') -> None:
        self.content = yaml.safe_load(path.read_text(encoding='utf-8'))
        if not isinstance(self.content, dict) or not {'train', 'runs'} <= self.content.keys():
            raise ValueError(f"{path} must be a mapping with 'train' and 'runs'")
        self.part = {key: self.content.get(key) for key in ('classes', 'images_per_class', 'validate_on_rest')}
        if self.part['validate_on_rest'] and not self.part['images_per_class']:
            raise ValueError(f'{path}: validate_on_rest needs images_per_class, there is no rest of all images')
        self.mean_of_last = self.content.get('mean_of_last', 1)
        self.against: dict[str, list[str]] = self.content.get('against') or {}
        self.scripts: dict[str, str] = self.content.get('scripts') or {}
        self.flags: dict[str, dict[str, Any]] = {}
        common = {**native_precision(device), **self.content['train']}
        for setting, setting_flags in (self.content.get('settings') or {'': {}}).items():
            for run, flags in self.content['runs'].items():
                name = f'{run}, {setting}' if setting else run
                if hidden := flags.keys() & setting_flags.keys():
                    raise ValueError(f'{path}: {name} has {", ".join(hidden)} of the run and of the setting')
                if slug(name) in map(slug, self.flags) or '/' in name:
                    raise ValueError(f'{path}: the files of a run are named {slug(name)}, which must be one of a kind')
                self.flags[name] = {**common, **flags, **setting_flags}
        for key, names in (('against', {*self.against, *chain(*self.against.values())}), ('scripts', {*self.scripts})):
            if unknown := names - self.flags.keys():
                raise ValueError(f'{path}: {key} names {", ".join(sorted(unknown))}, which is none of its runs')


class Driver:
    """Trains the runs of a grid.

    Args:
        grid: The grid.
        args: Flags of the driver.

    Raises:
        ValueError: There are results of other flags or data, or --runs names one that is not in the grid.
    """

    def __init__(self, grid: Grid, args: argparse.Namespace) -> None:
        if unknown := {*(args.runs or [])} - grid.flags.keys():
            raise ValueError(f'--runs must be of the grid, got {", ".join(sorted(unknown))}')
        self.grid, self.args = grid, args
        self.data: Path | None = None  # the images, if the grid's data set does not have them
        self.folder = args.output / args.grid.stem
        self.started = time.time()
        self.end = math.inf if args.budget_minutes is None else self.started + 60 * args.budget_minutes
        self.items = [(name, seed) for seed in args.seeds for name in args.runs or grid.flags]
        self.results: dict[tuple[str, int], dict[str, Any]] = {}
        self.left_out: list[str] = []
        self.running: set[subprocess.Popen] = set()
        self.stopping = threading.Event()  # nothing else begins
        self.interrupted = threading.Event()  # and what runs is to end
        for path in sorted(self.folder.glob('*-*.json')):  # of other seeds, too
            result = json.loads(path.read_text())
            if result['run'] not in grid.flags:
                continue
            if result['setting'] != self.setting(result['run']):
                raise ValueError(f'{path} is of other flags or data; remove it, or take another --output')
            self.results[result['run'], result['seed']] = result

    def path(self, name: str, seed: int, suffix: str = '') -> Path:
        """The folder of a run, or a file beside it."""
        return self.folder / f'{slug(name)}-{seed}{suffix and "."}{suffix}'

    def setting(self, name: str) -> dict[str, Any]:
        """What a result is of."""
        script = self.grid.scripts.get(name)
        return dict(
            flags=self.grid.flags[name],
            more=self.args.more,
            mean_of_last=self.grid.mean_of_last,
            data=str(self.args.data_dir),
            device=self.args.device,
            part=self.grid.part,
            **({'script': script} if script else {}),
        )

    def run_all(self) -> None:
        """Train what is not there yet, several runs at once, until the time is up."""
        with ThreadPoolExecutor(self.args.jobs) as pool:
            try:
                list(pool.map(lambda item: self.run(*item), self.items))
            except KeyboardInterrupt:
                self.stopping.set()
                self.interrupted.set()
                for process in list(self.running):  # each saves where it is
                    process.terminate()
                raise
            except BaseException:
                self.stopping.set()  # what runs goes on to its end
                raise

    def run(self, name: str, seed: int) -> None:
        if (name, seed) in self.results:
            return
        if self.stopping.is_set() or time.time() > self.end:
            self.left_out.append(f'{name}, seed {seed}')
            return
        try:
            metrics = self.train(name, seed)
        except BaseException:
            self.stopping.set()
            raise
        if metrics is None:
            self.left_out.append(f'{name}, seed {seed} (stopped on the way)')
            return
        about = dict(setting=self.setting(name), date=str(date.today()), jobs=self.args.jobs, torch=version('torch'))
        self.results[name, seed] = {'run': name, 'seed': seed, **metrics, **about}
        with replacing(str(self.path(name, seed, 'json'))) as path:
            Path(path).write_text(json.dumps(self.results[name, seed]), encoding='utf-8')
        seconds = time.time() - self.started
        print(f'{seconds:6.0f} s  {name}, seed {seed}: top-1 {metrics["eval_top1"]:.2f}', flush=True)

    def train(self, name: str, seed: int) -> dict[str, float] | None:
        """One run of train.py: its last row, its seconds, and the most memory of its last part.

        None if it was stopped; it has saved where it is then.
        """
        folder, config, memory = (self.path(name, seed, suffix) for suffix in ('', 'yaml', 'memory'))
        text = f'# {json.dumps(self.setting(name))}\n{yaml.safe_dump(self.grid.flags[name])}'
        if folder.exists() and config.exists() and config.read_text() != text:
            raise RuntimeError(f'{folder} is a run of other flags or data; remove it, or take another --output')
        config.write_text(text)
        script, *words = self.grid.scripts.get(name, 'measured_train.py').split()
        command = [sys.executable, ROOT / 'benchmarks' / script, *words, memory, '--config', config]
        command += ['--seed', seed, '--device', self.args.device, '--output', self.folder, '--experiment', folder.name]
        command += ['--checkpoint-hist', 1, '--resume', 'auto', '--recovery-interval', 200]
        if self.data is not None:
            num_classes = sum(path.is_dir() for path in (self.data / 'train').iterdir())
            command += ['--data-dir', self.data, '--num-classes', num_classes]
        command += self.args.more
        spent = self.path(name, seed, 'seconds')  # of all its parts; nan if one was killed
        before = float(spent.read_text()) if spent.exists() else 0.0
        spent.write_text('nan')
        start = time.time()
        status = self.wait(command, self.path(name, seed, 'log'))
        seconds = before + time.time() - start
        spent.write_text(str(seconds))
        if status is None:
            return None
        if status:
            raise RuntimeError(f'{name}, seed {seed} failed: see {self.path(name, seed, "log")}')
        row = mean_of_last(folder / 'summary.csv', self.grid.mean_of_last)
        return {**row, **({} if math.isnan(seconds) else {'seconds': seconds}), **json.loads(memory.read_text())}

    def wait(self, command: list[Any], log: Path) -> int | None:
        """The exit status of a command; None if it was stopped, as the time was up or the driver was interrupted."""
        threads = max(1, (os.cpu_count() or 1) // self.args.jobs)
        with open(log, 'a', encoding='utf-8') as file:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdout=file,
                stderr=file,
                env={'OMP_NUM_THREADS': str(threads), **os.environ},
                start_new_session=True,  # a Ctrl-C reaches it through the driver alone
            )
        self.running.add(process)
        if self.interrupted.is_set():  # meanwhile
            process.terminate()
        stopped = False
        try:
            process.wait(None if self.end == math.inf else max(1.0, self.end - time.time()))
        except subprocess.TimeoutExpired:
            stopped = True
            process.terminate()
            process.wait()
        self.running.discard(process)
        return None if process.returncode and (stopped or self.interrupted.is_set()) else process.returncode

    def write(self) -> None:
        """results.json, results.md and results.png; prints the table."""
        names, about = list(self.grid.flags), self.about()
        results = sorted(self.results.values(), key=lambda result: (result['seed'], names.index(result['run'])))
        left_out = f'Left out (start again to go on): {"; ".join(self.left_out)}.\n' if self.left_out else ''
        # without the paths of this machine that a setting has
        plain = []
        for result in results:
            setting = result['setting']
            plain.append({**result, **{key: setting[key] for key in ('flags', 'script') if key in setting}})
            del plain[-1]['setting']
        content = {'grid': self.grid.content, 'about': about, 'results': plain}
        (self.folder / 'results.json').write_text(json.dumps(content, indent=1))
        differences = paired_table(self.grid.against, results)
        text = f'{table(names, results)}\n{differences and differences + chr(10)}{left_out}'
        (self.folder / 'results.md').write_text(f'{about}\n\n{text}')
        if results:
            draw(names, results, self.folder / 'results.png')
        if differences:
            draw_gains(self.grid.against, results, self.folder / 'gains.png')
        print(text)

    def about(self) -> str:
        args = self.args
        versions = ', '.join(f'{name} {version(name)}' for name in ('torch', 'timm', 'timm-synermix'))
        device = torch.cuda.get_device_name() if args.device == 'cuda' else f'{os.cpu_count()} CPU cores'
        python = platform.python_version()
        return f'{date.today()}, {device}, {args.jobs} runs at once, Python {python}, {versions}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('grid', type=Path, help='YAML file: flags of all runs, and of each')
    parser.add_argument('--data-dir', type=Path, help='image folder with train/ and validation/, or a tar file of it')
    parser.add_argument('--output', type=Path, default=ROOT / 'output' / 'reproduce', help='where the runs go')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='seeds of each run')
    parser.add_argument('--runs', nargs='+', metavar='NAME', help='runs to train; all of the grid by default')
    parser.add_argument('--jobs', type=int, default=1, help='runs at once; they share the cores, or the GPU')
    parser.add_argument('--budget-minutes', type=float, help='stop after this time; says what is left out')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu or cuda')
    argv = sys.argv[1:]
    split = argv.index('--') if '--' in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.more = argv[split + 1 :]
    if args.jobs < 1:
        parser.error(f'--jobs must be at least 1, got {args.jobs}')
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f'--seeds must differ, got {args.seeds}')
    if args.data_dir is not None:
        if not args.data_dir.exists():
            parser.error(f'--data-dir must be a folder or tar file that exists, got {args.data_dir}')
        args.data_dir = args.data_dir.resolve()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    try:
        grid = Grid(args.grid, args.device)
        if args.data_dir is None and 'dataset' not in grid.content['train']:
            parser.error(f'--data-dir must name the images of {args.grid}')
        folder = args.output / args.grid.stem
        folder.mkdir(parents=True, exist_ok=True)
        driver = Driver(grid, args)
        driver.data = prepare_data(args.data_dir, folder, grid.part)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        driver.run_all()
    except KeyboardInterrupt:
        print('Interrupted. Start again to go on.')
        sys.exit(130)
    finally:
        driver.write()


def mean_of_last(summary: Path, count: int) -> dict[str, float]:
    """The mean of the last rows of a summary that have an evaluation."""
    with open(summary, encoding='utf-8') as file:
        rows = [row for row in csv.DictReader(file) if row['eval_loss']][-count:]
    columns = [column for column in rows[-1] if column.startswith('eval_') and rows[-1][column]]
    return {column: statistics.fmean(float(row[column]) for row in rows) for column in columns}


def native_precision(device: str) -> dict[str, Any]:
    """Flags of all runs on a CPU that multiplies bfloat16, as those with AMX do: about twice as fast as float32.

    On one that does not, bfloat16 is six times slower than float32.
    """
    if device != 'cpu' or not torch.cpu._is_avx512_bf16_supported():
        return {}
    return dict(amp=True, amp_dtype='bfloat16', channels_last=True)


def slug(name: str) -> str:
    return name.lower().replace(', ', '-').replace(' ', '_')


def prepare_data(data: Path | None, folder: Path, part: dict[str, Any]) -> Path | None:
    """The images as a folder: a tar file is unpacked once, a part of the data is a folder of links.

    Raises:
        ValueError: There is no train/ with validation/ beside it.
    """
    if data is None:
        return None
    root = data
    if data.is_file():
        root = folder / f'{data.name}-{data.stat().st_mtime_ns}'
        if not root.exists():
            print(f'Unpacking {data} ...', flush=True)
            partly = folder / 'unpacking'
            shutil.rmtree(partly, ignore_errors=True)
            with tarfile.open(data) as file:
                safely: Any = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}  # since 3.10.12 and 3.11.4
                file.extractall(partly, **safely)
            partly.rename(root)
    depths = ('train', '*/train', '*/*/train')  # a class may be named train too
    found = (path.parent for depth in depths for path in root.glob(depth) if (path.parent / 'validation').is_dir())
    root = next(found, root)
    if not (root / 'train').is_dir() or not (root / 'validation').is_dir():
        raise ValueError(f'--data-dir must have train/ and validation/, got {data}')
    if not any(part.values()):
        return root
    links = folder / 'data'
    shutil.rmtree(links, ignore_errors=True)  # those of another part
    for split in ('train', 'validation'):
        for source in sorted(path for path in (root / split).iterdir() if path.is_dir())[: part['classes']]:
            images = sorted(source.iterdir())
            taken = {split: images[: part['images_per_class']]}
            if part['validate_on_rest'] and split == 'train':
                taken['validation'] = images[part['images_per_class'] :]
            for to, some in taken.items():
                (links / to / source.name).mkdir(parents=True, exist_ok=True)
                for image in some:
                    name = image.name if to == split else f'{split}-{image.name}'
                    (links / to / source.name / name).symlink_to(image.resolve())
    return links


if __name__ == '__main__':
    main()
