"""The parts of a run, built from the flags of train.py."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env
from timm.data import AugMixDataset, FastCollateMixup, Mixup, MultiLabelTarget, create_loader
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.utils import NativeScaler
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler

from timm_synermix import devices
from timm_synermix.augment import add_small_image_augmentation
from timm_synermix.checkpoint import output_root
from timm_synermix.cli import flag, mixup_active, mixup_kwargs, synermix_loader_kwargs, synermix_task_kwargs
from timm_synermix.data import create_synermix_loader, dataset_targets
from timm_synermix.datasets import check_classes, create_dataset, describe
from timm_synermix.loading import SampleDataset, SampleLoader, SamplePrefetchLoader, shield
from timm_synermix.manifold import ManifoldMixup
from timm_synermix.mixup import Mixer, create_mixup
from timm_synermix.reading import ReadableImages
from timm_synermix.task import SynerMixTask
from timm_synermix.trackers import tracker_names

_logger = logging.getLogger('train')

# What a launcher tells each process about how many there are: torchrun, Slurm's srun, MPI, PMI.
_WORLD_SIZES = ('WORLD_SIZE', 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'MV2_COMM_WORLD_SIZE')

# The flags that may differ between the processes of a run.
_OF_A_PROCESS = {'rank', 'local_rank', 'device', 'workers', 'pin_mem', 'data', 'data_dir', 'config'}


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """Set up device, precision and distribution, and write them to args under timm's names.

    Raises:
        ValueError: The device is not there, or cannot do what the flags ask of it.
    """
    for module in args.device_modules or ():
        importlib.import_module(module)
    if args.sync_bn and args.device.startswith('cpu'):
        raise ValueError('--sync-bn needs a GPU, got --device cpu')
    _check_distribution(None)
    accelerator = devices.create_accelerator(
        args,
        log_with=tracker_names(args) or None,
        project_dir=output_root(args),  # some trackers must have one now; the run's folder takes its place later
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not args.no_ddp_bb)],
    )
    _check_distribution(accelerator)
    if accelerator.gradient_accumulation_steps > 1:
        raise ValueError(
            f'--grad-accum-steps accumulates gradients; in the configuration of Accelerate set '
            f'gradient_accumulation_steps to 1, got {accelerator.gradient_accumulation_steps}'
        )
    if accelerator.scaler is not None:
        accelerator.scaler.state_dict_key = NativeScaler.state_dict_key  # the name timm's checkpoints keep it under
    args.device = str(accelerator.device)
    args.distributed = accelerator.num_processes > 1
    args.world_size, args.rank = accelerator.num_processes, accelerator.process_index
    args.local_rank = accelerator.local_process_index
    return accelerator


def _check_distribution(accelerator: Accelerator | None) -> None:
    """Refuse to train copies that know nothing of each other, and models in shards."""
    for name in _WORLD_SIZES:
        asked = os.environ.get(name, '1')
        apart = 'MASTER_ADDR' not in os.environ if accelerator is None else accelerator.num_processes == 1
        if apart and asked.isdecimal() and int(asked) > 1:
            raise ValueError(
                f'{name} asks for {asked} processes, but they have not found each other, and each would train a model '
                'of its own; start them with torchrun or accelerate launch'
            )
    for kind in ('FSDP', 'DEEPSPEED', 'MEGATRON_LM'):
        if parse_flag_from_env(f'ACCELERATE_USE_{kind}'):  # on a CPU Accelerate itself would pass over it in silence
            raise ValueError(
                f"{kind} in Accelerate's configuration is not supported: every process trains a whole copy of the "
                'model here; set distributed_type to MULTI_GPU or MULTI_CPU'
            )


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
    facts = {flag(name): repr(value) for name, value in vars(args).items() if name not in _OF_A_PROCESS}
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


def create_mixup_fn(
    args: argparse.Namespace, model: nn.Module, input_size: tuple[int, int, int], num_classes: int
) -> Mixer | None:
    """The inter-class mixing of the flags, but for that in timm's collate function.

    Raises:
        ValueError: A layer of Manifold MixUp cannot be mixed.
    """
    if args.manifold_mixup:
        try:
            mixup_fn = ManifoldMixup(
                model,
                num_classes,
                input_size,
                alpha=args.manifold_mixup,
                layers=args.manifold_mixup_layers,
                prob=args.mixup_prob,
                label_smoothing=args.smoothing,
            )
        except ValueError as error:
            raise ValueError(f'--manifold-mixup: {error}') from error
        if args.rank == 0:
            _logger.info(f'Manifold MixUp of {", ".join(mixup_fn.layers)}, alpha {args.manifold_mixup:g}')
        return mixup_fn
    if not mixup_active(args):
        return None
    kwargs = mixup_kwargs(args, num_classes)
    if args.synermix:
        return create_mixup(**kwargs)
    return Mixup(**kwargs) if args.no_prefetcher else None


def create_task(args: argparse.Namespace, model: nn.Module, mixup_fn: Mixer | None) -> TrainingTask:
    """The training task: SynerMix, distillation, multi-label or plain classification."""
    jsd = 'jsd' if args.jsd_loss else None
    bce = 'bce' if args.bce_loss else None
    criterion_kwargs = dict(
        loss_type=args.loss or jsd or bce,
        smoothing=args.smoothing,
        soft_targets=mixup_active(args) or bool(args.manifold_mixup),
        pos_weight=args.bce_pos_weight,
        bce_target_thresh=args.bce_target_thresh,
        bce_sum=args.bce_sum,
        jsd_splits=args.aug_splits,
    )
    common: dict[str, Any] = dict(
        criterion_kwargs=criterion_kwargs,
        device=torch.device(args.device),
        dtype=getattr(torch, args.model_dtype or 'float32'),
        verbose=args.rank == 0,
    )
    if args.synermix:
        if args.synermix_gather and not args.distributed:
            _logger.warning('--synermix-gather has no effect in one process.')
        return SynerMixTask(model, mixup_fn=mixup_fn, **synermix_task_kwargs(args), **common)
    if args.manifold_mixup:  # its L_inter alone: hidden layers are mixed in the task
        return SynerMixTask(model, mixup_fn=mixup_fn, beta=0.0, **common)
    if args.kd_model_name:
        return _create_distillation_task(args, model, common)
    if args.task == 'multilabel':
        return MultiLabelClassificationTask(model, **common)
    return ClassificationTask(model, **common)


def _create_distillation_task(args: argparse.Namespace, model: nn.Module, common: dict[str, Any]) -> TrainingTask:
    common.update(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    if args.kd_distill_type == 'feature':
        return FeatureDistillationTask(
            model,
            args.kd_model_name,
            student_feature_dim=args.kd_student_feature_dim,
            teacher_feature_dim=args.kd_teacher_feature_dim,
            **common,
        )
    if args.kd_distill_type == 'token':
        return TokenDistillationTask(
            model,
            args.kd_model_name,
            distill_type=args.kd_token_distill_type,
            temperature=args.kd_temperature,
            **common,
        )
    return LogitDistillationTask(
        model, args.kd_model_name, loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common
    )


def resolve_lr(args: argparse.Namespace) -> float:
    """--lr, or --lr-base scaled to the global batch as timm scales it; supplements do not count as batch."""
    if args.lr is not None:
        return args.lr
    scale = args.lr_base_scale
    if not scale:
        scale = 'sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear'
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    return args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)
