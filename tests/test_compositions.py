"""SynerMix with the rest of a recipe: each composition against a plain loop."""

import argparse
import copy

import numpy as np
import pytest
import timm
import torch
from timm.data import AugMixDataset, Mixup, create_dataset, create_transform
from timm.data.scheduled_sampler import ScheduledBatchSampler
from timm.layers import convert_splitbn_model
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, create_classification_loss
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
)
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, log_softmax, mse_loss
from torch.utils.data import DistributedSampler

from timm_synermix import SynerMixForward, SynerMixTask, create_synermix_loader
from timm_synermix.data.dataset import ReadableImages
from timm_synermix.data.draws import views_of
from timm_synermix.data.order import EpochOrder
from timm_synermix.data.scheduled import ScheduledSupplementSampler
from timm_synermix.engine.loop import batch_loss_scale
from timm_synermix.task.mixup import HalfMixup, RegMixup
from timm_synermix.utils.random import seed_everything, seed_of

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


# Augmentation splits: L_inter is the loss of all splits, as timm computes it


def plain_jsd(logits, target, num_splits, alpha=12):
    """Cross-entropy of the first split, and how far the predictions of all are from their mean."""
    probabilities = logits.softmax(1).chunk(num_splits)
    mean = torch.stack(probabilities).mean(0).log()
    distance = sum((p * (p.log() - mean)).sum(1).mean() for p in probabilities) / num_splits
    return cross_entropy(logits[: len(target)], target) + alpha * distance


def split_views(num_splits, num_augmented=6, size=32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6 + num_splits * num_augmented, 3, size, size, generator=generator)


@pytest.mark.parametrize('num_augmented', [6, 4])
@pytest.mark.parametrize('given', [False, True], ids=['loss type', 'criterion'])
def test_jsd_sees_all_splits_and_the_mixes_get_its_cross_entropy(given, num_augmented):
    torch.manual_seed(0)
    model, input = create('test_resnet').eval(), split_views(3, num_augmented)
    kwargs = dict(KWARGS, criterion_kwargs=dict(loss_type='jsd', jsd_splits=3, smoothing=0.0))
    if given:
        kwargs = dict(criterion=JsdCrossEntropy(num_splits=3, smoothing=0.0), verbose=False)
    task = SynerMixTask(model, splits=3, beta=0.3, **kwargs)
    intra = intra_loss(task, model, input[:6])
    inter = plain_jsd(model(input[6:]), TARGET[:num_augmented], 3)
    result = task(input, TARGET)
    torch.testing.assert_close(result['intra_loss'], intra.detach())
    torch.testing.assert_close(result['inter_loss'], inter.detach())
    torch.testing.assert_close(result['loss'], 0.3 * intra + 0.7 * inter)
    without = SynerMixTask(model, splits=3, beta=0.3, **kwargs)(input[6:], TARGET[:num_augmented].repeat(3))
    torch.testing.assert_close(without['loss'], inter)


@pytest.mark.parametrize('rows', [5, 17, 20])
def test_splits_are_whole(rows):
    task = SynerMixTask(create('test_resnet'), splits=2, **KWARGS)
    with pytest.raises(ValueError, match='input must have 6 rows, or up to 18 with clean views, 2 more an image'):
        task(split_views(3)[:rows], TARGET)


def test_splits_exclude_a_mixup():
    model = create('test_resnet')
    with pytest.raises(ValueError, match=r'splits must be 1 with mixup_fn, .* got 2'):
        SynerMixTask(model, splits=2, mixup_fn=Mixup(num_classes=CLASSES), verbose=False)


def test_clean_images_go_through_the_main_norm_and_each_split_through_its_own():
    torch.manual_seed(0)
    plain, input = create('test_efficientnet'), split_views(2)
    plain.train()
    second = copy.deepcopy(plain)
    model = convert_splitbn_model(copy.deepcopy(plain), 2)
    model.train()
    task = SynerMixTask(model, splits=2, beta=0.3, **KWARGS)
    clean, *splits = input.chunk(3)
    intra = intra_loss(task, plain, clean)
    inter = cross_entropy(torch.cat([plain(splits[0]), second(splits[1])]), TARGET.repeat(2))
    result = task(input, TARGET)
    torch.testing.assert_close(result['loss'], 0.3 * intra + 0.7 * inter)
    state = model.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value)
    for name, value in second.state_dict().items():
        owner, _, last = name.rpartition('.')
        if 'running' in last:
            torch.testing.assert_close(state[f'{owner}.aux_bn.0.{last}'], value)


def load_splits(root, **kwargs):
    dataset = create_dataset('', root=str(root), split='train')
    kwargs = dict(singletons='keep', auto_augment='rand-m9-mstd0.5', hflip=0.5, num_workers=0) | kwargs
    return create_synermix_loader(dataset, 32, 8, device=torch.device('cpu'), **kwargs)


def test_splits_are_those_of_timm_behind_the_clean_views(image_folder):
    loader = load_splits(image_folder, num_aug_splits=3, use_prefetcher=False)
    reference = ReadableImages(create_dataset('', root=str(image_folder), split='train'))
    splits = AugMixDataset(reference, num_splits=3)
    splits.transform = create_transform(32, is_training=True, auto_augment='rand-m9-mstd0.5', hflip=0.5, separate=True)
    evaluation = create_transform(32)
    for (input, target), draws in zip(loader, loader.batch_sampler, strict=True):
        expected = []
        seed_everything(seed_of('batch', 42, draws.epoch, draws.rank, draws.number))
        for image in draws.items:
            views, label = splits[image]
            expected.append((evaluation(reference.read(image)[0]), *views, label))
        clean, *others, label = zip(*expected, strict=True)
        assert torch.equal(input[len(target) :], torch.stack([view for split in others for view in split]))
        torch.testing.assert_close(input[: len(target)], torch.stack(clean), atol=0.05, rtol=0)  # resized by torch
        assert target.tolist() == list(label)


def test_batches_of_splits_without_clean_views_are_those_of_timm(image_folder):
    input, target = next(iter(load_splits(image_folder, num_aug_splits=3)))
    bare, repeated = next(iter(load_splits(image_folder, num_aug_splits=3, clean_view=False)))
    assert torch.equal(bare, input[len(target) :])
    assert torch.equal(repeated, target.repeat(3))


@pytest.mark.parametrize('num_splits', [0, 3])
def test_resplit_erases_neither_clean_views_nor_the_first_split(image_folder, num_splits):
    """Without splits, the first half of the augmented views."""
    batches = [
        next(iter(load_splits(image_folder, num_aug_splits=num_splits, re_split=True, re_prob=re_prob)))
        for re_prob in (0.0, 1.0)
    ]
    (whole, target), (erased, _) = batches
    spared = len(target) + (len(target) if num_splits else len(target) // 2)
    same = [torch.equal(*pair) for pair in zip(whole, erased, strict=True)]
    assert all(same[:spared])
    assert not any(same[spared:])


def test_small_image_augmentation_and_splits_exclude_each_other(image_folder):
    with pytest.raises(ValueError, match='crop_padding and cutout must be 0 with num_aug_splits'):
        load_splits(image_folder, num_aug_splits=2, cutout=4)


# Scheduled image sizes: both views of a batch, and its second images, have the batch's size

SCHEDULES = {
    'constant': dict(batch_sizes=[4, 2], choice_weights=[0.3, 0.7]),
    'progressive': dict(batch_sizes=[2, 4, 6], choice_schedule='progressive', schedule_epochs=3),
    'number': dict(batch_sizes=[2, 6], num_batches=5),
}
LABELS = np.array([0] * 7 + [1] * 6 + [2] * 5 + [3])


def schedule_of(name):
    order = EpochOrder(DistributedSampler(LABELS, num_replicas=1, rank=0), seed=5)
    return ScheduledBatchSampler(order, seed=5, **SCHEDULES[name])


@pytest.mark.parametrize('epoch', [0, 2])
@pytest.mark.parametrize('name', SCHEDULES)
def test_batches_are_those_of_the_schedule_and_partners_join_inside(name, epoch):
    timm_batches, sampler = schedule_of(name), ScheduledSupplementSampler(schedule_of(name), LABELS, clean_only=True)
    for part in (timm_batches, sampler):
        part.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(timm_batches)
    assert sampler.cost().size == pytest.approx(np.mean([len(batch) for batch in timm_batches]))
    sizes = set()
    for batch, expected in zip(batches, timm_batches, strict=True):
        drawn = [views_of(item) for item in batch if views_of(item).augmented]
        assert sorted((views.image, views.size) for views in drawn) == sorted(expected)
        (size,) = {views_of(item).size for item in batch}
        sizes.add(size)
        images = {views_of(item).image for item in batch}
        assert all(sum(LABELS[list(images)] == c) > 1 for c in set(LABELS[list(images)]) - {3})
        assert [views_of(item).clean for item in batch] == [True] * len(batch)
    assert len(sizes) > 1 or (name, epoch) == ('progressive', 0)  # which may draw the smallest alone


@pytest.mark.parametrize('clean_view', [True, False])
def test_both_views_have_the_size_of_their_batch(image_folder, clean_view):
    dataset = create_dataset('', root=str(image_folder), split='train')
    sizes = dict(input_size_choices=[32, 48], batch_size_choices=[4, 2], batch_choice_seed=1)
    kwargs = dict(crop_pct=1.0, hflip=0.0, scale=(1.0, 1.0), num_workers=0, use_prefetcher=False, clean_view=clean_view)
    loader = create_synermix_loader(dataset, 32, 4, **sizes, **kwargs, clean_interpolation='nearest')
    images = ReadableImages(create_dataset('', root=str(image_folder), split='train'))
    seen = set()
    for (input, target), draws in zip(loader, loader.batch_sampler, strict=True):
        size = [32, 48][views_of(draws.items[0]).size]
        seen.add(size)
        assert input.shape == ((1 + clean_view) * len(target), 3, size, size)
        if clean_view:
            evaluation = create_transform(size, crop_pct=1.0, interpolation='nearest')
            for image, item in zip(input[: len(target)], draws.items, strict=True):
                assert torch.equal(image, evaluation(images.read(views_of(item).image)[0]))
    assert seen == {32, 48}


@pytest.mark.parametrize('scale', ['none', 'sqrt', 'linear'])
def test_second_images_do_not_change_the_scale_of_the_loss(scale):
    flags = dict(batch_size=8, train_img_sizes=[32, 48], train_batch_sizes=[8, 2], variable_batch_loss_scale=scale)
    plain, synermix = (argparse.Namespace(synermix=on, **flags) for on in (False, True))
    for size, num_images in ((32, 8), (48, 2)):
        expected = {'none': 1.0, 'sqrt': (num_images / 8) ** 0.5, 'linear': num_images / 8}[scale]
        assert batch_loss_scale(plain, size, num_images) == expected
        assert batch_loss_scale(synermix, size, num_images + 3) == expected
    synermix.train_batch_sizes = None
    assert batch_loss_scale(synermix, 48, 11) == 1.0


# Several labels: for each label present one feature, mixed from the clean images that bear it

LABELLED = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 1]] + 3 * [[0.0] * 6])
STATS = dict(class_counts=torch.arange(1.0, 7.0), num_samples=20)
LABEL_LOSSES = {'bce': {}, 'asl': {}, 'poly': {}, 'db': STATS, 'twoway': {}, 'zlpr': {}}


def label_task(model, loss_type='bce', mixup_fn=None, **kwargs):
    more = {} if loss_type is None else LABEL_LOSSES[loss_type]
    criterion_kwargs = dict(loss_type=loss_type, soft_targets=mixup_fn is not None, **more)
    common = dict(criterion_kwargs=criterion_kwargs, verbose=False)
    inter_task = MultiLabelClassificationTask(model, threshold=0.3, **common)
    return SynerMixTask(model, inter_task=inter_task, mixup_fn=mixup_fn, **common, **kwargs)


def feature_of(model, x):
    return model.forward_head(model.forward_features(x), pre_logits=True)


@pytest.mark.parametrize('loss_type', LABEL_LOSSES)
def test_one_mix_for_each_label_from_the_images_that_bear_it(loss_type):
    torch.manual_seed(0)
    model, input = create('test_resnet').eval(), views()
    task = label_task(model, loss_type, beta=0.3)
    reference = copy.deepcopy(model)
    feature = feature_of(reference, input[:6])
    u = 1 - torch.rand(6, generator=torch.Generator().manual_seed(seed_of('mix', 42, 0, 0)))
    logits, targets = [], []
    for c in range(CLASSES):
        bearing = [i for i in range(6) if LABELLED[i, c] > 0]
        if bearing:
            total = sum(u[i] for i in bearing)
            logits.append(reference.get_classifier()(sum(u[i] / total * feature[i] for i in bearing)))
            targets.append(sum(u[i] / total * LABELLED[i] for i in bearing))
            if loss_type in ('twoway', 'zlpr'):
                targets[-1] = torch.stack([LABELLED[i] for i in bearing]).amax(0)
    criterion = create_classification_loss(loss_type, multi_label=True, **LABEL_LOSSES[loss_type])
    intra = criterion(torch.stack(logits), torch.stack(targets))
    inter = criterion(reference(input[6:]), LABELLED)
    result = task(input, LABELLED)
    torch.testing.assert_close(result['intra_loss'], intra.detach())
    torch.testing.assert_close(result['inter_loss'], inter.detach())
    (0.3 * intra + 0.7 * inter).backward()
    assert_same_gradients(model, reference, result['loss'])
    assert 'map' in task.create_evaluator().metric_names


@pytest.mark.parametrize('num_mixed', [0, 2])
def test_with_one_label_per_image_it_is_the_single_label_method(num_mixed):
    """Draws included, to the bit."""
    torch.manual_seed(0)
    model, input = create('test_resnet').eval(), views()
    kwargs = dict(criterion=BinaryCrossEntropy(smoothing=0.0), num_mixed=num_mixed, beta=0.5, seed=3, verbose=False)
    single = SynerMixTask(copy.deepcopy(model), **kwargs)
    inter_task = MultiLabelClassificationTask(model, criterion=kwargs['criterion'], verbose=False)
    several = SynerMixTask(model, inter_task=inter_task, **kwargs)
    one_hot = torch.eye(CLASSES)[TARGET]
    for _ in range(2):
        one, other = single(input, TARGET), several(input, one_hot)
        for name in ('loss', 'intra_loss', 'inter_loss', 'output'):
            assert torch.equal(one[name], other[name])


def test_a_batch_without_labels_has_no_intra_class_loss():
    model = create('test_resnet')
    result = label_task(model, beta=0.3)(views(), torch.zeros(6, CLASSES))
    assert result['intra_loss'] == 0
    result['loss'].backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_an_explicit_loss_gets_the_smoothing_of_the_mixup():
    torch.manual_seed(0)
    model, input = create('test_resnet').eval(), views()
    mixup_fn = Mixup(mixup_alpha=1.0, label_smoothing=0.2, num_classes=CLASSES, multi_label=True)
    losses = []
    for intra_criterion in (None, BinaryCrossEntropy(smoothing=0.2, smooth_dense=True)):
        criterion = BinaryCrossEntropy(smoothing=0.0)
        inter_task = MultiLabelClassificationTask(model, criterion=criterion, verbose=False)
        kwargs = dict(criterion=criterion, intra_criterion=intra_criterion, inter_task=inter_task, mixup_fn=mixup_fn)
        losses.append(SynerMixTask(model, **kwargs, beta=1.0, verbose=False)(input, LABELLED)['loss'])
    torch.testing.assert_close(*losses)


def test_unmixed_labels_are_the_loss_of_each_clean_image():
    torch.manual_seed(0)
    model, input = create('test_resnet').eval(), views()
    result = label_task(model, mix='none', beta=0.3)(input, LABELLED)
    for part, name in zip(input.split(6), ('intra_loss', 'inter_loss'), strict=True):
        expected = binary_cross_entropy_with_logits(model(part), LABELLED)
        torch.testing.assert_close(result[name], expected.detach())


@pytest.mark.parametrize('kwargs', [dict(bank=True), dict(gather_rows=8)])
def test_bank_and_gather_are_of_one_label(kwargs):
    with pytest.raises(ValueError, match='bank and gather_rows need images of one label'):
        label_task(create('test_resnet'), **kwargs)


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


def test_a_loop_with_its_own_loss_takes_no_other_task():
    model = timm.create_model('test_resnet', num_classes=CLASSES)
    with pytest.raises(ValueError, match='inter_task must be None'):
        SynerMixForward(model, inter_task=ClassificationTask(model, verbose=False))
