"""Images held on the device: what is drawn and done to them, which batches they come in, and what is refused."""

import signal
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL, assert_same_run, make_image_folder
from PIL import Image

import train
from timm_synermix.data.on_device import Augmentation, hold
from timm_synermix.data.sample_dataset import SampleDataset
from timm_synermix.engine.loaders import set_epoch

FAST = ['--on-device', '--crop-padding', '2', '--cutout', '6', '--color-jitter', '0', '--crop-pct', '1']


def some_images(count=50, height=7, width=9, channels=3):
    """Without black, so that what is filled in can be told from what was there."""
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8)


def one_by_one(images, draws, padding, cutout):
    """The same by loops over images, rows and columns."""
    result = torch.zeros_like(images)
    height, width = images.shape[2:]
    for n, (image, (top, left, flip, row, column)) in enumerate(zip(images, draws.T.tolist(), strict=True)):
        for i in range(height):
            for j in range(width):
                y, x = i + top - padding, (width - 1 - j if flip else j) + left - padding
                inside = 0 <= y < height and 0 <= x < width
                first_row, first_column = row - cutout // 2, column - cutout // 2
                cut = first_row <= i < first_row + cutout and first_column <= j < first_column + cutout
                if inside and not cut:
                    result[n, :, i, j] = image[:, y, x]
    return result


@pytest.mark.parametrize('padding', [0, 1, 4])
@pytest.mark.parametrize('cutout', [0, 1, 4, 5, 40])
@pytest.mark.parametrize('hflip', [0.0, 0.5, 1.0])
def test_views_are_those_of_a_loop(padding, cutout, hflip):
    images, augmentation = some_images(), Augmentation(padding, hflip, cutout)
    draws = augmentation.draw(len(images), (7, 9), torch.Generator().manual_seed(0))
    before = images.clone()
    views = augmentation(images, draws)
    assert torch.equal(views, one_by_one(images, draws, padding, cutout))
    assert torch.equal(images, before)


def test_nothing_to_do():
    images = some_images(channels=1)
    draws = Augmentation().draw(len(images), (7, 9), torch.Generator())
    assert torch.equal(Augmentation()(images, draws), images)


def test_draws_are_uniform():
    """Every shift, and every centre of the square, equally often; flips as often as asked for; and all independent."""
    count, size = 100_000, (3, 4)
    draws = Augmentation(2, 0.3, 1).draw(count, size, torch.Generator().manual_seed(0))
    assert draws.shape == (5, count)
    for values, number in zip(draws, (5, 5, 2, 3, 4), strict=True):
        share = torch.bincount(values, minlength=number) / count
        expected = torch.tensor([0.7, 0.3]) if number == 2 else torch.full((number,), 1 / number)
        assert share == pytest.approx(expected, abs=0.006)
    assert np.abs(np.corrcoef(draws.numpy()) - np.eye(5)).max() < 0.015


@pytest.fixture
def build(monkeypatch, tmp_path, image_folder):
    """The loaders of these flags."""

    def build(*flags, root=image_folder):
        data = ['--data-dir', str(root), '--num-classes', '4', '--output', str(tmp_path), '--experiment', 'x']
        monkeypatch.setattr(sys, 'argv', ['train.py', *SMALL, *data, *flags])
        return train.build(*train._parse_args()).loaders

    return build


SAMPLING = {
    'plain': [],
    'supplements': ['--synermix'],
    'clean supplements': ['--synermix', '--synermix-supplement', 'clean'],
    'fixed': ['--synermix', '--synermix-batch', 'fixed'],
    'fraction': ['--synermix', '--synermix-fraction', '0.25'],
    'keep': ['--synermix', '--synermix-singletons', 'keep'],
    'copies': ['--synermix', '--aug-repeats', '2'],
    'without clean views': ['--synermix', '--synermix-beta', '0'],
}


@pytest.fixture(scope='module')
def whole_images(tmp_path_factory):
    """Images of the size they are trained at, which is never resized."""
    counts = {'train': {'a': 7, 'b': 6, 'c': 5, 'lone': 1}, 'validation': {'a': 3, 'b': 3, 'c': 3, 'lone': 1}}
    root = make_image_folder(tmp_path_factory.mktemp('whole'), counts, size=32)
    for path in root.rglob('*.png'):
        Image.open(path).crop((0, 0, 32, 32)).save(path)
    return root


@pytest.mark.parametrize('name', SAMPLING)
def test_batches_are_those_of_the_workers(build, whole_images, name):
    """To the bit, where nothing is drawn."""
    flags = [*SAMPLING[name], '--no-aug', '--crop-pct', '1']
    held, loaded = build(*flags, '--on-device', root=whole_images).train, build(*flags, root=whole_images).train
    assert len(held) == len(loaded)
    for epoch in (0, 1):
        for loader in (held, loaded):
            set_epoch(loader, epoch)
        batches = list(zip(held, loaded, strict=True))
        assert len(batches) == len(held)
        for (input, target), (expected, expected_target) in batches:
            assert torch.equal(target, expected_target)
            assert target.dtype == expected_target.dtype
            assert input.dtype == expected.dtype
            assert torch.equal(input, expected)


def test_evaluation_is_that_of_the_workers(build):
    held, loaded = build(*FAST).eval, build('--crop-pct', '1').eval
    for (input, target), (expected, expected_target) in zip(held, loaded, strict=True):
        assert torch.equal(target, expected_target)
        assert torch.equal(input, expected)


def test_clean_views_are_the_originals_of_the_augmented_ones(build, tmp_path):
    """Of the same images, in the same order: with all crops of a clean view, one is the augmented one."""
    root = make_image_folder(tmp_path / 'data', {'train': {'a': 4, 'b': 4}, 'validation': {'a': 1}}, size=32)
    flags = ['--on-device', '--crop-padding', '1', '--hflip', '0', '--color-jitter', '0', '--crop-pct', '1']
    loader = build('--synermix', '--mean', '0', '0', '0', '--std', '1', '1', '1', *flags, root=root).train
    for input, target in loader:
        clean, augmented = input.view(2, len(target), *input.shape[1:])
        padded = torch.nn.functional.pad(clean, [1] * 4)
        crops = [padded[:, :, y : y + 32, x : x + 32] for y in range(3) for x in range(3)]
        assert torch.stack([(crop == augmented).flatten(1).all(1) for crop in crops]).sum(0).tolist() == [1] * len(
            target
        )


def test_draws_depend_on_seed_epoch_and_batch(build):
    """And not on where an epoch begins."""
    loader, other = build('--synermix', *FAST).train, build('--synermix', *FAST, '--seed', '7').train
    set_epoch(loader, 1)
    batches = list(loader)
    set_epoch(loader, 1, 1)
    rest = list(loader)
    assert len(rest) == len(batches) - 1
    for (input, target), (again, target_again) in zip(batches[1:], rest, strict=True):
        assert torch.equal(target, target_again)
        assert torch.equal(input, again)
    sampler, size = loader.batch_sampler, (32, 32)
    seen = []
    original = Augmentation.draw

    def noted(self, count, size, generator):
        seen.append(original(self, 4, size, generator))
        return original(self, count, size, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Augmentation, 'draw', noted)
        for each, epoch, rank in ((loader, 1, 0), (loader, 2, 0), (loader, 1, 1), (other, 1, 0)):
            each.batch_sampler.rank = rank
            set_epoch(each, epoch)
            list(each)
    sampler.rank = 0
    assert size == tuple(loader.held.images.shape[2:])
    assert len({draws.numpy().tobytes() for draws in seen}) == len(seen) == 4 * len(loader)


RUNS = {
    'plain': ['--mixup', '0.5'],
    'synermix': ['--synermix', '--mixup', '0.5', '--cutmix', '1', '--model-ema', '--drop-path', '0.3'],
    'fixed': ['--synermix', '--synermix-batch', 'fixed', '--grad-accum-steps', '2'],
    'off': ['--synermix', '--synermix-off-epoch', '1', '--amp', '--amp-dtype', 'bfloat16', '--channels-last'],
}


@pytest.mark.parametrize('name', [n if n == 'synermix' else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_a_run_goes_on_in_the_middle_of_an_epoch(run_train, stop_at, name):
    """To the same bits."""
    flags = [*RUNS[name], *FAST, '--epochs', '2', '--warmup-epochs', '0']
    whole = run_train(*flags, experiment='whole')  # six batches
    restore = stop_at('keep_update', 4, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run_train(*flags, experiment='stopped')
    restore()
    resumed = run_train(*flags, '--resume', 'auto', experiment='stopped')
    assert_same_run(resumed, whole)


def test_every_image_is_read_once(run_train, monkeypatch):
    """Those of the evaluation too, and where SynerMix ends."""
    read, original = [], SampleDataset.__getitem__

    def noted(self, index):
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(SampleDataset, '__getitem__', noted)
    run_train('--synermix', '--synermix-off-epoch', '1', '--epochs', '3', *FAST)
    assert sorted(read) == sorted([*range(19), *range(10)])


@pytest.mark.parametrize(
    ('flags', 'channels'),
    [
        (['--dataset', 'sklearn/digits', '--num-classes', '10', '--in-chans', '1'], 1),
        (['--in-chans', '1'], 1),
        (['--in-chans', '4', '--input-img-mode', 'RGBA'], 4),
        (['--in-memory'], 3),
    ],
    ids=['digits', 'grey', 'RGBA', 'memory'],
)
def test_other_images(build, flags, channels):
    flags = ['--synermix', '--no-aug', *flags]
    (input, target), (expected, expected_target) = (
        next(iter(build(*flags, *more).train)) for more in (['--on-device'], [])
    )
    assert input.shape == (2 * len(target), channels, 32, 32)
    assert torch.equal(target, expected_target)
    assert torch.equal(input[: len(target)], expected[: len(target)])


def test_an_unreadable_image(run_train, tmp_path, caplog):
    root = make_image_folder(tmp_path / 'data', {'train': {'a': 5, 'b': 5}, 'validation': {'a': 2, 'b': 2}})
    (root / 'train' / 'a' / 'bad.png').write_bytes(b'no image')
    data = ('--data-dir', str(root), '--num-classes', '2')
    run_train('--synermix', *FAST, data=data)
    assert caplog.text.count('bad.png cannot be read') == 1
    assert 'Train: skipped 1 images that cannot be read' in caplog.text
    with pytest.raises(SystemExit) as stopped:
        run_train('--synermix', *FAST, '--strict-data', data=data, experiment='strict')
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--color-jitter', '0.4'], 'set to 0, or leave out, --color-jitter 0.4'),
        (['--aa', 'v0', '--reprob', '0.5'], 'set to 0, or leave out, --aa v0, --reprob 0.5'),
        (['--vflip', '0.5'], '--vflip 0.5'),
        (['--grayscale-prob', '0.1'], '--grayscale-prob 0.1'),
        (['--gaussian-blur-prob', '0.1'], '--gaussian-blur-prob 0.1'),
        (['--color-jitter-prob', '0.1'], '--color-jitter-prob 0.1'),
        (['--no-prefetcher'], '--no-prefetcher True'),
        (['--crop-padding', '0'], '--on-device has no random resized crop, and needs --crop-padding or --no-aug'),
        (['--dataset', 'wds/x'], '--on-device needs a data set that is no stream, got --dataset wds/x'),
    ],
)
def test_other_augmentation_is_refused_by_name(run_train, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run_train(*FAST, *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_images_that_do_not_fit(monkeypatch):
    def empty(shape, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory')

    samples = [(torch.zeros(3, 32, 32, dtype=torch.uint8), 0)] * 19
    monkeypatch.setattr(torch, 'empty', lambda *shape, **kwargs: empty(shape) if kwargs else torch.zeros(shape))
    with pytest.raises(ValueError, match=r'--on-device: 19 images of \(3, 32, 32\) take 0.0 GB, too much for cpu'):
        hold(samples, torch.device('cpu'))
