"""The flags of train.py that timm does not have: SynerMix and what goes with it."""

from __future__ import annotations

import argparse

from timm_synermix.cli.common_args import add_cohesion_memory_arg
from timm_synermix.utils.checks import BATCH, MIX, SINGLETONS, SUPPLEMENT


def add_synermix_args(parser: argparse.ArgumentParser) -> None:
    """Add the SynerMix flags to a training script's parser."""
    group = parser.add_argument_group('SynerMix')
    group.add_argument(
        '--synermix',
        action='store_true',
        help='train with SynerMix: L = beta L_intra + (1 - beta) L_inter, where L_inter is the loss of the recipe',
    )
    group.add_argument(
        '--synermix-beta',
        type=float,
        help="weight of the intra-class loss; default: 0.1 with a mixup, 0.5 without, as in the paper's code",
    )
    group.add_argument(
        '--synermix-mix',
        default='features',
        choices=MIX,
        help='what the intra-class loss is of: features mixed within classes, or each clean image as it is (none), the '
        'control that tells what is due to the mixing',
    )
    group.add_argument(
        '--synermix-num-mixed',
        type=int,
        default=0,
        metavar='P',
        help="images interpolated per class, the paper's P; 0 for all",
    )
    group.add_argument(
        '--synermix-singletons',
        default='supplement',
        choices=SINGLETONS,
        help='a class with one image in a batch gets a second one (supplement), is mixed with a recent feature of its '
        'class (bank), or stays alone (keep)',
    )
    group.add_argument(
        '--synermix-supplement',
        default='both',
        choices=SUPPLEMENT,
        help='second images take part in both losses, or in the intra-class loss alone (clean): one view, not two',
    )
    group.add_argument(
        '--synermix-batch',
        default='grow',
        choices=BATCH,
        help='second images come on top of --batch-size, or within (fixed): one size or two, no more cost',
    )
    _add_cost_args(group)


def _add_cost_args(group: argparse._ArgumentGroup) -> None:
    """What trades the method's cost against its exactness."""
    group.add_argument(
        '--synermix-gather',
        action='store_true',
        help='mix the classes of the batches of all processes together, not those of each by itself',
    )
    group.add_argument(
        '--synermix-fraction',
        type=float,
        default=1.0,
        metavar='F',
        help='compute the intra-class loss of so many of the images of a batch, two of each of some classes: with '
        '0.125 a step sends an eighth more images, not twice as many',
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
        help='mix hidden activations instead of images, 0 for not; lam ~ Beta(ALPHA, ALPHA)',
    )
    group.add_argument(
        '--manifold-mixup-layers',
        nargs='+',
        metavar='LAYER',
        help="where: 'input', names of the model's modules, or indices into its feature_info (0 is the input); "
        'default: the input and two early stages',
    )


def add_regmixup_args(parser: argparse.ArgumentParser) -> None:
    """Add the flag of RegMixup to a training script's parser."""
    group = parser.add_argument_group('RegMixup')
    group.add_argument(
        '--regmixup',
        action='store_true',
        help='train on the unmixed images beside those of --mixup or --cutmix, by the mean of both losses: twice the '
        'images',
    )


def add_finetuning_args(parser: argparse.ArgumentParser) -> None:
    """Add the flag of training a classifier alone to a training script's parser."""
    group = parser.add_argument_group('Fine-tuning')
    group.add_argument(
        '--freeze', action='store_true', help='train the classifier alone; the features are those of the model as it is'
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
    group.add_argument(
        '--on-device',
        action='store_true',
        help='decode all images once, resize and crop them as for the evaluation, and keep them on the device, to be '
        'augmented there in batches, without workers: by --crop-padding, --hflip and --cutout alone, or --no-aug',
    )


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


def add_look_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what to look at to a training script's parser."""
    group = parser.add_argument_group('What to look at')
    group.add_argument(
        '--cohesion',
        action=argparse.BooleanOptionalAction,
        help='measure how tight and how far apart the classes are; in each evaluation, by default with --synermix',
    )
    add_cohesion_memory_arg(group)
    group.add_argument(
        '--log-with',
        nargs='+',
        metavar='TRACKER',
        help='trackers, such as wandb, tensorboard, trackio; any of Accelerate',
    )
    group.add_argument('--report', action='store_true', help='write a page of curves and pictures at the end')
