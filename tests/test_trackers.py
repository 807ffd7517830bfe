"""What a run sends to its trackers, read back from the files that the real packages write."""

import importlib.util
import json
import os
import re
import sys
import time
from argparse import Namespace

import accelerate
import numpy as np
import pytest
import timm
import torch
import wandb
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from timm.data import create_dataset, create_loader
from wandb.proto.wandb_internal_pb2 import Record

import train
from timm_synermix import FeatureHook
from timm_synermix.engine.progress import LossMeter
from timm_synermix.engine.tracker_guard import TrackerGuard
from timm_synermix.engine.tracker_start import _wandb_arguments, recipe_name, tracker_names
from timm_synermix.engine.trackers import RunTrackers
from timm_synermix.metrics.collection import METRIC_NAMES, CohesionMeter, cohesion_metrics

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')  # 2026-11: of the trackers' own packages


def wandb_messages(path):
    """The messages of a .wandb file: a log of LevelDB's format, after a header of 7 bytes."""
    data, place, message = path.read_bytes(), 7, b''
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # the rest of a block is too small for a header
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], 'little'), data[place + 6]
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b''


def wandb_records(run):
    """The rows of history, in order, and the id and configuration of the only offline run of a folder."""
    (path,) = (run.folder / 'wandb').glob('offline-run-*/run-*.wandb')
    deadline, records = time.time() + 20, []
    while not any(record.WhichOneof('record_type') == 'exit' for record in records) and time.time() < deadline:
        time.sleep(0.05)  # a process of its own writes the file
        records = [Record.FromString(message) for message in wandb_messages(path)]
    history, info = [], {}
    for record in records:
        kind = record.WhichOneof('record_type')
        if kind == 'history':
            items = record.history.item
            history.append({item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in items})
        elif kind == 'run':
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            info = dict(id=record.run.run_id, project=record.run.project, tags=list(record.run.tags), config=config)
            info.update(name=record.run.display_name, group=record.run.run_group, job_type=record.run.job_type, best={})
        elif kind == 'config':
            info['config'].update({item.key: json.loads(item.value_json) for item in record.config.update})
        elif kind == 'metric' and record.metric.name:
            summary = record.metric.summary
            info['best'][record.metric.name] = [way for way in ('max', 'min', 'last') if getattr(summary, way)]
    return history, info


def tracked(column):
    """What a column of summary.csv is called in a tracker."""
    name = column.removeprefix('eval_')
    return f'cohesion/{name}' if name in METRIC_NAMES else column


@pytest.fixture(scope='module')
def logged():
    return {}


@pytest.fixture
def wandb_run(run_train, logged, monkeypatch, caplog):
    """A run of two epochs, the command it had, and what it logged; one for all tests of this file."""
    if not logged:
        caplog.set_level('INFO')
        monkeypatch.setenv('SOME_TOKEN', 'correct-horse-battery')
        flags = ['--log-wandb', '--wandb-project', 'test', '--wandb-tags', 'a', '--log-interval', '2']
        logged.update(run=run_train('--synermix', '--epochs', '2', *flags), argv=sys.argv, text=caplog.text)
    return Namespace(**logged)


def test_wandb_offline(wandb_run):
    run = wandb_run.run
    history, info = wandb_records(run)
    assert (info['project'], info['tags']) == ('test', ['a'])
    assert info['config']['synermix'] is True
    assert 'wandb sync' in wandb_run.text

    updates = [row for row in history if 'update/loss' in row]
    assert [row['update'] for row in updates] == [1, 2, 3, 4, 5, 6]  # every update, two epochs of three
    for row in updates:
        assert row['update/loss'] == pytest.approx(0.5 * (row['update/intra_loss'] + row['update/inter_loss']), 1e-5)
        assert row['update/lr'] > 0
    rates = [row['update/images_per_second'] for row in history if 'update/images_per_second' in row]
    assert rates
    assert min(rates) > 0
    steps = [row['update'] for row in history if 'update' in row]
    assert steps == sorted(steps)

    epochs = [row for row in history if 'eval_top1' in row]
    for row, expected in zip(epochs, run.summary(), strict=True):
        assert {name: row[tracked(name)] for name in expected} == pytest.approx(expected, nan_ok=True)
        assert row['update'] == 3 * (row['epoch'] + 1)
    means = [np.mean([row['update/lr'] for row in updates[i : i + 3]]) for i in (0, 3)]
    assert means == pytest.approx([epochs[0]['lr'], epochs[1]['lr']], rel=1)

    paths = sorted((run.folder / 'wandb').glob('offline-run-*/files/media/table/classes_*.json'))
    assert len(paths) == 2
    table = json.loads(paths[0].read_text())
    assert table['columns'][:2] == ['class', 'images']
    assert [row[:2] for row in table['data']] == [['a', 3], ['b', 3], ['c', 3], ['lone', 1]]
    assert len(list((run.folder / 'wandb').glob('offline-run-*/files/media/images/feature_map_*.png'))) == 2


def test_wandb_has_all_flags_the_best_values_and_groups(wandb_run):
    _, info = wandb_records(wandb_run.run)
    config = info['config']
    assert config.keys() >= vars(wandb_run.run.checkpoint()['args']).keys() - {'wandb_run_id'}
    assert (config['wandb_tags'], config['model_kwargs'], config['mixup_off_epoch']) == (['a'], {}, 0)
    assert config['mean'] is None
    assert (info['name'], info['group'], info['job_type']) == ('run', 'test_efficientnet', 'train')
    best = info['best']
    assert best['eval_top1'] == best['cohesion/silhouette'] == ['max', 'last']
    assert best['eval_loss'] == best['train_loss'] == best['train_intra_loss'] == ['min', 'last']
    assert best['cohesion/cdnv'] == best['cohesion/davies_bouldin'] == ['min', 'last']
    assert not [name for name in ('epoch', 'lr') if best.get(name)]


@pytest.mark.parametrize(
    ('config', 'name'),
    [
        ('hparams/cifar100/mixup.yaml', 'cifar100/mixup'),
        ('/site-packages/timm_synermix/hparams/food101/none.yaml', 'food101/none'),
        ('cifar100/mixup', 'cifar100/mixup'),
        ('/home/me/mine.yaml', 'mine'),
        ('', 'resnet50'),
    ],
)
def test_runs_are_grouped_by_recipe(config, name):
    assert recipe_name(Namespace(config=config, model='resnet50')) == name


def test_wandb_disabled_is_obeyed(run_train, monkeypatch, caplog, tmp_path):
    """As the command `wandb disabled` leaves it: in wandb's own settings."""
    caplog.set_level('INFO')
    monkeypatch.delenv('WANDB_MODE')
    monkeypatch.setenv('WANDB_CONFIG_DIR', str(tmp_path))
    (tmp_path / 'settings').write_text('[default]\nmode = disabled\n')
    monkeypatch.setattr(wandb, 'login', lambda **kwargs: pytest.fail('asked for an account'))
    wandb.teardown()  # the settings are read once
    try:
        run = run_train('--synermix', '--log-wandb')
    finally:
        wandb.teardown()
    assert not (run.folder / 'wandb').exists()
    assert run.checkpoint()['args'].wandb_run_id is None
    assert 'wandb sync' not in caplog.text


@pytest.mark.parametrize(
    ('environment', 'expected'),
    [
        ({}, (True, 'off', 'test_efficientnet', 'train')),
        ({'WANDB__DISABLE_META': 'false', 'WANDB_CONSOLE': 'wrap'}, (False, 'wrap', 'test_efficientnet', 'train')),
        ({'WANDB_RUN_GROUP': 'mine', 'WANDB_JOB_TYPE': 'night'}, (True, 'off', 'mine', 'night')),
    ],
)
def test_what_the_environment_says_to_wandb(monkeypatch, environment, expected):
    for name in ('WANDB__DISABLE_META', 'WANDB_CONSOLE', 'WANDB_RUN_GROUP', 'WANDB_JOB_TYPE'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = Namespace(experiment='run', wandb_tags=[], wandb_resume_id='', config='', model='test_efficientnet')
    kwargs = _wandb_arguments(args, 'folder', None)
    settings = kwargs['settings']
    assert (settings.x_disable_meta, settings.console, kwargs['group'], kwargs['job_type']) == expected


def test_a_recipe_of_many_classes_has_one_table():
    """W&B keeps every table: of more than a thousand classes it gets the last epoch's."""
    tables, sent = [], Namespace(name='wandb', run=Namespace(define_metric=lambda *args, **kwargs: None))
    sent.log, sent.log_images = (lambda values: None), (lambda values: None)
    sent.log_table = lambda name, columns, data: tables.append(len(data))
    trackers = RunTrackers(Namespace(log_with=[]), None, '', None)
    trackers.trackers = [TrackerGuard(sent)]
    for num_classes in (1000, 1001):
        meter = CohesionMeter(num_classes, num_drawn=3)
        meter.update(torch.randn(2 * num_classes, 4), torch.arange(num_classes).repeat(2))
        for last in (False, True):
            trackers.send_epoch(1, {'epoch': 0.0}, meter.compute(), None, last)
    assert tables == [1000, 1000, 1001]


def test_a_resumed_run_goes_on_in_the_same_wandb_run(run_train, wandb_run):
    first = wandb_run.run
    _, info = wandb_records(first)
    assert first.checkpoint()['args'].wandb_run_id == info['id']
    flags = ['--epochs', '2', '--resume', str(first.folder / 'checkpoint-0.pth.tar')]
    second = run_train('--synermix', '--log-wandb', *flags, experiment='second')
    history, again = wandb_records(second)
    assert again['id'] == info['id']
    assert [row['update'] for row in history if 'update/loss' in row] == [4, 5, 6]


def test_tensorboard(run_train):
    run = run_train('--synermix', '--log-with', 'tensorboard', '--epochs', '2', '--log-interval', '1')
    events = EventAccumulator(str(run.folder), size_guidance=dict(scalars=0, images=0)).Reload()
    assert not [path for path in run.folder.iterdir() if path.is_dir()]  # one run, which the folder names
    data = events.summary_metadata['_hparams_/session_start_info'].plugin_data.content
    flags = HParamsPluginData.FromString(data).session_start_info.hparams
    assert (flags['synermix'].number_value, flags['epochs'].number_value) == (1, 2)
    assert (flags['log_with'].string_value, flags['mean'].string_value) == ("['tensorboard']", 'None')
    losses = events.Scalars('update/loss')
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert len(events.Scalars('update/images_per_second')) == 6
    for name, column in [('eval_top1', 'eval_top1'), ('cohesion/cosine_cohesion', 'eval_cosine_cohesion')]:
        assert [event.step for event in events.Scalars(name)] == [3, 6]
        expected = [row[column] for row in run.summary()]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(expected)
    table = events.Tensors('classes/text_summary')[0].tensor_proto.string_val[0].decode()
    assert table.splitlines()[0].startswith('| class | images | intra_class_distance |')
    assert len(table.splitlines()) == 2 + 4
    (first, _) = events.Images('feature_map')
    assert first.width > 100
    assert not (run.folder / 'wandb').exists()


def test_trackio(run_train, monkeypatch):
    if importlib.util.find_spec('trackio') is None:  # importing it here would choose its folder
        pytest.skip('trackio, which wants an older Pillow than this package is tested with, is not installed')
    monkeypatch.setenv('TRACKIO_DIR', '')  # and so taken away at the end
    monkeypatch.delenv('TRACKIO_DIR')
    run = run_train('--synermix', '--log-with', 'trackio', '--epochs', '2')
    assert (run.folder / 'trackio' / 'timm-synermix.db').exists()
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs('timm-synermix') == ['run']
    assert SQLiteStorage.get_run_config('timm-synermix', 'run')['log_with'] == ['trackio']
    epochs = [row for row in SQLiteStorage.get_logs('timm-synermix', 'run') if 'eval_top1' in row]
    assert [row['step'] for row in epochs] == [3, 6]
    for row, expected in zip(epochs, run.summary(), strict=True):
        assert row['cohesion/cosine_cohesion'] == pytest.approx(expected['eval_cosine_cohesion'])


@pytest.fixture
def batch_sizes(monkeypatch):
    """The images of each batch that was counted."""
    sizes, update = [], LossMeter.update

    def counted(self, result, count):
        sizes.append(count)
        update(self, result, count)

    monkeypatch.setattr(LossMeter, 'update', counted)
    return sizes


def test_the_losses_of_updates_are_those_of_the_log(run_train, batch_sizes):
    """Their mean over an epoch, weighted by the images, is the mean in summary.csv."""
    run = run_train('--synermix', '--log-with', 'tensorboard', '--synermix-batch', 'fixed', '--grad-accum-steps', '1')
    events = EventAccumulator(str(run.folder)).Reload()
    for name in ('loss', 'intra_loss', 'inter_loss'):
        values = [event.value for event in events.Scalars(f'update/{name}')]
        assert np.average(values, weights=batch_sizes) == pytest.approx(run.summary()[0][f'train_{name}'], rel=1e-6)


def test_an_update_of_several_batches_has_their_mean(run_train, batch_sizes):
    """An epoch of three batches in windows of two and one."""
    flags = ['--synermix', '--synermix-batch', 'fixed', '--log-with', 'tensorboard', '--grad-accum-steps', '2']
    run = run_train(*flags, '--lr', '0', '--warmup-epochs', '0')
    events = EventAccumulator(str(run.folder)).Reload()
    first, second = (event.value for event in events.Scalars('update/loss'))
    weights = [sum(batch_sizes[:2]), batch_sizes[2]]
    assert np.average([first, second], weights=weights) == pytest.approx(run.summary()[0]['train_loss'], rel=1e-6)


def test_a_tracker_that_cannot_start_is_one_line(run_train, monkeypatch, capsys, tmp_path):
    def init(**kwargs):
        raise wandb.errors.UsageError('No API key configured.')

    monkeypatch.setattr(wandb, 'init', init)
    with pytest.raises(SystemExit) as error:
        run_train('--synermix', '--log-wandb')
    assert error.value.code == 2
    assert 'the trackers wandb cannot be started: No API key configured.' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('method', ['log', 'log_images', 'finish'])
def test_a_tracker_that_fails_stops_no_training(run_train, monkeypatch, caplog, method):
    """One line, and all that is kept on the disk is as without it."""
    calls = []

    def fail(self, *args, **kwargs):
        calls.append(method)
        raise RuntimeError('the server is gone\nand a traceback')

    monkeypatch.setattr(accelerate.tracking.TensorBoardTracker, method, fail)
    run = run_train('--synermix', '--log-with', 'tensorboard', '--epochs', '2', '--log-interval', '1')
    (line,) = [text for text in caplog.messages if 'has failed' in text]
    assert line == 'The tracker tensorboard has failed, the run goes on without it: the server is gone'
    assert calls == [method]
    assert [row['epoch'] for row in run.summary()] == [0, 1]
    assert run.checkpoint()['epoch'] == 1


def test_nothing_is_logged_unasked(run_train, monkeypatch):
    monkeypatch.setattr(wandb, 'init', lambda **kwargs: pytest.fail('wandb was started'))
    run = run_train('--synermix')
    assert {path.name for path in run.folder.iterdir()} == {
        'args.yaml', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar', 'model_best.safetensors',
        'checkpoint-0.pth.tar', 'model.safetensors', 'config.json', 'README.md', 'feature_map.png',
    }  # fmt: skip


@pytest.mark.parametrize(
    ('name', 'message'),
    [('tensorbord', 'must be of .*tensorboard.*, got tensorbord'), ('mlflow', 'not installed; pip install mlflow')],
)
def test_unknown_trackers_are_refused(run_train, capsys, name, message, tmp_path):
    with pytest.raises(SystemExit) as error:
        run_train('--synermix', '--log-with', name)
    assert error.value.code == 2
    assert not (tmp_path / 'run').exists()
    assert re.search(message, capsys.readouterr().err)


def test_each_tracker_once():
    assert tracker_names(Namespace(log_wandb=True, log_with=['tensorboard', 'wandb'])) == ['wandb', 'tensorboard']
    assert tracker_names(Namespace(log_wandb=False, log_with=None)) == []


# Cohesion in training


def test_cohesion_of_the_evaluation_images(run_train, image_folder):
    run = run_train('--synermix', '--crop-pct', '1.0')
    model = timm.create_model('test_efficientnet', num_classes=4, checkpoint_path=str(run.folder / 'last.pth.tar'))
    dataset = create_dataset('', root=str(image_folder), split='validation')
    config = dict(mean=model.default_cfg['mean'], std=model.default_cfg['std'])
    loader = create_loader(
        dataset, (3, 32, 32), 4, num_workers=0, crop_pct=1.0, interpolation='bicubic', use_prefetcher=False, **config
    )
    metrics = cohesion_metrics(4, 256)
    hook = FeatureHook(model.eval())
    with torch.no_grad():
        for x, y in loader:
            metrics.update(hook(x)[1], y)
    values = metrics.compute()
    for name in METRIC_NAMES:
        assert run.summary()[0][f'eval_{name}'] == pytest.approx(values[name].item(), rel=1e-3, nan_ok=True), name
        assert run.results[0]['validation'][name] == pytest.approx(values[name].item(), rel=1e-3)


def test_cohesion_is_of_the_model_whose_metrics_count(run_train, monkeypatch):
    """Of the moving average, if there is one on the device."""
    seen = []
    original = train.evaluate

    def spy(accelerator, model, *args, **kwargs):
        hook = kwargs.get('feature_hook')
        seen.append(None if hook is None else hook.model is model)
        return original(accelerator, model, *args, **kwargs)

    monkeypatch.setattr(train, 'evaluate', spy)
    run_train('--synermix', '--model-ema')
    assert seen == [None, True]
    seen.clear()
    run_train('--synermix', '--model-ema', '--model-ema-force-cpu', experiment='cpu')
    assert seen == [True]


@pytest.mark.slow
@pytest.mark.parametrize('flags', [['--synermix'], ['--cohesion']])
def test_cohesion_compiled_is_the_same(run_train, flags):
    plain = run_train(*flags, experiment='plain').summary()[0]
    compiled = run_train(*flags, '--torchcompile', 'eager', experiment='compiled').summary()[0]
    assert compiled == pytest.approx(plain, rel=1e-5, nan_ok=True)
    assert 'eval_cdnv' in plain


@pytest.mark.parametrize('flags', [['--synermix'], ['--cohesion'], []])
def test_cohesion_can_be_had_or_not(run_train, flags):
    plain = run_train(*flags, experiment='plain').summary()[0]
    assert ('eval_cdnv' in plain) == bool(flags)
    without = run_train(*flags, '--no-cohesion', experiment='without').summary()[0]
    assert not any('cdnv' in name for name in without)
    assert without == {name: value for name, value in plain.items() if name in without}  # nothing else changes


@pytest.mark.parametrize('free', [0, 10**12])
def test_cohesion_that_does_not_fit(run_train, monkeypatch, caplog, free):
    """It is left out, or computed on the CPU, which a line says; the training is the same."""
    plain = run_train('--synermix', experiment='plain').summary()[0]
    monkeypatch.setattr('psutil.virtual_memory', lambda: Namespace(available=free))
    run = run_train('--synermix', '--cohesion-memory', '0').summary()[0]
    assert ('they are left out' if free == 0 else 'they stay on the CPU') in caplog.text
    assert ('eval_cdnv' in run) == bool(free)
    assert run == pytest.approx({name: plain[name] for name in run}, nan_ok=True)


def test_wandb_learns_what_the_user_passed_and_no_more(wandb_run, image_folder):
    """No path of the script, of Python or of the home, and no value of the environment."""
    run = wandb_run.run
    (path,) = (run.folder / 'wandb').glob('offline-run-*/run-*.wandb')
    assert wandb_records(run)[1]['config']['data_dir'] == str(image_folder)
    folder = re.escape(str(run.folder.parent))
    for message in wandb_messages(path):
        record = Record.FromString(message)
        if record.WhichOneof('record_type') == 'artifact':  # tells `wandb sync` where the tables wait to be uploaded
            for entry in record.artifact.manifest.contents:
                entry.ClearField('local_path')
        text = re.sub(rf'{folder}[\w./-]*|{re.escape(str(image_folder))}', '', str(record))
        assert 'correct-horse-battery' not in text
        for private in (sys.prefix, sys.executable, str(ROOT), os.path.expanduser('~'), wandb_run.argv[0]):
            assert private not in text or private in ('/', 'train.py'), text
    for file in (path.parent / 'files').rglob('*'):
        assert not (file.is_file() and b'correct-horse-battery' in file.read_bytes())
        assert file.name not in ('wandb-metadata.json', 'output.log')
