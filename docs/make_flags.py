"""Write flags.md from the parsers of the scripts: `make docs`."""

from __future__ import annotations

import argparse
from pathlib import Path

from timm_synermix.cli import train_args, validate_args
from timm_synermix.cli.help import OF_PYTHON_3_10
from timm_synermix.cli.rules import RULES, Range, flag, names_with
from timm_synermix.cli.timm_args import TIMM_VERSION

PAGE = Path(__file__).with_name('flags.md')
INTRO = """# Flags

Written by `make docs` from the scripts themselves. `--help all` prints the same, `--help GROUP` those of a group, such
as `--help synermix` or `--help optimizer`, and `--help` alone the flags that people touch.

`train.py` and `validate.py` take every flag of timm VERSION's scripts, with timm's names, types and defaults, and those
of their own that come first here. A flag may also be a line of a YAML file for `--config`: `batch_size: 64`, `synermix:
true`, `mean: [0.5, 0.5, 0.5]`, `model_kwargs: {drop_rate: 0.1}`. What is given on the command line counts more, and
`base: other.yaml` starts from another file. Recipes that come with the package go by their names: `--config
cifar100/synermix_mixup`. A misspelt key is an error, one that nobody knows a warning.

How to choose the SynerMix flags, and what each is for: [method.md](method.md). What the scripts read and write:
[scripts.md](scripts.md).
"""
RESUMED = {
    'fixed': 'must stay as they are: it would be another run',
    'epoch': 'may change only between epochs, since they decide which images a batch has',
    'kept': 'are in the state of the optimizer, which keeps its own; `--no-resume-opt` takes the new ones',
    'free': 'may change at any time, and change nothing that is trained',
}
RESUME = """## When a run goes on

With `--resume` a flag may have another value than before. Most count from there on, and are named in a warning. Others
"""


def page() -> str:
    """The whole page."""
    parts = [INTRO.replace('VERSION', TIMM_VERSION)]
    for name, parser in (('train.py', train_args.create_parsers()[1]), ('validate.py', validate_args.create_parser())):
        parts.append(f'## {name}\n')
        groups = [group for group in parser._action_groups if actions_of(group)]
        groups.sort(key=lambda group: not RULES[actions_of(group)[0].dest].ours)  # ours first
        parts += [table(group) for group in groups]
    parts.append(RESUME)
    for kind, meaning in RESUMED.items():
        names = ', '.join(f'`{flag(name)}`' for name in names_with(resume=kind) if name != 'data')
        parts.append(f'- {meaning}: {names}')
    return '\n'.join(parts) + '\n'


def actions_of(group: argparse._ArgumentGroup) -> list[argparse.Action]:
    """The flags of a group but for --help."""
    return [action for action in group._group_actions if action.dest != 'help']


def table(group: argparse._ArgumentGroup) -> str:
    """A table of a group of flags."""
    lines = [f'### {"Config" if group.title == "options" else group.title}', '']
    lines += ['| flag | default | values | |', '| --- | --- | --- | --- |']
    for action in actions_of(group):
        metavar = f' {action.metavar}' if isinstance(action.metavar, str) else ''
        names = ', '.join(f'`{name}{metavar}`' for name in action.option_strings or [action.dest])
        text = (action.help or '').removesuffix(OF_PYTHON_3_10).replace('|', '\\|')
        cells = [names, default(action), values(action), text]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def default(action: argparse.Action) -> str:
    """What a flag is that is not given, as it would be given."""
    if action.nargs == 0 and action.default is not None:
        return 'on' if action.default else 'off'
    value = action.default
    text = ' '.join(f'{item:g}' for item in value) if isinstance(value, list) else str(value)
    return '' if value in (None, '', {}) or not text else f'`{text}`'


def values(action: argparse.Action) -> str:
    """What a flag may be."""
    allowed = action.choices or RULES[action.dest].values
    if allowed is None or allowed == Range():
        text = {int: 'integer', float: 'number'}.get(action.type, '')  # type: ignore[arg-type]
    elif isinstance(allowed, Range):
        text = str(allowed)
    else:
        text = ', '.join(f'`{value}`' for value in allowed if value)
    several = {'+': 'one or more', 3: 'three'}.get(action.nargs or 0, '')
    return ', '.join(filter(None, (several, text)))


if __name__ == '__main__':
    PAGE.write_text(page())
