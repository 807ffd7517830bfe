"""Command line of train.py: the SynerMix flags, YAML configs, and checks before any work starts."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import yaml

from timm_synermix.cli.checks import TrainParser, check_amp, usage_errors
from timm_synermix.cli.config import load_config
from timm_synermix.cli.rules import RULES, check_values, flag
from timm_synermix.cli.timm_args import add_timm_args
from timm_synermix.utils.checks import (
    BATCH,
    BATCH_SIZE,
    SINGLETONS,
    SUPPLEMENT,
    check_bank,
    check_fixed,
    check_interval,
)

_logger = logging.getLogger(__name__)


def add_synermix_args(parser: argparse.ArgumentParser) -> None:
    """Add the SynerMix flags to a training script's parser."""
    group = parser.add_argument_group('SynerMix')
    group.add_argument(
        '--synermix', action='store_true', help='add the intra-class mixup of features: L = beta L_intra + (1-beta) L'
    )
    group.add_argument(
        '--synermix-beta',
        type=float,
        help='weight of the intra-class loss, in [0, 1]; default: 0.1 with MixUp or CutMix, 0.5 without',
    )
    group.add_argument(
        '--synermix-num-mixed', type=int, default=0, metavar='P', help='images interpolated per class, 0 for all'
    )
    group.add_argument(
        '--synermix-singletons',
        default='supplement',
        choices=SINGLETONS,
        help='a class with one image in a batch gets a second one, is left alone, or is mixed with a recent feature of '
        'its class',
    )
    group.add_argument(
        '--synermix-supplement',
        default='both',
        choices=SUPPLEMENT,
        help='second images take part in both losses, or in the intra-class loss alone',
    )
    group.add_argument(
        '--synermix-batch',
        default='grow',
        choices=BATCH,
        help='second images come on top of --batch-size, or within: all batches have one size, and cost no more',
    )
    group.add_argument(
        '--synermix-gather',
        action='store_true',
        help='mix the classes of the batches of all processes together, not those of each by itself',
    )
    group.add_argument(
        '--synermix-forward',
        default='separate',
        choices=['separate', 'fused'],
        help='pass clean and augmented images through the model one after the other or as one batch',
    )
    group.add_argument(
        '--synermix-interval',
        type=int,
        default=1,
        metavar='K',
        help='compute the intra-class loss in every K-th update alone, with K times the weight: at a fraction of the '
        'cost, a departure from the paper',
    )
    group.add_argument(
        '--synermix-off-epoch',
        type=int,
        default=0,
        metavar='N',
        help='train without SynerMix from this epoch on, 0 for never',
    )


def add_manifold_mixup_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of Manifold MixUp to a training script's parser."""
    group = parser.add_argument_group('Manifold MixUp')
    group.add_argument(
        '--manifold-mixup',
        type=float,
        default=0.0,
        metavar='ALPHA',
        help='mix hidden activations instead of images, lam ~ Beta(ALPHA, ALPHA); 0 for not',
    )
    group.add_argument(
        '--manifold-mixup-layers',
        nargs='+',
        metavar='LAYER',
        help="where: 'input', names of the model's modules, or indices into its feature_info (0 is the input); "
        'default: the input and two early stages',
    )


def add_finetuning_args(parser: argparse.ArgumentParser) -> None:
    """Add the flag of training a classifier alone to a training script's parser."""
    group = parser.add_argument_group('Fine-tuning')
    group.add_argument(
        '--freeze', action='store_true', help='train the classifier alone, on the features of the model as it is'
    )


def add_small_image_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags for small images, such as CIFAR's, to a training script's parser."""
    group = parser.add_argument_group('Small images')
    group.add_argument(
        '--crop-padding',
        type=int,
        default=0,
        metavar='N',
        help='crop the image, padded by N black pixels at each side, at random, instead of a random resized crop',
    )
    group.add_argument('--cutout', type=int, default=0, metavar='L', help='blacken a square of L pixels; 0 for none')
    group.add_argument('--in-memory', action='store_true', help='decode all images once, and keep them in memory')


def add_reliability_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags for bad data and bad numbers to a training script's parser."""
    group = parser.add_argument_group('What goes wrong')
    group.add_argument(
        '--strict-data', action='store_true', help='stop at the first image that cannot be read, instead of skipping it'
    )
    group.add_argument(
        '--max-bad-steps',
        type=int,
        default=0,
        metavar='N',
        help='skip up to this many updates of a run whose loss is not finite, then stop',
    )


def synermix_loader_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `create_synermix_loader` that the SynerMix flags set."""
    return dict(
        singletons=args.synermix_singletons,
        supplement=args.synermix_supplement,
        batch=args.synermix_batch,
        interval=args.synermix_interval,
        batches_per_update=getattr(args, 'grad_accum_steps', 1),
        seed=args.seed,
    )


def synermix_task_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `SynerMixTask` that the SynerMix flags set."""
    gather = args.synermix_gather and getattr(args, 'distributed', False)
    return dict(
        beta=args.synermix_beta,
        num_mixed=args.synermix_num_mixed,
        fused=args.synermix_forward == 'fused',
        bank=args.synermix_singletons == 'bank',
        interval=args.synermix_interval,
        gather_rows=largest_batch(args) if gather else 0,
        seed=args.seed + (0 if gather else getattr(args, 'rank', 0)),
    )


def largest_batch(args: argparse.Namespace) -> int:
    """The most images a batch of `create_synermix_loader` can hold."""
    if args.synermix_batch == 'fixed' or args.synermix_singletons != 'supplement':
        return args.batch_size + 2  # an odd one is made even
    return 2 * args.batch_size + 2  # each with a partner


def create_parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of --config alone, and the parser of everything else."""
    config_parser = TrainParser(add_help=False)
    config_parser.add_argument('-c', '--config', default='', type=str, help='YAML file of defaults for the other flags')
    parser = TrainParser(
        description='Train an image classifier with timm, and with SynerMix.',
        parents=[config_parser],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_timm_args(parser)
    add_synermix_args(parser)
    add_manifold_mixup_args(parser)
    add_finetuning_args(parser)
    add_small_image_args(parser)
    add_reliability_args(parser)
    group = parser.add_argument_group('What to look at')
    group.add_argument(
        '--cohesion',
        action=argparse.BooleanOptionalAction,
        help='measure in each evaluation how tight and how far apart the classes are; default: with --synermix',
    )
    group.add_argument(
        '--log-with', nargs='+', metavar='TRACKER', help='trackers of Accelerate: wandb, tensorboard, trackio, ...'
    )
    group.add_argument('--report', action='store_true', help='write a page of curves and pictures at the end')
    return config_parser, parser


def parse_args(
    config_parser: argparse.ArgumentParser, parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> tuple[argparse.Namespace, str]:
    """Parse the command line over the YAML config it may name; bad values exit with code 2.

    Returns:
        The arguments, and their YAML text for `args.yaml`.
    """
    config_args, remaining = config_parser.parse_known_args(argv)
    try:
        config = load_config(parser, config_args.config) if config_args.config else {}
    except ValueError as error:
        parser.error(f'--config: {error}')
    args = parser.parse_args(remaining, namespace=argparse.Namespace(**config))
    args.config = config_args.config
    args.data = args.data or config.get('data')  # argparse puts an absent positional back to its default
    with usage_errors(parser):
        check_args(args)
    _warn_of_no_effect(parser, args)
    return args, yaml.safe_dump(args.__dict__, default_flow_style=False)


def check_args(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other or are out of range, before anything is built or written.

    Raises:
        ValueError: Names the flag, the rule and the value.
    """
    if args.naflex_loader:
        raise ValueError('--naflex-loader is not supported by this script; use the one of timm')
    check_values(args)
    check_amp(args)
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
    if args.manifold_mixup:
        _check_manifold_mixup_args(args)
    if args.synermix:
        _check_synermix_args(args)
    _check_cohesion_args(args)


def _check_synermix_args(args: argparse.Namespace) -> None:
    _exclude(
        args,
        '--synermix',
        {
            '--train-img-sizes': args.train_img_sizes,
            '--variable-batch-loss-scale': args.variable_batch_loss_scale != 'none',
        },
    )
    BATCH_SIZE.check('--batch-size with --synermix', args.batch_size)
    fixed, clean = args.synermix_batch == 'fixed', args.synermix_supplement == 'clean'
    bank = args.synermix_singletons == 'bank'
    check_fixed(fixed, clean, ('--synermix-batch fixed', '--synermix-supplement clean'))
    check_interval(args.synermix_interval, args.synermix_beta, ('--synermix-interval', '--synermix-beta'))
    check_bank(bank, args.synermix_gather, ('--synermix-singletons bank', '--synermix-gather'))
    if bank and args.aug_repeats:
        raise ValueError('--synermix-singletons bank and --aug-repeats cannot be used together: copies are no partners')
    if clean and args.synermix_singletons != 'supplement':
        _logger.warning('--synermix-supplement has no effect with --synermix-singletons %s.', args.synermix_singletons)


def _warn_of_no_effect(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name, rule in RULES.items():
        if rule.needs and not getattr(args, rule.needs) and getattr(args, name) != parser.get_default(name):
            _logger.warning('%s has no effect without %s.', flag(name), flag(rule.needs))


def _check_cohesion_args(args: argparse.Namespace) -> None:
    """Settle whether a run measures cohesion."""
    if args.report and (args.cohesion is False or not args.val_split):
        raise ValueError('--report shows the cohesion of validation images, and needs --val-split and no --no-cohesion')
    if args.cohesion is None:
        args.cohesion = args.synermix or args.report
    for other, value in {'--torchscript': args.torchscript, '--task multilabel': args.task == 'multilabel'}.items():
        if args.cohesion and value:
            raise ValueError(f'--cohesion and {other} cannot be used together')


def _check_manifold_mixup_args(args: argparse.Namespace) -> None:
    _exclude(
        args,
        '--manifold-mixup',
        {
            '--mixup or --cutmix': mixup_active(args),
            f'--mixup-mode {args.mixup_mode}': args.mixup_mode != 'batch',
        },
    )


def _check_small_image_args(args: argparse.Namespace) -> None:
    for name in ('crop_padding', 'cutout'):
        others = {'--aug-splits': args.aug_splits, '--train-img-sizes': args.train_img_sizes, '--no-aug': args.no_aug}
        if name == 'crop_padding':
            others['--train-crop-mode'] = args.train_crop_mode not in (None, 'rrc')
        for other, value in others.items():
            if getattr(args, name) and value:
                raise ValueError(f'{flag(name)} and {other} cannot be used together')
    if args.in_memory and args.dataset.lower().startswith(('wds/', 'tfds/', 'hfids/')):
        raise ValueError(f'--in-memory needs a data set that is no stream, got --dataset {args.dataset}')
    if args.in_memory and args.dataset.lower().startswith('torch/'):
        _logger.warning('--in-memory has no effect with --dataset %s.', args.dataset)


def _exclude(args: argparse.Namespace, flag: str, others: dict[str, Any]) -> None:
    """Refuse what SynerMixTask cannot do, and others that are set."""
    excluded = {
        '--kd-model-name': args.kd_model_name,
        '--jsd-loss': args.jsd_loss or args.loss == 'jsd',
        '--aug-splits': args.aug_splits,
        '--split-bn': args.split_bn,
        '--task multilabel': args.task == 'multilabel',
        '--torchscript': args.torchscript,
        **others,
    }
    for other, value in excluded.items():
        if value:
            raise ValueError(f'{flag} and {other} cannot be used together')


def mixup_active(args: argparse.Namespace) -> bool:
    """Whether the flags ask for MixUp or CutMix of images."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


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
