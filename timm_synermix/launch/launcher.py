"""`python -m timm_synermix SCRIPT ...`: run somebody's own timm train.py or validate.py, with SynerMix and cohesion."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timm_synermix.cli import add_manifold_mixup_args, add_synermix_args
from timm_synermix.launch.script import LaunchError, Script

_USAGE = """usage: python -m timm_synermix SCRIPT [its flags] [--synermix] [--cohesion] ...

Runs a train.py or validate.py made for timm, as it is. SCRIPT --help lists its flags, with those of SynerMix."""


def main() -> None:
    """Run the script of the command line; what cannot be done is one line and exit code 2."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ('-h', '--help'):
        print(_USAGE, file=sys.stderr if not arguments else sys.stdout)
        sys.exit(0 if arguments else 2)
    try:
        launch(Script(arguments[0]), arguments)
    except LaunchError as error:
        sys.exit(_exit_code(f'python -m timm_synermix: error: {error}'))


def _exit_code(message: str) -> int:
    print(message, file=sys.stderr, flush=True)
    return 2


def launch(script: Script, argv: list[str]) -> None:
    """Run a script with a command line, its own name first.

    Raises:
        LaunchError: It cannot be run with SynerMix.
    """
    launched = Launched(script)
    argv_before, path_before = sys.argv, sys.path[:]
    sys.argv = argv
    sys.path[:1] = [str(script.path.parent)]  # as if python had started it
    try:
        with launched.parsing():
            script.run()
    except Exception as error:
        if launched.session is not None:
            launched.session.explain(error)
        raise
    finally:
        script.restore()
        sys.argv, sys.path[:] = argv_before, path_before


class Launched:
    """A script whose parser has the flags of SynerMix.

    Attributes:
        session: What is in the place of timm's names; None without a flag that asks for it.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.session: Any = None
        self._parsers: list[argparse.ArgumentParser] = []

    @contextmanager
    def parsing(self) -> Iterator[None]:
        """Add the flags to the parser that knows --model, when it parses, and act on them when it has."""
        original = argparse.ArgumentParser.parse_known_args

        def parse_known_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            if '--model' not in parser._option_string_actions:  # one for --config alone
                return original(parser, *args, **kwargs)
            if parser not in self._parsers:
                self._parsers.append(parser)
                add_flags(parser)
            namespace, rest = original(parser, *args, **kwargs)
            self.parsed(namespace)
            return namespace, rest

        argparse.ArgumentParser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            argparse.ArgumentParser.parse_known_args = original  # type: ignore[method-assign]

    def parsed(self, args: argparse.Namespace) -> None:
        """Put SynerMix, and the metrics, in the place of timm's names if the flags say so."""
        synermix = getattr(args, 'synermix', False)
        if args.cohesion is None:
            args.cohesion = synermix
        if not (synermix or getattr(args, 'manifold_mixup', 0) or args.cohesion):
            return
        from timm_synermix.launch.session import Session  # slow to import

        if self.session is None:
            self.session = Session(self.script, args)
        self.session.args = args


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of SynerMix to the parser of a training script, those of its metrics to any.

    Raises:
        LaunchError: The script has them.
    """
    try:
        if '--epochs' in parser._option_string_actions:
            add_synermix_args(parser)
            add_manifold_mixup_args(parser)
        parser.add_argument(
            '--cohesion',
            action=argparse.BooleanOptionalAction,
            help='measure in each evaluation how tight and how far apart the classes are; default: with --synermix',
        )
    except argparse.ArgumentError as error:
        raise LaunchError(f'{os.path.basename(sys.argv[0])} has flags of SynerMix itself: run it directly') from error
    parser.set_defaults(**parser._defaults)  # a --config has set them before there were such flags
