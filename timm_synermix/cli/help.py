"""--help: the flags that people touch, on two screens; --help GROUP all flags of a group, --help all every one."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Chapter(NamedTuple):
    """What `--help NAME` shows.

    Args:
        titles: Groups of flags, by their title.
        front: The flags on the page of `--help` alone, which may stand in another chapter's group.
    """

    titles: tuple[str, ...]
    front: tuple[str, ...]


# Of both scripts, in the order of the page; what a script does not have is passed over.
OF_PYTHON_3_10 = ' (default: %(default)s)'  # which it adds to the help of a flag with a --no- form
CHAPTERS = {
    'SynerMix': Chapter(
        ('SynerMix', 'Manifold MixUp', 'RegMixup'),
        ('synermix', 'synermix_beta', 'synermix_num_mixed', 'synermix_batch', 'manifold_mixup', 'cohesion', 'compare'),
    ),
    'data': Chapter(('Dataset', 'Images', 'Small images'), ('data_dir', 'dataset', 'split', 'img_size', 'config')),
    'model': Chapter(
        ('Model and task', 'Fine-tuning', 'Batch norm', 'Model EMA', 'Knowledge distillation'),
        ('model', 'num_classes', 'checkpoint', 'pretrained', 'pretrained_path', 'freeze', 'model_ema', 'use_ema'),
    ),
    'training': Chapter(
        ('Optimizer', 'Learning rate schedule', 'Loss', 'Scheduled image sizes', 'NaFlex (accepted, not supported)'),
        ('epochs', 'batch_size', 'opt', 'lr', 'weight_decay', 'smoothing'),
    ),
    'augmentation': Chapter(
        ('Augmentation and regularisation', 'MixUp and CutMix'), ('mixup', 'cutmix', 'aa', 'reprob', 'drop_path')
    ),
    'device': Chapter(('Device, batches and processes',), ('device', 'amp', 'workers', 'seed')),
    'run': Chapter(
        ('options', 'Run', 'Results', 'What goes wrong', 'What to look at'),
        ('output', 'experiment', 'resume', 'log_with', 'results_file', 'report'),
    ),
}


class HelpFormatter(argparse.HelpFormatter):
    """Help with the defaults that say something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = (action.help or '').removesuffix(OF_PYTHON_3_10), action.default
        told = 'default' in text or (not default and '0 for' in text)
        if told or isinstance(default, (bool, dict)) or default in (None, '', [], argparse.SUPPRESS):
            return text.replace('%', '%%')
        shown = ' '.join(f'{value:g}' for value in default) if isinstance(default, (list, tuple)) else default
        return f'{text} (default: {shown})'.replace('%', '%%')


class HelpAction(argparse.Action):
    """Print help and exit."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        groups = [] if values is None else groups_of(parser, str(values))
        if values is not None and not groups:
            parser.error(f'--help must be all or of {", ".join(CHAPTERS)}, got {values}')
        print(front_page(parser) if values is None else page(parser, groups), end='')
        parser.exit()


def add_help_arg(parser: argparse.ArgumentParser) -> None:
    """Add --help to a parser that has none."""
    parser.add_argument(
        '-h',
        '--help',
        nargs='?',
        metavar='GROUP',
        action=HelpAction,
        default=argparse.SUPPRESS,
        help=f'show the flags that people touch, or those of a group: {", ".join(CHAPTERS)}, or all',
    )


def groups_of(parser: argparse.ArgumentParser, name: str) -> list[argparse._ArgumentGroup]:
    """The groups of flags of a chapter, of all, or those whose title has the name in it."""
    groups = {str(group.title): group for group in parser._action_groups}
    chapters = {chapter.lower(): titles for chapter, (titles, _) in CHAPTERS.items()}
    ordered = [title for titles in chapters.values() for title in titles]
    wanted = ordered if name == 'all' else chapters.get(name.lower())
    titles = wanted or [title for title in ordered if name.lower() in title.lower()]
    return [groups[title] for title in titles if title in groups]


def page(parser: argparse.ArgumentParser, groups: Iterable[argparse._ArgumentGroup]) -> str:
    """The help of groups of flags."""
    formatter = HelpFormatter(parser.prog)
    for group in groups:
        formatter.start_section(group.title)
        formatter.add_arguments(group._group_actions)
        formatter.end_section()
    return formatter.format_help()


def front_page(parser: argparse.ArgumentParser) -> str:
    """The flags that people touch, in a line each, and where the others are."""
    actions = {action.dest: action for action in parser._actions}
    formatter = HelpFormatter(parser.prog)
    formatter.add_usage(parser.usage, parser._actions, [])
    formatter.add_text(f'{parser.description} `--help GROUP` shows the flags of a group, `--help all` every one.')
    for name in CHAPTERS:
        number = sum(len(group._group_actions) for group in groups_of(parser, name))
        if number:
            formatter.start_section(f'{name} (--help {name.lower()}: {number} flags)')
            formatter.add_arguments([brief(actions[flag]) for flag in CHAPTERS[name].front if flag in actions])
            formatter.end_section()
    return formatter.format_help().replace('\n\n', '\n').replace('\n', '\n\n', 1)


def brief(action: argparse.Action) -> argparse.Action:
    """A flag with its help up to the first colon or semicolon, under its longest name."""
    action = copy.copy(action)
    action.help = re.split('[;:]', action.help or '')[0]
    action.default = action.default or None  # 0 is for not
    action.option_strings = [name for name in action.option_strings if name.startswith('--')][:1]
    if action.nargs != 0:
        action.nargs = None
        action.metavar = action.metavar if isinstance(action.metavar, str) else action.dest.rpartition('_')[2].upper()
    return action
