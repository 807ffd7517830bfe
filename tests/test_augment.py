"""The augmentation of small images, against torchvision and plain numpy."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import functional as F

from timm_synermix.data.transforms import Cutout, add_small_image_augmentation


def colours(width=32, height=32):
    """An image without black, every pixel of another colour."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x + 1, y + 1, 255 - x], -1).astype(np.uint8))


@pytest.mark.parametrize('length', [1, 4, 5, 64])
def test_cutout_is_a_clipped_square(length):
    """Every pixel is the centre at times; the square is what a mask of the paper's form cuts."""
    image = colours(8, 5)
    original, seen = np.asarray(image), set()
    for seed in range(400):
        torch.manual_seed(seed)
        x, y = (int(torch.randint(side, ())) for side in image.size)
        seen.add((x, y))
        expected = original.copy()
        top, left = y - length // 2, x - length // 2
        expected[max(top, 0) : top + length, max(left, 0) : left + length] = 0
        torch.manual_seed(seed)
        assert np.array_equal(np.asarray(Cutout(length)(image)), expected)
    assert len(seen) == 8 * 5
    assert np.array_equal(np.asarray(image), original)  # which is not changed itself


def test_cutout_of_a_grey_image():
    assert (np.asarray(Cutout(100)(Image.new('L', (8, 8), 7))) == 0).all()


@pytest.mark.parametrize('use_prefetcher', [True, False])
@pytest.mark.parametrize('mean', [0.0, 0.5])
def test_padded_crop_and_cutout(use_prefetcher, mean):
    """All shifts by up to the padding occur, and no others; the square of Cutout is black before normalisation."""
    common = dict(mean=(mean,) * 3, std=(1.0,) * 3, use_prefetcher=use_prefetcher)
    transform = create_transform(32, is_training=True, hflip=0, color_jitter=0, **common)
    crop = add_small_image_augmentation(transform, crop_padding=2)
    cut = add_small_image_augmentation(transform, crop_padding=2, cutout=6)
    image = colours()
    padded = np.asarray(F.pad(image, 2))
    windows = {padded[y : y + 32, x : x + 32].tobytes(): (x, y) for x in range(5) for y in range(5)}
    found, sizes = set(), set()

    def pixels(view):
        view = torch.as_tensor(view).float()
        view = view if use_prefetcher else (view + mean) * 255
        return view.permute(1, 2, 0).round().to(torch.uint8).numpy()

    for seed in range(300):
        torch.manual_seed(seed)
        whole = pixels(crop(image))
        found.add(windows[whole.tobytes()])
        torch.manual_seed(seed)
        holes = pixels(cut(image))
        changed = (holes != whole).any(-1)
        assert changed.sum() <= 36
        assert (holes[changed] == 0).all()
        sizes.add(int(changed.sum()))
    assert len(found) == 25
    assert max(sizes) == 36


def test_images_of_another_size_keep_their_shape():
    """They are resized to the shorter side and cropped, so that a square is a square."""
    transform = create_transform(32, is_training=True, hflip=0, color_jitter=0, use_prefetcher=True)
    image = Image.new('RGB', (128, 64), 'white')
    image.paste(0, (48, 16, 80, 48))
    view = np.asarray(add_small_image_augmentation(transform, crop_padding=1)(image))[0]
    hole = view[1:-1, 1:-1] < 128
    assert view.shape == (32, 32)
    assert hole.any(0).sum() == hole.any(1).sum() == 16


def test_without_a_random_crop():
    """no_aug is left alone; another crop is refused by crop_padding, and cut by Cutout."""
    no_aug = create_transform(32, is_training=True, no_aug=True)
    assert add_small_image_augmentation(no_aug, 4, 16) is no_aug
    other = create_transform(32, is_training=True, train_crop_mode='rkrc')
    with pytest.raises(ValueError, match='crop_padding needs the random resized crop, got ResizeKeepRatio'):
        add_small_image_augmentation(other, 4)
    steps = add_small_image_augmentation(other, cutout=4).transforms
    assert sum(isinstance(step, Cutout) for step in steps) == 1


@pytest.mark.parametrize('synermix', [[], ['--synermix']])
def test_flags(run_train, synermix, monkeypatch):
    """They reach the augmented images of both loaders, and leave the clean ones as they are."""
    lengths = []
    monkeypatch.setattr(Cutout, '__call__', lambda self, image: lengths.append(self.length) or image)
    run_train('--crop-padding', '4', '--cutout', '16', '--train-crop-mode', 'rrc', *synermix)
    assert len(lengths) >= 16
    assert set(lengths) == {16}


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--cutout', '-1'], '--cutout must be at least 0, got -1'),
        (['--crop-padding', '4', '--train-crop-mode', 'rkrc'], '--crop-padding and --train-crop-mode cannot be used'),
        (['--cutout', '4', '--aug-splits', '2'], '--cutout and --aug-splits cannot be used together'),
        (['--cutout', '4', '--no-aug'], '--cutout and --no-aug cannot be used together'),
        (['--in-memory', '--dataset', 'wds/x'], '--in-memory needs a data set that is no stream, got --dataset wds/x'),
    ],
)
def test_bad_flags(run_train, capsys, flags, message):
    with pytest.raises(SystemExit):
        run_train(*flags)
    assert message in capsys.readouterr().err
