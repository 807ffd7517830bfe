"""Batches of one size in which every class has two images: the layout of a whole epoch, by numpy alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

PartnersOf = Callable[[np.ndarray], np.ndarray]


def fixed_batches(
    images: np.ndarray,
    targets: np.ndarray,
    num_batches: int,
    limit: int,
    partners_of: PartnersOf,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Lay an epoch out in batches of even sizes, which differ by 2 at most, with two images of each of their classes.

    The images of each class are paired at random, and the pairs, in random order, are dealt to the batches; so are
    couples of triples, where a third image joins a pair. The batches come in random order: the expected number of
    images of a class is the same in each.

    Every image is in one batch, but for what even batches force: see `plan`. An image that is the only one of its class
    here, though the data set has others, is in one with a partner or in none, by chance.

    Args:
        images: Different images in random order, `[n]`.
        targets: The class of every image of the data set.
        num_batches: Batches of the epoch.
        limit: Images of a batch at most, even; `num_batches * limit >= n`.
        partners_of: Another image of the class of each, drawn at random; itself where there is no other.
        generator: Of what is drawn here.

    Returns:
        The images, batch by batch, and the size of each batch `[num_batches]`.
    """
    groups = group(images, targets, partners_of, generator)
    num_pairs, num_triples, num_alone = map(len, groups)
    layout = plan(num_pairs, num_triples, num_alone, num_batches, limit)
    pairs, couples, four = take_apart(*groups, layout.dropped, layout.split, partners_of, generator)
    pairs = np.resize(pairs, (layout.pairs.sum(), 2))  # more only where there are too few images for the batches

    size = np.empty_like(layout.half)
    place = generator.permutation(num_batches)  # of each batch of the plan
    size[place] = 2 * layout.half
    at = (np.cumsum(size) - size)[place]  # where it begins
    result = np.empty(size.sum(), images.dtype)
    turn, batch = np.divmod(np.arange(len(couples) + len(four)), num_batches)
    begin = at[batch] + 6 * turn
    _put(result, begin[: len(couples)], couples)
    _put(result, begin[len(couples) :], four)
    begin = at + 2 * (layout.half - layout.pairs)
    before = np.cumsum(layout.pairs) - layout.pairs
    _put(result, np.repeat(begin - 2 * before, layout.pairs) + 2 * np.arange(len(pairs)), pairs)
    return result, size


def _put(result: np.ndarray, places: np.ndarray, rows: np.ndarray) -> None:
    for column in range(rows.shape[1]):
        result[places + column] = rows[:, column]


def repeated_batches(
    images: np.ndarray,
    targets: np.ndarray,
    num_batches: int,
    rank: int,
    world_size: int,
    partners_of: PartnersOf,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """The same for one rank of an epoch in which images come several times in a row, as of repeated augmentation.

    A pair comes as often, and as timm does with images, the copies of a pair go to different ranks, or into one batch.

    Args:
        images: In random order, copies one after the other, `[n]`.
        num_batches: Batches of a rank.
        rank, world_size: The rank, and how many there are.
        targets, partners_of, generator: See `fixed_batches`.
    """
    _, first = np.unique(images, return_index=True)
    groups = group(images[np.sort(first)], targets, partners_of, generator)
    pairs, *_ = take_apart(*groups, *_all_apart(len(groups[1])), partners_of, generator)
    count = -(-len(images) // (2 * world_size))
    copies = pairs[np.arange(count * world_size) * len(pairs) // (count * world_size)]
    return copies[rank::world_size].ravel(), 2 * _deal(count, num_batches)


def group(
    images: np.ndarray, targets: np.ndarray, partners_of: PartnersOf, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs `[P, 2]`, triples `[T, 3]`, and the image alone in its class that finds no other such, `[1]` or `[0]`."""
    images = images[np.argsort(targets[images], kind='stable')]
    classes = targets[images]
    first = np.flatnonzero(np.r_[True, classes[1:] != classes[:-1]])
    count = np.diff(np.r_[first, len(images)])
    odd = count % 2 == 1
    last = (first + count - 1)[odd]
    paired = np.ones(len(images), bool)
    paired[last] = False
    pairs = images[paired].reshape(-1, 2)
    is_third = count[odd] > 1
    of_triple = np.cumsum(count // 2)[odd][is_third] - 1  # the last pair of its class
    triples = np.concatenate([pairs[of_triple], images[last[is_third], None]], axis=1)

    single = generator.permutation(images[last[~is_third]])
    others = partners_of(single)
    alone, lone = single[others == single], np.stack([single, others], axis=1)[others != single]
    lone = lone[: (len(lone) + generator.integers(2)) // 2]  # half of them, so that they are shown once on average
    even = len(alone) // 2 * 2
    pairs = np.concatenate([np.delete(pairs, of_triple, axis=0), alone[:even].reshape(-1, 2), lone])
    return pairs, generator.permutation(triples), alone[even:]


def take_apart(
    pairs: np.ndarray,
    triples: np.ndarray,
    alone: np.ndarray,
    dropped: int,
    split: int,
    partners_of: PartnersOf,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs `[P, 2]` in random order, couples of triples `[C, 6]`, and a triple with the image alone, `[1 or 0, 4]`."""
    apart = dropped + split
    third = triples[dropped:apart, 2]
    couples = triples[apart : apart + (len(triples) - apart) // 2 * 2].reshape(-1, 6)
    left = triples[apart + 2 * len(couples) :]
    four = np.concatenate([left, alone[: len(left), None]], axis=1)
    alone = alone[len(left) :, None]
    pairs = np.concatenate(
        [pairs, triples[:apart, :2], np.stack([third, partners_of(third)], axis=1), np.repeat(alone, 2, axis=1)]
    )
    return pairs[generator.permutation(len(pairs))], couples, four


class Plan(NamedTuple):
    """What the batches are made of.

    Attributes:
        dropped: Triples that become a pair: their third image is left out.
        split: Triples that become two pairs: their third image gets a partner.
        half: Half the size of each batch, `[M]`.
        pairs: The pairs in each batch, `[M]`. Before them come couples of triples, of which batch m has every M-th.
    """

    dropped: int
    split: int
    half: np.ndarray
    pairs: np.ndarray


def plan(num_pairs: int, num_triples: int, num_alone: int, num_batches: int, limit: int) -> Plan:
    """Even batches of nearly one size, for which as few triples are taken apart as can be.

    Triples go into batches two by two, and pairs fill these up. Where there are too few pairs for that, as with three
    images a class, so many triples are taken apart as there are uneven batches. Where that does not do either, in
    batches of two or four images or with fewer groups than batches, all are.
    """
    rest = num_triples % (2 * num_batches)
    uneven = _all_apart(rest) if rest <= num_batches else (0, 2 * num_batches - rest)
    for dropped, split in ((0, 0), uneven):
        couples, left = divmod(num_triples - dropped - split, 2)
        four = left * num_alone  # the last triple and the image alone
        split += left - four
        pairs = num_pairs + dropped + 2 * split + num_alone - four
        excess = max(0, 3 * couples + 2 * four + pairs - num_batches * limit // 2)
        couples, dropped, pairs = couples - excess, dropped + 2 * excess, pairs + 2 * excess
        load = 3 * _deal(couples, num_batches)
        load[couples % num_batches] += 2 * four
        half = _deal(load.sum() + pairs, num_batches)
        if couples >= 0 and (half >= np.maximum(load, 1)).all() and half[0] <= limit // 2:
            return Plan(dropped, split, half, half - load)
    dropped, split = _all_apart(num_triples)
    pairs = num_pairs + dropped + 2 * split + num_alone
    half = _deal(int(np.clip(pairs, num_batches, num_batches * limit // 2)), num_batches)
    return Plan(dropped, split, half, half)


def _all_apart(num_triples: int) -> tuple[int, int]:
    """Half of the triples are dropped and half are split, so that a third image is shown once on average."""
    return num_triples // 2, num_triples - num_triples // 2


def _deal(count: int, num_batches: int) -> np.ndarray:
    """How many of count things each batch has, if they are dealt in turn."""
    return (count + num_batches - 1 - np.arange(num_batches)) // num_batches
