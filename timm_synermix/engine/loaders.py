"""The data sets and loaders of the scripts, from their flags."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import MultiLabelTarget, create_loader
from torch import Tensor
from torch.utils.data import IterableDataset

from timm_synermix.cli.rules import flag, names_with
from timm_synermix.data.classes import check_classes, class_to_idx, dataset_targets
from timm_synermix.data.dataset import ReadableImages
from timm_synermix.data.dataset_checks import check_splits
from timm_synermix.data.dataset_factory import create_dataset, describe
from timm_synermix.data.on_device import OnDeviceLoader, hold
from timm_synermix.data.overview import log_overview
from timm_synermix.data.sample_dataset import SampleDataset
from timm_synermix.data.sample_loader import shield
from timm_synermix.data.stream import ReadableStream


def create_datasets(args: argparse.Namespace, in_chans: int, num_classes: int) -> tuple[Any, Any]:
    """The training and the validation data set, which has training's class numbers; None for no validation.

    Raises:
        ValueError: The data are not there, have no labels, are of one class, or of more classes than the model has; or
            the model does not take the channels of the images.
    """
    root = args.data_dir or args.data
    common = dict(
        root=root,
        class_map=args.class_map,
        download=args.dataset_download,
        input_img_mode=image_mode_of(args, in_chans),
        input_key=args.input_key,
        target_key=args.target_key,
        target_format=args.target_format,
        trust_remote_code=args.dataset_trust_remote_code,
        seed=args.seed,
        in_memory=args.in_memory and not args.on_device,  # which decodes each once, too
    )
    if args.val_split:
        check_splits(args.dataset, root, args.train_split, args.val_split)
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
            class_to_idx=class_to_idx(train),
            **common,
        )
    for dataset in (train, validation):
        if isinstance(dataset, ReadableStream):
            dataset.strict = args.strict_data
    multilabel = args.task == 'multilabel'
    if not multilabel:
        check_classes(train, validation, num_classes)
    for what, dataset in (('Training', train), ('Validation', validation)):
        if dataset is not None and args.rank == 0:
            log_overview(what, dataset, num_classes if dataset is train and not multilabel else None)
        if dataset is not None and multilabel:
            dataset.target_transform = multi_label_target(args, num_classes)
    return train, validation


def multi_label_target(args: argparse.Namespace, num_classes: int) -> MultiLabelTarget:
    """What makes a vector of the labels of an image, as --target-format says that they are."""
    return MultiLabelTarget(num_classes, dense=args.target_format == 'multihot')


def image_mode_of(args: argparse.Namespace, in_chans: int) -> str:
    """Pillow's mode of images for a model of so many channels.

    Raises:
        ValueError: --input-img-mode is none, has another number of channels, or must be given.
    """
    mode = args.input_img_mode or {1: 'L', 3: 'RGB'}.get(in_chans)
    takes = f'the model takes {in_chans} channels (--in-chans)'
    if mode is None:
        hint = {2: 'LA', 4: 'RGBA or CMYK'}.get(in_chans)
        if hint is None:
            raise ValueError(f'--in-chans must be 1 to 4 for images, got {in_chans}')
        raise ValueError(f'--input-img-mode must be given where {takes}: {hint}')
    if mode not in Image.MODES:
        raise ValueError(f'--input-img-mode must be a mode of Pillow, as L, RGB or RGBA, got {mode}')
    if Image.getmodebands(mode) != in_chans:
        raise ValueError(f'--input-img-mode {mode} has {Image.getmodebands(mode)} channels, but {takes}')
    return str(mode)


def run_facts(args: argparse.Namespace, train: Any, validation: Any) -> dict[str, str]:
    """What must be the same in all processes: most flags, and the lengths, labels and file names of the data."""
    facts = {flag(name): repr(getattr(args, name)) for name in names_with(per_process=False) if hasattr(args, name)}
    for kind, dataset in (('training', train), ('validation', validation)):
        if dataset is not None:
            facts[f'the {kind} set'] = describe(dataset)
    return facts


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
    if args.on_device:
        return OnDeviceLoader(loader, hold(loader.dataset, loader.device))
    return loader


def set_epoch(loader: Any, epoch: int, first_batch: int = 0) -> None:
    """Tell whatever draws the images which epoch it is, and with which batch it begins."""
    for part in (loader.dataset, loader.sampler):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)
    if hasattr(loader.batch_sampler, 'set_epoch'):
        loader.batch_sampler.set_epoch(epoch, first_batch)


def build_dataset(args: argparse.Namespace, class_to_idx: Mapping[str, int] | None = None) -> Any:
    """The data set of the flags.

    Args:
        args: The flags of validate.py.
        class_to_idx: Numbers of the classes in training, if they are known; --class-map goes before.

    Raises:
        ValueError: It is not there, or has more classes than the flags say, or such that class_to_idx lacks.
    """
    in_chans = args.model_kwargs.get('in_chans') or args.in_chans or (args.input_size or [3])[0]
    dataset = create_dataset(
        args.dataset,
        root=args.data_dir or args.data,
        split=args.split,
        download=args.dataset_download,
        load_bytes=args.tf_preprocessing,
        class_map=args.class_map,
        class_to_idx=None if args.class_map else class_to_idx,
        num_samples=args.num_samples,
        input_key=args.input_key,
        input_img_mode=image_mode_of(args, in_chans),
        target_key=args.target_key,
        target_format=args.target_format,
        trust_remote_code=args.dataset_trust_remote_code,
        seed=args.seed,
        labelled=not args.real_labels,  # which have the names of the images
    )
    if args.task == 'multilabel':
        if args.num_classes is None:
            raise ValueError('--task multilabel needs --num-classes')
        dataset.target_transform = multi_label_target(args, args.num_classes)
    elif args.num_classes is not None and not args.valid_labels:
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
