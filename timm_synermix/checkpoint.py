"""Checkpoints in timm's own format, resume, and the best weights as safetensors."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.models import safe_model_name
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import (
    CheckpointSaver,
    get_outdir,
    get_state_dict,
    load_checkpoint_metadata,
    trim_summary,
    unwrap_model,
)

_logger = logging.getLogger('train')


def experiment_name(args: argparse.Namespace, img_size: int) -> str:
    """Name of this run's folder: --experiment, or the time, the model and the image size."""
    stamp = datetime.now().strftime('%Y%m%d-%H%M%S')
    return args.experiment or f'{stamp}-{safe_model_name(args.model)}-{img_size}'


def output_root(args: argparse.Namespace) -> str:
    """Path of the folder of all runs."""
    return args.output or './output/train'


def output_folder(args: argparse.Namespace) -> str:
    """Path of this run's folder, `<output>/<experiment>`."""
    return os.path.join(output_root(args), args.experiment)


def how_to_continue(args: argparse.Namespace) -> str:
    """What to tell a user who stopped a run."""
    if not (args.experiment and os.path.exists(os.path.join(output_folder(args), 'last.pth.tar'))):
        return 'No epoch has finished, there is nothing to continue.'
    flags = f'--output {args.output} ' if args.output else ''
    return f'Add {flags}--experiment {args.experiment} --resume auto to go on after the last finished epoch.'


def resume_path(args: argparse.Namespace) -> str | None:
    """The checkpoint to resume from; None for a fresh start.

    Raises:
        ValueError: --resume names a file that does not exist.
    """
    if args.resume == 'auto':
        path = os.path.join(output_folder(args), 'last.pth.tar')
        return path if os.path.isfile(path) else None
    if args.resume and not os.path.isfile(args.resume):
        raise ValueError(f"--resume must be a checkpoint file or 'auto', got '{args.resume}'")
    return args.resume or None


@contextmanager
def load_errors(what: str) -> Iterator[None]:
    """Turn an error of loading a file of weights into a ValueError: what, and the first line of the reason."""
    try:
        yield
    except (
        *(RuntimeError, ValueError, KeyError, EOFError, UnpicklingError),
        *(SafetensorError, AttributeError, TypeError),  # of a file that holds something else
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f'{what}: {reason}') from error


def resume_task(
    args: argparse.Namespace, task: TrainingTask, optimizer: torch.optim.Optimizer, scaler: Any, path: str
) -> int:
    """Load a training checkpoint, of this script or of timm's, and return the epoch to go on with.

    Raises:
        ValueError: The file is no checkpoint, or does not fit the model.
    """
    with load_errors(f'--resume: {path} cannot be loaded into this model and optimizer'):
        if not args.no_resume_opt:
            _check_same_optimizer(path, optimizer)
        epoch = resume_task_checkpoint(
            task,
            path,
            optimizer=None if args.no_resume_opt else optimizer,
            loss_scaler=None if args.no_resume_opt else scaler,
            log_info=args.rank == 0,
        )
        if task.has_ema():
            load_task_ema_checkpoint(task, path)
    return epoch or 0


def _check_same_optimizer(path: str, optimizer: torch.optim.Optimizer) -> None:
    """torch takes the state of another optimizer without a word, and fails at the first step."""
    saved = load_checkpoint_metadata(path)
    groups = saved.get('optimizer', {}).get('param_groups', []) if isinstance(saved, dict) else []
    needed = optimizer.state_dict()['param_groups'][0].keys()
    if groups and not needed <= groups[0].keys():  # a schedule adds keys of its own
        raise ValueError('it is of another optimizer; --no-resume-opt takes the weights alone')


class RunSaver(CheckpointSaver):
    """timm's CheckpointSaver of one run's folder, which also keeps `model_best.safetensors`.

    Args:
        folder: The run's folder, created here.
        args_text: Text of `args.yaml`.
        resume_from: Checkpoint the run goes on from, or None. One of this folder brings its history along.
        start_epoch: First epoch of the run; rows of summary.csv from it on are dropped.
        kwargs: Arguments of CheckpointSaver, with a task.

    Raises:
        ValueError: The folder cannot be written to.
    """

    def __init__(
        self, folder: str, args_text: str, *, resume_from: str | None, start_epoch: int, **kwargs: Any
    ) -> None:
        try:
            get_outdir(folder)
            with open(os.path.join(folder, 'args.yaml'), 'w') as file:
                file.write(args_text)
        except OSError as error:
            raise ValueError(f"--output: cannot write to the run's folder {folder}: {error.strerror}") from error
        super().__init__(checkpoint_dir=folder, recovery_dir=folder, **kwargs)
        if resume_from is not None and os.path.samefile(os.path.dirname(resume_from) or '.', folder):
            self.load_state_dict_from_checkpoint(resume_from)
        else:
            start_epoch = 0
        self.summary_path = os.path.join(folder, 'summary.csv')
        trim_summary(self.summary_path, start_epoch)

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> tuple[float | None, int | None]:
        """Save as timm does; if it is the best so far, save its weights as safetensors too."""
        best_metric, best_epoch = super().save_checkpoint(epoch, metric)
        if best_epoch == epoch:
            self._save_safetensors()
        return best_metric, best_epoch

    def _save_safetensors(self) -> None:
        # The averaged weights if there are any: those are what timm loads from model_best.pth.tar too.
        state = get_state_dict(self.task.get_eval_model(ema=self.task.has_ema()), unwrap_model)
        state = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}  # no aliases
        path = os.path.join(self.checkpoint_dir, 'model_best.safetensors')
        safetensors.torch.save_file(state, path + '.tmp')
        os.replace(path + '.tmp', path)
