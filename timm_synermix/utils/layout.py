"""How the views of a batch stand in its input."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """The input of a batch: clean views of its first K images, then the augmented ones of its first A, in S splits.

    That is `K + S A` rows for N images. Either all images have a clean view, `K = N`; or some have, then `A = N`.
    N rows are augmented views alone, which timm's splits count as images.

    Attributes:
        splits: S.
        some: Some images have a clean view, not all.
    """

    splits: int = 1
    some: bool = False

    def num_clean(self, rows: int, images: int) -> int:
        """K, for the rows of the input and the length of the target.

        Raises:
            ValueError: There is no such batch.
        """
        if rows == images:
            return 0
        clean = rows - self.splits * images if self.some else images
        augmented, rest = divmod(rows - clean, self.splits)
        if not 0 < clean <= images or not 0 <= augmented <= images or rest:
            first = f'{self.splits * images + 1} to' if self.some else 'up to'
            step = f', {self.splits} more an image' if self.splits > 1 and not self.some else ''
            most = f'{first} {(1 + self.splits) * images} with clean views{step}'
            raise ValueError(f'input must have {images} rows, or {most}, got {rows}.')
        return clean


EACH_TWICE = Layout()  # a clean and an augmented one of every image, or of fewer the augmented one


def num_clean_classes(fraction: float, images: int) -> int:
    """Classes of which two images have a clean view, where a fraction of a batch has one, if so many are there.

    Two at least: BatchNorm needs two images, and a class may have one.
    """
    return max(2, round(fraction * images / 2))
