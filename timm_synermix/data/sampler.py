"""The class-supplementing batch sampler: SynerMix step 1, on indices alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from timm_synermix.data.draws import Views
from timm_synermix.data.fixed_batches import fixed_batches, repeated_batches
from timm_synermix.data.labels import LabelSets
from timm_synermix.utils.checks import BATCH_SIZE, check_fixed, check_fraction
from timm_synermix.utils.layout import num_clean_classes
from timm_synermix.utils.random import seed_of

_COUNTED = 50  # batches, to tell what they cost


class BatchCost(NamedTuple):
    """What the batches of an epoch cost.

    Attributes:
        size: Images of a batch, before partners.
        partners: Images of a batch that come on top.
        clean, augmented: Views of a batch.
        prior: Largest factor by which partners raise the share of a class in what is seen, at least 1.
    """

    size: float
    partners: float
    clean: float
    augmented: float
    prior: float

    def step(self, beta: float, rows: int = 1) -> float:
        """Images sent through the model, as a multiple of those of a plain step.

        Args:
            beta: Weight of the intra-class loss: at 0 there is no clean forward, at 1 no augmented one.
            rows: Images that the recipe makes of one view: splits, or two of RegMixup.
        """
        return (self.clean * (beta > 0) / rows + self.augmented * (beta < 1)) / self.size


class SupplementBatchSampler(Sampler[list[Any]]):
    """Cut an index sampler's epoch into batches and give every lone class of a batch a second image.

    SynerMix interpolates the images of a class, so a class needs two different images in a batch. For a class with one,
    another of its images is drawn at random from the whole data set. Every index of the wrapped sampler is in exactly
    one batch; partners come on top.

    - The batches of an epoch are a pure function of (wrapped sampler's order, seed, epoch, rank), computed afresh for
      each epoch; nothing is carried over. The epoch is the wrapped sampler's, so one `set_epoch` moves both.
    - The last batch is not dropped and not left small: the epoch is cut into `ceil(n / batch_size)` nearly equal
      batches, of even size as far as possible: with an odd batch_size some have one image more.
    - timm's Mixup pairs a batch with its flip. So the batch size is made even, by one more image of a class that is
      there, and the order inside a batch is random.
    - A class with a single image in the whole data set stays alone: it mixes with itself, that is, not at all.
    - With fixed, partners are images of the same epoch, and none come on top: the images of each class are paired at
      random, an odd one joins a pair, and the pairs are shuffled and dealt to the batches, of all ranks. Each index is
      in one batch, but for what even batches force (see `fixed_batches`), sizes differ by 2 at most, and every class
      has its share of the data in every batch: unlike partners on top, these do not change how often a class is seen.
      What changes is that a batch has fewer different classes, at most half as many as images.

    Args:
        sampler: Yields the indices of an epoch in random order; has a length, an `epoch` and `set_epoch`, as
            `torch.utils.data.DistributedSampler` and timm's `RepeatAugSampler`.
        targets: The class of every image of the data set, non-negative int `[len(dataset)]`; or the several labels of
            each, then partners are those of `LabelSets.partners_for`, and fixed is not possible.
        batch_size: Images per batch, before partners; at least 2.
        supplement: Draw partners. False keeps lone classes as they are; the batch size is made even all the same.
        clean_only: Yield partners last in their batch, as `Views` that ask the data set for the clean view alone.
        fixed: Batches of one size, see above.
        fraction: Below 1, so many of the images of a batch have a clean view: two of each of the classes that are drawn
            at random from those present, two classes at least. Lone ones among these alone get a partner. They come
            first in their batch; the others are `Views` that ask for the augmented view alone.
        seed: Seed of the partners and of the order inside a batch, at least 0.
        rank: Distributed rank, so that ranks draw different partners.
        world_size: Ranks that the indices are dealt to here; 1 if sampler yields this rank's own.

    Raises:
        ValueError: batch_size is below 2, fraction is not above 0 and at most 1, or the sampler is empty; fixed comes
            with clean_only or with several labels, or a fraction with either.

    Source: SynerMix step 1 (arXiv 2403.14137). The authors' code redraws until it finds a different image, which never
    ends for a class with one.
    """

    def __init__(
        self,
        sampler: Any,
        targets: Sequence[int] | np.ndarray | LabelSets,
        batch_size: int,
        *,
        supplement: bool = True,
        clean_only: bool = False,
        fixed: bool = False,
        fraction: float = 1.0,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        BATCH_SIZE.check('batch_size', batch_size)
        if len(sampler) == 0:
            raise ValueError('sampler must have at least one index, got an empty one.')
        check_fixed(fixed, clean_only)
        check_fraction(fraction, clean_only, isinstance(targets, LabelSets))
        self.sampler = sampler
        self.batch_size = batch_size
        self.supplement = supplement
        self.clean_only = clean_only
        self.fixed = fixed
        self.fraction = fraction
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.labels = targets if isinstance(targets, LabelSets) else None
        if isinstance(targets, LabelSets):
            if fixed:
                raise ValueError('fixed must be False with several labels per image, got True.')
            return
        targets = np.asarray(targets)
        self.targets = targets.astype(np.min_scalar_type(targets.max()))  # numpy sorts 8 and 16 bits in linear time
        # All images ordered by class: those of class c are members[first[c]:first[c] + size[c]].
        self._members = np.argsort(self.targets, kind='stable').astype(np.int32)
        self._size = np.bincount(self.targets)
        self._first = np.cumsum(self._size) - self._size
        self._place = np.empty_like(self._members)  # where each image stands in members
        self._place[self._members] = np.arange(len(self._members))

    @property
    def epoch(self) -> int:
        return self.sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch that the next iteration yields."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-self._length // self.batch_size)

    @property
    def _length(self) -> int:
        """Indices of this rank."""
        return -(-len(self.sampler) // self.world_size)

    def __iter__(self) -> Iterator[list[Any]]:
        generator = np.random.default_rng([self.seed, self.epoch, self.rank])
        indices = np.fromiter(self.sampler, dtype=np.int32, count=len(self.sampler))
        if self.fixed and self.supplement:
            batches = self._fixed_batches(indices, generator)
        else:
            if self.world_size > 1:
                indices = np.resize(indices, self._length * self.world_size)[self.rank :: self.world_size]
            batches = self._batches(indices, generator)
        for batch in batches:
            yield self._items(batch, generator)

    def _items(self, batch: list[Any], generator: np.random.Generator) -> list[Any]:
        """A batch with the views that are wanted."""
        return batch if self.fraction == 1 else self._sliced(np.array(batch), generator)

    def _batches(self, indices: np.ndarray, generator: np.random.Generator) -> Iterator[list[Any]]:
        pairs = len(indices) // 2
        cuts = [2 * -(-k * pairs // len(self)) for k in range(1, len(self))]
        for batch in np.split(indices, cuts):
            yield self._completed(batch, generator)

    def _completed(self, batch: np.ndarray, generator: np.random.Generator) -> list[Any]:
        """A batch of the epoch with its partners, in random order."""
        supplement = self.supplement and self.fraction == 1
        partners = self._partners_for(batch, generator) if supplement else batch[:0]
        clean_only = [Views(index, augmented=False) for index in partners.tolist()] if self.clean_only else []
        if not self.clean_only:
            batch = np.concatenate([batch, partners])
        if len(batch) % 2:
            batch = np.append(batch, self._one_more(batch, generator))
        return [*generator.permutation(batch).tolist(), *clean_only]

    def _sliced(self, batch: np.ndarray, generator: np.random.Generator) -> list[Any]:
        """A batch of which two images of each of some classes have a clean view; a partner comes on top."""
        images = generator.permutation(np.unique(batch))  # a repeated image is no partner of itself
        images = images[np.argsort(self.targets[images], kind='stable')]
        _, first, count = np.unique(self.targets[images], return_index=True, return_counts=True)
        drawn = generator.permutation(len(first))[: num_clean_classes(self.fraction, len(batch))]
        first, count = first[drawn], count[drawn]
        paired = np.stack([images[first], images[first + 1 - (count == 1)]], axis=1)
        lone = paired[count == 1, 0]
        partners = self._partners_of(lone, generator) if self.supplement else lone
        partners = partners[partners != lone]
        own = np.concatenate([paired[:, 0], paired[count > 1, 1]])
        position = {image: place for place, image in enumerate(batch.tolist())}
        others = np.delete(batch, [position[image] for image in own.tolist()])
        if (len(batch) + len(partners)) % 2:
            others = np.append(others, self._one_more(batch, generator))
        clean = generator.permutation(np.concatenate([own, partners]))
        return [*clean.tolist(), *[Views(index, clean=False) for index in generator.permutation(others).tolist()]]

    def _fixed_batches(self, indices: np.ndarray, generator: np.random.Generator) -> Iterator[list[int]]:
        ranks, count = self.world_size, len(self)
        shared = np.random.default_rng(seed_of('fixed', self.seed, self.epoch))  # all ranks see the same epoch
        common: Any = dict(targets=self.targets, generator=shared)
        common['partners_of'] = partial(self._partners_of, generator=shared)
        if np.bincount(indices).max() > 1:
            rank = self.rank if ranks > 1 else 0
            images, size = repeated_batches(indices, num_batches=count, rank=rank, world_size=ranks, **common)
            first = np.cumsum(size) - size
        else:
            limit = self.batch_size + self.batch_size % 2
            images, size = fixed_batches(indices, num_batches=count * ranks, limit=limit, **common)
            own = slice(self.rank if ranks > 1 else 0, None, ranks)
            first, size = (np.cumsum(size) - size)[own], size[own]
        for begin, length in zip(first.tolist(), size.tolist(), strict=True):
            yield generator.permutation(images[begin : begin + length]).tolist()

    def _partners_for(self, batch: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The partners that a batch needs."""
        if self.labels is not None:
            return self.labels.partners_for(batch, generator)
        return self._partners_of(self._lone_images(batch), generator)

    def _lone_images(self, batch: np.ndarray) -> np.ndarray:
        """Images without another image of their class in the batch, though the data set has one."""
        images = np.unique(batch)  # a repeated image is no partner of itself
        _, class_of, count = np.unique(self.targets[images], return_inverse=True, return_counts=True)
        return images[(count[class_of] == 1) & (self._size[self.targets[images]] > 1)]

    def _partners_of(self, images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """A uniformly drawn other image of the same class, for each image; itself where there is no other."""
        if self.labels is not None:
            return self.labels.partners_of(images, generator)
        first, size = self._first[self.targets[images]], self._size[self.targets[images]]
        step = generator.integers(1, np.maximum(size, 2))  # 1 to size - 1 places further on in the class, round its end
        return self._members[first + (self._place[images] - first + step) % size]

    def _one_more(self, batch: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Another image of a class of a batch, `[1]`, which makes its size even."""
        return self._partners_of(generator.choice(batch, 1), generator)

    def cost(self) -> BatchCost:
        """What the batches of this rank cost, counted in the first ones of the epoch."""
        plain = self._length / len(self)
        batches = list(islice(self, _COUNTED))
        views = [item if isinstance(item, Views) else Views(item) for batch in batches for item in batch]
        clean, augmented = (
            sum(kind) / len(batches) for kind in zip(*((v.clean, v.augmented) for v in views), strict=True)
        )
        extra = max(0.0, len(views) / len(batches) - plain)  # the first batches may be the smaller ones
        if not self.supplement or self.fixed or self.clean_only or self.labels is not None:
            return BatchCost(plain, extra, clean, augmented, 1.0)
        # A class of the share p has B p images, and D p (1 - p)^(D - 1) partners for D different images in a batch.
        batch = list(islice(self.sampler, round(plain) * self.world_size))[:: self.world_size]
        different = len(set(batch))
        rarest = self._size[self._size > 1].min(initial=len(self.targets)) / len(self.targets)
        partners = different / len(batch) * (1 - rarest) ** (different - 1)
        if self.fraction < 1:  # of the classes that are drawn alone
            partners *= min(1.0, num_clean_classes(self.fraction, len(batch)) / len(np.unique(self.targets[batch])))
        return BatchCost(plain, extra, clean, augmented, max(1.0, (1 + partners) / (1 + extra / plain)))
