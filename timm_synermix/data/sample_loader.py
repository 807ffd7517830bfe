"""A loader whose batches depend on seed, epoch and data alone: not on workers, nor on where in an epoch it starts."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader

from timm_synermix.data.draws import DrawSampler
from timm_synermix.data.sample_dataset import SampleDataset
from timm_synermix.utils.layout import Layout
from timm_synermix.utils.random import random_state_kept, seed_everything, seed_of
from timm_synermix.utils.signals import STOP_SIGNALS


class SampleLoader(DataLoader):
    """A DataLoader of a `SampleDataset` that can start in the middle of an epoch.

    Its batches are a function of (seed, epoch): the same for any number of workers, from whatever batch it starts.
    Iterating leaves the global generators as they are. Call `batch_sampler.set_epoch` before each epoch.

    Args:
        dataset, seed, targets, strict: See `SampleDataset`.
        batch_sampler: Yields lists of what the data set takes; has `set_epoch`, or its sampler has.
        rank, world_size: This process, and how many there are.
        kwargs: Other arguments of DataLoader.
    """

    dataset: SampleDataset
    batch_sampler: DrawSampler

    def __init__(
        self,
        dataset: Any,
        batch_sampler: Any,
        *,
        seed: int = 42,
        targets: np.ndarray | None = None,
        strict: bool = False,
        rank: int = 0,
        world_size: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            SampleDataset(dataset, seed, targets, strict, -(-len(dataset) // world_size)),
            batch_sampler=DrawSampler(batch_sampler, rank),
            **kwargs,
        )
        self.seed = seed
        shield(self)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with random_state_kept():  # a DataLoader draws a seed for its workers, which nothing here depends on
            batches = super().__iter__()
        while True:
            with nullcontext() if self.num_workers else random_state_kept():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch


def shield(loader: DataLoader) -> DataLoader:
    """Make a loader's workers stop when the main process stops, and give the loader back. See `shielded`."""
    loader.worker_init_fn = partial(shielded, loader.worker_init_fn)
    return loader


def shielded(init: Callable[[int], None] | None, worker_id: int) -> None:
    """Start a worker that stops when the main process stops, not when a signal is sent to all processes of a run.

    The main process may be about to save where it is, and would be torn away by the loss of a worker.
    """
    gc.freeze()  # its rounds would copy every page that is shared with the main process
    for signum in set(STOP_SIGNALS) - {signal.SIGTERM}:
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()
    elif hasattr(os, 'setsid'):  # macOS: signals do not tell who sent them, but to a group of its own nobody sends any
        os.setsid()
    if init is not None:
        init(worker_id)


def _end_by_parent() -> None:
    main = multiprocessing.parent_process()  # not os.getppid(): a server may have forked the worker for it
    assert main is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
        pass
    os._exit(0)


class SamplePrefetchLoader(PrefetchLoader):
    """timm's PrefetchLoader of a `SampleLoader`, whose random erasing is a function of (seed, epoch, batch).

    Args:
        loader: The loader, or one of a stream, whose erasing has no seed.
        erase: Erases in place. None for not.
        layout: Where the clean views of a batch are, which stay as they are. None if there are none.
        kwargs: Other arguments of PrefetchLoader.
    """

    def __init__(self, loader: DataLoader, erase: RandomErasing | None, layout: Layout | None, **kwargs: Any) -> None:
        super().__init__(loader, **kwargs)
        self.erase = erase
        self.layout = layout

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draws = self.batch_sampler
        known = isinstance(draws, DrawSampler)  # a stream is erased as it comes
        for number, (input, target) in enumerate(super().__iter__(), draws.first_batch if known else 0):
            if self.erase is not None:
                with random_state_kept(self.device) if known else nullcontext():
                    if known:
                        key = ('erase', self.loader.seed, draws.rank, draws.epoch, number)
                        seed_everything(seed_of(*key), self.device)
                    self.erase(input[self.layout.num_clean(len(input), len(target)) if self.layout else 0 :])
            yield input, target
