"""Checkpoints in timm's own format, written whole or not at all, and the best weights as safetensors."""

from __future__ import annotations

import argparse
import glob
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from timm.models import safe_model_name
from timm.utils import get_outdir, get_state_dict, unwrap_model

from timm_synermix.utils.distributed import lost_worker
from timm_synermix.utils.files import WINDOWS, FolderInUse, FolderLock, lock_folder, replace, replacing, sync
from timm_synermix.utils.safe_load import LOAD_ERRORS, check_finite, check_whole, load_content, without_split_bn
from timm_synermix.utils.summary import trim_summary
from timm_synermix.utils.timm_private import CheckpointSaver

_logger = logging.getLogger(__name__)

# Of what a checkpoint holds beside timm's, and of the order of the images that it is in the middle of.
FORMAT = 2


# The best weights, and the same file under the name by which timm finds them in a folder.
_SAFETENSORS = ('model_best.safetensors', 'model.safetensors')


class SaveError(OSError):
    """A file of a run cannot be written. The message names it, and says why."""


def experiment_name(args: argparse.Namespace, img_size: int) -> str:
    """Name of this run's folder: --experiment, or the time, the model and the image size."""
    stamp = datetime.now().strftime('%Y%m%d-%H%M%S')
    return args.experiment or f'{stamp}-{safe_model_name(args.model)}-{img_size}'


def output_root(args: argparse.Namespace) -> str:
    """Path of the folder of all runs."""
    return args.output or './output/train'


def output_folder(args: argparse.Namespace) -> str:
    """Path of this run's folder, `<output>/<experiment>`."""
    return os.path.join(output_root(args), args.experiment)


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


def last_good_checkpoint(folder: str) -> str | None:
    """The newest checkpoint in a run's folder that can be read, is whole and has finite weights."""
    paths = [path for path in checkpoint_paths(folder) if os.path.isfile(path)]
    for path in sorted(paths, key=os.path.getmtime, reverse=True):  # of the names of one file the first, `last`
        with suppress(*LOAD_ERRORS):
            ResumePoint.read(path).check()
            return path
    return None


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


def in_use(error: FolderInUse) -> str:
    """What to tell a user who starts a second training in the folder of one that still runs."""
    return f'--experiment: {error}, which still trains there: end it first, or take another name'


def checkpoint_paths(folder: str) -> list[str]:
    """The checkpoints in a run's folder from which it can go on."""
    names = ('last.pth.tar', 'recovery-*.pth.tar', 'checkpoint-*.pth.tar')
    return [path for name in names for path in sorted(glob.glob(os.path.join(glob.escape(folder), name)))]


def _listdir(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


@contextmanager
def save_errors(folder: str) -> Iterator[None]:
    """Turn an error of writing to a run's folder into a SaveError."""
    try:
        yield
    except SaveError:
        raise
    except (OSError, SafetensorError) as error:
        raise SaveError(f'Cannot write to {folder}: {error}') from error


class NewerFormat(ValueError):
    """A checkpoint is of a newer version of this package."""


@dataclass
class ResumePoint:
    """A checkpoint to go on from.

    Attributes:
        path: The file.
        content: What it holds; tensors are read when they are needed.
        epoch: The epoch to go on with.
        batch: How many batches of that epoch are done, on each process.
        passed_over: Damaged files in whose place this one was taken.
        lock: That of the folder of the run that goes on, if it had one.
    """

    path: str
    content: dict[str, Any]
    epoch: int = 0
    batch: int = 0
    passed_over: list[str] = field(default_factory=list)
    lock: FolderLock | None = None

    @classmethod
    def read(cls, path: str) -> ResumePoint:
        """Read a training checkpoint, of this script or of timm's; raises one of `LOAD_ERRORS` if it is none."""
        content = load_content(path)
        if not isinstance(content, dict):
            raise ValueError(f'it holds no checkpoint but {type(content).__name__}')
        point = cls(path, content)
        try:
            version = point.format
            if point.state:
                point.epoch, point.batch = int(point.state['epoch']), int(point.state['batch'])
            elif 'epoch' in content:
                point.epoch = int(content['epoch']) + (content.get('version', 1) > 1)
            sound = min(point.place) >= 0 and _is_history(content)
            sound = sound and all('losses' in rank for rank in point.state.get('ranks', ()) if point.batch)
        except (KeyError, TypeError, ValueError, AttributeError):
            sound = False
        if not sound:
            raise ValueError('it is not a checkpoint of a training run')
        if version > FORMAT:
            raise NewerFormat(f'it has format {version}, of a newer version of timm-synermix; this one knows {FORMAT}')
        return point

    def check(self) -> None:
        """Raise ValueError, or another of `LOAD_ERRORS`, if the file is damaged or a weight is not finite."""
        check_whole(self.path)
        for key in ('state_dict', 'state_dict_ema'):
            check_finite(self.content.get(key) or {})

    @property
    def class_to_idx(self) -> dict[str, int]:
        """The numbers of the classes that it was trained on, by name; of a run whose classes have none, nothing."""
        return self.state.get('class_to_idx') or {}

    @property
    def format(self) -> int:
        """Format of what this script keeps in it."""
        return int(self.state.get('format', FORMAT))

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and batch, by which checkpoints are ordered."""
        return self.epoch, self.batch

    @property
    def state(self) -> dict[str, Any]:
        """What `RunSaver` keeps of a run beside timm's checkpoint; of one of timm's, nothing."""
        saver = self.content.get('saver')
        return (saver.get('run') or {}) if isinstance(saver, dict) else {}

    def is_in(self, folder: str) -> bool:
        """Whether the file lies in a folder."""
        return os.path.isdir(folder) and os.path.samefile(os.path.dirname(os.path.realpath(self.path)), folder)

    @property
    def is_last(self) -> bool:
        """Whether it is the last checkpoint of whole epochs."""
        return os.path.basename(os.path.realpath(self.path)) == 'last.pth.tar' and not self.batch


def _is_history(content: dict[str, Any]) -> bool:
    """Whether the numbers are numbers: files are named by them, and deleted."""
    saver = content.get('saver') or {}
    files = list(saver.get('checkpoint_files', ()))
    numbers = [content.get('metric'), saver.get('best_metric'), saver.get('best_epoch'), *(value for _, value in files)]
    return (
        isinstance(content.get('epoch', 0), int)
        and all(value is None or isinstance(value, (int, float)) for value in numbers)
        and all(isinstance(name, str) for name, _ in files)
    )


def saved_classes(path: str) -> dict[str, int]:
    """The numbers of the classes that a file of weights was trained on, by name; none if it does not tell."""
    try:
        if path.endswith('.safetensors'):
            with safetensors.safe_open(path, 'pt') as file:
                classes = json.loads((file.metadata() or {}).get('class_to_idx', '{}'))
        else:
            classes = ResumePoint(path, load_content(path)).class_to_idx
        return {str(name): int(number) for name, number in classes.items()}
    except LOAD_ERRORS:  # whoever reads the weights will say why
        return {}


class RunSaver(CheckpointSaver):
    """timm's CheckpointSaver of one run's folder, which also keeps `model_best.safetensors`.

    A file is written beside the one it replaces, waited for until it is on the disk, and renamed: whenever the process,
    the machine or the disk fails, the checkpoint before is there.

    Args:
        folder: The run's folder, created here.
        args_text: Text of `args.yaml`.
        resume_from: Checkpoint the run goes on from, or None. One of this folder brings its history.
        start: First epoch, and first batch in it.
        complete: There is nothing left to train: nothing is written but what a kill after the last checkpoint left out.
        kwargs: Arguments of CheckpointSaver, with a task.

    Attributes:
        run_state: What the next checkpoint holds beside timm's: 'epoch' and 'batch' to go on with, and what else a run
            needs to go on as if it had never stopped. The format is added here.

    Raises:
        ValueError: The folder cannot be written to, or another process trains there.
    """

    def __init__(
        self,
        folder: str,
        args_text: str,
        *,
        resume_from: ResumePoint | None,
        start: tuple[int, int],
        complete: bool = False,
        **kwargs: Any,
    ) -> None:
        self.summary_path = os.path.join(folder, 'summary.csv')
        self.run_state: dict[str, Any] = {}
        self._begun = complete
        goes_on = resume_from is not None and resume_from.is_in(folder)
        self._start = start if goes_on else (0, 0)
        self._damaged = resume_from.passed_over if resume_from is not None else []
        self._is_new = not os.path.isdir(folder)
        try:
            get_outdir(folder)
            self._lock = (resume_from and resume_from.lock) or lock_folder(folder)
            if not complete:
                with replacing(os.path.join(folder, 'args.yaml')) as path, open(path, 'w', encoding='utf-8') as file:
                    file.write(args_text)
        except OSError as error:
            raise ValueError(f"--output: cannot write to the run's folder {folder}: {error.strerror}") from error
        except FolderInUse as error:
            raise ValueError(in_use(error)) from error
        for name in _listdir(folder):  # left behind by a process that was killed while it wrote
            if re.fullmatch(r'(recovery_)?tmp\.pth\.tar|.*\.(yaml|csv|json|md|png|pth\.tar|safetensors)\.tmp', name):
                os.remove(os.path.join(folder, name))
        super().__init__(checkpoint_dir=folder, recovery_dir=folder, **kwargs)
        if goes_on and resume_from is not None:
            self._go_on(resume_from)

    @contextmanager
    def discarded_unless_built(self) -> Iterator[None]:
        """If the block, in which a run is built to its end, fails, take a new folder away again."""
        try:
            yield
        except ValueError:
            self.unlock()
            if self._is_new:
                shutil.rmtree(self.checkpoint_dir, ignore_errors=True)
            raise

    def unlock(self) -> None:
        """Let other runs use the folder; the end of the process does so too."""
        if self._lock is not None:
            self._lock.release()

    def _go_on(self, point: ResumePoint) -> None:
        """Take over the history of a checkpoint of this folder."""
        state = point.content.get('saver')
        if not isinstance(state, dict):
            return
        # Names only, and only such as this class gives: these files will be deleted some day.
        own = re.compile(r'checkpoint-\d+\.pth\.tar')
        files = [(name, value) for name, value in state.get('checkpoint_files', ()) if own.fullmatch(name)]
        epoch, metric = point.content['epoch'], point.content.get('metric')
        pending = (None, None) if point.batch or point.is_last else (epoch, metric)
        self.load_state_dict({**state, 'checkpoint_files': files, 'pending': pending})
        if point.is_last and point.place == self._start:  # again: the run may have ended between saving and this
            self._rank(epoch, metric, point.content)
            if epoch + 1 in (getattr(self.args, 'save_epochs', None) or ()):
                self.save_milestone(epoch + 1)

    def begin(self) -> None:
        """Before the first checkpoint of this run is written: put aside what is not of it.

        Checkpoints that are damaged or beyond the place where the run goes on, or all of them if it begins anew, are
        renamed to a name ending in `.old`, `.old2`, ...; rows of summary.csv from there on are dropped.
        """
        if self._begun:
            return
        self._begun = True
        folder = self.checkpoint_dir
        suffixes = ('.old', *(f'.old{n}' for n in range(2, 10_000)))
        suffix = next(s for s in suffixes if not any(name.endswith(s) for name in _listdir(folder)))
        with save_errors(folder):
            best = os.path.join(folder, 'model_best.pth.tar')
            found = filter(os.path.isfile, [*checkpoint_paths(folder), best])
            aside = [path for path in found if self._is_foreign(path)]
            if best in aside:
                aside += [os.path.join(folder, name) for name in _SAFETENSORS]
            if self._start == (0, 0):
                aside.append(self.summary_path)
            for path in filter(os.path.exists, aside):
                _logger.info(f'Renamed {path} to {os.path.basename(path)}{suffix}: this run does not go on from it.')
                replace(path, path + suffix)
            if self._start > (0, 0):
                trim_summary(self.summary_path, self._start[0])
            kept = None if self.best_epoch is None else self._checkpoint_path(self.best_epoch)
            if best in aside and kept is not None and os.path.exists(kept):
                self._duplicate(kept, best)
                self._save_safetensors(load_content(kept))
        recoveries = sorted(_recoveries(folder), key=lambda item: item[0])
        self.prev_recovery_file, self.curr_recovery_file = ['', '', *(path for _, path in recoveries)][-2:]

    def _is_foreign(self, path: str) -> bool:
        if path in self._damaged:
            return True
        try:
            return not (0, 0) < ResumePoint.read(path).place <= self._start
        except OSError:  # it may be there again in a moment
            return False
        except LOAD_ERRORS as error:
            if lost_worker(error):  # not the fault of the file
                raise
            return True

    def state_dict(self, epoch: int | None = None, metric: float | None = None) -> dict[str, Any]:
        """timm's bookkeeping, and under 'run' what this script needs."""
        return {**super().state_dict(epoch, metric), 'run': {'format': FORMAT, **self.run_state}}

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> tuple[float | None, int | None]:
        """Save as timm does; if it is the best so far, save its weights as safetensors too."""
        self.begin()
        temporary = os.path.join(self.checkpoint_dir, 'tmp' + self.extension)
        self._save(temporary, epoch, metric)
        self._replace(temporary, os.path.join(self.checkpoint_dir, 'last' + self.extension))
        self._rank(epoch, metric)
        return self.best_metric, self.best_epoch

    def save_recovery(self, epoch: int, batch_idx: int = 0) -> None:
        """Save in the middle of an epoch, as timm does."""
        self.begin()
        super().save_recovery(epoch, batch_idx)

    def _rank(self, epoch: int, metric: float | None, content: dict[str, Any] | None = None) -> None:
        """Keep `last` under its number if it is among the best, and as the best if it is that: timm's rules.

        Args:
            epoch, metric: Of `last`.
            content: What it holds, if that is not what the task has now.
        """
        full = len(self.checkpoint_files) >= self.max_history
        worst = self.checkpoint_files[-1][1] if self.checkpoint_files else None
        if not full or worst is None or (metric is not None and self.cmp(metric, worst)):
            if full:
                self._cleanup_checkpoints(1)
            path = self._checkpoint_path(epoch)
            self._duplicate(os.path.join(self.checkpoint_dir, 'last' + self.extension), path)
            self._track_checkpoint(path, epoch, metric)
        if self.best_epoch == epoch:
            self._save_safetensors(content)

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        try:
            super()._save(save_path, epoch, metric)
            sync(save_path)
        except (OSError, RuntimeError) as error:  # torch's writer has no errno
            with suppress(OSError):
                os.remove(save_path)
            if lost_worker(error):  # not the fault of the file
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise SaveError(f'Cannot save the checkpoint {save_path}: {reason}') from error

    def _replace(self, src: str, dst: str) -> None:
        with save_errors(self.checkpoint_dir):
            replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        with save_errors(self.checkpoint_dir):
            temporary = dst + '.tmp'
            super()._duplicate(src, temporary)
            sync(temporary)
            replace(temporary, dst)
            with suppress(FileNotFoundError):  # renaming one name of a file to another of it leaves both
                os.remove(temporary)

    def _save_safetensors(self, content: dict[str, Any] | None = None) -> None:
        # The averaged weights if there are any: those are what timm loads from model_best.pth.tar too.
        if content is None:
            state = get_state_dict(self.task.get_eval_model(ema=self.task.has_ema()), unwrap_model)
            run = self.run_state
        else:
            state = content.get('state_dict_ema') or content['state_dict']
            run = content.get('saver', {}).get('run') or {}
        classes = {'class_to_idx': json.dumps(run['class_to_idx'])} if run.get('class_to_idx') else None
        state = without_split_bn(state)
        state = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}  # no aliases
        path, timm_s = (os.path.join(self.checkpoint_dir, name) for name in _SAFETENSORS)
        with save_errors(self.checkpoint_dir), replacing(path) as temporary, open(temporary, 'wb') as file:
            file.write(safetensors.torch.save(state, classes))  # save_file would let nobody else read it
        self._duplicate(path, timm_s)


def _recoveries(folder: str) -> list[tuple[tuple[int, int], str]]:
    """The recovery checkpoints of a folder: epoch and update, and path."""
    matches = [re.fullmatch(r'recovery-(\d+)-(\d+)\.pth\.tar', name) for name in _listdir(folder)]
    return [((int(m[1]), int(m[2])), os.path.join(folder, m[0])) for m in matches if m]
