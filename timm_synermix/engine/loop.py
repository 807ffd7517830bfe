"""An epoch as updates: its batches in the groups whose gradients are accumulated, and what is done with each."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
import torchvision.utils
from accelerate import Accelerator
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from timm_synermix.data.sample_dataset import warn_of_skipped
from timm_synermix.engine.progress import TrainProgress
from timm_synermix.engine.run import Run, save_in_epoch
from timm_synermix.task.synermix import loss_parts
from timm_synermix.utils.random import seed_everything, seed_of


class Batch(NamedTuple):
    """A batch of a loader: its number in the epoch, images, classes, and the seconds that the loop waited for it."""

    number: int
    input: Tensor
    target: Tensor
    waited: float


class Losses(NamedTuple):
    """The scalars of a batch, on their device, and how many images it has."""

    values: dict[str, Tensor]
    images: int


@dataclass
class Update:
    """The batches whose gradients make one update of the weights, as they come from the loader.

    Attributes:
        number: In the epoch.
        size: How many batches it has; a stream that ends early has fewer.
        window: By how many batches their gradients are averaged.
        end: The number of the batch after its last one.
        waited: Seconds that its batches kept the loop waiting, so far.
    """

    number: int
    size: int
    window: int
    end: int
    batches: Iterator[Batch]
    waited: float = 0.0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.waited += batch.waited
            yield batch


def epoch_updates(loader: Any, accum_steps: int, first_batch: int = 0) -> Iterator[Update]:
    """The updates of an epoch from one of its batches on; iterate over each before the next is asked for."""
    batches = timed_batches(loader, first_batch)
    for batch in batches:
        number = batch.number // accum_steps
        end = (number + 1) * accum_steps
        if batch.number < len(loader):  # a stream may hold more than it says
            end = min(end, len(loader))
        size = end - batch.number
        window = max(1, min(accum_steps, len(loader) - number * accum_steps))
        yield Update(number, size, window, end, chain([batch], islice(batches, size - 1)))


def timed_batches(loader: Any, first_batch: int) -> Iterator[Batch]:
    """The batches of a loader from the first one on."""
    start = time.time()
    batches = iter(loader)
    if first_batch and isinstance(loader.dataset, IterableDataset):  # a stream begins at its beginning
        batches = islice(batches, first_batch, None)
    for number, (input, target) in enumerate(batches, first_batch):
        yield Batch(number, input, target, time.time() - start)
        start = time.time()


def backward(run: Run, epoch: int, update: Update, batch: Batch) -> Losses:
    """The forward and backward passes of a batch: one loss after the other, so that one's activations are in memory."""
    args, accelerator, task = run.args, run.accelerator, run.trained.task
    # What a step draws depends on which step it is, not on the steps before it.
    seed_everything(seed_of('step', args.seed, args.rank, epoch, batch.number), accelerator.device)
    dtype = getattr(torch, args.model_dtype or 'float32')  # which images without a prefetcher do not have yet
    input, target = batch.input.to(accelerator.device, dtype), batch.target.to(accelerator.device)
    if run.trained.mix_batch is not None:
        input, target = run.trained.mix_batch(input, target)
    if args.channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    if args.save_images:
        run.place.last_input = input
    scale = batch_loss_scale(args, input.shape[-1], len(target))
    second_order = getattr(run.trained.optimizer.optimizer, 'is_second_order', False)
    values: dict[str, Tensor] = {}
    parts = loss_parts(task, input, target)
    for part in parts:
        with gradient_sync(accelerator, task, batch.number + 1 == update.end and part is parts[-1]):
            with accelerator.autocast():
                result = part()
            accelerator.backward(result['loss'] * scale / update.window, create_graph=second_order)
        for name, value in result.items():
            if value.ndim == 0:
                values[name] = values.get(name, 0.0) + value.detach()
    run.keeper.guard.add(values, update.number)
    return Losses(values, len(target))


def gradient_sync(accelerator: Accelerator, task: TrainingTask, update_due: bool) -> Any:
    """Average gradients across processes in the backward pass only where an update follows."""
    return nullcontext() if update_due else accelerator.no_sync(task.trainable_module)


def batch_loss_scale(args: argparse.Namespace, img_size: int, num_images: int) -> float:
    """Factor of the loss where scheduled image sizes make the batch size vary; second images do not change it."""
    if args.synermix:
        sizes = dict(zip(args.train_img_sizes or [], args.train_batch_sizes or [], strict=False))
        num_images = sizes.get(img_size, args.batch_size)
    power = {'none': 0.0, 'sqrt': 0.5, 'linear': 1.0}[args.variable_batch_loss_scale]
    return (num_images / args.batch_size) ** power


def update_weights(run: Run, num_updates: int) -> None:
    """Clip the gradients, step the optimizer and the average (EMA)."""
    args, accelerator, trained = run.args, run.accelerator, run.trained
    if args.clip_grad is not None:
        accelerator.unscale_gradients()
        parameters = trained.task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
        dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    trained.task.update_ema(step=num_updates)
    if args.synchronize_step and accelerator.device.type == 'cuda':
        torch.cuda.synchronize()


def note_losses(run: Run, losses: list[Losses], num_updates: int, lr: float) -> None:
    """Count the losses of an update that was made, for the epoch and for the trackers."""
    for values, images in losses:
        if run.place.meter is not None:
            run.place.meter.update(values, images)
        if run.keeper.trackers is not None:
            run.keeper.trackers.add_batch(values, images)
    if run.keeper.trackers is not None:
        run.keeper.trackers.add_update(num_updates, lr)


def report_update(
    run: Run, epoch: int, update: Update, losses: list[Losses], lr: float, progress: TrainProgress
) -> None:
    """Show an update, and where the log waits for the device anyway, look at its losses and send them."""
    assert run.place.meter is not None
    images = sum(each.images for each in losses)
    if not progress.update(update.number, images, update.waited, run.place.meter, lr):
        return
    run.keeper.guard.accepts(epoch, always=True)
    if run.keeper.trackers is not None:
        run.keeper.trackers.send_updates(progress.rate)
    if run.args.save_images and run.keeper.saver is not None:
        path = os.path.join(run.keeper.saver.checkpoint_dir, f'train-batch-{update.end - 1}.jpg')
        torchvision.utils.save_image(run.place.last_input, path, padding=0, normalize=True)


def keep_update(run: Run, epoch: int, update: Update) -> None:
    """Note that an update is done; save if that is due, and stop if that was asked for."""
    args, num_batches = run.args, len(run.loaders.train)
    run.place.done_batches = update.end
    if update.end < num_batches:
        if args.recovery_interval and (update.number + 1) % args.recovery_interval == 0:
            save_in_epoch(run, epoch, update.end)
        run.keeper.stop.check()


def end_epoch(run: Run, epoch: int, progress: TrainProgress) -> None:
    """What is left to do once an epoch's updates are made; every process must call it."""
    args, loader, optimizer = run.args, run.loaders.train, run.trained.optimizer.optimizer
    run.keeper.guard.accepts(epoch, always=True)
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    average_batch_norm(run, run.trained.task.trainable_module)
    progress.close()
    num_skipped = num_skipped_images(run, epoch)
    if args.rank == 0:
        warn_of_skipped(f'Train: {epoch}', getattr(loader, 'dataset', None), epoch, num_skipped)
    if args.recovery_interval and progress.updates % args.recovery_interval == 0:
        save_in_epoch(run, epoch, len(loader))


def average_batch_norm(run: Run, module: nn.Module) -> None:
    """Make BatchNorm's statistics the same in all processes, if the flags want that."""
    if run.args.distributed and run.args.dist_bn in ('broadcast', 'reduce'):
        distribute_bn(module, run.args.world_size, run.args.dist_bn == 'reduce')


def num_skipped_images(run: Run, epoch: int) -> int:
    """How many images of the epoch could not be read, over all processes; every process must call it."""
    count = getattr(getattr(run.loaders.train, 'dataset', None), 'num_skipped', None)
    skipped = torch.tensor(0 if count is None else count(epoch), device=run.accelerator.device)
    return int(run.accelerator.reduce(skipped).item())


def epoch_losses(run: Run) -> dict[str, float]:
    """The mean losses of an epoch; every process must call it."""
    assert run.place.meter is not None
    return run.place.meter.reduce()
