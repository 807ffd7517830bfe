"""Train an image classifier: timm's train.py, with SynerMix as one flag.

    python train.py --data-dir DIR --model resnet50 --mixup 0.2 --synermix

takes every flag of timm's script with timm's defaults, writes the same files, and without --synermix trains as timm
does. Read it from `main` down: parse, build, fit; an epoch is a loop over updates, and then an evaluation.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from timm_synermix.cli.checks import as_usage_errors, replaced
from timm_synermix.cli.sweep import join_attempt as _join_sweep_attempt  # noqa: F401  # timm's tests ask for both
from timm_synermix.cli.sweep import lock_fds as _sweep_lock_fds  # noqa: F401
from timm_synermix.cli.train_args import create_parsers, parse_args

if __name__ == '__main__':  # run the one module of this name, once the flags are known to be right
    from timm_synermix import entry

    entry.train()
    sys.exit()

from timm import create_model
from timm.utils import random_seed, setup_default_logging
from torch import nn
from torch.utils.data import IterableDataset

from timm_synermix.engine.accelerator import create_train_accelerator
from timm_synermix.engine.build import (
    averages_count,
    choose_eval_metric,
    create_loaders,
    create_schedule,
    create_trained,
    keep_files,
    prepare,
    resolved,
    start_place,
)
from timm_synermix.engine.ending import interrupts_told, stops_told
from timm_synermix.engine.evaluate import evaluate
from timm_synermix.engine.loaders import set_epoch
from timm_synermix.engine.loop import (
    average_batch_norm,
    backward,
    end_epoch,
    epoch_losses,
    epoch_updates,
    keep_update,
    note_losses,
    report_update,
    update_weights,
)
from timm_synermix.engine.loss_guard import LossGuard
from timm_synermix.engine.progress import TrainProgress
from timm_synermix.engine.reporting import best_or_last, write_run_report
from timm_synermix.engine.resume import find_resume_point
from timm_synermix.engine.run import Keeper, ReportedEpoch, Run, progress_state, saved_if_stopped
from timm_synermix.engine.run_folder import save_errors
from timm_synermix.engine.timm_folder import finish_timm_folder, write_timm_folder
from timm_synermix.models.factory import build_model
from timm_synermix.utils.distributed import HostGroup
from timm_synermix.utils.signals import StopRequest
from timm_synermix.utils.summary import append_summary, print_results, summary_row

_logger = logging.getLogger(__name__)
config_parser, parser = create_parsers()


def _parse_args() -> tuple[argparse.Namespace, str]:
    return parse_args(config_parser, parser)


def main() -> None:
    """Train as the command line says.

    Raises:
        UsageError: The flags, the data or the model are not fit to train; nothing is written then.
        SystemExit: The flags contradict each other, or the run was stopped.
    """
    setup_default_logging()
    args, args_text = _parse_args()
    with as_usage_errors(), interrupts_told(args):
        run = build(args, args_text)
    with stops_told(run):
        fit(run)
        finish(run)


def build(args: argparse.Namespace, args_text: str) -> Run:
    """Build a run from its flags: device, model, data, task, optimizer, schedule, and last the output folder.

    Raises:
        ValueError: The flags, the data or the model are not fit to train.
    """
    accelerator = create_train_accelerator(args)
    args, group = resolved(args, accelerator), HostGroup()
    if args.rank > 0:
        logging.getLogger().setLevel(logging.WARNING)
    random_seed(args.seed)  # every process builds the same model, so that their averages (EMA) start alike
    model, data_config = build_model(create_model, args)
    random_seed(args.seed, args.rank)
    args = replaced(args, num_classes=model.num_classes if args.num_classes is None else args.num_classes)

    loaders = create_loaders(args, data_config, group)
    trained = create_trained(args, model, data_config)
    evaluator = None if loaders.eval is None else trained.task.create_evaluator()
    metric = choose_eval_metric(args, evaluator, default=parser.get_default('eval_metric'))

    point = find_resume_point(args)
    group.check_same({'the checkpoint of --resume': point and point.place})
    args, place = start_place(args, trained, accelerator.scaler, loaders, point)
    create_schedule(args, trained, place, point, metric)
    evaluation = prepare(args, accelerator, trained, metric)

    num_bad_steps = 0 if point is None else point.state.get('num_bad_steps', 0)
    keeper = Keeper(LossGuard(model.buffers(), group, args.max_bad_steps, num_bad_steps), StopRequest(group))
    run = Run(args, accelerator, trained, loaders, place, evaluation, keeper)
    keep_files(run, args_text, point)
    return run


def fit(run: Run) -> None:
    """Train epoch by epoch; evaluate, log and save after each that is due.

    Raises:
        Stopped: A signal asked for it; where the run was is saved.
    """
    args, place, scheduler = run.args, run.place, run.trained.scheduler
    with run.keeper.stop:
        for epoch in range(place.start_epoch, place.stop_epoch):
            done = epoch + 1
            due = not done % args.val_interval or done in (args.save_epochs or ()) or done == place.stop_epoch
            apply_off_epochs(run, epoch)
            set_epoch(run.loaders.train, epoch, place.first_batch(epoch))
            with saved_if_stopped(run, epoch):
                train_metrics = train_one_epoch(run, epoch)
                run.keeper.stop.check(now=True)
                eval_metrics = evaluate_task(run) if due and run.loaders.eval is not None else None
            metric = keep_epoch(run, epoch, train_metrics, eval_metrics) if due else None
            if scheduler is not None:
                scheduler.step(done, metric)


def train_one_epoch(run: Run, epoch: int) -> dict[str, float]:
    """Train for one epoch, or for what is left of it, and return the mean of every scalar the task reports.

    Raises:
        NonFiniteLoss: A loss is NaN or infinite, and no more updates may be left out.
        Stopped: A signal asked for it; where the run was is saved.
    """
    args, trained, place, guard = run.args, run.trained, run.place, run.keeper.guard
    loader, first_batch = run.loaders.train, place.first_batch(epoch)
    place.begin_epoch(epoch, run.accelerator)
    if first_batch == len(loader):  # it was stopped in its evaluation
        return epoch_losses(run)
    trained.task.train()
    guard.keep_buffers()
    trained.optimizer.zero_grad()
    num_updates = -(-len(loader) // args.grad_accum_steps)
    with TrainProgress(args, epoch, num_updates, first=first_batch // args.grad_accum_steps) as progress:
        for update in epoch_updates(loader, args.grad_accum_steps, first_batch):
            losses = [backward(run, epoch, update, batch) for batch in update]
            if len(losses) < update.size:  # a stream that ended early
                break
            lr = trained.lr()
            updates_done = epoch * place.updates_per_epoch + update.number + 1
            if guard.accepts(epoch):
                update_weights(run, updates_done)
                note_losses(run, losses, updates_done, lr)
            else:
                trained.optimizer.zero_grad()
            if trained.scheduler is not None:
                trained.scheduler.step_update(num_updates=updates_done)
            report_update(run, epoch, update, losses, lr, progress)
            keep_update(run, epoch, update)
        end_epoch(run, epoch, progress)
    return epoch_losses(run)


def apply_off_epochs(run: Run, epoch: int) -> None:
    """Turn SynerMix and the mixing of images off from the epochs the flags name."""
    args, loaders, trained = run.args, run.loaders, run.trained
    off = args.synermix and args.synermix_off_epoch and epoch == max(args.synermix_off_epoch, run.place.start_epoch)
    if off and loaders.create_without_clean_views is not None:
        _logger.info(f'SynerMix is off from epoch {epoch} on.')
        loaders.train = loaders.create_without_clean_views()
        trained.task.synermix_enabled = False
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        loaders.train.mixup_enabled = False  # where the collate function mixes
        mixup_fn: Any = trained.mixup_fn
        if mixup_fn is not None:
            mixup_fn.mixup_enabled = False


def evaluate_task(run: Run) -> dict[str, float]:
    """Metrics of the model, or of its moving average; notes the cohesion of the same one."""
    args, task = run.args, run.trained.task
    averaged = averages_count(args, task)
    metrics = evaluate_model(run, task.get_eval_model(), 'Test', with_cohesion=not averaged)
    if not averaged:
        return metrics
    ema = task.get_eval_model(ema=True)
    average_batch_norm(run, ema)
    return evaluate_model(run, ema, 'Test (EMA)', with_cohesion=True)


def evaluate_model(run: Run, model: nn.Module, log_name: str, with_cohesion: bool) -> dict[str, float]:
    """Metrics of a model on the evaluation images."""
    args, evaluation = run.args, run.evaluation
    kwargs: dict[str, Any] = dict(channels_last=args.channels_last, log_name=log_name)
    # The processes' parts of a stream may have different lengths, and then not all of them would be asked.
    if not (args.distributed and isinstance(run.loaders.eval.dataset, IterableDataset)):
        kwargs['on_batch'] = run.keeper.stop.check
    meter = None
    if with_cohesion and evaluation.hook is not None:
        from timm_synermix.metrics import CohesionMeter  # slow to import

        drawn = args.num_classes if args.report else 10
        meter = CohesionMeter(args.num_classes, evaluation.cohesion_device, drawn)
        kwargs.update(feature_hook=evaluation.hook, on_features=meter.update)
    metrics = evaluate(run.accelerator, model, run.loaders.eval, run.trained.task.create_evaluator(), **kwargs)
    if meter is not None:
        cohesion = evaluation.cohesion = meter.compute()
        _logger.info('Cohesion: ' + '  '.join(f'{name}: {value:.4g}' for name, value in cohesion.metrics.items()))
    return metrics


def keep_epoch(
    run: Run, epoch: int, train_metrics: dict[str, float], eval_metrics: dict[str, float] | None
) -> float | None:
    """Save and log an epoch, and return the metric that ranks it."""
    args, done, evaluation, saver = run.args, epoch + 1, run.evaluation, run.keeper.saver
    metric = (eval_metrics or train_metrics)[evaluation.metric]
    cohesion = {} if evaluation.cohesion is None else evaluation.cohesion.metrics
    result: dict[str, Any] = {'epoch': epoch, 'train': train_metrics}
    evaluation.results.append(result)
    if eval_metrics:
        result['validation'] = {**eval_metrics, **cohesion}
    run.keeper.guard.check_weights(run.trained.task, epoch)
    state = progress_state(run, done, batch=0)
    if saver is not None and run.keeper.trackers is not None:
        row = summary_row(epoch, train_metrics, eval_metrics, run.trained.lr(), cohesion)
        with save_errors(saver.checkpoint_dir):
            saver.begin()
            append_summary(saver.summary_path, row)
            saver.run_state = state
            saver.save_checkpoint(epoch, metric=metric)
            if done in (args.save_epochs or ()):
                saver.save_milestone(done)
            if epoch == saver.best_epoch:
                write_timm_folder(run, saver.checkpoint_dir, epoch)
        if eval_metrics and evaluation.cohesion is not None:
            evaluated = ReportedEpoch(epoch, result['validation'], evaluation.cohesion)
            evaluation.reported = best_or_last(evaluation.reported, evaluated, saver.best_epoch)
        updates_done = done * run.place.updates_per_epoch
        last = done == run.place.stop_epoch
        run.keeper.trackers.send_epoch(updates_done, row, evaluation.cohesion, run.loaders.class_names, last)
    return metric


def finish(run: Run) -> None:
    """Name the best epoch, write the report that the flags want, and close the trackers."""
    evaluation, saver = run.evaluation, run.keeper.saver
    if evaluation.results and saver is not None and saver.best_metric is not None:  # the main process has one
        _logger.info(f'*** Best {evaluation.metric}: {saver.best_metric:.4f} (epoch {saver.best_epoch})')
        if run.args.report and evaluation.reported is not None:
            write_run_report(run, evaluation.reported)
    if saver is not None and saver.best_epoch is not None:
        with save_errors(saver.checkpoint_dir):
            finish_timm_folder(run, saver.checkpoint_dir, saver.best_epoch)
    run.accelerator.end_training()  # some trackers print a last word then
    if run.args.rank == 0:
        print_results(evaluation.results, evaluation.metric, decreasing=evaluation.metric == 'loss')
