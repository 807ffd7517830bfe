"""The command line: flags, configs and checks. Importing it imports no torch."""

from timm_synermix.cli.kwargs import synermix_loader_kwargs, synermix_task_kwargs
from timm_synermix.cli.synermix_args import add_manifold_mixup_args, add_synermix_args

__all__ = ['add_manifold_mixup_args', 'add_synermix_args', 'synermix_loader_kwargs', 'synermix_task_kwargs']
