"""YAML configs as arguments."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import yaml

from timm_synermix.cli.timm_args import ParseKwargs

_logger = logging.getLogger(__name__)


def _load_config(parser: argparse.ArgumentParser, path: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a YAML config. Unknown keys are named and left out; values of the wrong type are usage errors.

    A key `base` names another config, relative to this one, whose values those of this one override.

    Args:
        above: The configs that this one is a base of.
    """
    try:
        with open(path) as file:
            config = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f'--config: cannot read {path}: {error}')
    if not isinstance(config, dict):
        parser.error(f'--config: {path} must be a mapping of flags to values, got {type(config).__name__}')
    values = {}
    base = config.pop('base', None)
    if base is not None:
        if not isinstance(base, str) or not base:
            parser.error(f'--config: base in {path} must be the name of a file, got {base!r}')
        base = os.path.join(os.path.dirname(path), base)
        above = (*above, os.path.realpath(path))
        if os.path.realpath(base) in above:
            parser.error(f'--config: {path} is a base of itself')
        values = _load_config(parser, base, above)
    actions = {action.dest: action for action in parser._actions}
    for key, value in config.items():
        if key not in actions:
            _logger.warning('--config: unknown key %r in %s is ignored.', key, path)
            continue
        try:
            values[key] = convert_value(actions[key], value)
        except ValueError as error:
            parser.error(f'--config: {key} in {path} {error}')
    return values


def convert_value(action: argparse.Action, value: Any) -> Any:
    """Check a YAML value as argparse would check the flag; YAML 1.1 reads 3e-4 as text, so text may be a number."""
    if value is None:
        return action.default
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict):
            raise ValueError(f'must be a mapping, got {value!r}')
        return value
    if action.nargs == '?' and value is True:
        return action.const
    if isinstance(action, (argparse._StoreTrueAction, argparse.BooleanOptionalAction)):
        if not isinstance(value, bool):
            raise ValueError(f'must be true or false, got {value!r}')
        return value
    if action.nargs == '+' or isinstance(action.nargs, int):
        if not isinstance(value, list):
            raise ValueError(f'must be a list, got {value!r}')
        if isinstance(action.nargs, int) and len(value) != action.nargs:
            raise ValueError(f'must be a list of {action.nargs} values, got {value!r}')
        return [_convert_scalar(action, item) for item in value]
    return _convert_scalar(action, value)


def _convert_scalar(action: argparse.Action, value: Any) -> Any:
    kind = action.type or str
    if isinstance(value, (list, dict)):
        raise ValueError(f'must be a single value, got {value!r}')
    if kind in (int, float):
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError(f'must be {"an integer" if kind is int else "a number"}, got {value!r}')
        try:
            value = kind(value)
        except ValueError as error:
            raise ValueError(f'must be {"an integer" if kind is int else "a number"}, got {value!r}') from error
    else:
        value = str(value)
    if action.choices is not None and value not in action.choices:
        raise ValueError(f'must be one of {", ".join(map(str, action.choices))}, got {value!r}')
    return value
