"""What the flags become: arguments of the functions and classes that they are for."""

from __future__ import annotations

import argparse
from typing import Any

from timm_synermix.utils.layout import num_clean_classes


def synermix_loader_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `create_synermix_loader` that the SynerMix flags set."""
    return dict(
        singletons=args.synermix_singletons,
        supplement=args.synermix_supplement,
        batch=args.synermix_batch,
        fraction=args.synermix_fraction,
        seed=args.seed,
    )


def synermix_task_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `SynerMixTask` that the SynerMix flags set."""
    gather = args.synermix_gather and getattr(args, 'distributed', False)
    return dict(
        beta=args.synermix_beta,
        mix=args.synermix_mix,
        splits=max(1, getattr(args, 'aug_splits', 0)),
        num_mixed=args.synermix_num_mixed,
        bank=args.synermix_singletons == 'bank',
        fraction=args.synermix_fraction,
        gather_rows=largest_batch(args) if gather else 0,
        seed=args.seed,
        rank=0 if gather else getattr(args, 'rank', 0),
    )


def largest_batch(args: argparse.Namespace) -> int:
    """The most images with a clean view that a batch of `create_synermix_loader` can hold."""
    size = max([args.batch_size, *(getattr(args, 'train_batch_sizes', None) or ())])
    if args.synermix_fraction < 1:
        return 2 * num_clean_classes(args.synermix_fraction, size + 2)
    if args.synermix_batch == 'fixed' or args.synermix_singletons != 'supplement':
        return size + 2  # an odd one is made even
    return 2 * size + 2  # each with a partner


def mixup_active(args: argparse.Namespace) -> bool:
    """Whether the flags ask for MixUp or CutMix of images."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def mixed_in_collate(args: argparse.Namespace) -> bool:
    """Whether images are mixed by timm's collate function, in the workers."""
    return mixup_active(args) and not (args.synermix or args.regmixup or args.no_prefetcher or args.on_device)


def mixup_kwargs(args: argparse.Namespace, num_classes: int) -> dict[str, Any]:
    """The arguments of timm's Mixup that the flags set."""
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
        multi_label=args.task == 'multilabel',
    )
