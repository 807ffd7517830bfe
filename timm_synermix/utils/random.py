"""Random numbers that depend on what they are drawn for, and on nothing that was drawn before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*key: int | str) -> int:
    """A seed in `[0, 2**63)` for a key, as `('step', seed, rank, epoch, batch)`; other keys have unrelated ones."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def seed_everything(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators of Python, numpy and torch, of the CPU and of a GPU if device is one."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed asks every backend there is, which takes longer than to augment a small image
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == 'cuda':
        torch.cuda.manual_seed(seed)


@contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Leave the global generators as they were, whatever the block draws."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state(device) if device is not None and device.type == 'cuda' else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpu is not None and device is not None:
            torch.cuda.set_rng_state(on_gpu, device)
