"""Checkpoints to go on from: what they hold, and which there are in the folder of a run."""

from __future__ import annotations

import glob
import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch

from timm_synermix.utils.files import FolderLock
from timm_synermix.utils.safe_load import LOAD_ERRORS, check_finite, check_whole, load_content

# Of what a checkpoint holds beside timm's, and of the order and the draws of the epoch that it is in the middle of.
FORMAT = 4


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


def checkpoint_paths(folder: str) -> list[str]:
    """The checkpoints in a run's folder from which it can go on."""
    names = ('last.pth.tar', 'recovery-*.pth.tar', 'checkpoint-*.pth.tar')
    return [path for name in names for path in sorted(glob.glob(os.path.join(glob.escape(folder), name)))]


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


def last_good_checkpoint(folder: str) -> str | None:
    """The newest checkpoint in a run's folder that can be read, is whole and has finite weights."""
    paths = [path for path in checkpoint_paths(folder) if os.path.isfile(path)]
    for path in sorted(paths, key=os.path.getmtime, reverse=True):  # of the names of one file the first, `last`
        with suppress(*LOAD_ERRORS):
            ResumePoint.read(path).check()
            return path
    return None
