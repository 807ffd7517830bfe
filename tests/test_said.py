"""What a run of train.py says where it cannot start or go on: one line, and how to go on."""

import errno
import os

import pytest
import timm
import torch

import train
from timm_synermix.engine.checkpoint import RunSaver
from timm_synermix.engine.resume_point import ResumePoint
from timm_synermix.utils.distributed import lost_worker, lost_worker_reason
from timm_synermix.utils.safe_load import load_content

LOST = 'DataLoader worker (pid 9) is killed by signal: Killed. '


def test_precision_of_accelerates_configuration(run_train, monkeypatch, caplog, capsys):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    run_train()
    assert 'bfloat16 autocast' in caplog.text
    assert 'no autocast' not in caplog.text
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'fp16')
    with pytest.raises(SystemExit) as error:
        run_train(experiment='half')
    assert error.value.code == 2
    assert "mixed_precision in Accelerate's configuration must be no or bf16 on the CPU" in capsys.readouterr().err


def test_a_start_beyond_the_end_is_refused(run_train, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        run_train('--start-epoch', '7')
    assert error.value.code == 2
    assert '--start-epoch must be at most the 1 epochs of the run, got 7' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_a_teacher_that_cannot_be_had(run_train, monkeypatch, capsys, tmp_path):
    def offline(*args, **kwargs):
        raise OSError('We could not connect to the hub.')

    monkeypatch.setattr('timm.task.distillation.create_model', offline)
    with pytest.raises(SystemExit) as error:
        run_train('--kd-model-name', 'test_vit')
    assert error.value.code == 2
    assert '--kd-model-name: the teacher test_vit cannot be had: We could not connect' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def saved(folder, *args, **kwargs):
    """The name by which timm loads a model that is saved here."""
    timm.models.save_for_hf(timm.create_model(*args, **kwargs), folder)
    return f'local-dir:{folder}'


def test_a_teacher_that_cannot_take_the_images(run_train, capsys, tmp_path):
    teacher = saved(tmp_path / 'teacher', 'levit_128s', num_classes=4)
    with pytest.raises(SystemExit):
        run_train('--kd-model-name', teacher)
    assert f'--kd-model-name: the teacher {teacher} cannot take images of 3x32x32: ' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_a_teacher_of_other_classes(run_train, caplog, tmp_path):
    teacher = saved(tmp_path / 'teacher', 'test_resnet', num_classes=7)
    line = 'was trained on 7 classes, not on 4: its classifier is a new one'
    run_train('--kd-model-name', teacher, '--kd-distill-type', 'feature', experiment='feature')
    assert line not in caplog.text
    run_train('--kd-model-name', teacher)
    assert f'--kd-model-name: the teacher {teacher} {line}' in caplog.text


def test_a_teacher_of_grey_images(run_train, tmp_path):
    """timm's means have three channels; the loader's of grey images have their mean."""
    teacher = saved(tmp_path / 'teacher', 'test_resnet', num_classes=4, in_chans=1)
    assert run_train('--kd-model-name', teacher, '--in-chans', '1').summary()[0]['train_kd_loss'] > 0


@pytest.mark.parametrize('where', ['update', 'save'])
def test_a_loader_worker_that_is_killed(run_train, monkeypatch, caplog, tmp_path, where):
    """torch raises wherever the process is just then; a save is not to blame."""
    calls = []

    def killed(original):
        def function(*args, **kwargs):
            calls.append(None)
            if len(calls) > (3 if where == 'update' else 1):
                raise RuntimeError(LOST)
            return original(*args, **kwargs)

        return function

    if where == 'update':
        monkeypatch.setattr(train, 'update_weights', killed(train.update_weights))
    else:
        monkeypatch.setattr(torch, 'save', killed(torch.save))
    with pytest.raises(SystemExit) as error:
        run_train('--epochs', '3')
    assert error.value.code == 1
    said = caplog.text.splitlines()[-1]
    assert 'Stopped: DataLoader worker (pid 9) is killed by signal: Killed, as the system does when memory' in said
    assert f'The last good checkpoint is {tmp_path}/run/last.pth.tar. To go on: python train.py' in said
    assert 'Cannot save' not in caplog.text
    assert not [path for path in (tmp_path / 'run').iterdir() if 'tmp' in path.name]


@pytest.mark.parametrize('how', ['none', 'half'])
def test_no_room_in_shared_memory(run_train, monkeypatch, caplog, how):
    """Where batches are written to, as in a container of 64 MB."""

    def full(file, data, offset):
        if how == 'half':
            return len(data) // 2
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'pwrite', full)
    with pytest.raises(SystemExit) as error:
        run_train('--synermix', '-j', '1')
    assert error.value.code == 1
    said = caplog.text.splitlines()[-1]
    assert 'Stopped: A loader worker found no room in shared memory (/dev/shm): fewer --workers or a smaller' in said
    assert 'To go on: ' in said or 'No checkpoint' in said


@pytest.mark.parametrize(
    ('message', 'lost'),
    [
        (LOST, True),
        (f"{LOST}It is possible that dataloader's workers are out of shared memory. Please try to raise it.", True),
        ('DataLoader worker (pid(s) 7, 9) exited unexpectedly', True),
        ('Caught RuntimeError in DataLoader worker process 0.\nTraceback ...\nRuntimeError: of a transform', False),
    ],
)
def test_what_is_a_lost_worker(message, lost):
    assert lost_worker(RuntimeError(message)) == lost
    assert ('--shm-size' in lost_worker_reason(RuntimeError(message))) == ('shared memory' in message)


def test_outputs_keep_their_classes(run_train, tmp_path, capsys):
    """A checkpoint holds the numbers of the classes, and a run that numbers them otherwise does not go on from it."""
    run = run_train()
    numbers = {'a': 0, 'b': 1, 'c': 2, 'lone': 3}
    assert load_content(str(run.folder / 'last.pth.tar'))['saver']['run']['class_to_idx'] == numbers
    (tmp_path / 'map.txt').write_text('\n'.join(['a', 'c', 'b', 'lone']))
    for flags, said in [
        (['--class-map', str(tmp_path / 'map.txt')], "must number the class 'b' 1, as of"),
        (['--dataset', 'sklearn/digits', '--num-classes', '4'], ''),
    ]:
        with pytest.raises(SystemExit) as error:
            run_train('--epochs', '2', '--resume', 'auto', *flags)
        assert error.value.code == 2
        assert said in capsys.readouterr().err
    (tmp_path / 'map.txt').write_text('\n'.join(numbers))
    assert len(run_train('--epochs', '2', '--resume', 'auto', '--class-map', str(tmp_path / 'map.txt')).summary()) == 2


def test_a_folder_that_is_new_is_taken_away_again(tmp_path, monkeypatch):
    """If the run cannot be built to its end, but not one that was there."""
    from test_checkpoint import make_saver

    for folder, is_new in ((tmp_path / 'new', True), (tmp_path / 'old', False)):
        if not is_new:
            folder.mkdir()
        saver: RunSaver = make_saver(folder)
        with pytest.raises(ValueError, match='no tracker'), saver.discarded_unless_built():
            raise ValueError('no tracker')
        assert folder.exists() != is_new


def test_a_checkpoint_is_not_put_aside_for_a_worker(tmp_path, monkeypatch):
    """That dies while the checkpoints of a folder are looked at."""
    from test_checkpoint import find, make_saver, save

    save(make_saver(tmp_path / 'run'), 0)
    saver = make_saver(tmp_path / 'run', find(tmp_path / 'run'))

    def read(path):
        raise RuntimeError(LOST)

    monkeypatch.setattr(ResumePoint, 'read', read)
    with pytest.raises(RuntimeError, match='DataLoader worker'):
        saver.begin()
    assert not list((tmp_path / 'run').glob('*.old'))


def test_what_is_not_foreseen_says_what_to_quote(run_train, monkeypatch, capsys, tmp_path):
    """Below its traceback: the step, the command as it can be pasted, and versions."""

    def fail(*args):
        raise KeyError('no such thing')

    monkeypatch.setattr(train, 'train_one_epoch', fail)
    with pytest.raises(SystemExit) as error:
        run_train('--model-kwargs', 'zero_init_last=', 'x y')
    assert error.value.code == 2  # a flag that is wrong is one line still
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        run_train('--wandb-tags', 'two words')
    assert error.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-2] == "KeyError: 'no such thing'"
    assert 'in fit() of timm_synermix.train' in lines[-1]
    assert f"--output {tmp_path} --experiment run --wandb-tags 'two words'" in lines[-1]
    assert f'timm {timm.__version__}' in lines[-1]
