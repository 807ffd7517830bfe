"""Files of weights: read as data, never as code, and refused with a plain reason."""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.models import clean_state_dict
from torch import Tensor

from timm_synermix.utils.files import WINDOWS

LOAD_ERRORS = (
    *(RuntimeError, ValueError, KeyError, EOFError, OSError, UnpicklingError, zipfile.BadZipFile),
    *(SafetensorError, AttributeError, TypeError),  # of a file that holds something else
)
NUMPY_FORMATS = ('.npz', '.npy')  # of JAX; which of timm's models can read them, timm knows

_EMA_KEYS = ('state_dict_ema', 'model_ema')


def load_content(path: str) -> Any:
    """What a file of torch holds: tensors, numbers, text, and the arguments of timm's checkpoints; nothing else.

    Tensors of a file of today's format are read when they are used, but on Windows.

    Raises:
        ValueError: It is something else than a file of weights; or one of `LOAD_ERRORS`.
    """
    check_kind(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            mapped = zipfile.is_zipfile(path) and not WINDOWS  # where a file that is mapped cannot be replaced
            return torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)
        except UnpicklingError as error:
            raise ValueError(_refusal(path, error)) from error


def _refusal(path: str, error: UnpicklingError) -> str:
    """What is in a pickle that torch refuses to load."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError):  # of the format before 2020
        names = [a or b for a, b in re.findall(r'GLOBAL ([\w.]+)|Unsupported global: ([\w.]+)', str(error))]
    if not names:
        return 'it is not a file of weights, or a damaged one'
    code = ', '.join(sorted({name.strip('.') for name in names})[:5])
    return (
        f'it holds more than weights and could run code ({code}), '
        'so it was not loaded; where you trust it, save the state_dict() of its model anew'
    )


def read_weights(path: str, use_ema: bool = True) -> dict[str, Tensor]:
    """The weights in a file: `.safetensors`, a state dict of torch, a checkpoint of timm, or an archive of numpy.

    They are compared with the checksums that the file has (those of torch and numpy do), and are finite.

    Args:
        path: The file.
        use_ema: Take the moving average of a checkpoint that has one.

    Raises:
        ValueError: The file is damaged, holds no weights, or weights that are not finite; or one of `LOAD_ERRORS`.
    """
    check_kind(path)
    if path.endswith(NUMPY_FORMATS):
        check_whole(path)
        arrays = np.load(path, allow_pickle=False)
        content: Any = {'': arrays} if isinstance(arrays, np.ndarray) else dict(arrays)
        content = {name: torch.from_numpy(array) for name, array in content.items() if array.dtype.kind == 'f'}
    elif path.endswith('.safetensors'):
        content = safetensors.torch.load_file(path)
    else:
        content = load_content(path)
        check_whole(path)
    weights = select_weights(content, use_ema)
    check_finite(weights)
    return weights


def select_weights(content: Any, use_ema: bool = True) -> dict[str, Tensor]:
    """The state dict in what a file holds, by timm's rules, under the names of the bare model."""
    if isinstance(content, dict):
        keys = [*(_EMA_KEYS if use_ema else ()), 'state_dict', 'model']
        content = next((content[key] for key in keys if content.get(key) is not None), content)
    tensors = isinstance(content, dict) and {name: value for name, value in content.items() if torch.is_tensor(value)}
    if not tensors:
        raise ValueError(f'it holds no weights but {type(content).__name__}{_keys(content)}')
    return clean_state_dict(content)


def without_split_bn(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the BatchNorm layers that `--split-bn` adds for augmented images: later nothing uses them."""
    return {name: value for name, value in weights.items() if '.aux_bn.' not in name}


def _keys(content: Any) -> str:
    return f' of {", ".join(map(str, list(content)[:5]))}' if isinstance(content, dict) and content else ''


def has_ema(path: str) -> bool:
    """Whether a file of weights holds a moving average beside them."""
    content = {} if path.endswith('.safetensors') else load_content(path)
    return isinstance(content, dict) and any(content.get(key) is not None for key in _EMA_KEYS)


def check_kind(path: str) -> None:
    """Refuse what is often found under the name of a file of weights.

    Raises:
        ValueError: The file is empty, a pointer of Git LFS, a web page or text.
    """
    with open(path, 'rb') as file:
        start = file.read(1024)
    if not start:
        raise ValueError('it is empty')
    if start.startswith(b'version https://git-lfs'):
        raise ValueError('it is a pointer of Git LFS, not a file of weights: `git lfs pull` fetches that')
    if re.match(rb'\s*(<!doctype|<html|<\?xml|<head)', start, re.IGNORECASE):
        raise ValueError('it is a web page, not a file of weights: the download needs another address, or a login')
    if not re.search(rb'[^\t\n\r\x20-\x7e\x80-\xff]', start) and not start.startswith(b'\x80'):
        raise ValueError('it is text, not a file of weights')


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


def check_finite(weights: dict[str, Any]) -> None:
    """Raise ValueError if a tensor has a NaN or an infinity, unless it is a mask of zeros and -inf."""
    floats = {name: value for name, value in weights.items() if torch.is_tensor(value) and value.is_floating_point()}
    for name, value in floats.items():
        if not is_sound(value):
            raise ValueError(f'{name} is not finite')


@torch.no_grad()
def is_sound(value: Tensor) -> bool:
    """Whether all numbers are finite; those of a mask may be zeros and -inf."""
    value = value if value.dtype.itemsize > 1 else value.float()  # few operators know 8 bits
    return bool(value.isfinite().all()) or bool(((value == 0) | (value == -torch.inf)).all())


@contextmanager
def load_errors(what: str) -> Iterator[None]:
    """Turn an error of loading a file of weights into a ValueError: what, and the reason on one line."""
    try:
        yield
    except LOAD_ERRORS as error:
        raise ValueError(f'{what}: {load_reason(error)}') from error


def load_reason(error: Exception) -> str:
    """Why a file cannot be loaded, on one line: what does not fit into the model, or the first sentence."""
    text = str(error)
    if isinstance(error, RuntimeError) and 'loading state_dict' in text:
        return _misfit(str(error))
    if isinstance(error, OSError) and error.strerror:
        return os.strerror(error.errno) if error.errno else error.strerror
    return (str(error) or type(error).__name__).splitlines()[0].partition('. ')[0]


def _misfit(text: str) -> str:
    """What torch says of weights of another model, in one line."""
    sizes = re.findall(r'size mismatch for ([\w.]+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)', text)
    classes = {(old.strip('[]').split(', ')[0], new.strip('[]').split(', ')[0]) for _, old, new in sizes}
    alike = all(old.partition(',')[2] == new.partition(',')[2] for _, old, new in sizes)
    parts = []
    if sizes and alike and len(classes) == 1:
        ((old, new),) = classes
        parts = [f'size mismatch, it is of {old} classes and the model of {new}: {_some([name for name, *_ in sizes])}']
    elif sizes:
        parts = [
            'size mismatch, ' + _some([f'{name} is {old} in it and {new} in the model' for name, old, new in sizes])
        ]
    for kind, word in (('Missing', 'lacks'), ('Unexpected', 'has besides')):
        found = re.search(rf'{kind} key\(s\) in state_dict: (.*?)\.? *(\n|$)', text)
        if found:
            parts.append(f'it {word} {_some(found[1].replace(chr(34), "").split(", "))}')
    return '; '.join(parts) or text.splitlines()[0]


def _some(names: list[str]) -> str:
    more = f' and {len(names) - 2} more' if len(names) > 2 else ''
    return ', '.join(names[:2]) + more
