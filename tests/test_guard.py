"""Losses that are not finite, in a guard by itself and in runs."""

import shlex

import pytest
import torch
from conftest import make_run
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn

import train
from timm_synermix import SynerMixTask, intra_class_mix
from timm_synermix.engine.loss_guard import LossGuard, NonFiniteLoss
from timm_synermix.utils.distributed import HostGroup

NAN, INF = float('nan'), float('inf')


def losses(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ('result', 'named'),
    [
        (losses(loss=NAN, intra_loss=NAN, inter_loss=1.0), 'intra_loss'),
        (losses(loss=INF, intra_loss=1.0, inter_loss=-INF), 'inter_loss'),
        (losses(loss=NAN, intra_loss=INF, inter_loss=NAN), 'inter_loss and intra_loss'),
        (losses(loss=NAN, task_loss=1.0, kd_loss=NAN), 'kd_loss'),
        (losses(loss=INF), 'loss'),
    ],
)
def test_the_part_and_the_update_are_named(result, named):
    guard = LossGuard([], HostGroup())
    for update in range(3):
        guard.add({name: torch.ones(()) for name in result}, update)
        assert guard.accepts(epoch=4)
    guard.add(result, 3)
    guard.add({name: torch.ones(()) for name in result}, 3)  # the rest of an update of several batches
    with pytest.raises(NonFiniteLoss, match=f'^not a finite number: {named} of update 3 of epoch 4$'):
        guard.accepts(epoch=4)


def test_so_many_updates_are_left_out_and_no_more(caplog):
    buffer = torch.zeros(2)
    guard = LossGuard([buffer], HostGroup(), max_bad_steps=3, num_bad_steps=1)
    accepted = []
    for update, value in enumerate([1.0, NAN, 1.0, INF]):
        buffer += value
        guard.add(losses(loss=value), update)
        accepted.append(guard.accepts(epoch=0))
        assert torch.equal(buffer, torch.full((2,), float(sum(accepted))))  # BatchNorm's statistics are put back
    assert accepted == [True, False, True, False]
    assert 'Skipped an update, 3 of at most 3: not a finite number: loss of update 3 of epoch 0' in caplog.text
    guard.add(losses(loss=NAN), 4)
    with pytest.raises(NonFiniteLoss):
        guard.accepts(epoch=0)


def test_buffers_are_put_back_to_what_they_were_made_between_epochs():
    """BatchNorm's statistics are averaged over the processes after the last update of an epoch."""
    buffer = torch.zeros(2)
    guard = LossGuard([buffer], HostGroup(), max_bad_steps=1)
    guard.add(losses(loss=1.0), 0)
    assert guard.accepts(epoch=0)
    buffer += 5
    guard.keep_buffers()
    buffer += NAN
    guard.add(losses(loss=NAN), 0)
    assert not guard.accepts(epoch=1)
    assert torch.equal(buffer, torch.full((2,), 5.0))


@pytest.mark.parametrize(
    ('ema', 'name', 'said'),
    [
        (False, 'conv_stem.weight', 'model in epoch 1, conv_stem.weight'),
        (False, 'bn1.running_var', 'model in epoch 1, bn1.running_var'),
        (True, 'conv_stem.weight', 'moving average in epoch 1, conv_stem.weight'),
    ],
)
def test_weights_that_are_broken_are_not_saved(run_train, monkeypatch, caplog, tmp_path, ema, name, said):
    """By gradients that are not finite, of a loss that is; or statistics that the loss does not use."""
    original = train.update_weights

    def update_weights(run, num_updates):
        original(run, num_updates)
        if num_updates == 6:  # the last one of the second epoch
            with torch.no_grad():
                unwrap_model(run.trained.task.get_eval_model(ema=ema)).state_dict()[name].view(-1)[0] = INF

    monkeypatch.setattr(train, 'update_weights', update_weights)
    with pytest.raises(SystemExit) as error:
        run_train('--epochs', '3', '--batch-size', '6', '--model-ema')
    assert error.value.code == 1
    assert f'Stopped: not a finite number: a weight of the {said}' in caplog.text
    assert torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)['epoch'] == 0


@pytest.fixture
def bad_loss(monkeypatch):
    """Make a part of the loss of some batches not finite, gradients and BatchNorm's statistics too."""

    def make(part, batches, value=NAN):
        draw, losses, calls = SynerMixTask._draw, SynerMixTask._losses, []

        def bad():
            return len(calls) - 1 in batches

        def draw_bad(self, input, target):
            calls.append(None)
            return draw(self, torch.full_like(input, NAN) if bad() and part == 'input' else input, target)

        def bad_losses(self, batch):
            result = losses(self, batch)
            if bad() and part in result:
                result['loss'] = result['loss'] * value
                result[part] = result[part] * value
            return result

        monkeypatch.setattr(SynerMixTask, '_draw', draw_bad)
        monkeypatch.setattr(SynerMixTask, '_losses', bad_losses)

    return make


@pytest.mark.parametrize('part', ['intra_loss', 'inter_loss'])
def test_a_run_stops_and_says_where_it_can_go_on(run_train, bad_loss, caplog, tmp_path, part):
    bad_loss(part, [4])
    with pytest.raises(SystemExit) as error:
        run_train('--synermix', '--mixup', '0.5', '--epochs', '3', '--model-ema')
    assert error.value.code == 1
    assert f'Stopped: not a finite number: {part} of update 1 of epoch 1. ' in caplog.text
    said = caplog.text.partition('To go on: ')[2].splitlines()[0]
    assert shlex.split(said)[:2] == ['python', 'train.py']
    assert said.endswith(' --experiment run --resume auto')
    assert f' --output {tmp_path} ' in said
    assert f'The last good checkpoint is {tmp_path}/run/last.pth.tar. ' in caplog.text
    state = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)
    assert all(value.isfinite().all() for value in state['state_dict'].values())


@pytest.mark.parametrize('part', ['intra_loss', 'input'])
def test_a_run_leaves_bad_updates_out(run_train, bad_loss, caplog, part):
    """The rest is as it would be without them: weights stay finite, the mean loss is that of the good batches."""
    bad_loss(part, [1, 4])
    flags = ['--synermix', '--epochs', '2', '--model-ema', '--clip-grad', '1', '--warmup-epochs', '0', '--lr', '0.01']
    run = run_train(*flags, '--max-bad-steps', '2')
    assert caplog.text.count('Skipped an update') == 2
    state = run.checkpoint()
    for key in ('state_dict', 'state_dict_ema'):
        assert all(value.isfinite().all() for value in state[key].values())
    assert all(0 < row['train_loss'] < 10 for row in run.summary())
    assert state['saver']['run']['num_bad_steps'] == 2


def test_the_count_goes_on_after_a_resume(run_train, bad_loss, caplog):
    bad_loss('intra_loss', [1])
    run_train('--synermix', '--epochs', '2', '--stop-epoch', '1', '--max-bad-steps', '1')
    bad_loss('intra_loss', [0])
    with pytest.raises(SystemExit):
        run_train('--synermix', '--epochs', '2', '--resume', 'auto', '--max-bad-steps', '1')
    assert 'Stopped: not a finite number: intra_loss of update 0 of epoch 1' in caplog.text


def test_nothing_is_stepped_for_an_update_that_is_left_out():
    """A hand-written loop without the bad batch ends with the same weights."""
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(4)]

    def model():
        torch.manual_seed(1)
        return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))

    args = train.parser.parse_args(['--device', 'cpu', '--max-bad-steps', '1'])
    accelerator = train.create_train_accelerator(args)
    trained, reference = model(), model()
    task = ClassificationTask(trained, verbose=False)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.5, momentum=0.9)
    with_bad = [*batches[:2], (torch.full((4, 3), INF), batches[0][1]), *batches[2:]]
    run = make_run(args, accelerator, task, optimizer, with_bad)
    run.keeper.guard = LossGuard(trained.buffers(), HostGroup(), max_bad_steps=1)
    train.train_one_epoch(run, epoch=0)

    sgd = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9)
    for x, y in batches:
        sgd.zero_grad()
        nn.functional.cross_entropy(reference(x), y).backward()
        sgd.step()
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name])


def test_float16_features_do_not_overflow_in_the_mix():
    """Features near the largest float16 number: a sum of them overflows, a mean of them in float32 does not."""
    largest = torch.finfo(torch.float16).max
    feature = torch.full((64, 8), largest, dtype=torch.float16)
    feature[::2] *= 0.75
    target = torch.zeros(64, dtype=torch.int64)
    weight = torch.rand(64)
    mixed, _ = intra_class_mix(feature, target, weight=weight)
    expected = (weight[:, None].double() * feature.double()).sum(0) / weight.sum().double()
    assert mixed.dtype == torch.float16
    assert mixed[0].isfinite().all()
    torch.testing.assert_close(mixed[0].double(), expected, rtol=1e-3, atol=0)
    assert not feature.sum(0).isfinite().all()


def test_gradient_scaling_is_not_counted():
    """The scale starts so high that gradients overflow: the scaler leaves updates out until it has come down."""
    torch.manual_seed(0)
    batches = [(20 * torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(12)]
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    args = train.parser.parse_args(['--device', 'cpu', '--max-bad-steps', '1'])
    accelerator = train.create_train_accelerator(args)
    accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=2.0**127, backoff_factor=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    run = make_run(args, accelerator, ClassificationTask(model, verbose=False), optimizer, batches)
    run.keeper.guard = LossGuard(model.buffers(), HostGroup(), max_bad_steps=1)
    train.train_one_epoch(run, epoch=0)
    assert 1 <= 127 - torch.tensor(accelerator.scaler.get_scale()).log2() < 12  # some were left out, not all
    assert run.keeper.guard.num_bad_steps == 0
    assert model.weight.isfinite().all()
    assert not torch.equal(model.weight, before)
