"""The parts of a run, built from the flags of train.py."""

from __future__ import annotations

import argparse
import logging
import os
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from timm_synermix.cli.checks import naming, replaced
from timm_synermix.cli.rules import flag
from timm_synermix.data.classes import class_names, class_to_idx
from timm_synermix.data.overview import log_cost
from timm_synermix.engine.checkpoint import RunSaver
from timm_synermix.engine.loaders import create_datasets, create_eval_loader, run_facts
from timm_synermix.engine.resume import banks_are_kept, resume_schedule, resume_task
from timm_synermix.engine.resume_point import ResumePoint
from timm_synermix.engine.run import Evaluation, Loaders, Place, Run, Trained
from timm_synermix.engine.run_folder import experiment_name, output_folder
from timm_synermix.engine.task import check_teacher, create_mixup_fn, create_task
from timm_synermix.engine.trackers import RunTrackers
from timm_synermix.engine.train_loader import create_train_loader, hold_training_images
from timm_synermix.features import FeatureHook
from timm_synermix.task.feature_bank import FeatureBank
from timm_synermix.utils.distributed import HostGroup

_logger = logging.getLogger(__name__)


def resolved(args: argparse.Namespace, accelerator: Accelerator) -> argparse.Namespace:
    """The flags with what is known once there are processes: device, rank and learning rate, under timm's names."""
    distributed = accelerator.num_processes > 1
    args = replaced(
        args,
        device=str(accelerator.device),
        distributed=distributed,
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
        local_rank=accelerator.local_process_index,
        workers=0 if args.on_device else args.workers,
        dist_bn='' if distributed and args.sync_bn else args.dist_bn,  # whose statistics are even already
    )
    return replaced(args, lr=resolve_lr(args))


def resolve_lr(args: argparse.Namespace) -> float:
    """--lr, or --lr-base scaled to the global batch as timm scales it; supplements do not count as batch."""
    if args.lr is not None:
        return args.lr
    scale = args.lr_base_scale
    if not scale:
        scale = 'sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear'
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    return args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def create_loaders(args: argparse.Namespace, data_config: dict[str, Any], group: HostGroup) -> Loaders:
    """The loaders of both sets, which all processes must find to be the same.

    Raises:
        ValueError: The data are not fit to train.
    """
    dataset_train, dataset_eval = create_datasets(args, data_config['input_size'][0], args.num_classes)
    if group.size > 1:  # the facts take a look at every label and file name
        group.check_same(run_facts(args, dataset_train, dataset_eval))
    held = hold_training_images(args, dataset_train, data_config) if args.on_device else None
    create_loader = partial(create_train_loader, args, dataset_train, data_config, args.num_classes, held)
    return Loaders(
        create_loader(clean_view=args.synermix_beta != 0),
        None if dataset_eval is None else create_eval_loader(args, dataset_eval, data_config),
        data_config,
        class_names(dataset_eval),
        {str(name): int(number) for name, number in class_to_idx(dataset_train).items()},
        partial(create_loader, clean_view=False),
    )


def create_trained(args: argparse.Namespace, model: nn.Module, data_config: dict[str, Any]) -> Trained:
    """The task around the model, its optimizer and, if wanted, its moving average."""
    mixup_fn = create_mixup_fn(args, model, data_config['input_size'], args.num_classes)
    task = create_task(args, model, mixup_fn)
    if args.kd_model_name:
        check_teacher(args, task, data_config['input_size'])
    # Parameters are named by the model; a distillation task may train a projection besides.
    trained = getattr(task.trainable_module, 'trainable', task.trainable_module) if args.kd_model_name else model
    given = {flag(name): value for name in ('opt_betas', 'opt_kwargs') if (value := getattr(args, name))}
    with naming(' '.join([f'--opt {args.opt}', *(f'{name} {value}' for name, value in given.items())])):
        optimizer = create_optimizer_v2(trained, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    if args.model_ema:
        ema_device = torch.device('cpu') if args.model_ema_force_cpu else None
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=ema_device)
    return Trained(task, optimizer, model=model, mixup_fn=mixup_fn)


def choose_eval_metric(args: argparse.Namespace, evaluator: Any, default: str) -> str:
    """The metric that ranks checkpoints; the training loss without validation.

    Args:
        args: The flags.
        evaluator: The task's; None without validation.
        default: What --eval-metric is where it is not given.

    Raises:
        ValueError: The evaluator does not know it.
    """
    if evaluator is None:
        return 'loss'
    if args.eval_metric in evaluator.metric_names:
        return args.eval_metric
    if args.eval_metric == default:
        return evaluator.default_metric
    raise ValueError(f'--eval-metric must be one of {", ".join(evaluator.metric_names)}, got {args.eval_metric}')


def start_place(
    args: argparse.Namespace, trained: Trained, scaler: Any, loaders: Loaders, point: ResumePoint | None
) -> tuple[argparse.Namespace, Place]:
    """The flags, and where the run starts, with the state of a checkpoint loaded if it goes on from one.

    Raises:
        ValueError: The checkpoint is of another run, or the flags want an epoch that there is not.
    """
    place = Place(updates_per_epoch=-(-len(loaders.train) // args.grad_accum_steps))
    if point is not None:
        args = resume_task(
            args, trained.task, trained.optimizer, scaler, point, len(loaders.train), loaders.class_to_idx
        )
        place.start_epoch, place.start_batch = point.place
    if args.start_epoch is not None:
        place.start_epoch, place.start_batch = args.start_epoch, 0
    if point is not None and place.start_batch:
        place.resumed_losses = point.state['ranks'][args.rank]['losses']
    return args, place


def create_schedule(
    args: argparse.Namespace, trained: Trained, place: Place, point: ResumePoint | None, eval_metric: str
) -> None:
    """The learning rate's schedule, put where the run starts, and the epoch that the run ends before.

    Raises:
        ValueError: --start-epoch or --stop-epoch is beyond the run.
    """
    lrs = [group['lr'] for group in trained.optimizer.param_groups]  # of the checkpoint
    with naming(f'--sched {args.sched}'):
        trained.scheduler, num_epochs = create_scheduler_v2(
            trained.optimizer,
            **scheduler_kwargs(args, decreasing_metric=eval_metric == 'loss'),
            updates_per_epoch=place.updates_per_epoch,
        )
    if args.stop_epoch is not None and args.stop_epoch > num_epochs:
        raise ValueError(f'--stop-epoch must be at most the {num_epochs} epochs of the run, got {args.stop_epoch}')
    if args.start_epoch is not None and args.start_epoch > num_epochs:
        raise ValueError(f'--start-epoch must be at most the {num_epochs} epochs of the run, got {args.start_epoch}')
    place.num_epochs, place.stop_epoch = num_epochs, args.stop_epoch or num_epochs
    if trained.scheduler is not None and (place.start_epoch or place.start_batch):
        num_updates = place.start_epoch * place.updates_per_epoch + -(-place.start_batch // args.grad_accum_steps)
        kept = None if args.no_resume_opt else point
        resume_schedule(trained.scheduler, lrs, kept, place.start_epoch, num_updates)


def averages_count(args: argparse.Namespace, task: TrainingTask) -> bool:
    """Whether the metrics of a run are those of the moving average: if there is one on the device."""
    return task.has_ema() and not args.model_ema_force_cpu


def prepare(args: argparse.Namespace, accelerator: Accelerator, trained: Trained, metric: str) -> Evaluation:
    """Compile and distribute what is trained, and hook the model that is evaluated, if cohesion is wanted of it.

    Raises:
        ValueError: --report has nothing to show, as there is not the memory to measure cohesion.
    """
    task, evaluation = trained.task, Evaluation(metric)
    if args.cohesion:  # before compile, which does not see later hooks
        hook = FeatureHook(unwrap_model(task.get_eval_model(ema=averages_count(args, task))))
        evaluation.cohesion_device = cohesion_device(args, hook.feature_dim, accelerator.device)
        evaluation.hook = None if evaluation.cohesion_device is None else hook
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    task.trainable_module = accelerator.prepare_model(task.trainable_module)
    trained.optimizer = accelerator.prepare_optimizer(trained.optimizer)
    return evaluation


def cohesion_device(args: argparse.Namespace, feature_dim: int, device: torch.device) -> torch.device | None:
    """Where the cohesion metrics are computed, None for nowhere; says so if it is not the device.

    Raises:
        ValueError: Nowhere, and --report has nothing to show then.
    """
    from timm_synermix.metrics import cohesion_place  # slow to import

    place = cohesion_place(args.num_classes, feature_dim, device, args.cohesion_memory)
    if place.device is None and args.report:
        raise ValueError(f'--report needs the cohesion metrics. {place.reason}')
    if place.reason and args.rank == 0:
        _logger.warning(place.reason)
    return place.device


def keep_files(run: Run, args_text: str, point: ResumePoint | None) -> None:
    """Give the run a folder and trackers, in the main process: the last thing that is built, and the first written.

    Raises:
        ValueError: The folder cannot be written to, or a tracker cannot be started.
    """
    args, place = run.args, run.place
    complete = place.start_epoch >= place.stop_epoch
    if complete:
        _logger.info(f'Nothing to do: {place.start_epoch} of {place.stop_epoch} epochs are done.')
        if args.report and point is not None:
            folder = os.path.dirname(point.path)
            _logger.warning(f'No report without training: validate.py --compare {folder} --report DIR')
    # A complete run may have ended before its last checkpoint was compared with the best.
    in_place = bool(args.experiment) and point is not None and point.is_last and point.is_in(output_folder(args))
    if args.rank > 0 or (complete and not in_place):
        return
    run.args = args = replaced(args, experiment=experiment_name(args, run.loaders.data_config['input_size'][-1]))
    saver = run.keeper.saver = RunSaver(
        output_folder(args),
        args_text,
        resume_from=point,
        start=(place.start_epoch, place.start_batch),
        complete=complete,
        model=run.trained.model,
        task=run.trained.task,
        optimizer=run.trained.optimizer.optimizer,
        args=args,
        amp_scaler=run.accelerator.scaler,
        decreasing=run.evaluation.metric == 'loss',
        max_history=args.checkpoint_hist,
    )
    if not complete:
        log_start(run)
        with saver.discarded_unless_built():
            run.keeper.trackers = RunTrackers(run.accelerator, args, saver.checkpoint_dir, point)
        saver.args = run.args = replaced(args, wandb_run_id=run.keeper.trackers.wandb_run_id)


def log_start(run: Run) -> None:
    """Say what is about to be trained, on what and how."""
    args, task, place = run.args, run.trained.task, run.place
    params = sum(p.numel() for p in task.get_eval_model().parameters())
    _logger.info(f'Model {args.model}: {params:,} parameters, {args.num_classes} classes')
    _logger.info('Images: ' + ', '.join(f'{name} {value}' for name, value in run.loaders.data_config.items()))
    amp = {'no': 'no', 'fp16': 'float16', 'bf16': 'bfloat16'}.get(run.accelerator.mixed_precision, '8 bits')
    versions = ', '.join(f'{name} {version(name)}' for name in ('torch', 'timm', 'accelerate'))
    _logger.info(
        f'{args.world_size} process(es) on {args.device}, {amp} autocast, learning rate {args.lr:g}; {versions}'
    )
    if args.synermix:
        mixed = args.synermix_num_mixed or 'all'
        _logger.info(f'SynerMix: beta {task.beta}, images mixed per class {mixed}, {args.synermix_batch} batches')
        if task.bank is not None:
            log_bank(task.bank, args.world_size)
        rows = task.layout.splits * (2 if args.regmixup else 1)
        log_cost(getattr(run.loaders.train.batch_sampler, 'batch_sampler', None), task.beta, rows)
    unit = 'epoch' if run.trained.scheduler is None or run.trained.scheduler.t_in_epochs else 'update'
    _logger.info(f'Epochs: {place.num_epochs}, learning rate stepped per {unit}. Output: {output_folder(args)}')


def log_bank(bank: FeatureBank, world_size: int) -> None:
    """Say how large the feature banks are, and whether a checkpoint has them all."""
    size, total = bank.memory / 1e6, world_size * bank.memory / 1e6
    each = f', {total:,.0f} MB in {world_size} processes' if world_size > 1 else ''
    _logger.info(f'SynerMix: the feature bank takes {size:,.1f} MB{each}')
    if not banks_are_kept(bank, world_size):
        _logger.warning(
            'Checkpoints have the feature bank of the first process alone, as all are above 1 GB: a run that goes on '
            'is not exact.'
        )
