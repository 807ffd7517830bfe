"""A training run: its parts, and what a checkpoint keeps of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor

from timm_synermix.data.dataset import UnreadableImage
from timm_synermix.engine.checkpoint import RunSaver
from timm_synermix.engine.loss_guard import LossGuard
from timm_synermix.engine.progress import LossMeter
from timm_synermix.engine.resume import generator_states, rank_state, schedule_state
from timm_synermix.engine.trackers import RunTrackers
from timm_synermix.features import FeatureHook
from timm_synermix.task.mixup import Mixer
from timm_synermix.utils.distributed import HostGroup
from timm_synermix.utils.signals import Stopped, StopRequest

if TYPE_CHECKING:
    from timm_synermix.metrics import Cohesion


@dataclass
class Trained:
    """What is trained, and by what."""

    task: Any
    optimizer: Any  # Accelerate's, around timm's
    scheduler: Any = None
    model: Any = None  # bare
    mixup_fn: Mixer | None = None  # the inter-class mixing, but for that in timm's collate function

    @property
    def mix_batch(self) -> Mixer | None:
        """The mixing that is left to the loop, by a task that does not mix by itself."""
        return None if hasattr(self.task, 'mixup_fn') else self.mixup_fn

    def lr(self) -> float:
        """Mean learning rate of the parameter groups."""
        return sum(group['lr'] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)


@dataclass
class Loaders:
    """Where the images come from."""

    train: Any
    eval: Any = None
    data_config: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    class_to_idx: dict[str, int] = field(default_factory=dict)  # of training; empty if its classes have no names
    create_without_clean_views: Callable[[], Any] | None = None  # for --synermix-off-epoch


@dataclass
class Place:
    """Where in the run it is: where it starts and ends, and how far it is in its epoch."""

    start_epoch: int = 0
    start_batch: int = 0  # of the first epoch, if the run goes on in the middle of it
    stop_epoch: int = 0
    num_epochs: int = 0  # of the schedule; --stop-epoch may end before
    updates_per_epoch: int = 0
    resumed_losses: dict[str, Any] | None = None  # the sums of that first epoch
    meter: LossMeter | None = None  # of the epoch
    done_batches: int = 0  # of the epoch, up to the last update
    last_input: Tensor | None = None  # for --save-images

    def first_batch(self, epoch: int) -> int:
        """The batch that an epoch begins with."""
        return self.start_batch if epoch == self.start_epoch else 0

    def begin_epoch(self, epoch: int, accelerator: Accelerator) -> None:
        """Start to count the losses of an epoch, or go on where the checkpoint was."""
        self.meter = LossMeter(accelerator)
        self.done_batches = self.first_batch(epoch)
        if self.done_batches and self.resumed_losses is not None:
            self.meter.load_state_dict(self.resumed_losses)


class ReportedEpoch(NamedTuple):
    """An evaluation of a training run, for its report.

    Attributes:
        epoch: Index of the epoch.
        metrics: Accuracy and cohesion.
        cohesion: With the features.
    """

    epoch: int
    metrics: dict[str, float]
    cohesion: Cohesion


@dataclass
class Evaluation:
    """What the evaluations measure, and what they have found."""

    metric: str = 'loss'  # that ranks checkpoints
    hook: FeatureHook | None = None  # for --cohesion, on the model that is reported
    cohesion_device: Any = None  # where it is computed
    cohesion: Cohesion | None = None  # of the last evaluation
    results: list[dict[str, Any]] = field(default_factory=list)
    reported: ReportedEpoch | None = None  # what the report shows; of the main process


@dataclass
class Keeper:
    """What keeps a run: from bad numbers, from signals, on the disk and in the trackers."""

    guard: LossGuard = field(default_factory=lambda: LossGuard([], HostGroup()))
    stop: StopRequest = field(default_factory=lambda: StopRequest(HostGroup()))
    saver: RunSaver | None = None  # of the main process
    trackers: RunTrackers | None = None  # of the main process


@dataclass
class Run:
    """A training run.

    Attributes:
        args: The flags, with what the run has made of some of them: learning rate, device, processes, classes, name.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    trained: Trained
    loaders: Loaders
    place: Place = field(default_factory=Place)
    evaluation: Evaluation = field(default_factory=Evaluation)
    keeper: Keeper = field(default_factory=Keeper)


def progress_state(run: Run, epoch: int, batch: int) -> dict[str, Any]:
    """What a run needs, beside timm's checkpoint, to go on with a batch of an epoch; every process must call it."""
    own = rank_state(run.trained.task, run.args.rank, run.args.world_size) if run.args.world_size > 1 else {}
    if batch and run.place.meter is not None:
        own['losses'] = run.place.meter.state_dict()
    return {
        'epoch': epoch,
        'batch': batch,
        'num_batches': len(run.loaders.train),
        'ranks': run.keeper.stop.group.gather_to_first(own),
        'schedule': schedule_state(run.trained.scheduler),
        'num_bad_steps': run.keeper.guard.num_bad_steps,
        'generators': generator_states(run.trained.task, run.trained.optimizer.optimizer),
        'class_to_idx': run.loaders.class_to_idx,
    }


def save_in_epoch(run: Run, epoch: int, batch: int) -> None:
    """Save where the run is in the middle of an epoch; every process must call it."""
    run.keeper.guard.accepts(epoch, always=True)  # nothing bad is saved
    run.keeper.guard.check_weights(run.trained.task, epoch)
    state = progress_state(run, epoch, batch)
    if run.keeper.saver is not None:
        run.keeper.saver.run_state = state
        run.keeper.saver.save_recovery(epoch, batch_idx=-(-batch // run.args.grad_accum_steps) - 1)


@contextmanager
def saved_if_stopped(run: Run, epoch: int) -> Iterator[None]:
    """If a signal or an image stops the block, save where the run is: after the last update that was made."""
    try:
        yield
    except (Stopped, UnreadableImage) as reason:
        done, accum_steps = run.place.done_batches, run.args.grad_accum_steps
        exact = isinstance(reason, Stopped) or (  # all processes are here, and nothing has been computed since
            run.args.world_size == 1 and (accum_steps == 1 or done == len(run.loaders.train))
        )
        if exact and done:
            save_in_epoch(run, epoch, done)
        raise
