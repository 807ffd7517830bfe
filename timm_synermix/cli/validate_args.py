"""The flags of validate.py: timm's, with its names, types and defaults, and those of SynerMix."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile

from timm_synermix.cli.checks import TrainParser, check_amp, check_compile, check_dataset
from timm_synermix.cli.common_args import (
    add_cohesion_memory_arg,
    add_compile_args,
    add_data_args,
    add_device_args,
    add_image_args,
    add_model_args,
    add_task_args,
)
from timm_synermix.cli.help import add_help_arg
from timm_synermix.cli.rules import check_values, flag


def create_parser() -> argparse.ArgumentParser:
    """The parser of validate.py."""
    parser = TrainParser(
        description='Evaluate image classifiers.',
        usage='%(prog)s --data-dir DIR --checkpoint FILE [flag ...]',
        add_help=False,
    )
    add_help_arg(parser)
    for add_args in (_add_dataset_args, _add_model_args, _add_image_args, _add_device_args, _add_result_args):
        add_args(parser)
    add_cohesion_args(parser)
    return parser


def parse_args(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> tuple[argparse.Namespace, frozenset[str]]:
    """Parse the command line.

    Returns:
        The arguments, and the names of those that the user gave.
    """
    absent = object()  # argparse leaves what is there already, unless the user gives a value
    marked = parser.parse_args(argv, argparse.Namespace(**{action.dest: absent for action in parser._actions}))
    given = frozenset(name for name, value in vars(marked).items() if value is not absent)
    return parser.parse_args(argv), given


def _add_dataset_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Dataset')
    add_data_args(group)
    group.add_argument('--split', default='validation', help='name of the split')
    group.add_argument('--num-samples', type=int, help='number of samples, for streaming datasets that do not know it')
    group.add_argument(
        '--real-labels', type=str, default='', help='JSON file of the reassessed labels of ImageNet, for its top-k'
    )
    group.add_argument(
        '--valid-labels',
        type=str,
        default='',
        help='file of class indices, one a line: the outputs of the model that the classes of the dataset stand for',
    )


def _add_model_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Model and task')
    group.add_argument(
        '--model',
        '-m',
        default='dpn92',
        help="name of the timm model; 'all', a wildcard or a text file of names: their pretrained weights one by one",
    )
    group.add_argument(
        '--pretrained', action='store_true', help='evaluate the pretrained weights, as without --checkpoint'
    )
    group.add_argument(
        '--checkpoint',
        type=str,
        default='',
        help='evaluate these weights: .pth.tar, .pth or .safetensors, or all of them in a folder. In the folder of a '
        'training run, its args.yaml tells the model and the size of the images',
    )
    group.add_argument('--use-ema', action='store_true', help='evaluate the moving average in the checkpoint')
    group.add_argument(
        '--no-use-ema',
        action='store_true',
        help='evaluate the other weights of a run with --model-ema, whose numbers are those of the moving average',
    )
    add_model_args(group)
    group.add_argument('--test-pool', action='store_true', help='pool predictions over images larger than trained on')
    group.add_argument('--reparam', action='store_true', help='merge the branches of models that can be')
    exclusive = group.add_mutually_exclusive_group()
    add_compile_args(exclusive)
    exclusive.add_argument('--aot-autograd', action='store_true', help='compile the model with AOT Autograd')
    add_task_args(group)


def _add_image_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Images')
    add_image_args(group)
    group.add_argument(
        '--use-train-size', action='store_true', help="take the size the model was trained with, not its test size's"
    )
    group.add_argument('--crop-mode', type=str, help="center, squash or border; default: the model's")
    group.add_argument('--crop-border-pixels', type=int, help='pixels cut off all sides first')
    group.add_argument('--tf-preprocessing', action='store_true', help='preprocess with TensorFlow')
    group.add_argument('--naflex-loader', action='store_true', help='not supported')
    group.add_argument('--naflex-max-seq-len', type=int, default=576, help='not supported')


def _add_device_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Device, batches and processes')
    add_device_args(group)
    group.add_argument('-b', '--batch-size', type=int, default=256, help='images per batch and process')
    group.add_argument('--num-gpu', type=int, default=1, help='only 1 is supported; torchrun starts more processes')
    group.add_argument('--retry', action='store_true', help='try again with smaller batches after an error')


def _add_result_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Results')
    group.add_argument('--log-freq', type=int, default=10, help='batches between two lines of progress')
    group.add_argument('--results-file', type=str, default='', help='write the results to this file')
    group.add_argument('--results-format', type=str, default='csv', help='format of the results file: csv, json')
    group.add_argument(
        '--metrics-avg',
        type=str,
        choices=['micro', 'macro', 'weighted'],
        help='add precision, recall and F1 score, averaged over the classes in this way',
    )


def add_cohesion_args(parser: argparse.ArgumentParser) -> None:
    """Add what timm's script does not have: cohesion metrics, features, comparison, report."""
    group = parser.add_argument_group('SynerMix')
    group.add_argument(
        '--cohesion',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='measure how tight and how far apart the classes are in feature space',
    )
    add_cohesion_memory_arg(group)
    group.add_argument(
        '--compare',
        nargs='+',
        metavar='PATH',
        help='evaluate several checkpoints on the same images; a folder of a training run stands for its best one',
    )
    group.add_argument('--features-out', metavar='FILE', help='write features and targets to this file, as safetensors')
    group.add_argument('--report', metavar='DIR', help='write a report with pictures, report.html, to this folder')


def check_args(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, are out of range or not supported, before any work.

    Raises:
        ValueError: Names the flag, the rule and the value.
    """
    check_values(args)
    check_amp(args)
    _check_supported(args)
    _check_files(args)
    check_dataset(args)
    if args.real_labels and args.valid_labels:
        raise ValueError('--real-labels and --valid-labels cannot be used together: real labels are of all classes')
    if args.compare and args.checkpoint:
        raise ValueError('--compare and --checkpoint cannot be used together; list all checkpoints after --compare')
    for name, value in {'--features-out': args.features_out, '--report': args.report}.items():
        if value and args.torchscript:
            raise ValueError(f'{name} and --torchscript cannot be used together: such a model hides its features')
    check_compile(args)  # asks torch, which takes seconds to import


def _check_supported(args: argparse.Namespace) -> None:
    if args.naflex_loader or args.naflex_max_seq_len != 576:
        raise ValueError('--naflex-loader and --naflex-max-seq-len are not supported by this script; use that of timm')
    if args.num_gpu != 1:
        raise ValueError(
            f'--num-gpu must be 1, got {args.num_gpu}; for more GPUs: torchrun --nproc_per_node N validate.py'
        )
    if args.tf_preprocessing and importlib.util.find_spec('tensorflow') is None:
        raise ValueError('--tf-preprocessing needs the package tensorflow, which is not installed')
    if args.torchcompile_mode and not args.torchcompile:
        raise ValueError(f'--torchcompile-mode needs --torchcompile, got {args.torchcompile_mode} alone')


def _check_files(args: argparse.Namespace) -> None:
    for name in ('real_labels', 'valid_labels'):
        path = getattr(args, name)
        if path and not os.path.isfile(path):
            raise ValueError(f"{flag(name)} must be a file that exists, got '{path}'")
    for name in ('results_file', 'features_out'):
        path = getattr(args, name)
        if path and not os.path.isdir(os.path.dirname(path) or '.'):
            raise ValueError(f"{flag(name)} must be in a folder that exists, got '{path}'")
        if path and os.path.isdir(path):
            raise ValueError(f"{flag(name)} must be a file, got the folder '{path}'")
        if path:
            _check_writable(flag(name), path)


def _check_writable(flag: str, path: str) -> None:
    """Raise ValueError if a file cannot be written; the results of hours would be lost then."""
    is_new = not os.path.exists(path)
    try:
        with open(path, 'ab'):
            pass
        if is_new:
            os.remove(path)
    except OSError as error:
        raise ValueError(f"{flag} must be a file that can be written, got '{path}': {error.strerror}") from error


def create_folder(flag: str, path: str) -> None:
    """Make the folder of a flag, before there is anything to lose; raise ValueError if that cannot be done."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{flag} must be a folder to write to, got '{path}': {error.strerror}") from error
