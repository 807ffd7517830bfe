"""SynerMix as a timm training task: both losses from one module forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.task import ClassificationTask, TrainingTask, resolve_classification_loss
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_synermix.features import FeatureHook
from timm_synermix.functional import IGNORE_INDEX, class_rows, row_weight, synermix_loss
from timm_synermix.task.criterion import class_mean_loss, intra_class_criterion, skipping_padding
from timm_synermix.task.feature_bank import BankMix, FeatureBank
from timm_synermix.task.gather import gather_rows, mean_over_ranks, share_weight
from timm_synermix.task.mixup import Mixer
from timm_synermix.task.module import SynerMixModule, take_trainable
from timm_synermix.task.multi_label import LabelMix, draw_label_mix, label_mean_loss, unmixed_labels
from timm_synermix.utils.checks import BETA, MIX, NUM_MIXED, POSITIVE_FRACTION, check_bank, check_unmixed
from timm_synermix.utils.layout import Layout
from timm_synermix.utils.random import seed_of


class _Draw(NamedTuple):
    """One batch after all that is drawn at random for it."""

    clean: Tensor | None
    augmented: Tensor | None
    inter_target: Tensor
    row: Tensor
    weight: Tensor
    row_target: Tensor
    bank: BankMix | None
    beta: float
    labels: LabelMix | None = None


class SynerMixTask(ClassificationTask):
    """Classification with SynerMix: `L = beta * L_intra + (1 - beta) * L_inter`.

    L_intra is the mean loss, over the classes present in the batch, of one synthesised feature per class, mixed at
    random from the features of the clean images. L_inter is the recipe's own loss on the augmented images, mixed by
    mixup_fn if given. A drop-in for `timm.task.ClassificationTask`: checkpoints hold the keys of the bare model.

    Args:
        model: The model to train.
        criterion: Loss of the inter-class part, a mean over rows. Created from criterion_kwargs when None.
        criterion_kwargs: Arguments of `timm.loss.create_classification_loss`, when criterion is None. `soft_targets`
            defaults to whether mixup_fn is given.
        intra_criterion: Loss of the intra-class part, a mean over rows of logits `[K, num_classes]` and class indices
            `[K]`. Default: the loss that criterion_kwargs describe, for hard targets; or criterion itself, with
            mixup_fn on the class made a soft target, see `intra_class_criterion`.
        inter_task: A timm task of this model whose loss on the augmented images is L_inter, such as one of
            distillation; it gives up what it trains to this task. None for the criterion alone. With timm's
            `MultiLabelClassificationTask` images have several labels, see `draw_label_mix`.
        mixup_fn: The inter-class mixing of the augmented images, a `Mixer`: `timm.data.Mixup`, `ManifoldMixup` or your
            own. Not in the collate function, which would mix the clean views as well.
        beta: Weight of the intra-class loss, in `[0, 1]`. None: 0.1 with mixup_fn and 0.5 without, as in the examples
            of the paper's code. At 0 there is no clean forward and the loss is timm's, bit for bit; at 1 there is no
            augmented forward.
        mix: 'features' mixes them within classes. 'none' is the control of the method, which sees the same images:
            L_intra is then the mean loss of the clean images as they are.
        splits: Augmentation splits of each image, as of timm's `--aug-splits`; L_inter is of all of them.
        num_mixed: Images interpolated per class (the paper's P), 0 for all in the batch.
        bank: For a class with one image in the batch, mix that with a recent feature of the class, see `FeatureBank`.
            Copies of an image, as of repeated augmentation, count as images.
        fraction: Below 1, expect clean views of some images alone, see `SupplementBatchSampler`: L_intra is then the
            mean over their classes.
        gather_rows: Mix the classes of the batches of all ranks together: the paper's mini-batch is then the global
            one. At least the largest number of images in a batch of a rank, to which features are padded; 0 for the
            classes of each rank by itself. Needs a process group.
        classifier: See `FeatureHook`.
        seed: Seed of the mixing weights. Those of the n-th batch depend on seed, rank and n, which checkpoints hold, so
            that a resumed run draws what it would have drawn.
        rank: Distributed rank, so that ranks draw different weights; with gather_rows the same for all.
        device, dtype, verbose: As in timm.

    Raises:
        ValueError: beta, num_mixed or fraction is out of range, mix is unknown, or the model has no classifier; or what
            excludes each other comes together: bank and gather_rows, either of them and several labels, mix 'none' and
            how to mix (num_mixed, bank, gather_rows), inter_task and a mixer of hidden activations, splits and
            mixup_fn.

    Source: SynerMix (arXiv 2403.14137), steps 2 to 4. The authors' code loops over the classes on the host and leaves
    L_intra out of the loss it logs.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        *,
        intra_criterion: nn.Module | Callable | None = None,
        inter_task: TrainingTask | None = None,
        mixup_fn: Mixer | None = None,
        beta: float | None = None,
        mix: str = 'features',
        splits: int = 1,
        num_mixed: int = 0,
        bank: bool = False,
        fraction: float = 1.0,
        gather_rows: int = 0,
        classifier: str | Sequence[str] | None = None,
        seed: int = 42,
        rank: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        beta = (0.1 if mixup_fn is not None else 0.5) if beta is None else beta
        BETA.check('beta', beta)
        NUM_MIXED.check('num_mixed', num_mixed)
        POSITIVE_FRACTION.check('fraction', fraction)
        check_bank(bank, bool(gather_rows))
        MIX.check('mix', mix)
        check_unmixed(mix, dict(bank=bank, gather_rows=gather_rows, num_mixed=num_mixed))
        self.multi_label = getattr(inter_task, 'multi_label', False)
        _check_recipe(inter_task, mixup_fn, splits, self.multi_label and (bank or gather_rows > 0))
        loss_kwargs = criterion_kwargs or {}
        if criterion is None:
            criterion_kwargs = {'soft_targets': mixup_fn is not None, **loss_kwargs}
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        if criterion is not None and intra_criterion is None:
            intra_criterion = intra_class_criterion(self.criterion, mixup_fn, self.multi_label)
        if intra_criterion is None:
            intra_criterion = resolve_classification_loss(
                None, self.device, self.multi_label, {**loss_kwargs, 'soft_targets': False}
            )
        self.intra_criterion = skipping_padding(intra_criterion)
        self.inter_task: Any = inter_task
        trainable = None if inter_task is None else take_trainable(inter_task)
        self.trainable_module: Any = SynerMixModule(model, trainable, classifier, gather_rows, mixup_fn)
        self.mixup_fn, self.beta = mixup_fn, beta
        self.mix, self.num_mixed = mix, num_mixed
        self.layout = Layout(splits, some=fraction < 1)
        self.gather_rows = gather_rows
        self.bank = _create_bank(self.trainable_module.hook) if bank else None
        self.synermix_enabled = True  # set to False to go on with L_inter alone, as Mixup.mixup_enabled
        self.seed, self.rank = seed, rank
        self.num_batches = 0  # that were mixed so far

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> Any:
        """Compile the training step and, by itself, the model for evaluation."""
        compile_kwargs.update(backend=backend, mode=mode)
        self.eval_model: Any = torch.compile(self.trainable_module.model, **compile_kwargs)
        self.trainable_module = torch.compile(self.trainable_module, **compile_kwargs)
        teacher = getattr(self.inter_task, 'teacher', None)
        if teacher is not None:
            teacher.compile(**compile_kwargs)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The bare model, without the SynerMixModule around it."""
        resolved = super().get_eval_model(module=module, ema=ema)
        unwrapped = unwrap_model(resolved)
        return unwrapped.model if isinstance(unwrapped, SynerMixModule) else resolved

    def get_clip_parameters(self, exclude_head: bool = False) -> Any:
        """Parameters to clip, but for the last two of the model with exclude_head: the head's, as timm counts them."""
        module = unwrap_model(self.trainable_module)
        head = {id(parameter) for parameter in list(module.model.parameters())[-2:]} if exclude_head else set()
        return [parameter for parameter in module.trainable.parameters() if id(parameter) not in head]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """What a checkpoint holds besides the model: that of inter_task, the batches mixed so far, the feature bank."""
        state: dict[str, Any] = {}
        if self.inter_task is not None:
            state.update(self.inter_task.get_task_state(module=self._trainable(ema), ema=ema))
        if not ema:
            state['num_batches'] = self.num_batches
            if self.bank is not None:
                state['bank'] = self.bank.state_dict()
        return state

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Take over what a checkpoint has of the state."""
        if self.inter_task is not None:
            self.inter_task.load_task_state(state, strict=strict, module=self._trainable(ema), ema=ema)
        if ema or not state:
            return
        self.num_batches = state.get('num_batches', 0)
        if self.bank is not None and 'bank' in state:
            self.bank.load_state_dict(state['bank'], self.device)

    def _trainable(self, ema: bool) -> nn.Module:
        return unwrap_model(self.get_trainable_module(ema=ema)).trainable

    def create_evaluator(self, **kwargs: Any) -> Any:
        """The evaluator of inter_task, or of classification."""
        if self.inter_task is not None:
            return self.inter_task.create_evaluator(**kwargs)
        return super().create_evaluator(**kwargs)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Both losses of one batch.

        Args:
            input: `[N + A, C, H, W]`: N clean images, then an augmented view of the first A of them; A is N if every
                image takes part in both losses. With a fraction `[K + N, C, H, W]`: clean views of the first K. With S
                splits S augmented views each, the first split of all of them first. Or `[N, C, H, W]`: augmented images
                alone, then there is no intra-class part.
            target: Class indices, int64 `[N]`; of several labels float `[N, num_classes]`.

        Returns:
            'loss': the loss to minimise. 'output': logits of the augmented images, or with beta 1 of the synthesised
            features. 'intra_loss' and 'inter_loss', detached, for what was computed, and the parts of inter_task's.

        Raises:
            ValueError: input has fewer than N or more than 2 N rows, or with splits not N + S A.
        """
        return self._losses(self._draw(input, target))

    def parts(self, input: Tensor, target: Tensor) -> list[Callable[[], dict[str, Tensor]]]:
        """The two losses of `forward` as steps of their own, which take half of its memory.

            for part in task.parts(input, target):
                part()['loss'].backward()

        leaves the gradients of `task(input, target)['loss'].backward()`: a sum's gradient is the sum of the gradients,
        and the activations of the first part are gone before the second one has any. With DDP, average the gradients
        in the last part alone: run the others inside of `no_sync()`.

        Args:
            input, target: See `forward`.

        Returns:
            Functions to call in this order, once each, with the results of `forward` for their loss; 'loss' has its
            weight in it. There is one where there is one loss.

        Raises:
            ValueError: See `forward`.
        """
        draw = self._draw(input, target)
        if draw.clean is None or draw.augmented is None:
            return [partial(self._losses, draw)]
        return [partial(self._losses, part) for part in (draw._replace(augmented=None), draw._replace(clean=None))]

    def _draw(self, input: Tensor, target: Tensor) -> _Draw:
        """The views of a batch, mixed between classes, and how to mix the features within them."""
        num_clean = self.layout.num_clean(len(input), len(target))
        clean, augmented = input[:num_clean], input[num_clean:]
        beta = self.beta if self.synermix_enabled and num_clean else 0.0  # 0: L_inter alone
        with_clean = beta > 0.0

        clean_target = target[:num_clean]
        row, weight, row_target, bank, labels = target, target, target, None, None
        if with_clean and self.multi_label:
            labels = self._draw_label_mix(clean_target)
            row, weight, row_target = labels.row, labels.weight, labels.row_target
        elif with_clean:
            row, weight, row_target, bank = self._draw_mix(clean_target)
        splits = self.layout.splits
        inter_target = torch.cat([target[: len(augmented) // splits]] * splits) if num_clean else target
        if self.mixup_fn is not None and beta < 1.0:
            augmented, inter_target = self.mixup_fn(augmented, inter_target)
        return _Draw(
            clean if with_clean else None,
            augmented if beta < 1.0 else None,
            inter_target,
            row,
            weight,
            row_target,
            bank,
            beta,
            labels,
        )

    def _losses(self, draw: _Draw) -> dict[str, Tensor]:
        """The losses of the views that are there."""
        image = None if draw.labels is None else draw.labels.image
        outputs = self.trainable_module(draw.clean, draw.augmented, draw.row, draw.weight, draw.bank, image)
        return self._join(draw, *outputs)

    def _join(
        self,
        draw: _Draw,
        intra_logits: Tensor | None,
        inter_output: Any,
        features: tuple[Tensor, ...],
        criteria: tuple[Any, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of what the model made of them, by the criteria of both, or the task's."""
        intra_criterion, inter_criterion = criteria or (self.intra_criterion, self.criterion)
        if self.bank is not None and draw.clean is not None:
            self.bank.update(features, draw.row, draw.row_target)

        losses: dict[str, Tensor] = {}
        if self.bank is not None and draw.clean is not None:
            losses['bank_found'] = draw.weight.new_zeros(()) if draw.bank is None else draw.bank.found
        if intra_logits is not None and draw.labels is not None:
            losses['intra_loss'] = label_mean_loss(intra_criterion, intra_logits, draw.labels)
        elif intra_logits is not None and self.gather_rows:
            share, weight = share_weight(draw.row_target)
            losses['intra_loss'] = mean_over_ranks(weight * class_mean_loss(intra_criterion, intra_logits, share))
        elif intra_logits is not None:
            losses['intra_loss'] = class_mean_loss(intra_criterion, intra_logits, draw.row_target)
        output = intra_logits
        if inter_output is not None and self.inter_task is not None:
            self.inter_task.trainable_module.value = inter_output
            result = self.inter_task(draw.augmented, draw.inter_target)
            self.inter_task.trainable_module.value = None
            losses['inter_loss'], output = result.pop('loss'), result.pop('output')
            losses.update(result)
        elif inter_output is not None:
            losses['inter_loss'], output = inter_criterion(inter_output, draw.inter_target), inter_output
        intra_loss, inter_loss = losses.get('intra_loss', 0.0), losses.get('inter_loss', 0.0)
        return {
            'output': output,  # type: ignore[dict-item]  # there is one loss at least
            'loss': synermix_loss(intra_loss, inter_loss, draw.beta),
            **{name: loss.detach() for name, loss in losses.items()},
        }

    def _next_generator(self, device: torch.device) -> torch.Generator:
        """That of the weights of the next batch."""
        seed = seed_of('mix', self.seed, self.rank, self.num_batches)
        self.num_batches += 1
        return torch.Generator(device).manual_seed(seed)

    def _draw_label_mix(self, target: Tensor) -> LabelMix:
        """The mix of images with several labels, float `[N, num_classes]`."""
        generator = self._next_generator(target.device)
        return unmixed_labels(target) if self.mix == 'none' else draw_label_mix(target, self.num_mixed, generator)

    def _draw_mix(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor, BankMix | None]:
        """Row and weight of each image, class of each row, and partners from the bank."""
        generator = self._next_generator(target.device)
        if self.mix == 'none':
            row = torch.arange(len(target), device=target.device)
            return row, torch.ones_like(row, dtype=torch.float32), target, None
        if self.gather_rows:
            target = gather_rows(target, self.gather_rows, fill=IGNORE_INDEX)  # padding: a class of its own, ignored
        row, row_target = class_rows(target)
        weight = row_weight(row, num_mixed=self.num_mixed, generator=generator)
        bank = None
        if self.bank is not None and self.num_mixed != 1:
            bank = self.bank.draw(row, row_target, generator)
        return row, weight, row_target, bank


def _create_bank(hook: FeatureHook) -> FeatureBank:
    leaf: Any = hook.model.get_submodule(hook.leaf_names[0])
    return FeatureBank(len(leaf.weight), hook.feature_dim)


def _check_recipe(inter_task: TrainingTask | None, mixup_fn: Mixer | None, splits: int, one_label: bool) -> None:
    if one_label:
        raise ValueError('bank and gather_rows need images of one label, got a task of several.')
    if inter_task is not None and hasattr(mixup_fn, 'mixing'):
        raise ValueError('inter_task needs a mixup_fn of images: it gets the images to see.')
    if mixup_fn is not None and splits > 1:
        raise ValueError(f'splits must be 1 with mixup_fn, which would mix each split otherwise, got {splits}.')


def loss_parts(task: Any, input: Tensor, target: Tensor) -> list[Callable[[], dict[str, Tensor]]]:
    """The losses of a batch as steps of their own: a task's `parts` if it has them, or timm's one loss."""
    parts = getattr(task, 'parts', None)
    return [partial(task, input, target)] if parts is None else parts(input, target)
