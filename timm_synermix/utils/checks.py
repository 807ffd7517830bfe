"""Rules that a flag and the argument of a class have in common. Nothing here imports torch."""

from __future__ import annotations

import math
from typing import NamedTuple


class Range(NamedTuple):
    """Finite numbers from low to high, which belong to it; with above, low does not."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __str__(self) -> str:
        if self.high < math.inf:
            return f'in {"(" if self.above else "["}{self.low}, {self.high}]'
        if self.low == -math.inf:
            return 'a finite number'
        return f'{"above" if self.above else "at least"} {self.low}'

    def check(self, name: str, value: float) -> None:
        """Raise ValueError, which names the argument and the rule, unless the value is in the range; NaN never is."""
        high_enough = value > self.low if self.above else value >= self.low
        if not (high_enough and value <= self.high and -math.inf < value < math.inf):
            raise ValueError(f'{name} must be {self}, got {value}')


class OneOf(tuple[str, ...]):
    """The values there are; an empty one among them says nothing."""

    def __str__(self) -> str:
        return f'one of {", ".join(filter(None, self))}'

    def check(self, name: str, value: str) -> None:
        """Raise ValueError, which names the argument and the rule, unless the value is one of them."""
        if value not in self:
            raise ValueError(f'{name} must be {self}, got {value!r}')


FRACTION = Range(0, 1)
BETA = FRACTION
NUM_MIXED = Range(0)  # 0 for all
POSITIVE_FRACTION = Range(0, 1, above=True)
BATCH_SIZE = Range(2)  # with room for two images of a class

MIX = OneOf(('features', 'none'))  # what L_intra is of: mixed features, or the images as they are
# What becomes of a class with one image in a batch, what its second image takes part in, and the size of the batch.
SINGLETONS = OneOf(('supplement', 'keep', 'bank'))
SUPPLEMENT = OneOf(('both', 'clean'))
BATCH = OneOf(('grow', 'fixed'))


def check_fraction(
    fraction: float, clean_only: bool, several: bool, names: tuple[str, str, str] = ('fraction', 'clean_only', 'labels')
) -> None:
    """Raise ValueError unless fraction is positive; and 1 with clean partners alone, or with several labels."""
    POSITIVE_FRACTION.check(names[0], fraction)
    for name, value in ((names[1], clean_only), (names[2], several)):
        if value and fraction < 1:
            raise ValueError(f'{names[0]} must be 1 with {name}, got {fraction}')


def check_fixed(fixed: bool, clean_only: bool, names: tuple[str, str] = ('fixed', 'clean_only')) -> None:
    """Raise ValueError for batches of one size whose second images have no augmented view."""
    if fixed and clean_only:
        raise ValueError(
            f'{names[0]} and {names[1]} cannot be used together: the number of augmented images would vary'
        )


def check_bank(bank: bool, gather: bool, names: tuple[str, str] = ('bank', 'gather_rows')) -> None:
    """Raise ValueError for a bank of features, which is of one process, and features of all processes."""
    if bank and gather:
        raise ValueError(f'{names[0]} and {names[1]} cannot be used together: a bank is of one process')


def check_unmixed(mix: str, others: dict[str, object], name: str = 'mix') -> None:
    """Raise ValueError for what says how to mix, by its name, where nothing is mixed."""
    for other, value in others.items():
        if mix == 'none' and value:
            raise ValueError(f"{other} says how to mix, and cannot be used with {name} 'none'")
