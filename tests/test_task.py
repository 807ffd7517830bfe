import copy
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import nn
from torch._dynamo.testing import CompileCounter

from timm_synermix import ManifoldMixup, SynerMixTask
from timm_synermix.functional import class_rows, row_weight
from timm_synermix.task.mixup import HalfMixup, create_mixup
from timm_synermix.utils.random import seed_of

B, CLASSES = 8, 5
TARGET = torch.tensor([0, 1, 0, 3, 1, 3, 3, 4])


class Model(nn.Sequential):
    def get_classifier(self):
        return self[-1]


def create_model(norm=True):
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU()]
    return Model(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)).double()


def create_task(model=None, **kwargs):
    return SynerMixTask(create_model() if model is None else model, dtype=torch.float64, verbose=False, **kwargs)


def images():
    return torch.randn(2 * B, 3, 16, 16, dtype=torch.float64)


def intra_loss_by_loop(model, clean, weight, criterion):
    """The paper's intra-class loss: one class after the other, one feature each."""
    feature = nn.Sequential(*model[:-1])(clean)
    losses = []
    for c in TARGET.unique():
        members = TARGET == c
        mixed = (weight[members] / weight[members].sum()) @ feature[members]
        losses.append(criterion(model[-1](mixed[None]), c[None]))
    return torch.stack(losses).mean()


@pytest.fixture
def fixed_draws(monkeypatch):
    """Put known draws in place of the task's random ones."""
    draws = torch.rand(B, dtype=torch.float64) + 0.1
    monkeypatch.setattr(
        'timm_synermix.task.synermix.row_weight',
        lambda row, num_mixed, generator: row_weight(row, num_mixed=num_mixed, weight=draws),
    )
    return draws


CRITERIA = {
    'ce': (dict(), lambda logits, target: F.cross_entropy(logits, target)),
    'smoothing': (dict(smoothing=0.2), lambda logits, target: F.cross_entropy(logits, target, label_smoothing=0.2)),
    'bce': (
        dict(loss_type='bce'),
        lambda logits, target: F.binary_cross_entropy_with_logits(logits, F.one_hot(target, CLASSES).to(logits)),
    ),
    'bce-sum': (
        dict(loss_type='bce', bce_sum=True),
        lambda logits, target: (
            CLASSES * F.binary_cross_entropy_with_logits(logits, F.one_hot(target, CLASSES).to(logits))
        ),
    ),
    'poly': (
        dict(loss_type='poly', poly_epsilon=1.5),
        lambda logits, target: (
            F.cross_entropy(logits, target) + 1.5 * (1 - logits.softmax(-1)[:, target.item()].mean())
        ),
    ),
}


@pytest.mark.parametrize('name', CRITERIA)
def test_both_losses_and_gradients_equal_the_paper_s_loop(name, fixed_draws):
    criterion_kwargs, criterion = CRITERIA[name]
    model = create_model()
    reference = copy.deepcopy(model)
    x = images()
    task = create_task(model, criterion_kwargs=criterion_kwargs, beta=0.3)
    result = task(x.clone(), TARGET)
    result['loss'].backward()

    intra = intra_loss_by_loop(reference, x[:B], fixed_draws, criterion)  # the clean forward comes first
    plain = ClassificationTask(reference, criterion_kwargs=criterion_kwargs, verbose=False)
    inter = plain(x[B:], TARGET)['loss']
    loss = 0.3 * intra + 0.7 * inter
    loss.backward()
    tolerance = dict(atol=1e-6, rtol=1e-6, check_dtype=False) if name == 'poly' else {}  # timm's is in float32
    torch.testing.assert_close(result['intra_loss'], intra.detach(), **tolerance)
    torch.testing.assert_close(result['inter_loss'], inter.detach(), **tolerance)
    torch.testing.assert_close(result['loss'], loss, **tolerance)
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad, **tolerance)
    for p, q in zip(model.buffers(), reference.buffers()):  # BatchNorm saw the same batches in the same order
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem', 'half'])
@pytest.mark.parametrize('kind', [dict(mixup_alpha=1.0), dict(cutmix_alpha=1.0, mixup_alpha=0.0)])
def test_mixup_mixes_the_augmented_half_as_timm_does(mode, kind):
    model = create_model(norm=False)
    mixup = dict(num_classes=CLASSES, label_smoothing=0.1, **kind)
    task = create_task(model, mixup_fn=create_mixup(mode, **mixup), beta=0.3)
    x = images()
    np.random.seed(2)
    result = task(x.clone(), TARGET)

    np.random.seed(2)
    mixed, soft = Mixup(mode='elem' if mode == 'half' else mode, **mixup)(x[B:].clone(), TARGET)
    if mode == 'half':
        mixed, soft = mixed[: B // 2], soft[: B // 2]
    inter = -(soft * model(mixed).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(result['inter_loss'], inter.detach())
    assert len(result['output']) == len(mixed)
    assert not torch.equal(mixed, x[B : B + len(mixed)])


def test_half_mode_is_timm_s():
    """timm has it in its collate function alone, on uint8 images."""
    from timm.data import FastCollateMixup

    kwargs = dict(mixup_alpha=0.0, cutmix_alpha=1.0, num_classes=CLASSES, label_smoothing=0.0)
    x = torch.randint(0, 256, (B, 3, 16, 16), dtype=torch.uint8)
    np.random.seed(0)
    expected, _ = FastCollateMixup(mode='half', **kwargs)(
        [(image.numpy().copy(), y.item()) for image, y in zip(x, TARGET)]
    )
    mixed, soft = HalfMixup(**kwargs)(x.double(), TARGET)
    assert mixed.shape == expected.shape
    for i in range(B // 2):  # the boxes are drawn differently: each image is made of its own and its partner's pixels
        own, partner = x[i].double(), x[B - 1 - i].double()
        assert ((mixed[i] == own) | (mixed[i] == partner)).all()
        share = (mixed[i] != own).any(0).double().mean()
        assert soft[i, TARGET[i]] >= 1 - share - 0.02


class SwapHalves:
    """A mixer as a user may write one."""

    def __call__(self, x, target):
        soft = F.one_hot(target, CLASSES).to(x)
        return 0.7 * x + 0.3 * x.roll(len(x) // 2, 0), 0.7 * soft + 0.3 * soft.roll(len(x) // 2, 0)


MIXERS = {
    'none': lambda model: None,
    'mixup': lambda model: create_mixup(num_classes=CLASSES),
    'cutmix-pair': lambda model: create_mixup('pair', mixup_alpha=0.0, cutmix_alpha=1.0, num_classes=CLASSES),
    'switch-elem': lambda model: create_mixup('elem', cutmix_alpha=1.0, num_classes=CLASSES),
    'half': lambda model: create_mixup('half', num_classes=CLASSES),
    'manifold': lambda model: ManifoldMixup(model, CLASSES, (3, 16, 16), layers=['2']),
    'manifold-input': lambda model: ManifoldMixup(model, CLASSES, (3, 16, 16), layers=['input']),
    'own': lambda model: SwapHalves(),
}


@pytest.mark.parametrize('name', MIXERS)
def test_beta_zero_is_timm_s_task_bit_for_bit(name):
    model = create_model().float()
    reference = copy.deepcopy(model)
    x = images().float()
    task = create_task(model, mixup_fn=MIXERS[name](model), beta=0.0)
    np.random.seed(1)
    result = task(x.clone(), TARGET)
    result['loss'].backward()

    mixup_fn = MIXERS[name](reference)
    plain = ClassificationTask(reference, criterion_kwargs=dict(soft_targets=mixup_fn is not None), verbose=False)
    np.random.seed(1)
    mixed, soft = (x[B:], TARGET) if mixup_fn is None else mixup_fn(x[B:].clone(), TARGET)
    with mixup_fn.mixing(B) if hasattr(mixup_fn, 'mixing') else nullcontext():
        expected = plain(mixed, soft)
    expected['loss'].backward()
    assert torch.equal(result['loss'], expected['loss'])
    assert torch.equal(result['output'], expected['output'])
    assert 'intra_loss' not in result
    for p, q in zip(model.parameters(), reference.parameters()):
        assert torch.equal(p.grad, q.grad)
    for p, q in zip(model.buffers(), reference.buffers()):
        assert torch.equal(p, q)


@pytest.mark.parametrize('name', MIXERS)
def test_beta_one_is_the_intra_class_loss_alone(name, fixed_draws):
    model = create_model()
    reference = copy.deepcopy(model)
    x = images()
    result = create_task(model, mixup_fn=MIXERS[name](model), beta=1.0)(x, TARGET)
    torch.testing.assert_close(
        result['loss'], intra_loss_by_loop(reference, x[:B], fixed_draws, lambda z, t: F.cross_entropy(z, t))
    )
    assert 'inter_loss' not in result
    assert model[1].num_batches_tracked == 1  # no augmented forward


def test_images_with_a_clean_view_alone_join_the_intra_class_loss_alone(fixed_draws):
    model = create_model(norm=False)
    x = images()[: B + 6]  # the last two have no augmented view
    result = create_task(model, mixup_fn=SwapHalves(), beta=0.3)(x, TARGET)
    intra = intra_loss_by_loop(model, x[:B], fixed_draws, F.cross_entropy)
    mixed, soft = SwapHalves()(x[B:], TARGET[:6])
    torch.testing.assert_close(result['intra_loss'], intra.detach())
    torch.testing.assert_close(result['inter_loss'], F.cross_entropy(model(mixed), soft).detach())


@pytest.mark.parametrize('beta', [0.5, 1.0])
def test_the_bank_is_a_partner_for_lone_classes(beta):
    """Class 4 has one image; its feature of the step before, and no gradient through it, joins."""
    model = create_model(norm=False)
    task = create_task(model, beta=beta, bank=True)
    first, second = images(), images()
    task(first, TARGET)
    before = task.bank.state_dict()['feature0'][4].clone()
    torch.testing.assert_close(before.double(), nn.Sequential(*model[:-1])(first[B - 1 : B])[0].detach())

    result = task(second, TARGET)
    generator = torch.Generator().manual_seed(seed_of('mix', 42, 0, 1))  # rank 0, the second batch
    row, _ = class_rows(TARGET)
    weight = row_weight(row, generator=generator).double()
    u, v = 1 - torch.rand(2, B, generator=generator)
    share = (v / (u + v)).double()
    feature = nn.Sequential(*model[:-1])(second[:B])
    losses = []
    for r, c in enumerate(TARGET.unique()):
        mixed = weight[TARGET == c] @ feature[TARGET == c]
        if c == 4:
            mixed = (1 - share[r]) * mixed + share[r] * before.double()
        losses.append(F.cross_entropy(model[-1](mixed[None]), c[None]))
    torch.testing.assert_close(result['intra_loss'], torch.stack(losses).mean().detach(), atol=1e-6, rtol=1e-6)


def test_the_bank_goes_through_a_checkpoint_of_timm(tmp_path):
    model = create_model()
    task = create_task(model, bank=True)
    task(images(), TARGET)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    CheckpointSaver(model, optimizer, task=task, checkpoint_dir=str(tmp_path)).save_checkpoint(0, metric=1.0)
    other = create_task(bank=True)
    resume_task_checkpoint(other, str(tmp_path / 'last.pth.tar'))
    assert other.bank.state_dict().keys() == task.bank.state_dict().keys()
    for name, value in task.bank.state_dict().items():
        assert torch.equal(other.bank.state_dict()[name], value)


@pytest.mark.parametrize('how', ['disabled', 'one view'])
def test_without_the_intra_class_part(how):
    model = create_model(norm=False)
    task = create_task(model, beta=0.5)
    x = images()
    if how == 'disabled':
        task.synermix_enabled = False
        result = task(x, TARGET)
    else:
        result = task(x[B:], TARGET)
    torch.testing.assert_close(result['loss'], F.cross_entropy(model(x[B:]), TARGET))


def test_default_beta():
    assert create_task().beta == 0.5
    assert create_task(mixup_fn=Mixup(num_classes=CLASSES)).beta == 0.1


def test_num_mixed_is_used():
    x = images()
    model = create_model(norm=False)
    losses = {
        p: [create_task(model, beta=1.0, num_mixed=p, seed=s)(x, TARGET)['loss'].item() for s in range(8)]
        for p in (0, 1)
    }
    singles = F.cross_entropy(model(x[:B]), TARGET, reduction='none')
    # with one image per class the loss is a mean of the images' own losses
    best = sum(singles[TARGET == c].min() for c in TARGET.unique()) / 4
    worst = sum(singles[TARGET == c].max() for c in TARGET.unique()) / 4
    assert all(best - 1e-9 <= loss <= worst + 1e-9 for loss in losses[1])
    assert len({round(loss, 9) for loss in losses[0]}) == 8  # all: a new mixture for each seed


def test_weights_are_drawn_afresh_each_step_and_by_seed():
    x = images()
    model = create_model(norm=False)
    task = create_task(model, beta=1.0, seed=3)
    first, second = task(x, TARGET)['loss'], task(x, TARGET)['loss']
    assert first != second
    torch.manual_seed(99)
    again = create_task(model, beta=1.0, seed=3)
    assert again(x, TARGET)['loss'] == first
    assert create_task(model, beta=1.0, seed=4)(x, TARGET)['loss'] != first


def test_a_model_with_two_classifiers_gets_one_mixture():
    model = timm.create_model('levit_128s', num_classes=CLASSES).double().eval()
    task = create_task(model, beta=1.0)
    with torch.no_grad():
        x = torch.randn(2, 3, 224, 224, dtype=torch.float64)
        same = torch.cat([x[:1]] * 4)
        target = torch.tensor([0, 0, 1, 1])
        loss = task(torch.cat([same, same]), target)['loss']
        expected = F.cross_entropy(model(same[:2]), torch.tensor([0, 1]))  # mixing equal images changes nothing
    torch.testing.assert_close(loss, expected)


def test_ema_and_checkpoints_are_those_of_the_bare_model(tmp_path):
    model = timm.create_model('test_efficientnet', num_classes=CLASSES)
    keys = set(model.state_dict())
    task = SynerMixTask(model, verbose=False)
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        task(torch.randn(2 * B, 3, 32, 32), TARGET)['loss'].backward()
        optimizer.step()
        task.update_ema()
    state = task.get_checkpoint_state()
    ema = task.get_checkpoint_state(ema=True)['state_dict_ema']
    assert set(state['state_dict']) == set(ema) == keys
    name = 'classifier.weight'
    assert torch.equal(state['state_dict'][name], model.state_dict()[name])
    assert not torch.equal(ema[name], before[name])
    assert not torch.equal(ema[name], state['state_dict'][name])
    assert task.get_eval_model() is model

    CheckpointSaver(model, optimizer, task=task, checkpoint_dir=str(tmp_path)).save_checkpoint(0, metric=1.0)
    other = timm.create_model('test_efficientnet', num_classes=CLASSES)
    timm_task = ClassificationTask(other, verbose=False)
    timm_optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    assert resume_task_checkpoint(timm_task, str(tmp_path / 'last.pth.tar'), timm_optimizer) == 1
    assert torch.equal(other.state_dict()[name], model.state_dict()[name])
    assert len(timm_optimizer.state) == len(list(model.parameters()))
    # and back: a checkpoint of timm's task resumes here
    CheckpointSaver(other, timm_optimizer, task=timm_task, checkpoint_dir=str(tmp_path)).save_checkpoint(4, metric=1.0)
    assert resume_task_checkpoint(task, str(tmp_path / 'last.pth.tar'), optimizer) == 5


def test_clip_parameters_leave_out_the_head():
    task = create_task()
    everything = list(task.get_clip_parameters())
    assert len(everything) == 6
    assert [p.shape for p in task.get_clip_parameters(exclude_head=True)] == [p.shape for p in everything[:-2]]


def test_compiled_without_graph_breaks():
    """The eager backend traces as every backend does; fullgraph fails on a break."""
    model = create_model().float()
    reference = create_task(copy.deepcopy(model), beta=0.3, seed=1)
    task = create_task(model, beta=0.3, seed=1)
    eval_model = task.compile(backend='eager', fullgraph=True)
    x = images().float()
    compiled, eager = task(x, TARGET), reference(x, TARGET)
    for name in ('loss', 'intra_loss', 'inter_loss'):
        torch.testing.assert_close(compiled[name], eager[name])
    compiled['loss'].backward()
    assert set(task.get_checkpoint_state()['state_dict']) == set(model.state_dict())
    assert eval_model is task.get_eval_model()
    torch.testing.assert_close(eval_model.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ('kwargs', 'sizes', 'graphs'),
    [
        (dict(), [8], 1),
        (dict(bank=True), [8], 2),  # without a bank in the first step
        (dict(), [8, 10, 6, 12], 2),  # one for the first size, one for any other
    ],
)
def test_no_recompilation_after_warm_up(kwargs, sizes, graphs):
    torch.compiler.reset()  # forget what other tests' batches taught it
    counter = CompileCounter()
    task = create_task(create_model().float(), mixup_fn=create_mixup(num_classes=CLASSES), **kwargs)
    task.compile(backend=counter, fullgraph=True)
    counts = []
    for step in range(12):
        n = sizes[step % len(sizes)]
        target = torch.randint(0, CLASSES, (n,))
        task(torch.randn(2 * n, 3, 16, 16), target)['loss'].backward()
        counts.append(counter.frame_count)
    assert counts[len(sizes)] == counts[-1] == graphs


PARTS = {
    'plain': (dict(beta=0.3), 2),
    'mixup': (dict(beta=0.1, mixup_fn=Mixup(0.5, num_classes=CLASSES)), 2),
    'manifold': (dict(mixup_fn='manifold'), 2),
    'bank': (dict(bank=True), 2),
    'num_mixed': (dict(num_mixed=1), 2),
    'bce': (dict(criterion_kwargs=dict(loss_type='bce')), 2),
    'beta 0': (dict(beta=0.0), 1),
    'beta 1': (dict(beta=1.0), 1),
}


@pytest.mark.parametrize('name', PARTS)
def test_one_loss_after_the_other_has_the_same_gradients(name):
    """Two batches are accumulated; the average of BatchNorm and the losses are the same too."""
    kwargs, num_parts = PARTS[name]
    torch.manual_seed(0)
    model, batches = create_model(), [images(), images()]
    runs = []
    for in_parts in (False, True):
        np.random.seed(0)
        trained = copy.deepcopy(model)
        own = {}
        if kwargs.get('mixup_fn') == 'manifold':
            own = {'mixup_fn': ManifoldMixup(trained, CLASSES, (3, 16, 16), layers=['0'])}
        task = create_task(trained, **{**kwargs, **own})
        losses = []
        for batch in map(torch.clone, batches):  # timm's Mixup works in place
            parts = task.parts(batch, TARGET) if in_parts else [partial(task, batch, TARGET)]
            assert len(parts) == (num_parts if in_parts else 1)
            loss = 0.0
            for part in parts:
                result = part()
                result['loss'].backward()
                loss += result['loss'].item()
            losses.append(loss)
        inner = task.trainable_module.model
        runs.append((losses, [p.grad for p in inner.parameters()], list(inner.buffers())))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-10, atol=1e-12)


def test_one_loss_after_the_other_holds_one_set_of_activations():
    """Bytes that wait for a backward pass, at the most."""

    def peak(run):
        held = {'now': 0, 'most': 0}

        class Held:
            def __init__(self, tensor):
                self.tensor, self.size = tensor, tensor.nbytes
                held['now'] += self.size
                held['most'] = max(held.values())

            def __del__(self):
                held['now'] -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
            run()
        assert held['now'] == 0
        return held['most']

    def in_parts():
        for part in task.parts(batch, TARGET):
            part()['loss'].backward()

    task, batch = create_task(), images()
    plain = ClassificationTask(create_model(), dtype=torch.float64, verbose=False)
    alone = peak(lambda: plain(batch[:B], TARGET)['loss'].backward())
    assert peak(in_parts) < 1.1 * alone
    assert peak(lambda: task(batch, TARGET)['loss'].backward()) > 1.9 * alone


@pytest.mark.parametrize('in_parts', [False, True])
@pytest.mark.parametrize('amp', [None, torch.bfloat16])
def test_under_autocast(amp, in_parts):
    task = SynerMixTask(timm.create_model('test_vit', num_classes=CLASSES, img_size=32), beta=0.5, verbose=False)
    with torch.autocast('cpu', dtype=amp, enabled=amp is not None):
        batch = torch.randn(2 * B, 3, 32, 32)
        if in_parts:
            results = []
            for part in task.parts(batch, TARGET):  # the weights that autocast keeps serve both
                results.append(part())
                results[-1]['loss'].backward()
            result = results[0] | results[1]
        else:
            result = task(batch, TARGET)
            result['loss'].backward()
    assert all(p.grad.isfinite().all() for p in task.trainable_module.parameters())
    assert result['intra_loss'].item() == pytest.approx(np.log(CLASSES), rel=0.5)


@pytest.mark.parametrize(
    'criterion', [SoftTargetCrossEntropy(), BinaryCrossEntropy(target_threshold=0.2, sum_classes=True)]
)
def test_a_criterion_of_soft_targets_is_that_of_both_losses(criterion, fixed_draws):
    model = create_model(norm=False)
    x = images()
    task = create_task(model, criterion=criterion, mixup_fn=Mixup(num_classes=CLASSES, label_smoothing=0.3))
    result = task(x.clone(), TARGET)

    def on_soft_target(logits, target):
        return criterion(logits, 0.7 * F.one_hot(target, CLASSES) + 0.3 / CLASSES)

    expected = intra_loss_by_loop(model, x[:B], fixed_draws, on_soft_target)
    torch.testing.assert_close(result['intra_loss'], expected.detach(), atol=1e-6, rtol=1e-6)
    assert result['loss'].item() == pytest.approx(0.1 * result['intra_loss'] + 0.9 * result['inter_loss'])


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(beta=1.5), r'beta must be in \[0, 1\], got 1.5'),
        (dict(num_mixed=-2), 'num_mixed must be at least 0, got -2'),
        (dict(bank=True, gather_rows=16), 'bank and gather_rows cannot be used together'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_task(**kwargs)


def test_bad_batch():
    for rows in (7, 17):
        with pytest.raises(ValueError, match=f'input must have 8 rows, or up to 16 with clean views, got {rows}'):
            create_task()(torch.cat([images(), images()])[:rows], TARGET)
