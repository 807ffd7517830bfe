"""YAML configs as arguments, which argparse checks as it checks those of a command line."""

from __future__ import annotations

import argparse
import logging
import os
import reprlib
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml

from timm_synermix.cli.common_args import ParseKwargs
from timm_synermix.cli.recipes import find_config

_logger = logging.getLogger(__name__)

_MOST_VALUES = 10_000  # of a config; aliases of aliases grow without end


def load_config(parser: argparse.ArgumentParser, path: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read the arguments in a YAML file. Unknown keys are named and left out, misspelt ones are errors.

    A key `base` names another config, relative to this one or a recipe of the package, whose values those of this one
    override.

    Args:
        parser: Knows the arguments.
        path: The file, or the name of a recipe of the package.
        above: The configs that this one is a base of.

    Raises:
        ValueError: Names the file, the key and what is wrong.
    """
    path = find_config(path)
    config = read_mapping(path)
    values = {}
    base = config.pop('base', None)
    if base is not None:
        if not isinstance(base, str) or not base:
            raise ValueError(f'base in {path} must be the name of a file, got {base!r}')
        base = find_config(base, os.path.dirname(path))
        above = (*above, os.path.realpath(path))
        if os.path.realpath(base) in above:
            raise ValueError(f'{path} is a base of itself')
        values = load_config(parser, base, above)
    actions = {action.dest: action for action in parser._actions if action.dest != 'help'}
    for key, value in config.items():
        if key in actions:
            values[key] = argument_value(actions[key], value, path)
        elif meant := _meant(str(key), actions):
            raise ValueError(f'unknown key {key!r} in {path}, did you mean {meant}?')
        else:
            _logger.warning('--config: unknown key %r in %s is ignored.', key, path)
    return values


def read_mapping(path: str) -> dict[Any, Any]:
    """The mapping in a YAML file, empty if there is nothing in it.

    Raises:
        ValueError: The file cannot be read, is not YAML, or holds something else.
    """
    try:
        with open(path, 'rb') as file:  # YAML knows how to tell its encoding
            content = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f'cannot read {path}: {" ".join(str(error).split())}') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} must be a mapping of flags to values, got {type(content).__name__}')
    for number, _ in enumerate(_leaves(content)):
        if number == _MOST_VALUES:
            raise ValueError(f'{path} must hold at most {_MOST_VALUES} values, aliases written out')
    return content


def _leaves(content: Any) -> Iterator[Any]:
    """The values of nested mappings and lists, one by one, without end if they hold themselves."""
    stack = [content]
    while stack:
        item = stack.pop()
        yield item
        stack.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())


class _ValueParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def argument_value(action: argparse.Action, value: Any, path: str) -> Any:
    """What a flag is with a value of a YAML file; text may be a number, since YAML 1.1 reads 3e-4 as text.

    Raises:
        ValueError: Names the file, the key and, in argparse's words, what is wrong.
    """
    key, several = action.dest, action.nargs in ('+', '*') or isinstance(action.nargs, int)
    if value is None:
        return action.default
    if isinstance(action, ParseKwargs):
        expected, fits = 'a mapping', isinstance(value, dict)
    elif action.nargs == 0:
        expected, fits = 'true or false', isinstance(value, bool)
    elif several:
        number = action.nargs if isinstance(action.nargs, int) else None
        expected = f'a list of {number} single values' if number else 'a list of single values'
        fits = isinstance(value, list) and number in (None, len(value))
        fits = fits and not any(isinstance(item, (list, dict)) for item in value)
    else:
        expected, fits = 'a single value', not isinstance(value, (list, dict))
    if not fits:
        raise ValueError(f'{key} in {path} must be {expected}, got {reprlib.repr(value)}')
    if isinstance(action, ParseKwargs) or action.nargs == 0 or value == []:
        return value
    if action.nargs == '?' and value is True:
        return action.const
    parser = _ValueParser(add_help=False)
    nargs = action.nargs if several else None
    parser.add_argument(key, nargs=nargs, type=action.type or str, choices=action.choices)
    texts = [_text(action, item) for item in (value if several else [value])]
    try:
        return getattr(parser.parse_args(['--', *texts]), key)  # after -- a value may begin with a dash
    except ValueError as error:
        raise ValueError(f'{key} in {path}: {str(error).removeprefix(f"argument {key}: ")}') from error


def _text(action: argparse.Action, value: Any) -> str:
    is_whole = action.type is int and isinstance(value, float) and value.is_integer()
    return str(int(value)) if is_whole else str(value)


def _meant(key: str, known: Any) -> str | None:
    """The known name that a key is likely to be a misspelling of."""
    if sum(map(str.isalpha, key)) < 6:
        return None
    nearest = min(known, key=lambda name: _distance(key, name))
    return nearest if _distance(key, nearest) <= 2 or 'synermix' in key.lower() else None


def _distance(one: str, other: str) -> int:
    """How many letters must be inserted, left out or replaced to make one of the other."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, target in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (letter != target))
    return row[-1]
