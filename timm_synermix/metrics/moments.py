"""Sums of features by class, of which the cohesion metrics are made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from timm_synermix.metrics.class_distances import ClassDistances, class_distances
from timm_synermix.utils.distributed import add_up

ROUNDING = 1e-13  # relative error that float64 sums are given; float32 features differ by 1e-7 or not at all
_BLOCK = 2**20  # numbers at a time, 8 MB


class _Sums(NamedTuple):
    """Of each class the images `[C]`, and the sums of features `[C, D]`, of squared norms `[C]` and of directions
    `[C, D]`; of all images that of outer products `[D, D]`, or nothing. Float64."""

    images: Tensor
    sum: Tensor
    square: Tensor
    direction: Tensor
    product: Tensor


class ClassMoments:
    """Sums of features by class, which any number of metrics share.

    Two float64 tensors `[C, D]`, made when the first features come; computing takes a third one for a while. What the
    metrics are made of is kept from one to the next, in `O(C)`.

    Args:
        num_classes: Number of classes C.
        feature_dim: Length D of a feature.
        product: Also add up outer products, `O(D^2)` memory, see `NC1`.
    """

    def __init__(self, num_classes: int, feature_dim: int, product: bool = False) -> None:
        self.num_classes, self.feature_dim = num_classes, feature_dim
        self.product = product
        self.device = torch.device('cpu')
        self.reset()

    @staticmethod
    def memory(num_classes: int, feature_dim: int) -> int:
        """Bytes that it takes at most, with the product, while metrics are computed."""
        c, d = num_classes, feature_dim
        return 8 * (3 * c * d + 6 * d**2 + 16 * c + 8 * _BLOCK)

    def reset(self) -> None:
        """Forget all features."""
        self._made: _Sums | None = None
        self._of_all = False  # the sums are those of all processes
        self._kept: dict[str, Any] = {}

    def to(self, device: torch.device) -> None:
        """Go to a device, and accumulate there."""
        self.device = device
        if self._made is not None:
            self._made = _Sums(*(tensor.to(device) for tensor in self._made))
        self._kept = {}

    @property
    def sums(self) -> _Sums:
        """The sums so far."""
        if self._made is None:
            c, d = self.num_classes, self.feature_dim
            p = d if self.product else 0
            shapes = [(c,), (c, d), (c,), (c, d), (p, p)]
            self._made = _Sums(*(torch.zeros(shape, dtype=torch.float64, device=self.device) for shape in shapes))
        return self._made

    @torch.no_grad()
    def update(self, feature: Tensor, target: Tensor) -> None:
        """Add features `[N, D]`, any floating dtype, and their classes, int64 `[N]` in `[0, num_classes)`."""
        self._begin()
        feature, target = feature.to(self.device, torch.float64), target.to(self.device)
        sums, square = self.sums, feature.square().sum(1)
        sums.images.index_add_(0, target, torch.ones_like(square))
        sums.sum.index_add_(0, target, feature)
        sums.square.index_add_(0, target, square)
        norm = square.sqrt().clamp(min=torch.finfo(torch.float64).tiny)  # a zero feature has no direction
        sums.direction.index_add_(0, target, feature / norm[:, None])
        if self.product and len(target):
            self._add_product(sums.product, feature, target)

    def _add_product(self, product: Tensor, feature: Tensor, target: Tensor) -> None:
        # f = (f - m) + m with the batch's own class means m: few, and in float64, as near collapse little is left when
        # they are taken away. What remains is small; on a CPU its product in float32 costs half.
        classes, row, count = target.unique(return_inverse=True, return_counts=True)
        mean = feature.new_zeros(len(classes), self.feature_dim).index_add_(0, row, feature) / count[:, None]
        rest = (feature - mean[row]).to(torch.float32 if feature.device.type == 'cpu' else torch.float64)
        mean *= count.double().sqrt()[:, None]
        product.addmm_(mean.T, mean)
        product += rest.T @ rest

    def _begin(self) -> None:
        """Before features are added: totals of all processes count as those of the first one."""
        self._kept = {}
        if self._of_all and dist.get_rank() > 0:
            for tensor in self.sums:
                tensor.zero_()
        self._of_all = False

    @torch.no_grad()
    def reduce(self, group: Any = None) -> None:
        """Add up over processes, in place; every process must call it. More features may be added afterwards."""
        new = torch.tensor([float(not self._of_all)], device=self.device)
        add_up(new, group)
        if new.item():
            self._begin()
            for tensor in self.sums:
                add_up(tensor, group)
            self._of_all = True

    @property
    def present(self) -> Tensor:
        """The K classes that have images, int64 `[K]`."""
        return self.sums.images.nonzero()[:, 0]

    @property
    def count(self) -> Tensor:
        """Their images, float64 `[K]`."""
        return self.sums.images[self.present]

    def mean(self, classes: Tensor) -> Tensor:
        """The mean features of some classes, float64 `[len(classes), D]`."""
        return self.sums.sum[classes].div_(self.sums.images[classes][:, None])

    def mean_blocks(self, size: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The classes present, and their means, a few at a time or size."""
        for classes in self.present.split(size or max(1, _BLOCK // self.feature_dim)):
            yield classes, self.mean(classes)

    def variance(self) -> Tensor:
        """Mean squared distance of the features of a class to its mean, `[K]`."""
        return self._once('variance', self._variance)

    def _variance(self) -> Tensor:
        size = self.sums.square[self.present] / self.count
        square = [mean.square().sum(1) for _, mean in self.mean_blocks()]
        variance = size - torch.cat([size.new_empty(0), *square])
        # The difference of two nearly equal sums: what rounding may have left is nothing.
        return torch.where(variance <= ROUNDING * size, 0.0, variance)

    def scatters(self) -> tuple[Tensor, Tensor]:
        """Traces of the scatter within and between classes: sums of squared distances, over images."""
        count, center, between = (
            self.count,
            self.sums.sum.sum(0) / self.sums.images.sum(),
            self.sums.images.new_zeros(()),
        )
        for classes, mean in self.mean_blocks():
            size = mean.square().sum(1)
            apart = (mean - center).square().sum(1)
            apart = torch.where(apart <= ROUNDING**2 * size, 0.0, apart)
            between = between + (self.sums.images[classes] * apart).sum()
        return (count * self.variance()).sum(), between

    def cosine(self) -> Tensor:
        """Sum of the cosines of the features of a class to its direction, `[K]`."""
        return torch.linalg.vector_norm(self.sums.direction, dim=1)[self.present]

    def distances(self) -> ClassDistances:
        """What the metrics need of the distances between class means; computed once, it takes the longest."""
        return self._once('distances', self._distances)

    def _distances(self) -> ClassDistances:
        present = self.present
        mean = self.mean(present)
        rounding = ROUNDING * torch.linalg.vector_norm(mean, dim=1).nan_to_num(posinf=0).amax() if len(mean) else 0.0
        return class_distances(mean, self.variance(), rounding)

    def _once(self, name: str, compute: Any) -> Any:
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]
