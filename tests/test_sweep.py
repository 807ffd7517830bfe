"""A sweep of timm's sweep.py, as its tests describe it: jobs with whole configs, one process each, that share locks."""

import csv
import os

import torch
import yaml

import train


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
