"""Time and memory of a training step with SynerMix, against a plain one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import naive
import numpy as np
import timm
import torch
from measuring import Row, compare, in_turn, peak_memory, synchronise
from timm.task import ClassificationTask
from torch.utils.data import DistributedSampler

from timm_synermix import SupplementBatchSampler, SynerMixTask
from timm_synermix.data.draws import Views
from timm_synermix.functional import mix_rows

NUM_CLASSES = 100
# name -> size of the images and batch, on a CPU and on a GPU
MODELS = {
    'resnet18_cifar': ((32, 16), (32, 128)),
    'resnet50': ((64, 16), (224, 64)),
    'vit_small_patch16_224': ((64, 16), (224, 64)),
    'convnext_tiny': ((64, 16), (224, 64)),
    'mobilenetv3_large_100': ((64, 16), (224, 64)),
}
SETTINGS = ['float32', 'channels_last', 'bfloat16', 'compile']


class Mode(NamedTuple):
    """Which images a step has, and what is done with them: 'summed' backpropagates the sum of the losses at once.

    sampler and task are arguments of `SupplementBatchSampler` and `SynerMixTask`; None is timm's task.
    """

    sampler: dict[str, Any]
    task: dict[str, Any] | None
    how: str = 'parts'
    aim: str = ''


EVEN = dict(supplement=False, fixed=True)
MODES = {
    'plain': Mode(EVEN, None, 'plain'),
    'naive': Mode(EVEN, None, 'naive'),
    'exact, no supplements': Mode(EVEN, dict(), aim='≤ 2.05'),
    'exact, no supplements, summed': Mode(EVEN, dict(), 'summed'),
    'exact': Mode(dict(), dict()),
    'clean': Mode(dict(clean_only=True), dict()),
    'fixed': Mode(dict(fixed=True), dict(), aim='≤ 2.05'),
    'bank': Mode(EVEN, dict(bank=True)),
    'fraction 0.25': Mode(dict(fraction=0.25), dict(fraction=0.25), aim='≤ 1.3'),  # of 16 images: two classes
}
# Not all modes in every setting: a graph is compiled for minutes on a CPU.
SHORT = ['plain', 'naive', 'exact, no supplements', 'clean', 'fixed', 'fraction 0.25']
COMPILED = ['plain', 'exact, no supplements', 'fixed']


def rows(device: torch.device, quick: bool, settings: list[str], models: list[str]) -> list[Row]:
    table = []
    for name in models:
        for setting in settings:
            print(f'          {name}, {setting}', flush=True)
            table += step_rows(name, setting, device, quick)
    return table


def step_rows(name: str, setting: str, device: torch.device, quick: bool) -> list[Row]:
    chosen = {'float32': list(MODES), 'compile': COMPILED}.get(setting, SHORT)
    modes = {mode: MODES[mode] for mode in chosen}
    size, batch_size = MODELS[name][device.type == 'cuda']
    images: dict[str, list[int]] = {mode: [] for mode in modes}
    functions = {}
    for mode, spec in modes.items():
        steps = training_steps(name, setting, spec, device, size, batch_size)

        def step(mode: str = mode, steps: Iterator[int] = steps) -> None:
            images[mode].append(next(steps))

        functions[mode] = step
    for mode in functions:  # what is compiled or allocated at first is not measured
        functions[mode]()
        images[mode].clear()
    seconds = in_turn(functions, 3 if quick or device.type == 'cpu' else 20, device, warmup=0)
    where = f'{name}, {size} px, B {batch_size}, {setting}'
    table = []
    for mode, spec in modes.items():
        if mode != 'plain':
            share = np.mean(images[mode]) / np.mean(images['plain'])
            note = f'{share:.2f} times the images'
            table.append(compare(mode, where, 'plain step', seconds[mode], seconds['plain'], spec.aim, note))
    return table


def create_model(name: str, size: int, device: torch.device) -> Any:
    kwargs = {'img_size': size} if 'vit' in name else {}
    return timm.create_model(name, num_classes=NUM_CLASSES, **kwargs).to(device)


def training_steps(
    name: str, setting: str, mode: Mode, device: torch.device, size: int, batch_size: int
) -> Iterator[int]:
    """Training steps of one mode; yields the number of images that went through the model."""
    torch.manual_seed(0)
    targets = np.repeat(np.arange(batch_size * 100 // 128), 500)  # as many lone classes as of 100 in batches of 128
    order = DistributedSampler(targets, num_replicas=1, rank=0)
    sampler = SupplementBatchSampler(order, targets, batch_size, **mode.sampler)
    model = create_model(name, size, device)
    common: dict[str, Any] = dict(criterion_kwargs=dict(loss_type='ce'), device=device, verbose=False)
    task: Any = ClassificationTask(model, **common) if mode.task is None else SynerMixTask(model, **mode.task, **common)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    layout = torch.channels_last if setting == 'channels_last' else torch.contiguous_format
    model.to(memory_format=layout)
    if setting == 'compile':
        task.compile()
    autocast = partial(torch.autocast, device.type, torch.bfloat16) if setting == 'bfloat16' else nullcontext
    pool = torch.randn(4 * batch_size + 4, 3, size, size, device=device).contiguous(memory_format=layout)
    while True:
        for batch in sampler:
            views = [item if isinstance(item, Views) else Views(item) for item in batch]
            target = torch.tensor([targets[view.image] for view in views], device=device)
            augmented = sum(view.augmented for view in views)
            clean = 0 if mode.how == 'plain' else sum(view.clean for view in views)
            input = pool[: clean + augmented]
            if mode.how == 'naive':
                with autocast():
                    loss = naive.loss(model, input[: len(batch)], input[len(batch) :], target, 0.1)
                loss.backward()
            else:
                for part in task.parts(input, target) if mode.how == 'parts' else [partial(task, input, target)]:
                    with autocast():
                        loss = part()['loss']
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield len(input)


def memory_rows(device: torch.device, quick: bool, models: list[str]) -> list[Row]:
    """Peak memory, each mode in a process of its own: weights, gradients, momentum and activations."""
    table = []
    for name in models:
        print(f'          {name}', flush=True)
        size, batch_size = MODELS[name][1]  # at a size where activations outweigh the weights, as in real training
        batch_size = batch_size if device.type == 'cuda' else 64 if size == 32 else 16
        where = f'{name}, {size} px, B {batch_size}'
        modes = ['plain', 'naive', 'exact, no supplements']
        modes += [] if quick else ['exact, no supplements, summed']
        peaks = {mode: peak_memory(run_steps, name, mode, device.type, size, batch_size) for mode in modes}
        for mode in modes[1:]:
            ratio = peaks[mode] / peaks['plain']
            aim = '≤ 1.15' if mode == 'exact, no supplements' else ''
            table.append(Row(f'memory, {mode}', where, 'plain step', ratio, ratio, ratio, aim, 'one run each'))
    return table


def run_steps(name: str, mode: str, device: str, size: int, batch_size: int) -> None:
    steps = training_steps(name, 'float32', MODES[mode], torch.device(device), size, batch_size)
    for _ in range(2):  # the second has momentum, too
        next(steps)


def profile(device: torch.device, rounds: int) -> list[tuple[str, float]]:
    """Where the time of one exact step goes, in per cent: the CIFAR ResNet-18, without supplements."""
    name = 'resnet18_cifar'
    spent: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        synchronise(device)
        start = time.perf_counter()
        yield
        synchronise(device)
        spent[what] = spent.get(what, 0.0) + time.perf_counter() - start

    def wrap(function: Callable, what: str) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with timed(what):
                return function(*args, **kwargs)

        return wrapped

    size, batch_size = MODELS[name][device.type == 'cuda']
    model = create_model(name, size, device)
    task = SynerMixTask(model, criterion_kwargs=dict(loss_type='ce'), device=device, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    images = torch.randn(2 * batch_size, 3, size, size, device=device)
    target = torch.randint(batch_size * 100 // 128, (batch_size,), device=device)
    mix, draw = wrap(mix_rows, 'mix'), wrap(task._draw, 'draw the weights')
    with mock.patch('timm_synermix.task.module.mix_rows', mix), mock.patch.object(task, '_draw', draw):
        for number in range(rounds + 2):
            if number == 2:
                spent.clear()
            with timed('step'):
                for part, view in zip(task.parts(images, target), ('clean', 'augmented'), strict=True):
                    with timed(f'forward, {view}'):
                        loss = part()['loss']
                    with timed(f'backward, {view}'):
                        loss.backward()
                with timed('optimizer'):
                    optimizer.step()
                    optimizer.zero_grad()
    spent['forward, clean'] -= spent['mix']
    whole = spent.pop('step')
    return [(what, 100 * seconds / whole) for what, seconds in spent.items()]
