"""The classes of a data set: their numbers, their names, and whether a classifier can learn them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
from timm.data.readers.class_map import load_class_map
from torch.utils.data import Dataset, IterableDataset, Subset


def dataset_targets(dataset: Dataset) -> np.ndarray | None:
    """The class of every image of a data set, int64 `[len(dataset)]`, without opening an image; -1 for none.

    Knows timm's folder, tar and Hugging Face (`hfds/`) readers, torchvision's data sets with `targets`, and
    `torch.utils.data.Subset` of these; the data set's `target_transform` is applied.

    Returns:
        None if the data set cannot tell: a streaming data set, one of a kind unknown here, or without one class each.
    """
    if isinstance(dataset, Subset):
        targets = dataset_targets(dataset.dataset)
        return None if targets is None else targets[np.asarray(dataset.indices)]
    labels = _labels_once(dataset)
    target_transform = getattr(dataset, 'target_transform', None)
    if labels is None or target_transform is None:
        return None if labels is None else labels.astype(np.int64, copy=False)
    classes, class_of = np.unique(labels.astype(np.int64), return_inverse=True)
    targets = np.asarray([target_transform(int(label)) for label in classes])
    return targets.astype(np.int64)[class_of] if targets.ndim == 1 else None


def _labels_once(dataset: Any) -> np.ndarray | None:
    """The one label of every image, before `target_transform`; read once, and kept with what it was read from."""
    source: Any = getattr(dataset, 'reader', dataset)
    origin = next((getattr(source, name) for name in ('targets', 'samples', 'dataset') if hasattr(source, name)), None)
    known = getattr(source, '_synermix_labels', None)
    if known is not None and known[0] is origin:
        labels: np.ndarray | None = known[1]
        return labels
    labels = labels_by_column(source) if hasattr(source, 'iter_targets') else None
    if labels is None:
        listed = read_labels(dataset)
        if listed is None or (len(listed) and np.ndim(listed[0])):  # several labels an image
            return None
        labels = np.asarray(listed if isinstance(listed, np.ndarray) else [-1 if i is None else i for i in listed])
    if labels.ndim != 1:
        return None
    if labels.dtype.kind in 'iu':
        labels = labels.astype(np.int64, copy=False)
    source._synermix_labels = origin, labels
    return labels


def labels_by_column(reader: Any) -> np.ndarray | None:
    """The labels of timm's reader of a Hugging Face data set, a column at once; None if they are not whole numbers."""
    dataset: Any = getattr(reader, 'dataset', None)
    key: Any = getattr(reader, 'label_key', None)
    if not hasattr(dataset, 'with_format') or key not in dataset.column_names:
        return None
    import pyarrow

    column = arrow_column(dataset, key)
    if not pyarrow.types.is_integer(column.type) or column.null_count:
        return None
    labels, label_of = np.unique(column.to_numpy(), return_inverse=True)
    return np.asarray([reader._get_target({key: int(label)}) for label in labels], dtype=np.int64)[label_of]


def arrow_column(dataset: Any, name: str, field: str | None = None) -> Any:
    """A column of a Hugging Face data set, or a field of it, in the order of its images; nothing else is read."""
    import pyarrow.compute

    column = dataset.data.column(name)
    if field is not None:
        column = pyarrow.compute.struct_field(column, field)
    return column if dataset._indices is None else column.take(dataset._indices.column(0))


def read_labels(dataset: Any) -> Any:
    """What a data set that is no Subset says of each image, before its `target_transform`; None if it does not."""
    if isinstance(dataset, IterableDataset):
        return None
    source: Any = getattr(dataset, 'reader', dataset)  # timm data sets read through a reader
    if hasattr(source, 'targets'):
        return source.targets
    if hasattr(source, 'iter_targets'):
        source.targets = list(source.iter_targets())  # takes a while
        return source.targets
    return [target for _, target in source.samples] if hasattr(source, 'samples') else None


def class_to_idx(dataset: Any) -> dict[str, int]:
    """The number of every class of a data set by its name; empty if the classes have no names."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    reader = getattr(dataset, 'reader', dataset)
    return getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None) or {}


def class_names(dataset: Any) -> list[str] | None:
    """The names of a data set's classes by number, if it has any."""
    numbers = class_to_idx(dataset)
    if not numbers or sorted(numbers.values()) != list(range(len(numbers))):
        return None
    return [str(name) for name in sorted(numbers, key=numbers.__getitem__)]


def num_classes_of(dataset: Any) -> int | None:
    """How many outputs a classifier of a data set needs; None if it does not tell."""
    numbers, targets = class_to_idx(dataset), dataset_targets(dataset)
    known = [*numbers.values()] if targets is None else [*numbers.values(), targets.max(initial=-1)]
    return 1 + int(max(known)) if known else None


def renumber(dataset: Any, numbers: Mapping[str, int], what: str = 'validation') -> None:
    """Give the classes of a data set, in place, the numbers that they have in training.

    A data set numbers the classes that it has. So where the one for validation lacks a class, the numbers of all later
    ones would mean others in training.

    Args:
        dataset: A data set with a `target_transform`, which is set.
        numbers: Training's `class_to_idx`. Empty, or of a data set without names: nothing is done.
        what: The data set's name in messages.

    Raises:
        ValueError: The data set has images of a class that is not among numbers.
    """
    own = class_to_idx(dataset)
    if not numbers or not own or own == dict(numbers):
        return
    targets = dataset_targets(dataset)
    found = set(own.values() if targets is None else targets.tolist())
    present = {name: i for name, i in own.items() if i in found}
    unknown = [str(name) for name in present if name not in numbers]
    if unknown:
        raise ValueError(
            f'The {what} set has classes that training did not have: {some(unknown)}. Training had {some(numbers)}. '
            'See the names of the folders, --data-dir and --class-map.'
        )
    new = {i: numbers[name] for name, i in present.items()}
    if any(number != i for i, number in new.items()):
        dataset.target_transform = Renumbered(new)
    reader = getattr(dataset, 'reader', dataset)
    setattr(reader, 'class_name_to_idx' if hasattr(reader, 'class_name_to_idx') else 'class_to_idx', dict(numbers))


class Renumbered:
    """A `target_transform` that gives classes other numbers; a label that is none stays."""

    def __init__(self, new: Mapping[int, int]) -> None:
        self.new = new

    def __call__(self, target: int) -> int:
        return self.new.get(int(target), int(target))


def check_classes(train: Any, validation: Any, num_classes: int) -> None:
    """Refuse data that a classifier of num_classes cannot learn.

    A data set that does not tell its labels (see `dataset_targets`) passes, as does None.

    Raises:
        ValueError: The training set has one class only, or either set has images without a label, or more classes than
            num_classes.
    """
    for name, dataset in (('training', train), ('validation', validation)):
        targets = None if dataset is None else dataset_targets(dataset)
        if targets is None or len(targets) == 0:
            continue
        if targets.min() < 0:
            count = int((targets < 0).sum())
            raise ValueError(
                f'{count} of the {len(targets)} images of the {name} set have no label (it is {targets.min()}): choose '
                'another split with --train-split, --val-split or --split, or another column with --target-key.'
            )
        if targets.max() >= num_classes:
            raise ValueError(
                f'--num-classes must cover all {targets.max() + 1} classes of the {name} set, got {num_classes}.'
            )
        if dataset is train and len(np.unique(targets)) < 2:
            raise ValueError(
                f'--data-dir: the training set must have at least two classes, got one: {list(class_to_idx(train))}.'
            )


def read_class_map(path: str, root: str | None = None) -> dict[str, int]:
    """The numbers of classes in a file of timm's: names one a line (.txt), or a pickled dict (.pkl).

    Args:
        path: The file, from here or from root.
        root: The folder of the data.

    Raises:
        ValueError: It is not there, or is none.
    """
    places = [path, os.path.join(root or '', path)]
    file = next((place for place in places if os.path.isfile(place)), None)
    if file is None:
        raise ValueError(f"--class-map must be a file that exists, got '{path}'.")
    try:
        if not file.lower().endswith('.txt'):
            numbers: dict[str, int] = load_class_map(file)
            if not all(isinstance(number, int) and number >= 0 for number in numbers.values()):
                raise ValueError('its values must be numbers from 0')
            return numbers
        with open(file, encoding='utf-8-sig') as lines:  # some editors put a mark at the beginning
            names = [line.strip() for line in lines.read().rstrip().split('\n')]
    except (AssertionError, OSError, ValueError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f'--class-map: {file} cannot be used: {error}.') from error
    twice = {name for name in names if name and names.count(name) > 1} if len(set(names)) < len(names) else None
    if twice:
        raise ValueError(f'--class-map: {file} has {some(twice)} twice.')
    return {name: number for number, name in enumerate(names) if name}


def some(names: Any, count: int = 5) -> str:
    """The first of some names, for a message of one line."""
    names = sorted(map(str, names))
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(names[:count]) + more
