"""Building a model from a script's flags, with plain errors."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable
from typing import Any

import timm
from timm.models import resolve_model_input_args

from timm_synermix.weights import LOAD_ERRORS, load_reason


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
        (weights if key in ('pretrained', 'scriptable', 'checkpoint_path') else init)[key] = value
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
    except LOAD_ERRORS as error:
        if 'Unknown model' in str(error):
            close = difflib.get_close_matches(args.model, timm.list_models())
            hint = f'; did you mean {", ".join(close)}?' if close else ''
            raise ValueError(f"--model must be a timm model, got '{args.model}'{hint}") from error
        file = kwargs.get('checkpoint_path') or kwargs.get('pretrained_cfg_overlay', {}).get('file')
        if not file:
            raise
        raise ValueError(f'{file} cannot be loaded into --model {args.model}: {load_reason(error)}') from error
    if model.num_classes < 1:
        raise ValueError(f'--model {args.model} has no classifier: encoder-only models and --num-classes 0 have none')
    return model


def check_weights_file(flag: str, path: str | None) -> None:
    """Raise ValueError if a flag names a file of weights that is not there."""
    if path and not os.path.isfile(path):
        raise ValueError(f"{flag} must be a file of weights, got '{path}'")
