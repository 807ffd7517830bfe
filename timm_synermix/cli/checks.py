"""The parser of the scripts, and checks of what it has read."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

_logger = logging.getLogger(__name__)


class TrainParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line: the usage of 200 flags would bury it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message} (--help lists all flags)\n')


@contextmanager
def usage_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn an error of the block, which builds a run from the user's flags, into one line and exit code 2.

    A ValueError is ours or timm's word on bad input; timm's older parts say it with an assert.
    """
    try:
        yield
    except (ValueError, AssertionError) as error:
        if not str(error):
            raise
        _logger.debug('Caused by:', exc_info=True)
        parser.error(' '.join(str(error).split()))


def check_values(
    args: argparse.Namespace, at_least: Mapping[str, float], one_of: Mapping[str, tuple[str | None, ...]]
) -> None:
    """Refuse flags below their smallest value or not among their choices, and --amp of a model of another type.

    Args:
        args: The flags of either script.
        at_least: Smallest values, by name; a flag that is not given is not checked.
        one_of: Choices, by name.

    Raises:
        ValueError: Names the flag, the rule and the value.
    """
    for name, lowest in at_least.items():
        value = getattr(args, name)
        if value is not None and not value >= lowest:
            raise ValueError(f'{flag(name)} must be at least {lowest}, got {value}')
    for name, allowed in one_of.items():
        if getattr(args, name) not in allowed:
            names = ', '.join(filter(None, allowed))
            raise ValueError(f'{flag(name)} must be one of {names}, got {getattr(args, name)}')
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise ValueError(f'--amp needs a float32 model, got --model-dtype {args.model_dtype}')


def flag(dest: str) -> str:
    """The flag of an argument's name."""
    return '--' + dest.replace('_', '-')
