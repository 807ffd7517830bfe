"""Starting the trackers that Accelerate knows: named after the run, told all flags, local ones in the run's folder."""

from __future__ import annotations

import argparse
import logging
import os
import re
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from timm_synermix.engine.resume_point import ResumePoint

_logger = logging.getLogger(__name__)

_PROJECT = 'timm-synermix'


def tracker_names(args: argparse.Namespace) -> list[str]:
    """The trackers that --log-wandb and --log-with ask for.

    Raises:
        ValueError: Accelerate does not know one, or it is not installed.
    """
    names = list(dict.fromkeys([*(['wandb'] if args.log_wandb else []), *(args.log_with or [])]))
    known, available = list(map(str, LOGGER_TYPE_TO_CLASS)), list(map(str, get_available_trackers()))
    for name in names:
        if name not in known:
            raise ValueError(f'--log-with must be of {", ".join(known)}, got {name}')
        if name not in available:  # pip takes Accelerate's names of all of them
            raise ValueError(f'--log-with {name}: its package is not installed; pip install {name}')
    return names


def start_tracker(name: str, args: argparse.Namespace, folder: str, resume_from: ResumePoint | None) -> Any:
    """Start one of Accelerate's trackers, and tell it the flags.

    Args:
        name: Accelerate's name of it.
        args: The flags.
        folder: The run's folder.
        resume_from: Checkpoint the run goes on from, or None; its Weights & Biases run is continued.
    """
    project = args.wandb_project or _PROJECT
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == 'wandb':
        tracker = kind(project, **_wandb_arguments(args, folder, resume_from))
    elif name == 'trackio':
        # Read when it is imported; whoever sets it has one page of all runs.
        os.environ.setdefault('TRACKIO_DIR', os.path.abspath(os.path.join(folder, 'trackio')))
        tracker = kind(project, name=args.experiment, resume='never' if resume_from is None else 'allow')
    elif name == 'tensorboard':
        tracker = kind('', folder)  # whose run is named by the folder of its files
    else:
        tracker = kind(project, **({'logging_dir': folder} if kind.requires_logging_directory else {}))
    if hasattr(tracker, 'start'):  # those of older releases of Accelerate start when they are created
        tracker.start()
    if name == 'tensorboard':
        _write_hparams(tracker.tracker, args)
    else:
        is_sweep = name == 'wandb' and tracker.run.sweep_id  # which has flags of its own there, not to be changed
        tracker.store_init_configuration(
            {flag: value for flag, value in vars(args).items() if not (is_sweep and flag in tracker.run.config)}
        )
    if name == 'wandb':
        tracker.run.define_metric('*', step_metric='update')
        if tracker.run.offline and not tracker.run.disabled:
            _logger.info(f'Weights & Biases logs offline. To upload: wandb sync {os.path.dirname(tracker.run.dir)}')
    return tracker


def recipe_name(args: argparse.Namespace) -> str:
    """Name of the recipe of a run, such as cifar100/synermix_mixup; without one, the model's."""
    path = os.path.splitext(args.config)[0].replace(os.sep, '/')
    _, is_known, name = path.rpartition('hparams/')
    return (name if is_known or not os.path.isabs(path) else os.path.basename(path)) or args.model


def _write_hparams(writer: Any, args: argparse.Namespace) -> None:
    """The flags in TensorBoard's tab of hyperparameters, where Accelerate would make a second run of them."""
    from torch.utils.tensorboard.summary import hparams

    flags = {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in vars(args).items()}
    metric = 'eval_map' if args.task == 'multilabel' else 'eval_top1'
    for summary in hparams(flags, {metric: 0.0, 'eval_loss': 0.0, 'train_loss': 0.0}):  # of which it takes the names
        writer.file_writer.add_summary(summary)


def _wandb_arguments(args: argparse.Namespace, folder: str, resume_from: ResumePoint | None) -> dict[str, Any]:
    """The arguments of wandb.init; without an account the run is logged offline."""
    import wandb

    # What wandb finds out by itself has paths of this machine: of the script, of Python, in warnings on the console.
    private = {'x_disable_meta': ('WANDB__DISABLE_META', 'true'), 'console': ('WANDB_CONSOLE', 'off')}
    settings: dict[str, Any] = {name: os.environ.get(*variable) for name, variable in private.items()}
    kwargs: dict[str, Any] = dict(name=args.experiment, dir=folder, tags=args.wandb_tags)
    kwargs['settings'] = wandb.Settings(**settings)
    defaults = {'group': ('WANDB_RUN_GROUP', recipe_name(args)), 'job_type': ('WANDB_JOB_TYPE', 'train')}
    kwargs.update({name: os.environ.get(*variable) for name, variable in defaults.items()})
    if args.wandb_resume_id:
        kwargs.update(id=args.wandb_resume_id, resume='must')
    elif resume_from is not None:
        run_id = getattr(resume_from.content.get('args'), 'wandb_run_id', None)
        if isinstance(run_id, str) and re.fullmatch(r'[\w-]+', run_id):
            kwargs.update(id=run_id, resume='allow')
    mode = os.environ.get('WANDB_MODE') or wandb.setup().settings.mode  # `wandb disabled` is among the settings
    if mode == 'online' and 'WANDB_MODE' not in os.environ and not wandb.login(prompt=False):
        kwargs['mode'] = 'offline'
    return kwargs
