"""SynerMix in a script's training: its loader, its mixing of images, and its task or its model and loss."""

from __future__ import annotations

import argparse
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import timm.models
import torch
import torch.distributed as dist
from timm.data import FastCollateMixup, Mixup, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from timm_synermix.cli import synermix_loader_kwargs, synermix_task_kwargs
from timm_synermix.data import create_synermix_loader
from timm_synermix.launch.script import LaunchError
from timm_synermix.launch.train_loader import TrainLoader
from timm_synermix.task import ManifoldMixup, Mixer, create_mixup

if TYPE_CHECKING:
    from timm_synermix.launch.session import Session


class Training(ABC):
    """SynerMix in a training script: its loader, and its mixing of images between classes.

    Attributes:
        loader: The training loader, once the script has made it.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.loader: TrainLoader | None = None
        self.mixup: Any = None  # the script's, caught
        self.input_size: Any = None
        self._resumed: int | None = None
        for mixup in (Mixup, FastCollateMixup):
            session.script.replace(mixup, self._caught_mixup())
        session._wrap(timm.models.resume_checkpoint, self._resume)

    @property
    @abstractmethod
    def in_step(self) -> bool:
        """Whether a call of the model, in training mode, is that of a step of ours."""

    @property
    def waits_for_loss(self) -> bool:
        """Whether the model has seen a batch, and no loss has."""
        return False

    @property
    def args(self) -> argparse.Namespace:
        """The script's flags, with rank and distributed as they are."""
        ready = dist.is_available() and dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)
        return argparse.Namespace(**{'seed': 42, **vars(self.session.args), 'rank': rank, 'distributed': size > 1})

    def _caught_mixup(self) -> type:
        """In the place of timm's mixups: keeps the settings, and leaves a batch as it is, which is mixed already."""
        training = self

        class CaughtMixup:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                arguments = inspect.signature(Mixup).bind(*args, **kwargs).arguments
                self.mixer = create_mixup(**arguments)
                training.mixup = self

            def __call__(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
                return input, target

            @property
            def mixup_enabled(self) -> bool:
                return self.mixer.mixup_enabled

            @mixup_enabled.setter
            def mixup_enabled(self, enabled: bool) -> None:
                self.mixer.mixup_enabled = enabled

        return CaughtMixup

    def set_mixup_enabled(self, enabled: bool) -> None:
        if self.mixup is not None:
            self.mixup.mixup_enabled = enabled

    def _resume(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """timm's resume_checkpoint, whose result is the epoch to go on with."""
        self._resumed = original(*args, **kwargs)
        return self._resumed

    def start_epoch(self) -> int:
        given = getattr(self.session.args, 'start_epoch', None)
        return given if given is not None else self._resumed or 0

    def create_loader(self, original: Callable[..., Any], arguments: dict[str, Any]) -> TrainLoader:
        """The training loader of two views, from the arguments of timm's; timm's own for Manifold MixUp alone."""
        collate_fn = arguments.pop('collate_fn', None)
        if collate_fn is not None and collate_fn is not self.mixup:
            raise LaunchError(f"collate_fn must be timm's FastCollateMixup or none, got {type(collate_fn).__name__}")
        if not self.session.models:
            raise LaunchError('create_model made no model before create_loader was called')
        self.input_size = arguments['input_size']
        args = self.args
        if not args.synermix:
            self.loader = TrainLoader(original(**arguments), self)
            return self.loader
        config = resolve_data_config(vars(args), model=self.session.models[0])
        if arguments.get('input_size_choices') is None:  # those of its schedule mean nothing
            arguments = {name: value for name, value in arguments.items() if not name.startswith('batch_')} | {
                'batch_size': arguments['batch_size']
            }
        arguments = {n: v for n, v in arguments.items() if n != 'num_batches' or v is not None}
        try:
            loader = create_synermix_loader(
                **arguments
                | synermix_loader_kwargs(args)
                | dict(
                    crop_pct=config['crop_pct'],
                    crop_mode=config['crop_mode'],
                    clean_interpolation=config['interpolation'],
                )
            )
        except (ValueError, TypeError) as error:
            raise LaunchError(f'--synermix: {error}') from error
        self.loader = TrainLoader(loader, self)
        return self.loader

    def task_kwargs(self, model: nn.Module) -> dict[str, Any]:
        """The arguments of `SynerMixTask` that the flags, and the script's mixup, set."""
        args = self.args
        kwargs = synermix_task_kwargs(args) if args.synermix else dict(beta=0.0)
        return {**kwargs, 'mixup_fn': self._mixup_fn(model), 'classifier': self.session.classifier_of(model)}

    def _mixup_fn(self, model: nn.Module) -> Mixer | None:
        args = self.args
        if not args.manifold_mixup:
            return None if self.mixup is None else self.mixup.mixer
        size = self.input_size if isinstance(self.input_size, (tuple, list)) else (3, self.input_size, self.input_size)
        return ManifoldMixup(
            model,
            self.session.args.num_classes,
            tuple(size),
            alpha=args.manifold_mixup,
            layers=args.manifold_mixup_layers,
            prob=getattr(args, 'mixup_prob', 1.0),
            label_smoothing=getattr(args, 'smoothing', 0.0),
            classifier=self.session.classifier_of(model),
        )

    def soft(self, criterion: Any) -> Any:
        """The script's criterion for the targets of Manifold MixUp, which the script does not know to be soft."""
        if not self.session.args.manifold_mixup or not isinstance(criterion, LabelSmoothingCrossEntropy):
            return criterion
        return SoftTargetCrossEntropy()

    def is_about_output(self, error: Exception) -> bool:
        """Whether an error comes from a function that has the output of both losses at hand."""
        return False

    def check_model(self, module: nn.Module) -> None:
        """Refuse a step of a model that is not ours."""
        return

    def watched(self, output: Any) -> Any:
        """The output of a model in training mode, outside of our steps: nothing may be trained with it."""
        if isinstance(output, Tensor) and output.requires_grad and not torch.compiler.is_compiling():
            output.register_hook(self._refuse)
        return output

    def _refuse(self, grad: Tensor) -> None:
        raise LaunchError(
            f'a model is trained on batches that do not come from the training loader of timm.data.create_loader, '
            f'which was looked for in {self.session.script.path}'
        )

    def is_off(self, epoch: int) -> bool:
        """Whether SynerMix is off from an earlier epoch, or this one, on."""
        off = self.args.synermix_off_epoch
        return bool(off) and epoch >= off

    @abstractmethod
    def begin(self, epoch: int, num_batches: int) -> None:
        """A pass over the training loader begins."""

    @abstractmethod
    def hand_out(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What the loop gets for a batch."""

    @abstractmethod
    def losses(self) -> Mapping[str, Tensor]:
        """Those of the step that the loop has made, by name."""

    @abstractmethod
    def end(self) -> None:
        """The pass is over, there is no batch any more."""
