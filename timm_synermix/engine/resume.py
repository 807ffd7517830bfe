"""Where a run goes on: finding a good checkpoint, refusing one of another run, loading it."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import unwrap_model

from timm_synermix.cli.checks import replaced
from timm_synermix.cli.rules import RULES, flag, names_with
from timm_synermix.engine.resume_point import FORMAT, NewerFormat, ResumePoint, checkpoint_paths
from timm_synermix.engine.run_folder import in_use, output_folder
from timm_synermix.task.feature_bank import FeatureBank
from timm_synermix.utils.files import FolderInUse, lock_folder
from timm_synermix.utils.safe_load import LOAD_ERRORS, load_errors, load_reason
from timm_synermix.utils.timm_private import base_optimizer, rounding_generator

_logger = logging.getLogger(__name__)

_BANKS = 1e9  # bytes of the feature banks of all processes that a checkpoint may have


def find_resume_point(args: argparse.Namespace) -> ResumePoint | None:
    """The checkpoint of --resume; for 'auto' the newest good one in the run's folder, None if there is none at all.

    Raises:
        ValueError: --resume names a file that is not there or is damaged, no checkpoint in the folder is good, or
            another process trains in the folder.
    """
    if not args.resume:
        return None
    lock = None
    if args.experiment and getattr(args, 'rank', 0) == 0:  # before a checkpoint is read that will not be the last
        try:
            lock = lock_folder(output_folder(args), create=False)
        except FolderInUse as error:
            raise ValueError(in_use(error)) from error
    point = _newest_point(args) if args.resume == 'auto' else _point_of_file(args.resume)
    if point is not None:
        point.lock = lock
    return point


def _point_of_file(path: str) -> ResumePoint:
    if not os.path.isfile(path):
        raise ValueError(f"--resume must be a checkpoint file or 'auto', got '{path}'")
    with load_errors(f'--resume: {path} cannot be loaded'):
        point = ResumePoint.read(path)
        point.check()
    return point


def _newest_point(args: argparse.Namespace) -> ResumePoint | None:
    paths, points = checkpoint_paths(output_folder(args)), []
    for path in paths:
        with _passed_over(path):
            points.append(ResumePoint.read(path))
    damaged = [path for path in paths if path not in [point.path for point in points]]
    for point in sorted(points, key=lambda point: point.place, reverse=True):
        with _passed_over(point.path):
            point.check()
            point.passed_over = damaged
            return point
        damaged.append(point.path)
    if paths:
        raise ValueError(f'--resume auto: no checkpoint in {output_folder(args)} can be read')
    return None


@contextmanager
def _passed_over(path: str) -> Iterator[None]:
    try:
        yield
    except NewerFormat as error:  # it is good, and must not be lost for an older one
        raise ValueError(f'--resume auto: {path} cannot be loaded: {error}') from error
    except LOAD_ERRORS as error:
        _logger.warning(f'{path} is damaged ({load_reason(error)}): an earlier checkpoint is taken if there is one.')


def resume_task(
    args: argparse.Namespace,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    point: ResumePoint,
    num_batches: int,
    class_to_idx: dict[str, int] | None = None,
) -> argparse.Namespace:
    """Load a training checkpoint, of this script or of timm's.

    Args:
        args: The flags.
        task, optimizer, scaler: What to load it into.
        point: The checkpoint.
        num_batches: Batches of an epoch now.
        class_to_idx: The numbers of the classes now, by name, if they have names.

    Returns:
        The flags, with what the checkpoint's optimizer has in the place of some.

    Raises:
        ValueError: It is of another model or, in the middle of an epoch, of other batches; or does not fit.
    """
    saved = point.content.get('args')
    if point.batch and point.format < FORMAT:
        raise ValueError(
            f'--resume must name a checkpoint of a whole epoch, {point.path} is of an earlier version, which had the '
            f'images of an epoch in another order, or with other draws (format {point.format}, now {FORMAT})'
        )
    kept = _check_flags(args, vars(saved) if isinstance(saved, argparse.Namespace) else {}, point)
    _check_classes(point, class_to_idx or {})
    if point.batch and point.state.get('num_batches') != num_batches:
        raise ValueError(
            f'--data-dir must hold the images that {point.path} is of, to go on in the middle of an epoch: it had '
            f'{point.state.get("num_batches")} batches, now it has {num_batches}'
        )
    with load_errors(f'--resume: {point.path} cannot be loaded (--no-resume-opt takes the weights alone)'):
        if not args.no_resume_opt:
            _check_same_optimizer(point.content, optimizer)
        resume_task_checkpoint(
            task,
            point.path,
            optimizer=None if args.no_resume_opt else optimizer,
            loss_scaler=None if args.no_resume_opt else scaler,
            log_info=args.rank == 0,
        )
        if task.has_ema():
            load_task_ema_checkpoint(task, point.path)
        load_generators(task, None if args.no_resume_opt else optimizer, point.state.get('generators') or {})
        ranks = point.state.get('ranks', [])
        if len(ranks) == args.world_size > 1:
            load_rank_state(task, ranks[args.rank])
    if kept and args.rank == 0:
        text = ', '.join(f'{flag(name)} {getattr(args, name)} (is {value})' for name, value in kept.items())
        _logger.warning(f"Without effect, the checkpoint's optimizer goes on: {text}. See --no-resume-opt.")
    return replaced(args, **kept)


def _check_flags(args: argparse.Namespace, saved: dict[str, Any], point: ResumePoint) -> dict[str, Any]:
    """Refuse or name flags that differ; those that an optimizer keeps are returned, with what it has."""

    def differs(name: str) -> bool:
        if name not in saved or not hasattr(args, name):
            return False
        old, new = saved[name], getattr(args, name)
        if name == 'model':  # without the tag of the pretrained weights
            return str(old).partition('.')[0] != str(new).partition('.')[0]
        return (list(old) if isinstance(old, tuple) else old) != (list(new) if isinstance(new, tuple) else new)

    for name in names_with(resume='fixed'):
        if differs(name) and not (name == 'opt' and args.no_resume_opt):
            hint = '; --no-resume-opt takes the weights alone' if name == 'opt' else ''
            raise ValueError(f'{flag(name)} must be {saved[name]}, as of {point.path}, got {getattr(args, name)}{hint}')
    if point.batch:
        for name in filter(differs, ['world_size', *names_with(resume='epoch')]):
            what = 'the number of processes' if name == 'world_size' else flag(name)
            raise ValueError(
                f'{what} must be {saved[name]}, as of {point.path}, to go on in the middle of an epoch, '
                f'got {getattr(args, name)}; --resume with a checkpoint of a whole epoch to change it'
            )
    kept = [] if args.no_resume_opt else list(filter(differs, names_with(resume='kept')))
    changed = [name for name in RULES if name not in {*names_with(resume='free'), *kept} and differs(name)]
    if changed and args.rank == 0:
        text = ', '.join(f'{flag(name)} {getattr(args, name)} (was {saved[name]})' for name in changed)
        _logger.warning(f'Not the run that {point.path} is of, other from here on: {text}')
    return {name: saved[name] for name in kept}


def _check_classes(point: ResumePoint, class_to_idx: dict[str, int]) -> None:
    """Refuse classes that have another number than the outputs that were trained for them."""
    if not point.class_to_idx or not class_to_idx:
        return
    for name, index in point.class_to_idx.items():
        if name not in class_to_idx:
            raise ValueError(f"--data-dir must have the class '{name}', as of {point.path}, got none of that name")
        if class_to_idx[name] != index:
            raise ValueError(
                f"--data-dir or --class-map must number the class '{name}' {index}, as of {point.path}, "
                f'got {class_to_idx[name]}; a --class-map with the {len(point.class_to_idx)} names in their order does'
            )


def _check_same_optimizer(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """torch takes the state of another optimizer without a word, and fails at the first step."""
    groups = saved.get('optimizer', {}).get('param_groups', [])
    # The schedule and timm add some to a group, and LAMB, Adan and others the number of steps, at their first one
    known = {'initial_lr', 'lr_scale', 'param_names', 'step', *optimizer.state_dict()['param_groups'][0]}
    if groups and not groups[0].keys() <= known:  # fewer are fine: torch adds some from version to version
        raise ValueError('it is of another optimizer; --no-resume-opt takes the weights alone')


def resume_schedule(scheduler: Any, lrs: list[float], point: ResumePoint | None, epoch: int, update: int) -> None:
    """Put a new schedule where it was.

    timm's schedules are functions of the epoch or the update; that of the plateau remembers.

    Args:
        scheduler: The schedule.
        lrs: The learning rates of the checkpoint, which building the schedule has overwritten.
        point: The checkpoint.
        epoch, update: Where to go on.
    """
    if not isinstance(scheduler, PlateauLRScheduler):
        scheduler.step(epoch)
        scheduler.step_update(update)
    elif point is not None and point.state.get('schedule'):
        state = dict(point.state['schedule'])
        scheduler.restore_lr = state.pop('restore_lr')
        scheduler.lr_scheduler.load_state_dict(state)
        for group, lr in zip(scheduler.optimizer.param_groups, lrs, strict=True):
            group['lr'] = lr
        if not point.batch:  # it was saved before this step
            scheduler.step(epoch, point.content.get('metric'))


def schedule_state(scheduler: Any) -> dict[str, Any] | None:
    """What a schedule remembers."""
    if not isinstance(scheduler, PlateauLRScheduler):
        return None
    return {**scheduler.lr_scheduler.state_dict(), 'restore_lr': scheduler.restore_lr}


def generator_states(task: TrainingTask, optimizer: Any) -> dict[str, torch.Tensor]:
    """What timm's parts keep beside their state: generators of their own, which are no function of the step.

    AdaHessian draws its probes so, and keeps the curvature itself where that is not measured in every step; the moving
    average of bfloat16 weights draws how it rounds.
    """
    states = {name: generator.get_state() for name, generator in _generators(task, optimizer).items()}
    optimizer = base_optimizer(optimizer)
    if getattr(optimizer, 'update_each', 1) > 1:
        states |= {f'curvature {i}': p.hess for i, p in enumerate(optimizer.get_params()) if torch.is_tensor(p.hess)}
    return states


def load_generators(task: TrainingTask, optimizer: Any, states: dict[str, torch.Tensor]) -> None:
    """Take over what `generator_states` gave; without an optimizer the rest of it."""
    for name, generator in _generators(task, optimizer).items():
        if name in states:
            generator.set_state(states[name])
    optimizer = base_optimizer(optimizer)
    if getattr(optimizer, 'update_each', 1) > 1:
        for i, p in enumerate(optimizer.get_params()):
            p.hess = states[f'curvature {i}'].to(p.device) if f'curvature {i}' in states else p.hess


def _generators(task: TrainingTask, optimizer: Any) -> dict[str, torch.Generator]:
    optimizer = base_optimizer(optimizer)
    if isinstance(getattr(optimizer, 'generator', None), torch.Generator):
        device = optimizer.param_groups[0]['params'][0].device
        if optimizer.generator.device != device:  # as it would do itself at its first step
            optimizer.generator = torch.Generator(device).manual_seed(optimizer.seed)
    found = {
        'optimizer': getattr(optimizer, 'generator', None),
        'ema': rounding_generator(task.get_trainable_module(ema=True)),
    }
    return {name: value for name, value in found.items() if isinstance(value, torch.Generator)}


def banks_are_kept(bank: FeatureBank, world_size: int) -> bool:
    """Whether checkpoints have the feature banks of all processes, and not that of the first alone."""
    return bool(world_size * bank.memory <= _BANKS)


def rank_state(task: TrainingTask, rank: int, world_size: int) -> dict[str, Any]:
    """What each process of several has for itself: BatchNorm's statistics, of the average too, and the feature bank.

    The bank of the first process is part of the state of its task.
    """
    state: dict[str, Any] = {'buffers': _buffers(task.get_eval_model())}
    if task.has_ema():
        state['ema_buffers'] = _buffers(task.get_eval_model(ema=True))
    if getattr(task, 'bank', None) is not None and rank and banks_are_kept(task.bank, world_size):
        state['bank'] = {name: value.cpu() for name, value in task.bank.state_dict().items()}
    return state


def load_rank_state(task: TrainingTask, state: dict[str, Any]) -> None:
    """Take over what `rank_state` gave."""
    unwrap_model(task.get_eval_model()).load_state_dict(state['buffers'], strict=False)
    if task.has_ema() and 'ema_buffers' in state:
        unwrap_model(task.get_eval_model(ema=True)).load_state_dict(state['ema_buffers'], strict=False)
    if getattr(task, 'bank', None) is not None and 'bank' in state:
        task.bank.load_state_dict(state['bank'], task.device)


def _buffers(model: Any) -> dict[str, torch.Tensor]:
    names = dict(unwrap_model(model).named_buffers())
    return {name: value.cpu() for name, value in unwrap_model(model).state_dict().items() if name in names}
