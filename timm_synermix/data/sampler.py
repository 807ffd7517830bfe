"""The class-supplementing batch sampler: SynerMix step 1, on indices alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from timm_synermix.data.draws import Views
from timm_synermix.utils.checks import BATCH_SIZE, INTERVAL, check_fixed


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
    - With fixed, each of the `ceil(n / batch_size)` batches has exactly batch_size images, partners included. A partner
      is brought forward from later in the epoch while it has one, so that an epoch still shows nearly every index
      once, and costs no more than without partners.

    Args:
        sampler: Yields this rank's indices for an epoch; has a length, an `epoch` and `set_epoch`, as
            `torch.utils.data.DistributedSampler` and timm's `RepeatAugSampler`.
        targets: The class of every image of the data set, non-negative int `[len(dataset)]`.
        batch_size: Images per batch, before partners; at least 2.
        supplement: Draw partners. False keeps lone classes as they are; the batch size is made even all the same.
        clean_only: Yield partners last in their batch, as `Views` that ask the data set for the clean view alone.
        fixed: Batches of one size, see above.
        interval: Draw partners in every interval-th update alone, and yield the others' images as `Views` that ask for
            the augmented view alone. Updates are counted over all epochs.
        batches_per_update: Batches whose gradients are accumulated for an update.
        seed: Seed of the partners and of the order inside a batch, at least 0.
        rank: Distributed rank, so that ranks draw different partners.

    Raises:
        ValueError: batch_size is below 2, interval or batches_per_update below 1, the sampler is empty, or fixed and
            clean_only are used together.

    Source: SynerMix step 1 (arXiv 2403.14137). The authors' code redraws until it finds a different image, which never
    ends for a class with one.
    """

    def __init__(
        self,
        sampler: Any,
        targets: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        supplement: bool = True,
        clean_only: bool = False,
        fixed: bool = False,
        interval: int = 1,
        batches_per_update: int = 1,
        seed: int = 42,
        rank: int = 0,
    ) -> None:
        BATCH_SIZE.check('batch_size', batch_size)
        INTERVAL.check('interval', interval)
        INTERVAL.check('batches_per_update', batches_per_update)
        if len(sampler) == 0:
            raise ValueError('sampler must have at least one index, got an empty one.')
        check_fixed(fixed, clean_only)
        self.sampler = sampler
        self.batch_size = batch_size
        self.supplement = supplement
        self.clean_only = clean_only
        self.fixed = fixed
        self.interval = interval
        self.batches_per_update = batches_per_update
        self.seed = seed
        self.rank = rank
        self.targets = np.asarray(targets, dtype=np.int64)
        # All images ordered by class: those of class c are members[first[c]:first[c] + size[c]].
        self._members = np.argsort(self.targets, kind='stable')
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
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[list[Any]]:
        generator = np.random.default_rng([self.seed, self.epoch, self.rank])
        indices = np.fromiter(self.sampler, dtype=np.int64, count=len(self.sampler))
        batches = self._fixed_batches(indices, generator) if self.fixed else self._batches(indices, generator)
        for number, batch in enumerate(batches):
            yield batch if self._has_clean_views(number) else [Views(index, clean=False) for index in batch]

    def _has_clean_views(self, number: int) -> bool:
        """Whether a batch of the epoch is of an update with an intra-class loss."""
        updates_per_epoch = -(-len(self) // self.batches_per_update)
        return (self.epoch * updates_per_epoch + number // self.batches_per_update) % self.interval == 0

    def _batches(self, indices: np.ndarray, generator: np.random.Generator) -> Iterator[list[Any]]:
        pairs = len(indices) // 2
        cuts = [2 * -(-k * pairs // len(self)) for k in range(1, len(self))]
        for number, batch in enumerate(np.split(indices, cuts)):
            supplement = self.supplement and self._has_clean_views(number)
            partners = self._partners_of(self._lone_images(batch), generator) if supplement else batch[:0]
            clean_only = [Views(index, augmented=False) for index in partners.tolist()] if self.clean_only else []
            if not self.clean_only:
                batch = np.concatenate([batch, partners])
            if len(batch) % 2:
                batch = np.append(batch, self._partners_of(generator.choice(batch, 1), generator))
            yield [*generator.permutation(batch).tolist(), *clean_only]

    def _fixed_batches(self, indices: np.ndarray, generator: np.random.Generator) -> Iterator[list[int]]:
        """Batches of exactly batch_size: as many of the next images as leave room for their partners, and these."""
        size, targets = self._size.tolist(), self.targets.tolist()
        filler = np.resize(generator.permutation(indices), len(self) * self.batch_size - len(indices))
        rest = OrderedDict(enumerate([*indices.tolist(), *filler.tolist()]))  # place in the epoch -> image
        places: dict[int, list[int]] = {}  # of each class; some are no longer in rest
        for place, index in rest.items():
            places.setdefault(targets[index], []).append(place)

        def bring_forward(index: int) -> int:
            """Another image of the class, the last one of the epoch, or any one if none is left."""
            candidates = places[targets[index]]
            while candidates and candidates[-1] not in rest:
                candidates.pop()
            if candidates and rest[candidates[-1]] != index:
                return rest.pop(candidates[-1])
            return int(self._partners_of(np.array([index]), generator)[0])

        for number in range(len(self)):
            supplement = self.supplement and self._has_clean_views(number)
            batch: list[int] = []
            lone: dict[int, int] = {}  # the image of each class that needs a partner
            complete = set()  # the classes that need none
            while rest:
                place, index = next(iter(rest.items()))
                c = targets[index]
                needs_partner = supplement and c not in complete and size[c] > 1
                partner = needs_partner and c in lone and lone[c] != index
                new_class = needs_partner and c not in lone
                if len(batch) + 1 + len(lone) + new_class - partner > self.batch_size:
                    break
                batch.append(rest.pop(place))
                if new_class:
                    lone[c] = index
                if partner:
                    del lone[c]
                    complete.add(c)
            batch += [bring_forward(index) for index in lone.values()]
            while len(batch) < self.batch_size:  # one place is left, and the next image needs two
                batch.append(bring_forward(batch[generator.integers(len(batch))]))
            yield generator.permutation(batch).tolist()

    def _lone_images(self, batch: np.ndarray) -> np.ndarray:
        """Images without another image of their class in the batch, though the data set has one."""
        images = np.unique(batch)  # a repeated image is no partner of itself
        _, class_of, count = np.unique(self.targets[images], return_inverse=True, return_counts=True)
        return images[(count[class_of] == 1) & (self._size[self.targets[images]] > 1)]

    def _partners_of(self, images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """A uniformly drawn other image of the same class, for each image; itself where there is no other."""
        first, size = self._first[self.targets[images]], self._size[self.targets[images]]
        step = generator.integers(1, np.maximum(size, 2))  # 1 to size - 1 places further on in the class, round its end
        return self._members[first + (self._place[images] - first + step) % size]

    def expected_supplements(self) -> float:
        """Expected number of images beyond batch_size B: `sum_c B p_c (1 - p_c)^(B - 1)`, if all B are different.

        Of the batches that have clean views, if interval leaves some without.
        """
        if not self.supplement or self.fixed:
            return 0.0
        size = self._size[self._size > 1]
        share = size / len(self.targets)
        return float((self.batch_size * share * (1 - share) ** (self.batch_size - 1)).sum())
