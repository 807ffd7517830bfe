"""SynerMix with the rest of a recipe: each composition against a plain loop."""

import copy

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup
from timm.task import FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss

from timm_synermix import SynerMixTask
from timm_synermix.task.mixup import HalfMixup, RegMixup

CLASSES = 6
TARGET = torch.tensor([4, 0, 4, 2, 4, 0])
KWARGS = dict(criterion_kwargs=dict(smoothing=0.0), verbose=False)


def create(name):
    kwargs = dict(img_size=32) if 'deit' in name else {}
    return timm.create_model(name, num_classes=CLASSES, **kwargs)


def views(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2 * len(TARGET), 3, 32, 32, generator=generator)


def intra_loss(task, model, clean):
    """The loss of the mixes that a task would draw next, one class after the other."""
    feature = model.forward_head(model.forward_features(clean), pre_logits=True)
    _, weight, row_target, _ = copy.deepcopy(task)._draw_mix(TARGET)
    losses = []
    for c in TARGET.unique():
        mine = TARGET == c
        mixed = (weight[mine, None] * feature[mine]).sum(0)
        losses.append(cross_entropy(model.get_classifier()(mixed)[None], c[None]))
    assert set(row_target.tolist()) - {-100} == set(TARGET.tolist())
    return torch.stack(losses).mean()


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(model, reference, loss):
    loss.backward()
    expected, got = gradients(reference), gradients(model)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)


# Distillation: L = beta L_intra + (1 - beta) (the distillation task's own loss)


def plain_distillation(kind, student, teacher, projection, x):
    (mean, std), (its_mean, its_std) = (
        [torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ('mean', 'std')]
        for model in (student, teacher)
    )
    with torch.no_grad():
        seen = (x * std + mean - its_mean) / its_std
        logits = teacher(seen)
        feature = teacher.forward_head(teacher.forward_features(seen), pre_logits=True)
    out = student(x)
    task_loss = cross_entropy(out, TARGET)
    if kind == 'logit':
        distance = kl_div(log_softmax(out / 2, -1), log_softmax(logits / 2, -1), reduction='batchmean', log_target=True)
        return 0.3 * task_loss + 0.7 * 4 * distance
    own = student.forward_head(student.forward_features(x), pre_logits=True)
    return 0.3 * task_loss + 0.7 * mse_loss(projection(own), feature)


def distillation_task(kind, student, teacher):
    if kind == 'logit':
        return LogitDistillationTask(student, teacher, task_loss_weight=0.3, temperature=2.0, **KWARGS)
    return FeatureDistillationTask(student, teacher, task_loss_weight=0.3, **KWARGS)


@pytest.mark.parametrize('kind', ['logit', 'feature'])
def test_distillation_is_the_sum_of_both_losses(kind):
    torch.manual_seed(0)
    student, teacher = create('test_resnet').eval(), create('test_efficientnet').eval()
    inner = distillation_task(kind, student, teacher)
    task = SynerMixTask(student, inter_task=inner, beta=0.3, **KWARGS)
    projection = getattr(task.trainable_module.trainable, 'projection', None)
    reference, its_projection, input = copy.deepcopy(student), copy.deepcopy(projection), views()
    clean, augmented = input[:6], input[6:]
    inter = plain_distillation(kind, reference, teacher, its_projection, augmented)
    expected = 0.3 * intra_loss(task, reference, clean) + 0.7 * inter
    result = task(input, TARGET)
    torch.testing.assert_close(result['loss'], expected)
    torch.testing.assert_close(result['inter_loss'], inter.detach())
    assert {'task_loss', 'kd_loss'} <= result.keys()
    expected.backward()
    assert_same_gradients(student, reference, result['loss'])
    if projection is not None:
        torch.testing.assert_close(projection.weight.grad, its_projection.weight.grad)


def test_distillation_in_parts_has_the_gradients_of_the_sum():
    torch.manual_seed(0)
    student, teacher = create('test_resnet').eval(), create('test_efficientnet').eval()
    task = SynerMixTask(student, inter_task=distillation_task('feature', student, teacher), beta=0.3, **KWARGS)
    other, input = copy.deepcopy(task), views()
    other(input, TARGET)['loss'].backward()
    for part in task.parts(input, TARGET):
        part()['loss'].backward()
    expected = gradients(other.trainable_module)
    assert any('projection' in name for name in expected)
    for name, value in gradients(task.trainable_module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_both_heads_of_a_distilled_student_classify_the_mixes():
    """As in evaluation: the mean of their logits."""
    torch.manual_seed(0)
    student = create('deit_tiny_distilled_patch16_224').eval()
    teacher = create('test_efficientnet').eval()
    task = SynerMixTask(student, inter_task=TokenDistillationTask(student, teacher, **KWARGS), beta=1.0, **KWARGS)
    _, weight, _, _ = copy.deepcopy(task)._draw_mix(TARGET)
    tokens = student.forward_features(views()[:6])
    logits = []
    for c in TARGET.unique():
        mine = TARGET == c
        main, distilled = ((weight[mine, None] * tokens[mine, i]).sum(0) for i in (0, 1))
        logits.append((student.head(main) + student.head_dist(distilled)) / 2)
    expected = cross_entropy(torch.stack(logits), TARGET.unique())
    torch.testing.assert_close(task(views(), TARGET)['intra_loss'], expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_projection_is_trained_saved_and_averaged_once():
    torch.manual_seed(0)
    student, teacher = create('test_resnet'), create('test_efficientnet').eval()
    task = SynerMixTask(student, inter_task=distillation_task('feature', student, teacher), beta=0.3, **KWARGS)
    task.setup_ema(decay=0.75)
    before = copy.deepcopy(task.get_checkpoint_state())
    assert before['state_dict'].keys() == student.state_dict().keys()
    assert before['task_state']['projection'].keys() == {'weight', 'bias'}
    name = next(iter(dict(student.named_parameters())))
    with torch.no_grad():
        for parameter in task.trainable_module.parameters():
            parameter.add_(1.0)
    task.update_ema()
    averaged = task.get_checkpoint_state(ema=True)
    for now, was in (
        (averaged['state_dict_ema'][name], before['state_dict'][name]),
        (averaged['task_state_ema']['projection']['weight'], before['task_state']['projection']['weight']),
    ):
        torch.testing.assert_close(now, was + 0.25)
    task.load_checkpoint_state(before['state_dict'], before['task_state'])
    torch.testing.assert_close(
        task.get_checkpoint_state()['task_state']['projection'], before['task_state']['projection']
    )


def test_the_teacher_is_not_trained_and_stays_in_evaluation():
    student, teacher = create('test_resnet'), create('test_efficientnet')
    task = SynerMixTask(student, inter_task=distillation_task('logit', student, teacher), beta=0.3, **KWARGS)
    task.train()
    assert student.training
    assert not teacher.training
    task(views(), TARGET)['loss'].backward()
    assert not gradients(teacher)
    assert not any(p is q for p in task.trainable_module.parameters() for q in teacher.parameters())


def test_an_inter_task_excludes_one_forward():
    student, teacher = create('test_resnet'), create('test_efficientnet')
    inner = distillation_task('logit', student, teacher)
    with pytest.raises(ValueError, match='inter_task needs two forwards'):
        SynerMixTask(student, inter_task=inner, fused=True, **KWARGS)


# The controls


def test_without_mixing_it_is_the_loss_of_each_clean_image():
    torch.manual_seed(0)
    model, input = create('test_resnet').eval(), views()
    losses = SynerMixTask(model, mix='none', beta=0.3, **KWARGS)(input, TARGET)
    expected = [cross_entropy(model(part), TARGET) for part in input.split(6)]
    torch.testing.assert_close(losses['intra_loss'], expected[0])
    torch.testing.assert_close(losses['loss'], 0.3 * expected[0] + 0.7 * expected[1])


@pytest.mark.parametrize('kwargs', [dict(bank=True), dict(num_mixed=2), dict(gather_rows=8)])
def test_nothing_says_how_to_mix_what_is_not_mixed(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"{name} says how to mix, and cannot be used with mix 'none'"):
        SynerMixTask(create('test_resnet'), mix='none', **kwargs, **KWARGS)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_regmixup_is_the_mean_of_the_unmixed_and_the_mixed_loss(smoothing):
    torch.manual_seed(0)
    model, x = create('test_resnet').eval(), views()[:6]
    mixer = dict(mixup_alpha=10.0, label_smoothing=smoothing, num_classes=CLASSES)
    np.random.seed(1)
    images, target = RegMixup(Mixup(**mixer))(x.clone(), TARGET)
    np.random.seed(1)
    mixed, mixed_target = Mixup(**mixer)(x.clone(), TARGET)
    assert torch.equal(images, torch.cat([x, mixed]))
    loss = cross_entropy(model(images), target)
    unmixed = cross_entropy(model(x), TARGET, label_smoothing=smoothing)
    torch.testing.assert_close(loss, (unmixed + cross_entropy(model(mixed), mixed_target)) / 2)


def test_regmixup_changes_no_input_and_can_be_turned_off():
    x = views()[:6]
    before = x.clone()
    mixer = RegMixup(Mixup(mixup_alpha=10.0, num_classes=CLASSES))
    mixer(x, TARGET)
    assert torch.equal(x, before)
    mixer.mixup_enabled = False
    images, target = mixer(x, TARGET)
    assert torch.equal(images, x)
    assert len(target) == 6
    with pytest.raises(ValueError, match='half'):
        RegMixup(HalfMixup(num_classes=CLASSES))
