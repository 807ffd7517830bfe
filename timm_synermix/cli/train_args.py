"""The command line of train.py: flags over a YAML config, checked before any work starts."""

from __future__ import annotations

import argparse
import logging

import yaml

from timm_synermix.cli.checks import TrainParser, usage_errors
from timm_synermix.cli.config import load_config
from timm_synermix.cli.help import add_help_arg
from timm_synermix.cli.loss import settle_loss
from timm_synermix.cli.recipe_args import add_recipe_args
from timm_synermix.cli.rules import RULES, flag
from timm_synermix.cli.sweep import join_attempt
from timm_synermix.cli.synermix_args import (
    add_finetuning_args,
    add_look_args,
    add_manifold_mixup_args,
    add_regmixup_args,
    add_reliability_args,
    add_small_image_args,
    add_synermix_args,
)
from timm_synermix.cli.timm_args import add_timm_args
from timm_synermix.cli.train_checks import check_args

_logger = logging.getLogger(__name__)


def create_parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of what comes before the arguments of the training, --config above all, and the parser of those."""
    config_parser = TrainParser(add_help=False)
    config_parser.add_argument(
        '-c',
        '--config',
        default='',
        type=str,
        help='YAML file of flags, or a recipe by its name: cifar100/synermix_mixup; other flags override it',
    )
    parser = TrainParser(
        description='Train an image classifier with timm, and with SynerMix.',
        parents=[config_parser],
        usage='%(prog)s --data-dir DIR --model NAME [--synermix] [flag ...]',
        add_help=False,
    )
    add_help_arg(parser)
    add_timm_args(parser)
    add_recipe_args(parser)
    add_synermix_args(parser)
    add_manifold_mixup_args(parser)
    add_regmixup_args(parser)
    add_finetuning_args(parser)
    add_small_image_args(parser)
    add_reliability_args(parser)
    add_look_args(parser)
    # Of timm's sweep.py, and no arguments of the training: they are not in the parser of the others.
    config_parser.add_argument('--sweep-locks', nargs='+', metavar='FILE', help='locks to hold until the end')
    config_parser.add_argument('--sweep-attempt', nargs=2, metavar=('FILE', 'ID'), help='train if the file says ID')
    return config_parser, parser


def parse_args(
    config_parser: argparse.ArgumentParser, parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> tuple[argparse.Namespace, str]:
    """Parse the command line over the YAML config it may name; bad values exit with code 2.

    Returns:
        The arguments, and their YAML text for `args.yaml`.
    """
    config_args, remaining = config_parser.parse_known_args(argv)
    if config_args.sweep_attempt:
        join_attempt(config_args.sweep_locks or (), *config_args.sweep_attempt)
    args = read_args(parser, config_args.config, remaining)
    _warn_of_no_effect(parser, args)
    return args, yaml.safe_dump(args.__dict__, default_flow_style=False)


def read_args(parser: argparse.ArgumentParser, config_path: str, argv: list[str]) -> argparse.Namespace:
    """The arguments of a training, checked; bad ones exit with code 2, by what needs no torch first."""
    try:
        config = load_config(parser, config_path) if config_path else {}
    except ValueError as error:
        parser.error(f'--config: {error}')
    args = parser.parse_args(argv, namespace=argparse.Namespace(**config))
    args.config = config_path
    args.data = args.data or config.get('data')  # argparse puts an absent positional back to its default
    with usage_errors(parser):
        settle_loss(args)
        if args.cohesion is None:
            args.cohesion = (args.synermix and args.task != 'multilabel') or args.report
        check_args(args)
    return args


def _warn_of_no_effect(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name, rule in RULES.items():
        if rule.needs and not getattr(args, rule.needs) and getattr(args, name) != parser.get_default(name):
            _logger.warning('%s has no effect without %s.', flag(name), flag(rule.needs))
