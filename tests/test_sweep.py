"""A sweep of timm's sweep.py, as its tests describe it: jobs with whole configs, one process each, that share locks.

And the runs that an agent of Weights & Biases starts.
"""

import csv
import os
from itertools import product

import torch
import yaml
from conftest import ROOT
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

import train
from timm_synermix.cli.train_args import create_parsers, parse_args


def start(monkeypatch, root, name, **changes):
    """What sweep.py does for a job: a config of every argument of train.py, the locks, and the job's live attempt."""
    (root / 'locks').mkdir(exist_ok=True)
    locks, attempt = [root / 'locks' / 'plan', root / 'locks' / f'{name}.train'], root / 'locks' / f'{name}.attempt'
    for path in locks:
        path.touch()
    attempt.write_text('a1')
    config = root / f'{name}.yaml'
    config.write_text(yaml.safe_dump({**vars(train.parser.parse_args([])), **changes}))
    words = ['--config', config, '--sweep-locks', *locks, '--sweep-attempt', attempt, 'a1']
    monkeypatch.setattr('sys.argv', ['train.py', *map(str, words)])
    train.main()
    assert len(train._sweep_lock_fds) == len(locks)
    for fd in train._sweep_lock_fds:
        os.close(fd)
    train._sweep_lock_fds.clear()


def rows(folder):
    with (folder / 'summary.csv').open() as file:
        return list(csv.DictReader(file))


def test_two_segments_of_a_trunk_and_two_branches(monkeypatch, tmp_path, image_folder):
    """The trunk is one run in two segments, each branch decays from a milestone of it to zero within an epoch."""
    common = dict(
        data_dir=str(image_folder), num_classes=4, model='test_efficientnet', img_size=32, batch_size=8, device='cpu',
        workers=0, no_aug=True, lr=0.01, sched='wsd', sched_on_updates=True, warmup_epochs=0, output=str(tmp_path),
    )  # fmt: skip
    for stop in (1, 2):
        start(
            monkeypatch, tmp_path, f'stable-{stop}', **common, experiment='stable', resume='auto', epochs=3,
            decay_epochs=1, stop_epoch=stop, save_epochs=[1, 2],
        )  # fmt: skip
    for point in (1, 2):
        start(
            monkeypatch, tmp_path, f'decay-{point}', **common, experiment=f'decay-{point}', epochs=point + 1,
            resume=str(tmp_path / 'stable' / f'milestone-{point}.pth.tar'), decay_epochs=1, lr_decay_fn='linear',
            stop_epoch=None, save_epochs=[],
        )  # fmt: skip
    assert [row['epoch'] for row in rows(tmp_path / 'stable')] == ['0', '1']
    for point in (1, 2):
        (row,) = rows(tmp_path / f'decay-{point}')
        assert row['epoch'] == str(point)
        assert float(row['lr']) == 0
        milestone = torch.load(tmp_path / 'stable' / f'milestone-{point}.pth.tar', weights_only=False)
        assert milestone['epoch'] == point - 1
    for name in ('stable', 'decay-1'):
        saved = torch.load(tmp_path / name / 'last.pth.tar', weights_only=False)
        assert not [key for key in vars(saved['args']) if 'sweep' in key]
        assert 'sweep' not in (tmp_path / name / 'args.yaml').read_text()


def wandb_command(values):
    """The command of hparams/wandb_sweep.yml as an agent of Weights & Biases makes it, by wandb's own functions."""
    sweep = yaml.safe_load((ROOT / 'hparams' / 'wandb_sweep.yml').read_text())
    chosen = {name: {'value': values.get(name, given.get('value'))} for name, given in sweep['parameters'].items()}
    words = create_sweep_command_args({'args': chosen})
    words |= {'interpreter': ['python'], 'program': [sweep['program']]}
    return [word for part in create_sweep_command(sweep['command']) for word in words.get(part[2:-1], [part])]


def test_a_wandb_sweep_over_beta_and_p(monkeypatch):
    sweep = yaml.safe_load((ROOT / 'hparams' / 'wandb_sweep.yml').read_text())
    swept = {name: given['values'] for name, given in sweep['parameters'].items() if 'values' in given}
    assert swept.keys() == {'synermix-beta', 'synermix-num-mixed'}
    monkeypatch.chdir(ROOT)
    for choice in product(*swept.values()):
        interpreter, program, *flags = wandb_command(dict(zip(swept, choice, strict=True)))
        assert (interpreter, program) == ('python', 'train.py')
        args, _ = parse_args(*create_parsers(), flags)
        assert (args.synermix_beta, args.synermix_num_mixed) == choice
        assert args.synermix
        assert args.log_wandb
        assert args.dataset == 'sklearn/digits'
