"""The training loss of the flags, in timm's terms and with timm's refusals."""

from __future__ import annotations

import argparse
from typing import Any

from timm_synermix.cli.checks import naming
from timm_synermix.cli.kwargs import mixup_active


def settle_loss(args: argparse.Namespace) -> None:
    """Make --loss of the flags that say the same, and the smoothing that which the task has if none is given.

    Raises:
        ValueError: They say different things.
    """
    for name in ('bce', 'jsd'):
        if getattr(args, f'{name}_loss'):
            if args.loss not in (None, name):
                raise ValueError(f'--{name}-loss and --loss {args.loss} cannot be used together')
            args.loss = name
    if args.bce_pos_weight is not None:
        weight = str(args.bce_pos_weight)
        if args.loss_pos_weight not in (None, weight):
            raise ValueError('--bce-pos-weight and --loss-pos-weight cannot be used together')
        args.loss_pos_weight = weight
    if args.smoothing is None:
        args.smoothing = 0.0 if args.task == 'multilabel' else 0.1


def check_task(args: argparse.Namespace) -> None:
    """Refuse what --task cannot do.

    Raises:
        ValueError: Names the flags.
    """
    if args.task == 'multilabel':
        if args.num_classes is None:
            raise ValueError('--task multilabel needs --num-classes')
        if args.kd_model_name:
            raise ValueError('--task multilabel and --kd-model-name cannot be used together')
    elif args.target_format == 'multihot':
        raise ValueError('--target-format multihot needs --task multilabel')


def check_loss(args: argparse.Namespace) -> None:
    """Refuse what timm's losses cannot do.

    Raises:
        ValueError: In timm's words, after the flag.
    """
    from timm.loss import create_classification_loss  # slow to import

    kwargs = criterion_kwargs(args)
    several = ' with --task multilabel' if args.task == 'multilabel' else ''
    with naming(f'--loss {args.loss}{several}' if args.loss else f'--loss{several}'):
        create_classification_loss(multi_label=args.task == 'multilabel', **kwargs)


def criterion_kwargs(args: argparse.Namespace, num_classes: int | None = None) -> dict[str, Any]:
    """The arguments of timm's `create_classification_loss`.

    Args:
        args: The flags.
        num_classes: The model's, which weights and counts must be of; None where it is not known yet.

    Raises:
        ValueError: Weights or counts of classes cannot be read, or are of another number of classes.
    """
    from timm.loss import load_class_stats, resolve_class_weights  # slow to import

    with naming('--class-stats'):
        stats = load_class_stats(args.class_stats)
    made = dict(power=args.loss_weight_power, beta=args.loss_weight_beta, max_weight=args.loss_weight_max)
    per_class: dict[str, Any] = {'class_counts': stats[0] if stats and args.loss == 'db' else None}
    for kind in ('pos_weight', 'class_weight'):
        with naming(flag := f'--loss-{kind.replace("_", "-")}'):
            per_class[kind] = resolve_class_weights(getattr(args, f'loss_{kind}'), kind, stats, **made)
    for name, values in per_class.items():
        if num_classes is not None and hasattr(values, 'numel') and values.numel() != num_classes:
            flag = '--class-stats' if name == 'class_counts' else f'--loss-{name.replace("_", "-")}'
            raise ValueError(f'{flag} has {values.numel()} entries but the model has {num_classes} classes')
    return dict(
        loss_type=args.loss,
        smoothing=args.smoothing,
        soft_targets=mixup_active(args) or bool(args.manifold_mixup),
        **per_class,
        num_samples=stats[1] if stats and args.loss == 'db' else None,
        jsd_splits=args.aug_splits,
        **{name: getattr(args, name) for name in ('bce_target_thresh', 'bce_sum', 'poly_epsilon', 'poly_gamma')},
    )
