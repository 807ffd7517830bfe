"""timm's `create_dataset`, with one data set more and with checks of what a user points it at."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from timm import data as timm_data
from torch.utils.data import IterableDataset

from timm_synermix.data.classes import arrow_column, dataset_targets, read_class_map, renumber
from timm_synermix.data.dataset_checks import (
    check_columns,
    check_shards,
    check_stream,
    check_torch,
    refuse,
    split_folder,
)
from timm_synermix.data.digits import DigitsReader
from timm_synermix.data.image_folder import FolderReader, natural_order
from timm_synermix.data.memory import MemoryDataset
from timm_synermix.data.stream import ReadableStream

_STREAMS = ('hfids/', 'tfds/', 'wds/')
_KINDS = ('torch/', 'hfds/', *_STREAMS)


def create_dataset(
    name: str,
    root: str | None = None,
    split: str = 'validation',
    *,
    in_memory: bool = False,
    class_map: str | None = None,
    class_to_idx: Mapping[str, int] | None = None,
    input_img_mode: str | None = 'RGB',
    labelled: bool = True,
    **kwargs: Any,
) -> Any:
    """`timm.data.create_dataset`, which also knows `sklearn/digits` and can hold its images, with plain errors.

    Image folders are read by `FolderReader`, which has the same images and, but for names that are equal to timm, the
    same order.

    Args:
        name: Kind and name, as in timm: `torch/cifar10`, `hfds/NAME`; without a '/' it is a folder or tar file.
        root: The folder.
        split: Which part of the images.
        in_memory: Hold the images decoded, see `MemoryDataset`.
        class_map: File of the classes' numbers, as in timm.
        class_to_idx: Numbers of the classes in training, for a data set to evaluate, see `renumber`.
        input_img_mode: Pillow's mode that images are converted to, those of torchvision's data sets as well.
        labelled: False takes a folder of images without classes.
        kwargs: Other arguments of timm's.

    Raises:
        ValueError: The data set is not there, has no images or not the split, has classes that class_to_idx lacks, or
            cannot take one of the arguments.
    """
    kind = name.lower()
    if kind.startswith('sklearn/'):
        refuse(name, class_map=class_map, **kwargs)
        if kind != 'sklearn/digits':
            raise ValueError(f"--dataset: of scikit-learn there is only 'sklearn/digits', got '{name}'.")
        dataset = timm_data.ImageDataset(root=None, reader=DigitsReader(split), input_img_mode=input_img_mode)
    elif '/' in name:
        dataset = _create_other(name, root, split, class_map=class_map, input_img_mode=input_img_mode, **kwargs)
    else:
        dataset = _create_folder(root, split, class_map, input_img_mode, labelled, **kwargs)
    if class_to_idx:
        renumber(dataset, class_to_idx)
    return MemoryDataset(dataset) if in_memory and not kind.startswith(_STREAMS) else dataset


def _create_folder(
    root: str | None,
    split: str,
    class_map: str | None,
    input_img_mode: str | None,
    labelled: bool,
    target_key: str | None = None,
    input_key: str | None = None,
    load_bytes: bool = False,
    **kwargs: Any,
) -> Any:
    """An image folder, or a tar file of one."""
    if not root:
        raise ValueError('--data-dir must name the folder of the images, got none.')
    if not os.path.exists(root):
        raise ValueError(f"--data-dir must be a folder or tar file that exists, got '{root}'.")
    if target_key:
        raise ValueError(f'--target-key is not for image folders, whose folders are the classes, got {target_key}.')
    numbers = read_class_map(class_map, root) if class_map else None
    if os.path.isdir(root):
        folder = split_folder(root, split)
        reader: Any = FolderReader(folder, numbers, input_key, labelled)
        return timm_data.ImageDataset(folder, reader=reader, input_img_mode=input_img_mode, load_bytes=load_bytes)
    if input_key:
        raise ValueError(f'--input-key is not for tar files, got {input_key}.')
    dataset = _create_by_timm('', root, split, class_map=numbers, input_img_mode=input_img_mode, load_bytes=load_bytes)
    name_by_last_folder(dataset)
    return dataset


def name_by_last_folder(dataset: Any) -> None:
    """Name the classes of a tar file by their last folders, in place, on Windows too.

    Paths in a tar file have '/' everywhere, and timm takes them apart by the system's separator. So on Windows training
    would have other names than validation.
    """
    old = dataset.reader.class_name_to_idx
    last = {name: name.rpartition('/')[2] for name in old}
    if all(name == last[name] for name in old):
        return
    numbers = {name: i for i, name in enumerate(sorted(set(last.values()), key=natural_order))}
    renumbered = {i: numbers[last[name]] for name, i in old.items()}
    dataset.reader.targets = np.array([renumbered[int(i)] for i in dataset.reader.targets])
    dataset.reader.class_name_to_idx = numbers


def _create_other(name: str, root: str | None, split: str, **kwargs: Any) -> Any:
    """A data set of torchvision, of Hugging Face, a stream, ..."""
    kind = name.lower()
    if not kind.startswith(_KINDS):
        raise ValueError(f"--dataset must begin with one of {', '.join(_KINDS)}, or be sklearn/digits, got '{name}'.")
    mode = kwargs['input_img_mode']
    if kind.startswith('torch/'):
        refuse(name, **kwargs)
        check_torch(kind, root, split)
        dataset = _create_by_timm(name, root, split, **kwargs)
        dataset.input_img_mode = mode  # see ReadableImages, which torchvision's data sets do not know
        return dataset
    if kind.startswith('wds/') and not root:
        raise ValueError(f'--data-dir must name the folder of {name}, got none.')
    if kwargs.get('class_map'):
        kwargs['class_map'] = read_class_map(kwargs['class_map'])
    dataset = _create_by_timm(name, root, split, **kwargs)
    if kind.startswith('hfds/'):
        check_columns(name, dataset.reader)
    elif kind.startswith('wds/'):
        check_shards(root or '', split, dataset.reader)
    elif kind.startswith('hfids/'):  # another one, because a stream that has begun is not to be given to workers
        check_stream(name, split, _create_by_timm(name, root, split, **{**kwargs, 'is_training': False}))
    return ReadableStream(dataset.reader) if kind.startswith(_STREAMS) else dataset


def _create_by_timm(name: str, root: str | None, split: str, **kwargs: Any) -> Any:
    try:
        return timm_data.create_dataset(name, root=root, split=split, **kwargs)
    except Exception as error:  # each kind raises kinds of its own
        reason = ' '.join(str(error).split()) or type(error).__name__
        what = f"--dataset {name}, split '{split}'" if name else f"split '{split}'"
        hints = {
            'download=True': ' (--dataset-download)',
            'num_samples': ' (--train-num-samples, --val-num-samples; validate.py: --num-samples)',
            'Unknown split': ' (--train-split, --val-split; validate.py: --split)',
            'not found in info': ' (--train-split, --val-split; validate.py: --split)',
            'No module named': ': install it with pip',
            'Unsupported cast': ': the image column must hold images (--input-key)',
        }
        hint = next((hint for words, hint in hints.items() if words in reason), '')
        raise ValueError(f'{what}{f" in --data-dir {root}" if root else ""}: {reason}{hint}.') from error


def describe(dataset: Any) -> str:
    """The length, the labels and the file names of a data set in a few words that differ if they do.

    No image is read for it, and nothing of a stream, of which each process has its own part.
    """
    if isinstance(dataset, IterableDataset):
        return 'a stream'
    targets, text = dataset_targets(dataset), f'{len(dataset)} images'
    if targets is not None:
        text += f' with labels of checksum {zlib.crc32(targets.tobytes()):08x}'
    try:
        names = _file_names(dataset)
    except (AttributeError, NotImplementedError, AssertionError, TypeError):  # it has none
        return text
    return text + f' and names of checksum {zlib.crc32(chr(0).join(names).encode(errors="replace")):08x}'


def _file_names(dataset: Any) -> list[str]:
    if isinstance(dataset, MemoryDataset):
        dataset = dataset.dataset
    reader: Any = getattr(dataset, 'reader', None)
    source: Any = getattr(reader, 'dataset', None)
    if not hasattr(source, 'with_format'):
        return [os.path.basename(name) for name in dataset.filenames(basename=True)]
    # A Hugging Face data set reads the bytes of an image to tell its path; a column of Arrow's does not
    return [os.path.basename(path or '') for path in arrow_column(source, reader.image_key, 'path').to_pylist()]
