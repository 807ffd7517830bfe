"""The training loader of train.py, from its flags."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from timm.data import AugMixDataset, FastCollateMixup, create_loader
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler

from timm_synermix.cli.kwargs import mixed_in_collate, mixup_kwargs, synermix_loader_kwargs
from timm_synermix.data.augment_ops import mend_augmentation
from timm_synermix.data.classes import dataset_targets
from timm_synermix.data.dataset import ReadableImages, image_mode
from timm_synermix.data.jitter import jitter_by_numpy
from timm_synermix.data.loader import create_clean_transform, create_synermix_loader
from timm_synermix.data.on_device import Augmentation, HeldImages, OnDeviceLoader, hold
from timm_synermix.data.order import EpochOrder
from timm_synermix.data.sample_dataset import SampleDataset, warn_of_skipped
from timm_synermix.data.sample_loader import SampleLoader, SamplePrefetchLoader, shield
from timm_synermix.data.transforms import add_small_image_augmentation


def create_train_loader(
    args: argparse.Namespace,
    dataset: Any,
    data_config: dict[str, Any],
    num_classes: int,
    held: HeldImages | None = None,
    clean_view: bool = True,
) -> Any:
    """The training loader: SynerMix's, with or without the clean views, or timm's own without --synermix.

    With held images it takes no others.

    Raises:
        ValueError: There is not one batch of images.
    """
    if args.synermix:
        loader = _two_view_loader(args, dataset, data_config, clean_view)
    else:
        loader = _one_view_loader(args, dataset, data_config, num_classes)
    if held is None:
        return loader
    augmentation = Augmentation() if args.no_aug else Augmentation(args.crop_padding, args.hflip, args.cutout)
    return OnDeviceLoader(loader, held, augmentation, clean_view=args.synermix and clean_view, seed=args.seed)


def hold_training_images(args: argparse.Namespace, dataset: Any, data_config: dict[str, Any]) -> HeldImages:
    """The clean views of the training images, on the device.

    Raises:
        ValueError: They do not fit, or too many cannot be made.
    """
    names = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')
    clean = create_clean_transform(**{name: data_config[name] for name in names}, use_prefetcher=True)
    targets = dataset_targets(dataset)
    samples = SampleDataset(ReadableImages(dataset, clean), args.seed, targets, args.strict_data)
    held = hold(samples, torch.device(args.device))
    if args.rank == 0:
        warn_of_skipped('Train', samples)
    return held


def _one_view_loader(args: argparse.Namespace, dataset: Any, data_config: dict[str, Any], num_classes: int) -> Any:
    if args.aug_repeats and not args.distributed:
        raise ValueError('--aug-repeats needs several processes, or --synermix')
    images: Any = dataset if isinstance(dataset, IterableDataset) else ReadableImages(dataset)
    if args.aug_splits > 1:
        images = AugMixDataset(images, num_splits=args.aug_splits)
    loader = _timm_loader(args, images, data_config, num_classes)
    if args.crop_padding or args.cutout:
        images.transform = add_small_image_augmentation(images.transform, args.crop_padding, args.cutout)
    if args.aug_splits <= 1:
        images.transform = jitter_by_numpy(images.transform)
    mend_augmentation(loader.dataset, image_mode(dataset))
    if len(loader) == 0:  # timm drops the last, partial batch
        raise ValueError(f'--batch-size must be at most the number of training images, got {args.batch_size}')
    inner = loader if args.no_prefetcher else loader.loader
    if isinstance(dataset, IterableDataset):
        shield(inner)
        return loader
    samples = _sample_loader(args, inner, dataset_targets(dataset))
    if args.no_prefetcher:
        return samples
    return SamplePrefetchLoader(
        samples,
        loader.random_erasing,
        layout=None,
        mean=data_config['mean'],
        std=data_config['std'],
        channels=data_config['input_size'][0],
        device=torch.device(args.device),
        img_dtype=getattr(torch, args.model_dtype or 'float32'),
    )


def _common_kwargs(args: argparse.Namespace, data_config: dict[str, Any]) -> dict[str, Any]:
    """The arguments that timm's loader and that of two views share: augmentation, scheduled sizes, workers, device."""
    return dict(
        input_size=data_config['input_size'],
        batch_size=args.batch_size,
        no_aug=args.no_aug,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        interpolation=data_config['interpolation'] if args.no_aug else args.train_interpolation,
        mean=data_config['mean'],
        std=data_config['std'],
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits,
        num_workers=args.workers,
        distributed=args.distributed,
        pin_memory=args.pin_mem,
        img_dtype=getattr(torch, args.model_dtype or 'float32'),
        device=torch.device(args.device),
        use_prefetcher=not args.no_prefetcher,
        worker_seeding=args.worker_seeding,
        input_size_choices=args.train_img_sizes,
        batch_size_choices=args.train_batch_sizes,
        batch_choice_weights=args.train_size_probs,
        batch_choice_seed=args.seed,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs,
        batch_schedule_spread=args.train_size_schedule_spread,
        batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=args.train_batches_per_epoch,
    )


def _two_view_loader(args: argparse.Namespace, dataset: Any, data_config: dict[str, Any], clean_view: bool) -> Any:
    synermix_kwargs = synermix_loader_kwargs(args)
    if not clean_view:
        synermix_kwargs['singletons'] = 'keep'  # nothing is mixed within classes, so no image needs a partner
    return create_synermix_loader(
        dataset,
        **synermix_kwargs,
        clean_view=clean_view,
        clean_interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        strict=args.strict_data,
        crop_padding=args.crop_padding,
        cutout=args.cutout,
        **_common_kwargs(args, data_config),
    )


def _timm_loader(args: argparse.Namespace, dataset: Any, data_config: dict[str, Any], num_classes: int) -> Any:
    mix_in_collate = mixed_in_collate(args)
    return create_loader(
        dataset,
        is_training=True,
        collate_fn=FastCollateMixup(**mixup_kwargs(args, num_classes)) if mix_in_collate else None,
        # Workers that live on keep their copy of the collate function, and would mix on after --mixup-off-epoch.
        persistent_workers=not (mix_in_collate and args.mixup_off_epoch),
        **_common_kwargs(args, data_config),
    )


def _sample_loader(args: argparse.Namespace, loader: DataLoader, targets: Any) -> SampleLoader:
    """timm's loader as a `SampleLoader`."""
    batch_sampler: Any = loader.batch_sampler
    order: Any = batch_sampler.sampler
    if isinstance(order, RandomSampler):  # its order would depend on what was drawn before
        order = DistributedSampler(loader.dataset, num_replicas=1, rank=0)
    batch_sampler.sampler = EpochOrder(order, args.seed)
    return SampleLoader(
        loader.dataset,
        batch_sampler,
        seed=args.seed,
        targets=targets,
        strict=args.strict_data,
        rank=args.rank,
        world_size=args.world_size,
        **{name: getattr(loader, name) for name in ('num_workers', 'collate_fn', 'pin_memory', 'persistent_workers')},
    )
