"""Checks of what a user points a data set at."""

from __future__ import annotations

import logging
import os
from typing import Any

from timm.data import ImageDataset
from timm.data.readers.targets import has_field, parse_target_keys

from timm_synermix.data.classes import dataset_targets, some
from timm_synermix.data.image_folder import walk_images
from timm_synermix.utils.timm_private import search_split

_logger = logging.getLogger(__name__)

# torchvision's sets for which timm takes any split but 'train' and 'training' for the test set, and what it is called
_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')
_TWO_SPLITS = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist')


def split_folder(root: str, split: str) -> str:
    """The folder of a split, by timm's rules.

    Raises:
        ValueError: There is none, and the folder has other splits.
    """
    folder = search_split(root, split)
    # timm takes the folder itself for a split it does not find: fine for a folder of classes, not for one of splits
    splits = [name for name in ('train', 'training', 'val', 'validation') if os.path.isdir(os.path.join(root, name))]
    if splits and os.path.samefile(folder, root):
        raise ValueError(f"--data-dir: '{root}' has no split '{split}', only {', '.join(splits)}.")
    if not os.path.isdir(folder):
        raise ValueError(f"--data-dir: the split '{split}' must be a folder, got the file '{folder}'.")
    return str(folder)


def check_splits(name: str, root: str | None, train_split: str, val_split: str) -> None:
    """Refuse to validate on the very images of training, unless the flags ask for it by name: then warn.

    Raises:
        ValueError: Neither split has a folder of its own, or both are the same.
    """
    same = train_split == val_split
    folders = '/' not in name or name.lower() in ('torch/folder', 'torch/image_folder')
    if folders and root and os.path.exists(root) and not same:
        one, other = (search_split(root, split) if os.path.isdir(root) else root for split in (train_split, val_split))
        if os.path.samefile(one, other):
            found = (some(os.listdir(root)) or 'nothing') if os.path.isdir(root) else 'one tar file'
            raise ValueError(
                f"--data-dir: expected folders '{train_split}' and '{val_split}' in '{root}', and in them one for each "
                f"class, found {found}: training and validation would have the same images. --val-split '' trains "
                'without validation.'
            )
    if same:
        _logger.warning(f"--train-split and --val-split are both '{val_split}': validation has the images of training.")


def refuse(dataset: str, **flags: Any) -> None:
    """Raise ValueError if a flag is set that has no effect on a data set."""
    for name in ('class_map', 'input_key', 'target_key', 'target_format'):
        if flags.get(name):
            raise ValueError(f'--{name.replace("_", "-")} has no effect on --dataset {dataset}, got {flags[name]}.')


def check_torch(kind: str, root: str | None, split: str) -> None:
    if not root:
        raise ValueError(f'--data-dir must name the folder of {kind}, got none.')
    if kind in ('torch/folder', 'torch/image_folder') and os.path.isdir(root):
        odd = walk_images(split_folder(root, split), {'.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.tif', '.webp'}).odd
        if odd:
            raise ValueError(f"--data-dir: reading '{root}' might never end, for {some(odd)}.")
    if kind.removeprefix('torch/') in _TWO_SPLITS and split not in _SPLITS:
        raise ValueError(f"--train-split and --val-split of {kind} must be among {some(_SPLITS, 9)}, got '{split}'.")


def check_columns(name: str, reader: Any) -> None:
    """Whether a Hugging Face data set has the columns, and whole numbers in that of the labels."""
    features = reader.dataset.features
    table = reader.dataset.data
    columns = [name for name in table.column_names if table.column(name).null_count < len(table)]
    if not len(table):
        raise ValueError(f'--dataset {name} has no images.')
    if reader.image_key not in columns:  # timm has made an empty one of it
        raise ValueError(
            f"--input-key must be the column of the images of --dataset {name}, got '{reader.image_key}' of "
            f'{", ".join(columns)}.'
        )
    keys = parse_target_keys(reader.label_key) or (reader.label_key,)
    missing = [key for key in keys if not has_field(features, key)]
    if missing:
        others = ', '.join(column for column in columns if column != reader.image_key)
        raise ValueError(
            f"--target-key must be the column of the labels of --dataset {name}, got '{missing[0]}' of {others}."
        )
    try:
        dataset_targets(ImageDataset(None, reader=reader))
    except KeyError as error:
        raise ValueError(f'--class-map lacks the class {error} of --dataset {name}.') from error
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--target-key '{reader.label_key}' of --dataset {name} must hold numbers, or --class-map must give "
            f'numbers to what it holds: {error}.'
        ) from error


def check_shards(root: str, split: str, reader: Any) -> None:
    """Whether the files of a WebDataset are there."""
    paths = [os.path.join(root, name) for name in reader.split_info.filenames]
    missing = [path for path in paths if '://' not in path and 'pipe:' not in path and not os.path.isfile(path)]
    if missing:
        raise ValueError(f"--data-dir: of the split '{split}' there is no {some(missing, 3)}.")
    if not reader.num_samples and reader.dist_num_replicas > 1:
        raise ValueError(
            f"--val-num-samples (validate.py: --num-samples) must say how many images the split '{split}' has, for "
            f'{reader.dist_num_replicas} processes to share.'
        )


def check_stream(name: str, split: str, dataset: Any) -> None:
    """Whether the first image of a stream can be read and has a label."""
    try:
        first = next(iter(dataset), None)
    except Exception as error:  # each kind raises kinds of its own
        raise ValueError(
            f"--dataset {name}, split '{split}': the first image cannot be read, {type(error).__name__}: {error} "
            '(--input-key, --target-key).'
        ) from error
    label = first and first[1]
    if isinstance(label, int) and label < 0:
        raise ValueError(
            f"The images of --dataset {name}, split '{split}' have no label (it is {label}): choose another split with "
            '--train-split, --val-split or --split, or another column with --target-key.'
        )
