"""Models from the flags, and ResNets for small images, which importing this registers with timm."""

from timm_synermix.models import resnet_cifar  # noqa: F401
from timm_synermix.models.factory import build_classifier

__all__ = ['build_classifier']
