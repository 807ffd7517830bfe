#!/usr/bin/env python3
"""What many images, many classes and many processes cost, with labels drawn at random; each row in a fresh process.

    make bench-scale    # ten minutes at most on 2 CPU cores
    python benchmarks/bench_scale.py --sections metrics gather

Seconds are of the CPU, and of the process alone; memory is what a row needs at most beside the imports.
"""

import argparse
import copy
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from measuring import in_process, memory_mb
from torch import distributed as dist
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
MANY = 21_841  # classes of ImageNet-21k
DIGITS = ['--dataset', 'sklearn/digits', '--img-size', '32', '--device', 'cpu', '-j', '0', '-b', '64', '--lr', '0.01']


class Measured(NamedTuple):
    """A row of the table."""

    what: str
    size: str
    seconds: float
    memory_mb: float
    note: str = ''


def measured(function: Callable[..., Any], *args: Any, limit: float) -> tuple[float, float, Any]:
    """Seconds, MB at most, and the result of a function in a fresh process; NaN, and why, if it does not come back."""
    try:
        seconds, memory, result = in_process(_measure, function, args, limit=limit)
    except TimeoutError as error:
        return np.nan, np.nan, str(error)
    except EOFError:
        return np.nan, np.nan, 'failed'
    return seconds, memory, result


def _measure(function: Callable[..., Any], args: tuple) -> tuple[float, float, Any]:
    before, start = memory_mb('VmRSS'), time.process_time()
    result = function(*args)
    return time.process_time() - start, memory_mb('VmHWM') - before, result


def sampler(num_images: int, num_classes: int) -> str:
    """To build a sampler, and its first 1,000 batches."""
    from timm_synermix.data.order import EpochOrder
    from timm_synermix.data.sampler import SupplementBatchSampler

    targets = np.random.default_rng(0).integers(0, num_classes, num_images)
    order = EpochOrder(torch.utils.data.DistributedSampler(range(num_images), num_replicas=1, rank=0), 0)
    batches = SupplementBatchSampler(order, targets, 256)
    start = time.process_time()
    for _, _batch in zip(range(1000), batches, strict=False):
        pass
    return f'{time.process_time() - start:.1f} s of it for 1,000 batches of 256'


def start_of_folder(num_files: int) -> str:
    """What train.py does before its first batch with a folder of so many images, one file for each class."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        for c in range(1000):
            path = Path(folder) / 'data' / 'train' / f'class{c}'
            path.mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(path / '0.png')
            for i in range(1, num_files // 1000):
                os.link(path / '0.png', path / f'{i}.png')
        start = time.process_time()
        flags = ['--data-dir', f'{folder}/data', '--val-split', '', '--num-classes', '1000', '--model', 'test_resnet']
        build_run(*DIGITS[2:], *flags, '--synermix', '--output', f'{folder}/output')
        return f'{time.process_time() - start:.1f} s of it to build the run'


def build_run(*flags: str) -> Any:
    from timm_synermix import train

    sys.argv = ['train.py', *flags]
    return train.build(*train._parse_args())


def skipped(num_images: int) -> str:
    """What is said of skipped images after an epoch without any."""
    from timm_synermix.data.sample_dataset import SampleDataset, warn_of_skipped

    dataset = SampleDataset(range(num_images), targets=np.random.default_rng(0).integers(0, MANY, num_images))
    start = time.process_time()
    warn_of_skipped('Train', dataset)
    return f'{time.process_time() - start:.3f} s of it'


def metrics(num_classes: int, feature_dim: int) -> str:
    """Two features of each class, and all cohesion metrics of them."""
    from timm_synermix.metrics import cohesion_metrics

    before, start = memory_mb('VmRSS'), time.process_time()
    collection = cohesion_metrics(num_classes, feature_dim)
    generator = torch.Generator().manual_seed(0)
    for part in torch.randperm(2 * num_classes, generator=generator).split(1024):
        collection.update(torch.randn(len(part), feature_dim, generator=generator), part % num_classes)
    unit = 8 * num_classes * feature_dim / 2**20
    updated, held = time.process_time() - start, (memory_mb('VmRSS') - before) / unit
    collection.compute()
    most = (memory_mb('VmHWM') - before) / unit
    return f'{updated:.1f} s of it for {2 * num_classes:,} features; {held:.1f} units held, {most:.1f} at most'


def received(num_ranks: int, num_classes: int, feature_dim: int) -> str:
    """What a process receives in an evaluation of 20,000 images."""
    context = multiprocessing.get_context('spawn')
    with tempfile.NamedTemporaryFile() as file:
        args = file.name + '.store', num_ranks, num_classes, feature_dim
        with context.Pool(num_ranks) as pool:
            counts = pool.starmap(_receive, [(rank, *args) for rank in range(num_ranks)], chunksize=1)
    return f'{max(counts) / 1e6:,.0f} MB received by each of {num_ranks}'


def _receive(rank: int, store: str, num_ranks: int, num_classes: int, feature_dim: int) -> float:
    from timm_synermix.metrics import CohesionMeter

    torch.set_num_threads(1)
    dist.init_process_group('gloo', store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
    count, reduce, gather = 0.0, dist.all_reduce, dist.all_gather

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 2 * (num_ranks - 1) / num_ranks * tensor.nbytes  # of a ring
        return reduce(tensor, *args, **kwargs)

    def all_gather(parts: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += (num_ranks - 1) * tensor.nbytes
        return gather(parts, tensor, *args, **kwargs)

    with patch.multiple(dist, all_reduce=all_reduce, all_gather=all_gather):
        meter, generator = CohesionMeter(num_classes), torch.Generator().manual_seed(rank)
        for _ in range(20):
            target = torch.randint(0, num_classes, (1000 // num_ranks,), generator=generator)
            meter.update(torch.randn(len(target), feature_dim, generator=generator), target)
        meter.compute()
    dist.destroy_process_group()
    return count


def gather(num_ranks: int) -> str:
    """A step of a classifier of the features of all ranks, of which there is one that plays all of them."""
    from timm_synermix import SynerMixTask

    rows, dim = 130, 512

    class Head(nn.Sequential):
        def get_classifier(self) -> nn.Module:
            return self[-1]

    def all_gather(parts: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        for rank, part in enumerate(parts):
            is_target = tensor.dtype == torch.int64
            part.copy_(torch.where(tensor < 0, tensor, (tensor + 997 * rank) % MANY) if is_target else tensor)

    plays = dict(all_gather=all_gather, all_reduce=lambda *_, **__: None, get_rank=lambda *_: 0)
    plays |= dict(get_world_size=lambda *_: num_ranks, get_backend=lambda *_: 'gloo')
    with patch.multiple(dist, **plays) if num_ranks > 1 else nullcontext():
        model = Head(nn.Identity(), nn.Linear(dim, MANY))
        task = SynerMixTask(model, beta=1.0, gather_rows=rows if num_ranks > 1 else 0, verbose=False)
        target = torch.randint(0, MANY, (128,))
        feature = torch.randn(128, dim, requires_grad=True)
        start = time.process_time()
        task(torch.cat([feature, feature]), target)['loss'].backward()
    return f'{time.process_time() - start:.2f} s of it for the step'


def checkpoint_of_ranks(num_ranks: int) -> str:
    """What is in a checkpoint of a ResNet-18 with the feature banks of several processes, without the optimizer."""
    import timm

    from timm_synermix import SynerMixTask
    from timm_synermix.engine.resume import rank_state

    task = SynerMixTask(timm.create_model('resnet18', num_classes=MANY), bank=True, verbose=False)
    assert task.bank is not None
    target = torch.arange(4)
    task.bank.update((torch.randn(4, 512),), target, target)
    sizes = []
    for content in (
        task.get_checkpoint_state(),
        [copy.deepcopy(rank_state(task, rank, num_ranks)) for rank in range(num_ranks)],
    ):
        with tempfile.TemporaryFile() as file:
            torch.save(content, file)
            sizes.append(file.tell() / 1e6)
    return f'{sum(sizes):.0f} MB: {sizes[0]:.0f} of the task, {sizes[1]:.0f} of what each process has'


def many_classes(cohesion: bool) -> None:
    """An epoch of digits by a ResNet-18 of 21,841 classes."""
    with tempfile.TemporaryDirectory() as folder:
        run_script('--num-classes', str(MANY), '--model', 'resnet18', '--synermix', '--output', folder, '--epochs', '1',
                   '--cohesion' if cohesion else '--no-cohesion')  # fmt: skip


def run_script(*flags: str) -> None:
    from timm_synermix import train

    train.fit(build_run(*DIGITS, *flags))


def epochs(number: int) -> str:
    """Epochs of digits by a small network; by how much the process grows from the third one on."""
    from timm_synermix import train

    seen = []
    original = train.keep_epoch

    def keep_epoch(*args: Any, **kwargs: Any) -> Any:
        seen.append(memory_mb('VmRSS'))
        return original(*args, **kwargs)

    with tempfile.TemporaryDirectory() as folder, patch.object(train, 'keep_epoch', keep_epoch):
        run_script('--num-classes', '10', '--model', 'test_resnet', '--synermix', '--output', folder, '--epochs',
                   str(number), '--warmup-epochs', '0')  # fmt: skip
    return f'{seen[-1] - seen[2]:+.0f} MB from epoch 3 to {len(seen)}, of {seen[2]:.0f}'


SECTIONS: dict[str, list[tuple[Callable[..., Any], str, tuple]]] = {
    'sampler': [
        (sampler, f'{n:,} images, {c:,} classes', (n, c))
        for n in (1_280_000, 14_000_000)
        for c in (1000, MANY, 1_000_000)
    ],
    'start': [(start_of_folder, '200,000 files', (200_000,))],
    'skipped': [(skipped, '14,000,000 images', (14_000_000,))],
    'metrics': [
        (metrics, f'{c:,} classes, {d:,} features', (c, d))
        for c, d in ((1000, 2048), (10_000, 512), (MANY, 512), (100_000, 512), (10_000, 2048), (MANY, 2048))
    ],
    'received': [(received, f'1,000 classes, 128 features, {n} processes', (n, 1000, 128)) for n in (2, 4)],
    'gather': [(gather, f'{MANY:,} classes, 128 images, {n} simulated processes', (n,)) for n in (1, 8, 64)],
    'checkpoint': [(checkpoint_of_ranks, f'{MANY:,} classes, a bank on 4 processes', (4,))],
    'digits': [
        (many_classes, f'digits, {MANY:,} classes, {word} cohesion', (cohesion,))
        for word, cohesion in (('with', True), ('without', False))
    ],
    'epochs': [(epochs, 'digits, 30 epochs', (30,))],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sections', nargs='+', choices=list(SECTIONS), default=list(SECTIONS), help='what to measure')
    parser.add_argument('--limit', type=float, default=150, help='seconds of a row, after which it is given up')
    parser.add_argument('--output', type=Path, default=ROOT / 'output' / 'bench', help='folder of the table')
    args = parser.parse_args()
    rows = []
    print('| what | size | seconds | MB | |\n| --- | --- | --- | --- | --- |', flush=True)
    for name in args.sections:
        for function, size, arguments in SECTIONS[name]:
            seconds, memory, note = measured(function, *arguments, limit=args.limit)
            rows.append(Measured(name, size, seconds, memory, note or ''))
            print(f'| {name} | {size} | {seconds:.1f} | {memory:,.0f} | {note or ""} |', flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / 'scale.json').write_text(json.dumps([row._asdict() for row in rows], indent=1))


if __name__ == '__main__':
    main()
