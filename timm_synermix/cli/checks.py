"""The parser of the scripts, and what becomes of a user's error."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from timm_synermix.cli.rules import RULES, Rule, flag
from timm_synermix.utils.checks import OneOf

_logger = logging.getLogger(__name__)


class TrainParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line: the usage of 200 flags would bury it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message} (--help all lists all flags)\n')

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse; an empty text of a flag that is None if it is not given is as if it were not given."""
        parsed, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.default is None and getattr(parsed, action.dest, None) == '':
                setattr(parsed, action.dest, None)
        return parsed, rest

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """The flags that an abbreviation may be of: one that is unique in timm's scripts stays so."""
        found = super()._get_option_tuples(option_string)
        timm_s = [match for match in found if not RULES.get(match[0].dest, Rule()).ours]
        return timm_s if len(timm_s) == 1 else found


class UsageError(ValueError):
    """What a user got wrong, in one line, before anything is written."""


@contextmanager
def as_usage_errors() -> Iterator[None]:
    """Make what is wrong in the block, which builds a run from the user's flags, a UsageError.

    A ValueError is ours or timm's word on bad input; timm's older parts say it with an assert.
    """
    try:
        yield
    except (ValueError, AssertionError) as error:
        if not str(error):
            raise
        _logger.debug('Caused by:', exc_info=True)
        raise UsageError(' '.join(str(error).split())) from error


@contextmanager
def usage_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn what is wrong in the block into one line and exit code 2."""
    try:
        with as_usage_errors():
            yield
    except UsageError as error:
        parser.error(str(error))


def check_amp(args: argparse.Namespace) -> None:
    """Raise ValueError for --amp of a model of another type."""
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise ValueError(f'--amp needs a float32 model, got --model-dtype {args.model_dtype}')


def replaced(args: argparse.Namespace, **values: Any) -> argparse.Namespace:
    """A copy of arguments with other values; those that were given stay as they are."""
    return argparse.Namespace(**{**vars(args), **values})


def check_fields(args: argparse.Namespace) -> None:
    """Raise ValueError for names of fields of a data set that has none, such as a folder of images."""
    for name in ('target_key', 'target_format'):  # --input-key names the endings of images in a folder
        if getattr(args, name) and not args.dataset.lower().startswith(('hfds/', 'hfids/', 'tfds/', 'wds/')):
            dataset = args.dataset or 'a folder of images'
            raise ValueError(f'{flag(name)} needs --dataset hfds/, hfids/, tfds/ or wds/NAME, got {dataset}')


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Put the flag before what is wrong with its value in the words of a library; also a decorator.

    Raises:
        ValueError: Anything of the kinds that libraries raise for bad arguments.
    """
    try:
        yield
    except (ValueError, TypeError, RuntimeError, AssertionError, LookupError, OSError, ImportError) as error:
        raise ValueError(f'{flag}: {error}') from error


def check_compile(args: argparse.Namespace) -> None:
    """Raise ValueError for a backend that torch.compile does not have."""
    if args.torchcompile:
        from torch._dynamo import list_backends  # slow to import

        if args.torchcompile not in list_backends(()):  # those for debugging too
            names = ', '.join(list_backends())
            raise ValueError(f"--torchcompile must be one of {names}, got '{args.torchcompile}'")
        if args.torchcompile_mode and args.torchcompile == 'inductor':
            from torch._inductor import list_mode_options

            OneOf(list_mode_options()).check('--torchcompile-mode', args.torchcompile_mode)


def check_dataset(args: argparse.Namespace) -> None:
    """Warn of a data set's name that says nothing; refuse fields of one that has none."""
    if args.dataset and '/' not in args.dataset:
        _logger.warning('--dataset %s is not of the form TYPE/NAME: the folder of --data-dir is read.', args.dataset)
    check_fields(args)
