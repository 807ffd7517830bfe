"""The training task: both losses of SynerMix, and the mixers of its inter-class part."""

from timm_synermix.task.forward import SynerMixForward
from timm_synermix.task.manifold_mixup import ManifoldMixup
from timm_synermix.task.mixup import Mixer, RegMixup, create_mixup
from timm_synermix.task.synermix import SynerMixTask

__all__ = ['ManifoldMixup', 'Mixer', 'RegMixup', 'SynerMixForward', 'SynerMixTask', 'create_mixup']
