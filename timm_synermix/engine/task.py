"""The task of a run and its mixing, from the flags of train.py."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from timm.data import Mixup
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from timm_synermix.cli.kwargs import mixed_in_collate, mixup_active, mixup_kwargs, synermix_task_kwargs
from timm_synermix.cli.loss import criterion_kwargs
from timm_synermix.task.manifold_mixup import ManifoldMixup
from timm_synermix.task.mixup import Mixer, RegMixup, create_mixup
from timm_synermix.task.synermix import SynerMixTask
from timm_synermix.utils.safe_load import load_reason

_logger = logging.getLogger(__name__)


def create_mixup_fn(
    args: argparse.Namespace, model: nn.Module, input_size: tuple[int, int, int], num_classes: int
) -> Mixer | None:
    """The inter-class mixing of the flags, but for that in timm's collate function.

    Raises:
        ValueError: A layer of Manifold MixUp cannot be mixed.
    """
    if args.manifold_mixup:
        try:
            mixup_fn = ManifoldMixup(
                model,
                num_classes,
                input_size,
                alpha=args.manifold_mixup,
                layers=args.manifold_mixup_layers,
                prob=args.mixup_prob,
                label_smoothing=args.smoothing,
            )
        except ValueError as error:
            raise ValueError(f'--manifold-mixup: {error}') from error
        if args.rank == 0:
            _logger.info(f'Manifold MixUp of {", ".join(mixup_fn.layers)}, alpha {args.manifold_mixup:g}')
        return mixup_fn
    if not mixup_active(args):
        return None
    kwargs = mixup_kwargs(args, num_classes)
    if args.regmixup:
        return RegMixup(create_mixup(**kwargs))
    if args.synermix:
        return create_mixup(**kwargs)
    return None if mixed_in_collate(args) else Mixup(**kwargs)


def create_task(args: argparse.Namespace, model: nn.Module, mixup_fn: Mixer | None) -> TrainingTask:
    """The training task: SynerMix, distillation, multi-label or plain classification."""
    common: dict[str, Any] = dict(
        criterion_kwargs=criterion_kwargs(args, args.num_classes),
        device=torch.device(args.device),
        dtype=getattr(torch, args.model_dtype or 'float32'),
        verbose=args.rank == 0,
    )
    if args.synermix:
        if args.synermix_gather and not args.distributed:
            _logger.warning('--synermix-gather has no effect in one process.')
        inter_task: TrainingTask | None = None
        if args.kd_model_name:
            inter_task = _create_distillation_task(args, model, dict(common))
        elif args.task == 'multilabel':
            inter_task = MultiLabelClassificationTask(model, threshold=args.multilabel_threshold, **common)
        return SynerMixTask(model, mixup_fn=mixup_fn, inter_task=inter_task, **synermix_task_kwargs(args), **common)
    if args.manifold_mixup:  # its L_inter alone: hidden layers are mixed in the task
        return SynerMixTask(model, mixup_fn=mixup_fn, beta=0.0, **common)
    if args.kd_model_name:
        return _create_distillation_task(args, model, common)
    if args.task == 'multilabel':
        return MultiLabelClassificationTask(model, threshold=args.multilabel_threshold, **common)
    return ClassificationTask(model, **common)


@torch.no_grad()
def check_teacher(args: argparse.Namespace, task: Any, input_size: tuple[int, int, int]) -> None:
    """Show the teacher of a distillation one black image, and say so if its classifier is not a trained one.

    A mean that has not the images' number of channels becomes its mean value, as it does for the loader.

    Raises:
        ValueError: It cannot take images of that size.
    """
    task = getattr(task, 'inter_task', None) or task
    teacher = task.teacher
    for module, name in ((task, 'student_mean'), (task, 'student_std'), (teacher, 'mean_kd'), (teacher, 'std_kd')):
        value = getattr(module, name)
        if value.shape[1] != input_size[0]:
            setattr(module, name, value.mean().repeat(1, input_size[0], 1, 1))
    black = teacher.mean_kd.new_zeros(1, *input_size) - teacher.mean_kd
    try:
        teacher(black / teacher.std_kd)
    except (AssertionError, RuntimeError, ValueError) as error:
        size, reason = 'x'.join(map(str, input_size)), ' '.join(str(error).split())
        message = f'--kd-model-name: the teacher {args.kd_model_name} cannot take images of {size}: {reason}'
        raise ValueError(message) from error
    known = (getattr(teacher.model, 'pretrained_cfg', None) or {}).get('num_classes', args.num_classes)
    if known != args.num_classes and args.kd_distill_type != 'feature' and args.rank == 0:
        _logger.warning(
            f'--kd-model-name: the teacher {args.kd_model_name} was trained on {known} classes, not on '
            f'{args.num_classes}: its classifier is a new one, at random; --kd-distill-type feature does without it'
        )


def _create_distillation_task(args: argparse.Namespace, model: nn.Module, common: dict[str, Any]) -> TrainingTask:
    try:
        return _distillation_task(args, model, common)
    except (ValueError, AssertionError, TypeError):
        raise
    except Exception as error:  # a teacher may have to be downloaded, and the hub's client has kinds of its own
        reason = load_reason(error)
        raise ValueError(f'--kd-model-name: the teacher {args.kd_model_name} cannot be had: {reason}') from error


def _distillation_task(args: argparse.Namespace, model: nn.Module, common: dict[str, Any]) -> TrainingTask:
    common.update(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    if args.kd_distill_type == 'feature':
        return FeatureDistillationTask(
            model,
            args.kd_model_name,
            student_feature_dim=args.kd_student_feature_dim,
            teacher_feature_dim=args.kd_teacher_feature_dim,
            **common,
        )
    if args.kd_distill_type == 'token':
        return TokenDistillationTask(
            model,
            args.kd_model_name,
            distill_type=args.kd_token_distill_type,
            temperature=args.kd_temperature,
            **common,
        )
    return LogitDistillationTask(
        model, args.kd_model_name, loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common
    )
