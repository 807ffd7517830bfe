"""All that is used of timm's private parts. A test says which of them another version of timm has changed."""

from __future__ import annotations

from typing import Any

from timm.data.dataset_factory import _search_split as search_split
from timm.data.loader import _worker_init as worker_init
from timm.models._hub import generate_readme, save_config_for_hf
from timm.utils import CheckpointSaver

__all__ = [
    'SAVER_METHODS',
    'CheckpointSaver',
    'base_optimizer',
    'generate_readme',
    'rounding_generator',
    'save_config_for_hf',
    'search_split',
    'worker_init',
]

# The private methods of timm's CheckpointSaver that RunSaver calls or replaces.
SAVER_METHODS = (
    '_checkpoint_path',
    '_cleanup_checkpoints',
    '_duplicate',
    '_replace',
    '_save',
    '_track_checkpoint',
)


def base_optimizer(optimizer: Any) -> Any:
    """What a Lookahead is around; any other optimizer itself."""
    return getattr(optimizer, '_base_optimizer', optimizer)


def rounding_generator(average: Any) -> Any:
    """The generator by which a moving average of bfloat16 weights rounds; None of another module."""
    return getattr(average, '_sr_generator', None)
