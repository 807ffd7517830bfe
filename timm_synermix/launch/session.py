"""What is in the place of timm's names while a script runs with SynerMix or with the metrics."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import timm.data
import timm.models
import timm.utils
from torch import nn

from timm_synermix.cli.rules import check_values
from timm_synermix.cli.train_checks import check_synermix_flags
from timm_synermix.features import find_classifier_leaves
from timm_synermix.launch.evaluation import Evaluation
from timm_synermix.launch.loss_training import LossTraining
from timm_synermix.launch.script import LaunchError, Script
from timm_synermix.launch.task_training import TaskTraining
from timm_synermix.launch.training import Training
from timm_synermix.task.forward import OutputMisused, wrap_forward

# Flags of timm's scripts that mean something else than one image and one class a row.
_EXCLUDED = ['torchscript', 'aot_autograd', 'aug_splits', 'jsd_loss', 'split_bn', 'kd_model_name', 'naflex_loader']
_EXCLUDED += ['train_img_sizes']


class Session:
    """A script's run with SynerMix, with Manifold MixUp, or with the cohesion metrics alone.

    Args:
        script: The script, loaded.
        args: Its flags. More come to it while the script runs, as rank or distributed.

    Raises:
        LaunchError: The flags exclude each other, or the script lacks a name that is needed.
    """

    def __init__(self, script: Script, args: argparse.Namespace) -> None:
        self.script = script
        self.args = args
        self.flag = '--synermix' if getattr(args, 'synermix', False) else '--manifold-mixup'  # for messages
        self.training: Training | None = None
        self.evaluation = Evaluation() if args.cohesion else None
        self.models: list[nn.Module] = []
        self._need('create_model', 'timm.models')
        self._need('create_loader', 'timm.data')
        if getattr(args, 'synermix', False) or getattr(args, 'manifold_mixup', 0):
            check_flags(args, self.flag)
            self.training = TaskTraining(self) if script.mentions('ClassificationTask') else LossTraining(self)
        self._wrap(timm.models.create_model, self.create_model)
        self._wrap(timm.data.create_loader, self.create_loader)
        self._wrap(timm.utils.update_summary, self.update_summary)
        for function in script.own('validate'):
            self._wrap(function, self.validate)

    def _need(self, name: str, module: str) -> None:
        if not self.script.mentions(name):
            raise LaunchError(f'{name} (of {module}) was looked for in {self.script.path}, and is not there')

    def _wrap(self, original: Callable[..., Any], wrapper: Callable[..., Any]) -> None:
        """Put `wrapper(original, ...)` in the place of a function, and of those of its name in the script's folder."""
        for function in {id(f): f for f in [original, *self.script.own(original.__name__)]}.values():
            self.script.replace(function, wraps(function)(partial(wrapper, function)))

    def create_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
        """A model whose calls are seen."""
        model = original(*args, **kwargs)
        if not any(model is known for known in self.models):
            self.models.append(model)
            wrap_forward(model, self.forward)
            if self.evaluation is not None:
                self.evaluation.watch(model, self.classifier_of(model))
        return model

    def classifier_of(self, model: nn.Module) -> list[str] | None:
        """The classifier layers of a model: None if timm's metadata name them, else those of --num-classes outputs."""
        try:
            find_classifier_leaves(model)
            return None
        except ValueError:
            widths = {name: _outputs(module) for name, module in model.named_modules()}
            return [name for name, width in widths.items() if width == self.args.num_classes] or None

    def forward(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The answer of a model: asked for its features in an evaluation, and not trained on other batches."""
        if not module.training:
            return (
                forward(*args, **kwargs)
                if self.evaluation is None
                else self.evaluation.forward(module, forward, *args, **kwargs)
            )
        if self.training is None:
            return forward(*args, **kwargs)
        if self.training.in_step:
            self.training.check_model(module)
            return forward(*args, **kwargs)
        return self.training.watched(forward(*args, **kwargs))

    def create_loader(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """timm's loader for evaluation, watched, or that of two views for training."""
        signature = inspect.signature(original)
        arguments = signature.bind(*args, **kwargs).arguments
        if not arguments.get('is_training', False):
            loader = original(*args, **kwargs)
            return loader if self.evaluation is None else self.evaluation.loader(loader)
        own = not {'input_size', 'batch_size', 'device'} <= signature.parameters.keys()  # timm's is inside, or none
        if self.training is None or own:
            return original(*args, **kwargs)
        return self.training.create_loader(original, {'device': signature.parameters['device'].default, **arguments})

    def update_summary(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A row of summary.csv, and of W&B, with both losses and cohesion."""
        call = inspect.signature(original).bind(*args, **kwargs)
        values = call.arguments
        if self.training is not None and self.training.loader is not None and 'train_metrics' in values:
            values['train_metrics'] = {**values['train_metrics'], **self.training.loader.epoch_losses}
        if self.evaluation is not None and values.get('eval_metrics'):
            values['eval_metrics'] = {**values['eval_metrics'], **self.evaluation.metrics}
        return original(*call.args, **call.kwargs)

    def validate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What an evaluation of the script returns, with cohesion."""
        if self.evaluation is None:
            return original(*args, **kwargs)
        self.evaluation.metrics = {}
        results = original(*args, **kwargs)
        if isinstance(results, dict):
            results.update(self.evaluation.metrics)
        return results

    def explain(self, error: Exception) -> None:
        """Raise the reason of an error that is the launcher's doing."""
        if isinstance(error, OutputMisused):
            raise LaunchError(f'{self.flag}: {error}') from error
        reason = ' '.join(str(error).split())
        if self.training is not None and self.training.waits_for_loss:
            raise LaunchError(
                f"the output of the model did not reach its loss, which was looked for among timm's, torch's and the "
                f'modules of {self.script.path.parent}: {reason}'
            ) from error
        if self.training is not None and self.training.is_about_output(error):
            raise LaunchError(
                f'in training the output of the model has the rows of both losses, and is for the loss alone: {reason}'
            ) from error


def _outputs(module: nn.Module) -> int | None:
    """How many a layer has that could be a classifier."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.out_channels if isinstance(module, nn.Conv2d) else None


def check_flags(args: argparse.Namespace, ours: str) -> None:
    """Refuse flags that contradict each other, or are out of range; ours is the one that the others are beside.

    Raises:
        LaunchError: Names the flags.
    """
    for name in _EXCLUDED:
        if getattr(args, name, None):
            raise LaunchError(f'{ours} and --{name.replace("_", "-")} cannot be used together')
    if getattr(args, 'task', None) == 'multilabel':
        raise LaunchError(f'{ours} and --task multilabel cannot be used together')
    if args.manifold_mixup and any(getattr(args, name, None) for name in ('mixup', 'cutmix', 'cutmix_minmax')):
        raise LaunchError('--manifold-mixup and --mixup or --cutmix cannot be used together')
    own = {name: value for name, value in vars(args).items() if name.startswith(('synermix', 'manifold_mixup'))}
    try:
        check_values(argparse.Namespace(**own))
        check_synermix_flags(args)
    except ValueError as error:
        raise LaunchError(str(error)) from error
