"""The cohesion of a script's evaluations, measured in their own forward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from timm.task import evaluation_sample_limit
from torch import Tensor, nn

from timm_synermix.features import FeatureHook, pool_feature
from timm_synermix.launch.script import LaunchError
from timm_synermix.utils.wrapped import WrappedLoader

_logger = logging.getLogger(__name__)


class Evaluation:
    """Collects the features of each pass over an evaluation loader.

    Attributes:
        metrics: The cohesion metrics of the last pass, by name.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.active = False  # a pass is going on
        self.feature: Tensor | None = None  # of the batch, [N, D]
        self._num_classes, self._feature_dim = 1, 1
        self._told = ''  # of where the metrics are computed

    def watch(self, model: nn.Module, classifier: list[str] | None) -> None:
        """Let a model, and its copies, be asked for features, before it is compiled; for classifier see FeatureHook."""
        hook = FeatureHook(model, classifier)
        leaf: Any = model.get_submodule(hook.leaf_names[0])
        self._num_classes = max(self._num_classes, len(leaf.weight))
        self._feature_dim = hook.feature_dim
        watched: Any = model
        watched.synermix_hook = hook

    def forward(self, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The answer of a watched model in evaluation mode; notes the features."""
        if not self.active:
            return forward(*args, **kwargs)
        logits, feature = module.synermix_hook(args[0], model=forward)
        if not isinstance(feature, tuple) or feature:
            self.feature = pool_feature(feature)
        return logits

    def _tell(self, reason: str) -> None:
        if reason != self._told and _is_first_process():
            _logger.warning(reason)
        self._told = reason

    def loader(self, loader: Any) -> EvaluationLoader:
        """An evaluation loader whose passes are measured."""
        return EvaluationLoader(self, loader)

    def measure(self, loader: Any) -> Iterator[Any]:
        """A pass over a loader; every process must make it.

        Raises:
            LaunchError: A batch did not reach a model of timm's create_model.
        """
        from timm_synermix.metrics import CohesionMeter, cohesion_place  # slow to import

        place = cohesion_place(self._num_classes, self._feature_dim, 'cpu')
        self._tell(place.reason)
        if place.device is None:
            yield from loader
            return
        limit, seen = evaluation_sample_limit(loader), 0
        meter = None
        self.active = True
        try:
            for batch in loader:
                self.feature = None
                yield batch
                feature: Tensor | None = self.feature
                target = batch[1]
                if feature is None or len(feature) != len(target):
                    raise LaunchError(
                        '--cohesion: the images of the evaluation did not reach the classifier of a model that '
                        "timm's create_model made"
                    )
                if meter is None:
                    meter = CohesionMeter(self._num_classes, place.device if place.reason else feature.device)
                count = len(target) if limit is None else max(0, min(len(target), limit - seen))
                seen += len(target)
                meter.update(feature[:count], target[:count])
        finally:
            self.active, self.feature = False, None
        if meter is None:
            meter = CohesionMeter(self._num_classes)
        self.metrics = meter.compute().metrics
        if _is_first_process():
            _logger.info('Cohesion: ' + '  '.join(f'{name}: {value:.4g}' for name, value in self.metrics.items()))


def _is_first_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


class EvaluationLoader(WrappedLoader):
    """A loader whose passes are measured; in all else the loader itself."""

    def __init__(self, evaluation: Evaluation, loader: Any) -> None:
        super().__init__(loader)
        self._evaluation = evaluation

    def __iter__(self) -> Iterator[Any]:
        return self._evaluation.measure(self._loader)
