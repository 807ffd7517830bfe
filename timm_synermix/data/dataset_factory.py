"""timm's `create_dataset`, with one data set more and with checks of what a user points it at."""

from __future__ import annotations

import io
import logging
import os
import sys
import zlib
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from timm import data as timm_data
from timm.data.readers.reader import Reader
from torch.utils.data import (
    Dataset,
    IterableDataset,
    Subset,
)
from tqdm import tqdm

from timm_synermix.utils.timm_private import search_split

_logger = logging.getLogger(__name__)


def dataset_targets(dataset: Dataset) -> np.ndarray | None:
    """The class of every image of a data set, int64 `[len(dataset)]`, without opening an image.

    Knows timm's folder, tar and Hugging Face (`hfds/`) readers, torchvision's data sets with `targets`, and
    `torch.utils.data.Subset` of these; the data set's `target_transform` is applied.

    Returns:
        None if the data set cannot tell: a streaming data set, one of a kind unknown here, or without one class each.
    """
    if isinstance(dataset, Subset):
        targets = dataset_targets(dataset.dataset)
        return None if targets is None else targets[np.asarray(dataset.indices)]
    if isinstance(dataset, IterableDataset):
        return None
    labels: Any
    source = getattr(dataset, 'reader', dataset)  # timm data sets read through a reader
    if hasattr(source, 'targets'):
        labels = source.targets
    elif hasattr(source, 'iter_targets'):
        labels = list(source.iter_targets())
    elif hasattr(source, 'samples'):
        labels = [target for _, target in source.samples]
    else:
        return None
    if len(labels) and np.ndim(labels[0]):  # several labels an image
        return None
    target_transform = getattr(dataset, 'target_transform', None)
    if target_transform is not None:
        labels = [target_transform(int(label)) for label in labels]
    targets = np.asarray(labels)
    return targets.astype(np.int64) if targets.ndim == 1 else None


class DigitsReader(Reader):
    """scikit-learn's digits: 1,797 scanned handwritten digits of 8x8 pixels, inside the scikit-learn wheel.

    A fixed, stratified 3:1 split, 1,347 images to train and 450 to validate. Named `sklearn/digits`.

    Args:
        split: 'train', or 'validation' (also 'val', 'valid', 'test', 'eval').

    Raises:
        ValueError: The split is another.
    """

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        splits = {'train': 0, 'validation': 1, 'val': 1, 'valid': 1, 'test': 1, 'eval': 1}
        if split not in splits:
            raise ValueError(
                f"--train-split and --val-split of sklearn/digits must be 'train' or 'validation', got '{split}'."
            )
        digits = load_digits()
        parts = train_test_split(np.arange(len(digits.target)), test_size=450, stratify=digits.target, random_state=0)
        indices = np.sort(parts[splits[split]])
        self.images = np.round(digits.images[indices] * (255 / 16)).astype(np.uint8)
        self.targets = digits.target[indices]
        self.class_to_idx = {str(digit): digit for digit in range(10)}

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        file = io.BytesIO()
        Image.fromarray(self.images[index]).save(file, format='bmp')
        return file, int(self.targets[index])

    def __len__(self) -> int:
        return len(self.images)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f'{index}.bmp'


class MemoryReader(Reader):
    """The images of a data set as uncompressed files in memory: for small ones, which take long to open and decode.

    One that cannot be read is left to the data set's own reader, to be met where it is used.

    Args:
        dataset: A timm image data set. Its images are converted to its input_img_mode.
    """

    def __init__(self, dataset: timm_data.ImageDataset) -> None:
        self.reader = dataset.reader
        self.class_to_idx = _classes(dataset)
        self.files: list[bytes | None] = []
        self.targets: list[Any] = []
        targets = dataset_targets(dataset)
        count, watched = len(self.reader), sys.stderr.isatty()
        for index in tqdm(range(count), desc='In memory', unit='image', leave=False, disable=not watched):
            held, target = None, None
            with suppress(Exception):  # decoders raise all kinds
                file, target = self.reader[index]
                image, memory = Image.open(file), io.BytesIO()
                image.convert(dataset.input_img_mode or image.mode).save(memory, format='bmp')
                held = memory.getvalue()
            self.files.append(held)
            self.targets.append(target if targets is None else int(targets[index]))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        file = self.files[index]
        return self.reader[index] if file is None else (io.BytesIO(file), self.targets[index])

    def __len__(self) -> int:
        return len(self.files)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name: str = self.reader._filename(index, basename, absolute)
        return name


def create_dataset(
    name: str, root: str | None = None, split: str = 'validation', in_memory: bool = False, **kwargs: Any
) -> Any:
    """`timm.data.create_dataset`, which also knows `sklearn/digits` and can hold its images, with plain errors.

    Args:
        in_memory: Hold the images decoded, see `MemoryReader`. torchvision's data sets are left as they are.

    Raises:
        ValueError: The folder does not exist, or has no images or not the split.
    """
    dataset = _create_dataset(name, root, split, **kwargs)
    if in_memory and isinstance(dataset, timm_data.ImageDataset):
        dataset.reader = MemoryReader(dataset)
    return dataset


def _create_dataset(name: str, root: str | None, split: str, **kwargs: Any) -> Any:
    if name.lower() == 'sklearn/digits':
        return timm_data.ImageDataset(
            root=None, reader=DigitsReader(split), input_img_mode=kwargs.get('input_img_mode', 'RGB')
        )
    if name.lower().startswith('sklearn/'):
        raise ValueError(f"--dataset: of scikit-learn there is only 'sklearn/digits', got '{name}'.")
    if '/' not in name:  # an image folder or tar
        _check_folder(root, split)
    elif name.lower().startswith('torch/') and not root:
        raise ValueError(f'--data-dir must name the folder of {name}, got none.')
    try:
        return timm_data.create_dataset(name, root=root, split=split, **kwargs)
    except RuntimeError as error:
        if 'Found 0 images' not in str(error):
            raise
        raise ValueError(f"--data-dir: there are no images for split '{split}' in '{root}'. {error}") from error


def check_classes(train: Any, validation: Any, num_classes: int) -> None:
    """Refuse data that a classifier of num_classes cannot learn; warn if the two sets number their classes differently.

    A data set that does not tell its labels (see `dataset_targets`) passes, as does None.

    Raises:
        ValueError: The training set has one class only, or either set has more classes than num_classes.
    """
    for name, dataset in (('training', train), ('validation', validation)):
        targets = None if dataset is None else dataset_targets(dataset)
        if targets is None or len(targets) == 0:
            continue
        if targets.max() >= num_classes:
            raise ValueError(
                f'--num-classes must cover all {targets.max() + 1} classes of the {name} set, got {num_classes}.'
            )
        if dataset is train and len(np.unique(targets)) < 2:
            raise ValueError(
                f'--data-dir: the training set must have at least two classes, got one: {list(_classes(train))}.'
            )
    unknown = {name for name, index in _classes(validation).items() if _classes(train).get(name) != index}
    if unknown and _classes(train):
        _logger.warning(
            'The validation set numbers classes otherwise than the training set, so its accuracy means little: %s.',
            ', '.join(sorted(unknown)[:5]),
        )


def _classes(dataset: Any) -> dict[str, int]:
    reader = getattr(dataset, 'reader', dataset)
    return getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}


def _check_folder(root: str | None, split: str) -> None:
    if not root:
        raise ValueError('--data-dir must name the folder of the images, got none.')
    if not os.path.exists(root):
        raise ValueError(f"--data-dir must be a folder or tar file that exists, got '{root}'.")
    # timm takes the folder itself for a split it does not find: fine for a folder of classes, not for one of splits
    splits = [name for name in ('train', 'training', 'val', 'validation') if os.path.isdir(os.path.join(root, name))]
    if splits and os.path.isdir(root) and os.path.samefile(search_split(root, split), root):
        raise ValueError(f"--data-dir: '{root}' has no split '{split}', only {', '.join(splits)}.")


def describe(dataset: Any) -> str:
    """The length, the labels and the file names of a data set in a few words that differ if they do."""
    targets, text = dataset_targets(dataset), f'{len(dataset)} images'
    if targets is not None:
        text += f' with labels of checksum {zlib.crc32(targets.tobytes()):08x}'
    try:
        names = [os.path.basename(name) for name in dataset.filenames(basename=True)]
    except (AttributeError, NotImplementedError, AssertionError, TypeError):  # it has none
        return text
    return text + f' and names of checksum {zlib.crc32(chr(0).join(names).encode(errors="replace")):08x}'


def class_names(dataset: Any) -> list[str] | None:
    """The names of a data set's classes by index, if it has any."""
    indices = _classes(dataset)
    if not indices or sorted(indices.values()) != list(range(len(indices))):
        return None
    return [str(name) for name in sorted(indices, key=indices.__getitem__)]
