"""The benchmarks measure what they say, and the grid driver goes on where it was."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import scipy.ndimage
import timm
import torch
import yaml
from conftest import ROOT
from PIL import Image, ImageEnhance

import train
from timm_synermix import SynerMixTask, intra_class_mix

sys.path.append(str(ROOT / 'benchmarks'))
import bench
import downstream
import naive
import reproduce
import tables
from measured_train import UnmixedTask
from measuring import Row, compare, peak_memory


def test_the_naive_algorithm_is_synermix(monkeypatch):
    """Same model, same draws: the same loss and gradients, so that its time is that of the same thing."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=6).double()
    clean, augmented = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)
    target = torch.tensor([4, 0, 4, 2, 0, 4, 2, 5])
    draws = torch.rand(8, dtype=torch.float64)
    order = iter([draws[target == c] for c in target.unique()])
    monkeypatch.setattr(naive.torch, 'rand', lambda n, device: next(order))
    losses = [naive.loss(model, clean, augmented, target, 0.3)]
    monkeypatch.undo()
    losses[0].backward()
    gradients = [[p.grad.clone() for p in model.parameters()]]
    model.zero_grad()
    monkeypatch.setattr('timm_synermix.task.row_weight', lambda row, **_: intra_class_mix_weight(row, draws))
    task = SynerMixTask(model, criterion_kwargs=dict(smoothing=0.0), beta=0.3, verbose=False)
    model.double()
    losses.append(task(torch.cat([clean, augmented]), target)['loss'])
    losses[1].backward()
    gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def intra_class_mix_weight(row, draws):
    return torch.stack([draws[i] / draws[row == row[i]].sum() for i in range(len(row))])


def test_the_naive_mix_has_a_row_for_each_class():
    feature, target = torch.randn(7, 3), torch.tensor([3, 3, 0, 1, 1, 1, 0])
    mixed, classes = naive.mix(feature, target)
    _, expected = intra_class_mix(feature, target)
    assert classes.tolist() == expected[expected >= 0].tolist() == [0, 1, 3]
    assert mixed.shape == (3, 3)


def test_a_ratio_is_the_median_over_the_rounds():
    row = compare('a', 'here', 'b', [2.0, 9.0, 6.0], [1.0, 3.0, 1.0], '≤ 2')
    assert row == Row('a', 'here', 'b', 3.0, 2.0, 6.0, '≤ 2', '')
    text = bench.markdown('today', [row], [('import timm', 1.5, '')], [('mix', 0.25)])
    assert '| a | here | b | 3.00 | 2.00 to 6.00 | ≤ 2 |  |' in text
    assert '| import timm | 1.500 |' in text
    assert '| mix | 0.25 |' in text


@pytest.fixture
def grid(tmp_path):
    small = dict(
        model='test_efficientnet', img_size=32, batch_size=8, epochs=1, warmup_epochs=0, workers=0, cohesion=True
    )
    path = tmp_path / 'small.yaml'
    runs = {'none': {}, 'SynerMix, fixed': {'synermix': True, 'synermix_batch': 'fixed'}}
    path.write_text(
        yaml.safe_dump({'classes': 3, 'images_per_class': 5, 'train': small, 'runs': runs}, sort_keys=False)
    )
    return path


def run_grid(grid, image_folder, *extra):
    command = [sys.executable, ROOT / 'benchmarks' / 'reproduce.py', grid, '--data-dir', image_folder]
    command += ['--output', grid.parent, '--seeds', '1', *extra]
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def test_a_grid_is_trained_once(grid, image_folder):
    text = run_grid(grid, image_folder, '--jobs', '2')
    folder = grid.parent / 'small'
    assert len(list((folder / 'data' / 'train').glob('*/*'))) == 15
    results = json.loads((folder / 'results.json').read_text())['results']
    assert [(result['run'], result['seed']) for result in results] == [('none', 1), ('SynerMix, fixed', 1)]
    assert f'| none | 1 | {results[0]["eval_top1"]:.4g} |' in text
    weights = folder / 'none-1' / 'last.pth.tar'
    written = weights.stat().st_mtime_ns
    (folder / 'synermix-fixed-1.json').unlink()  # as if it was killed when all but this was done
    text = run_grid(grid, image_folder, '--budget-minutes', '0.01')
    assert 'Left out (start again to go on): SynerMix, fixed, seed 1.' in text
    run_grid(grid, image_folder)
    assert weights.stat().st_mtime_ns == written
    assert len(json.loads((folder / 'results.json').read_text())['results']) == 2


@pytest.mark.filterwarnings('ignore:An input array is constant')  # of two runs that may be alike
def test_what_the_networks_of_a_grid_are_good_for(grid, image_folder, monkeypatch):
    run_grid(grid, image_folder, '--jobs', '2')
    folder = grid.parent / 'small'
    monkeypatch.setattr(sys, 'argv', ['downstream.py', str(folder), '--data-dir', str(image_folder), '--device', 'cpu'])
    downstream.main()
    results = json.loads((folder / 'downstream.json').read_text())
    assert [result['run'] for result in results] == ['none', 'SynerMix, fixed']
    for result in results:
        assert all(0 <= result[key] <= 100 for key in ('ece', 'knn', 'corrupted'))
        assert 'few_shot' not in result  # three images of each other class are too few
    text = (folder / 'downstream.md').read_text()
    assert f'| none | 1 | {results[0]["ece"]:.4g} |' in text
    assert Image.open(folder / 'downstream.png').width > 500
    # the images, the classes and the weights are those that the training evaluated
    network = downstream.Network(folder / 'none-1', 'cpu')
    classes = downstream.class_names(folder / 'data' / 'validation')
    images, target = downstream.load_images(folder / 'data' / 'validation', classes, network.config)
    assert len(classes) == 3
    assert downstream.accuracy(network(images)[0].argmax(1), target) == pytest.approx(results[0]['eval_top1'])


def test_few_shot_accuracy():
    torch.manual_seed(0)
    target = torch.arange(30).repeat(12)
    assert downstream.few_shot(torch.eye(30)[target] + 0.01 * torch.randn(360, 30), target) == 100
    assert downstream.few_shot(torch.randn(360, 30), target) == pytest.approx(5, abs=1)  # one of 20


def test_corruptions():
    """Against scipy and Pillow; each is stronger from strength to strength."""
    torch.manual_seed(0)
    pixels = (scipy.ndimage.gaussian_filter(np.random.rand(32, 32, 3), 1, axes=(0, 1)) * 255).astype(np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    for corrupt, strengths in downstream.CORRUPTIONS:
        distances = [(corrupt(image, strength) - image).square().mean().item() for strength in strengths]
        assert 0 < distances[0] < distances[-1]
    assert (downstream.noise(image, 0.1) - image).std().item() == pytest.approx(0.1, abs=0.005)
    expected = scipy.ndimage.gaussian_filter(image[0].numpy(), 1.0, axes=(1, 2), mode='mirror')
    np.testing.assert_allclose(downstream.blur(image, 1.0)[0], expected, atol=1e-4)
    expected = np.array(Image.fromarray(pixels).resize((16, 16), Image.BOX).resize((32, 32), Image.BOX))
    np.testing.assert_allclose(255 * downstream.pixelate(image, 0.5)[0].permute(1, 2, 0), expected, atol=1.01)
    expected = ImageEnhance.Contrast(Image.fromarray(pixels[:, :, 0])).enhance(0.4)
    np.testing.assert_allclose(255 * downstream.contrast(image[:, :1], 0.4)[0, 0], np.array(expected), atol=1.5)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'JPEG', quality=50)
    np.testing.assert_array_equal(255 * downstream.jpeg(image, 50)[0].permute(1, 2, 0), np.array(Image.open(file)))


def test_a_grid_in_a_tar_file_and_in_settings(grid, image_folder, tmp_path):
    """Each run in each setting; the file is unpacked once; a picture is drawn."""
    archive = tmp_path / 'images.tar'
    with tarfile.open(archive, 'w') as file:
        file.add(image_folder, 'some/folder')
    content = yaml.safe_load(grid.read_text())
    content['settings'] = {'beta 0.2': {'synermix_beta': 0.2}, 'beta 0.7': {'synermix_beta': 0.7}}
    content['runs'] = {'no mix': {'synermix': True, 'unmixed': True}}
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    run_grid(grid, archive, '--jobs', '2')
    folder = grid.parent / 'small'
    results = json.loads((folder / 'results.json').read_text())['results']
    assert [result['run'] for result in results] == ['no mix, beta 0.2', 'no mix, beta 0.7']
    assert len({result['eval_cdnv'] for result in results}) == 2
    assert all(result['memory_mb'] > 50 and result['seconds'] > 0 for result in results)
    assert Image.open(folder / 'results.png').width > 500
    (unpacked,) = folder.glob('images.tar-*/some/folder')
    written = unpacked.stat().st_mtime_ns
    run_grid(grid, archive)
    assert unpacked.stat().st_mtime_ns == written
    text = (folder / 'results.md').read_text()
    assert f'torch {torch.__version__.split("+")[0]}' in text


def test_a_grid_ends_in_time(grid, image_folder):
    """A run that takes too long is stopped, and goes on in the next call; a signal stops it too."""
    content = yaml.safe_load(grid.read_text())
    content['train']['epochs'] = 100000
    content['runs'] = {'long': {}}
    grid.write_text(yaml.safe_dump(content))
    log = grid.parent / 'small' / 'long-1.log'
    start = time.time()
    text = run_grid(grid, image_folder, '--budget-minutes', '0.3')
    assert time.time() - start < 60
    assert 'Left out (start again to go on): long, seed 1 (stopped on the way).' in text
    assert log.read_text().count('Interrupted.') == 1
    command = [sys.executable, ROOT / 'benchmarks' / 'reproduce.py', grid, '--data-dir', image_folder]
    command += ['--output', grid.parent, '--seeds', '1']
    driver = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    while 'Train: ' not in log.read_text().rpartition('Interrupted.')[2]:
        time.sleep(0.1)
        assert driver.poll() is None
    driver.send_signal(signal.SIGTERM)
    text, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert 'Interrupted. Start again to go on.' in text
    assert log.read_text().count('Interrupted.') == 2  # and the driver has waited for it
    assert float((grid.parent / 'small' / 'long-1.seconds').read_text()) > 18
    assert not (grid.parent / 'small' / 'long-1.json').exists()


def test_unmixed_is_the_loss_of_each_clean_image():
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=6).eval()
    input, target = torch.randn(10, 3, 32, 32), torch.tensor([4, 0, 4, 2, 4])
    losses = UnmixedTask(model, criterion_kwargs=dict(smoothing=0.0), beta=0.3, verbose=False)(input, target)
    expected = [torch.nn.functional.cross_entropy(model(input[part]), target) for part in (slice(5), slice(5, 10))]
    torch.testing.assert_close(losses['intra_loss'], expected[0])
    torch.testing.assert_close(losses['loss'], 0.3 * expected[0] + 0.7 * expected[1])


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ([], '--data-dir must name the images of'),
        (['--data-dir', '/nowhere'], '--data-dir must be a folder or tar file that exists, got /nowhere'),
    ],
)
def test_a_grid_needs_images(grid, flags, message):
    command = [sys.executable, ROOT / 'benchmarks' / 'reproduce.py', grid, '--output', grid.parent, *flags]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert message in process.stderr


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ({'train': {}}, "must be a mapping with 'train' and 'runs'"),
        (None, "must be a mapping with 'train' and 'runs'"),
        ({'train': {}, 'runs': {'A B': {}, 'a_b': {}}}, 'named a_b, which must be one of a kind'),
        ({'train': {}, 'runs': {'a/b': {}}}, 'named a/b, which must be one of a kind'),
        ({'train': {}, 'runs': {'a': {'lr': 1}}, 'settings': {'s': {'lr': 2}}}, 'has lr of the run and of the setting'),
    ],
)
def test_a_grid_that_is_none(tmp_path, content, message):
    (tmp_path / 'grid.yaml').write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        reproduce.Grid(tmp_path / 'grid.yaml')


def test_a_class_named_train(tmp_path):
    for split in ('test', 'train', 'validation'):
        for name in ('apple', 'train'):
            (tmp_path / 'x' / split / name).mkdir(parents=True)
    part = {'classes': None, 'images_per_class': None}
    assert reproduce.prepare_data(tmp_path, tmp_path / 'out', part) == tmp_path / 'x'
    with pytest.raises(ValueError, match='--data-dir must have train/ and validation/, got'):
        reproduce.prepare_data(tmp_path / 'x' / 'test', tmp_path / 'out', part)


@pytest.mark.parametrize('path', sorted((ROOT / 'benchmarks' / 'grids').glob('*.yaml')), ids=lambda path: path.stem)
def test_the_grids_have_flags_of_train_py(path):
    known = {action.dest for action in train.parser._actions} | {'unmixed'}
    for name, flags in reproduce.Grid(path).flags.items():
        assert flags.keys() <= known, name


def test_a_grid_refuses_results_of_another(grid, image_folder):
    folder = grid.parent / 'small'
    folder.mkdir()
    (folder / 'none-1.json').write_text(json.dumps(dict(run='none', seed=1, setting=dict(flags={}))))
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_grid(grid, image_folder)
    assert 'none-1.json is of other flags or data; remove it' in error.value.stderr


def test_a_run_that_fails_is_the_last(grid, image_folder):
    content = yaml.safe_load(grid.read_text())
    content['runs'] = {'good': {}, 'bad': {'lr': -1}, 'never': {}}
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_grid(grid, image_folder)
    folder = grid.parent / 'small'
    assert f'bad, seed 1 failed: see {folder / "bad-1.log"}' in error.value.stderr
    assert '--lr must be at least 0, got -1.0' in (folder / 'bad-1.log').read_text()
    assert [result['run'] for result in json.loads((folder / 'results.json').read_text())['results']] == ['good']
    assert not (folder / 'never-1.log').exists()


def allocate(megabytes):
    torch.ones(megabytes, 2**18)


def test_peak_memory_is_that_of_the_function():
    """Whatever the process that asks has used before."""
    allocate(800)
    small, large = peak_memory(allocate, 20), peak_memory(allocate, 220)
    assert large - small == pytest.approx(200, abs=20)
    assert small < 100


def test_a_table_has_mean_and_standard_deviation():
    results = [{'run': 'a', 'eval_top1': top1, 'seconds': 10.0} for top1 in (40.0, 42.0)]
    rows = tables.table(['a', 'b'], results).splitlines()
    assert rows[2].startswith('| a | 2 | 41 ± 1.4 | - |')
    assert rows[3].startswith('| b | 0 | - |')
