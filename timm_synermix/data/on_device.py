"""Images that stay on the training device, where both views of a whole batch are made: for data sets that fit."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import default_collate
from tqdm import tqdm

from timm_synermix.data.draws import DrawSampler, items_of, views_of
from timm_synermix.data.sample_dataset import SampleDataset
from timm_synermix.utils.random import seed_of
from timm_synermix.utils.wrapped import WrappedLoader

_logger = logging.getLogger(__name__)


class HeldImages(NamedTuple):
    """A data set on a device: images uint8 `[N, C, H, W]`, and their targets `[N]`, or `[N, K]` of K labels each."""

    images: Tensor
    targets: Tensor


def hold(samples: SampleDataset, device: torch.device) -> HeldImages:
    """Decode and transform every image of a data set once.

    Args:
        samples: Of a deterministic transform that gives uint8 arrays `[C, H, W]`. In the place of an image that cannot
            be read there is, for good, another one of its class.
        device: Where they are held.

    Raises:
        ValueError: They do not fit.
    """
    images, targets = torch.empty(0), []
    watched = sys.stderr.isatty()
    for index in tqdm(range(len(samples)), desc=f'To {device}', unit='image', leave=False, disable=not watched):
        image, target = samples[index]
        if not index:
            images = _allocated((len(samples), *image.shape), torch.device('cpu'))
        images[index] = torch.as_tensor(image)
        targets.append(target)
    held = _allocated(images.shape, device).copy_(images) if device.type != 'cpu' else images
    _logger.info(f'On {device}: {len(held):,} images of {tuple(held.shape[1:])}, {held.numel() / 1e6:,.0f} MB')
    return HeldImages(held, default_collate(targets).to(device))


def _allocated(shape: tuple[int, ...], device: torch.device) -> Tensor:
    try:
        return torch.empty(shape, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # of which torch's OutOfMemoryError is one
        size = f'{torch.Size(shape).numel() / 1e9:.1f} GB'
        raise ValueError(
            f'--on-device: {shape[0]:,} images of {shape[1:]} take {size}, too much for {device}'
        ) from error


@dataclass(frozen=True)
class Augmentation:
    """Random crop of the padded image, horizontal flip and Cutout, of a batch of images at once, in this order.

    What is drawn has the distribution of `add_small_image_augmentation` and of timm's flip, not the same numbers.

    Args:
        crop_padding: Black pixels at each side of the image that is cropped to its own size.
        hflip: Probability of the flip.
        cutout: Side of the black square, centred on any pixel and clipped by the borders.
    """

    crop_padding: int = 0
    hflip: float = 0.0
    cutout: int = 0

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """The draws of count images of height and width size.

        Returns:
            int64 `[5, count]`: top and left of the crop, from 0 to twice the padding; 1 for a flip, else 0; row and
            column of the square's centre in the flipped crop.
        """
        height, width = size
        corner = torch.randint(2 * self.crop_padding + 1, (2, count), generator=generator)
        flip = torch.rand(1, count, generator=generator) < self.hflip
        row = torch.randint(height, (1, count), generator=generator)
        column = torch.randint(width, (1, count), generator=generator)
        return torch.cat([corner, flip.long(), row, column])

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """The augmented views of images `[N, C, H, W]`, by draws `[5, N]` on their device."""
        height, width = images.shape[2:]
        top, left, flip, row, column = draws
        across = torch.arange(width, device=images.device)
        y = top[:, None] + torch.arange(height, device=images.device)
        x = left[:, None] + torch.where(flip.bool()[:, None], width - 1 - across, across)
        padded = pad(images, [self.crop_padding] * 4)
        place = (y[:, :, None] * padded.shape[3] + x[:, None, :]).flatten(1)
        views = padded.flatten(2).gather(2, place[:, None].expand(-1, images.shape[1], -1)).view(images.shape)
        if self.cutout:
            hole = self._covered(row, height)[:, :, None] & self._covered(column, width)[:, None, :]
            views *= ~hole[:, None]
        return views

    def _covered(self, centre: Tensor, length: int) -> Tensor:
        """Which of the rows, or columns, the square covers: bool `[N, length]`."""
        place = torch.arange(length, device=centre.device) - (centre[:, None] - self.cutout // 2)
        return (place >= 0) & (place < self.cutout)


class OnDeviceLoader(WrappedLoader):
    """The batches of a loader, made of held images on their device; in all else the loader, whose workers never start.

    Which images a batch has, their order, and which views of them are wanted is for its batch sampler to say. The clean
    view is the held image. The draws of the augmented ones are made on the CPU, by (seed, rank, epoch, batch), and so
    are the same for every device.

    Args:
        loader: timm's PrefetchLoader of the data set, which has the normalisation and the type of the images.
        held: The images of the data set.
        augmentation: Makes the augmented views. None for an evaluation: all views are clean.
        clean_view: Batches have the clean views that their sampler asks for, before the augmented ones.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        loader: PrefetchLoader,
        held: HeldImages,
        augmentation: Augmentation | None = None,
        clean_view: bool = False,
        seed: int = 42,
    ) -> None:
        super().__init__(loader)
        self.held, self.augmentation, self.clean_view, self.seed = held, augmentation, clean_view, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader, sampler = self._loader, self._loader.batch_sampler
        generator, known = torch.Generator(), isinstance(sampler, DrawSampler)
        for number, batch in enumerate(sampler, sampler.first_batch if known else 0):
            if known:
                generator.manual_seed(seed_of('augment', self.seed, sampler.rank, sampler.epoch, number))
            pixels, target = self._views(batch, generator)
            yield pixels.to(loader.img_dtype).sub_(loader.mean).div_(loader.std), target

    def _views(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The pixels uint8 `[N, C, H, W]` and the targets of a batch."""
        images, targets = self.held
        views = [views_of(item) for item in items_of(batch)]
        image = torch.tensor([view.image for view in views])
        if self.augmentation is None:
            image = image.to(images.device, non_blocking=True)
            return images.index_select(0, image), targets[image]
        clean = torch.tensor([view.image for view in views if view.clean and self.clean_view], dtype=torch.int64)
        augmented = torch.tensor([view.image for view in views if view.augmented])
        draws = self.augmentation.draw(len(augmented), (images.shape[2], images.shape[3]), generator)
        sizes = [len(image), len(clean), len(augmented), draws.numel()]
        numbers = torch.cat([image, clean, augmented, draws.flatten()]).to(images.device, non_blocking=True)  # at once
        image, clean, augmented, draws = numbers.split(sizes)
        second = self.augmentation(images.index_select(0, augmented), draws.view(5, -1))
        return torch.cat([images.index_select(0, clean), second]), targets[image]
