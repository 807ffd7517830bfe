"""The folder of a run: its name, what lies in it, and what keeps a process from writing there."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from safetensors import SafetensorError
from timm.models import safe_model_name

from timm_synermix.utils.files import FolderInUse


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


def in_use(error: FolderInUse) -> str:
    """What to tell a user who starts a second training in the folder of one that still runs."""
    return f'--experiment: {error}, which still trains there: end it first, or take another name'


def list_folder(folder: str) -> list[str]:
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
