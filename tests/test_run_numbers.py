"""validate.py says of a checkpoint what its training said, with no flag but --checkpoint: runs that are drawn."""

import json
import random
import shutil
import sys

import pytest
from accelerate.state import AcceleratorState

import validate
from timm_synermix import entry

# Groups of flags that change what an evaluation sees; a run has one line of each group, or none.
GROUPS = {
    'average': ['--model-ema --model-ema-decay 0.5', '--model-ema --model-ema-force-cpu'],
    'channels': ['--in-chans 1', '--in-chans 4 --input-img-mode RGBA', '--in-chans 1 --input-img-mode L'],
    'norm': ['--bn-eps 0.1', '--aug-splits 2 --split-bn --aa rand-m3', '--aug-splits 3 --split-bn --jsd-loss'],
    'precision': ['--amp --amp-dtype bfloat16', '--model-dtype bfloat16'],
    'size': [
        '--img-size 48',
        '--input-size 3 32 32',
        '--crop-pct 0.6',
        '--crop-mode border',
        '--interpolation nearest',
    ],
    'colours': ['--mean 0.1', '--std 2'],
    'classes': ['--class-map MAP', '--class-map OTHER'],
    'pool': ['--gp max', '--channels-last', '--no-prefetcher', '--fast-norm'],
    'split': ['--val-split train'],
}


def said_by_validate(monkeypatch, capsys, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, 'argv', ['validate.py', '--device', 'cpu', '-j', '0', *map(str, flags)])
    capsys.readouterr()
    entry.run(validate)
    return json.loads(capsys.readouterr().out.rpartition('--result\n')[2])


@pytest.fixture
def same_numbers(run_train, monkeypatch, capsys, tmp_path):
    (tmp_path / 'map.txt').write_text('\n'.join(['lone', 'c', 'a', 'b']))
    (tmp_path / 'other.txt').write_text('\n'.join(['c', 'lone', 'b', 'a']))

    def same(lines):
        flags = ' '.join(lines).replace('MAP', str(tmp_path / 'map.txt')).replace('OTHER', str(tmp_path / 'other.txt'))
        if '--input-size 3' in flags and '--in-chans' in flags:
            flags = flags.replace('--input-size 3 32 32', '')
        if '--aug-splits' in flags:
            flags = flags.replace('--no-prefetcher', '')
        run = run_train('--epochs', '2', '--lr', '0.02', '--warmup-epochs', '0', '-b', '4', *flags.split())
        row = run.summary()[-1]
        last = said_by_validate(monkeypatch, capsys, '--checkpoint', run.folder / 'last.pth.tar', '-b', '4')
        for name in ('loss', 'top1', 'top5'):
            assert last[name] == pytest.approx(row[f'eval_{name}'], rel=1e-6), f'{name} of {flags}'
        assert row['eval_loss'] != run.summary()[0]['eval_loss']

    return same


@pytest.mark.parametrize(
    'lines',
    [
        ['--model-ema --model-ema-decay 0.5', '--in-chans 4 --input-img-mode RGBA', '--bn-eps 0.1'],
        ['--class-map MAP', '--aug-splits 2 --split-bn --aa rand-m3', '--amp --amp-dtype bfloat16', '--crop-pct 0.6'],
    ],
    ids=['average', 'classes'],
)
def test_numbers_of_a_run(same_numbers, lines):
    same_numbers(lines)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(24))
def test_numbers_of_drawn_runs(same_numbers, seed):
    generator = random.Random(seed)
    groups = generator.sample(sorted(GROUPS), generator.randint(2, 5))
    same_numbers([generator.choice(GROUPS[group]) for group in groups])


def test_what_is_given_counts(run_train, monkeypatch, capsys):
    """The other weights, and other images."""
    run = run_train('--model-ema', '--model-ema-decay', '0.9', '--epochs', '2', '--lr', '0.1', '--warmup-epochs', '0')
    path = run.folder / 'last.pth.tar'
    averaged, plain = (
        said_by_validate(monkeypatch, capsys, '--checkpoint', path, f) for f in ('--use-ema', '--no-use-ema')
    )
    assert averaged['loss'] == pytest.approx(run.summary()[-1]['eval_loss'])
    assert abs(plain['loss'] - averaged['loss']) > 1e-4
    other = said_by_validate(monkeypatch, capsys, '--checkpoint', path, '--split', 'train')
    assert other['loss'] != averaged['loss']


def test_a_class_without_images(run_train, monkeypatch, capsys, image_folder, tmp_path):
    """Its run's numbers of the classes hold, whichever file the weights are in and whether the map is still there."""
    shutil.copytree(image_folder, tmp_path / 'data')
    names = tmp_path / 'map.txt'
    names.write_text('\n'.join(['lone', 'c', 'a', 'b']))
    data = ('--data-dir', str(tmp_path / 'data'), '--num-classes', '4', '--class-map', str(names))
    flags = ['--epochs', '3', '--lr', '0.05', '--warmup-epochs', '0', '--eval-metric', 'loss']
    run = run_train(*flags, data=data)
    row = min(run.summary(), key=lambda row: row['eval_loss'])
    names.unlink()
    for file in ('model_best.pth.tar', 'model_best.safetensors'):
        said = said_by_validate(monkeypatch, capsys, '--checkpoint', run.folder / file)
        assert said['loss'] == pytest.approx(row['eval_loss'])
    shutil.copytree(tmp_path / 'data' / 'validation' / 'b', tmp_path / 'only' / 'b')
    shutil.rmtree(tmp_path / 'data' / 'validation' / 'b')
    best = ['--checkpoint', run.folder / 'model_best.pth.tar']
    few = said_by_validate(monkeypatch, capsys, *best)
    only = said_by_validate(monkeypatch, capsys, *best, '--data-dir', tmp_path / 'only')
    assert 7 * few['loss'] + 3 * only['loss'] == pytest.approx(10 * row['eval_loss'])
    (tmp_path / 'data' / 'validation' / 'x').mkdir()
    shutil.copy(next((image_folder / 'train' / 'a').iterdir()), tmp_path / 'data' / 'validation' / 'x')
    with pytest.raises(SystemExit):
        said_by_validate(monkeypatch, capsys, '--checkpoint', run.folder / 'model_best.pth.tar')
    assert 'has classes that training did not have: x' in capsys.readouterr().err


def test_a_worker_that_is_killed_is_one_line(run_train, monkeypatch, capsys, caplog):
    run = run_train()

    def killed(*args, **kwargs):
        raise RuntimeError('DataLoader worker (pid 9) is killed by signal: Killed. ')

    monkeypatch.setattr(validate, 'evaluate', killed)
    with pytest.raises(SystemExit) as error:
        said_by_validate(monkeypatch, capsys, '--checkpoint', run.folder / 'last.pth.tar')
    assert error.value.code == 1
    assert 'Stopped: DataLoader worker (pid 9) is killed by signal: Killed, as the system does' in caplog.text
