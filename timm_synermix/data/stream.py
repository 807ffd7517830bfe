"""Streams of images, of which a transform may fail for a few."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from timm.data import IterableImageDataset
from torch.utils.data import get_worker_info

from timm_synermix.data.dataset import UnreadableImage

_logger = logging.getLogger(__name__)


class ReadableStream(IterableImageDataset):
    """timm's data set of a stream, in which a transform may fail: the sample before takes the place of the image.

    So a worker gives as many samples as it would have. Each reason is named once, and their number at the end of an
    epoch, by every worker. Where it happens to two images and over 1 % of a worker's epoch, the stream ends.

    Args:
        reader: timm's reader of the stream.

    Attributes:
        strict: End the stream at the first one.
    """

    def __init__(self, reader: Any) -> None:
        super().__init__(root=None, reader=reader)
        self.strict = False

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """The samples of this worker.

        Raises:
            UnreadableImage: A transform fails for too many of them.
        """
        sample, seen, owed, failed, reasons = None, 0, 0, 0, set()
        worker = get_worker_info()
        expected = len(self) / (1 if worker is None else worker.num_workers)
        for image, target in self.reader:
            seen += 1
            try:
                sample = self._sample(image, target)
            except Exception as error:  # transforms raise all kinds
                failed += 1
                reason = f'{type(error).__name__}: {" ".join(str(error).split())}'
                if self.strict or failed > max(1, (expected or seen) / 100):
                    raise UnreadableImage(
                        f'a transform fails for {failed} of the first {seen} images of the stream, at last: {reason}'
                    ) from error
                if reason not in reasons:
                    _logger.warning(f'Skipped: an image of the stream cannot be transformed: {reason}')
                reasons.add(reason)
            owed += 1
            if sample is not None:
                yield from [sample] * owed
                owed = 0
        if failed:
            _logger.warning(f'Skipped {failed} of {seen} images of the stream, the ones before took their place')

    def _sample(self, image: Any, target: Any) -> tuple[Any, Any]:
        return (
            image if self.transform is None else self.transform(image),
            target if self.target_transform is None else self.target_transform(target),
        )
