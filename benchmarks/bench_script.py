"""train.py without --synermix against a plain loop around timm, and what it takes to start."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from bench_loader import write_photographs
from measuring import Row, compare, in_turn, peak_memory
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter

from timm_synermix import train

ROOT = Path(__file__).resolve().parents[1]
MODEL, SIZE, BATCH_SIZE, CLASSES = 'resnet18', 32, 128, 4


def rows(device: torch.device, quick: bool, workers: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        data = write_photographs(Path(folder) / 'data', SIZE, 512 if quick else 1024)
        epochs = {
            'script': script_epochs(data, Path(folder), workers, device.type),
            'loop': loop_epochs(data, workers, device.type),
            'again': loop_epochs(data, workers, device.type),  # as far as two runs of the same differ
        }
        seconds = in_turn(epochs, 3 if quick else 12, device)
        setting = (
            f'{MODEL}, {SIZE} px, B {BATCH_SIZE}, {workers} worker, epochs of {len(list(data.rglob("*.jpg")))} images'
        )
        against = "loop around timm's task and loader"
        time_rows = [
            compare('train.py, plain', setting, against, seconds['script'], seconds['loop'], '≤ 1.02'),
            compare('the loop, once more', setting, against, seconds['again'], seconds['loop'], '1'),
        ]
        script = peak_memory(train_by_script, data, Path(folder), workers, device.type)
        loop = peak_memory(train_by_loop, data, workers, device.type)
        ratio = script / loop
        memory_row = Row('memory, train.py, plain', setting, against, ratio, ratio, ratio, '≤ 1.02', 'one run each')
    return [*time_rows, memory_row]


def script_epochs(data: Path, folder: Path, workers: int, device: str) -> Callable[[], None]:
    """Epochs of train.py."""
    argv = ['--data-dir', data, '--val-split', '', '--num-classes', CLASSES, '--model', MODEL, '--img-size', SIZE]
    argv += [
        '-b',
        BATCH_SIZE,
        '-j',
        workers,
        '--device',
        device,
        '--output',
        folder,
        '--experiment',
        'run',
        '--lr',
        '0.01',
    ]
    sys.argv = ['train.py', *map(str, argv)]
    run = train.build(*train._parse_args())
    epoch = 0

    def one() -> None:
        nonlocal epoch
        train.set_epoch(run.loaders.train, epoch)
        train.train_one_epoch(run, epoch)
        epoch += 1

    return one


def loop_epochs(data: Path, workers: int, device_name: str) -> Callable[[], None]:
    """The same, as one would write it with timm's parts."""
    device = torch.device(device_name)
    torch.manual_seed(42)
    model = timm.create_model(MODEL, num_classes=CLASSES).to(device)
    config = resolve_data_config({'img_size': SIZE}, model=model)
    loader = create_loader(
        create_dataset('', root=str(data), split='train', is_training=True),
        config['input_size'],
        BATCH_SIZE,
        is_training=True,
        color_jitter=0.4,
        interpolation='random',
        mean=config['mean'],
        std=config['std'],
        num_workers=workers,
        device=device,
    )
    task = ClassificationTask(model, criterion_kwargs=dict(smoothing=0.1), device=device, verbose=False)
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.01, weight_decay=2e-5, momentum=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, 'cosine', num_epochs=300, updates_per_epoch=len(loader))
    epoch = 0

    def one() -> None:
        nonlocal epoch
        model.train()
        losses = AverageMeter()
        for update, (input, target) in enumerate(loader):
            loss = task(input, target)['loss']
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.update(loss.detach(), len(target))
            scheduler.step_update(num_updates=epoch * len(loader) + update + 1)
        epoch += 1

    return one


def train_by_script(*args: Any) -> None:
    epoch = script_epochs(*args)
    for _ in range(3):
        epoch()


def train_by_loop(*args: Any) -> None:
    epoch = loop_epochs(*args)
    for _ in range(3):
        epoch()


def start_rows(quick: bool) -> list[tuple[str, float, str]]:
    """Seconds to start, and what is wanted: medians."""
    imports = (
        'import time; start = time.perf_counter(); {}; middle = time.perf_counter(); {}; end = time.perf_counter(); '
    )
    imports += 'print(middle - start, end - middle)'

    def spent(first: str, second: str) -> tuple[float, float]:
        runs = []
        for _ in range(2 if quick else 5):
            code = imports.format(first, second)
            runs.append([float(word) for word in subprocess.check_output([sys.executable, '-c', code]).split()])
        return tuple(map(statistics.median, zip(*runs, strict=True)))  # type: ignore[return-value]

    def script(name: str) -> float:
        seconds = []
        for _ in range(2 if quick else 5):
            start = time.perf_counter()
            subprocess.check_output([sys.executable, ROOT / name, '--help'])
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    timm_seconds, ours = spent('import timm', 'import timm_synermix')
    _, every_name = spent('import timm', 'from timm_synermix import *')
    return [
        ('import timm', timm_seconds, ''),
        ('import timm_synermix after it', ours, '< 0.05'),
        ('from timm_synermix import * after it', every_name, ''),
        ('train.py --help', script('train.py'), '< 3'),
        ('validate.py --help', script('validate.py'), ''),
    ]
