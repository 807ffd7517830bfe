"""The data sets and loaders of the scripts, from their flags."""

from __future__ import annotations

import argparse
import logging
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import AugMixDataset, FastCollateMixup, MultiLabelTarget, create_loader
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler

from timm_synermix.cli.rules import flag, names_with
from timm_synermix.cli.train_args import mixup_active, mixup_kwargs, synermix_loader_kwargs
from timm_synermix.data.augment_ops import mend_augmentation
from timm_synermix.data.dataset import ReadableImages, SampleDataset, image_mode
from timm_synermix.data.dataset_factory import check_classes, create_dataset, dataset_targets, describe
from timm_synermix.data.loader import create_synermix_loader
from timm_synermix.data.sample_loader import SampleLoader, SamplePrefetchLoader, shield
from timm_synermix.data.transforms import add_small_image_augmentation

_logger = logging.getLogger(__name__)


def create_datasets(args: argparse.Namespace, in_chans: int, num_classes: int) -> tuple[Any, Any]:
    """The training and the validation data set; None for no validation.

    Raises:
        ValueError: The data are not there, are of one class, or of more classes than the model has.
    """
    common = dict(
        root=args.data_dir or args.data,
        class_map=args.class_map,
        download=args.dataset_download,
        input_img_mode=args.input_img_mode or ('RGB' if in_chans == 3 else 'L'),
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
        seed=args.seed,
        in_memory=args.in_memory,
    )
    train = create_dataset(
        args.dataset,
        split=args.train_split,
        is_training=True,
        batch_size=args.batch_size,
        repeats=args.epoch_repeats,
        num_samples=args.train_num_samples,
        **common,
    )
    validation = None
    if args.val_split:
        validation = create_dataset(
            args.dataset,
            split=args.val_split,
            batch_size=args.validation_batch_size or args.batch_size,
            num_samples=args.val_num_samples,
            **common,
        )
    if args.task != 'multilabel':
        check_classes(train, validation, num_classes)
        return train, validation
    for dataset in (train, validation):
        if dataset is not None:
            dataset.target_transform = MultiLabelTarget(num_classes)
    return train, validation


def run_facts(args: argparse.Namespace, train: Any, validation: Any) -> dict[str, str]:
    """What must be the same in all processes: most flags, and the lengths, labels and file names of the data."""
    facts = {flag(name): repr(getattr(args, name)) for name in names_with(per_process=False) if hasattr(args, name)}
    for kind, dataset in (('training', train), ('validation', validation)):
        if dataset is not None:
            facts[f'the {kind} set'] = describe(dataset)
    return facts


def create_train_loader(
    args: argparse.Namespace, dataset: Any, data_config: dict[str, Any], num_classes: int, clean_view: bool = True
) -> Any:
    """The training loader: SynerMix's, with or without the clean views, or timm's own without --synermix.

    Raises:
        ValueError: There is not one batch of images.
    """
    common: dict[str, Any] = dict(
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
        interpolation=data_config['interpolation'] if args.no_aug else args.train_interpolation,
        mean=data_config['mean'],
        std=data_config['std'],
        num_aug_repeats=args.aug_repeats,
        num_workers=args.workers,
        distributed=args.distributed,
        pin_memory=args.pin_mem,
        img_dtype=getattr(torch, args.model_dtype or 'float32'),
        device=torch.device(args.device),
        use_prefetcher=not args.no_prefetcher,
        worker_seeding=args.worker_seeding,
    )
    if args.synermix:
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
            **common,
        )
    if args.aug_repeats and not args.distributed:
        raise ValueError('--aug-repeats needs several processes, or --synermix')
    raw = dataset
    if not isinstance(dataset, IterableDataset):
        dataset = ReadableImages(dataset)
    if args.aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
    mix_in_collate = mixup_active(args) and not args.no_prefetcher
    loader = create_loader(
        dataset,
        is_training=True,
        re_split=args.resplit,
        num_aug_splits=args.aug_splits,
        collate_fn=FastCollateMixup(**mixup_kwargs(args, num_classes)) if mix_in_collate else None,
        input_size_choices=args.train_img_sizes,
        batch_size_choices=args.train_batch_sizes,
        batch_choice_weights=args.train_size_probs,
        batch_choice_seed=args.seed,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs,
        batch_schedule_spread=args.train_size_schedule_spread,
        batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=args.train_batches_per_epoch,
        # Workers that live on keep their copy of the collate function, and would mix on after --mixup-off-epoch.
        persistent_workers=not (mix_in_collate and args.mixup_off_epoch),
        **common,
    )
    if args.crop_padding or args.cutout:
        dataset.transform = add_small_image_augmentation(dataset.transform, args.crop_padding, args.cutout)
    mend_augmentation(loader.dataset, image_mode(raw))
    if len(loader) == 0:  # timm drops the last, partial batch
        raise ValueError(f'--batch-size must be at most the number of training images, got {args.batch_size}')
    inner = loader if args.no_prefetcher else loader.loader
    if isinstance(dataset, IterableDataset):
        shield(inner)
        return loader
    samples = _sample_loader(args, inner, dataset_targets(raw))
    if args.no_prefetcher:
        return samples
    return SamplePrefetchLoader(
        samples,
        loader.random_erasing,
        clean_view=False,
        mean=data_config['mean'],
        std=data_config['std'],
        channels=data_config['input_size'][0],
        device=common['device'],
        img_dtype=common['img_dtype'],
    )


def _sample_loader(args: argparse.Namespace, loader: DataLoader, targets: Any) -> SampleLoader:
    """timm's loader as a `SampleLoader`."""
    batch_sampler: Any = loader.batch_sampler
    if isinstance(batch_sampler.sampler, RandomSampler):  # its order would depend on what was drawn before
        batch_sampler.sampler = DistributedSampler(loader.dataset, num_replicas=1, rank=0, seed=args.seed)
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


def create_eval_loader(args: argparse.Namespace, dataset: Any, data_config: dict[str, Any]) -> Any:
    """timm's validation loader."""
    workers = args.workers
    if args.distributed and args.dataset.lower().startswith(('tfds/', 'wds/')):
        workers = min(2, workers)  # streaming readers pad each worker's share
    if not isinstance(dataset, IterableDataset):
        dataset = SampleDataset(ReadableImages(dataset), targets=dataset_targets(dataset), strict=args.strict_data)
    loader = create_loader(
        dataset,
        input_size=data_config['input_size'],
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        num_workers=workers,
        distributed=args.distributed,
        pin_memory=args.pin_mem,
        img_dtype=getattr(torch, args.model_dtype or 'float32'),
        device=torch.device(args.device),
        use_prefetcher=not args.no_prefetcher,
    )
    shield(loader if args.no_prefetcher else loader.loader)
    return loader


def set_epoch(loader: Any, epoch: int, first_batch: int = 0) -> None:
    """Tell whatever draws the images which epoch it is, and with which batch it begins."""
    for part in (loader.dataset, loader.sampler):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)
    if hasattr(loader.batch_sampler, 'set_epoch'):
        loader.batch_sampler.set_epoch(epoch, first_batch)


def build_dataset(args: argparse.Namespace) -> Any:
    """The data set of the flags.

    Raises:
        ValueError: It is not there, or has more classes than the flags say.
    """
    in_chans = args.model_kwargs.get('in_chans') or args.in_chans or (args.input_size or [3])[0]
    dataset = create_dataset(
        args.dataset,
        root=args.data_dir or args.data,
        split=args.split,
        download=args.dataset_download,
        load_bytes=args.tf_preprocessing,
        class_map=args.class_map,
        num_samples=args.num_samples,
        input_key=args.input_key,
        input_img_mode=args.input_img_mode or ('RGB' if in_chans == 3 else 'L'),
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
        seed=args.seed,
    )
    if args.num_classes is not None and not args.valid_labels:
        check_classes(None, dataset, args.num_classes)
    return dataset


def build_loader(args: argparse.Namespace, dataset: Any, config: dict[str, Any], accelerator: Accelerator) -> Any:
    """timm's evaluation loader of this process's part of the images."""
    dtype = getattr(torch, args.model_dtype or 'float32')
    names = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    if not isinstance(dataset, IterableDataset):
        dataset = SampleDataset(ReadableImages(dataset), targets=dataset_targets(dataset))
    return create_loader(
        dataset,
        batch_size=args.batch_size,
        num_workers=args.workers,
        distributed=accelerator.num_processes > 1,
        crop_border_pixels=args.crop_border_pixels,
        pin_memory=args.pin_mem,
        device=accelerator.device,
        img_dtype=dtype,
        use_prefetcher=not args.no_prefetcher,
        collate_fn=partial(collate, dtype=dtype) if args.no_prefetcher else None,
        persistent_workers=False,
        tf_preprocessing=args.tf_preprocessing,
        **{name: config[name] for name in names},
    )


def collate(samples: list[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A batch in the type of the model, which without the prefetcher nobody else sees to."""
    input, target = torch.utils.data.default_collate(samples)
    return input.to(dtype), target
