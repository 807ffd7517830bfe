"""What a data set holds, and what its batches cost, each in one line, and what about it may be a mistake."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
from PIL import Image

from timm_synermix.data.classes import class_names, dataset_targets, num_classes_of, some
from timm_synermix.data.image_folder import FolderReader, Walk, endings_text
from timm_synermix.data.sampler import BatchCost, SupplementBatchSampler

_logger = logging.getLogger(__name__)


def log_overview(what: str, dataset: Any, num_classes: int | None = None) -> None:
    """Say how many images and classes a data set has, and warn of what of its folder is not used, or oddly.

    Args:
        what: Start of the lines, as 'Training'.
        dataset: The data set; of a folder, its walk has noted what is asked for here.
        num_classes: Number of outputs of the model, warned of if it is not that of the classes; None for no warning.
    """
    reader = getattr(getattr(dataset, 'dataset', dataset), 'reader', None)
    walk = reader.walk if isinstance(reader, FolderReader) else Walk()
    count = f'{len(dataset):,}' if len(dataset) else 'an unknown number of'  # of a stream
    line = f'{what}: {count} images{_classes_text(dataset)}'
    if walk.ignored:
        line += f'; {walk.ignored.total():,} other files ignored ({endings_text(walk.ignored)})'
    _logger.info(line)
    if isinstance(reader, FolderReader):
        for warning in _folder_warnings(reader):
            _logger.warning(f'{what}: {warning}')
    known = num_classes_of(dataset)
    if None not in (known, num_classes) and known != num_classes:
        _logger.warning(
            f'{what}: the model has {num_classes} outputs, the images {known} classes. If they are not the first of '
            f"the model's, see --num-classes {known} (and --class-map)."
        )


def _classes_text(dataset: Any) -> str:
    """How many classes, and which are the smallest and the largest."""
    targets, known = dataset_targets(dataset), num_classes_of(dataset)
    if known is None or targets is None or len(targets) == 0 or targets.min() < 0:
        return f' of {known} classes' if known else ''
    counts = np.bincount(targets, minlength=known)
    names = class_names(dataset)

    def one(index: int) -> str:
        return f'{counts[index]:,} of {repr(names[index]) if names and len(names) == known else f"class {index}"}'

    return f' of {known} classes (smallest: {one(int(counts.argmin()))}, largest: {one(int(counts.argmax()))})'


def _folder_warnings(reader: FolderReader) -> list[str]:
    walk, warnings = reader.walk, []
    Image.init()  # fills EXTENSION
    images = sorted(set(walk.ignored) & set(Image.EXTENSION) - {'.pdf'})
    if images:
        key = ';'.join(sorted(reader.endings) + images)
        warnings.append(
            f"{endings_text({e: walk.ignored[e] for e in images})} ignored; to read them: --input-key '{key}'"
        )
    if walk.empty:
        warnings.append(f'the folders {some(walk.empty)} have no images')
    hidden = [folder for folders in walk.folders.values() for folder in folders if f'{os.sep}.' in os.sep + folder]
    if hidden:
        warnings.append(f'the hidden folders {some(hidden)} are read as well, as classes; delete them if not')
    merged = {name: folders for name, folders in walk.folders.items() if len(folders) > 1}
    if merged:
        name, folders = next(iter(sorted(merged.items())))
        more = f' (and so are {some(merged.keys() - {name})})' if len(merged) > 1 else ''
        warnings.append(f"the folders {some(folders)} are one class, '{name}'{more}: the last name counts")
    if walk.odd:
        warnings.append(f'left out {some(walk.odd)}: links to a folder above, or files that are none')
    if reader.left_out:
        warnings.append(
            f'--class-map lacks the folders {some(reader.left_out)}: {reader.left_out.total():,} images are left out'
        )
    return warnings


def log_cost(sampler: Any, beta: float, rows: int) -> None:
    """Say what a step with SynerMix costs, and what second images do to the classes.

    Args:
        sampler: A `SupplementBatchSampler`; nothing is said of another.
        beta, rows: See `BatchCost.step`.
    """
    if not isinstance(sampler, SupplementBatchSampler):
        return
    cost = sampler.cost()
    more = f'{cost.partners:.1f} second images per batch of {cost.size:.0f} (+{100 * cost.partners / cost.size:.0f} %)'
    step, fixed = cost.step(beta, rows), BatchCost(1, 0, 1, 1, 1).step(beta, rows)
    can_be_fixed = type(sampler) is SupplementBatchSampler and sampler.labels is None
    hint = f'; --synermix-batch fixed makes it {fixed:g}' if can_be_fixed and step > 1.5 * fixed else ''
    _logger.info(f'SynerMix: about {more}, a step sends {step:.2f} times the images of a plain step{hint}')
    if cost.prior > 1.2:
        _logger.info(
            f'SynerMix: second images show the rarest classes up to {cost.prior:.1f} times as often as the data do; '
            'with --synermix-supplement clean they have no part in the loss of the augmented images'
        )
