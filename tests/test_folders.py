"""What lies in users' folders and data sets besides images in folders of classes, and what the log says of it."""

import io
import logging
import os
import pickle
import random
import signal
import struct
import tarfile
from argparse import Namespace
from itertools import pairwise

import numpy as np
import PIL
import pytest
import timm.data
from conftest import make_image_folder
from PIL import Image
from timm.utils import natural_key
from torchvision import datasets as tv

from timm_synermix.data.classes import check_classes, class_names, class_to_idx, dataset_targets, renumber
from timm_synermix.data.dataset import ReadableImages
from timm_synermix.data.dataset_checks import check_splits
from timm_synermix.data.dataset_factory import create_dataset
from timm_synermix.data.image_folder import FolderReader, natural_order
from timm_synermix.data.overview import log_overview
from timm_synermix.data.sample_dataset import num_clipped
from timm_synermix.engine.loaders import image_mode_of


@pytest.fixture
def in_time():
    """A test that hangs ends."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# The classes' numbers


def as_tar(root, split):
    with tarfile.open(root / f'{split}.tar', 'w') as file:
        file.add(root / split, '.')
    return dict(name='', root=str(root / f'{split}.tar'))


KINDS = {
    'folder': lambda root, split: dict(name='', root=str(root), split=split),
    'memory': lambda root, split: dict(name='', root=str(root), split=split, in_memory=True),
    'tar': as_tar,
    'torch': lambda root, split: dict(name='torch/image_folder', root=str(root), split=split),
}


def colour_folders(root, splits):
    """Every class has one colour, which tells it whatever its number is."""
    for split, classes in splits.items():
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new('RGB', (4, 4), (10 * (ord(name) - ord('a')), i, 0)).save(root / split / name / f'{i}.png')


@pytest.mark.parametrize('kind', KINDS)
def test_validation_has_the_numbers_of_training(tmp_path, kind):
    """Classes b and d have no images there: class e is still number 4."""
    colour_folders(tmp_path, {'train': 'abcde', 'validation': 'ace'})
    numbers = class_to_idx(create_dataset(**KINDS[kind](tmp_path, 'train')))
    assert numbers == dict(a=0, b=1, c=2, d=3, e=4)
    dataset = create_dataset(**KINDS[kind](tmp_path, 'validation'), class_to_idx=numbers)
    images = ReadableImages(dataset)
    for i in range(6):
        image, target = images[i]
        assert image.getpixel((0, 0))[0] == 10 * target
        assert dataset_targets(dataset)[i] == target
    assert sorted({*dataset_targets(dataset)}) == [0, 2, 4]
    assert class_names(dataset) == [*'abcde']


@pytest.mark.parametrize('kind', KINDS)
def test_a_class_that_training_has_not_is_named(tmp_path, kind):
    colour_folders(tmp_path, {'train': 'ace', 'validation': 'abc'})
    numbers = class_to_idx(create_dataset(**KINDS[kind](tmp_path, 'train')))
    with pytest.raises(ValueError, match=r'has classes that training did not have: b\. Training had a, c, e'):
        create_dataset(**KINDS[kind](tmp_path, 'validation'), class_to_idx=numbers)


def test_renumbering_leaves_alone_what_has_no_names_or_the_same():
    digits = create_dataset('sklearn/digits')
    before = dataset_targets(digits)
    renumber(digits, class_to_idx(create_dataset('sklearn/digits', split='train')))
    renumber(digits, {})
    assert np.array_equal(dataset_targets(digits), before)
    renumber(digits, {str(i): 9 - i for i in range(10)})
    assert np.array_equal(dataset_targets(digits), 9 - before)


def test_a_run_measures_a_class_by_its_name(run_train, tmp_path, caplog):
    colour_folders(tmp_path / 'images', {'train': 'abc', 'validation': 'bc'})
    data = ('--data-dir', str(tmp_path / 'images'), '--num-classes', '3')
    run_train('--synermix', data=data)
    assert "Validation: 4 images of 3 classes (smallest: 0 of 'a', largest: 2 of 'b')" in caplog.text
    with pytest.raises(SystemExit):
        run_train('--synermix', '--val-split', 'train', '--train-split', 'validation', data=data)


NAMES = ['polish', 'Polish', '01', '1', '001', 'img10', 'img9', 'IMG9', '²', 'ß', 'b', '_', '10', 'a1b02', 'a01b2']


def test_classes_have_one_order_for_all_times(tmp_path):
    """Names that are equal to timm stand in the order of their letters; the others where timm puts them."""
    expected = sorted(NAMES, key=natural_order)
    for seed in range(20):
        shuffled = random.Random(seed).sample(NAMES, len(NAMES))
        assert sorted(shuffled, key=natural_order) == expected
        for one, other in pairwise(expected):
            if '²' not in (one, other):  # which timm fails for
                assert natural_key(one) < natural_key(other) or (natural_key(one) == natural_key(other) and one < other)
    make_image_folder(tmp_path, {'train': dict.fromkeys(NAMES, 1)})
    assert FolderReader(str(tmp_path / 'train')).class_to_idx == {name: i for i, name in enumerate(expected)}


def test_the_images_of_a_folder_are_timms(image_folder):
    for split in ('train', 'validation'):
        ours, theirs = (
            create(name='', root=str(image_folder), split=split)
            for create in (create_dataset, timm.data.create_dataset)
        )
        assert ours.reader.samples == theirs.reader.samples
        assert ours.reader.class_to_idx == theirs.reader.class_to_idx
        assert ours.filename(0) == theirs.filename(0)


# --class-map


def test_a_class_map_numbers_the_classes(tmp_path, caplog):
    colour_folders(tmp_path, {'train': 'abc'})
    file = tmp_path / 'map.txt'
    for content in ('c\na\nb\n', '\ufeffc\r\na\r\nb', 'c\na\nb\n\n\n'):  # a mark, Windows, empty lines at the end
        file.write_text(content, encoding='utf-8', newline='')
        dataset = create_dataset('', root=str(tmp_path), split='train', class_map=str(file))
        assert class_to_idx(dataset) == dict(c=0, a=1, b=2)
        assert dataset_targets(dataset).tolist() == [1, 1, 2, 2, 0, 0]
    file.with_suffix('.pkl').write_bytes(pickle.dumps(dict(a=2, b=0, c=1)))
    dataset = create_dataset('', root=str(tmp_path), split='train', class_map=str(file.with_suffix('.pkl')))
    assert dataset_targets(dataset).tolist() == [2, 2, 0, 0, 1, 1]
    log_overview('Training', dataset, 3)
    assert not warnings_of(caplog)


def test_a_folder_that_the_class_map_lacks_is_named(run_train, tmp_path, caplog):
    colour_folders(tmp_path / 'images', {'train': 'abc', 'validation': 'abc'})
    (tmp_path / 'map.txt').write_text('c\na\n')
    run_train(
        '--class-map',
        str(tmp_path / 'map.txt'),
        '-b',
        '4',
        data=('--data-dir', str(tmp_path / 'images'), '--num-classes', '2'),
    )
    for what in ('Training', 'Validation'):
        assert f'{what}: --class-map lacks the folders b: 2 images are left out' in warnings_of(caplog)


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('map.txt', b'x\ny\n', "--class-map has none of the classes in '.*train': a, b, c"),
        ('map.txt', 'a\nb\n'.encode('utf-16'), '--class-map: .*map.txt cannot be used: .*utf-8'),
        ('map.txt', b'a\nb\na\n', '--class-map: .*map.txt has a twice'),
        ('map.csv', b'a\nb\nc\n', '--class-map: .*map.csv cannot be used: Unsupported class map file extension'),
        ('map.pkl', b'a\nb\nc\n', '--class-map: .*map.pkl cannot be used'),
        ('map.pkl', pickle.dumps(['a', 'b']), '--class-map: .*map.pkl cannot be used: .*expected a dict'),
        ('map.pkl', pickle.dumps(dict(a='0')), '--class-map: .*map.pkl cannot be used: its values must be numbers'),
        ('map.txt', None, '--class-map must be a file that exists'),
    ],
)
@pytest.mark.usefixtures('in_time')
def test_class_maps_that_are_none(tmp_path, name, content, message):
    colour_folders(tmp_path, {'train': 'abc'})
    os.mkfifo(tmp_path / name) if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        create_dataset('', root=str(tmp_path), split='train', class_map=str(tmp_path / name))


# Folders that are not as expected


def test_a_folder_without_splits(image_folder, tmp_path):
    classes = str(image_folder / 'train')
    message = "expected folders 'train' and 'validation' in .*found a, b, c, lone: .*the same images. --val-split ''"
    for name in ('', 'torch/image_folder'):
        with pytest.raises(ValueError, match=message):
            check_splits(name, classes, 'train', 'validation')
        check_splits(name, str(image_folder), 'train', 'validation')
    with pytest.raises(ValueError, match='found one tar file: training and validation would have the same images'):
        check_splits('', as_tar(image_folder, 'train')['root'], 'train', 'validation')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='found nothing: training and validation would have the same images'):
        check_splits('', str(tmp_path / 'empty'), 'train', 'validation')
    (tmp_path / 'empty').rmdir()
    os.symlink(image_folder / 'train', tmp_path / 'train')
    os.symlink(image_folder / 'train', tmp_path / 'val')
    with pytest.raises(ValueError, match='found train, val: training and validation would have the same images'):
        check_splits('', str(tmp_path), 'train', 'validation')


@pytest.mark.parametrize('flags', [[], ['--dataset', 'torch/image_folder']])
def test_a_run_without_splits(run_train, image_folder, capsys, tmp_path, caplog, flags):
    data = (*flags, '--data-dir', str(image_folder / 'train'), '--num-classes', '4')
    with pytest.raises(SystemExit) as error:
        run_train(data=data)
    assert error.value.code == 2
    assert 'training and validation would have the same images' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()
    run = run_train('--val-split', '', data=data)
    assert 'eval_top1' not in run.summary()[0]
    assert 'Training: 19 images of 4 classes' in caplog.text
    run_train('--val-split', 'train', data=('--data-dir', str(image_folder), '--num-classes', '4'))
    assert "are both 'train': validation has the images of training" in caplog.text


@pytest.mark.parametrize('stray', [True, False])
def test_images_outside_of_folders_of_classes(tmp_path, stray):
    root = make_image_folder(tmp_path, {'validation': {'a': 1, 'b': 1}})
    for name in 'ab':
        (root / 'validation' / name / '0.png').rename(root / 'validation' / f'ILSVRC_{name}.png')
    if stray:
        make_image_folder(tmp_path / 'validation', {'x': {'deep': 1}})
    found = 'besides the folders deep' if stray else 'and no folders'
    with pytest.raises(
        ValueError, match=f'expected a folder for each class in .*found .* ILSVRC_a.png, ILSVRC_b.png, {found}'
    ):
        create_dataset('', root=str(root), split='validation')
    assert len(create_dataset('', root=str(root), split='validation', labelled=False)) == 2 + stray


def test_the_log_says_what_is_in_a_folder_and_what_is_left_out(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = make_image_folder(
        tmp_path,
        {
            'train': {'cat': 5, 'dog': 3, 'dog/.ipynb_checkpoints': 1},
            'train/more': {'cat': 2},
        },
    )
    for name in ('tif', 'other'):
        (root / 'train' / name).mkdir()
    for i, name in enumerate(['x.tif', 'x.TIF', 'tif/x.webp', 'notes.txt', 'Makefile']):
        (root / 'train' / name).write_bytes(bytes(i))
    dataset = create_dataset('', root=str(root), split='train')
    log_overview('Training', dataset, 4)
    first, *others = [record.getMessage() for record in caplog.records]
    assert first == (
        "Training: 11 images of 3 classes (smallest: 1 of '.ipynb_checkpoints', largest: 7 of 'cat'); 5 other files "
        'ignored (2 .tif, 1 Makefile, 1 .txt, 1 .webp)'
    )
    assert others == [
        "Training: 2 .tif, 1 .webp ignored; to read them: --input-key '.jpeg;.jpg;.png;.tif;.webp'",
        'Training: the folders other, tif have no images',
        'Training: the hidden folders dog/.ipynb_checkpoints are read as well, as classes; delete them if not',
        "Training: the folders cat, more/cat are one class, 'cat': the last name counts",
        "Training: the model has 4 outputs, the images 3 classes. If they are not the first of the model's, see "
        '--num-classes 3 (and --class-map).',
    ]
    key = '.jpeg;jpg; .PNG;.tif;.webp'  # in whatever spelling
    assert len(create_dataset('', root=str(root / 'train' / 'tif'), split='x', input_key=key, labelled=False)) == 1


def test_an_ordinary_folder_has_no_warnings(image_folder, caplog):
    caplog.set_level(logging.INFO)
    for kind in KINDS.values():
        log_overview('Training', create_dataset(**kind(image_folder, 'train')), 4)
    assert {record.getMessage() for record in caplog.records if 'Training' in record.getMessage()} == {
        "Training: 19 images of 4 classes (smallest: 1 of 'lone', largest: 7 of 'a')"
    }
    assert not warnings_of(caplog)


@pytest.mark.parametrize('flags', [[], ['--num-classes', '9']])
def test_a_run_with_other_outputs_than_classes(run_train, image_folder, caplog, flags):
    run_train(data=('--data-dir', str(image_folder), *flags))
    (warning,) = [line for line in warnings_of(caplog) if 'outputs' in line]
    assert f'has {9 if flags else 1000} outputs, the images 4 classes' in warning
    assert '--num-classes 4' in warning


@pytest.mark.usefixtures('in_time')
def test_reading_a_folder_ends(tmp_path, caplog):
    """Links to folders above, links among folders, pipes and dead links; what is reached twice is as in timm."""
    root = make_image_folder(tmp_path / 'images', {'train': {'a': 2, 'b': 1}})
    other = make_image_folder(tmp_path, {'other': {'c': 2, 'd': 1}}) / 'other'
    train = root / 'train'
    os.symlink(train, train / 'a' / 'up')
    os.symlink(other, train / 'other')
    for i in range(8):  # 8! ways through them
        (other / 'c' / f'link{i}').symlink_to(other / 'd')
        (other / 'd' / f'link{i}').symlink_to(other / 'c')
    os.symlink('self.png', train / 'b' / 'self.png')
    os.symlink('/nowhere', train / 'b' / 'dead.png')
    os.symlink('self', train / 'b' / 'self')
    os.mkfifo(train / 'b' / 'pipe.png')
    os.symlink('pipe.png', train / 'b' / 'link.png')
    dataset = create_dataset('', root=str(root), split='train')
    names = sorted(os.path.relpath(path, train) for path, _ in dataset.reader.samples if 'link' not in path)
    expected = [
        'a/0.png',
        'a/1.png',
        'b/0.png',
        'b/dead.png',
        'b/self.png',
        'other/c/0.png',
        'other/c/1.png',
        'other/d/0.png',
    ]
    assert names == expected
    log_overview('Training', dataset)
    assert 'left out a/up, b/link.png, b/pipe.png' in caplog.text
    with pytest.raises(ValueError, match='might never end, for a/up'):
        create_dataset('torch/image_folder', root=str(root), split='train')


@pytest.mark.skipif(os.name != 'posix', reason='needs names of bytes')
def test_names_of_classes_are_utf8(tmp_path):
    folder = os.fsencode(tmp_path) + b'/train/caf\xe9'
    try:
        os.makedirs(folder)
    except OSError:
        pytest.skip('this file system has no such names')
    Image.new('RGB', (4, 4)).save(os.fsdecode(folder) + '/0.png')
    with pytest.raises(ValueError, match=r"names of classes must be UTF-8, got the folder b'caf\\xe9'"):
        create_dataset('', root=str(tmp_path), split='train')


# Labels


def test_images_without_a_label():
    class Labels(list):
        targets = property(lambda self: self)

    train, unlabelled = Labels([0, 1, 1]), Labels([-1, None, 1])
    assert dataset_targets(unlabelled).tolist() == [-1, -1, 1]
    check_classes(train, train, 2)
    for pair, name in (((train, unlabelled), 'validation'), ((unlabelled, train), 'training')):
        with pytest.raises(ValueError, match=f'2 of the 3 images of the {name} set have no label .*--val-split'):
            check_classes(*pair, 2)


def png_bytes(colour):
    file = io.BytesIO()
    Image.new('RGB', (8, 8), colour).save(file, 'png')
    return dict(bytes=file.getvalue(), path=None)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Writes a Hugging Face data set of some columns, and gives its name."""
    datasets = pytest.importorskip('datasets', reason='needs the package datasets')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.chdir(tmp_path)

    def write(image='image', label='label', labels=(0, 1, 2), names=('a', 'b', 'c'), split='train', name='me/cats'):
        kind = (
            datasets.ClassLabel(names=list(names))
            if names
            else datasets.Value('string' if isinstance(labels[0], str) else 'int64')
        )
        features = datasets.Features({image: datasets.Image(), label: kind, 'size': datasets.Value('int64')})
        columns = {image: [png_bytes((i, 0, 0)) for i in range(3)], label: list(labels), 'size': [8] * 3}
        os.makedirs(name, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(f'{name}/{split}-00000-of-00001.parquet')
        return lambda split='train', **kwargs: create_dataset(f'hfds/{name}', str(tmp_path / 'cache'), split, **kwargs)

    return write


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize(
    ('columns', 'kwargs', 'message'),
    [
        (
            dict(label='kind'),
            {},
            "--target-key must be the column of the labels of .*me/cats, got 'label' of kind, size",
        ),
        (dict(image='photo'), {}, "--input-key must be the column of the images .*got 'image' of photo, label, size"),
        ({}, dict(target_key='kind'), "got 'kind' of label, size"),
        ({}, dict(input_key='size'), r'must hold images \(--input-key\)'),
        ({}, dict(split='val'), r'Unknown split "val".* \(--train-split, --val-split'),
        (dict(labels='xyz', names=None), {}, "--target-key 'label' .* must hold numbers, or --class-map"),
    ],
)
def test_columns_of_a_hugging_face_data_set(hub, columns, kwargs, message):
    create = hub(**columns)
    with pytest.raises(ValueError, match=message):
        create(**kwargs)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_numbers_of_a_hugging_face_data_set(hub, tmp_path):
    create = hub(labels='xyz', names=None)
    (tmp_path / 'map.txt').write_text('z\ny\nx\n')
    assert dataset_targets(create(class_map='map.txt')).tolist() == [2, 1, 0]
    (tmp_path / 'map.txt').write_text('z\ny\n')
    with pytest.raises(ValueError, match="--class-map lacks the class 'x'"):
        create(class_map='map.txt')
    other = hub(name='me/dogs', labels=(0, 1, 1), names=('c', 'a', 'b'))(class_to_idx=dict(a=0, b=1, c=2))
    assert dataset_targets(other).tolist() == [other[i][1] for i in range(3)] == [2, 0, 0]


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize(
    ('columns', 'message'),
    [
        (dict(labels=(-1, -1, -1)), r"split 'train' have no label \(it is -1\): .*--val-split"),
        (dict(label='kind'), "first image cannot be read, KeyError: 'label' .*--target-key"),
        (dict(image='photo'), 'first image cannot be read, .*--input-key'),
        ({}, None),
    ],
)
def test_the_first_image_of_a_stream(hub, tmp_path, columns, message):
    hub(**columns)

    def create():
        return create_dataset('hfids/me/cats', str(tmp_path / 'cache'), 'train', num_samples=3, is_training=True)

    if message is None:
        assert len(create()) == 3
        return
    with pytest.raises(ValueError, match=message):
        create()


# Data sets that are not there


@pytest.mark.parametrize(
    ('name', 'kwargs', 'message'),
    [
        ('torch/cifar10', {}, r'--dataset torch/cifar10, split .* in --data-dir .*not found.*\(--dataset-download\)'),
        ('torch/cifar10', dict(split='trian'), "--val-split of torch/cifar10 must be among .*got 'trian'"),
        ('torch/imagenet', {}, '--dataset torch/imagenet.* is not present'),
        ('torch/cifar', {}, 'Unknown torchvision dataset cifar'),
        ('torch/image_folder', {}, '--dataset torch/image_folder.*Couldn.t find any class folder'),
        ('torch/cifar10', dict(root=None), '--data-dir must name the folder of torch/cifar10, got none'),
        ('torch/cifar10', dict(class_map='x.txt'), '--class-map has no effect on --dataset torch/cifar10, got x.txt'),
        ('sklearn/digits', dict(target_key='x'), '--target-key has no effect on --dataset sklearn/digits, got x'),
        ('hf/cats', {}, "--dataset must begin with one of torch/, hfds/, .*got 'hf/cats'"),
        ('tfds/cats', {}, '--dataset tfds/cats.*install it with pip'),
        ('', dict(target_key='kind'), '--target-key is not for image folders, whose folders are the classes, got kind'),
    ],
)
def test_data_sets_that_are_not_there(tmp_path, name, kwargs, message):
    if name == 'tfds/cats':
        try:
            import tensorflow_datasets  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip('tensorflow_datasets is installed')
    with pytest.raises(ValueError, match=message):
        create_dataset(name, **{**dict(root=str(tmp_path), split='train'), **kwargs})


@pytest.mark.parametrize(
    ('split', 'message'),
    [
        ('train', r"split 'train' in --data-dir .*split train not found in info .* \(--train-split"),
        ('t-{0..1}.tar', r'num_samples not specified in train mode. \(--train-num-samples'),
        ('t-{0..1}.tar|9', 'of the split .* there is no .*t-0.tar, .*t-1.tar'),
    ],
)
def test_web_data_sets_that_are_not_there(tmp_path, split, message):
    pytest.importorskip('webdataset', reason='needs the package webdataset')
    with pytest.raises(ValueError, match=message):
        create_dataset('wds/x', root=str(tmp_path), split=split, is_training=True)


def test_processes_share_a_number_of_images(tmp_path, monkeypatch):
    pytest.importorskip('webdataset', reason='needs the package webdataset')
    with tarfile.open(tmp_path / 'v-0.tar', 'w') as file:
        file.add(__file__, 'x.txt')
    create = lambda: create_dataset('wds/x', root=str(tmp_path), split='v-{0..0}.tar')  # noqa: E731
    create()
    monkeypatch.setattr('torch.distributed.is_initialized', lambda: True)
    monkeypatch.setattr('torch.distributed.get_world_size', lambda: 2)
    monkeypatch.setattr('torch.distributed.get_rank', lambda: 0)
    with pytest.raises(ValueError, match=r'--val-num-samples .* must say how many images .* for 2 processes to share'):
        create()


def test_tar_files_have_their_endings(image_folder):
    with pytest.raises(ValueError, match=r'--input-key is not for tar files, got \.tif'):
        create_dataset(**as_tar(image_folder, 'train'), input_key='.tif')


# Modes of images


def test_the_mode_fits_the_channels():
    def mode(in_chans, given=None):
        return image_mode_of(Namespace(input_img_mode=given), in_chans)

    assert (mode(1), mode(3), mode(4, 'CMYK'), mode(3, 'HSV'), mode(2, 'LA')) == ('L', 'RGB', 'CMYK', 'HSV', 'LA')
    for in_chans, given, message in (
        (4, None, r'--input-img-mode must be given where the model takes 4 channels \(--in-chans\): RGBA or CMYK'),
        (4, 'RGB', r'--input-img-mode RGB has 3 channels, but the model takes 4 channels \(--in-chans\)'),
        (3, 'rgb', '--input-img-mode must be a mode of Pillow, as L, RGB or RGBA, got rgb'),
        (7, None, '--in-chans must be 1 to 4 for images, got 7'),
    ):
        with pytest.raises(ValueError, match=message):
            mode(in_chans, given)


READS_YCBCR = int(PIL.__version__.partition('.')[0]) >= 13  # earlier releases of Pillow cannot read those they write


def files_of_all_modes(folder):
    """Images of every mode that a file can have, some with palette and transparency."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 4), dtype=np.uint8)
    whole = Image.fromarray(pixels)
    for mode in ('RGBA', 'RGB', 'L', 'LA', 'P', '1'):
        whole.convert('RGB' if mode == 'P' else 'RGBA').convert(mode).save(folder / f'{mode}.png')
    whole.convert('P').save(folder / 'transparent.png', transparency=3)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / 'I16.png')
    for mode in ('CMYK', 'F', 'YCbCr')[: 3 if READS_YCBCR else 2]:
        whole.convert('L' if mode == 'F' else 'RGB').convert(mode).save(folder / f'{mode}.tif')


@pytest.mark.parametrize('mode', [None, 'RGB', 'L', 'RGBA', 'LA', 'CMYK', 'YCbCr', 'HSV', 'P', '1', 'F'])
@pytest.mark.parametrize('name', ['', 'torch/image_folder'])
def test_images_in_memory_are_those_of_the_files(tmp_path, name, mode):
    files_of_all_modes(tmp_path / 'train' / 'a')
    endings = {} if name else dict(input_key='.png;.tif')
    files, memory = (
        create_dataset(name, str(tmp_path), 'train', input_img_mode=mode, in_memory=held, **endings)
        for held in (False, True)
    )
    files, held = ReadableImages(files), ReadableImages(memory)
    modes = set()
    for index in [*range(len(files))] * 2:
        (image, target), (expected, expected_target) = held[index], files[index]
        assert target == expected_target == 0
        assert (image.mode, image.size, image.getpalette()) == (expected.mode, expected.size, expected.getpalette())
        assert image.tobytes() == expected.tobytes()
        image.paste(0, (0, 0, *image.size))
        modes.add(image.mode)
    assert len(files) == 10 + READS_YCBCR
    assert len(modes) > 7 + READS_YCBCR if mode is None and not name else modes == {mode or 'RGB'}
    assert memory.filename(3) == files.dataset.filename(3) if not name else True
    assert num_clipped(held) == num_clipped(files)


def mnist(root, count=8):
    """Two small files in the format of MNIST for each split: images of one grey each, of classes 0 and 1."""
    (root / 'MNIST' / 'raw').mkdir(parents=True)
    for split in ('train', 't10k'):
        images = np.repeat(np.arange(count, dtype=np.uint8) * 10, 28 * 28)
        header = struct.pack('>4i', 0x803, count, 28, 28)
        (root / 'MNIST' / 'raw' / f'{split}-images-idx3-ubyte').write_bytes(header + images.tobytes())
        labels = np.arange(count, dtype=np.uint8) % 2
        (root / 'MNIST' / 'raw' / f'{split}-labels-idx1-ubyte').write_bytes(
            struct.pack('>2i', 0x801, count) + labels.tobytes()
        )


@pytest.mark.parametrize('held', [False, True])
def test_the_mode_holds_for_torchvisions_data_sets(tmp_path, held):
    mnist(tmp_path)
    for mode in ('L', 'RGB'):
        dataset = create_dataset('torch/mnist', str(tmp_path), 'train', input_img_mode=mode, in_memory=held)
        image, target = ReadableImages(dataset)[3]
        assert (image.mode, image.getextrema(), int(target)) == (mode, (30, 30) if mode == 'L' else ((30, 30),) * 3, 1)
        assert isinstance(dataset, tv.MNIST) != held


@pytest.mark.parametrize('flags', [['--synermix'], ['--in-memory', '--in-chans', '1']])
def test_a_run_of_mnist(run_train, tmp_path, flags):
    mnist(tmp_path / 'data')
    data = ('--dataset', 'torch/mnist', '--data-dir', str(tmp_path / 'data'), '--num-classes', '10')
    assert len(run_train(*flags, '--no-aug', data=data).summary()) == 1


@pytest.mark.parametrize('flags', [['--synermix'], ['--in-memory'], ['-j', '1']])
def test_images_of_sixteen_bits_are_counted_once(run_train, tmp_path, caplog, flags):
    root = make_image_folder(tmp_path / 'images', {'train': {'a': 6, 'b': 6}, 'validation': {'a': 2, 'b': 2}})
    for i in range(3):
        Image.fromarray(np.full((16, 16), 200 + 50 * i, np.uint16)).save(
            root / 'train' / 'a' / f'{i}.png'
        )  # one is white
        Image.fromarray(np.full((16, 16), 40000, np.uint16)).save(root / 'train' / 'b' / f'{i}.png')
    run_train(*flags, '--epochs', '2', '-b', '12', data=('--data-dir', str(root), '--num-classes', '2'))
    (warning,) = [line for line in warnings_of(caplog) if '8 bits' in line]
    assert warning.startswith('Train: 0: 4 images have more than 8 bits a pixel; what is above 255 becomes white')
    assert 'mogrify -depth 8' in warning
