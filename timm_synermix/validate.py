"""Evaluate checkpoints: timm's accuracy, and how tight and how far apart their classes are in feature space.

    python validate.py --data-dir DIR --checkpoint output/train/RUN/model_best.pth.tar
    python validate.py --data-dir DIR --compare output/train/A output/train/B --report output/report

takes every flag of timm's script with timm's defaults. Read it from `main` down: parse, build, evaluate, report.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from timm_synermix.cli.checks import as_usage_errors, replaced
from timm_synermix.cli.validate_args import check_args, create_folder, create_parser, parse_args

if __name__ == '__main__':  # run the one module of this name, once the flags are known to be right
    from timm_synermix import entry

    entry.validate()
    sys.exit()

import safetensors.torch
import torch
from accelerate import Accelerator
from timm import create_model
from timm.utils import check_batch_size_retry, decay_batch_step, random_seed, setup_default_logging
from torch import Tensor

from timm_synermix.engine.accelerator import create_accelerator
from timm_synermix.engine.candidates import Candidate, Outcome, compare_table, find_candidates
from timm_synermix.engine.evaluate import FeatureStore, evaluate
from timm_synermix.engine.evaluators import build_evaluator
from timm_synermix.engine.loaders import build_dataset, build_loader
from timm_synermix.engine.reporting import write_outcome_report
from timm_synermix.features import FeatureHook
from timm_synermix.metrics.collection import CohesionMeter, cohesion_place
from timm_synermix.models.factory import Built, build_eval_model
from timm_synermix.utils.distributed import lost_worker, lost_worker_reason
from timm_synermix.utils.summary import finite_or_none, write_results

_logger = logging.getLogger(__name__)
parser = create_parser()


def main() -> None:
    setup_default_logging()
    try:
        run(*parse_args(parser))
    except KeyboardInterrupt:
        sys.exit(130)  # the shell's code for SIGINT
    except RuntimeError as error:
        if not lost_worker(error):
            raise
        _logger.error(f'Stopped: {lost_worker_reason(error)}.')
        sys.exit(1)


def validate(args: argparse.Namespace) -> Any:
    """The row of results of one model, or a list of rows, for arguments of `parser`; none is taken from a run."""
    outcomes = run(args, frozenset(vars(args)))
    return outcomes[0].row if len(outcomes) == 1 else [outcome.row for outcome in outcomes]


def run(args: argparse.Namespace, given: frozenset[str]) -> list[Outcome]:
    """Evaluate what the flags ask for; given are the names of those that the user gave."""
    with as_usage_errors():  # what a user got wrong ends here, in one line, with nothing written
        check_args(args)
        kind, candidates = find_candidates(parser, args, given)
        if args.features_out and kind != 'single':
            raise ValueError(f'--features-out takes one checkpoint, got {len(candidates)}')
        accelerator = create_accelerator(args)
        if args.retry and accelerator.num_processes > 1:
            raise ValueError(f'--retry needs a single process, got {accelerator.num_processes}')
        if not accelerator.is_main_process:
            logging.getLogger().setLevel(logging.WARNING)
        if kind != 'single':  # that there are no images is not told after the first model alone
            build_dataset(candidates[0].args, candidates[0].class_to_idx)
        if args.report:
            create_folder('--report', args.report)
    outcomes = evaluate_all(accelerator, kind, candidates)
    if accelerator.is_main_process:
        report(args, kind, outcomes)
    accelerator.end_training()
    if not outcomes:
        sys.exit(1)
    return outcomes


def evaluate_all(accelerator: Accelerator, kind: str, candidates: list[Candidate]) -> list[Outcome]:
    """Evaluate candidates one by one. In a bulk evaluation those that fail are named and left out."""
    bulk = kind == 'bulk'
    outcomes, failed = [], []
    for number, candidate in enumerate(candidates, 1):
        if len(candidates) > 1:
            _logger.info(f'{candidate.name} ({number} of {len(candidates)})')
        try:
            outcomes.append(evaluate_with_retry(accelerator, candidate, bulk))
        except Exception as error:  # whatever it is, it must not lose the others
            if not bulk:
                raise
            failed.append(candidate.name)
            _logger.error(f'{candidate.name} failed: {" ".join(str(error).split())}')
        except KeyboardInterrupt:
            if not outcomes:
                raise
            _logger.warning(f'Interrupted; the results are those of {len(outcomes)} of {len(candidates)}.')
            break
    if failed:
        _logger.error(f'{len(failed)} of {len(candidates)} could not be evaluated: {", ".join(failed)}')
    if bulk:
        outcomes.sort(key=lambda outcome: outcome.row['top1' if 'top1' in outcome.row else 'map'], reverse=True)
    return outcomes


def evaluate_with_retry(accelerator: Accelerator, candidate: Candidate, bulk: bool) -> Outcome:
    """Evaluate a candidate; with --retry, and in a bulk evaluation, with smaller and smaller batches if it fails."""
    while isinstance(outcome := try_batch_size(accelerator, candidate, bulk), int):
        candidate = replace(candidate, args=replaced(candidate.args, batch_size=outcome))
        if accelerator.device.type == 'cuda':
            torch.cuda.empty_cache()
    return outcome


def try_batch_size(accelerator: Accelerator, candidate: Candidate, bulk: bool) -> Outcome | int:
    """Evaluate a candidate; the smaller batch size to try next if it failed, and may do better with it."""
    args = candidate.args
    try:
        return evaluate_candidate(accelerator, candidate, nullcontext if bulk else as_usage_errors)
    except RuntimeError as error:
        retry = args.retry or (bulk and accelerator.num_processes == 1)
        smaller = decay_batch_step(args.batch_size)
        if not (retry and smaller and check_batch_size_retry(str(error))):
            raise
        _logger.warning(f'{candidate.name} failed, trying again with --batch-size {smaller}: {error}')
        return smaller


def evaluate_candidate(
    accelerator: Accelerator, candidate: Candidate, build_errors: Callable[[], AbstractContextManager]
) -> Outcome:
    """Evaluate one model in one pass: accuracy, cohesion, and the features if the flags want them."""
    args = candidate.args
    random_seed(args.seed)
    with build_errors():
        dataset = build_dataset(args, candidate.class_to_idx)
        built = build_eval_model(create_model, args, accelerator.device)
        loader = build_loader(args, dataset, built.data_config, accelerator)
        evaluator, num_classes = build_evaluator(args, dataset, built, loader, accelerator)
    meter = create_meter(args, built.hook, num_classes, accelerator) if args.cohesion and built.hook else None
    store = FeatureStore() if args.features_out or args.report else None

    def on_features(feature: Tensor, target: Tensor) -> None:
        for part in (meter, store):
            if part is not None:
                part.update(feature, target)

    metrics = evaluate(
        accelerator,
        built.model,
        loader,
        evaluator,
        channels_last=args.channels_last,
        amp_dtype=args.amp_dtype if args.amp else None,
        feature_hook=built.hook,
        on_features=on_features if built.hook else None,
    )
    cohesion = {} if meter is None else meter.compute().metrics
    features, targets = (None, None) if store is None else store.gather(loader)
    row = {**result_row(args, metrics, built), **cohesion}
    return Outcome(candidate, row, built.data_config, dataset if args.report else None, features, targets)


def create_meter(
    args: argparse.Namespace, hook: FeatureHook, num_classes: int, accelerator: Accelerator
) -> CohesionMeter | None:
    """The cohesion metrics where they fit; says so if that is not the device, or nowhere."""
    place = cohesion_place(num_classes, hook.feature_dim, accelerator.device, args.cohesion_memory)
    if place.reason and accelerator.is_main_process:
        _logger.warning(place.reason)
    return None if place.device is None else CohesionMeter(num_classes, place.device)


def result_row(args: argparse.Namespace, metrics: dict[str, float], built: Built) -> dict[str, Any]:
    """A line of the results: timm's columns in timm's order, then the checkpoint and the loss."""
    row: dict[str, Any] = dict(model=args.model)
    for name, value in metrics.items():
        if name != 'loss':
            row[name] = value
        if name in ('top1', 'top5'):
            row[f'{name}_err'] = 100 - value
    row['param_count'] = round(built.param_count / 1e6, 2)
    row['img_size'] = built.data_config['input_size'][-1]
    row |= {name: built.data_config[name] for name in ('crop_pct', 'interpolation')}
    if args.checkpoint:
        row['checkpoint'] = args.checkpoint
    return {**row, 'loss': metrics['loss']}


def report(args: argparse.Namespace, kind: str, outcomes: list[Outcome]) -> None:
    """Print the results, and write what the flags want written."""
    results = outcomes[0].row if kind == 'single' else [outcome.row for outcome in outcomes]
    if args.compare:
        print(compare_table(outcomes))
    print(f'--result\n{json.dumps(finite_or_none(results), indent=4)}', flush=True)
    if args.results_file:
        write_results(args.results_file, results, args.results_format)
    if args.features_out:
        tensors = {'features': outcomes[0].features, 'targets': outcomes[0].targets}
        safetensors.torch.save_file(tensors, args.features_out)
    if args.report and outcomes:
        _logger.info(f'Report: {write_outcome_report(args.report, outcomes)}')
