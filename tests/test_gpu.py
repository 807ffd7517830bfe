"""What a GPU does and a CPU does not. Skipped without one; SYNERMIX_TEST_DEVICE=cpu tries what a CPU can do of it."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, assert_same_run

from timm_synermix.data.on_device import Augmentation

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # for deterministic sums; read when CUDA starts

DEVICE = os.environ.get('SYNERMIX_TEST_DEVICE', 'cuda')
pytestmark = pytest.mark.skipif(DEVICE == 'cuda' and not torch.cuda.is_available(), reason='needs a GPU')
needs_cuda = pytest.mark.skipif(DEVICE != 'cuda', reason='a CPU has none')

SYNERMIX = ['--device', DEVICE, '--synermix', '--mixup', '0.5', '--epochs', '2', '--warmup-epochs', '0']
FAST = ['--on-device', '--crop-padding', '2', '--cutout', '6', '--color-jitter', '0']


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@needs_cuda
def test_updates_that_overflow_are_left_out(run_train, monkeypatch):
    """The scaler of float16 begins far too high, comes down, and is kept in the checkpoint."""
    init = torch.amp.GradScaler.__init__
    monkeypatch.setattr(torch.amp.GradScaler, '__init__', lambda self, *args, **kwargs: init(self, 'cuda', 2.0**34))
    run = run_train(*SYNERMIX, '--amp', '--epochs', '8')
    state = run.checkpoint()
    assert 0 < state['amp_scaler']['scale'] < 2.0**34
    assert all(value.isfinite().all() for value in state['state_dict'].values())


VARIANTS = {
    'plain': ['--reprob', '0.5', '--drop', '0.3', '--model-ema'],
    'float16': pytest.param(['--amp', '--clip-grad', '1'], marks=needs_cuda),
    'bfloat16': ['--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--synermix-batch', 'fixed'],
    'on device': [*FAST, '--synermix-fraction', '0.25', '--model-ema'],
}


@pytest.mark.parametrize('flags', VARIANTS.values(), ids=list(VARIANTS))
def test_a_resumed_run_is_a_whole_one_to_the_bit(run_train, stop_at, deterministic, flags):
    """In torch's deterministic mode."""
    whole = run_train(*SYNERMIX, *flags, experiment='whole')  # six batches
    restore = stop_at('keep_update', 4, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run_train(*SYNERMIX, *flags, experiment='stopped')
    restore()
    assert_same_run(run_train(*SYNERMIX, *flags, '--resume', 'auto', experiment='stopped'), whole)


def test_one_process_of_a_launcher(run_train, image_folder, tmp_path, deterministic):
    """NCCL with nobody to talk to changes nothing."""
    alone = run_train(*SYNERMIX, experiment='alone')
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '1', '--standalone']
    data = ['--data-dir', image_folder, '--num-classes', 4, '--output', tmp_path, '--experiment', 'launched']
    flags = [*data, *SMALL, *SYNERMIX, '--synermix-gather']
    subprocess.run([*launcher, *map(str, [ROOT / 'train.py', *flags])], check=True, timeout=300, capture_output=True)
    weights = alone.checkpoint()['state_dict']
    launched = torch.load(tmp_path / 'launched' / 'last.pth.tar', weights_only=False)['state_dict']
    assert weights.keys() == launched.keys()
    for name, value in weights.items():
        assert torch.allclose(launched[name].float(), value.float(), atol=1e-3), name


def test_compiled_by_inductor(run_train):
    """The losses are those of the model as it is, but for rounding. On a CPU by another backend: inductor's is slow."""
    flags = [*SYNERMIX, '--synermix-batch', 'fixed', '--epochs', '1']  # of one size, or each would be compiled
    plain = run_train(*flags, experiment='plain')
    backend = 'inductor' if DEVICE == 'cuda' else 'aot_eager'
    compiled = run_train(*flags, '--torchcompile', backend, experiment='compiled')
    for row, expected in zip(compiled.summary(), plain.summary(), strict=True):
        assert row['train_loss'] == pytest.approx(expected['train_loss'], rel=0.02)


def test_views_do_not_depend_on_the_device():
    images, augmentation = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8), Augmentation(4, 0.5, 16)
    draws = augmentation.draw(len(images), (32, 32), torch.Generator().manual_seed(0))
    views = augmentation(images.to(DEVICE), draws.to(DEVICE))
    assert torch.equal(views.cpu(), augmentation(images, draws))
