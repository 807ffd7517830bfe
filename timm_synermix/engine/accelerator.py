"""The Accelerator of a script's flags: device, precision, distribution."""

from __future__ import annotations

import argparse
import importlib
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env
from timm.utils import NativeScaler

from timm_synermix.cli.checks import naming
from timm_synermix.engine.run_folder import output_root
from timm_synermix.engine.tracker_start import tracker_names

# What a launcher tells each process about how many there are: torchrun, Slurm's srun, MPI, PMI.
_WORLD_SIZES = ('WORLD_SIZE', 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'MV2_COMM_WORLD_SIZE')


def take_slurm_ranks() -> None:
    """Under srun, which starts one process for each GPU, tell torch what Slurm says of them, as timm's scripts do.

    What torchrun or accelerate launch have said is left alone. Where the processes meet is in MASTER_ADDR and
    MASTER_PORT; Slurm does not say.

    Raises:
        ValueError: There are several, and these are missing.
    """
    size = os.environ.get('SLURM_STEP_NUM_TASKS')  # of this srun
    if size is None and 'MASTER_ADDR' in os.environ:
        size = os.environ.get('SLURM_NTASKS')  # of the job, which a process outside of srun has, too
    if 'WORLD_SIZE' in os.environ or 'SLURM_PROCID' not in os.environ or int(size or 1) == 1:
        return
    for name in ('MASTER_ADDR', 'MASTER_PORT'):
        if name not in os.environ:
            raise ValueError(
                f'srun has started {size} processes, which do not know where to meet: set {name} in the batch file, '
                'as docs/launch.md does'
            )
    os.environ['WORLD_SIZE'] = str(size)
    os.environ['RANK'] = os.environ['SLURM_PROCID']
    os.environ['LOCAL_RANK'] = os.environ['SLURM_LOCALID']


def create_accelerator(args: argparse.Namespace, **kwargs: Any) -> Accelerator:
    """The Accelerator of the flags device, amp and amp_dtype.

    Args:
        args: The flags.
        kwargs: Other arguments of Accelerator.

    Raises:
        ValueError: The device is not there, or cannot do what the flags ask of it.
    """
    take_slurm_ranks()
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
    if kind == 'cpu' and accelerator.mixed_precision == 'fp16':  # which it would pass over in silence
        raise ValueError("mixed_precision in Accelerate's configuration must be no or bf16 on the CPU, got fp16")
    if accelerator.device.type != kind:
        raise ValueError(f'--device {args.device}: not available here, only {accelerator.device.type} is')
    return accelerator


def create_train_accelerator(args: argparse.Namespace) -> Accelerator:
    """Set up device, precision and distribution.

    Raises:
        ValueError: The device is not there, or cannot do what the flags ask of it.
    """
    for module in args.device_modules or ():
        with naming('--device-modules'):
            importlib.import_module(module)
    if args.sync_bn and args.device.startswith('cpu'):
        raise ValueError('--sync-bn needs a GPU, got --device cpu')
    take_slurm_ranks()
    _check_distribution(None)
    accelerator = create_accelerator(
        args,
        log_with=tracker_names(args) or None,
        project_dir=output_root(args),  # some trackers must have one now; the run's folder takes its place later
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not args.no_ddp_bb)],
    )
    _check_distribution(accelerator)
    if accelerator.gradient_accumulation_steps > 1:
        raise ValueError(
            f'--grad-accum-steps accumulates gradients; in the configuration of Accelerate set '
            f'gradient_accumulation_steps to 1, got {accelerator.gradient_accumulation_steps}'
        )
    if accelerator.scaler is not None:
        accelerator.scaler.state_dict_key = NativeScaler.state_dict_key  # the name timm's checkpoints keep it under
    return accelerator


def _check_distribution(accelerator: Accelerator | None) -> None:
    """Refuse to train copies that know nothing of each other, and models in shards."""
    for name in _WORLD_SIZES:
        asked = os.environ.get(name, '1')
        apart = 'MASTER_ADDR' not in os.environ if accelerator is None else accelerator.num_processes == 1
        if apart and asked.isdecimal() and int(asked) > 1:
            raise ValueError(
                f'{name} asks for {asked} processes, but they have not found each other, and each would train a model '
                'of its own; start them with srun, torchrun or accelerate launch'
            )
    for kind in ('FSDP', 'DEEPSPEED', 'MEGATRON_LM'):
        if parse_flag_from_env(f'ACCELERATE_USE_{kind}'):  # on a CPU Accelerate itself would pass over it in silence
            raise ValueError(
                f"{kind} in Accelerate's configuration is not supported: every process trains a whole copy of the "
                'model here; set distributed_type to MULTI_GPU or MULTI_CPU'
            )
