"""SynerMix for timm: intra-class feature mixup beside the inter-class mixing of images."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_synermix.cli import (
        add_manifold_mixup_args,
        add_synermix_args,
        synermix_loader_kwargs,
        synermix_task_kwargs,
    )
    from timm_synermix.data import create_synermix_loader, dataset_targets
    from timm_synermix.features import FeatureHook
    from timm_synermix.functional import IGNORE_INDEX, class_rows, intra_class_mix, intra_class_weight, synermix_loss
    from timm_synermix.manifold import ManifoldMixup
    from timm_synermix.mixup import Mixer, create_mixup
    from timm_synermix.sampler import SupplementBatchSampler
    from timm_synermix.task import SynerMixTask
    from timm_synermix.views import TwoViewTransform

# name -> module that is imported when the name is first asked for: flags should not have to wait for torch and timm
_MODULES = {
    'IGNORE_INDEX': 'functional',
    'FeatureHook': 'features',
    'ManifoldMixup': 'manifold',
    'Mixer': 'mixup',
    'SupplementBatchSampler': 'sampler',
    'SynerMixTask': 'task',
    'TwoViewTransform': 'views',
    'add_manifold_mixup_args': 'cli',
    'add_synermix_args': 'cli',
    'class_rows': 'functional',
    'create_mixup': 'mixup',
    'create_synermix_loader': 'data',
    'dataset_targets': 'data',
    'intra_class_mix': 'functional',
    'intra_class_weight': 'functional',
    'synermix_loader_kwargs': 'cli',
    'synermix_loss': 'functional',
    'synermix_task_kwargs': 'cli',
}
__all__ = [
    'IGNORE_INDEX',
    'FeatureHook',
    'ManifoldMixup',
    'Mixer',
    'SupplementBatchSampler',
    'SynerMixTask',
    'TwoViewTransform',
    'add_manifold_mixup_args',
    'add_synermix_args',
    'class_rows',
    'create_mixup',
    'create_synermix_loader',
    'dataset_targets',
    'intra_class_mix',
    'intra_class_weight',
    'synermix_loader_kwargs',
    'synermix_loss',
    'synermix_task_kwargs',
]


def __getattr__(name: str) -> Any:
    if name in _MODULES.values():
        return importlib.import_module(f'{__name__}.{name}')
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
