"""Images in two views: samplers, data sets, transforms and loaders."""

from timm_synermix.data.classes import dataset_targets
from timm_synermix.data.loader import create_synermix_loader
from timm_synermix.data.sampler import SupplementBatchSampler
from timm_synermix.data.transforms import TwoViewTransform

__all__ = ['SupplementBatchSampler', 'TwoViewTransform', 'create_synermix_loader', 'dataset_targets']
