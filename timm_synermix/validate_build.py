"""The parts of an evaluation, built from the flags of validate.py."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import create_loader, resolve_input_data_config
from timm.layers import apply_test_time_pool, set_fast_norm
from timm.models import load_checkpoint
from timm.utils import load_checkpoint_metadata, reparameterize_model, set_jit_fuser
from torch import Tensor
from torch.utils.data import IterableDataset

from timm_synermix.data import dataset_targets
from timm_synermix.datasets import check_classes, create_dataset
from timm_synermix.evaluators import LabelEvaluator, create_real_labels, load_valid_labels
from timm_synermix.features import FeatureHook
from timm_synermix.loading import SampleDataset
from timm_synermix.models import build_classifier
from timm_synermix.reading import ReadableImages
from timm_synermix.weights import load_errors

_logger = logging.getLogger('validate')


@dataclass
class Built:
    """A model to evaluate."""

    model: Any  # scripted or compiled, if the flags want that
    hook: FeatureHook | None  # None where features are not wanted or hidden
    data_config: dict[str, Any]
    num_classes: int
    param_count: int


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


def build_model(create_model: Callable[..., Any], args: argparse.Namespace, device: torch.device) -> Built:
    """The model with its weights on its device, in the form that the flags ask for.

    Args:
        create_model: `timm.create_model`, or what a caller of the script has put in its place.
        args: The flags.
        device: Where to put the model.

    Raises:
        ValueError: The model is unknown, or its weights cannot be loaded.
    """
    set_fast_norm(args.fast_norm)
    if args.fuser:
        with load_errors(f'--fuser {args.fuser} cannot be used'):
            set_jit_fuser(args.fuser)
    model = load_model(create_model, args)
    param_count = sum(parameter.numel() for parameter in model.parameters())
    num_classes = model.num_classes
    if args.reparam:
        model = reparameterize_model(model)
    config = resolve_input_data_config(model, args=vars(args), use_test_size=not args.use_train_size, verbose=True)
    pooled = False
    if args.test_pool:
        model, pooled = apply_test_time_pool(model, config)
        if pooled:
            config['crop_pct'] = 1.0
    model = model.to(device=device, dtype=getattr(torch, args.model_dtype or 'float32')).eval()
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    wanted = args.cohesion or args.features_out or args.report
    if wanted and args.torchscript:
        _logger.warning('No cohesion metrics: a model under --torchscript hides its features.')
        wanted = False
    hook = FeatureHook(model, classifier='fc' if pooled else None) if wanted else None
    return Built(convert_model(args, model), hook, config, num_classes, param_count)


def load_model(create_model: Callable[..., Any], args: argparse.Namespace) -> Any:
    """The model with its pretrained weights or those of the checkpoint, on the CPU."""
    try:
        model = build_classifier(
            create_model,
            args,
            pretrained=args.pretrained,
            num_classes=args.num_classes,
            global_pool=args.gp,
            scriptable=args.torchscript,
        )
    except OSError as error:
        raise ValueError(f'--pretrained: the weights of {args.model} cannot be had: {error}') from error
    if not args.checkpoint:
        known = model.pretrained_cfg.get('num_classes')
        if known != model.num_classes:
            _logger.warning(f'The weights are for {known} classes: without --checkpoint the classifier is random.')
        return model
    with load_errors(f'--checkpoint: {args.checkpoint} cannot be loaded into {args.model}'):
        if args.use_ema and not has_ema(args.checkpoint):
            _logger.warning(f'--use-ema: {args.checkpoint} has no moving average, its only weights are evaluated.')
        load_checkpoint(model, args.checkpoint, use_ema=args.use_ema)
    return model


def has_ema(path: str) -> bool:
    """Whether a checkpoint holds a moving average beside its weights."""
    content = {} if path.endswith('.safetensors') else load_checkpoint_metadata(path)
    return any(content.get(key) is not None for key in ('state_dict_ema', 'model_ema'))


def convert_model(args: argparse.Namespace, model: Any) -> Any:
    """The model scripted or compiled, if the flags want that."""
    if args.torchscript:
        with load_errors(f'--torchscript: {args.model} cannot be converted'):
            return torch.jit.script(model)
    if args.torchcompile or args.aot_autograd:
        torch._dynamo.reset()
        # aot_eager is AOT Autograd alone; timm calls functorch for it, which fails where the last batch is smaller
        return torch.compile(model, backend=args.torchcompile or 'aot_eager', mode=args.torchcompile_mode)
    return model


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


def build_evaluator(
    args: argparse.Namespace, dataset: Any, built: Built, loader: Any, accelerator: Accelerator
) -> tuple[LabelEvaluator, int]:
    """The evaluator with the labels of the flags, and the number of classes of the targets.

    Raises:
        ValueError: The labels do not fit the model or the data.
    """
    valid_labels = load_valid_labels(args.valid_labels) if args.valid_labels else None
    if valid_labels and max(valid_labels) >= built.num_classes:
        raise ValueError(f'--valid-labels must be below the {built.num_classes} classes, got {max(valid_labels)}')
    num_classes = len(valid_labels) if valid_labels else built.num_classes
    if valid_labels or args.num_classes is None:
        check_classes(None, dataset, num_classes)
    evaluator = LabelEvaluator(
        accelerator.device,
        num_classes,
        valid_labels=valid_labels,
        real_labels=create_real_labels(args.real_labels, dataset, loader) if args.real_labels else None,
        average=args.metrics_avg,
        log_freq=args.log_freq if accelerator.is_main_process else 0,
        num_batches=len(loader),
    )
    return evaluator, num_classes
