"""All that is used of timm's private parts. A test says which of them another version of timm has changed."""

from __future__ import annotations

from timm.data.dataset_factory import _search_split as search_split
from timm.data.loader import _worker_init as worker_init
from timm.utils import CheckpointSaver

__all__ = ['SAVER_METHODS', 'CheckpointSaver', 'search_split', 'worker_init']

# The private methods of timm's CheckpointSaver that RunSaver calls or replaces.
SAVER_METHODS = (
    '_checkpoint_path',
    '_cleanup_checkpoints',
    '_duplicate',
    '_replace',
    '_save',
    '_track_checkpoint',
)
