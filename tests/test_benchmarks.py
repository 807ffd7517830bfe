"""The benchmarks measure what they say, and the grid driver goes on where it was."""

import io
import json
import math
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import timm
import torch
import yaml
from conftest import ROOT, make_image_folder
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageEnhance
from timm.loss import SoftTargetCrossEntropy
from torch.nn import functional as F

import train
from timm_synermix import SynerMixTask, intra_class_mix

sys.path.append(str(ROOT / 'benchmarks'))
import bench
import beta_curves
import downstream
import naive
import normalized_losses
import reproduce
import tables
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
    monkeypatch.setattr('timm_synermix.task.synermix.row_weight', lambda row, **_: intra_class_mix_weight(row, draws))
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


@pytest.mark.slow
def test_a_grid_is_trained_once(grid, image_folder):
    text = run_grid(grid, image_folder, '--jobs', '2')
    folder = grid.parent / 'small'
    assert len(list((folder / 'data' / 'train').glob('*/*'))) == 15
    results = json.loads((folder / 'results.json').read_text())['results']
    assert [(result['run'], result['seed']) for result in results] == [('none', 1), ('SynerMix, fixed', 1)]
    assert f'| none | 1 | {results[0]["eval_top1"]:.4g} |' in text
    weights = folder / 'none-1' / 'last.pth.tar'
    written = weights.stat().st_mtime_ns
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_grid(grid, image_folder, '--runs', 'none', 'some')
    assert '--runs must be of the grid, got some' in error.value.stderr
    text = run_grid(grid, image_folder, '--seeds', '2', '--budget-minutes', '0', '--runs', 'none')
    assert 'Left out (start again to go on): none, seed 2.' in text
    (folder / 'synermix-fixed-1.json').unlink()  # as if it was killed when all but this was done
    text = run_grid(grid, image_folder, '--budget-minutes', '0')
    assert 'Left out (start again to go on): SynerMix, fixed, seed 1.' in text
    run_grid(grid, image_folder)
    assert weights.stat().st_mtime_ns == written
    text = run_grid(grid, image_folder, '--seeds', '2', '--budget-minutes', '0')  # does not forget the other seed
    assert 'Left out (start again to go on): none, seed 2; SynerMix, fixed, seed 2.' in text
    assert len(json.loads((folder / 'results.json').read_text())['results']) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:invalid value', 'ignore:divide by zero')  # correlations of two runs
def test_what_the_networks_of_a_grid_are_good_for(grid, tmp_path, monkeypatch):
    """Of classes in timm's order, which is not that of Python, and with classes that the grid leaves out."""
    counts = {'a': 4, 'B': 6, 'c10': 9}
    images = {'train': counts, 'validation': {**counts, **{f'u{number}': 6 for number in range(20)}}}
    folder = make_image_folder(tmp_path / 'images', images)
    content = yaml.safe_load(grid.read_text())
    grid.write_text(yaml.safe_dump({**content, 'images_per_class': None}, sort_keys=False))
    run_grid(grid, folder, '--jobs', '2')
    output = grid.parent / 'small'
    monkeypatch.setattr(sys, 'argv', ['downstream.py', str(output), '--data-dir', str(folder), '--device', 'cpu'])
    downstream.main()
    results = json.loads((output / 'downstream.json').read_text())
    assert [result['run'] for result in results] == ['none', 'SynerMix, fixed']
    assert all(0 <= result[key] <= 100 for result in results for key in downstream.MEASURED)
    assert f'| none | 1 | {results[0]["knn"]:.4g} |' in (output / 'downstream.md').read_text()
    assert Image.open(output / 'downstream.png').width > 500
    network = downstream.Network(output / 'none-1', 'cpu')
    wrong = {'a': 1, 'B': 2, 'c10': 0}
    data = {split: downstream.load_images(folder / split, wrong, network.config) for split in images}
    with pytest.raises(RuntimeError, match='as at the end of the training, got'):
        downstream.measure(network, data, [], results[0]['eval_top1'])


class Known:
    """A network whose logits and features are the first pixels of its images."""

    def __call__(self, images):
        return images[:, 0, 0, :3] / 25, images[:, 0, 0, :3].float()


def test_measures_of_a_known_network():
    """The calibration error and k-NN, by hand."""
    logits = torch.tensor([[100, 0, 0]] * 4 + [[0, 100, 0]] * 4)
    images = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, :3] = logits
    target = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])  # 7 of 8 right, all with the same confidence
    data = {'validation': (images, target), 'train': (images[[0, 1, 4]], torch.tensor([2, 2, 1]))}
    result = downstream.measure(Known(), data, [images, 0 * images], 87.5)
    confidence = math.exp(4) / (math.exp(4) + 2)
    assert result['ece'] == pytest.approx(100 * abs(confidence - 0.875))
    assert result['knn'] == 0  # the three neighbours there are: two of class 2
    assert result['corrupted'] == pytest.approx((87.5 + 37.5) / 2)


def test_rank_correlations():
    """Those given top-1 are the correlations of what top-1 leaves unexplained."""
    rng = np.random.default_rng(0)
    keys = ['eval_top1', *downstream.COHESION, *downstream.MEASURED]
    values = rng.permuted(np.tile(np.arange(12.0), (len(keys), 1)), axis=1)
    results = [{'run': str(i % 4), **dict(zip(keys, values[:, i]))} for i in range(12)]
    top1, cohesion, knn = (values[keys.index(key)] for key in ('eval_top1', 'eval_cosine_cohesion', 'knn'))
    left = [one - np.poly1d(np.polyfit(top1, one, 1))(top1) for one in (cohesion, knn)]
    expected = f'{np.corrcoef(cohesion, knn)[0, 1]:.2f} ({np.corrcoef(*left)[0, 1]:.2f})'
    text = downstream.correlations(results)
    assert text.startswith('| 12 networks, 4 methods | top-1 % | k-NN % |')
    assert f'| cosine cohesion | {np.corrcoef(cohesion, top1)[0, 1]:.2f} | {expected} |' in text


def test_few_shot_accuracy():
    torch.manual_seed(0)
    target = torch.arange(30).repeat(12)
    assert downstream.few_shot(torch.eye(30)[target] + 0.01 * torch.randn(360, 30), target) == 100
    assert downstream.few_shot(torch.randn(360, 30), target) == pytest.approx(5, abs=1)  # one of 20


def test_corruptions():
    """Against scipy and Pillow; each is stronger from strength to strength, never weaker."""
    torch.manual_seed(0)
    pixels = (scipy.ndimage.gaussian_filter(np.random.rand(32, 32, 3), 1, axes=(0, 1)) * 255).astype(np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    for corrupt, strengths in downstream.STRENGTHS.items():
        distances = [(corrupt(image, strength) - image).square().mean().item() for strength in strengths]
        assert 0 < distances[0]
        assert distances == sorted(distances)
    assert len(list(downstream.corrupted((255 * image).byte()))) == 25
    assert (downstream.noise(image, 0.1) - image).std().item() == pytest.approx(0.1, abs=0.005)
    expected = scipy.ndimage.gaussian_filter(image[0].numpy(), 1.0, axes=(1, 2), mode='mirror')
    np.testing.assert_allclose(downstream.blur(image, 1.0)[0], expected, atol=1e-4)
    expected = ImageEnhance.Contrast(Image.fromarray(pixels[:, :, 0])).enhance(0.4)
    np.testing.assert_allclose(255 * downstream.contrast(image[:, :1], 0.4)[0, 0], np.array(expected), atol=1.5)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'JPEG', quality=50)
    np.testing.assert_array_equal(255 * downstream.jpeg(image, 50)[0].permute(1, 2, 0), np.array(Image.open(file)))


def test_curves_of_beta(tmp_path, monkeypatch):
    """A curve for each mixer and P, through the mean of the seeds at each beta."""
    lines = []
    monkeypatch.setattr(Axes, 'plot', lambda self, x, y, *_, label, **kwargs: lines.append((label, x, y)))
    monkeypatch.setattr(Figure, 'legend', lambda *args, **kwargs: None)
    runs = [(0.0, 0.5, 0, 1.0), (0.0, 0.5, 0, 3.0), (0.0, 0.1, 0, 4.0), (1.0, 0.3, 2, 5.0)]
    results = [
        {
            'flags': {'mixup': mixup, 'synermix_beta': beta, 'synermix_num_mixed': num_mixed},
            **dict.fromkeys(beta_curves.DRAWN, value),
        }
        for mixup, beta, num_mixed, value in runs
    ]
    path = tmp_path / 'results.json'
    path.write_text(json.dumps({'results': results}))
    monkeypatch.setattr(sys, 'argv', ['beta_curves.py', str(path)])
    beta_curves.main()
    assert lines[:2] == [('SynerMix (MixUp), P 2', [0.3], [5]), ('SynerMix-Intra, P all', [0.1, 0.5], [4, 2])]
    assert Image.open(tmp_path / 'beta.png').width > 500


@pytest.mark.slow
def test_a_grid_in_a_tar_file_and_in_settings(grid, image_folder, tmp_path):
    """Each run in each setting; the file is unpacked once; a picture is drawn."""
    archive = tmp_path / 'images.tar'
    with tarfile.open(archive, 'w') as file:
        file.add(image_folder, 'some/folder')
    content = yaml.safe_load(grid.read_text())
    content['runs'] = {'mix': {'synermix': True}, 'no mix': {'synermix': True, 'synermix_mix': 'none'}}
    content['settings'] = {'beta 0.2': {'synermix_beta': 0.2}, 'beta 0.7': {'synermix_beta': 0.7}}
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    run_grid(grid, archive, '--jobs', '2')
    folder = grid.parent / 'small'
    results = json.loads((folder / 'results.json').read_text())['results']
    runs = ['mix, beta 0.2', 'no mix, beta 0.2', 'mix, beta 0.7', 'no mix, beta 0.7']
    assert [result['run'] for result in results] == runs
    assert len({result['eval_cdnv'] for result in results}) == 4
    assert all(result['memory_mb'] > 50 and result['seconds'] > 0 for result in results)
    assert Image.open(folder / 'results.png').width > 500
    (unpacked,) = folder.glob('images.tar-*/some/folder')
    written = unpacked.stat().st_mtime_ns
    run_grid(grid, archive)
    assert unpacked.stat().st_mtime_ns == written
    text = (folder / 'results.md').read_text()
    assert f'torch {torch.__version__.split("+")[0]}' in text


@pytest.mark.slow
def test_a_grid_ends_in_time(grid, image_folder):
    """A run that takes too long is stopped, and goes on in the next call; a signal stops it too."""
    content = yaml.safe_load(grid.read_text())
    content['train']['epochs'] = 100000
    content['runs'] = {'long': {}}
    grid.write_text(yaml.safe_dump(content))
    log = grid.parent / 'small' / 'long-1.log'
    text = run_grid(grid, image_folder, '--budget-minutes', '0.3')
    assert 'Left out (start again to go on): long, seed 1 (stopped on the way).' in text
    assert log.read_text().count('Interrupted.') == 1
    seconds = grid.parent / 'small' / 'long-1.seconds'
    first = float(seconds.read_text())
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
    assert float(seconds.read_text()) > first > 0
    assert not (grid.parent / 'small' / 'long-1.json').exists()


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
        ({'train': {}, 'runs': {'a': {}}, 'against': {'a': ['b']}}, 'against names b, which is none of its runs'),
        ({'train': {}, 'runs': {'a': {}}, 'scripts': {'b': 'c.py'}}, 'scripts names b, which is none of its runs'),
    ],
)
def test_a_grid_that_is_none(tmp_path, content, message):
    (tmp_path / 'grid.yaml').write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        reproduce.Grid(tmp_path / 'grid.yaml')


def test_losses_of_normalised_features():
    """Against timm's loss, and a loop in which each class looks for its image in the batch; weights stay as drawn."""
    torch.manual_seed(0)
    plain = timm.create_model('test_resnet', num_classes=3)
    torch.manual_seed(0)
    model = normalized_losses.create_model('test_resnet', num_classes=3)
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))
    feature, target = torch.randn(4, model.num_features), torch.rand(4, 3).softmax(1)
    with torch.autocast('cpu', torch.bfloat16):
        logits = model.get_classifier()(feature)
    expected = F.cosine_similarity(feature[:, None], plain.get_classifier().weight[None], dim=2) / 0.1
    torch.testing.assert_close(logits, expected)
    cosine = normalized_losses.cross_entropy(logits, target, normalized_losses.AXES['cosine'])
    torch.testing.assert_close(cosine, SoftTargetCrossEntropy()(expected, target))
    ntce = sum(target[i, c] * (expected[:, c].logsumexp(0) - expected[i, c]) / 4 for i in range(4) for c in range(3))
    torch.testing.assert_close(normalized_losses.cross_entropy(logits, target, normalized_losses.AXES['ntce']), ntce)


def test_a_grid_keeps_images_to_validate_on(tmp_path):
    """All training images in validation/ would be validated on, too."""
    (tmp_path / 'grid.yaml').write_text('{train: {}, runs: {a: {}}, validate_on_rest: true}')
    with pytest.raises(ValueError, match='validate_on_rest needs images_per_class'):
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
    known = {action.dest for action in train.parser._actions}
    for name, flags in reproduce.Grid(path).flags.items():
        assert flags.keys() <= known, name


@pytest.mark.parametrize(
    ('device', 'native', 'expected'),
    [
        ('cpu', True, {'amp': False, 'amp_dtype': 'bfloat16', 'channels_last': True, 'lr': 1}),
        ('cpu', False, {'amp': False, 'lr': 1}),
        ('cuda', True, {'amp': False, 'lr': 1}),
    ],
)
def test_bfloat16_where_the_cpu_computes_in_it(tmp_path, monkeypatch, device, native, expected):
    """Unless the grid says otherwise."""
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: native)
    (tmp_path / 'grid.yaml').write_text(yaml.safe_dump({'train': {'amp': False}, 'runs': {'a': {'lr': 1}}}))
    assert reproduce.Grid(tmp_path / 'grid.yaml', device).flags['a'] == expected


def test_a_grid_refuses_results_of_another(grid, image_folder):
    folder = grid.parent / 'small'
    folder.mkdir()
    (folder / 'none-1.json').write_text(json.dumps(dict(run='none', seed=1, setting=dict(flags={}))))
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_grid(grid, image_folder)
    assert 'none-1.json is of other flags or data; remove it' in error.value.stderr


@pytest.mark.slow
def test_a_run_that_fails_is_the_last(grid, image_folder):
    content = yaml.safe_load(grid.read_text())
    content['runs'] = {'good': {'mixup': 0.4}, 'NTCE': {'mixup': 0.4}, 'bad': {'lr': -1}, 'never': {}}
    content['scripts'] = {'NTCE': 'normalized_losses.py ntce'}
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_grid(grid, image_folder)
    folder = grid.parent / 'small'
    assert f'bad, seed 1 failed: see {folder / "bad-1.log"}' in error.value.stderr
    assert '--lr must be at least 0, got -1.0' in (folder / 'bad-1.log').read_text()
    results = {r['run']: r for r in json.loads((folder / 'results.json').read_text())['results']}
    losses = {run: result['eval_loss'] for run, result in results.items()}
    assert losses.keys() == {'good', 'NTCE'}
    assert losses['good'] != losses['NTCE']  # which another script has trained
    assert results['NTCE']['script'] == 'normalized_losses.py ntce'
    assert 'script' not in results['good']
    assert not (folder / 'never-1.log').exists()
    content['scripts'] = {'NTCE': 'normalized_losses.py cosine'}
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_grid(grid, image_folder)
    assert 'ntce-1.json is of other flags or data; remove it' in error.value.stderr


def allocate(megabytes):
    torch.ones(megabytes, 2**18)


@pytest.mark.slow
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


def test_paired_differences_have_student_s_interval():
    """Of the seeds that both runs have; scipy's own interval is the oracle."""
    top1 = {'a': {0: 40.0, 1: 42.0, 2: 41.5, 3: 90.0}, 'b': {0: 39.0, 1: 41.5, 2: 39.0, 7: 1.0}}
    results = [{'run': run, 'seed': s, 'eval_top1': v} for run, seeds in top1.items() for s, v in seeds.items()]
    row = tables.paired_table({'a': ['b']}, results).splitlines()[2]
    test = scipy.stats.ttest_rel([40.0, 42.0, 41.5], [39.0, 41.5, 39.0])
    half = (test.confidence_interval().high - test.confidence_interval().low) / 2
    assert row.startswith(f'| a - b | 3 | +1.33 ± {half:.2g} | - |')
    assert tables.paired_table({}, results) == ''
    assert '| a - b | 1 | +1 | - |' in tables.paired_table({'a': ['b']}, [results[0], results[4]])


def test_gains_are_drawn_against_what_they_cost(tmp_path, monkeypatch):
    """A point for each run that has seeds in common with its first: its time, its gain, and half of its interval."""
    points = {}
    monkeypatch.setattr(
        Axes, 'errorbar', lambda self, x, y, half, label, **_: points.setdefault(label, []).append((x, y, half))
    )
    values = [
        ('a', 0, 42.0, 20.0),
        ('a', 1, 44.0, 33.0),
        ('a', 2, 44.0, 21.0),
        ('b', 0, 41.0, 10.0),
        ('b', 1, 41.0, 11.0),
        ('b', 2, 41.0, 10.0),
        ('c', 1, 43.0, 33.0),
        ('c', 2, 42.0, 21.0),
    ]
    results = [
        dict(run=run, seed=seed, eval_top1=top1, eval_cosine_cohesion=top1 / 100, seconds=seconds)
        for run, seed, top1, seconds in values
    ]
    tables.draw_gains({'a': ['b', 'c'], 'c': ['a'], 'b': ['none']}, results, tmp_path / 'gains.png')
    half = pytest.approx(scipy.stats.t.ppf(0.975, 2) * (4 / 3) ** 0.5 / 3**0.5)
    assert points['2  a - b'][0] == (2.1, pytest.approx(7 / 3), half)
    assert points['2  a - b'][1][1] == pytest.approx(0.07 / 3)
    assert points['1  c - a'][0] == (1.0, -1.5, None)  # an interval of two seeds says nothing
    assert len(points) == 2
    assert tables.paired_table({'a': ['b']}, results, {'seconds': 'seconds'}).endswith('| a - b | 3 | 2.10 |\n')
    tables.draw_gains({'a': ['b'], 'c': ['b']}, results, tmp_path / 'gains.png')
    assert {'1  a', '2  c'} < points.keys()  # one for all, which the title names
    assert Image.open(tmp_path / 'gains.png').width > 500


def test_the_rest_of_the_training_images_joins_validation(tmp_path):
    images = {'train': {'a': 5, 'b': 3}, 'validation': {'a': 2, 'b': 2}}
    folder = make_image_folder(tmp_path / 'images', images)
    part = {'classes': None, 'images_per_class': 3, 'validate_on_rest': True}
    data = reproduce.prepare_data(folder, tmp_path, part)
    number = {
        path: len(list((data / path).iterdir())) for path in ('train/a', 'train/b', 'validation/a', 'validation/b')
    }
    assert number == {'train/a': 3, 'train/b': 3, 'validation/a': 4, 'validation/b': 2}
    trained = {path.resolve() for path in (data / 'train').glob('*/*')}
    assert not trained & {path.resolve() for path in (data / 'validation').glob('*/*')}


def test_the_mean_of_the_last_evaluations(tmp_path):
    """Epochs without an evaluation do not count."""
    path = tmp_path / 'summary.csv'
    path.write_text('epoch,train_loss,eval_loss,eval_top1\n0,1,9,9\n1,1,2,50\n2,1,,\n3,1,4,60\n')
    assert reproduce.mean_of_last(path, 2) == {'eval_loss': 3.0, 'eval_top1': 55.0}
    assert reproduce.mean_of_last(path, 1) == {'eval_loss': 4.0, 'eval_top1': 60.0}
