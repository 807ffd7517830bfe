"""SynerMix for timm: intra-class feature mixup beside the inter-class mixing of images."""

from timm_synermix.cli import add_manifold_mixup_args, add_synermix_args, synermix_loader_kwargs, synermix_task_kwargs
from timm_synermix.data import TwoViewTransform, create_synermix_loader, dataset_targets
from timm_synermix.features import FeatureHook
from timm_synermix.functional import IGNORE_INDEX, class_rows, intra_class_mix, intra_class_weight, synermix_loss
from timm_synermix.manifold import ManifoldMixup
from timm_synermix.mixup import Mixer, create_mixup
from timm_synermix.sampler import SupplementBatchSampler
from timm_synermix.task import SynerMixTask

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
