"""ResNets for images of 32 pixels, as models of timm: importing this module registers them."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

__all__ = ['CifarResNet']  # timm adds the models


class CifarResNet(ResNet):
    """timm's ResNet with a 3x3 convolution of stride 1 as its stem, and no max-pool.

    Parameters have the names of timm's ResNet, and all but `conv1.weight` its shapes.

    Args:
        args, kwargs: See `timm.models.resnet.ResNet`. The stem is this one, whatever they say of it.

    Source: the network of SynerMix's code for CIFAR-100 and mini-ImageNet.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stem = self.get_submodule('conv1')
        in_chans = next(layer.in_channels for layer in stem.modules() if isinstance(layer, nn.Conv2d))
        following = self.layer1[0].conv1
        kind = dict(device=following.weight.device, dtype=following.weight.dtype)
        self.conv1 = nn.Conv2d(in_chans, following.in_channels, 3, padding=1, bias=False, **kind)
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')  # as timm's convolutions
        self.maxpool = nn.Identity()
        for info in self.feature_info:
            info['reduction'] //= 2 if info['module'] == 'act1' else 4


default_cfgs = generate_default_cfgs(
    {
        f'resnet{depth}_cifar.untrained': dict(
            input_size=(3, 32, 32),
            pool_size=(4, 4),
            crop_pct=1.0,
            interpolation='bilinear',
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            num_classes=100,
            first_conv='conv1',
            classifier='fc',
        )
        for depth in (18, 34, 50, 101)
    }
)


def _create(name: str, pretrained: bool, block: Any, layers: tuple[int, ...], kwargs: dict[str, Any]) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, name, pretrained, **{'block': block, 'layers': layers, **kwargs})


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 for images of 32 pixels."""
    return _create('resnet18_cifar', pretrained, BasicBlock, (2, 2, 2, 2), kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-34 for images of 32 pixels."""
    return _create('resnet34_cifar', pretrained, BasicBlock, (3, 4, 6, 3), kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-50 for images of 32 pixels."""
    return _create('resnet50_cifar', pretrained, Bottleneck, (3, 4, 6, 3), kwargs)


@register_model
def resnet101_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-101 for images of 32 pixels."""
    return _create('resnet101_cifar', pretrained, Bottleneck, (3, 4, 23, 3), kwargs)
