"""scikit-learn's digits as a data set of images."""

from __future__ import annotations

import io
from typing import BinaryIO

import numpy as np
from PIL import Image
from timm.data.readers.reader import Reader


class DigitsReader(Reader):
    """scikit-learn's digits: 1,797 scanned handwritten digits of 8x8 pixels, inside the scikit-learn wheel.

    A fixed, stratified 3:1 split, 1,347 images to train and 450 to validate. Named `sklearn/digits`.

    Args:
        split: 'train', or 'validation' (also 'val', 'valid', 'test', 'eval').

    Raises:
        ValueError: The split is another.
    """

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        splits = {'train': 0, 'validation': 1, 'val': 1, 'valid': 1, 'test': 1, 'eval': 1}
        if split not in splits:
            raise ValueError(
                f"--train-split and --val-split of sklearn/digits must be 'train' or 'validation', got '{split}'."
            )
        digits = load_digits()
        parts = train_test_split(np.arange(len(digits.target)), test_size=450, stratify=digits.target, random_state=0)
        indices = np.sort(parts[splits[split]])
        images = np.round(digits.images[indices] * (255 / 16)).astype(np.uint8)
        self.files = [_bmp(image) for image in images]
        self.targets = digits.target[indices]
        self.class_to_idx = {str(digit): digit for digit in range(10)}

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return io.BytesIO(self.files[index]), int(self.targets[index])

    def __len__(self) -> int:
        return len(self.files)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return f'{index}.bmp'


def _bmp(image: np.ndarray) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format='bmp')
    return file.getvalue()
