"""SynerMix inside of a model's own forward, for loops that say `loss_fn(model(input), target)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from timm_synermix.task.criterion import intra_class_criterion
from timm_synermix.task.mixup import Mixer
from timm_synermix.task.synermix import SynerMixTask, _Draw
from timm_synermix.utils.wrapped import WrappedLoader


def wrap_forward(model: nn.Module, wrapper: Callable[..., Any]) -> None:
    """Let `wrapper(module, forward, *args, **kwargs)` answer calls of a model; forward is what answered them before.

    It is this one module that changes, not its class: its name, parameters and state_dict keys are those it had. A
    deep copy of it is wrapped as well, with itself as module.
    """
    before = model.forward
    # the function, not the method: a method would call this model from its copies
    function = before.__func__ if isinstance(before, MethodType) else lambda _, *args, **kwargs: before(*args, **kwargs)

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return wrapper(module, partial(function, module), *args, **kwargs)

    model.forward = MethodType(forward, model)


class OutputMisused(ValueError):
    """What the model returned for both losses went into something else than its loss."""


@dataclass
class _Step:
    """A batch on its way through the loop."""

    draw: _Draw
    num_intra: int = 0  # rows of L_intra in the output of the model
    features: tuple[Tensor, ...] = ()
    loss_grad: list[Tensor] = field(default_factory=list)  # of the loss, with respect to the output
    state: str = 'handed out'  # then 'waiting' for its loss, then 'joined'
    output: Callable[[], Tensor | None] = lambda: None  # of the model, as long as the loop keeps it


class SynerMixForward:
    """Both losses of SynerMix in a loop that says `loss_fn(model(input), target)`.

        synermix = SynerMixForward(model)
        loss_fn = synermix.loss(nn.CrossEntropyLoss())
        loader = synermix.loader(create_synermix_loader(...))
        for input, target in loader:
            loss = loss_fn(model(input), target)

    The loader remembers the classes of the batch that it has handed out last, its images mixed between classes. The
    model, in training mode, mixes the features of the clean views and returns the logits of both losses, one below the
    other; the loss takes them apart: `L = beta * L_intra + (1 - beta) * L_inter`, as `SynerMixTask` has it. In
    evaluation mode, and without a batch, model and loss are what they were. state_dict keys do not change; DDP and
    torch.compile go around the model, and copies of it (EMA) are plain models.

    Args:
        model: The model to train; its forward is wrapped.
        mixup_fn: See `SynerMixTask`. The loader calls it: the loop must not mix.
        kwargs: Other arguments of `SynerMixTask`, but criterion and inter_task.

    Attributes:
        task: The task whose losses these are; its `synermix_enabled` and `mixup_fn` work as there.
        losses: 'loss', 'intra_loss' and 'inter_loss' of the last batch, detached.

    Raises:
        ValueError: inter_task is given, or see `SynerMixTask`.
    """

    def __init__(self, model: nn.Module, *, mixup_fn: Mixer | None = None, **kwargs: Any) -> None:
        if kwargs.get('inter_task') is not None:
            raise ValueError("inter_task must be None: the loop's own loss is L_inter.")
        self.model = model
        self.task = SynerMixTask(model, nn.CrossEntropyLoss(), mixup_fn=mixup_fn, **{'verbose': False, **kwargs})
        self.losses: dict[str, Tensor] = {}
        self._step: _Step | None = None
        self._inside = False  # of the forward that returns the logits of both losses
        wrap_forward(model, self._forward)

    def loader(self, loader: Any) -> SynerMixBatches:
        """The batches of `create_synermix_loader`, for this model: `(input, target)` on its device.

        With mixup_fn the target is that of the mixed images. The loop works on a batch before it asks for the next one.
        """
        return SynerMixBatches(self, loader)

    def loss(self, criterion: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of the model's output.

        Args:
            criterion: Mean over rows of logits `[K, num_classes]` and targets as the loader has them: soft ones with
                mixup_fn, otherwise class indices.
        """
        return partial(self.join, criterion)

    @property
    def in_step(self) -> bool:
        """Whether a call of the model, in training mode, is one for both losses."""
        return self._step is not None

    @property
    def waiting(self) -> bool:
        """Whether the model has returned the logits of both losses, and the loss has not seen them yet."""
        return self._step is not None and self._step.state == 'waiting'

    def hand_out(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What the loop gets for a batch of a `create_synermix_loader`; from now on it is the one the model mixes."""
        device = next(self.model.parameters()).device
        input = input.to(device)
        draw = self.task._draw(input, target.to(device))
        self._step = _Step(draw)
        if draw.clean is None or draw.augmented is None:
            one: Any = draw.clean if draw.augmented is None else draw.augmented
            return one, draw.inter_target
        in_place = draw.augmented.data_ptr() == input[len(draw.clean) :].data_ptr()  # or as it was
        whole = input if in_place else torch.cat([draw.clean, draw.augmented])
        return whole[: len(draw.clean) + len(draw.augmented)], draw.inter_target

    def forget(self) -> None:
        """There is no batch any more: the model is what it was until the next one."""
        self._step = None

    def _forward(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        step = self._step
        training = module is self.model and module.training and torch.is_grad_enabled()
        if not training or step is None or self._inside:
            return forward(*args, **kwargs)
        (input,) = args
        draw = step.draw
        num_clean = 0 if draw.clean is None else len(draw.clean)
        clean, augmented = input[:num_clean], input[num_clean:]
        self._inside = True
        try:
            intra, inter, step.features = self.task.trainable_module(
                clean if num_clean else None, augmented if len(augmented) else None, draw.row, draw.weight, draw.bank
            )
        finally:
            self._inside = False
        step.num_intra, step.state = 0 if intra is None else len(intra), 'waiting'
        logits = [part for part in (intra, inter) if part is not None]
        output = torch.cat(logits) if len(logits) > 1 else logits[0]
        if not torch.compiler.is_compiling():
            output.register_hook(partial(_check_grad, step))
            step.output = ref(output)
        return output

    def is_output(self, value: Any) -> bool:
        """Whether a value is what the model returned for both losses of the last batch."""
        return self._step is not None and value is not None and value is self._step.output()

    def join(self, criterion: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor) -> Tensor:
        """The loss of both parts of an output, or criterion of an output of the evaluation.

        Raises:
            ValueError: target is not that of the batch, or output not the model's.
        """
        if not self.waiting:
            return criterion(output, target)
        step = self._step
        assert step is not None
        step.state = 'joined'
        draw, num_intra = step.draw, step.num_intra
        if target is not draw.inter_target and not torch.equal(target, draw.inter_target):
            raise ValueError('the target of the loss must be that of the loader, unchanged, for the last batch it gave')
        num_inter = 0 if draw.augmented is None else len(draw.augmented)
        if len(output) != num_intra + num_inter:
            raise ValueError(f'output must be what the model returned, {num_intra + num_inter} rows, got {len(output)}')
        own = output.view_as(output)
        if own.requires_grad:
            own.register_hook(step.loss_grad.append)
        result = self.task._join(
            draw,
            own[:num_intra] if num_intra else None,
            own[num_intra:] if num_inter else None,
            step.features,
            (intra_class_criterion(criterion, self.task.mixup_fn), criterion),
        )
        self.losses = {name: value.detach() for name, value in result.items() if value.ndim == 0}
        return result['loss']


def _check_grad(step: _Step, grad: Tensor) -> None:
    """Refuse a backward pass in which the output of both losses is not the loss's alone.

    Raises:
        OutputMisused: Something else was computed of it: its rows are not those of the images.
    """
    own = step.loss_grad.pop() if step.loss_grad else None
    if own is None or (own.data_ptr() != grad.data_ptr() and not torch.allclose(own, grad, equal_nan=True)):
        raise OutputMisused(
            'in training the output of the model must go into its loss and nowhere else: it has the rows of both losses'
        )


class SynerMixBatches(WrappedLoader):
    """The batches of a loader as a `SynerMixForward` hands them out; in all else the loader itself."""

    def __init__(self, synermix: SynerMixForward, loader: Any) -> None:
        super().__init__(loader)
        self.synermix = synermix

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for input, target in self._loader:
            yield self.synermix.hand_out(input, target)
        self.synermix.forget()
