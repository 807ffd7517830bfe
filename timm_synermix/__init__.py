"""SynerMix for timm: intra-class feature mixup beside the inter-class mixing of images."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = '0.1.0'

if TYPE_CHECKING:
    from timm_synermix.cli import (
        add_manifold_mixup_args,
        add_synermix_args,
        synermix_loader_kwargs,
        synermix_task_kwargs,
    )
    from timm_synermix.data import SupplementBatchSampler, TwoViewTransform, create_synermix_loader, dataset_targets
    from timm_synermix.features import FeatureHook
    from timm_synermix.functional import IGNORE_INDEX, class_rows, intra_class_mix, intra_class_weight, synermix_loss
    from timm_synermix.metrics import (
        CDNV,
        NC1,
        CalinskiHarabasz,
        ClassTable,
        CosineCohesion,
        DaviesBouldin,
        FisherRatio,
        InterClassDistance,
        IntraClassDistance,
        MinInterClassDistance,
        Silhouette,
        cohesion_metrics,
    )
    from timm_synermix.task import ManifoldMixup, Mixer, RegMixup, SynerMixForward, SynerMixTask, create_mixup

# module -> its names, imported when one is first asked for: flags should not have to wait for torch and timm
_NAMES = {
    'cli': ('add_manifold_mixup_args', 'add_synermix_args', 'synermix_loader_kwargs', 'synermix_task_kwargs'),
    'data': ('SupplementBatchSampler', 'TwoViewTransform', 'create_synermix_loader', 'dataset_targets'),
    'features': ('FeatureHook',),
    'functional': ('IGNORE_INDEX', 'class_rows', 'intra_class_mix', 'intra_class_weight', 'synermix_loss'),
    'metrics': (
        'CDNV',
        'NC1',
        'CalinskiHarabasz',
        'ClassTable',
        'CosineCohesion',
        'DaviesBouldin',
        'FisherRatio',
        'InterClassDistance',
        'IntraClassDistance',
        'MinInterClassDistance',
        'Silhouette',
        'cohesion_metrics',
    ),
    'task': ('ManifoldMixup', 'Mixer', 'RegMixup', 'SynerMixForward', 'SynerMixTask', 'create_mixup'),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return importlib.import_module(f'{__name__}.{name}')
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
