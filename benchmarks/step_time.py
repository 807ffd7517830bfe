#!/usr/bin/env python3
"""Time of a training step with SynerMix against a plain one, all in one run.

    python benchmarks/step_time.py --model resnet18 --img-size 32 --num-classes 100 --batch-size 128

Batches have the classes that the sampler gives them; images are random numbers, so decoding is not in it. Steps of all
modes take turns, and each mode's figure is the median of its own.
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import numpy as np
import timm
import torch
from timm.task import ClassificationTask
from torch._dynamo.utils import counters
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from timm_synermix import SupplementBatchSampler, SynerMixTask

# mode -> arguments of the sampler, arguments of the task
MODES = {
    'plain': (dict(supplement=False, fixed=True), None),
    'keep': (dict(supplement=False, fixed=True), dict()),
    'separate': (dict(), dict()),
    'fused': (dict(), dict(fused=True)),
    'clean': (dict(clean_only=True), dict()),
    'fixed': (dict(fixed=True), dict()),
    'fixed, fused': (dict(fixed=True), dict(fused=True)),
    'bank': (dict(supplement=False, fixed=True), dict(bank=True)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--model', default='resnet18', help='timm model')
    parser.add_argument('--img-size', type=int, default=32, help='image size in pixels')
    parser.add_argument('--num-classes', type=int, default=100, help='classes, of 500 images each')
    parser.add_argument('--batch-size', type=int, default=128, help='images per batch before partners')
    parser.add_argument('--steps', type=int, default=20, help='measured steps of each mode')
    parser.add_argument('--warmup', type=int, default=3, help='steps of each mode before')
    parser.add_argument('--compile', action='store_true', help='compile with inductor, and count the graphs')
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    args = parser.parse_args()

    steps = {name: training_steps(args, *mode) for name, mode in MODES.items()}
    graphs = dict.fromkeys(MODES, 0)
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    images: dict[str, list[int]] = {name: [] for name in MODES}
    for round in tqdm(range(args.warmup + args.steps), unit='round', leave=False, disable=None):
        for name, step in steps.items():
            before = counters['stats']['unique_graphs']
            start = time.perf_counter()
            count = next(step)
            if round >= args.warmup:
                seconds[name].append(time.perf_counter() - start)
                images[name].append(count)
                graphs[name] += counters['stats']['unique_graphs'] - before
    print(f'{args}; torch {torch.__version__}, {torch.get_num_threads()} threads\n')
    print('| mode | images forward per step | ms per step | to a plain step | graphs compiled after warm-up |')
    print('| --- | --- | --- | --- | --- |')
    plain = statistics.median(seconds['plain'])
    for name in MODES:
        median = statistics.median(seconds[name])
        count = statistics.mean(images[name])
        compiled = graphs[name] if args.compile else '-'
        print(f'| {name} | {count:.1f} | {1e3 * median:.1f} | {median / plain:.2f} | {compiled} |')


def training_steps(args: argparse.Namespace, sampler_kwargs: dict, task_kwargs: dict | None) -> Iterator[int]:
    """Training steps of one mode; yields the number of images that went through the model."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    targets = np.repeat(np.arange(args.num_classes), 500)
    order = DistributedSampler(targets, num_replicas=1, rank=0)
    sampler = SupplementBatchSampler(order, targets, args.batch_size, **sampler_kwargs)
    kwargs = {'img_size': args.img_size} if 'vit' in args.model or 'swin' in args.model else {}
    model = timm.create_model(args.model, num_classes=args.num_classes, **kwargs).to(device)
    common = dict(criterion_kwargs=dict(loss_type='ce'), device=device, verbose=False)
    task = ClassificationTask(model, **common) if task_kwargs is None else SynerMixTask(model, **task_kwargs, **common)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if args.compile:
        task.compile()
    pool = torch.randn(4 * args.batch_size + 4, 3, args.img_size, args.img_size, device=device)
    for batch in sampler:
        target = torch.tensor([targets[i] for i in batch], device=device)
        augmented = sum(i >= 0 for i in batch)
        input = pool[: augmented if task_kwargs is None else len(batch) + augmented]
        task(input, target)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        yield len(input)


if __name__ == '__main__':
    main()
