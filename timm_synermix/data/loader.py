"""The loader of two views of every image."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from timm.data.scheduled_sampler import ScheduledBatchSampler, ScheduledTransformDataset
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing import get_sharing_strategy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    default_collate,
    get_worker_info,
)

from timm_synermix.data.augment_ops import mend_augmentation
from timm_synermix.data.classes import dataset_targets
from timm_synermix.data.dataset import ReadableImages, TwoViewDataset, image_mode
from timm_synermix.data.jitter import jitter_by_numpy
from timm_synermix.data.labels import LabelSets, dataset_labels
from timm_synermix.data.order import EpochOrder
from timm_synermix.data.sample_loader import SampleLoader, SamplePrefetchLoader, shield
from timm_synermix.data.sampler import SupplementBatchSampler
from timm_synermix.data.scheduled import ScheduledSupplementSampler, take_schedule
from timm_synermix.data.transforms import (
    SplitTransform,
    TensorEvalTransform,
    TwoViewTransform,
    add_small_image_augmentation,
)
from timm_synermix.utils.checks import BATCH, BATCH_SIZE, SINGLETONS, SUPPLEMENT, check_fixed
from timm_synermix.utils.distributed import NO_SHARED_MEMORY
from timm_synermix.utils.layout import Layout
from timm_synermix.utils.timm_private import worker_init

_logger = logging.getLogger(__name__)

# Arguments of timm's create_loader that have one meaning left with two views.
_ONLY_VALUE: dict[str, Any] = dict(
    is_training=True,
    collate_fn=None,
    tf_preprocessing=False,
    crop_border_pixels=None,
    fp16=False,
)

# Arguments of timm's create_loader that have no effect here.
_WITHOUT_EFFECT = ('use_multi_epochs_loader',)


def create_synermix_loader(
    dataset: Any,
    input_size: int | tuple[int, ...],
    batch_size: int,
    *,
    singletons: str = 'supplement',
    supplement: str = 'both',
    batch: str = 'grow',
    fraction: float = 1.0,
    clean_view: bool = True,
    seed: int = 42,
    strict: bool = False,
    re_prob: float = 0.0,
    re_mode: str = 'const',
    re_count: int = 1,
    re_split: bool = False,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
    num_aug_repeats: float = 0,
    num_aug_splits: int = 0,
    num_workers: int = 1,
    distributed: bool = False,
    pin_memory: bool = False,
    img_dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    use_prefetcher: bool = True,
    persistent_workers: bool = True,
    worker_seeding: str = 'all',
    no_aug: bool = False,
    **transform_kwargs: Any,
) -> PrefetchLoader | DataLoader:
    """A training loader of clean and augmented views: timm's `create_loader` for SynerMix.

    Takes the arguments of `timm.data.create_loader`, with the same meaning, and some of its own. A batch is
    `(input, target)`: input `[2N, C, H, W]`, the N clean views first, then the N augmented ones of the same images, and
    target int64 `[N]`. The clean view is the evaluation transform (resize and centre crop), the augmented one the
    training transform, both from one decode. Random erasing skips the clean views. A batch depends on the seed and the
    epoch, not on the workers, see `SampleLoader`; for an image that cannot be read another one of its class is taken.

    Call `loader.batch_sampler.set_epoch(epoch)` at the start of each epoch. A data set without a `set_epoch` of its own
    gets one that does so, since timm's train.py calls `dataset.set_epoch(epoch)` if there is one.

    Args:
        dataset: A timm or torchvision image data set, or a Subset of one. Its `transform` is set here: to None where
            the loader's own data set makes the views of its images.
        input_size: Image size, or `(C, H, W)`.
        batch_size: Images per batch on this rank, before supplements; at least 2.
        singletons: 'supplement' draws a second image for each class with one in the batch (paper step 1), 'keep' and
            'bank' do not. A streaming data set has no others.
        supplement: 'both': the second images have both views, as in the paper's code. 'clean': they have the clean view
            alone, and stand last: input is `[N + A, C, H, W]`, with an augmented view of the first A images.
        batch: 'grow' adds the second images to the batch, 'fixed' keeps every batch at batch_size, see
            `SupplementBatchSampler`.
        fraction: Below 1, so many of the images of a batch have a clean view, two of each of some classes: input is
            `[K + N, C, H, W]`, clean views of the first K images, then augmented ones of all.
        clean_view: False leaves the clean views out: input is `[B, C, H, W]`, batches and order are as with them, but
            for a fraction, and for second images that have the clean view alone: there are none of either.
        seed: Seed of the order of the images, of the supplements and of the augmentation.
        strict: Stop at the first image that cannot be read.
        num_aug_repeats: Repeated augmentation, through timm's sampler.
        num_aug_splits: In place of the augmented view the S splits of timm's `AugMixDataset`, the first without
            augmentation; dataset is not one itself. input is `[N + S N, C, H, W]`: clean views, first splits, and so
            on. A batch without clean views is timm's own, `[S N, C, H, W]`, with S times the target.
        re_split: No random erasing in the first split, or without splits in the first half of the augmented views.
        worker_seeding: Of a streaming data set. Has no effect on others, whose samples have seeds of their own.
        transform_kwargs: Of the clean view `clean_interpolation` ('bilinear'), and its centre crop `crop_pct` and
            `crop_mode`; of the augmented one `crop_padding` and `cutout`, see `add_small_image_augmentation`, and the
            other arguments of `timm.data.create_transform`. Of batches `input_size_choices`, `batch_size_choices` and
            timm's others of scheduled image sizes: both views of a batch have one size, and so have second images.
            use_multi_epochs_loader has no effect: persistent_workers do what it is for. Arguments of create_loader that
            two views leave no choice, as collate_fn, must have their default.

    Returns:
        PrefetchLoader with use_prefetcher, then images arrive on device and normalised; else DataLoader.

    Raises:
        ValueError: singletons, supplement or batch is unknown, batch_size is below 2, fraction is used with a data set
            that does not tell its labels, or an argument is not for two views; supplement 'clean' comes with fixed
            batches or a fraction; or sizes are scheduled for a streaming data set, for fixed batches or with splits.
    """
    transform_kwargs, splits = _of_two_views(transform_kwargs), max(1, num_aug_splits)
    sizes, schedule = take_schedule(transform_kwargs, batch_size, splits > 1 or isinstance(dataset, IterableDataset))
    rules = _rules_of_batches(batch_size, singletons, supplement, batch)
    rules['fraction'] = fraction if clean_view else 1.0
    rules['supplement'] &= clean_view or (fraction == 1 and supplement == 'both')
    erasing: dict[str, Any] = dict(re_prob=re_prob, re_mode=re_mode, re_count=re_count, no_aug=no_aug)
    common: dict[str, Any] = dict(mean=mean, std=std, use_prefetcher=use_prefetcher)
    create_views = partial(_create_views, mode=image_mode(dataset), common=common, splits=splits)
    transforms = [create_views(size, **erasing, **transform_kwargs) for size in sizes or [input_size]]
    views = _set_views(dataset, transforms, clean_view, sizes is not None)
    loader_kwargs: dict[str, Any] = dict(
        num_workers=num_workers,
        collate_fn=partial(two_view_collate, splits=splits) if clean_view or splits > 1 else default_collate,
        pin_memory=pin_memory,
        worker_init_fn=partial(worker_init, worker_seeding=worker_seeding),
        persistent_workers=persistent_workers and num_workers > 0,
    )
    targets = _known_targets(dataset, fraction, singletons)
    if isinstance(dataset, IterableDataset):
        loader = _stream_loader(views, batch_size, **loader_kwargs)
    else:
        loader_kwargs.update(targets=targets, seed=seed, strict=strict)
        loader = _sample_loader(views, batch_size, schedule, num_aug_repeats, distributed, rules, **loader_kwargs)
    if not use_prefetcher:
        return loader
    output: dict[str, Any] = dict(mean=mean, std=std, device=device or torch.device('cuda'), img_dtype=img_dtype)
    output['layout'] = Layout(splits, some=fraction < 1) if clean_view else None
    return _prefetching(loader, input_size, max(2, splits) if re_split else 0, **erasing, **output)


def _prefetching(
    loader: DataLoader,
    input_size: int | tuple[int, ...],
    re_splits: int,
    re_prob: float,
    re_mode: str,
    re_count: int,
    no_aug: bool,
    **kwargs: Any,
) -> SamplePrefetchLoader:
    """timm's prefetcher, which normalises the images on the device, and erases there."""
    erase = None
    if re_prob > 0 and not no_aug:
        erase = RandomErasing(re_prob, mode=re_mode, max_count=re_count, num_splits=re_splits, device=kwargs['device'])
    channels = input_size[0] if isinstance(input_size, (tuple, list)) and len(input_size) == 3 else len(kwargs['mean'])
    return SamplePrefetchLoader(loader, erase, channels=channels, **kwargs)


def _of_two_views(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments without those of timm's create_loader that mean nothing, or one thing alone, with two views."""
    for name, only_value in _ONLY_VALUE.items():
        value = kwargs.get(name, only_value)
        if value != only_value:
            hint = '; Mixup belongs in SynerMixTask(mixup_fn=...)' if name == 'collate_fn' else ''
            raise ValueError(f'{name} must be {only_value} in a loader of two views, got {value}{hint}.')
    return {name: value for name, value in kwargs.items() if name not in {*_ONLY_VALUE, *_WITHOUT_EFFECT}}


def _rules_of_batches(batch_size: int, singletons: str, supplement: str, batch: str) -> dict[str, Any]:
    SINGLETONS.check('singletons', singletons)
    SUPPLEMENT.check('supplement', supplement)
    BATCH.check('batch', batch)
    BATCH_SIZE.check('batch_size', batch_size)
    check_fixed(batch == 'fixed', supplement == 'clean', ("batch='fixed'", "supplement='clean'"))
    return dict(supplement=singletons == 'supplement', clean_only=supplement == 'clean', fixed=batch == 'fixed')


def _create_views(
    input_size: int | tuple[int, ...],
    mode: str | None,
    common: dict[str, Any],
    splits: int,
    clean_interpolation: str = 'bilinear',
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    crop_padding: int = 0,
    cutout: int = 0,
    **kwargs: Any,
) -> TwoViewTransform:
    """timm's evaluation and its training transform, in so many splits, of images of Pillow's mode."""
    clean = create_clean_transform(input_size, clean_interpolation, crop_pct, crop_mode, **common)
    augmented: Any = create_transform(input_size, is_training=True, separate=splits > 1, **common, **kwargs)
    if splits == 1:
        augmented = jitter_by_numpy(add_small_image_augmentation(augmented, crop_padding, cutout))
    elif crop_padding or cutout:
        raise ValueError('crop_padding and cutout must be 0 with num_aug_splits.')
    else:
        augmented = SplitTransform(augmented, splits)
    return TwoViewTransform(clean, mend_augmentation(augmented, mode))


def create_clean_transform(
    input_size: int | tuple[int, ...],
    interpolation: str = 'bilinear',
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    **kwargs: Any,
) -> Any:
    """timm's evaluation transform, by tensors where that is possible; kwargs are `timm.data.create_transform`'s."""
    clean = create_transform(input_size, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode, **kwargs)
    return TensorEvalTransform(clean) if TensorEvalTransform.suits(clean) else clean


def _known_targets(dataset: Any, fraction: float, singletons: str) -> np.ndarray | LabelSets | None:
    """The labels, if the data set tells them; else what needs them is refused, or said not to be done."""
    targets: np.ndarray | LabelSets | None = dataset_targets(dataset)
    if targets is None:
        targets = dataset_labels(dataset)
    if targets is None and fraction != 1:
        kind = type(dataset).__name__
        raise ValueError(f'fraction must be 1 for {kind}, which does not tell its labels, got {fraction}.')
    if targets is None and singletons == 'supplement':
        _logger.warning(
            'SynerMix: %s does not tell its labels without reading its images, so a class with one image in a '
            "batch is not supplemented (as with singletons='keep').",
            type(dataset).__name__,
        )
    return targets


def _stream_loader(dataset: Any, batch_size: int, **kwargs: Any) -> DataLoader:
    """The loader of a streaming data set."""
    if hasattr(dataset, 'set_loader_cfg'):
        dataset.set_loader_cfg(num_workers=kwargs['num_workers'])  # readers estimate their length from it
    return shield(DataLoader(dataset, batch_size=batch_size, drop_last=True, **kwargs))


def _set_views(dataset: Any, transforms: Sequence[TwoViewTransform], clean_view: bool, scheduled: bool) -> Any:
    """The data set of transformed images, of one size or of scheduled ones; that of a streaming data set is itself."""
    if isinstance(dataset, IterableDataset):
        streaming: Any = dataset
        streaming.transform = transforms[0] if clean_view else transforms[0].augmented
        return streaming
    if clean_view:
        return TwoViewDataset(dataset, *transforms)
    if scheduled:
        return ScheduledTransformDataset(ReadableImages(dataset), [transform.augmented for transform in transforms])
    return ReadableImages(dataset, transforms[0].augmented)


def _sample_loader(
    views: Any,
    batch_size: int,
    schedule: dict[str, Any],
    num_aug_repeats: float,
    distributed: bool,
    rules: dict[str, Any],
    **kwargs: Any,
) -> SampleLoader:
    """The loader of a map-style data set, in batches of `SupplementBatchSampler` by these rules if it tells labels."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    seed, targets = kwargs['seed'], kwargs['targets']
    batch_sampler: Any
    if schedule:
        order = _epoch_order(views, num_aug_repeats, seed, rank, world_size)
        batch_sampler = ScheduledBatchSampler(order, **schedule)
        if targets is not None:
            batch_sampler = ScheduledSupplementSampler(batch_sampler, targets, seed=seed, rank=rank, **rules)
    elif targets is None:  # an even batch for Mixup is the recipe's to choose
        order = _epoch_order(views, num_aug_repeats, seed, rank, world_size)
        batch_sampler = BatchSampler(order, batch_size, drop_last=True)
    else:  # which deals the images of an epoch to the ranks by itself
        order = _epoch_order(views, num_aug_repeats, seed, rank=0, world_size=1)
        rules.update(seed=seed, rank=rank, world_size=world_size)
        batch_sampler = SupplementBatchSampler(order, targets, batch_size, **rules)
    kwargs['targets'] = None if isinstance(targets, LabelSets) else targets
    loader = SampleLoader(views, batch_sampler, rank=rank, world_size=world_size, **kwargs)
    if not hasattr(type(views.dataset), 'set_epoch'):
        views.dataset.set_epoch = loader.batch_sampler.set_epoch
    return loader


def _epoch_order(dataset: Any, num_aug_repeats: float, seed: int, rank: int, world_size: int) -> EpochOrder:
    """A rank's shuffled indices, by the samplers timm uses."""
    shard: dict[str, Any] = dict(num_replicas=world_size, rank=rank)
    if num_aug_repeats:
        return EpochOrder(RepeatAugSampler(dataset, num_repeats=num_aug_repeats, **shard), seed)
    return EpochOrder(DistributedSampler(dataset, **shard), seed)


def stack(images: list[Tensor]) -> Tensor:
    """As torch.stack, in a worker into shared memory.

    numpy copies large images of interleaved colours nearly twice as fast as torch, and shared memory that is written to
    as a file, page after page in one call, costs less than memory of which every page is touched first.
    """
    first = images[0]
    if first.dtype != torch.uint8:
        stacked: Tensor = default_collate(images)
        return stacked
    unequal = any(image.shape != first.shape or image.dtype != first.dtype for image in images)  # numpy says so
    if unequal or get_worker_info() is None or get_sharing_strategy() != 'file_descriptor':
        return torch.from_numpy(np.stack([image.numpy() for image in images]))
    size = first.numel()
    storage = torch.UntypedStorage._new_shared(len(images) * size)
    file, _ = storage._share_fd_cpu_()
    for number, image in enumerate(images):
        write_whole(file, np.ascontiguousarray(image.numpy()).data, number * size)
    return first.new_empty(0).set_(storage).view(len(images), *first.shape)


def write_whole(file: int, data: memoryview, offset: int) -> None:
    """Write bytes into shared memory.

    Raises:
        RuntimeError: There is no room.
    """
    try:
        written = os.pwrite(file, data, offset)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        written = 0
    if written < data.nbytes:
        raise RuntimeError(NO_SHARED_MEMORY)


def two_view_collate(batch: list[tuple[tuple[Tensor | None, ...], int]], splits: int = 1) -> tuple[Tensor, Tensor]:
    """Batch N samples: the clean views of the first of them, then the augmented ones of the first, and target `[N]`.

    Views of one kind stand together, see `Layout`. Without clean views it is a batch of timm's, which repeats
    the target for each of the S splits.
    """
    kinds = list(zip_longest(*(views for views, _ in batch)))
    input = stack([view for kind in kinds for view in kind if view is not None])
    target = default_collate([target for _, target in batch])
    target = target.long() if target.ndim == 1 else target
    with_clean = len(kinds) > splits and kinds[0][0] is not None
    return input, target if with_clean else torch.cat([target] * splits)
