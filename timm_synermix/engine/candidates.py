"""What validate.py evaluates: checkpoints, folders of training runs, and pretrained models."""

from __future__ import annotations

import argparse
import glob
import logging
import math
import os
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.task import MultiLabelClassificationEvaluator
from timm.utils import natural_key

from timm_synermix.cli.checks import replaced
from timm_synermix.cli.config import argument_value, read_mapping
from timm_synermix.cli.rules import RULES
from timm_synermix.engine.resume_point import saved_classes
from timm_synermix.metrics.collection import METRIC_NAMES, cohesion_metrics
from timm_synermix.models.factory import check_weights_file

_logger = logging.getLogger(__name__)

_BEST = ('model_best.pth.tar', 'model_best.safetensors', 'last.pth.tar')
_SUFFIXES = ('.pth.tar', '.pth', '.safetensors')
_SEVERAL_LABELS = MultiLabelClassificationEvaluator.metric_names[1:]  # after the loss
# What another --dataset has otherwise.
_OF_DATASET = {'dataset', 'data', 'data_dir', 'val_split', 'val_num_samples', 'input_key', 'target_key'}
# Pretrained for other than ImageNet's 1,000 classes: nothing for the images of '--model all'.
_OTHER_CLASSES = ['*_in21k', '*_in22k', '*in12k', '*_dino', '*fcmae', '*seer']


@dataclass
class Candidate:
    """One model with its weights, to be evaluated.

    Args:
        name: Short name, for tables.
        args: The flags of validate.py for it.
        run_args: Arguments of the training run that its checkpoint is from, if they are known.
        summary: Path of that run's summary.csv, if there is one.
        class_to_idx: The numbers of the classes in training, if its checkpoint tells.
    """

    name: str
    args: argparse.Namespace
    run_args: dict[str, Any] = field(default_factory=dict)
    summary: str | None = None
    class_to_idx: dict[str, int] = field(default_factory=dict)


def find_candidates(
    parser: argparse.ArgumentParser, args: argparse.Namespace, given: frozenset[str]
) -> tuple[str, list[Candidate]]:
    """Find what the flags ask to evaluate.

    Args:
        parser: The parser of the flags.
        args: The flags.
        given: Names of the flags that the user gave; over the others, what a training run saved takes precedence.

    Returns:
        kind: 'single', 'compare', or 'bulk' where one that fails does not stop the others.
        candidates: At least one.

    Raises:
        ValueError: A path is not there, a folder holds no checkpoint, or no model matches.
    """
    if args.compare:
        paths = [_best_checkpoint(path) for path in args.compare]
        names = _short_names(args.compare)
        return 'compare', [_from_checkpoint(parser, args, given, *pair) for pair in zip(names, paths, strict=True)]
    if os.path.isdir(args.checkpoint):
        paths = [
            path for path in glob.glob(os.path.join(glob.escape(args.checkpoint), '*')) if path.endswith(_SUFFIXES)
        ]
        best, same = (os.path.join(args.checkpoint, name) for name in ('model_best.safetensors', 'model.safetensors'))
        paths = [path for path in paths if path != same or best not in paths]  # one file under two names
        if not paths:
            raise ValueError(f"--checkpoint: there is no {', '.join(_SUFFIXES)} in the folder '{args.checkpoint}'")
        paths.sort(key=natural_key)
        return 'bulk', [_from_checkpoint(parser, args, given, os.path.basename(path), path) for path in paths]
    names = _model_names(args.model)
    if names and args.checkpoint:
        raise ValueError(f"--model must be one model with --checkpoint, got '{args.model}'")
    if names:
        return 'bulk', [Candidate(name, replaced(args, model=name, pretrained=True)) for name in names]
    if args.checkpoint:
        check_weights_file('--checkpoint', args.checkpoint)
        return 'single', [_from_checkpoint(parser, args, given, os.path.basename(args.checkpoint), args.checkpoint)]
    return 'single', [Candidate(args.model, replaced(args, pretrained=True))]


def _model_names(pattern: str) -> list[str]:
    """The models of a bulk evaluation; none if it is the name of one model."""
    if pattern == 'all':
        return timm.list_models(pretrained=True, exclude_filters=_OTHER_CLASSES)
    if timm.is_model(pattern):
        return []
    if os.path.isfile(pattern):
        with open(pattern, encoding='utf-8') as file:
            names = [name for line in file if (name := line.strip())]
        if not names:
            raise ValueError(f"--model: there is no name in the file '{pattern}'")
        return names
    names = timm.list_models(pattern, pretrained=True)
    if not names and any(wildcard in pattern for wildcard in '*?['):
        raise ValueError(f"--model: no pretrained model matches '{pattern}'")
    return names


def _best_checkpoint(path: str) -> str:
    """A checkpoint, or the best of a training run's folder."""
    if not os.path.isdir(path):
        check_weights_file('--compare', path)
        return path
    for name in _BEST:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise ValueError(f"--compare: the folder '{path}' has none of {', '.join(_BEST)}")


def _short_names(paths: list[str]) -> list[str]:
    """The paths without what they have in common, at their start and at their end."""
    absolute = [os.path.abspath(path) for path in paths]
    if len(set(absolute)) < len(absolute):
        raise ValueError(f'--compare names a checkpoint twice: {" ".join(paths)}')
    if len(absolute) > 1 and len({os.path.basename(path) for path in absolute}) == 1:
        absolute = [os.path.dirname(path) for path in absolute]
    folder = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [os.path.relpath(path, folder) for path in absolute]


def _from_checkpoint(
    parser: argparse.ArgumentParser, args: argparse.Namespace, given: frozenset[str], name: str, path: str
) -> Candidate:
    """A checkpoint, with the arguments that its training run saved beside it."""
    folder = os.path.dirname(path)
    run_args = _load_run_args(parser, os.path.join(folder, 'args.yaml'))
    class_to_idx = {} if args.valid_labels or 'class_map' in given else saved_classes(path)
    taken = _of_run(run_args, args, given, path)
    if class_to_idx:
        taken.pop('class_map', None)  # the file may be gone, and another one in its place
    if taken:
        _logger.info(f'{name}: from its args.yaml, ' + ', '.join(f'{key} {value}' for key, value in taken.items()))
    summary = os.path.join(folder, 'summary.csv')
    return Candidate(
        name,
        replaced(args, checkpoint=path, **taken),
        run_args,
        summary if run_args and os.path.isfile(summary) else None,
        class_to_idx,
    )


def _of_run(run_args: dict[str, Any], args: argparse.Namespace, given: frozenset[str], path: str) -> dict[str, Any]:
    """What its run says about how a checkpoint is evaluated, but for what the user gave."""
    if not run_args:
        return {}
    skipped = {'data', 'data_dir'} if args.data or args.data_dir or 'data_dir' in given else set()
    if 'dataset' in given:
        skipped |= _OF_DATASET
    if given & {'img_size', 'input_size'}:  # either says all about the size
        skipped |= {'img_size', 'input_size'}
    if given & {'amp', 'amp_dtype', 'model_dtype'} or not _has_precision(run_args, args):
        skipped |= {'amp', 'amp_dtype', 'model_dtype'}
    given -= {'data'}  # argparse says so of every positional
    names = {key: name for key, name in _evaluation_names().items() if key not in skipped and name not in given}
    taken = {name: run_args[key] for key, name in sorted(names.items()) if run_args.get(key)}
    if not taken.get('amp'):
        taken.pop('amp_dtype', None)
    if 'use_train_size' not in given:
        taken['use_train_size'] = True  # as in the run's own evaluations; timm's default is a model's size for tests
    averaged = run_args.get('model_ema') and not run_args.get('model_ema_force_cpu')
    averaged = averaged and not path.endswith('.safetensors')  # which has one set of weights
    if averaged and 'use_ema' not in given and not args.no_use_ema:
        taken['use_ema'] = True
    return taken


def _evaluation_names() -> dict[str, str]:
    """The flags of train.py that decide what its evaluation says, and what validate.py calls them."""
    rules = {key: rule.evaluation for key, rule in RULES.items() if rule.evaluation}
    return {key: key if name is True else str(name) for key, name in rules.items()}


def _has_precision(run_args: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether the device can compute in the precision of the run: a CPU has no float16."""
    half = run_args.get('amp') and run_args.get('amp_dtype', 'float16') == 'float16'
    return not (args.device.startswith('cpu') and (half or run_args.get('model_dtype') == 'float16'))


def _load_run_args(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """The arguments in a run's args.yaml, checked as the flags would be; none if there is no such file."""
    if not os.path.isfile(path):
        return {}
    values = read_mapping(path)
    actions = {action.dest: action for action in parser._actions}
    for key, name in _evaluation_names().items():
        if key in values and name in actions:
            values[key] = argument_value(actions[name], values[key], path)
    return values


@dataclass
class Outcome:
    """One candidate, evaluated.

    Args:
        candidate: What was evaluated.
        row: Its line of the results: timm's columns first, then the loss and the cohesion metrics.
        data_config: timm's data configuration.
        dataset: The data set; None unless it is for the report.
        features: float32 `[N, D]` tensor; None if it was not kept.
        targets: int64 `[N]` tensor, likewise.
    """

    candidate: Candidate
    row: dict[str, Any]
    data_config: dict[str, Any]
    dataset: Any = None
    features: Any = None
    targets: Any = None


def compare_table(outcomes: list[Outcome]) -> str:
    """An aligned table of accuracy and cohesion, a line per metric and a column per candidate."""
    better = {name: metric.higher_is_better for name, metric in cohesion_metrics(2, 1).items(keep_base=True)}
    better.update(dict.fromkeys(['top1', 'top5', *_SEVERAL_LABELS], True))
    hints = {True: 'higher is better', False: 'lower is better', None: ''}
    names = [outcome.candidate.name for outcome in outcomes]
    widths = [max(12, len(name) + 2) for name in names]
    lines = [' ' * 26 + ''.join(f'{name:>{width}}' for name, width in zip(names, widths, strict=True))]
    for metric in [name for name in ('top1', 'top5', *_SEVERAL_LABELS, *METRIC_NAMES) if name in outcomes[0].row]:
        values = [outcome.row.get(metric, math.nan) for outcome in outcomes]
        cells = ''.join(f'{value:{width}.5g}' for value, width in zip(values, widths, strict=True))
        lines.append(f'{metric:26}{cells}  {hints[better[metric]]}'.rstrip())
    return '\n'.join(lines)
