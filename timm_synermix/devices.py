"""The Accelerator of a script's flags: device, precision, distribution."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env


def create_accelerator(args: argparse.Namespace, **kwargs: Any) -> Accelerator:
    """The Accelerator of the flags device, amp and amp_dtype.

    Args:
        args: The flags.
        kwargs: Other arguments of Accelerator.

    Raises:
        ValueError: The device is not there, or cannot do what the flags ask of it.
    """
    device = 'cpu' if parse_flag_from_env('ACCELERATE_USE_CPU') else args.device
    kind, _, index = device.partition(':')
    if kind == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'--device {args.device}: there is no CUDA device here; --device cpu runs on the CPU')
    if kind == 'cpu' and args.amp and args.amp_dtype == 'float16':
        raise ValueError('--amp on the CPU needs --amp-dtype bfloat16, got float16 (which is the default)')
    if index:
        os.environ['ACCELERATE_TORCH_DEVICE'] = device
    precision = {'float16': 'fp16', 'bfloat16': 'bf16'}
    accelerator = Accelerator(
        cpu=kind == 'cpu',
        mixed_precision=precision[args.amp_dtype] if args.amp else None,  # None leaves it to Accelerate's configuration
        **kwargs,
    )
    if accelerator.device.type != kind:
        raise ValueError(f'--device {args.device}: not available here, only {accelerator.device.type} is')
    return accelerator
