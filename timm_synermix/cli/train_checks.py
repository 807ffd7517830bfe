"""What the flags of train.py must not be together, found before any work."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

from timm_synermix.cli.checks import check_amp, check_compile, check_dataset, naming
from timm_synermix.cli.kwargs import mixup_active
from timm_synermix.cli.loss import check_loss, check_task
from timm_synermix.cli.rules import check_values, flag
from timm_synermix.utils.checks import BATCH_SIZE, check_bank, check_fixed, check_fraction, check_unmixed

_logger = logging.getLogger(__name__)


def check_args(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other or are out of range, before anything is built or written.

    Raises:
        ValueError: Names the flag, the rule and the value.
    """
    if args.naflex_loader:
        raise ValueError('--naflex-loader is not supported by this script; use the one of timm')
    check_values(args)
    check_amp(args)
    check_dataset(args)
    if mixup_active(args) and args.batch_size % 2:
        raise ValueError(f'--batch-size must be even with --mixup or --cutmix, got {args.batch_size}')
    if args.resume == 'auto' and not args.experiment:
        raise ValueError('--resume auto needs --experiment, the folder to resume in')
    if args.experiment and (os.path.isabs(args.experiment) or os.path.normpath(args.experiment).startswith('.')):
        raise ValueError(f'--experiment must name a folder inside of --output, got {args.experiment}')
    if args.torchscript and args.torchcompile:
        raise ValueError('--torchscript and --torchcompile exclude each other')
    if args.split_bn and args.aug_splits < 2 and not args.resplit:
        raise ValueError(f'--split-bn needs --aug-splits of 2 or more, or --resplit, got {args.aug_splits}')
    if args.aug_splits == 1:
        raise ValueError('--aug-splits must be 0, or 2 and more, got 1')
    if args.freeze and not (args.pretrained or args.pretrained_path or args.initial_checkpoint or args.resume):
        _logger.warning('--freeze without weights trains a classifier of random features: see --pretrained-path.')
    _check_small_image_args(args)
    if args.regmixup:
        half, several = args.mixup_mode == 'half', args.task == 'multilabel'
        _exclude('--regmixup', {'--mixup-mode half': half, '--task multilabel': several})
        if not mixup_active(args):
            raise ValueError('--regmixup needs --mixup or --cutmix')
    if args.manifold_mixup:
        _check_manifold_mixup_args(args)
    if args.synermix:
        _check_synermix_args(args)
    _check_cohesion_args(args)
    check_task(args)
    _check_augmentation(args)
    check_loss(args)  # from here on timm and torch are asked, which take seconds to import
    _check_policy(args)
    check_compile(args)


def _check_synermix_args(args: argparse.Namespace) -> None:
    if args.torchscript:
        raise ValueError('--synermix and --torchscript cannot be used together')
    if args.task == 'multilabel':
        _check_multilabel_args(args)
    sizes = args.train_img_sizes or ()
    if args.synermix_batch == 'fixed' and sizes:
        raise ValueError('--synermix-batch fixed and --train-img-sizes cannot be used together')
    if args.train_batch_sizes and len(set(sizes)) < len(sizes):
        raise ValueError(f'--train-img-sizes must differ from each other with --synermix, got {sizes}')
    BATCH_SIZE.check('--batch-size with --synermix', args.batch_size)
    check_synermix_flags(args)
    if args.synermix_beta == 1:  # there is no augmented forward
        _exclude('--synermix-beta 1', {'--kd-model-name': args.kd_model_name, '--split-bn': args.split_bn})


def check_synermix_flags(args: argparse.Namespace) -> None:
    """Refuse flags of SynerMix that contradict each other; for any script that has them.

    Raises:
        ValueError: Names the flags.
    """
    fixed, clean = args.synermix_batch == 'fixed', args.synermix_supplement == 'clean'
    bank = args.synermix_singletons == 'bank'
    check_fixed(fixed, clean, ('--synermix-batch fixed', '--synermix-supplement clean'))
    check_fraction(
        args.synermix_fraction,
        clean,
        getattr(args, 'task', '') == 'multilabel',
        ('--synermix-fraction', '--synermix-supplement clean', '--task multilabel'),
    )
    check_bank(bank, args.synermix_gather, ('--synermix-singletons bank', '--synermix-gather'))
    if bank and getattr(args, 'aug_repeats', 0):
        raise ValueError('--synermix-singletons bank and --aug-repeats cannot be used together: copies are no partners')
    others = {
        '--synermix-num-mixed': args.synermix_num_mixed,
        '--synermix-gather': args.synermix_gather,
        '--synermix-singletons bank': bank,
    }
    check_unmixed(args.synermix_mix, others, '--synermix-mix')
    if clean and args.synermix_singletons != 'supplement':
        _logger.warning('--synermix-supplement has no effect with --synermix-singletons %s.', args.synermix_singletons)


def _check_multilabel_args(args: argparse.Namespace) -> None:
    others = {
        '--synermix-batch fixed': args.synermix_batch == 'fixed',
        '--synermix-singletons bank': args.synermix_singletons == 'bank',
        '--synermix-gather': args.synermix_gather,
    }
    _exclude('--task multilabel', others)


def _check_cohesion_args(args: argparse.Namespace) -> None:
    if args.report and not (args.cohesion and args.val_split):
        raise ValueError('--report shows the cohesion of validation images, and needs --val-split and no --no-cohesion')
    for other, value in {'--torchscript': args.torchscript, '--task multilabel': args.task == 'multilabel'}.items():
        if args.cohesion and value:
            raise ValueError(f'{"--report" if args.report else "--cohesion"} and {other} cannot be used together')


def _check_manifold_mixup_args(args: argparse.Namespace) -> None:
    _exclude(
        '--manifold-mixup',
        {
            '--task multilabel': args.task == 'multilabel',
            '--torchscript': args.torchscript,
            '--jsd-loss': args.loss == 'jsd',
            '--aug-splits': args.aug_splits,
            '--split-bn': args.split_bn,
            '--mixup or --cutmix': mixup_active(args),
            '--kd-model-name': args.kd_model_name,
            f'--mixup-mode {args.mixup_mode}': args.mixup_mode != 'batch',
        },
    )


def _check_augmentation(args: argparse.Namespace) -> None:
    if mixup_active(args) and args.aug_splits:
        raise ValueError('--aug-splits cannot be used together with --mixup or --cutmix')
    if args.aa and not args.no_aug and args.train_interpolation in ('box', 'hamming', 'lanczos'):
        others = 'random, nearest, bilinear or bicubic'
        raise ValueError(
            f'--train-interpolation must be {others} with --aa, whose rotations have no other, got '
            f'{args.train_interpolation}'
        )
    if args.aug_splits and args.no_prefetcher:
        raise ValueError('--aug-splits and --no-prefetcher cannot be used together')
    for name in ('train_batch_sizes', 'train_size_probs'):
        number = len(args.train_img_sizes or ())
        if getattr(args, name) and len(getattr(args, name)) != number:
            raise ValueError(
                f'{flag(name)} must have a value for each of the {number} --train-img-sizes, got {getattr(args, name)}'
            )


def _check_policy(args: argparse.Namespace) -> None:
    """Raise ValueError for a policy that timm does not know."""
    if args.aa and not args.no_aug:
        from timm.data import create_transform  # slow to import

        with naming(f'--aa {args.aa}'):
            create_transform(32, is_training=True, auto_augment=args.aa)


def _check_small_image_args(args: argparse.Namespace) -> None:
    for name in ('crop_padding', 'cutout'):
        others = {'--aug-splits': args.aug_splits, '--train-img-sizes': args.train_img_sizes, '--no-aug': args.no_aug}
        if name == 'crop_padding':
            others['--train-crop-mode'] = args.train_crop_mode not in (None, 'rrc')
        for other, value in others.items():
            if getattr(args, name) and value:
                raise ValueError(f'{flag(name)} and {other} cannot be used together')
    for name in ('in_memory', 'on_device'):
        if getattr(args, name) and args.dataset.lower().startswith(('wds/', 'tfds/', 'hfids/')):
            raise ValueError(f'{flag(name)} needs a data set that is no stream, got --dataset {args.dataset}')
    if args.on_device:
        _check_on_device_args(args)


def _check_on_device_args(args: argparse.Namespace) -> None:
    names = ['no_prefetcher', 'aug_splits', 'train_img_sizes']
    if not args.no_aug:  # which overrides these
        names += ['vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'aa', 'reprob']
    others = [f'{flag(name)} {value}' for name in names if (value := getattr(args, name))]
    if others:
        raise ValueError(
            f'--on-device augments by --crop-padding, --hflip and --cutout alone: set to 0, or leave out, '
            f'{", ".join(others)}'
        )
    if not (args.crop_padding or args.no_aug):
        raise ValueError('--on-device has no random resized crop, and needs --crop-padding or --no-aug')


def _exclude(flag: str, others: dict[str, Any]) -> None:
    """Refuse others that are set beside a flag."""
    for other, value in others.items():
        if value:
            raise ValueError(f'{flag} and {other} cannot be used together')
