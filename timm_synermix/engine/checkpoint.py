"""Checkpoints in timm's own format, written whole or not at all, and the best weights as safetensors."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import safetensors.torch
from timm.utils import get_outdir, get_state_dict, unwrap_model

from timm_synermix.engine.resume_point import FORMAT, ResumePoint, checkpoint_paths
from timm_synermix.engine.run_folder import SaveError, in_use, list_folder, save_errors
from timm_synermix.utils.distributed import lost_worker
from timm_synermix.utils.files import FolderInUse, lock_folder, replace, replacing, sync
from timm_synermix.utils.safe_load import LOAD_ERRORS, load_content, without_split_bn
from timm_synermix.utils.summary import trim_summary
from timm_synermix.utils.timm_private import CheckpointSaver

_logger = logging.getLogger(__name__)

# The best weights, and the same file under the name by which timm finds them in a folder.
_SAFETENSORS = ('model_best.safetensors', 'model.safetensors')


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
        for name in list_folder(folder):  # left behind by a process that was killed while it wrote
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
        suffix = next(s for s in suffixes if not any(name.endswith(s) for name in list_folder(folder)))
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
    matches = [re.fullmatch(r'recovery-(\d+)-(\d+)\.pth\.tar', name) for name in list_folder(folder)]
    return [((int(m[1]), int(m[2])), os.path.join(folder, m[0])) for m in matches if m]
