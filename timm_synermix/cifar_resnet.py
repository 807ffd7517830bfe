"""The documented name of `timm_synermix.models.resnet_cifar`: importing it registers the models with timm."""

from timm_synermix.models.resnet_cifar import *  # noqa: F403
