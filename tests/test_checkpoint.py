"""Checkpoints: whole or not there, whatever happens while they are written, and never code."""

import argparse
import contextlib
import io
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
import yaml
from conftest import Kill, assert_same_run
from timm.task import ClassificationTask
from torch import nn

import train
import validate
from timm_synermix import entry
from timm_synermix.engine.checkpoint import RunSaver
from timm_synermix.engine.ending import how_to_continue
from timm_synermix.engine.resume import find_resume_point
from timm_synermix.engine.resume_point import FORMAT
from timm_synermix.engine.run_folder import SaveError
from timm_synermix.utils.files import replacing
from timm_synermix.utils.safe_load import check_whole


class Model(nn.Linear):
    def __init__(self):
        super().__init__(400, 400)


def make_saver(folder, point=None, **kwargs):
    """A saver of a small model whose weights and momentum are all the number of the epoch."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.zeros(1, 400)).sum().backward()
    optimizer.step()
    task = ClassificationTask(model, verbose=False)
    args = argparse.Namespace(model='linear')
    kwargs = dict(model=model, task=task, optimizer=optimizer, args=args, max_history=2) | kwargs
    return RunSaver(str(folder), 'a: 1\n', resume_from=point, start=point.place if point else (0, 0), **kwargs)


def save(saver, epoch, recovery=False):
    with torch.no_grad():
        for p in saver.model.parameters():
            p.fill_(epoch)
            saver.optimizer.state[p]['momentum_buffer'].fill_(epoch)
    if recovery:
        saver.run_state = dict(epoch=epoch, batch=1)
        saver.save_recovery(epoch)
    else:
        saver.run_state = dict(epoch=epoch + 1, batch=0)
        saver.save_checkpoint(epoch, metric=float(epoch % 3))


def find(folder):
    return find_resume_point(argparse.Namespace(resume='auto', output=str(folder.parent), experiment=folder.name))


def assert_whole(point):
    """Every number in the checkpoint is that of its epoch."""
    content = torch.load(point.path, weights_only=False)
    epoch = content['epoch']
    tensors = [*content['state_dict'].values()]
    tensors += [state['momentum_buffer'] for state in content['optimizer']['state'].values()]
    assert len(tensors) == 4
    assert all((tensor == epoch).all() for tensor in tensors)
    return epoch


def in_a_child(work):
    """Run work(report) in a forked process, and return its id and what it reports, a number at a time."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # the others were not forked
        with contextlib.suppress(BaseException):
            work(lambda number: os.write(write, number.to_bytes(4, 'big')))
        os._exit(0)
    os.close(write)
    return pid, os.fdopen(read, 'rb')


def test_kill_9_at_any_moment_of_writing(tmp_path, record_property):
    """Twenty times; a checkpoint that was reported as saved, or a later one, is found, and it is whole."""
    folder, generator = tmp_path / 'run', random.Random(0)
    done, torn = -1, 0
    for _ in range(20):
        first, point = done + 1, find(folder)

        def work(report, first=first, point=point):
            saver = make_saver(folder, point)
            for epoch in range(first, first + 10_000):
                save(saver, epoch, recovery=epoch % 2 == 1)
                report(epoch)

        pid, reports = in_a_child(work)
        reports.read(4)  # the first one is written
        time.sleep(generator.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        rest = reports.read()
        reported = int.from_bytes(rest[-4:], 'big') if rest else done + 1
        torn += any(path.name.endswith('tmp.pth.tar') or path.suffix == '.tmp' for path in folder.iterdir())
        found = assert_whole(find(folder))
        assert found in (reported, reported + 1)
        done = found
    assert torn > 0  # some of the kills came in the middle of a file


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """A file system of 4 MiB, which holds two checkpoints of 1.3 MB, and not three."""
    if (
        os.geteuid() != 0
        or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', tmp_path], check=False).returncode
    ):
        pytest.skip('a file system can be mounted by root alone')
    try:
        saver = make_saver(tmp_path / 'run', max_history=10)
        epoch = 0
        with pytest.raises(SaveError, match='Cannot save the checkpoint'):  # noqa: PT012
            for epoch in range(10):
                save(saver, epoch)
        assert 0 < epoch < 9
        assert assert_whole(find(tmp_path / 'run')) == epoch - 1
        assert not list((tmp_path / 'run').glob('*tmp*'))  # the space is free again
    finally:
        subprocess.run(['umount', '--lazy', tmp_path], check=True)  # the saver's lock is open


def test_a_limit_of_the_file_size_leaves_the_checkpoint_before(tmp_path):
    """The same for those who cannot mount: the file ends in the middle of the weights."""

    def work(report):
        saver = make_saver(tmp_path / 'run')
        save(saver, 0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))
        try:
            save(saver, 1)
        except SaveError as error:
            report(len(str(error)))

    pid, reports = in_a_child(work)
    assert reports.read()  # the error
    os.waitpid(pid, 0)
    assert assert_whole(find(tmp_path / 'run')) == 0
    assert not list((tmp_path / 'run').glob('*tmp*'))


def test_a_read_only_folder_leaves_the_checkpoint_before(tmp_path):
    saver = make_saver(tmp_path / 'run')
    save(saver, 0)
    (tmp_path / 'run').chmod(0o555)

    def work(report):
        if os.geteuid() == 0:  # whom modes do not bind
            os.seteuid(65534)
        try:
            save(saver, 1)
        except SaveError as error:
            report(len(str(error)))

    pid, reports = in_a_child(work)
    assert reports.read()
    os.waitpid(pid, 0)
    (tmp_path / 'run').chmod(0o755)
    assert assert_whole(find(tmp_path / 'run')) == 0


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(ZeroDivisionError), replacing(str(path)) as temporary:  # noqa: PT012
        (tmp_path / 'file.tmp').write_text('new')
        1 / 0  # noqa: B018
    assert path.read_text() == 'old'
    assert temporary == str(path) + '.tmp'
    assert not os.path.exists(temporary)
    with replacing(str(path)) as temporary, open(temporary, 'w') as file:
        file.write('new')
    assert path.read_text() == 'new'


def test_every_flipped_bit_is_found_or_harmless(tmp_path, caplog):
    """Of 200 random ones in the file. Harmless are those in padding and in fields that nobody reads."""
    folder = tmp_path / 'run'
    saver = make_saver(folder)
    save(saver, 0)
    save(saver, 1)
    last, generator = folder / 'last.pth.tar', random.Random(1)
    content = last.read_bytes()
    data = content.index(b'\x00\x00\x80\x3f' * 4)  # ones: the weights of epoch 1
    found = 0
    for i in range(200):
        flipped = bytearray(content)
        at = generator.randrange(data, data + 600_000) if i % 2 else generator.randrange(len(content))
        flipped[at] ^= 1 << generator.randrange(8)
        (folder / 'checkpoint-1.pth.tar').unlink(missing_ok=True)  # another name of the same file
        last.unlink()
        last.write_bytes(flipped)
        caplog.clear()
        epoch = assert_whole(find(folder))
        assert epoch == (0 if 'is damaged' in caplog.text else 1)
        found += epoch == 0
    assert found >= 100  # all that hit the weights


@pytest.mark.parametrize('size', [0, 1, 100, 0.5, 0.999])
def test_a_truncated_checkpoint_is_passed_over(tmp_path, caplog, size):
    folder = tmp_path / 'run'
    saver = make_saver(folder)
    for epoch in range(3):
        save(saver, epoch)
    last = folder / 'last.pth.tar'
    os.truncate(
        last, int(size if isinstance(size, int) else size * last.stat().st_size)
    )  # and checkpoint-2, the same file
    assert assert_whole(find(folder)) == 1
    assert f'{last} is damaged' in caplog.text
    for path in folder.glob('*.pth.tar'):
        os.truncate(path, 50)
    with pytest.raises(ValueError, match=r'no checkpoint in .* can be read'):
        find(folder)


@pytest.mark.parametrize('part', ['state_dict', 'state_dict_ema'])
def test_a_checkpoint_with_a_nan_is_no_good_one(tmp_path, caplog, part):
    """As older versions or timm may have saved it."""
    folder = tmp_path / 'run'
    saver = make_saver(folder)
    save(saver, 0)
    save(saver, 1)
    content = torch.load(folder / 'last.pth.tar', weights_only=False)
    content['state_dict_ema'] = {name: value.clone() for name, value in content['state_dict'].items()}
    content[part]['bias'][7] = float('nan')
    for name in ('last', 'checkpoint-1'):
        torch.save(content, folder / f'{name}.pth.tar')
    assert assert_whole(find(folder)) == 0
    assert 'last.pth.tar is damaged (bias is not finite)' in caplog.text
    args = argparse.Namespace(output=str(tmp_path), experiment='run')
    assert f'The last good checkpoint is {folder}/checkpoint-0.pth.tar. To go on: ' in how_to_continue(args)


@pytest.mark.parametrize(
    ('argv', 'expected'),
    [
        (['train.py', '-b', '8'], ['python', 'train.py', '-b', '8']),
        (['my dir/train.py', '--data-dir', "it's here"], ['python', 'my dir/train.py', '--data-dir', "it's here"]),
        (['/bin/timm-synermix-train', '--resume', 'a b'], ['timm-synermix-train']),
        (['train.py', '--start-epoch=3', '--no-resume-opt', '--lr', '1'], ['python', 'train.py', '--lr', '1']),
        (['train.py', '--start-epoch', '3', '--experiment', 'old', 'dir'], ['python', 'train.py', 'dir']),
    ],
)
def test_the_command_that_goes_on_can_be_pasted(tmp_path, monkeypatch, argv, expected):
    monkeypatch.setattr(sys, 'argv', argv)
    folder = tmp_path / 'my run'
    save(make_saver(folder), 0)
    args = argparse.Namespace(output=str(tmp_path), experiment='my run')
    said = how_to_continue(args).partition('To go on: ')[2]
    shell = subprocess.run(['bash', '-c', f'printf "%s\\n" {said}'], capture_output=True, text=True, check=True)
    assert shell.stdout.splitlines() == [*expected, '--experiment', 'my run', '--resume', 'auto']


def test_a_process_that_does_not_know_the_name_of_the_run_says_nothing_of_its_checkpoints(tmp_path):
    names = dict(output=str(tmp_path), world_size=2)
    assert 'No checkpoint has been saved' in how_to_continue(argparse.Namespace(experiment='', rank=0, **names))
    assert 'in the log of the first process' in how_to_continue(argparse.Namespace(experiment='', rank=1, **names))
    assert 'No checkpoint has been saved' in how_to_continue(argparse.Namespace(experiment='new', rank=1, **names))


def test_the_newest_checkpoint_is_taken(tmp_path):
    folder = tmp_path / 'run'
    assert find(folder) is None
    saver = make_saver(folder)
    save(saver, 0)
    assert (find(folder).epoch, find(folder).batch) == (1, 0)
    save(saver, 1, recovery=True)
    assert (find(folder).epoch, find(folder).batch) == (1, 1)
    save(saver, 1)
    assert (find(folder).epoch, find(folder).batch) == (2, 0)
    assert os.path.basename(find(folder).path) == 'last.pth.tar'


def test_a_kill_between_saving_and_ranking(tmp_path, monkeypatch):
    """The best epoch was saved, but not yet known as the best."""
    folder = tmp_path / 'run'
    saver = make_saver(folder)
    save(saver, 0)
    save(saver, 1)
    monkeypatch.setattr(saver, '_rank', lambda *args: None)
    save(saver, 2)
    point = find(folder)
    assert point.epoch == 3
    resumed = make_saver(folder, point)
    assert (resumed.best_metric, resumed.best_epoch) == (2.0, 2)
    assert [os.path.basename(path) for path, _ in resumed.checkpoint_files] == [
        'checkpoint-2.pth.tar',
        'checkpoint-1.pth.tar',
    ]
    for name in ('model_best', 'checkpoint-2'):
        assert torch.load(folder / f'{name}.pth.tar', weights_only=False)['epoch'] == 2
    assert not (folder / 'checkpoint-0.pth.tar').exists()


def test_a_damaged_run_ends_as_a_whole_one(run_train, caplog):
    """train.py falls back to the epoch before, and trains the lost one again."""
    flags = ['--synermix', '--mixup', '0.5', '--model-ema', '--epochs', '4', '--checkpoint-hist', '2']
    whole = run_train(*flags, experiment='whole')
    stopped = run_train(*flags, '--stop-epoch', '3')
    last = stopped.folder / 'last.pth.tar'
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 4
    for name in ('last', 'model_best', *(f'checkpoint-{i}' for i in range(3))):  # those that are the same file
        path = stopped.folder / f'{name}.pth.tar'
        if path.exists() and path.samefile(last):
            path.write_bytes(content)
    assert_same_run(run_train(*flags, '--resume', 'auto'), whole)
    assert 'last.pth.tar is damaged (checksum' in caplog.text


def test_a_damaged_file_is_refused_by_name(run_train, capsys):
    run = run_train()
    path = run.folder / 'last.pth.tar'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SystemExit) as error:
        run_train('--resume', str(path), experiment='other')
    assert error.value.code == 2
    assert f'--resume: {path} cannot be loaded: checksum of ' in capsys.readouterr().err


def test_what_is_set_aside_is_not_deleted_with_what_is_written(tmp_path):
    """Recovery checkpoints beyond the place where the run goes on have the names of those that it will write."""
    folder = tmp_path / 'run'
    saver = make_saver(folder)
    save(saver, 0)
    for update in (0, 1):
        saver.run_state = dict(epoch=1, batch=update + 1)
        saver.save_recovery(1, batch_idx=update)
    for path in folder.glob('recovery-*'):
        os.truncate(path, 100)
    saver = make_saver(folder, find(folder))
    for update in range(4):
        saver.run_state = dict(epoch=1, batch=update + 1)
        saver.save_recovery(1, batch_idx=update)
        assert find(folder).place == (1, update + 1)
    assert len(list(folder.glob('recovery-*.pth.tar'))) == 2
    assert len(list(folder.glob('recovery-*.old'))) == 2


@pytest.mark.parametrize('back', [False, True], ids=['from the start', 'from an earlier epoch'])
def test_a_run_that_begins_again_goes_on_as_itself(run_train, caplog, back):
    """In the folder of a longer one, whose later checkpoints are not its own."""
    flags = ['--synermix', '--epochs', '4']
    other = ['--seed', '7', *flags]
    whole = run_train(*(flags if back else other), experiment='whole')
    old = run_train(*flags)
    start = ['--resume', str(old.folder / 'checkpoint-0.pth.tar')] if back else []
    run_train(*(flags if back else other), *start, '--stop-epoch', '2')
    caplog.clear()
    resumed = run_train(*(flags if back else other), '--resume', 'auto')
    assert 'Nothing to do' not in caplog.text
    assert_same_run(resumed, whole)
    kept = {path.name for path in old.folder.glob('*.old')}
    assert kept >= {'last.pth.tar.old', 'checkpoint-3.pth.tar.old'}
    assert ('summary.csv.old' in kept) != back


def test_nothing_is_renamed_before_the_first_checkpoint(run_train, stop_at):
    """A run that was begun anew by mistake is stopped in time, and the old one is as it was."""
    flags = ['--synermix', '--epochs', '3']
    whole = run_train(*flags, experiment='whole')
    run_train(*flags, '--stop-epoch', '2')
    again = stop_at('update_weights', 2, signal.SIGKILL)
    with pytest.raises(Kill):
        run_train(*flags)
    again()
    assert_same_run(run_train(*flags, '--resume', 'auto'), whole)


def test_every_generation_is_kept(run_train):
    for _ in range(3):
        run = run_train('--epochs', '2')
    for suffix in ('', '.old', '.old2'):
        assert torch.load(run.folder / f'last.pth.tar{suffix}', weights_only=False)['epoch'] == 1
        assert len((run.folder / f'summary.csv{suffix}').read_text().split()) == 3


def test_nothing_to_do_changes_nothing(run_train):
    """A complete run, and one that is complete if it goes on from an earlier checkpoint."""
    flags = ['--epochs', '3', '--model-ema', '--recovery-interval', '1']
    run = run_train(*flags)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    for more in (
        ['--resume', 'auto'],
        ['--resume', str(run.folder / 'checkpoint-0.pth.tar'), '--stop-epoch', '1'],
        ['--resume', 'auto', '--start-epoch', '3'],
    ):
        assert run_train('--epochs', '3', *more).results == []  # without --model-ema
        assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


def test_start_epoch_goes_back(run_train):
    run = run_train('--epochs', '3')
    again = run_train('--epochs', '3', '--resume', 'auto', '--start-epoch', '1')
    assert [row['epoch'] for row in again.summary()] == [0, 1, 2]
    assert run.checkpoint()['epoch'] == 2
    assert (run.folder / 'last.pth.tar.old').exists()


def test_a_link_to_the_checkpoint_is_the_checkpoint(run_train, tmp_path):
    flags = ['--epochs', '3']
    whole = run_train(*flags, experiment='whole')
    stopped = run_train(*flags, '--stop-epoch', '2')
    (tmp_path / 'newest').symlink_to(stopped.folder / 'last.pth.tar')
    assert_same_run(run_train(*flags, '--resume', str(tmp_path / 'newest')), whole)


def test_the_best_is_that_of_the_run(run_train, stop_at):
    """The best of later epochs goes aside with them, and the best so far takes its place again."""
    flags = ['--epochs', '3', '--eval-metric', 'loss']
    run = run_train(*flags)
    first = run.folder / 'checkpoint-0.pth.tar'
    for name in ('model_best.pth.tar', 'model_best.safetensors'):
        (run.folder / name).unlink()
    shutil.copy(run.folder / 'checkpoint-2.pth.tar', run.folder / 'model_best.pth.tar')
    again = run_train(*flags, '--resume', str(first), '--stop-epoch', '2', '--lr', '0')
    assert again.checkpoint('model_best')['saver']['best_epoch'] != 2
    assert torch.load(run.folder / 'model_best.pth.tar.old', weights_only=False)['epoch'] == 2
    assert (run.folder / 'model_best.safetensors').exists()


@pytest.mark.parametrize('epochs', ['1', '2'])
def test_the_last_epoch_is_ranked_too(run_train, monkeypatch, epochs):
    """A kill after the last checkpoint of a run: nothing is left to train, but its best may not be known."""
    flags = ['--epochs', epochs, '--save-epochs', '1', '--eval-metric', 'loss']
    whole = run_train(*flags, experiment='whole')
    original = RunSaver._rank

    def rank(self, epoch, metric):
        if epoch == int(epochs) - 1:
            raise Kill
        original(self, epoch, metric)

    monkeypatch.setattr(RunSaver, '_rank', rank)
    with pytest.raises(Kill):
        run_train(*flags)
    monkeypatch.setattr(RunSaver, '_rank', original)
    again = run_train(*flags, '--resume', 'auto')
    assert {path.name for path in again.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}
    assert_same_run(again, whole)


def test_a_file_of_weights_may_be_read_by_others(run_train):
    modes = {path.name: path.stat().st_mode for path in run_train().folder.iterdir()}
    assert modes['model_best.safetensors'] == modes['last.pth.tar'] == modes['summary.csv']


# Of another run


REFUSED = {
    'model': ('last', ['--model', 'test_resnet'], '--model must be test_efficientnet, as of {path}, got test_resnet'),
    'classes': ('last', ['--num-classes', '5'], '--num-classes must be 4, as of {path}, got 5'),
    'channels': ('last', ['--in-chans', '1'], '--in-chans must be None, as of {path}, got 1'),
    'optimizer': (
        'last',
        ['--opt', 'adamw'],
        '--opt must be sgd, as of {path}, got adamw; --no-resume-opt takes the weights alone',
    ),
    'batch': (
        'recovery',
        ['-b', '6'],
        '--batch-size must be 8, as of {path}, to go on in the middle of an epoch, got 6',
    ),
    'seed': ('recovery', ['--seed', '1'], '--seed must be 42, as of'),
    'data': ('recovery', ['--train-split', 'validation'], '--train-split must be train, as of'),
    'method': ('recovery', ['--synermix-batch', 'fixed'], '--synermix-batch must be grow, as of'),
}


@pytest.fixture
def finished(run_train):
    return run_train('--synermix', '--recovery-interval', '1', '--stop-epoch', '1', '--epochs', '2')


@pytest.mark.parametrize('name', REFUSED)
def test_resuming_another_run_is_refused_by_name(run_train, finished, capsys, name):
    file, flags, message = REFUSED[name]
    recoveries = sorted(path.name for path in finished.folder.glob('recovery-*'))
    path = finished.folder / ('last.pth.tar' if file == 'last' else recoveries[0])
    with pytest.raises(SystemExit) as error:
        run_train('--synermix', '--resume', str(path), '--epochs', '2', *flags, experiment='other')
    assert error.value.code == 2
    assert message.format(path=path) in capsys.readouterr().err


def test_more_images_are_refused_in_the_middle_of_an_epoch(run_train, finished, image_folder, tmp_path, capsys):
    (path, *_) = sorted(finished.folder.glob('recovery-*'))
    shutil.copytree(image_folder, tmp_path / 'more')
    for i in range(9):
        shutil.copy(image_folder / 'train' / 'a' / '0.png', tmp_path / 'more' / 'train' / 'a' / f'more{i}.png')
    with pytest.raises(SystemExit):
        run_train(
            '--synermix', '--resume', str(path), data=('--data-dir', str(tmp_path / 'more'), '--num-classes', '4')
        )
    assert 'it had 3 batches, now it has 4' in capsys.readouterr().err


def test_what_may_change_is_named(run_train, finished, caplog):
    """At the end of an epoch a user may go on with another recipe."""
    flags = ['--synermix', '--resume', 'auto', '-j', '1', '--log-interval', '1', '--lr', '0.7']
    assert len(run_train(*flags, '--epochs', '3', '-b', '6', '--mixup', '0.2').summary()) == 3
    (text,) = [record.getMessage() for record in caplog.records if 'Not the run that' in record.getMessage()]
    for change in ('--epochs 3 (was 2)', '--batch-size 6 (was 8)', '--mixup 0.2 (was 0.0)'):
        assert change in text
    assert 'Without effect' in caplog.text
    assert '--lr 0.7 (is 0.0' in caplog.text
    for harmless in ('--lr ', '--workers', '--resume', '--log-interval', '--recovery-interval', '--stop-epoch'):
        assert harmless not in text


def test_a_newer_format_is_refused(run_train, finished, capsys):
    path = finished.folder / 'last.pth.tar'
    content = torch.load(path, weights_only=False)
    assert content['saver']['run']['format'] == FORMAT
    content['saver']['run']['format'] = FORMAT + 1
    torch.save(content, path)
    for resume in (str(path), 'auto'):  # which does not take an older one instead
        with pytest.raises(SystemExit) as error:
            run_train('--synermix', '--resume', resume)
        assert error.value.code == 2
        text = capsys.readouterr().err
        newer = f'it has format {FORMAT + 1}, of a newer version of timm-synermix; this one knows {FORMAT}'
        assert f'{path} cannot be loaded: {newer}' in text


# Nobody gets in


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f'open({str(self.path)!r}, "w").close()',))


def malicious(folder, kind):
    """A file of weights that runs code, and the file which that writes."""
    exploded = folder / 'exploded'
    path = folder / 'last.pth.tar'
    if kind == 'zip':
        torch.save({'state_dict': {}, 'epoch': 3, 'args': Bomb(exploded)}, path)
    elif kind == 'legacy':
        torch.save({'state_dict': {}, 'epoch': 3, 'args': Bomb(exploded)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps({'state_dict': Bomb(exploded)}, protocol=2))
    return path, exploded


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'pickle'])
@pytest.mark.parametrize(
    'flag', ['--resume', '--resume auto', '--initial-checkpoint', '--pretrained-path', 'validate.py']
)
def test_a_pickle_that_runs_code_is_refused(run_train, tmp_path, monkeypatch, image_folder, capsys, caplog, flag, kind):
    folder = tmp_path / 'run'
    folder.mkdir()
    path, exploded = malicious(folder, kind)
    with contextlib.suppress(RuntimeError):  # of what the pickle leaves, which is no checkpoint
        torch.load(path, weights_only=False)
    assert exploded.exists()  # it does work
    exploded.unlink()
    with pytest.raises(SystemExit) as error:  # noqa: PT012
        if flag == 'validate.py':
            argv = ['validate.py', '--data-dir', str(image_folder), '--num-classes', '4', '--device', 'cpu']
            argv += ['--model', 'test_efficientnet', '--checkpoint', str(path), '-j', '0']
            monkeypatch.setattr(sys, 'argv', argv)
            entry.run(validate)
        else:
            run_train(*(flag.split() if ' ' in flag else [flag, str(path)]))
    assert error.value.code == 2
    assert not exploded.exists()
    text = capsys.readouterr().err + caplog.text
    assert 'could run code' in text
    assert 'Traceback' not in text


@pytest.mark.parametrize(
    'run', ['x', [1], {'format': 1}, {'format': 'x', 'epoch': 1, 'batch': 0}, {'format': 1, 'epoch': 'x'}]
)
def test_what_is_no_checkpoint_is_said_to_be_none(run_train, finished, capsys, run):
    path = finished.folder / 'last.pth.tar'
    content = torch.load(path, weights_only=False)
    content['saver']['run'] = run
    torch.save(content, path)
    with pytest.raises(SystemExit):
        run_train('--synermix', '--resume', str(path))
    assert 'it is not a checkpoint of a training run' in capsys.readouterr().err


@pytest.mark.parametrize(
    'history',
    [
        {'saver': {'pending': ('x/../../escaped', 1e9)}},
        {'metric': 'x'},
        {'saver': {'best_epoch': '../x'}},
        {'saver': {'checkpoint_files': [[1, 2]]}},
    ],
)
def test_a_history_that_is_none_is_refused(run_train, capsys, tmp_path, history):
    stopped = run_train('--stop-epoch', '1', '--epochs', '2')
    (stopped.folder / 'checkpoint-x').mkdir()
    (stopped.folder / 'checkpoint-0.pth.tar').unlink()
    path = stopped.folder / 'last.pth.tar'
    content = torch.load(path, weights_only=False)
    for key, value in history.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    torch.save(content, path)
    if 'pending' in history.get('saver', {}):  # which is not asked: the epoch says the same
        assert len(run_train('--epochs', '2', '--resume', 'auto').summary()) == 2
    else:
        with pytest.raises(SystemExit) as error:
            run_train('--epochs', '2', '--resume', 'auto')
        assert error.value.code == 2
        assert 'no checkpoint in' in capsys.readouterr().err
    assert not list(tmp_path.glob('escaped*'))


def test_an_optimizer_of_an_older_torch_is_taken(run_train):
    """Newer versions add settings to an optimizer's groups."""
    flags = ['--opt', 'adamw', '--epochs', '2']
    stopped = run_train(*flags, '--stop-epoch', '1')
    path = stopped.folder / 'last.pth.tar'
    content = torch.load(path, weights_only=False)
    for group in content['optimizer']['param_groups']:
        del group['decoupled_weight_decay']
    torch.save(content, path)
    assert len(run_train(*flags, '--resume', 'auto').summary()) == 2


def test_a_checkpoint_deletes_nothing_but_checkpoints(run_train, tmp_path):
    """Its history names files, the worst of which is deleted when a better one comes."""
    victims = [tmp_path / 'victim', tmp_path / 'run' / 'summary.txt', tmp_path / 'checkpoint-9.pth.tar']
    flags = ['--epochs', '3', '--checkpoint-hist', '1']
    stopped = run_train(*flags, '--stop-epoch', '1')
    for victim in victims:
        victim.write_text('precious')
    path = stopped.folder / 'last.pth.tar'
    content = torch.load(path, weights_only=False)
    files = ['../victim', str(victims[0]), 'summary.txt', '../checkpoint-9.pth.tar', str(victims[2])]
    content['saver']['checkpoint_files'] = [(name, -1.0) for name in files]
    torch.save(content, path)
    run_train(*flags, '--resume', 'auto')
    assert all(victim.exists() for victim in victims)


@pytest.mark.parametrize('name', ['../elsewhere', '/tmp/elsewhere', 'a/../../elsewhere', '..', '.'])
@pytest.mark.parametrize('config', [False, True])
def test_no_run_leaves_the_output_folder(tmp_path, capsys, name, config):
    flags = ['--experiment', name]
    if config:
        (tmp_path / 'config.yaml').write_text(yaml.safe_dump({'experiment': name}))
        flags = ['--config', str(tmp_path / 'config.yaml')]
    with pytest.raises(SystemExit) as error:
        train.parse_args(train.config_parser, train.parser, ['--data-dir', 'x', *flags])
    assert error.value.code == 2
    assert '--experiment must name a folder inside of --output' in capsys.readouterr().err


def test_a_config_makes_no_objects(tmp_path, capsys):
    path = tmp_path / 'config.yaml'
    path.write_text(f'model: !!python/object/apply:os.mkdir ["{tmp_path}/made"]\n')
    with pytest.raises(SystemExit):
        train.parse_args(train.config_parser, train.parser, ['--config', str(path)])
    assert '--config: cannot read' in capsys.readouterr().err
    assert not (tmp_path / 'made').exists()


def test_checksums_are_those_of_the_zip_file(tmp_path):
    """torch writes the checksum of every record, and any tool for zip files can check them."""
    torch.save({'a': torch.arange(1000.0)}, tmp_path / 'file')
    check_whole(str(tmp_path / 'file'))
    with zipfile.ZipFile(tmp_path / 'file') as file:
        assert all(info.CRC for info in file.infolist() if info.file_size)
    content = bytearray((tmp_path / 'file').read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / 'file').write_bytes(content)
    torch.load(io.BytesIO(bytes(content)))  # does not notice
    with pytest.raises(ValueError, match=r'checksum of .*data/0'):
        check_whole(str(tmp_path / 'file'))


def test_what_is_renamed_is_on_the_disk_and_then_its_folder_too(tmp_path, monkeypatch):
    """A file system may keep a rename and lose the content, if that was not waited for."""
    saver = make_saver(tmp_path / 'run')
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: done.append(os.fstat(fd).st_ino) or fsync(fd))
    monkeypatch.setattr(os, 'replace', lambda a, b: done.append((os.stat(a).st_ino, b)) or replace(a, b))
    save(saver, 0)
    save(saver, 1, recovery=True)
    folder = (tmp_path / 'run').stat().st_ino
    renamed = {}
    for i, item in enumerate(done):
        if isinstance(item, tuple):
            renamed[os.path.basename(item[1])] = i
            assert item[0] in done[:i]
            assert done[i + 1] == folder
    names = {
        'last.pth.tar',
        'checkpoint-0.pth.tar',
        'model_best.pth.tar',
        'model_best.safetensors',
        'model.safetensors',
        'recovery-1-0.pth.tar',
    }
    assert renamed.keys() == names


def test_an_earlier_format_goes_on_at_the_end_of_an_epoch_alone(run_train, finished, capsys):
    """Its epochs had the images in another order."""
    paths = [sorted(finished.folder.glob('recovery-*'))[0], finished.folder / 'last.pth.tar']
    for path in paths:
        content = torch.load(path, weights_only=False)
        content['saver']['run']['format'] = FORMAT - 1
        torch.save(content, path)
    with pytest.raises(SystemExit) as error:
        run_train('--synermix', '--resume', str(paths[0]), experiment='other')
    assert error.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert f'--resume must name a checkpoint of a whole epoch, {paths[0]} is of an earlier version' in line
    assert len(run_train('--synermix', '--resume', str(paths[1]), '--epochs', '2', experiment='third').results) == 1
