"""Where the scripts are started: `python train.py`, the console commands and `-m timm_synermix.train`."""

import importlib
import logging
import multiprocessing
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType


def train() -> None:
    """Run train.py; --help, misspelt flags and wrong values are answered before what takes seconds to import."""
    from timm_synermix.cli.train_args import create_parsers, read_args

    config_parser, parser = create_parsers()
    known, argv = config_parser.parse_known_args()
    with unlogged():
        read_args(parser, known.config, argv)
    run(module('train'))


def validate() -> None:
    """Run validate.py, in the same way."""
    from timm_synermix.cli.checks import usage_errors
    from timm_synermix.cli.validate_args import check_args, create_parser

    parser = create_parser()
    with unlogged(), usage_errors(parser):
        check_args(parser.parse_args())
    run(module('validate'))


@contextmanager
def unlogged() -> Iterator[None]:
    """Leave warnings to the script, which reads its flags itself."""
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def run(script: ModuleType) -> None:
    """Call main() of a script; what a user got wrong is one line and exit code 2.

    What nobody has foreseen is a traceback, and one line below it that says what to quote in a report.
    """
    from timm_synermix.cli.checks import UsageError

    if sys.platform == 'linux' and multiprocessing.get_start_method(allow_none=True) is None:
        # A forked worker of a loader has the data set at once; Python 3.14 would have each import all of this anew.
        multiprocessing.set_start_method('fork')
    with suppress(AttributeError):  # Windows knows few letters where output goes to a file
        sys.stdout.reconfigure(errors='backslashreplace')  # type: ignore[union-attr]
    try:
        script.main()
    except UsageError as error:
        script.parser.error(str(error))
    except Exception as error:
        traceback.print_exc()
        print(to_quote(script, error), file=sys.stderr, flush=True)
        sys.exit(1)


def to_quote(script: ModuleType, error: Exception) -> str:
    """What was being done when an error came that is not foreseen, by which command and versions."""
    from importlib.metadata import version
    from platform import python_version

    steps = [frame.name for frame in traceback.extract_tb(error.__traceback__) if frame.filename == script.__file__]
    doing = f'in {steps[-1]}() of {script.__name__}' if steps else f'in {script.__name__}'
    names = ('timm', 'torch', 'torchvision', 'accelerate')
    versions = ', '.join([f'Python {python_version()}', *(f'{name} {version(name)}' for name in names)])
    return f'Not foreseen, {doing}. To report it, quote the lines above and: {shlex.join(sys.argv)} ({versions})'


def module(name: str) -> ModuleType:
    """The one module of a script, however it is started or imported."""
    return importlib.import_module(f'timm_synermix.{name}')
