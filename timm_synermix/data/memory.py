"""Images that are decoded once and kept."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_synermix.data.classes import class_to_idx, dataset_targets
from timm_synermix.data.dataset import ReadableImages, UnreadableImage


class MemoryDataset(Dataset):
    """A data set whose images are decoded once and kept in memory: for small ones, which take long to open and decode.

    They are the images of the data set bit for bit, of whatever mode. One that cannot be read is read again where it is
    used, and met there.

    Args:
        dataset: A map-style data set of images, timm's or torchvision's; images are converted to its input_img_mode.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.transform: Any = None
        self.target_transform: Any = None
        self.class_to_idx = class_to_idx(dataset)
        self.input_img_mode = getattr(dataset, 'input_img_mode', None)
        self.reading = ReadableImages(dataset)
        self.clipped = self.reading.clipped
        self.images: list[Image.Image | None] = []
        self.targets: list[Any] = []
        targets = dataset_targets(dataset)
        watched = sys.stderr.isatty()
        for index in tqdm(range(len(dataset)), desc='In memory', unit='image', leave=False, disable=not watched):
            image, target = None, None
            with suppress(UnreadableImage):
                image, target = self.reading.read(index)
            self.images.append(image)
            self.targets.append(target if targets is None else int(targets[index]))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self.images[index], self.targets[index]
        if image is None:
            image, target = self.reading.read(index)
        else:
            image = image.copy()
        if self.transform is not None:
            image = self.transform(image)
        return image, target if self.target_transform is None else self.target_transform(target)

    def __len__(self) -> int:
        return len(self.images)

    def filename(self, index: int, **kwargs: Any) -> str:
        """That of the data set."""
        name: str = self.dataset.filename(index, **kwargs)
        return name

    def filenames(self, **kwargs: Any) -> list[str]:
        """Those of the data set."""
        names: list[str] = self.dataset.filenames(**kwargs)
        return names
