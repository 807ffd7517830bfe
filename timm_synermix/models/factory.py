"""Building a model from a script's flags, with plain errors."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from timm.layers import apply_test_time_pool, convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import resolve_model_input_args
from timm.utils import freeze, reparameterize_model, set_jit_fuser
from torch import nn

from timm_synermix.features import FeatureHook, find_classifier_leaves
from timm_synermix.utils.safe_load import (
    NUMPY_FORMATS,
    has_ema,
    load_errors,
    load_reason,
    read_weights,
    without_split_bn,
)

_logger = logging.getLogger(__name__)


def build_classifier(create_model: Callable[..., Any], args: argparse.Namespace, **kwargs: Any) -> Any:
    """Create the model of --model for the input that the flags ask for.

    Args:
        create_model: `timm.create_model`, or what a caller of the script has put in its place.
        args: The flags model, img_size, input_size, in_chans and model_kwargs are read.
        kwargs: Other arguments of create_model.

    Raises:
        ValueError: The model is unknown, does not take an argument, or has no classifier; or its file of weights cannot
            be loaded.
    """
    name = args.model
    init: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for key, value in kwargs.items():  # the first describe the model, the second what is loaded into it
        (weights if key in ('pretrained', 'scriptable') else init)[key] = value
    init['in_chans'] = args.in_chans or (args.input_size[0] if args.input_size else 3)
    init.update(args.model_kwargs)
    try:
        init = resolve_model_input_args(name, args=vars(args), **init)
        name = init.pop('model_name')
    except RuntimeError:
        pass  # no timm model: then create_model says so, unless a caller's own knows the name
    try:
        model = create_model(name, **init, **weights)
    except TypeError as error:
        raise ValueError(f'--model-kwargs or another flag does not fit --model {args.model}: {error}') from error
    except AssertionError as error:  # timm's word on an argument
        raise ValueError(f'--gp {args.gp}: {error}' if args.gp and 'pool' in str(error) else str(error)) from error
    except Exception as error:  # the hub's client has kinds of its own
        if 'Unknown model' in str(error):
            close = difflib.get_close_matches(args.model, timm.list_models())
            hint = f'; did you mean {", ".join(close)}?' if close else ''
            raise ValueError(f"--model must be a timm model, got '{args.model}'{hint}") from error
        if not kwargs.get('pretrained'):
            raise
        raise ValueError(_not_loaded(args, error)) from error
    if model.num_classes < 1:
        raise ValueError(f'--model {args.model} has no classifier: encoder-only models and --num-classes 0 have none')
    return model


def _not_loaded(args: argparse.Namespace, error: Exception) -> str:
    """Why a model's pretrained weights could not be had, from a file or from the internet."""
    if not hasattr(args, 'pretrained_path'):  # validate.py
        return (
            f'--pretrained: the weights of {args.model} cannot be had: {load_reason(error)}; --checkpoint takes a file'
        )
    if args.pretrained_path:
        what = f'--pretrained-path: {args.pretrained_path} cannot be loaded into --model {args.model}'
        return f'{what}: {load_reason(error)}'
    reason = f'--pretrained: the weights of {args.model} cannot be had: {load_reason(error)}'
    return f'{reason}; --pretrained-path takes a file of them, --initial-checkpoint one with its classifier'


def build_model(create_model: Callable[..., Any], args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model to train on its device, and the data configuration that fits it.

    Args:
        create_model: See `build_classifier`.
        args: The flags of train.py.

    Raises:
        ValueError: The model is unknown or has no classifier, a file of weights is missing, or the model cannot take
            the input asked for.
    """
    set_fast_norm(args.fast_norm)
    if args.fuser:
        set_jit_fuser(args.fuser)
    check_weights_file('--pretrained-path', args.pretrained_path)
    check_weights_file('--initial-checkpoint', args.initial_checkpoint)
    kwargs: dict[str, Any] = dict(
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_connect if args.drop_path is None else args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        pretrained=args.pretrained or bool(args.pretrained_path),
        scriptable=args.torchscript,
    )
    if args.pretrained_path:  # takes the place of the model's own weights; -1 fits the classifier to num_classes
        kwargs['pretrained_cfg_overlay'] = dict(_source(args.pretrained_path), num_classes=-1)
    model = build_classifier(create_model, args, **kwargs)
    getattr(model, 'pretrained_cfg', {}).pop('state_dict', None)  # they are in the model now
    if args.initial_checkpoint:
        load_weights(model, args.initial_checkpoint, f'--initial-checkpoint: {args.initial_checkpoint}', args.model)
    if args.head_init_scale is not None or args.head_init_bias is not None:
        _init_heads(model, args.head_init_scale, args.head_init_bias)
    if args.freeze:
        freeze_backbone(model)
    data_config = resolve_input_data_config(model, args=vars(args))
    _check_takes(model, args, data_config['input_size'])
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    return _place_model(args, model), data_config


def _source(path: str) -> dict[str, Any]:
    """A file of weights as a source of timm's pretrained ones: read here, but for those that the model reads itself."""
    with load_errors(f'--pretrained-path: {path} cannot be loaded'):
        weights = read_weights(path)
    return {'file': path} if path.endswith(NUMPY_FORMATS) else {'state_dict': without_split_bn(weights)}


def freeze_backbone(model: nn.Module) -> None:
    """Leave the classifier layers alone to be trained: timm's `freeze`, of all the rest.

    The rest's BatchNorm layers of images keep their statistics; those of tokens (LeViT has some) go on, as in timm.
    Dropout and stochastic depth are not changed.
    """
    freeze(model)
    for name in find_classifier_leaves(model):
        model.get_submodule(name).requires_grad_(True)


@torch.no_grad()
def _init_heads(model: nn.Module, scale: float | None, bias: float | None) -> None:
    """Scale the initial weights of every classifier of a model, and set its bias if it has one."""
    for name in find_classifier_leaves(model):
        head: Any = model.get_submodule(name)
        if scale is not None:
            for parameter in head.parameters():
                parameter.mul_(scale)
        if bias is not None and head.bias is not None:
            nn.init.constant_(head.bias, bias)


@torch.no_grad()
def _check_takes(model: nn.Module, args: argparse.Namespace, input_size: tuple[int, int, int]) -> None:
    """Show a model one black image, if images are to have another size than it was made for.

    Raises:
        ValueError: It cannot take images of that size.
    """
    if tuple(input_size) == (getattr(model, 'pretrained_cfg', None) or {}).get('input_size'):
        return
    image = torch.zeros(1, *input_size, device=next(model.parameters()).device)
    if args.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    training = model.training
    try:
        model.eval()(image)
    except (AssertionError, RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        size = 'x'.join(map(str, input_size))
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(f'--img-size: --model {args.model} cannot take images of {size}: {reason}') from error
    finally:
        model.train(training)


def _place_model(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """Convert what the flags want converted, and move the model to its device, type and memory layout."""
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    if args.distributed and args.sync_bn:
        model = convert_sync_batchnorm(model)
    model.to(device=args.device, dtype=getattr(torch, args.model_dtype or 'float32'))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    return torch.jit.script(model) if args.torchscript else model


def load_weights(model: Any, path: str, what: str, name: str, use_ema: bool = True) -> None:
    """Load a file of weights into the model of a name, all of them.

    Raises:
        ValueError: Begins with what; the file is damaged or does not fit.
    """
    with load_errors(f'{what} cannot be loaded into --model {name}'):
        weights = read_weights(path, use_ema)
        if path.endswith(NUMPY_FORMATS):
            if not hasattr(model, 'load_pretrained'):
                raise ValueError('this model reads no files of numpy')
            model.load_pretrained(path)
        else:
            model.load_state_dict(without_split_bn(weights))


def check_weights_file(flag: str, path: str | None) -> None:
    """Raise ValueError if a flag names a file of weights that is not there."""
    if path and not os.path.isfile(path):
        raise ValueError(f"{flag} must be a file of weights, got '{path}'")


@dataclass
class Built:
    """A model to evaluate."""

    model: Any  # scripted or compiled, if the flags want that
    hook: FeatureHook | None  # None where features are not wanted or hidden
    data_config: dict[str, Any]
    num_classes: int
    param_count: int


def build_eval_model(create_model: Callable[..., Any], args: argparse.Namespace, device: torch.device) -> Built:
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
    _check_takes(model, args, config['input_size'])
    model = model.to(device=device, dtype=getattr(torch, args.model_dtype or 'float32')).eval()
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    wanted = args.task != 'multilabel' and (args.cohesion or args.features_out or args.report)
    if wanted and args.torchscript:
        _logger.warning('No cohesion metrics: a model under --torchscript hides its features.')
        wanted = False
    hook = FeatureHook(model, classifier='fc' if pooled else None) if wanted else None
    return Built(convert_model(args, model), hook, config, num_classes, param_count)


def load_model(create_model: Callable[..., Any], args: argparse.Namespace) -> Any:
    """The model with its pretrained weights or those of the checkpoint, on the CPU."""
    model = build_classifier(
        create_model,
        args,
        pretrained=args.pretrained,
        num_classes=args.num_classes,
        global_pool=args.gp,
        bn_eps=getattr(args, 'bn_eps', None),  # of the run that a checkpoint is of
        scriptable=args.torchscript,
    )
    if not args.checkpoint:
        known = model.pretrained_cfg.get('num_classes')
        if known != model.num_classes:
            _logger.warning(f'The weights are for {known} classes: without --checkpoint the classifier is random.')
        return model
    what = f'--checkpoint: {args.checkpoint}'
    if args.use_ema:
        with load_errors(f'{what} cannot be loaded into --model {args.model}'):
            if not has_ema(args.checkpoint):
                _logger.warning(f'--use-ema: {args.checkpoint} has no moving average, its only weights are evaluated.')
    load_weights(model, args.checkpoint, what, args.model, args.use_ema)
    return model


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
