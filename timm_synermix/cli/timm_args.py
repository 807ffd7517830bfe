"""The flags of timm's train.py beside its recipe: data, model, device, run. Names, types and defaults are timm's."""

from __future__ import annotations

import argparse

from timm_synermix.cli.common_args import (
    add_compile_args,
    add_data_args,
    add_device_args,
    add_image_args,
    add_model_args,
    add_task_args,
)

TIMM_VERSION = '1.0.31'  # whose flags these are


def add_timm_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of timm's train.py, but for --config and those of the recipe."""
    for add_args in (
        _add_dataset_args,
        _add_model_args,
        _add_device_args,
        _add_run_args,
        _add_naflex_args,
    ):
        add_args(parser)


def _add_dataset_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Dataset')
    add_data_args(group)
    group.add_argument('--train-split', default='train', help='name of the training split')
    group.add_argument(
        '--val-split', default='validation', help='name of the validation split; empty trains without validation'
    )
    group.add_argument(
        '--train-num-samples', type=int, help='number of training samples, for streaming datasets that do not know it'
    )
    group.add_argument(
        '--val-num-samples', type=int, help='number of validation samples, for streaming datasets that do not know it'
    )


def _add_model_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Model and task')
    group.add_argument('--model', type=str, default='resnet50', help='name of the timm model')
    group.add_argument('--pretrained', action='store_true', help='start from the pretrained weights of the model')
    group.add_argument('--pretrained-path', type=str, help='load the pretrained weights from this file')
    group.add_argument('--initial-checkpoint', type=str, default='', help='load these weights into the finished model')
    add_model_args(group)
    add_compile_args(group)
    group.add_argument(
        '--grad-checkpointing', action='store_true', help='recompute activations in the backward pass to save memory'
    )
    group.add_argument('--head-init-scale', type=float, help='factor on the initial weights of the classifier')
    group.add_argument('--head-init-bias', type=float, help='initial bias of the classifier')
    add_task_args(group)
    add_image_args(parser.add_argument_group('Images'))


def _add_device_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Device, batches and processes')
    add_device_args(group)
    group.add_argument('-b', '--batch-size', type=int, default=128, help='images per batch and process')
    group.add_argument(
        '-vb',
        '--validation-batch-size',
        type=int,
        help='images per evaluation batch and process; default: --batch-size',
    )
    group.add_argument('--grad-accum-steps', type=int, default=1, help='batches per optimizer update')
    group.add_argument('--no-ddp-bb', action='store_true', help='do not broadcast buffers in DDP')
    group.add_argument('--synchronize-step', action='store_true', help='wait for the device at the end of each step')
    group.add_argument('--local-rank', '--local_rank', type=int, default=0, help='ignored, set by launchers')
    group.add_argument('--device-modules', nargs='+', type=str, help='Python modules to import for device backends')
    group.add_argument(
        '--worker-seeding', type=str, default='all', help='which generators of a worker are seeded: all or part'
    )
    group.add_argument(
        '--use-multi-epochs-loader', action='store_true', help='keep the data loader running across epochs'
    )


def _add_run_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Run')
    group.add_argument(
        '--resume',
        type=str,
        default='',
        help='continue from this training checkpoint; "auto": from the last one of --experiment, if there is one',
    )
    group.add_argument('--no-resume-opt', action='store_true', help='resume without the optimizer state')
    group.add_argument('--log-interval', type=int, default=50, help='updates between log lines')
    group.add_argument('--val-interval', type=int, default=1, help='epochs between evaluations')
    group.add_argument(
        '--recovery-interval', type=int, default=0, help='updates between recovery checkpoints, 0 for none'
    )
    group.add_argument('--checkpoint-hist', type=int, default=10, help='checkpoints to keep')
    group.add_argument('--save-images', action='store_true', help='save a batch of training images at every log line')
    group.add_argument('--output', type=str, default='', help='folder of all runs')
    group.add_argument('--experiment', type=str, default='', help="name of this run's folder in --output")
    group.add_argument(
        '--eval-metric',
        type=str,
        default='',
        help='metric that ranks checkpoints: top1, top5 or loss, of several labels map, micro_f1, macro_f1, sample_f1 '
        'or loss; default: top1, of several labels map',
    )
    group.add_argument(
        '--tta',
        type=int,
        default=0,
        help='copies of an image in evaluation, of which there is one: more would be different images',
    )
    group.add_argument('--log-wandb', action='store_true', help='log to Weights & Biases')
    group.add_argument('--wandb-project', type=str, help='project to log to')
    group.add_argument('--wandb-tags', nargs='+', type=str, default=[], help='tags of the run')
    group.add_argument('--wandb-resume-id', type=str, default='', help='id of the run to go on logging to')
    group.add_argument('--stop-epoch', type=int, help='stop after this many epochs, with the schedule of --epochs')
    group.add_argument(
        '--save-epochs', nargs='+', type=int, help='keep a milestone checkpoint after these numbers of epochs'
    )


def _add_naflex_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('NaFlex (accepted, not supported)')
    group.add_argument('--naflex-loader', action='store_true', help='variable-length batches; not supported')
    group.add_argument(
        '--naflex-train-seq-lens',
        nargs='+',
        type=int,
        default=[128, 256, 576, 784, 1024],
        help='sequence lengths to train with',
    )
    group.add_argument('--naflex-max-seq-len', type=int, default=576, help='sequence length in evaluation')
    group.add_argument('--naflex-patch-sizes', nargs='+', type=int, help='patch sizes to train with')
    group.add_argument('--naflex-patch-size-probs', nargs='+', type=float, help='probability of each patch size')
    group.add_argument(
        '--naflex-loss-scale',
        type=str,
        default='linear',
        choices=['none', 'sqrt', 'linear'],
        help='scale the loss with the batch size',
    )
    group.add_argument('--naflex-patchify-channels-first', action='store_true', help='channels-first patches')
