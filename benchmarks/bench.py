#!/usr/bin/env python3
"""What SynerMix costs: every measurement in one run, as ratios, in one table (Markdown and JSON).

    make bench          # all of it; on 2 CPU cores that takes half an hour
    make bench-quick    # the short of it, some 5 minutes
    python benchmarks/bench.py --device cuda

What is compared takes turns, so that a busy machine slows both. The ratio is the median over the rounds.
"""

import argparse
import json
import os
import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import bench_loader
import bench_operator
import bench_script
import bench_step
import torch

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ['start', 'operator', 'loader', 'step', 'memory', 'off', 'profile']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu or cuda')
    parser.add_argument('--quick', action='store_true', help='fewer models and rounds')
    parser.add_argument('--sections', nargs='+', choices=SECTIONS, default=SECTIONS, help='what to measure')
    parser.add_argument(
        '--models', nargs='+', choices=list(bench_step.MODELS), help='models of the step and its memory'
    )
    parser.add_argument('--settings', nargs='+', choices=bench_step.SETTINGS, help='settings of the step')
    parser.add_argument('--data-dir', help='a folder of 32-pixel images with train/, loaded besides photographs')
    parser.add_argument('--workers', type=int, default=1, help='processes that load images')
    parser.add_argument('--output', type=Path, default=ROOT / 'output' / 'bench', help='folder of the table')
    args = parser.parse_args()
    device = torch.device(args.device)
    models = args.models or list(bench_step.MODELS)[: 1 if args.quick else None]
    settings = args.settings or bench_step.SETTINGS[: 1 if args.quick else None]

    table, start_up, profile, begun = [], [], [], time.time()
    for section in args.sections:
        print(f'{time.time() - begun:6.0f} s  {section}', flush=True)
        if section == 'start':
            start_up = bench_script.start_rows(args.quick)
        elif section == 'operator':
            table += bench_operator.rows(device, args.quick)
        elif section == 'loader':
            table += bench_loader.rows(device, args.quick, args.data_dir, args.workers)
        elif section == 'step':
            table += bench_step.rows(device, args.quick, settings, models)
        elif section == 'memory':
            table += bench_step.memory_rows(device, args.quick, models)
        elif section == 'off':
            table += bench_script.rows(device, args.quick, args.workers)
        else:
            profile = bench_step.profile(device, 5 if args.quick else 20)
        args.output.mkdir(parents=True, exist_ok=True)
        text = markdown(about(device), table, start_up, profile)
        (args.output / 'bench.md').write_text(text)
        content = dict(about=about(device), rows=[row._asdict() for row in table], start_up=start_up, profile=profile)
        (args.output / 'bench.json').write_text(json.dumps(content, indent=1))
    print(f'{time.time() - begun:6.0f} s\n\n{text}\n{args.output / "bench.md"}')


def about(device: torch.device) -> str:
    names = ('torch', 'torchvision', 'timm', 'timm-synermix')
    hardware = (
        f'{os.cpu_count()} CPU cores ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads'
    )
    if device.type == 'cuda':
        hardware = f'{torch.cuda.get_device_name()}, {hardware}'
    versions = ', '.join(f'{name} {version(name)}' for name in names)
    return f'{date.today()}; {hardware}; Python {platform.python_version()}, {versions}'


def markdown(about: str, table: list, start_up: list, profile: list) -> str:
    lines = [about, '']
    if table:
        lines += ['| what | setting | as a multiple of | ratio | range | aim | |', '| --- ' * 7 + '|']
        for row in table:
            spread = f'{row.low:.2f} to {row.high:.2f}' if row.low != row.high else ''
            cells = [row.what, row.setting, row.against, f'{row.ratio:.2f}', spread, row.aim, row.note]
            lines.append('| ' + ' | '.join(cells) + ' |')
    if start_up:
        lines += ['', '| start-up | seconds | aim |', '| --- | --- | --- |']
        lines += [f'| {what} | {seconds:.3f} | {aim} |' for what, seconds, aim in start_up]
    if profile:
        lines += ['', '| part of an exact step | % of its time |', '| --- | --- |']
        lines += [f'| {what} | {share:.2f} |' for what, share in profile]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
