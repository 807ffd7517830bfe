"""Files of weights: read as data, never as code, and refused with a plain reason."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

LOAD_ERRORS = (
    *(RuntimeError, ValueError, KeyError, EOFError, OSError, UnpicklingError, zipfile.BadZipFile),
    *(SafetensorError, AttributeError, TypeError),  # of a file that holds something else
)


def load_content(path: str) -> Any:
    """What a file of torch holds: tensors, numbers, text, and the arguments of timm's checkpoints; nothing else.

    Tensors of a file of today's format are read when they are used.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))


def check_whole(path: str) -> None:
    """Compare a file of torch with the checksums it holds, one for each of its parts. Other formats have none.

    Raises:
        ValueError: A part is not what was written.
        zipfile.BadZipFile: The list of the parts is not.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise ValueError(f'checksum of {damaged}')


@contextmanager
def load_errors(what: str) -> Iterator[None]:
    """Turn an error of loading a file of weights into a ValueError: what, and the reason on one line."""
    try:
        yield
    except LOAD_ERRORS as error:
        raise ValueError(f'{what}: {load_reason(error)}') from error


def load_reason(error: Exception) -> str:
    """Why a file cannot be loaded: the first sentence of the error, or that the file could run code."""
    text = f'{error}\n{error.__cause__}'
    if 'weights_only' in text:
        names = re.findall(r'GLOBAL ([\w.]+)|Unsupported globals?: ([\w.]+)', text)
        code = ', '.join(dict.fromkeys((a or b).strip('.') for a, b in names))
        return f'it holds more than weights and could run code{f" ({code})" if code else ""}, so it was not loaded'
    return (str(error) or type(error).__name__).splitlines()[0].partition('. ')[0]
