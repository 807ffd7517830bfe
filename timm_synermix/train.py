"""Train an image classifier: timm's train.py, with SynerMix as one flag.

    python train.py --data-dir DIR --model resnet50 --mixup 0.2 --synermix

takes every flag of timm's script with timm's defaults, writes the same files, and without --synermix trains as timm
does. Read it from `main` down: parse, build, loop.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING, Any

from timm_synermix.cli.checks import usage_errors
from timm_synermix.cli.sweep import join_attempt as _join_sweep_attempt  # noqa: F401  # timm's tests ask for both
from timm_synermix.cli.sweep import lock_fds as _sweep_lock_fds  # noqa: F401
from timm_synermix.cli.train_args import create_parsers, parse_args

if __name__ == '__main__':  # run the one module of this name, once the flags are known to be right
    from timm_synermix import entry

    entry.train()
    sys.exit()

import torch
import torchvision.utils
from accelerate import Accelerator
from timm import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask
from timm.utils import (
    dispatch_clip_grad,
    distribute_bn,
    random_seed,
    setup_default_logging,
    unwrap_model,
)
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from timm_synermix.data.dataset import UnreadableImage, warn_of_skipped
from timm_synermix.data.dataset_factory import class_names
from timm_synermix.engine.accelerator import create_train_accelerator
from timm_synermix.engine.build import create_mixup_fn, create_task, resolve_lr
from timm_synermix.engine.checkpoint import (
    RunSaver,
    SaveError,
    experiment_name,
    how_to_continue,
    output_folder,
    save_errors,
)
from timm_synermix.engine.evaluate import evaluate
from timm_synermix.engine.loaders import create_datasets, create_eval_loader, create_train_loader, run_facts, set_epoch
from timm_synermix.engine.loss_guard import LossGuard, NonFiniteLoss
from timm_synermix.engine.progress import LossMeter, TrainProgress
from timm_synermix.engine.reporting import ReportedEpoch, best_or_last, write_run_report
from timm_synermix.engine.resume import find_resume_point, rank_state, resume_schedule, resume_task, schedule_state
from timm_synermix.engine.trackers import RunTrackers
from timm_synermix.features import FeatureHook
from timm_synermix.functional import synermix_loss
from timm_synermix.models.factory import build_model
from timm_synermix.task.synermix import SynerMixTask
from timm_synermix.utils.distributed import HostGroup, lost_process
from timm_synermix.utils.random import seed_everything, seed_of
from timm_synermix.utils.signals import Stopped, StopRequest
from timm_synermix.utils.summary import append_summary, print_results, summary_row

if TYPE_CHECKING:
    from timm_synermix.metrics import Cohesion

_logger = logging.getLogger(__name__)
config_parser, parser = create_parsers()


def _parse_args() -> tuple[argparse.Namespace, str]:
    return parse_args(config_parser, parser)


@dataclass
class Run:
    """The parts of a training run."""

    args: argparse.Namespace
    accelerator: Accelerator
    task: Any
    optimizer: Any  # Accelerate's, around timm's
    loader_train: Any
    loader_eval: Any = None
    mixup_fn: Any = None
    scheduler: Any = None
    create_loader_without_clean_views: Callable[[], Any] | None = None  # for --synermix-off-epoch
    updates_per_epoch: int = 0
    start_epoch: int = 0
    start_batch: int = 0  # of the first epoch, if the run goes on in the middle of it
    stop_epoch: int = 0
    eval_metric: str = 'loss'
    data_config: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    feature_hook: FeatureHook | None = None  # for --cohesion, on the model that evaluation reports
    cohesion: Cohesion | None = None  # of the last evaluation
    reported: ReportedEpoch | None = None  # what the report shows; of the main process
    saver: RunSaver | None = None  # of the main process
    trackers: RunTrackers | None = None  # of the main process
    resumed_losses: dict[str, Any] | None = None  # the sums of the first epoch, if the run goes on in the middle of it
    meter: LossMeter | None = None  # of the epoch
    done_batches: int = 0  # of the epoch, up to the last update
    guard: LossGuard = field(default_factory=lambda: LossGuard([], HostGroup()))
    stop: StopRequest = field(default_factory=lambda: StopRequest(HostGroup()))
    results: list[dict[str, Any]] = field(default_factory=list)


def main() -> None:
    setup_default_logging()
    args, args_text = _parse_args()
    try:
        with usage_errors(parser):  # what a user got wrong ends here, in one line, with nothing written
            run = build(args, args_text)
        fit(run)
    except KeyboardInterrupt:
        if getattr(args, 'rank', 0) == 0:  # a run that is not built yet has no rank
            _logger.info(f'Interrupted. {how_to_continue(args)}')
        sys.exit(130)  # the shell's code for SIGINT
    except Stopped as stopped:
        if args.rank == 0:
            _logger.info(f'Interrupted. {how_to_continue(args)}')
        run.accelerator.end_training()
        sys.exit(128 + stopped.signum)  # 130 for SIGINT, 143 for SIGTERM
    except (NonFiniteLoss, SaveError, UnreadableImage) as error:
        if args.rank == 0 or not isinstance(error, NonFiniteLoss):  # which all processes raise
            reason = str(error).splitlines()[-1].rpartition('UnreadableImage: ')[2]  # a worker's has its traceback
            hint = '. See --lr and --max-bad-steps' if isinstance(error, NonFiniteLoss) else ''
            _logger.error(f'Stopped: {reason}{hint}. {how_to_continue(args)}')
        sys.exit(1)
    except RuntimeError as error:
        if getattr(args, 'world_size', 1) == 1 or not lost_process(error):
            raise
        _logger.error(f'Stopped: another process of the run has ended. {how_to_continue(args)}')
        sys.exit(1)
    if args.rank == 0:
        if run.results and run.saver is not None and run.saver.best_metric is not None:
            _logger.info(f'*** Best {run.eval_metric}: {run.saver.best_metric:.4f} (epoch {run.saver.best_epoch})')
            if args.report and run.reported is not None:
                write_run_report(run, run.reported)
        print_results(run.results, run.eval_metric, decreasing=run.eval_metric == 'loss')
    run.accelerator.end_training()


def build(args: argparse.Namespace, args_text: str) -> Run:
    """Build a run from its flags: device, model, data, task, optimizer, schedule, and last the output folder.

    Raises:
        ValueError: The flags, the data or the model are not fit to train.
    """
    accelerator = create_train_accelerator(args)
    group = HostGroup()
    if args.rank > 0:
        logging.getLogger().setLevel(logging.WARNING)
    random_seed(args.seed)  # every process builds the same model, so that their averages (EMA) start alike
    model, data_config = build_model(create_model, args)
    random_seed(args.seed, args.rank)

    num_classes = args.num_classes = model.num_classes if args.num_classes is None else args.num_classes
    dataset_train, dataset_eval = create_datasets(args, data_config['input_size'][0], num_classes)
    if group.size > 1:  # the facts take a look at every label and file name
        group.check_same(run_facts(args, dataset_train, dataset_eval))
    create_loader = partial(create_train_loader, args, dataset_train, data_config, num_classes)
    loader_train = create_loader(clean_view=args.synermix_beta != 0)
    loader_eval = None if dataset_eval is None else create_eval_loader(args, dataset_eval, data_config)
    mixup_fn = create_mixup_fn(args, model, data_config['input_size'], num_classes)
    task = create_task(args, model, mixup_fn)
    eval_metric = choose_eval_metric(args, None if loader_eval is None else task.create_evaluator())

    args.lr = resolve_lr(args)
    # Parameters are named by the model; a distillation task may train a projection besides.
    trained = task.get_trainable_module() if args.kd_model_name else model
    optimizer = create_optimizer_v2(trained, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    if args.model_ema:
        ema_device = torch.device('cpu') if args.model_ema_force_cpu else None
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=ema_device)
    point = find_resume_point(args)
    group.check_same({'the checkpoint of --resume': point and point.place})
    start_epoch = start_batch = 0
    if point is not None:
        resume_task(args, task, optimizer, accelerator.scaler, point, len(loader_train))
        start_epoch, start_batch = point.place
    if args.start_epoch is not None:
        start_epoch, start_batch = args.start_epoch, 0

    updates_per_epoch = -(-len(loader_train) // args.grad_accum_steps)
    if args.synermix and args.synermix_interval > updates_per_epoch:
        message = f'--synermix-interval must be at most the {updates_per_epoch} updates of an epoch'
        raise ValueError(f'{message}, got {args.synermix_interval}')
    lrs = [group['lr'] for group in optimizer.param_groups]
    scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        **scheduler_kwargs(args, decreasing_metric=eval_metric == 'loss'),
        updates_per_epoch=updates_per_epoch,
    )
    if args.stop_epoch is not None and args.stop_epoch > num_epochs:
        raise ValueError(f'--stop-epoch must be at most the {num_epochs} epochs of the run, got {args.stop_epoch}')
    if scheduler is not None and (start_epoch or start_batch):
        num_updates = start_epoch * updates_per_epoch + -(-start_batch // args.grad_accum_steps)
        resume_schedule(scheduler, lrs, None if args.no_resume_opt else point, start_epoch, num_updates)

    feature_hook = None
    if args.cohesion:  # before compile, which does not see later hooks
        feature_hook = FeatureHook(unwrap_model(task.get_eval_model(ema=averages_count(args, task))))
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    task.trainable_module = accelerator.prepare_model(task.trainable_module)
    stop_epoch = args.stop_epoch or num_epochs
    complete = start_epoch >= stop_epoch
    num_bad_steps = 0 if point is None else point.state.get('num_bad_steps', 0)
    saver = trackers = None
    if complete:
        _logger.info(f'Nothing to do: {start_epoch} of {stop_epoch} epochs are done.')
        if args.report and point is not None:
            folder = os.path.dirname(point.path)
            _logger.warning(f'No report without training: validate.py --compare {folder} --report DIR')
    # A complete run may have ended before its last checkpoint was compared with the best.
    in_place = bool(args.experiment) and point is not None and point.is_last and point.is_in(output_folder(args))
    if args.rank == 0 and (not complete or in_place):
        args.experiment = experiment_name(args, data_config['input_size'][-1])
        saver = RunSaver(
            output_folder(args),
            args_text,
            resume_from=point,
            start=(start_epoch, start_batch),
            complete=complete,
            model=model,
            task=task,
            optimizer=optimizer,
            args=args,
            amp_scaler=accelerator.scaler,
            decreasing=eval_metric == 'loss',
            max_history=args.checkpoint_hist,
        )
    if saver is not None and not complete:
        log_start(args, task, loader_train, data_config, num_epochs, scheduler)
        trackers = RunTrackers(accelerator, args, saver.checkpoint_dir, point)
    return Run(
        args,
        accelerator,
        task,
        accelerator.prepare_optimizer(optimizer),
        loader_train,
        loader_eval,
        mixup_fn,
        scheduler,
        create_loader_without_clean_views=partial(create_loader, clean_view=False),
        updates_per_epoch=updates_per_epoch,
        start_epoch=start_epoch,
        start_batch=start_batch,
        stop_epoch=stop_epoch,
        eval_metric=eval_metric,
        data_config=data_config,
        class_names=class_names(dataset_eval),
        feature_hook=feature_hook,
        saver=saver,
        trackers=trackers,
        resumed_losses=point.state['ranks'][args.rank]['losses'] if point and start_batch else None,
        guard=LossGuard(model.buffers(), group, args.max_bad_steps, num_bad_steps),
        stop=StopRequest(group),
    )


def fit(run: Run) -> None:
    """Train epoch by epoch; evaluate, log and save after each that is due.

    Raises:
        Stopped: SIGINT or SIGTERM asked for it; where the run was is saved.
    """
    args = run.args
    save_epochs = args.save_epochs or ()
    with run.stop:
        for epoch in range(run.start_epoch, run.stop_epoch):
            apply_off_epochs(run, epoch)
            set_epoch(run.loader_train, epoch, run.start_batch if epoch == run.start_epoch else 0)
            done = epoch + 1
            due = not done % args.val_interval or done in save_epochs or done == run.stop_epoch
            with saved_if_stopped(run, epoch):
                train_metrics = train_one_epoch(run, epoch)
                run.stop.check()
                eval_metrics = evaluate_task(run) if due and run.loader_eval is not None else None
            if not due:
                if run.scheduler is not None:
                    run.scheduler.step(done, metric=None)
                continue
            metric = (eval_metrics or train_metrics)[run.eval_metric]
            cohesion = {} if run.cohesion is None else run.cohesion.metrics
            run.results.append({'epoch': epoch, 'train': train_metrics})
            if eval_metrics:
                run.results[-1]['validation'] = {**eval_metrics, **cohesion}
            run.guard.check_weights(run.task.get_eval_model(), epoch)
            state = progress_state(run, done, batch=0)
            if run.saver is not None and run.trackers is not None:
                row = summary_row(epoch, train_metrics, eval_metrics, mean_lr(run.optimizer), cohesion)
                with save_errors(run.saver.checkpoint_dir):
                    run.saver.begin()
                    append_summary(run.saver.summary_path, row)
                    run.saver.run_state = state
                    run.saver.save_checkpoint(epoch, metric=metric)
                    if done in save_epochs:
                        run.saver.save_milestone(done)
                if eval_metrics and run.cohesion is not None:
                    evaluated = ReportedEpoch(epoch, run.results[-1]['validation'], run.cohesion)
                    run.reported = best_or_last(run.reported, evaluated, run.saver.best_epoch)
                run.trackers.send_epoch(done * run.updates_per_epoch, row, run.cohesion, run.class_names)
            if run.scheduler is not None:
                run.scheduler.step(done, metric)


def progress_state(run: Run, epoch: int, batch: int) -> dict[str, Any]:
    """What a run needs, beside timm's checkpoint, to go on with a batch of an epoch; every process must call it."""
    own = rank_state(run.task) if run.args.world_size > 1 else {}
    if batch and run.meter is not None:
        own['losses'] = run.meter.state_dict()
    return {
        'epoch': epoch,
        'batch': batch,
        'num_batches': len(run.loader_train),
        'ranks': run.stop.group.gather(own),
        'schedule': schedule_state(run.scheduler),
        'num_bad_steps': run.guard.num_bad_steps,
    }


def save_in_epoch(run: Run, epoch: int, batch: int) -> None:
    """Save where the run is in the middle of an epoch; every process must call it."""
    run.guard.accepts(epoch, always=True)  # nothing bad is saved
    run.guard.check_weights(run.task.get_eval_model(), epoch)
    state = progress_state(run, epoch, batch)
    if run.saver is not None:
        run.saver.run_state = state
        run.saver.save_recovery(epoch, batch_idx=-(-batch // run.args.grad_accum_steps) - 1)


@contextmanager
def saved_if_stopped(run: Run, epoch: int) -> Iterator[None]:
    """If a signal or an image stops the block, save where the run is: after the last update that was made."""
    try:
        yield
    except (Stopped, UnreadableImage) as reason:
        exact = isinstance(reason, Stopped) or (  # all processes are here, and nothing has been computed since
            run.args.world_size == 1 and (run.args.grad_accum_steps == 1 or run.done_batches == len(run.loader_train))
        )
        if exact and run.done_batches:
            save_in_epoch(run, epoch, run.done_batches)
        raise


def apply_off_epochs(run: Run, epoch: int) -> None:
    """Turn SynerMix and the mixing of images off from the epochs the flags name."""
    args = run.args
    off = args.synermix and args.synermix_off_epoch and epoch == max(args.synermix_off_epoch, run.start_epoch)
    if off and run.create_loader_without_clean_views is not None:
        _logger.info(f'SynerMix is off from epoch {epoch} on.')
        run.loader_train = run.create_loader_without_clean_views()
        run.task.synermix_enabled = False  # batches without clean views could be those between an interval's
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        run.loader_train.mixup_enabled = False  # where the collate function mixes
        if run.mixup_fn is not None:
            run.mixup_fn.mixup_enabled = False


def choose_eval_metric(args: argparse.Namespace, evaluator: Any) -> str:
    """The metric that ranks checkpoints; the training loss without validation."""
    if evaluator is None:
        return 'loss'
    if args.eval_metric in evaluator.metric_names:
        return args.eval_metric
    if args.eval_metric == parser.get_default('eval_metric'):
        return evaluator.default_metric
    raise ValueError(f'--eval-metric must be one of {", ".join(evaluator.metric_names)}, got {args.eval_metric}')


def log_start(
    args: argparse.Namespace,
    task: TrainingTask,
    loader: Any,
    data_config: dict[str, Any],
    num_epochs: int,
    scheduler: Any,
) -> None:
    params = sum(p.numel() for p in task.get_eval_model().parameters())
    _logger.info(f'Model {args.model}: {params:,} parameters, {args.num_classes} classes')
    _logger.info('Images: ' + ', '.join(f'{name} {value}' for name, value in data_config.items()))
    amp = f'{args.amp_dtype} autocast' if args.amp else 'no autocast'
    versions = ', '.join(f'{name} {version(name)}' for name in ('torch', 'timm', 'accelerate'))
    _logger.info(f'{args.world_size} process(es) on {args.device}, {amp}, learning rate {args.lr:g}; {versions}')
    if args.synermix:
        sampler = getattr(loader.batch_sampler, 'batch_sampler', None)  # a stream has none
        extra = getattr(sampler, 'expected_supplements', float)()
        _logger.info(
            f'SynerMix: beta {task.beta}, {args.synermix_forward} forward, images mixed per class '
            f'{args.synermix_num_mixed or "all"}, about {extra:.1f} extra images per batch of {args.batch_size} '
            f'(+{100 * extra / args.batch_size:.0f} %)'
        )
    unit = 'epoch' if scheduler is None or scheduler.t_in_epochs else 'update'
    _logger.info(f'Epochs: {num_epochs}, learning rate stepped per {unit}. Output: {output_folder(args)}')


def train_one_epoch(run: Run, epoch: int) -> dict[str, float]:
    """Train for one epoch, or for what is left of it, and return the mean of every scalar the task reports.

    Raises:
        NonFiniteLoss: A loss is NaN or infinite, and no more updates may be left out.
        Stopped: SIGINT or SIGTERM asked for it; where the run was is saved.
    """
    args, accelerator, task, optimizer, loader = run.args, run.accelerator, run.task, run.optimizer, run.loader_train
    first_batch = run.start_batch if epoch == run.start_epoch else 0
    meter = run.meter = LossMeter(accelerator)
    run.done_batches = first_batch
    if first_batch and run.resumed_losses is not None:
        meter.load_state_dict(run.resumed_losses)
    if first_batch == len(loader):  # it was stopped in its evaluation
        return epoch_losses(run, meter)
    task.train()
    run.guard.keep_buffers()
    updates = -(-len(loader) // args.grad_accum_steps)
    progress = TrainProgress(args, epoch, updates, first=first_batch // args.grad_accum_steps)
    second_order = getattr(optimizer.optimizer, 'is_second_order', False)
    optimizer.zero_grad()
    samples, data_time = 0, 0.0
    losses: list[tuple[dict[str, Tensor], int]] = []  # of an update
    for batch, input, target, waited in timed_batches(loader, first_batch):
        # What a step draws depends on which step it is, not on the steps before it.
        seed_everything(seed_of('step', args.seed, args.rank, epoch, batch), accelerator.device)
        update = batch // args.grad_accum_steps
        # A streaming loader may hold more than it says.
        window = max(1, min(args.grad_accum_steps, len(loader) - update * args.grad_accum_steps))
        update_due = batch + 1 == len(loader) or (batch + 1) % args.grad_accum_steps == 0
        input, target = input.to(accelerator.device), target.to(accelerator.device)
        if run.mixup_fn is not None and not isinstance(task, SynerMixTask):  # which mixes by itself
            input, target = run.mixup_fn(input, target)
        if args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)

        # One loss after the other, each with its backward pass: the activations of one are in memory at a time.
        parts = task.parts(input, target) if isinstance(task, SynerMixTask) else [partial(task, input, target)]
        values: dict[str, Tensor] = {}
        for part in parts:
            with gradient_sync(accelerator, task, update_due and part is parts[-1]):
                with accelerator.autocast():
                    result = part()
                loss = result['loss'] * batch_loss_scale(args, len(target)) / window
                accelerator.backward(loss, create_graph=second_order)
            for name, value in result.items():
                if value.ndim == 0:
                    values[name] = values.get(name, 0.0) + value.detach()
        losses.append((values, len(target)))
        run.guard.add(values, update)
        samples, data_time = samples + len(target), data_time + waited
        if not update_due:
            continue

        lr = mean_lr(optimizer)
        num_updates = epoch * run.updates_per_epoch + update + 1
        if run.guard.accepts(epoch):
            update_weights(run, num_updates)
            for values, count in losses:
                meter.update(values, count)
                if run.trackers is not None:
                    run.trackers.add_batch(values, count)
            if run.trackers is not None:
                run.trackers.add_update(num_updates, lr)
        else:
            optimizer.zero_grad()
        losses = []
        if run.scheduler is not None:
            run.scheduler.step_update(num_updates=num_updates)
        reported = progress.update(update, samples, data_time, meter, lr)
        if reported:
            run.guard.accepts(epoch, always=True)  # the log has waited for the device
        if reported and run.trackers is not None:
            run.trackers.send_updates(progress.rate)
        if reported and args.save_images and run.saver is not None:
            path = os.path.join(run.saver.checkpoint_dir, f'train-batch-{batch}.jpg')
            torchvision.utils.save_image(input, path, padding=0, normalize=True)
        samples, data_time = 0, 0.0
        run.done_batches = batch + 1
        if batch + 1 < len(loader):
            if args.recovery_interval and (update + 1) % args.recovery_interval == 0:
                save_in_epoch(run, epoch, batch + 1)
            run.stop.check()
    run.guard.accepts(epoch, always=True)
    if hasattr(optimizer.optimizer, 'sync_lookahead'):
        optimizer.optimizer.sync_lookahead()
    if args.distributed and args.dist_bn in ('broadcast', 'reduce'):
        distribute_bn(task.trainable_module, args.world_size, args.dist_bn == 'reduce')
    progress.close()
    num_skipped = num_skipped_images(run, epoch)
    if args.rank == 0:
        warn_of_skipped(f'Train: {epoch}', getattr(loader, 'dataset', None), epoch, num_skipped)
    if args.recovery_interval and updates % args.recovery_interval == 0:
        save_in_epoch(run, epoch, len(loader))
    return epoch_losses(run, meter)


def epoch_losses(run: Run, meter: LossMeter) -> dict[str, float]:
    """The mean losses of an epoch; every process must call it."""
    losses = meter.reduce()
    if run.args.synermix and run.args.synermix_interval > 1 and {'intra_loss', 'inter_loss'} <= losses.keys():
        # Some epochs have an update with an intra-class loss more than others, and their mean loss would say so.
        losses['loss'] = float(synermix_loss(losses['intra_loss'], losses['inter_loss'], run.task.beta))
    return losses


def num_skipped_images(run: Run, epoch: int) -> int:
    """How many images of the epoch could not be read, over all processes; every process must call it."""
    count = getattr(getattr(run.loader_train, 'dataset', None), 'num_skipped', None)
    skipped = torch.tensor(0 if count is None else count(epoch), device=run.accelerator.device)
    return int(run.accelerator.reduce(skipped).item())


def update_weights(run: Run, num_updates: int) -> None:
    """Clip the gradients, step the optimizer and the average (EMA)."""
    args, accelerator = run.args, run.accelerator
    if args.clip_grad is not None:
        accelerator.unscale_gradients()
        parameters = run.task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
        dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.task.update_ema(step=num_updates)
    if args.synchronize_step and accelerator.device.type == 'cuda':
        torch.cuda.synchronize()


def mean_lr(optimizer: Any) -> float:
    """Mean learning rate of the parameter groups."""
    return sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)


def timed_batches(loader: Any, first_batch: int) -> Iterator[tuple[int, Tensor, Tensor, float]]:
    """The batches of a loader from the first one on, numbered, each with the seconds it kept the loop waiting."""
    start = time.time()
    batches = iter(loader)
    if first_batch and isinstance(loader.dataset, IterableDataset):  # a stream begins at its beginning
        batches = islice(batches, first_batch, None)
    for batch, (input, target) in enumerate(batches, first_batch):
        yield batch, input, target, time.time() - start
        start = time.time()


def gradient_sync(accelerator: Accelerator, task: TrainingTask, update_due: bool) -> Any:
    """Average gradients across processes in the backward pass only where an update follows."""
    return nullcontext() if update_due else accelerator.no_sync(task.trainable_module)


def batch_loss_scale(args: argparse.Namespace, batch_size: int) -> float:
    """Factor of the loss where scheduled image sizes make the batch size vary."""
    power = {'none': 0.0, 'sqrt': 0.5, 'linear': 1.0}[args.variable_batch_loss_scale]
    return (batch_size / args.batch_size) ** power


def averages_count(args: argparse.Namespace, task: TrainingTask) -> bool:
    """Whether the metrics of a run are those of the moving average: if there is one on the device."""
    return task.has_ema() and not args.model_ema_force_cpu


def evaluate_task(run: Run) -> dict[str, float]:
    """Metrics of the model, or of its moving average; notes the cohesion of the same one."""
    args, task = run.args, run.task
    averaged = averages_count(args, task)
    metrics = evaluate_model(run, task.get_eval_model(), 'Test', with_cohesion=not averaged)
    if not averaged:
        return metrics
    ema = task.get_eval_model(ema=True)
    if args.distributed and args.dist_bn in ('broadcast', 'reduce'):
        distribute_bn(ema, args.world_size, args.dist_bn == 'reduce')
    return evaluate_model(run, ema, 'Test (EMA)', with_cohesion=True)


def evaluate_model(run: Run, model: nn.Module, log_name: str, with_cohesion: bool) -> dict[str, float]:
    args = run.args
    kwargs: dict[str, Any] = dict(channels_last=args.channels_last, tta=args.tta, log_name=log_name)
    # The processes' parts of a stream may have different lengths, and then not all of them would be asked.
    if not (args.distributed and isinstance(run.loader_eval.dataset, IterableDataset)):
        kwargs['on_batch'] = run.stop.check
    meter = None
    if with_cohesion and run.feature_hook is not None:
        from timm_synermix.metrics import CohesionMeter  # slow to import

        drawn = args.num_classes if args.report else 10
        meter = CohesionMeter(args.num_classes, run.accelerator.device, drawn)
        kwargs.update(feature_hook=run.feature_hook, on_features=meter.update)
    metrics = evaluate(run.accelerator, model, run.loader_eval, run.task.create_evaluator(), **kwargs)
    if meter is not None:
        run.cohesion = meter.compute()
        _logger.info('Cohesion: ' + '  '.join(f'{name}: {value:.4g}' for name, value in run.cohesion.metrics.items()))
    return metrics
