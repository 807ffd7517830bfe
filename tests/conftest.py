import io
import json
import logging
import os
import random
import signal
import socket
import sys
import tarfile
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # before torch is imported: one thread for each test process, and its children

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

import train
from timm_synermix import entry
from timm_synermix.engine.build import resolved
from timm_synermix.engine.run import Loaders, Run, Trained

ROOT = Path(__file__).resolve().parent.parent
# Python has the filter of archives since 3.10.12 and 3.11.4.
UNPACKED = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}
if sys.platform == 'win32':  # which has no fork, signals to other processes, locks of folders, limits of files, pipes
    names = 'checkpoint faults finetune folders launch resume run_lock systems validate'
    collect_ignore = [f'test_{name}.py' for name in names.split()]
# Processes that tests start import what stands here, installed or not.
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))


@pytest.fixture(autouse=True)
def isolated(monkeypatch):
    """Every test starts from the same seed, and leaves no logging handler or accelerator state behind."""
    for name in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'ACCELERATE_USE_CPU', 'ACCELERATE_MIXED_PRECISION'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers, logging.root.level = handlers, level
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_image_folder(root: Path, counts: dict[str, dict[str, int]], size: int = 16) -> Path:
    """An image folder of random pictures, `counts[split][class]` of each."""
    generator = np.random.default_rng(0)
    for split, classes in counts.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (size + i % 3, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{i}.png')
    return root


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    """3 classes of 7, 6 and 5 training images and 3 validation images each; class c has one training image more."""
    counts = {'train': {'a': 7, 'b': 6, 'c': 5, 'lone': 1}, 'validation': {'a': 3, 'b': 3, 'c': 3, 'lone': 1}}
    return make_image_folder(tmp_path_factory.mktemp('images'), counts)


@pytest.fixture(scope='session')
def photographs(tmp_path_factory):
    """The first five classes of Tiny-ImageNet: 2,500 training and 250 validation JPEGs of 32x32 pixels."""
    archive = ROOT.parent / 'shared' / 'data' / 'tin100.tar.xz'
    if not archive.exists():
        pytest.skip(f'needs {archive.name}, which is not part of the repository')
    root = tmp_path_factory.mktemp('photographs')
    with tarfile.open(archive) as file:
        members = [member for member in file if member.name.count('/') >= 2]
        classes = sorted({member.name.split('/')[2] for member in members})[:5]
        file.extractall(root, [m for m in members if m.name.split('/')[2] in classes], **UNPACKED)
    return root / 'tin100'


class TrainResult:
    """What a run of train.py left behind."""

    def __init__(self, folder: Path, stdout: str) -> None:
        self.folder = folder
        self.results = json.loads(stdout.rpartition('--result\n')[2])

    def summary(self) -> list[dict[str, float]]:
        header, *rows = (self.folder / 'summary.csv').read_text().split()
        values = ([float(value or 'nan') for value in row.split(',')] for row in rows)
        return [dict(zip(header.split(','), row, strict=True)) for row in values]

    def checkpoint(self, name: str = 'last') -> dict:
        return torch.load(self.folder / f'{name}.pth.tar', weights_only=False)


def make_run(args, accelerator, task, optimizer, batches):
    """A run of a task on batches, without evaluation, folder and trackers."""
    trained = Trained(task, accelerator.prepare_optimizer(optimizer))
    return Run(resolved(args, accelerator), accelerator, trained, Loaders(batches))


SMALL = ['--model', 'test_efficientnet', '--img-size', '32', '-b', '8', '--device', 'cpu', '-j', '0', '--epochs', '1']


@pytest.fixture
def run_train(image_folder, tmp_path, capsys, monkeypatch):
    """Run train.py in this process on the image folder, with a small model and the given flags."""

    def run(*flags: str, data: tuple[str, ...] | None = None, experiment: str = 'run') -> TrainResult:
        data = ('--data-dir', str(image_folder), '--num-classes', '4') if data is None else data
        argv = ['train.py', *data, *SMALL, '--output', str(tmp_path), '--experiment', experiment, *flags]
        monkeypatch.setattr(sys, 'argv', argv)
        AcceleratorState._reset_state(reset_partial_state=True)
        capsys.readouterr()
        entry.run(train)
        return TrainResult(tmp_path / experiment, capsys.readouterr().out)

    return run


@pytest.fixture
def three(monkeypatch):
    """32 images of three labels, each of which is a colour channel that is bright."""
    import datasets  # slow to import

    labels_of = [[0], [1], [2], [0, 1], [1, 2], [], [0, 2], [0, 1, 2]] * 4
    images = []
    for labels in labels_of:
        file, pixels = io.BytesIO(), np.full((16, 16, 3), 20, np.uint8)
        pixels[..., labels] = 220
        Image.fromarray(pixels).save(file, format='png')
        images.append({'bytes': file.getvalue(), 'path': None})
    names = datasets.ClassLabel(names=['red', 'green', 'blue'])
    features = datasets.Features(
        image=datasets.Image(),
        labels=datasets.Sequence(names),
        multihot=datasets.Sequence(datasets.Value('int64')),
        label=names,
    )
    multihot = [[int(label in labels) for label in range(3)] for labels in labels_of]
    columns = dict(image=images, labels=labels_of, multihot=multihot, label=[i % 3 for i in range(32)])
    dataset = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(datasets, 'load_dataset', lambda *args, **kwargs: dataset)


@pytest.fixture
def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def flat(value, name=''):
    """The leaves of nested dicts and lists, by path."""
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, (list, tuple)):
        value = list(enumerate(value))
    else:
        return {name: value}
    return {path: leaf for key, item in value for path, leaf in flat(item, f'{name}/{key}').items()}


def assert_same_run(resumed, whole):
    """Weights, average, optimizer, state of the task, best metric, history and summary.csv."""
    for name in ('last', 'model_best'):
        one, other = resumed.checkpoint(name), whole.checkpoint(name)
        assert one.keys() == other.keys()
        for key in one.keys() - {'args'}:
            leaves, expected = flat(one[key]), flat(other[key])
            assert leaves.keys() == expected.keys()
            for path, leaf in leaves.items():
                same = torch.equal(leaf, expected[path]) if torch.is_tensor(leaf) else leaf == expected[path]
                assert same, f'{name}: {key}{path}: {leaf} != {expected[path]}'
    assert (resumed.folder / 'summary.csv').read_bytes() == (whole.folder / 'summary.csv').read_bytes()
    best = 'model_best.safetensors'
    assert (resumed.folder / best).read_bytes() == (whole.folder / best).read_bytes()


class Kill(BaseException):
    """The end of the process, at an instruction of the test's choice."""


@pytest.fixture
def stop_at(monkeypatch):
    """Make the n-th call of a function of train.py send a signal to the process, or kill it."""

    def stop(name, n, signum):
        original, calls = getattr(train, name), []

        def count(*args, **kwargs):
            calls.append(None)
            if len(calls) == n:
                if signum == signal.SIGKILL:
                    raise Kill
                os.kill(os.getpid(), signum)
            return original(*args, **kwargs)

        monkeypatch.setattr(train, name, count)
        return lambda: monkeypatch.setattr(train, name, original)

    return stop
