"""A run of any optimizer is saved, and goes on to the last bit."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.task import ClassificationTask
from torch import nn

from timm_synermix.engine.checkpoint import RunSaver
from timm_synermix.engine.resume import find_resume_point, generator_states, resume_task

SECOND_ORDER = pytest.mark.filterwarnings('ignore:Using backward:UserWarning')
FLAGS = dict(model='net', num_classes=3, in_chans=3, task=None, batch_size=4, seed=0, world_size=1, rank=0)


class Net(nn.Sequential):
    def __init__(self, dtype):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 6), nn.ReLU(), nn.Linear(6, 3))
        self.to(dtype)


class Training:
    """Nothing but weights, an optimizer and an average, as train.py makes them."""

    def __init__(self, opt, dtype=torch.float32, **opt_kwargs):
        torch.manual_seed(0)
        self.task = ClassificationTask(Net(dtype), verbose=False)
        self.model, self.dtype = self.task.get_trainable_module(), dtype
        self.optimizer = create_optimizer_v2(self.model, opt=opt, lr=0.01, weight_decay=0.01, **opt_kwargs)
        self.task.setup_ema(decay=0.9)
        self.args = argparse.Namespace(opt=opt, **FLAGS)

    def train(self, first, last):
        for step in range(first, last):
            torch.manual_seed(step)  # as train.py does before each
            x, y = torch.randn(4, 3, 8, 8, dtype=self.dtype), torch.randint(0, 3, (4,))
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(x).float(), y)
            loss.backward(create_graph=getattr(self.optimizer, 'is_second_order', False))
            self.optimizer.step()
            self.task.update_ema(step=step)

    def save(self, folder):
        saver = RunSaver(
            str(folder),
            '',
            resume_from=None,
            start=(0, 0),
            model=self.model,
            task=self.task,
            optimizer=self.optimizer,
            args=self.args,
        )
        saver.run_state = dict(epoch=1, batch=0, generators=generator_states(self.task, self.optimizer))
        saver.save_checkpoint(0, metric=1.0)

    def resume(self, folder, **flags):
        where = SimpleNamespace(resume='auto', output=str(folder.parent), experiment=folder.name)
        args = argparse.Namespace(**vars(self.args), no_resume_opt=False, **vars(where), **flags)
        resume_task(args, self.task, self.optimizer, None, find_resume_point(args), 3)
        return self

    def weights(self):
        return {
            **self.model.state_dict(),
            **{'ema ' + k: v for k, v in self.task.trainable_module_ema.state_dict().items()},
        }


def assert_resumes(folder, *args, **kwargs):
    try:
        whole = Training(*args, **kwargs)
        whole.train(0, 3)
    except (NotImplementedError, ImportError, RuntimeError, ValueError, AssertionError, TypeError) as error:
        pytest.skip(f'cannot be built or used here: {error}')
    whole.save(folder)
    whole.train(3, 9)
    resumed = Training(*args, **kwargs).resume(folder)
    resumed.train(3, 9)
    fresh = Training(*args, **kwargs)
    for name, value in whole.weights().items():
        assert value.isfinite().all()
        assert torch.equal(resumed.weights()[name], value), name
    assert not torch.equal(fresh.model[0].weight, whole.model[0].weight)


@SECOND_ORDER
@pytest.mark.parametrize('opt', ['sgd', 'lamb', 'adan', 'lookahead_lamb', 'adahessian', 'muon'])
def test_a_run_goes_on(tmp_path, opt):
    assert_resumes(tmp_path / 'run', opt)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('opt', [prefix + name for prefix in ('', 'lookahead_') for name in list_optimizers()])
def test_a_run_of_any_optimizer_goes_on(tmp_path, opt):
    with torch.compiler.set_stance('force_eager'):  # Kron compiles its steps, for minutes
        assert_resumes(tmp_path / 'run', opt)


@SECOND_ORDER
def test_adahessian_that_looks_at_the_curvature_now_and_then(tmp_path):
    assert_resumes(tmp_path / 'run', 'adahessian', update_each=2)


def test_the_average_of_bfloat16_weights_rounds_as_before(tmp_path):
    assert_resumes(tmp_path / 'run', 'sgd', dtype=torch.bfloat16)


def test_another_optimizer_is_still_refused(tmp_path):
    """Also of a checkpoint that does not say which it was of."""
    training = Training('adamw')
    training.train(0, 2)
    training.save(tmp_path / 'run')
    with pytest.raises(ValueError, match='--opt must be adamw'):
        Training('sgd').resume(tmp_path / 'run')
    training.args.opt = 'lamb'
    training.save(tmp_path / 'other')
    with pytest.raises(ValueError, match='it is of another optimizer'):
        Training('lamb').resume(tmp_path / 'other')
