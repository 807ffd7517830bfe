"""Where the scripts are started: `python train.py`, the console commands and `-m timm_synermix.train`."""

import importlib
from types import ModuleType


def train() -> None:
    """Run train.py; --help and misspelt flags are answered before what takes seconds to import."""
    from timm_synermix.cli.train_args import create_parsers

    config_parser, parser = create_parsers()
    parser.parse_args(config_parser.parse_known_args()[1])
    run(module('train'))


def validate() -> None:
    """Run validate.py, in the same way."""
    from timm_synermix.cli.validate_args import create_parser

    create_parser().parse_args()
    run(module('validate'))


def run(script: ModuleType) -> None:
    """Call main() of a script; what a user got wrong is one line and exit code 2."""
    from timm_synermix.cli.checks import UsageError

    try:
        script.main()
    except UsageError as error:
        script.parser.error(str(error))


def module(name: str) -> ModuleType:
    """The one module of a script, however it is started or imported."""
    return importlib.import_module(f'timm_synermix.{name}')
