"""How a run ends that does not reach its end: one line that says why and how to go on, and an exit code."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from timm_synermix.data.dataset import UnreadableImage
from timm_synermix.engine.loss_guard import NonFiniteLoss
from timm_synermix.engine.resume_point import last_good_checkpoint
from timm_synermix.engine.run import Run
from timm_synermix.engine.run_folder import SaveError, output_folder
from timm_synermix.utils.distributed import lost_process, lost_worker, lost_worker_reason
from timm_synermix.utils.files import WINDOWS
from timm_synermix.utils.signals import Stopped

_logger = logging.getLogger(__name__)


def how_to_continue(args: argparse.Namespace) -> str:
    """What to tell a user whose run has stopped: the last good checkpoint, and the command that goes on."""
    if not args.experiment and getattr(args, 'rank', 0) > 0:  # the first process alone has named the run
        return "The run's folder is in the log of the first process."
    path = last_good_checkpoint(output_folder(args)) if args.experiment else None
    if path is None:
        return 'No checkpoint has been saved, there is nothing to continue.'
    if getattr(args, 'world_size', 1) > 1:  # the launcher's flags are not known here
        flags = [*(['--output', args.output] if args.output else []), '--experiment', args.experiment]
        return f'The last good checkpoint is {path}. Add {shell_words([*flags, "--resume", "auto"])} to go on.'
    return f'The last good checkpoint is {path}. To go on: {command_to_continue(args.experiment)}'


def command_to_continue(experiment: str) -> str:
    """The command line of this process, to be pasted into a shell, so that it goes on with the run."""
    program, arguments = sys.argv[0], iter(sys.argv[1:])
    kept: list[str] = []
    for argument in arguments:
        name, _, value = argument.partition('=')
        if name not in ('--resume', '--start-epoch', '--no-resume-opt', '--experiment'):
            kept.append(argument)
        elif name != '--no-resume-opt' and not value:
            next(arguments, None)
    start = ['python', program] if program.endswith('.py') else [os.path.basename(program)]
    return shell_words([*start, *kept, '--experiment', experiment, '--resume', 'auto'])


def shell_words(words: list[str]) -> str:
    """Words as the system's shell takes them."""
    return subprocess.list2cmdline(words) if WINDOWS else shlex.join(words)


@contextmanager
def interrupts_told(args: argparse.Namespace) -> Iterator[None]:
    """Say how to go on after an interrupt that nothing else has taken care of."""
    try:
        yield
    except KeyboardInterrupt:
        if getattr(args, 'rank', 0) == 0:  # a run that is not built yet has no rank
            _logger.info(f'Interrupted. {how_to_continue(args)}')
        sys.exit(130)  # the shell's code for SIGINT


@contextmanager
def stops_told(run: Run) -> Iterator[None]:
    """Say why a run has stopped, and how to go on."""
    args = run.args
    try:
        with interrupts_told(args):
            yield
    except Stopped as stopped:
        if args.rank == 0:
            _logger.info(f'Interrupted. {how_to_continue(args)}')
        run.accelerator.end_training()
        sys.exit(128 + stopped.signum)  # 130 for SIGINT, 138 for SIGUSR1, 143 for SIGTERM
    except (NonFiniteLoss, SaveError, UnreadableImage) as error:
        if args.rank == 0 or not isinstance(error, NonFiniteLoss):  # which all processes raise
            reason = str(error).splitlines()[-1].rpartition('UnreadableImage: ')[2]  # a worker's has its traceback
            hint = '. See --lr and --max-bad-steps' if isinstance(error, NonFiniteLoss) else ''
            _logger.error(f'Stopped: {reason}{hint}. {how_to_continue(args)}')
        sys.exit(1)
    except RuntimeError as error:
        if lost_worker(error):
            _logger.error(f'Stopped: {lost_worker_reason(error)}. {how_to_continue(args)}')
            sys.exit(1)
        if args.world_size == 1 or not lost_process(error):
            raise
        _logger.error(f'Stopped: another process of the run has ended. {how_to_continue(args)}')
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _logger.error(f'Stopped: {error.strerror}: {error.filename}. {how_to_continue(args)}')
        sys.exit(1)
    finally:
        if run.keeper.saver is not None:
            run.keeper.saver.unlock()
