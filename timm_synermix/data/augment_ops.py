"""timm's operators of `--aa`, made to do for every image that they may meet."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import AugmentOp

from timm_synermix.utils.random import random_state_kept

_logger = logging.getLogger(__name__)

# Where loaders, data sets, transforms and policies keep what is inside of them.
_PARTS = ('dataset', 'transform', 'transforms', 'augmentation', 'policy', 'ops')


def mend_augmentation(transform: Any, mode: str | None) -> Any:
    """Let timm's augmentation operators do what they are asked for, or nothing, instead of raising.

    - Posterize with 0 bits gives the black image. Pillow 13 and later refuse it; timm asks for it now and then.
    - Operators that cannot do anything with images of a mode, as Equalize with RGBA, are left out and named.

    Everything else, and what is drawn at random, stays as it is.

    Args:
        transform: A transform of `timm.data.create_transform`, or a data set that has one. It is changed in place.
        mode: Pillow's mode of the images; None if unknown.

    Returns:
        transform.
    """
    left_out = set()
    for operator in _operators(transform):
        if operator.aug_fn is auto_augment.posterize:
            operator.aug_fn = _posterize
        if mode is not None and not _can(operator, mode):
            operator.aug_fn = _leave
            left_out.add(operator.name)
    if left_out:
        _logger.warning('--aa: %s cannot be done to %s images and are left out.', ', '.join(sorted(left_out)), mode)
    return transform


def _operators(part: Any) -> Iterator[AugmentOp]:
    if isinstance(part, AugmentOp):
        yield part
    elif isinstance(part, (list, tuple)):
        for inner in part:
            yield from _operators(inner)
    else:
        for name in _PARTS:
            yield from _operators(vars(part).get(name)) if hasattr(part, '__dict__') else ()


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    if bits_to_keep <= 0:
        return image.point(lambda value: 0)
    return auto_augment.posterize(image, bits_to_keep, **kwargs)


def _leave(image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
    return image


def _can(operator: AugmentOp, mode: str) -> bool:
    """Whether an operator works on an image of a mode."""
    args = () if operator.level_fn is None else operator.level_fn(operator.magnitude, operator.hparams)
    with random_state_kept():
        try:
            operator.aug_fn(Image.new(mode, (16, 16)), *args, **operator.kwargs)
        except Exception:  # they raise all kinds
            return False
    return True
