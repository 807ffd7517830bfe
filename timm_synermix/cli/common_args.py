"""Flags that timm's train.py and validate.py have in common."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import Any


class ParseKwargs(argparse.Action):
    """`--flag name=value ...` as a dict; a value is a Python literal, or else text.

    The rules are those of `timm.utils.ParseKwargs`, for which all of timm and torch would have to be imported.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        kwargs: dict[str, Any] = {}
        for item in filter(None, values or ()):
            name, equals, value = item.partition('=')
            if not equals:
                parser.error(f'argument {option_string}: must be name=value, got {item!r}')
            try:
                kwargs[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                kwargs[name] = value
        setattr(namespace, self.dest, kwargs)


def add_data_args(group: Any) -> None:
    """Add where images and targets come from, but for the names of the splits."""
    group.add_argument('data', nargs='?', help='dataset folder, same as --data-dir (deprecated)')
    group.add_argument('--data-dir', help='folder or tar file of the dataset')
    group.add_argument(
        '--dataset',
        default='',
        help='kind of dataset, TYPE/NAME: torch/cifar100, hfds/NAME, sklearn/digits, ...; default: an image folder',
    )
    group.add_argument(
        '--dataset-download', action='store_true', help='let datasets that can download themselves do so'
    )
    group.add_argument('--class-map', type=str, default='', help='file that maps class names to indices')
    group.add_argument(
        '--input-img-mode',
        type=str,
        help='PIL mode images are converted to; default by the number of input channels, RGB or L',
    )
    group.add_argument(
        '--input-key', type=str, help="image field of a dataset; endings of the images of a folder, as '.jpg;.tif'"
    )
    group.add_argument(
        '--target-key',
        type=str,
        help='name of the target field of a dataset; with --task multilabel also several, joined by commas, one for '
        'each class',
    )
    group.add_argument(
        '--target-format',
        type=str,
        choices=['indices', 'multihot'],
        help='targets of --task multilabel: a list of classes, or a number for each class; default: indices',
    )
    group.add_argument(
        '--dataset-trust-remote-code', action='store_true', help='let Hugging Face datasets run code from the hub'
    )


def add_task_args(group: Any) -> None:
    """Add what is to be learned."""
    group.add_argument(
        '--task',
        default='classification',
        choices=['classification', 'multilabel'],
        help='one class per image, or any number of labels',
    )
    group.add_argument(
        '--multilabel-threshold',
        type=float,
        default=0.5,
        help='probability from which a label counts as predicted, for the F1 scores of --task multilabel',
    )


def add_model_args(group: Any) -> None:
    """Add how the model is built, but for its name and weights."""
    group.add_argument('--num-classes', type=int, help="number of classes; default: the model's")
    group.add_argument('--gp', type=str, help="global pooling: fast, avg, max, avgmax, catavgmax; default: the model's")
    group.add_argument(
        '--model-kwargs',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='NAME=VALUE',
        help='further arguments of the model, as name=value',
    )
    group.add_argument('--fast-norm', action='store_true', help='use the faster, less precise normalisation layers')
    group.add_argument('--fuser', type=str, default='', help='TorchScript fuser: te, old or nvfuser')
    group.add_argument('--torchcompile-mode', type=str, help='mode of torch.compile')


def add_compile_args(group: Any) -> None:
    """Add the ways of compiling that exclude each other."""
    group.add_argument('--torchscript', action='store_true', help='compile the model with torch.jit.script')
    group.add_argument(
        '--torchcompile',
        nargs='?',
        type=str,
        const='inductor',
        help='compile the model with torch.compile, with this backend (inductor if none is named)',
    )


def add_image_args(group: Any) -> None:
    """Add the images that the model sees."""
    group.add_argument('--img-size', type=int, help="image size in pixels; default: the model's")
    group.add_argument('--in-chans', type=int, help='number of image channels; default: 3')
    group.add_argument(
        '--input-size', nargs=3, type=int, help='all input dimensions, channels height width, e.g. 3 224 224'
    )
    group.add_argument('--crop-pct', type=float, help='fraction of the resized image that the evaluation crop keeps')
    group.add_argument('--mean', nargs='+', type=float, help='mean of the normalisation, one value or one per channel')
    group.add_argument(
        '--std', nargs='+', type=float, help='standard deviation of the normalisation, one value or one per channel'
    )
    group.add_argument('--interpolation', type=str, default='', help='interpolation of the evaluation resize')


def add_device_args(group: Any) -> None:
    """Add where and with what precision to compute, and the processes that load data."""
    group.add_argument('--device', type=str, default='cuda', help='device to run on: cuda, cpu, mps, ...')
    group.add_argument('--amp', action='store_true', help='automatic mixed precision')
    group.add_argument('--amp-dtype', type=str, default='float16', help='precision of --amp: float16 or bfloat16')
    group.add_argument('--model-dtype', type=str, help='precision of the model itself: float32, float16 or bfloat16')
    group.add_argument('--channels-last', action='store_true', help='use the channels-last memory layout')
    group.add_argument('--seed', type=int, default=42, help='random seed')
    group.add_argument('-j', '--workers', type=int, default=4, help='data loading processes')
    group.add_argument('--pin-mem', action='store_true', help='use pinned memory for transfers to the device')
    group.add_argument(
        '--no-prefetcher', action='store_true', help='normalise images in the workers instead of on the device'
    )


def add_cohesion_memory_arg(group: Any) -> None:
    """Add the flag of where the cohesion metrics are computed to a script's group."""
    group.add_argument(
        '--cohesion-memory',
        type=float,
        default=1.0,
        metavar='GB',
        help='the cohesion metrics are computed on the CPU where they take more than this, three float64 features for '
        'each class; and left out if it has not the memory, which a line says before training',
    )
