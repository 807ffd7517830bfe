"""Two views from one file, against timm's loader of one view, with the same images, transforms and workers."""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive
import torch
from measuring import Row, compare, in_turn, workers_time
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_dataset, create_loader, create_transform
from torch.utils.data import DataLoader

from timm_synermix import create_synermix_loader
from timm_synermix.data.dataset import ReadableImages
from timm_synermix.data.jitter import jitter_by_numpy
from timm_synermix.data.loader import create_clean_transform
from timm_synermix.data.memory import MemoryDataset
from timm_synermix.data.on_device import Augmentation, OnDeviceLoader, hold
from timm_synermix.data.sample_dataset import SampleDataset

# images on disk, their size, the size they are trained at, batch
CASES = [('32 px', 32, 32, 128), ('480 px', 480, 224, 16), ('2000 px', 2000, 224, 16)]
NUM_IMAGES = {32: 1024, 480: 96, 2000: 32}


def rows(device: torch.device, quick: bool, data_dir: str | None, workers: int) -> list[Row]:
    table = []
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            (
                f'JPEG photographs of {name}',
                write_photographs(Path(folder) / name, size, NUM_IMAGES[size]),
                image_size,
                batch_size,
            )
            for name, size, image_size, batch_size in CASES
        ]
        if data_dir is not None:
            cases.append((data_dir.rstrip('/').split('/')[-1], Path(data_dir), 32, 128))
        for name, root, size, batch_size in cases:
            epochs = {
                kind: epoch_of(create(root, size, batch_size, workers, device)) for kind, create in LOADERS.items()
            }
            # on a busy machine a worker's processor time scatters less than the time that passes
            seconds = in_turn(epochs, 3 if quick else 7, device, clock=workers_time if workers else time.process_time)
            setting = f'{name}, trained at {size} px, {workers} worker'
            against = "timm's loader of one view"
            for kind, aim in (('two views', '≥ 1'), ('naive pairs', ''), ('one view', '≥ 1')):
                table.append(compare(kind, setting, against, seconds['timm'], seconds[kind], aim, 'processor time'))
        table.append(lanes_row(cases[0][1], quick, workers, device))
    return table


def lanes_row(root: Path, quick: bool, workers: int, device: torch.device) -> Row:
    """Two views of the images of 32 pixels: held on the device, against workers with the images in memory."""
    size, kwargs = (3, 32, 32), dict(crop_pct=1.0, crop_padding=4, cutout=16, color_jitter=0.0, device=device)

    def loader(dataset: Any, num_workers: int) -> Any:
        return create_synermix_loader(dataset, size, 128, num_workers=num_workers, **kwargs)

    clean = create_clean_transform(size, crop_pct=1.0, use_prefetcher=True)
    held = hold(SampleDataset(ReadableImages(some_images(root), clean)), device)
    on_device = OnDeviceLoader(loader(some_images(root), 0), held, Augmentation(4, 0.5, 16), clean_view=True)
    epochs = {
        'workers': epoch_of(loader(MemoryDataset(some_images(root)), workers)),
        'on device': lambda: sum(epoch_of(on_device)() for _ in range(10)),
    }
    seconds = in_turn(epochs, 3 if quick else 7, device)
    setting = f'32 px, batch 128, {workers} worker'
    against = 'images in memory, two views by workers'
    rates = [f'{1 / statistics.median(seconds[lane]):,.0f}' for lane in ('on device', 'workers')]
    note = f'{" and ".join(rates)} images/s, of both two views'
    return compare('--on-device', setting, against, seconds['workers'], seconds['on device'], '≥ 8', note)


def write_photographs(folder: Path, size: int, count: int) -> Path:
    """A folder of 4:3 JPEGs: cuts of scikit-learn's two photographs of 640 pixels, several in a larger one."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    generator = random.Random(0)
    width, height = (size, size * 3 // 4) if size > 32 else (32, 32)
    tile = min(480, 4 * width)
    for number in range(count):
        image = Image.new('RGB', (width, height))
        for x in range(0, width, tile):
            for y in range(0, height, tile * 3 // 4):
                source = generator.choice(photographs)
                left, top = generator.randrange(640 - tile + 1), generator.randrange(427 - tile * 3 // 4 + 1)
                cut = source.crop((left, top, left + tile, top + tile * 3 // 4))
                image.paste(cut if tile < width or width == tile else cut.resize((width, height)), (x, y))
        path = folder / 'train' / f'class{number % 4}' / f'{number}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    return folder


def common(size: int, batch_size: int, workers: int, device: torch.device) -> dict[str, Any]:
    return dict(
        input_size=(3, size, size), batch_size=batch_size, num_workers=workers, device=device, interpolation='bicubic'
    )


def some_images(root: Path) -> Any:
    """A folder's images, or some 2,000 of them, of all classes."""
    dataset = create_dataset('', root=str(root), split='train')
    dataset.reader.samples = dataset.reader.samples[:: max(1, len(dataset) // 2048)]
    return dataset


def timm_loader(root: Path, *args: Any) -> Any:
    return create_loader(some_images(root), is_training=True, **common(*args))


def two_view_loader(root: Path, *args: Any) -> Any:
    kwargs: dict[str, Any] = dict(singletons='keep', clean_interpolation='bicubic', crop_pct=0.875)
    return create_synermix_loader(some_images(root), **common(*args), **kwargs)


def one_view_loader(root: Path, *args: Any) -> Any:
    """timm's loader of the images as train.py reads them, without --synermix too."""
    images = ReadableImages(some_images(root))
    loader = create_loader(images, is_training=True, **common(*args))
    images.transform = jitter_by_numpy(images.transform)
    return loader


def naive_loader(root: Path, size: int, batch_size: int, workers: int, device: torch.device) -> Any:
    clean = create_transform(size, interpolation='bicubic', crop_pct=0.875, use_prefetcher=False)
    augmented = create_transform(size, is_training=True, interpolation='bicubic', use_prefetcher=False)
    dataset = naive.PairDataset(some_images(root), clean, augmented)
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


LOADERS: dict[str, Callable[..., Any]] = {
    'timm': timm_loader,
    'two views': two_view_loader,
    'naive pairs': naive_loader,
    'one view': one_view_loader,
}


def epoch_of(loader: Any) -> Callable[[], int]:
    """An epoch of a loader; returns the number of its images."""
    return lambda: sum(len(batch[-1]) for batch in loader)
