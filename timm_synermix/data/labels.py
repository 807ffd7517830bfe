"""Data sets whose images have several labels each: which image bears which, and second images for lone labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Subset

from timm_synermix.data.classes import read_labels


class LabelSets:
    """The labels of every image of a data set.

    Args:
        labels: The classes that each image bears, each once; an image may bear none.
    """

    def __init__(self, labels: Iterable[Sequence[int] | np.ndarray]) -> None:
        sets = [np.asarray(each, dtype=np.int64) for each in labels]
        count = np.array([len(each) for each in sets], dtype=np.int64)
        # Pairs of an image and a label: those of image i are start[i]:start[i + 1].
        self._start = np.concatenate([[0], np.cumsum(count)])
        self._label = np.concatenate([*sets, np.empty(0, np.int64)])
        # The images that bear a label: those of c are members[first[c]:first[c] + size[c]].
        order = np.argsort(self._label, kind='stable')
        self._members = np.repeat(np.arange(len(sets)), count)[order]
        self._size = np.bincount(self._label)
        self._first = np.cumsum(self._size) - self._size
        self._place = np.empty_like(order)  # where each pair stands in members
        self._place[order] = np.arange(len(order))

    def __len__(self) -> int:
        return len(self._start) - 1

    def __getitem__(self, image: int) -> np.ndarray:
        """The labels of an image."""
        return self._label[self._start[image] : self._start[image + 1]]

    def partners_for(self, batch: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Second images for the labels that one image of a batch bears, at most as many as the batch has images.

        For each such label another image that bears it, uniformly drawn; an image drawn for one label serves all that
        it bears. With one label per image these are the partners, and the draws, of `SupplementBatchSampler`.
        """
        images = np.unique(batch)  # a repeated image is no partner of itself
        pairs = np.concatenate([np.arange(self._start[i], self._start[i + 1]) for i in images])
        label = self._label[pairs]
        _, label_of, count = np.unique(label, return_inverse=True, return_counts=True)
        lone = pairs[(count[label_of] == 1) & (self._size[label] > 1)]
        served: set[int] = set()
        partners: list[int] = []
        for c, image in zip(self._label[lone].tolist(), self._others(lone, generator).tolist(), strict=True):
            if c not in served:
                partners.append(image)
                served.update(self[image].tolist())
        return np.array(partners[: len(batch)], dtype=batch.dtype)

    def partners_of(self, images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Another image with one of its labels, for each image; itself where it has none, or no other has it."""
        partners = images.copy()
        for k, image in enumerate(images):
            first, end = self._start[image], self._start[image + 1]
            if end > first:
                partners[k] = self._others(generator.integers(first, end, 1), generator)[0]
        return partners

    def _others(self, pairs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """A uniformly drawn other image with the label of each pair."""
        first, size = self._first[self._label[pairs]], self._size[self._label[pairs]]
        step = generator.integers(1, np.maximum(size, 2))
        return self._members[first + (self._place[pairs] - first + step) % size]


def dataset_labels(dataset: Any) -> LabelSets | None:
    """The labels of every image of a data set with several each, without opening an image; None if it cannot tell."""
    sets = _label_sets(dataset)
    return None if sets is None else LabelSets(sets)


def _label_sets(dataset: Any) -> list[np.ndarray] | None:
    if isinstance(dataset, Subset):
        sets = _label_sets(dataset.dataset)
        return None if sets is None else [sets[i] for i in dataset.indices]
    labels = read_labels(dataset)
    transform = getattr(dataset, 'target_transform', None)
    if labels is None or transform is None:
        return None
    return [np.flatnonzero(np.asarray(transform(label))) for label in labels]
