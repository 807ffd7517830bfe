import os
import tarfile

import numpy as np
import pytest
import timm.data
import torch
from conftest import make_image_folder
from PIL import Image
from timm.data import create_transform
from torch.utils.data import Subset
from torchvision import datasets as tv

from timm_synermix import create_synermix_loader, dataset_targets
from timm_synermix.data.classes import Renumbered, check_classes
from timm_synermix.data.dataset import TwoViewDataset
from timm_synermix.data.dataset_factory import _file_names, create_dataset, describe
from timm_synermix.data.draws import Draws, Views, image_of
from timm_synermix.data.transforms import TwoViewTransform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def load(root, **kwargs):
    dataset = create_dataset('', root=str(root), split='train')
    kwargs = {**dict(num_workers=0, device=torch.device('cpu'), mean=MEAN, std=STD), **kwargs}
    return dataset, create_synermix_loader(dataset, (3, 16, 16), 8, **kwargs)


def batch_and_indices(loader):
    indices = next(iter(loader.batch_sampler.batch_sampler))
    return next(iter(loader)), indices


def assert_same_pixels(view, expected):
    """Normalised images are the same but for the rounding of a resize: at most 2 of 255."""
    difference = (view - expected).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert difference.max() < 2.01
    assert difference.mean() < 0.1


@pytest.mark.parametrize('use_prefetcher', [True, False])
def test_clean_view_is_the_evaluation_transform(image_folder, use_prefetcher):
    dataset, loader = load(image_folder, use_prefetcher=use_prefetcher, crop_pct=0.8, clean_interpolation='bicubic')
    (x, y), indices = batch_and_indices(loader)
    evaluation = create_transform((3, 16, 16), interpolation='bicubic', crop_pct=0.8, mean=MEAN, std=STD)
    for i, index in enumerate(indices):
        file, target = dataset.reader[index]
        expected = evaluation(Image.open(file).convert('RGB'))
        assert_same_pixels(x[i], expected)
        assert y[i] == target
    assert x.shape == (2 * len(y), 3, 16, 16)
    assert not torch.equal(x[: len(y)], x[len(y) :])


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(clean_interpolation='lanczos', crop_pct=0.9),
        dict(clean_interpolation='bicubic', crop_mode='squash', crop_pct=0.9),
        dict(clean_interpolation='bicubic', crop_mode='border', crop_pct=0.9),
    ],
)
def test_clean_view_of_other_interpolations_and_crops(image_folder, kwargs):
    dataset, loader = load(image_folder, **kwargs)
    (x, _), indices = batch_and_indices(loader)
    expected = dict(interpolation=kwargs['clean_interpolation'], crop_pct=0.9, crop_mode=kwargs.get('crop_mode'))
    evaluation = create_transform((3, 16, 16), mean=MEAN, std=STD, **expected)
    for i, index in enumerate(indices):
        assert_same_pixels(x[i], evaluation(Image.open(dataset.reader[index][0]).convert('RGB')))


def test_augmented_view_is_the_training_transform(image_folder):
    """Without augmentation timm's training transform is a plain resize, which both views can be held against."""
    dataset, loader = load(image_folder, no_aug=True, interpolation='bilinear', crop_pct=0.5, re_prob=1.0)
    (x, y), indices = batch_and_indices(loader)
    training = create_transform(
        (3, 16, 16), is_training=True, no_aug=True, interpolation='bilinear', mean=MEAN, std=STD
    )
    for i, index in enumerate(indices):
        expected = training(Image.open(dataset.reader[index][0]).convert('RGB'))
        torch.testing.assert_close(x[len(y) + i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('use_prefetcher', [True, False])
def test_random_erasing_and_augmentation_leave_the_clean_view_alone(image_folder, use_prefetcher):
    common = dict(use_prefetcher=use_prefetcher, crop_pct=1.0)
    _, plain = load(image_folder, **common)
    _, strong = load(image_folder, re_prob=1.0, re_mode='const', auto_augment='rand-m9', color_jitter=0.9, **common)
    (x, y), (erased, _) = next(iter(plain)), next(iter(strong))
    n = len(y)
    assert torch.equal(x[:n], erased[:n])
    assert not torch.equal(x[n:], erased[n:])
    black = (erased == 0).all(1).flatten(1).any(1)  # erased pixels are 0 in all channels after normalisation
    assert black[n:].all()
    assert not black[:n].any()


def test_one_decode_per_image(image_folder, monkeypatch):
    dataset, loader = load(image_folder)
    opened = []
    original = type(dataset.reader).__getitem__
    monkeypatch.setattr(type(dataset.reader), '__getitem__', lambda self, i: opened.append(i) or original(self, i))
    images = sum(len(target) for _, target in loader)
    assert len(opened) == images


def test_workers_and_prefetcher_do_not_change_the_clean_images(image_folder):
    reference = [(x[: len(y)], y) for x, y in load(image_folder)[1]]
    for kwargs in (dict(num_workers=2), dict(use_prefetcher=False), dict(use_multi_epochs_loader=True)):
        for (x, y), (clean, target) in zip(load(image_folder, **kwargs)[1], reference, strict=True):
            assert torch.equal(y, target)
            torch.testing.assert_close(x[: len(y)], clean, atol=1e-5, rtol=1e-5)


def test_every_class_twice_in_a_batch(image_folder):
    _, loader = load(image_folder, singletons='supplement')
    for _, y in loader:
        counts = y.bincount(minlength=4)
        assert (counts[:3][counts[:3] > 0] >= 2).all()  # the fourth class has one image
    _, loader = load(image_folder, singletons='keep')
    assert sum(len(y) for _, y in loader) == 20  # 19 images, made even


@pytest.mark.parametrize('use_prefetcher', [True, False])
def test_partners_with_the_clean_view_alone(image_folder, use_prefetcher):
    """Input is N clean views and the augmented views of the first A of them; erasing touches the latter alone."""
    dataset, loader = load(image_folder, supplement='clean', re_prob=1.0, crop_pct=1.0, use_prefetcher=use_prefetcher)
    evaluation = create_transform((3, 16, 16), interpolation='bilinear', crop_pct=1.0, mean=MEAN, std=STD)
    some_partners = 0
    for (x, y), indices in zip(loader, list(loader.batch_sampler.batch_sampler), strict=True):
        base = sum(not isinstance(item, Views) for item in indices)
        assert len(x) == len(y) + base
        some_partners += len(y) - base
        for i, item in enumerate(indices):
            file, target = dataset.reader[image_of(item)]
            assert_same_pixels(x[i], evaluation(Image.open(file).convert('RGB')))
            assert y[i] == target
        assert (x[len(y) :] == 0).all(1).flatten(1).any(1).all()  # every augmented view has erased pixels
    assert some_partners


def test_a_sample_has_the_views_that_are_asked_for(image_folder):
    dataset = create_dataset('', root=str(image_folder), split='train')
    views = TwoViewDataset(dataset, TwoViewTransform(lambda image: ('clean', image.size), lambda _: 'augmented'))
    clean = ('clean', Image.open(dataset.reader[8][0]).size)
    for item, expected in (
        (8, (clean, 'augmented')),
        (Views(8), (clean, 'augmented')),
        (Views(8, augmented=False), (clean, None)),
        (Views(8, clean=False), (None, 'augmented')),
    ):
        assert views[item] == (expected, 1)


def test_a_fraction_needs_labels(image_folder):
    dataset = create_dataset('', root=str(image_folder), split='train')
    dataset.reader.targets = [[0]] * 19  # as of images with several labels
    with pytest.raises(ValueError, match=r'fraction must be 1 for ImageDataset, which does not tell its labels'):
        create_synermix_loader(dataset, 16, 8, fraction=0.5)


def test_fixed_batches_are_even_and_nearly_equal(image_folder):
    """19 images, one of which is alone in its class and is shown twice."""
    _, loader = load(image_folder, batch='fixed')
    assert sorted(x.shape[0] for x, _ in loader) == [12, 12, 16]


def test_a_subset_is_loaded_in_two_views(image_folder):
    dataset = create_dataset('', root=str(image_folder), split='train')
    subset = Subset(Subset(dataset, range(2, 19)), range(0, 16))
    loader = create_synermix_loader(
        subset, 16, 8, num_workers=0, use_prefetcher=False, singletons='keep', mean=MEAN, std=STD
    )
    plain = create_transform(16, interpolation='bilinear', mean=MEAN, std=STD)
    (x, y), indices = batch_and_indices(loader)
    for i, index in enumerate(indices):
        assert_same_pixels(x[i], plain(Image.open(dataset.reader[index + 2][0]).convert('RGB')))
    assert len(x) == 2 * len(y) == 16


def test_repeated_augmentation(image_folder):
    _, loader = load(image_folder, num_aug_repeats=3)
    indices = sum(list(loader.batch_sampler.batch_sampler), [])
    assert len(set(indices)) < len(indices) - 8  # an epoch of 19 draws from a third of the images, three times each
    assert len(loader) == 3


def test_epochs_differ_and_timm_can_set_them(image_folder):
    dataset, loader = load(image_folder)
    first = list(loader.batch_sampler.batch_sampler)
    dataset.set_epoch(1)
    assert list(loader.batch_sampler.batch_sampler) != first
    dataset.set_epoch(0)
    assert list(loader.batch_sampler.batch_sampler) == first


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(singletons='drop'), "singletons must be one of supplement, keep, bank, got 'drop'"),
        (dict(supplement='none'), "supplement must be one of both, clean, got 'none'"),
        (dict(batch='even'), "batch must be one of grow, fixed, got 'even'"),
        (dict(scael=1), 'scael'),
        (dict(is_training=False), 'is_training must be True'),
        (dict(input_size_choices=[16], num_aug_splits=2), 'input_size_choices must be None with num_aug_splits'),
        (dict(input_size_choices=[16], batch='fixed'), "batch must be 'grow' with input_size_choices, got 'fixed'"),
        (dict(input_size_choices=[16], batch_size_choices=[4, 8]), r'batch_size_choices must .* the 1 .* got \[4, 8\]'),
        (dict(collate_fn=timm.data.FastCollateMixup()), 'collate_fn must be None .*SynerMixTask'),
    ],
)
def test_bad_arguments(image_folder, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        load(image_folder, **kwargs)


def test_batch_size_of_one(image_folder):
    with pytest.raises(ValueError, match='batch_size must be at least 2'):
        create_synermix_loader(create_dataset('', root=str(image_folder), split='train'), 16, 1)


# Labels without opening images


def read_targets(dataset):
    return [dataset[i][1] for i in range(len(dataset))]


def test_targets_of_a_folder_and_a_subset(image_folder):
    dataset = create_dataset('', root=str(image_folder), split='train')
    assert dataset_targets(dataset).tolist() == read_targets(dataset) == [0] * 7 + [1] * 6 + [2] * 5 + [3]
    subset = Subset(dataset, [18, 0, 8])
    assert dataset_targets(subset).tolist() == [3, 0, 1]
    dataset.target_transform = lambda target: 10 * target
    assert dataset_targets(dataset).tolist() == read_targets(dataset)


def test_targets_of_a_tar(image_folder, tmp_path):
    with tarfile.open(tmp_path / 'train.tar', 'w') as file:
        file.add(image_folder / 'train', arcname='.')
    dataset = create_dataset('', root=str(tmp_path / 'train.tar'))
    assert sorted(dataset_targets(dataset)) == [0] * 7 + [1] * 6 + [2] * 5 + [3]
    assert dataset_targets(dataset).tolist() == read_targets(dataset)


def test_targets_of_torchvision(image_folder):
    dataset = create_dataset('torch/image_folder', root=str(image_folder), split='train')
    assert isinstance(dataset, tv.ImageFolder)
    assert dataset_targets(dataset).tolist() == read_targets(dataset)
    loader = create_synermix_loader(dataset, 16, 8, num_workers=0, device=torch.device('cpu'))
    x, y = next(iter(loader))
    assert len(x) == 2 * len(y)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_targets_of_a_hugging_face_data_set(image_folder, tmp_path):
    pytest.importorskip('datasets', reason='needs the package datasets')
    dataset = timm.data.create_dataset(f'hfds/{image_folder}', root=str(tmp_path), split='train')
    assert sorted(dataset_targets(dataset)) == [0] * 7 + [1] * 6 + [2] * 5 + [3]
    assert dataset_targets(dataset).tolist() == read_targets(dataset)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('class_map', [None, {'a': 3, 'b': 0, 'c': 1, 'lone': 2}], ids=['own', 'map'])
def test_labels_are_read_by_column_once(image_folder, tmp_path, monkeypatch, class_map):
    """The same as row by row, in any order of the rows, under a class map; and no row is read for them."""
    pytest.importorskip('datasets', reason='needs the package datasets')
    dataset = timm.data.create_dataset(f'hfds/{image_folder}', root=str(tmp_path), split='train', class_map=class_map)
    dataset.reader.dataset = dataset.reader.dataset.select(range(len(dataset))[::-1])
    expected = list(dataset.reader.iter_targets())
    assert len(set(expected)) == 4
    monkeypatch.setattr(type(dataset.reader), 'iter_targets', None)
    targets = dataset_targets(dataset)
    assert targets.tolist() == expected
    assert dataset_targets(dataset) is targets
    dataset.target_transform = Renumbered({0: 5, 3: 0})
    assert dataset_targets(dataset).tolist() == [{0: 5, 3: 0}.get(label, label) for label in expected]
    dataset.reader.dataset = dataset.reader.dataset.select([0, 1])  # another one has labels of its own
    assert len(dataset_targets(dataset)) == 2


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_processes_compare_names_without_reading_images(image_folder, tmp_path, monkeypatch):
    """Those of a Hugging Face data set, also in another order and in memory; a stream is not looked at."""
    pytest.importorskip('datasets', reason='needs the package datasets')
    dataset = timm.data.create_dataset(f'hfds/{image_folder}', root=str(tmp_path), split='train')
    names = [os.path.basename(name) for name in dataset.filenames()]
    assert len(set(names)) == 7
    described = describe(dataset)
    read = []
    monkeypatch.setattr(type(dataset.reader), '_filename', lambda *args, **kwargs: read.append(args))
    assert _file_names(dataset) == names
    dataset.reader.dataset = dataset.reader.dataset.select(range(len(names))[::-1])
    assert _file_names(dataset) == names[::-1]
    assert describe(dataset) != described
    assert not read
    assert describe(timm.data.create_dataset('wds/no', root=str(tmp_path), split='no.tar', num_samples=9)) == 'a stream'


def test_a_streaming_data_set_keeps_lone_classes_and_says_so(image_folder, tmp_path, caplog):
    pytest.importorskip('webdataset', reason='needs the package webdataset')
    files = sorted((image_folder / 'train').rglob('*.png'))
    with tarfile.open(tmp_path / 'train-0000.tar', 'w') as file:
        for i, path in enumerate(files):
            (tmp_path / 'cls').write_text(str(i % 4))
            file.add(path, arcname=f'{i:04}.png')
            file.add(tmp_path / 'cls', arcname=f'{i:04}.cls')
    dataset = timm.data.create_dataset(
        'wds/local', root=str(tmp_path), split='train-0000.tar', is_training=True, batch_size=4, num_samples=19
    )
    assert dataset_targets(dataset) is None
    loader = create_synermix_loader(dataset, 16, 4, num_workers=0, device=torch.device('cpu'))
    assert 'is not supplemented' in caplog.text
    for x, y in loader:
        assert len(x) == 2 * len(y) == 8


# Digits and checks


def test_digits():
    train, validation = (create_dataset('sklearn/digits', split=s, input_img_mode='L') for s in ('train', 'validation'))
    assert (len(train), len(validation)) == (1347, 450)
    assert np.bincount(dataset_targets(validation)).tolist() == [45, 46, 44, 46, 45, 46, 45, 45, 43, 45]
    image, _ = train[0]
    assert (image.size, image.mode) == ((8, 8), 'L')
    assert read_targets(validation) == dataset_targets(validation).tolist()
    everything = sorted(np.asarray(d[i][0]).tobytes() for d in (train, validation) for i in range(len(d)))
    from sklearn.datasets import load_digits

    assert everything == sorted(np.round(x * 255 / 16).astype(np.uint8).tobytes() for x in load_digits().images)


@pytest.mark.parametrize(
    ('name', 'root', 'message'),
    [
        ('', None, '--data-dir must name the folder'),
        ('torch/cifar100', None, '--data-dir must name the folder of torch/cifar100, got none'),
        ('', '/nowhere/at/all', "--data-dir must be a folder or tar file that exists, got '/nowhere/at/all'"),
        ('', '{empty}', '--data-dir: there are no images'),
        ('sklearn/faces', None, "there is only 'sklearn/digits'"),
    ],
)
def test_data_that_is_not_there(tmp_path, name, root, message):
    with pytest.raises(ValueError, match=message):
        create_dataset(name, root=root and root.format(empty=tmp_path), split='train')


def test_unknown_split_of_digits():
    with pytest.raises(ValueError, match="of sklearn/digits must be 'train' or 'validation', got 'tset'"):
        create_dataset('sklearn/digits', split='tset')


def test_too_few_or_too_many_classes(image_folder, tmp_path):
    dataset = create_dataset('', root=str(image_folder), split='train')
    check_classes(dataset, dataset, 4)
    with pytest.raises(ValueError, match='--num-classes must cover all 4 classes of the training set, got 3'):
        check_classes(dataset, None, 3)
    one = create_dataset('', root=str(make_image_folder(tmp_path, {'train': {'a': 2}})), split='train')
    with pytest.raises(ValueError, match='at least two classes, got one'):
        check_classes(one, None, 4)


def test_validation_classes_are_checked(tmp_path):
    root = make_image_folder(tmp_path, {'train': {'b': 2, 'c': 2}, 'validation': {'a': 1, 'b': 1, 'c': 1}})
    train, validation = (create_dataset('', root=str(root), split=split) for split in ('train', 'validation'))
    with pytest.raises(ValueError, match='must cover all 3 classes of the validation set, got 2'):
        check_classes(train, validation, 2)
    check_classes(train, validation, 3)
    check_classes(train, train, 2)


def test_a_split_that_is_not_there_is_not_replaced_by_everything(image_folder, tmp_path):
    assert len(create_dataset('', root=str(image_folder), split='val')) == 10  # a synonym of validation
    assert len(create_dataset('', root=str(image_folder / 'train'), split='validation')) == 19  # a folder of classes
    for split in ('trian', 'test'):
        with pytest.raises(ValueError, match=f"has no split '{split}', only train, validation"):
            create_dataset('', root=str(image_folder), split=split)


def test_an_image_is_augmented_anew_in_every_epoch_and_place(image_folder):
    """As timm would: alike with the same seed; in another way in another epoch, process or batch, or a second time."""

    def augmented(epoch, rank, number, seed=42):
        samples = load(image_folder, seed=seed)[1].dataset
        return [views[1] for views, _ in samples.__getitems__(Draws([3, 3], epoch, rank, number))]

    first, again = augmented(0, 0, 0)
    assert torch.equal(first, augmented(0, 0, 0)[0])
    others = [again, augmented(1, 0, 0)[0], augmented(0, 1, 0)[0], augmented(0, 0, 1)[0], augmented(0, 0, 0, seed=1)[0]]
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize('kwargs', [dict(fraction=0.5), dict(supplement='clean')])
def test_without_clean_views_there_are_no_second_images_that_have_nothing_else(image_folder, kwargs):
    """The batches are those without second images."""
    _, loader = load(image_folder, clean_view=False, **kwargs)
    _, expected = load(image_folder, clean_view=False, singletons='keep')
    for (x, y), (other, target) in zip(loader, expected, strict=True):
        assert len(x) == len(y)
        assert torch.equal(x, other)
        assert torch.equal(y, target)


def test_without_clean_views_the_batches_are_the_same(image_folder):
    _, loader = load(image_folder, no_aug=True, interpolation='bilinear')
    expected = [(x[len(y) :], y) for x, y in loader]
    for use_prefetcher in (True, False):
        _, loader = load(
            image_folder, no_aug=True, interpolation='bilinear', clean_view=False, use_prefetcher=use_prefetcher
        )
        for (x, y), (augmented, target) in zip(loader, expected, strict=True):
            assert torch.equal(y, target)
            torch.testing.assert_close(x, augmented, atol=1e-5, rtol=1e-5)
