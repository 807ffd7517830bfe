#!/usr/bin/env python3
"""Train an image classifier: timm's train.py, with SynerMix as one flag.

    python train.py --data-dir DIR --model resnet50 --mixup 0.2 --synermix

takes every flag of timm's script with timm's defaults, writes the same files, and without --synermix trains as timm
does. Read it from `main` down: parse, build, loop.
"""

import argparse
import difflib
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import timm
import torch
import torchvision.utils
from accelerate import Accelerator
from timm import create_model
from timm.data import resolve_input_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad, distribute_bn, random_seed, set_jit_fuser, setup_default_logging
from torch import Tensor, nn

from timm_synermix.build import (
    create_accelerator,
    create_datasets,
    create_eval_loader,
    create_mixup_fn,
    create_task,
    create_train_loader,
    resolve_lr,
)
from timm_synermix.checkpoint import RunSaver, output_folder, resume_path, resume_task
from timm_synermix.cli import create_parsers, parse_args, usage_errors
from timm_synermix.evaluate import evaluate
from timm_synermix.tracking import (
    LossMeter,
    TrainProgress,
    append_summary,
    print_results,
    start_trackers,
    summary_row,
)

_logger = logging.getLogger('train')
config_parser, parser = create_parsers()


def _parse_args() -> tuple[argparse.Namespace, str]:
    return parse_args(config_parser, parser)


def main() -> None:
    setup_default_logging()
    args, args_text = _parse_args()

    # Build. What a user got wrong ends here, in one line, with nothing written.
    with usage_errors(parser):
        accelerator = create_accelerator(args)
        if args.rank > 0:
            logging.getLogger().setLevel(logging.WARNING)
        random_seed(args.seed, args.rank)
        model, data_config = build_model(args)
        num_classes = args.num_classes = model.num_classes if args.num_classes is None else args.num_classes
        dataset_train, dataset_eval = create_datasets(args, data_config['input_size'][0], num_classes)
        loader_train = create_train_loader(args, dataset_train, data_config, num_classes, synermix=args.synermix)
        loader_eval = None if dataset_eval is None else create_eval_loader(args, dataset_eval, data_config)
        mixup_fn = create_mixup_fn(args, num_classes)
        task = create_task(args, model, mixup_fn)

        args.lr = resolve_lr(args)
        # Parameters are named by the model; a distillation task may train a projection besides.
        trained = task.get_trainable_module() if args.kd_model_name else model
        optimizer = create_optimizer_v2(trained, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
        if args.model_ema:
            ema_device = torch.device('cpu') if args.model_ema_force_cpu else None
            task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=ema_device)
        resume_from = resume_path(args)
        start_epoch = resume_task(args, task, optimizer, accelerator.scaler, resume_from) if resume_from else 0
        start_epoch = start_epoch if args.start_epoch is None else args.start_epoch

        updates_per_epoch = -(-len(loader_train) // args.grad_accum_steps)
        scheduler, num_epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch
        )
        if args.stop_epoch is not None and args.stop_epoch > num_epochs:
            raise ValueError(f'--stop-epoch must be at most the {num_epochs} epochs of the run, got {args.stop_epoch}')
        stop_epoch = args.stop_epoch or num_epochs
        evaluator = task.create_evaluator()
        eval_metric = choose_eval_metric(args, None if loader_eval is None else evaluator)

    # Launch: compile, then let Accelerate wrap what is trained.
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    task.trainable_module = accelerator.prepare_model(task.trainable_module)
    accelerated_optimizer = accelerator.prepare_optimizer(optimizer)
    if scheduler is not None and start_epoch > 0:
        scheduler.step_update(start_epoch * updates_per_epoch) if args.sched_on_updates else scheduler.step(start_epoch)

    saver = output_dir = None
    if args.rank == 0:
        output_dir = output_folder(args, data_config['input_size'][-1])
        with usage_errors(parser):
            saver = RunSaver(
                output_dir,
                args_text,
                resume_from=resume_from,
                start_epoch=start_epoch,
                model=model,
                task=task,
                optimizer=optimizer,
                args=args,
                amp_scaler=accelerator.scaler,
                decreasing=eval_metric == 'loss',
                max_history=args.checkpoint_hist,
            )
        log_start(args, task, loader_train, num_epochs, scheduler, output_dir)
    start_trackers(accelerator, args, output_dir)

    results: list[dict[str, Any]] = []
    try:
        for epoch in range(start_epoch, stop_epoch):
            if args.synermix and args.synermix_off_epoch and epoch == max(args.synermix_off_epoch, start_epoch):
                _logger.info('SynerMix is off from epoch %d on.', epoch)
                loader_train = create_train_loader(args, dataset_train, data_config, num_classes, synermix=False)
            if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
                loader_train.mixup_enabled = False  # where the collate function mixes
                if mixup_fn is not None:
                    mixup_fn.mixup_enabled = False
            set_epoch(loader_train, dataset_train, epoch)

            train_metrics = train_one_epoch(
                epoch,
                accelerator,
                task,
                loader_train,
                accelerated_optimizer,
                args,
                num_updates=epoch * updates_per_epoch,
                scheduler=scheduler,
                mixup_fn=mixup_fn,
                saver=saver,
            )
            if args.distributed and args.dist_bn in ('broadcast', 'reduce'):
                distribute_bn(task.trainable_module, args.world_size, args.dist_bn == 'reduce')

            due = (epoch + 1) % args.val_interval == 0 or epoch + 1 in (args.save_epochs or ())
            if not due and epoch + 1 != stop_epoch:
                if scheduler is not None:
                    scheduler.step(epoch + 1, metric=None)
                continue
            eval_metrics = None if loader_eval is None else evaluate_task(accelerator, task, loader_eval, args)

            metric = (eval_metrics or train_metrics)[eval_metric]
            if saver is not None:
                lr = sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)
                row = summary_row(epoch, train_metrics, eval_metrics, lr)
                append_summary(saver.summary_path, row)
                saver.save_checkpoint(epoch, metric=metric)
                if epoch + 1 in (args.save_epochs or ()):
                    saver.save_milestone(epoch + 1)
                accelerator.log(row)
            if scheduler is not None:
                scheduler.step(epoch + 1, metric)
            results.append({'epoch': epoch, 'train': train_metrics})
            if eval_metrics:
                results[-1]['validation'] = eval_metrics
    except KeyboardInterrupt:
        if saver is not None:
            _logger.info(
                'Interrupted. Continue after the last finished epoch with --resume %s',
                os.path.join(saver.checkpoint_dir, 'last.pth.tar'),
            )
        sys.exit(130)  # the shell's code for SIGINT

    if saver is not None:
        if saver.best_metric is not None:
            _logger.info(f'*** Best {eval_metric}: {saver.best_metric:.4f} (epoch {saver.best_epoch})')
        print_results(results, eval_metric, decreasing=eval_metric == 'loss')
    accelerator.end_training()


def build_model(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model on its device, and the data configuration that fits it.

    Raises:
        ValueError: The model is unknown or has no classifier, a file of weights is missing, or the model cannot take
            the input asked for.
    """
    set_fast_norm(args.fast_norm)
    if args.fuser:
        set_jit_fuser(args.fuser)
    for flag in ('pretrained_path', 'initial_checkpoint'):
        path = getattr(args, flag)
        if path and not os.path.exists(path):
            raise ValueError(f"--{flag.replace('_', '-')} must be a file of weights, got '{path}'")
    kwargs: dict[str, Any] = dict(
        in_chans=args.in_chans or (args.input_size[0] if args.input_size else 3),
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_connect if args.drop_path is None else args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        **args.model_kwargs,
    )
    if args.pretrained_path:  # takes the place of the model's own weights; -1 fits the classifier to num_classes
        kwargs['pretrained_cfg_overlay'] = dict(file=args.pretrained_path, num_classes=-1)
    name = args.model
    try:
        kwargs = resolve_model_input_args(name, args=vars(args), **kwargs)
        name = kwargs.pop('model_name')
    except RuntimeError:
        pass  # no timm model: then create_model says so, unless a caller has put another in its place
    try:
        model = create_model(
            name,
            pretrained=args.pretrained or bool(args.pretrained_path),
            scriptable=args.torchscript,
            checkpoint_path=args.initial_checkpoint,
            **kwargs,
        )
    except RuntimeError as error:
        if 'Unknown model' not in str(error):
            raise
        close = difflib.get_close_matches(args.model, timm.list_models())
        hint = f'; did you mean {", ".join(close)}?' if close else ''
        raise ValueError(f"--model must be a timm model, got '{args.model}'{hint}") from error
    if model.num_classes < 1:
        raise ValueError(f'--model {args.model} has no classifier: encoder-only models and --num-classes 0 have none')
    if args.head_init_scale is not None or args.head_init_bias is not None:
        init_head(model.get_classifier(), args.head_init_scale, args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    data_config = resolve_input_data_config(model, args=vars(args), verbose=args.rank == 0)
    return place_model(args, model), data_config


@torch.no_grad()
def init_head(head: Any, scale: float | None, bias: float | None) -> None:
    if scale is not None:
        head.weight.mul_(scale)
        head.bias.mul_(scale)
    if bias is not None:
        nn.init.constant_(head.bias, bias)


def place_model(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """Convert what the flags want converted, and move the model to its device, type and memory layout."""
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    if args.distributed and args.sync_bn:
        args.dist_bn = ''  # the statistics are even already
        model = convert_sync_batchnorm(model)
    model.to(device=args.device, dtype=getattr(torch, args.model_dtype or 'float32'))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    return torch.jit.script(model) if args.torchscript else model


def choose_eval_metric(args: argparse.Namespace, evaluator: Any) -> str:
    """The metric that ranks checkpoints; the training loss without validation."""
    if evaluator is None:
        return 'loss'
    if args.eval_metric in evaluator.metric_names:
        return args.eval_metric
    if args.eval_metric == parser.get_default('eval_metric'):
        return evaluator.default_metric
    raise ValueError(f'--eval-metric must be one of {", ".join(evaluator.metric_names)}, got {args.eval_metric}')


def set_epoch(loader: Any, dataset: Any, epoch: int) -> None:
    """Tell whatever draws the order of the images which epoch it is."""
    for part in (dataset, loader.batch_sampler, loader.sampler):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)


def log_start(
    args: argparse.Namespace, task: TrainingTask, loader: Any, num_epochs: int, scheduler: Any, output_dir: str
) -> None:
    params = sum(p.numel() for p in task.get_eval_model().parameters())
    _logger.info(f'Model {args.model}: {params:,} parameters, {args.num_classes} classes')
    _logger.info(f'{args.world_size} process(es) on {args.device}, amp: {args.amp and args.amp_dtype}, lr: {args.lr:g}')
    if args.synermix:
        extra = getattr(loader.batch_sampler, 'expected_supplements', float)()
        _logger.info(
            f'SynerMix: beta {task.beta}, {args.synermix_forward} forward, images per class '
            f'{args.synermix_num_mixed or "all"}, about {extra:.1f} supplements per batch of {args.batch_size} '
            f'(+{100 * extra / args.batch_size:.0f} %)'
        )
    unit = 'epoch' if scheduler is None or scheduler.t_in_epochs else 'update'
    _logger.info(f'Epochs: {num_epochs}, learning rate stepped per {unit}. Output: {output_dir}')


def train_one_epoch(
    epoch: int,
    accelerator: Accelerator,
    task: TrainingTask,
    loader: Any,
    optimizer: Any,
    args: argparse.Namespace,
    num_updates: int = 0,
    scheduler: Any = None,
    mixup_fn: Any = None,
    saver: RunSaver | None = None,
) -> dict[str, float]:
    """Train for one epoch and return the mean of every scalar the task reports, over all processes."""
    task.train()
    meter = LossMeter(accelerator)
    updates = -(-len(loader) // args.grad_accum_steps)
    progress = TrainProgress(args, epoch, updates)
    second_order = getattr(optimizer.optimizer, 'is_second_order', False)
    optimizer.zero_grad()
    samples, data_time = 0, 0.0
    for batch, input, target, waited in timed_batches(loader):
        update = batch // args.grad_accum_steps
        window = min(args.grad_accum_steps, len(loader) - update * args.grad_accum_steps)
        update_due = batch + 1 == len(loader) or (batch + 1) % args.grad_accum_steps == 0
        input, target = input.to(accelerator.device), target.to(accelerator.device)
        if mixup_fn is not None and not args.synermix:  # SynerMixTask mixes by itself, after taking the clean views
            input, target = mixup_fn(input, target)
        if args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)

        with gradient_sync(accelerator, task, update_due):
            with accelerator.autocast():
                result = task(input, target)
            loss = result['loss'] * batch_loss_scale(args, len(target)) / window
            accelerator.backward(loss, create_graph=second_order)
        meter.update(result, len(target))
        samples, data_time = samples + len(target), data_time + waited
        if not update_due:
            continue

        if args.clip_grad is not None:
            accelerator.unscale_gradients()
            parameters = task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
            dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        optimizer.step()
        optimizer.zero_grad()
        num_updates += 1
        task.update_ema(step=num_updates)
        if args.synchronize_step and accelerator.device.type == 'cuda':
            torch.cuda.synchronize()

        lr = optimizer.param_groups[0]['lr']
        if progress.update(update, samples, data_time, meter, lr) and args.save_images and saver is not None:
            path = os.path.join(saver.checkpoint_dir, f'train-batch-{batch}.jpg')
            torchvision.utils.save_image(input, path, padding=0, normalize=True)
        samples, data_time = 0, 0.0
        if saver is not None and args.recovery_interval and (update + 1) % args.recovery_interval == 0:
            saver.save_recovery(epoch, batch_idx=update)
        if scheduler is not None:
            scheduler.step_update(num_updates=num_updates)
    if hasattr(optimizer.optimizer, 'sync_lookahead'):
        optimizer.optimizer.sync_lookahead()
    progress.close()
    return meter.reduce()


def timed_batches(loader: Any) -> Iterator[tuple[int, Tensor, Tensor, float]]:
    """The batches of a loader, numbered, each with the seconds it kept the loop waiting."""
    start = time.time()
    for batch, (input, target) in enumerate(loader):
        yield batch, input, target, time.time() - start
        start = time.time()


def gradient_sync(accelerator: Accelerator, task: TrainingTask, update_due: bool) -> Any:
    """Average gradients across processes in the backward pass only where an update follows."""
    return nullcontext() if update_due else accelerator.no_sync(task.trainable_module)


def batch_loss_scale(args: argparse.Namespace, batch_size: int) -> float:
    """Factor of the loss where scheduled image sizes make the batch size vary."""
    power = {'none': 0.0, 'sqrt': 0.5, 'linear': 1.0}[args.variable_batch_loss_scale]
    return (batch_size / args.batch_size) ** power


def evaluate_task(
    accelerator: Accelerator, task: TrainingTask, loader: Any, args: argparse.Namespace
) -> dict[str, float]:
    """Metrics of the model, or of its moving average if there is one on the device."""
    kwargs = dict(channels_last=args.channels_last, tta=args.tta)
    metrics = evaluate(accelerator, task.get_eval_model(), loader, task.create_evaluator(), **kwargs)
    if task.has_ema() and not args.model_ema_force_cpu:
        if args.distributed and args.dist_bn in ('broadcast', 'reduce'):
            distribute_bn(task.get_eval_model(ema=True), args.world_size, args.dist_bn == 'reduce')
        ema = task.get_eval_model(ema=True)
        metrics = evaluate(accelerator, ema, loader, task.create_evaluator(), log_name='Test (EMA)', **kwargs)
    return metrics


if __name__ == '__main__':
    main()
