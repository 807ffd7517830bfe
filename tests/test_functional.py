import pytest
import torch
import torch.nn.functional as F

from timm_synermix import IGNORE_INDEX, intra_class_mix, intra_class_weight, synermix_loss
from timm_synermix.functional import class_rows

TARGET = torch.tensor([3, 0, 3, 7, 0, 3, 5, 0])  # classes of 3, 3, 1 and 1 images
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def mix_by_loop(feature, target, weight):
    """The paper's algorithm as a plain loop over the classes present."""
    mixed = []
    for c in sorted(set(target.tolist())):
        members = [i for i, y in enumerate(target.tolist()) if y == c]
        total = sum(weight[i] for i in members)
        mixed.append(sum(weight[i] / total * feature[i] for i in members))
    return torch.stack(mixed), torch.tensor(sorted(set(target.tolist())))


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('shape', [(5,), (5, 1, 1), (4, 5)], ids=['vector', 'map', 'tokens'])
def test_mix_equals_a_loop_over_classes(dtype, shape):
    feature = torch.randn(len(TARGET), *shape, dtype=torch.float64).to(dtype)
    weight = torch.rand(len(TARGET), dtype=torch.float64)
    mixed, mixed_target = intra_class_mix(feature, TARGET, weight=weight)
    expected, classes = mix_by_loop(feature.double(), TARGET, weight)
    assert mixed.dtype == dtype
    assert mixed.shape == feature.shape
    torch.testing.assert_close(mixed[:4].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert mixed_target.tolist() == [*classes.tolist(), *[IGNORE_INDEX] * 4]
    assert not mixed[4:].any()


def test_every_feature_gets_its_weight_as_gradient():
    feature = torch.randn(len(TARGET), 5, requires_grad=True)
    weight = intra_class_weight(TARGET)
    mixed, _ = intra_class_mix(feature, TARGET, weight=weight)
    mixed.sum().backward()
    torch.testing.assert_close(feature.grad, weight[:, None].expand(-1, 5))
    assert (feature.grad > 0).all()


@pytest.mark.parametrize('shape', [(3,), (2, 1, 1)])
def test_the_mix_can_be_differentiated_twice(shape):
    """As optimizers with second-order gradients do."""
    feature = torch.randn(len(TARGET), *shape, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(len(TARGET), dtype=torch.float64) + 0.1

    def squared(feature):
        return intra_class_mix(feature, TARGET, weight=weight)[0] ** 2

    assert torch.autograd.gradcheck(squared, feature)
    assert torch.autograd.gradgradcheck(squared, feature)


def test_cross_entropy_of_the_mix_is_the_mean_over_the_classes_present():
    feature, classifier = torch.randn(len(TARGET), 5), torch.nn.Linear(5, 9)
    weight = torch.rand(len(TARGET))
    expected, classes = mix_by_loop(feature, TARGET, weight)
    by_hand = torch.stack([F.cross_entropy(classifier(s)[None], c[None]) for s, c in zip(expected, classes)]).mean()
    mixed, mixed_target = intra_class_mix(feature, TARGET, weight=weight)
    torch.testing.assert_close(F.cross_entropy(classifier(mixed), mixed_target), by_hand)


def test_weights_are_uniform_draws_divided_by_their_class_sum():
    generator = torch.Generator().manual_seed(3)
    draws = 1 - torch.rand(len(TARGET), generator=torch.Generator().manual_seed(3))
    weight = intra_class_weight(TARGET, generator=generator)
    for c in TARGET.unique():
        torch.testing.assert_close(weight[TARGET == c], draws[TARGET == c] / draws[TARGET == c].sum())


def test_weights_sum_to_one_in_each_class_and_a_lone_image_is_itself():
    weight = intra_class_weight(TARGET)
    for c in TARGET.unique():
        torch.testing.assert_close(weight[TARGET == c].sum(), torch.tensor(1.0))
    feature = torch.randn(len(TARGET), 5)
    mixed, mixed_target = intra_class_mix(feature, TARGET)
    assert torch.equal(mixed[mixed_target == 7][0], feature[3])


def test_mix_does_not_depend_on_the_order_of_the_batch():
    feature, weight = torch.randn(len(TARGET), 5).double(), torch.rand(len(TARGET)).double()
    order = torch.randperm(len(TARGET))
    mixed, mixed_target = intra_class_mix(feature, TARGET, weight=weight)
    shuffled, shuffled_target = intra_class_mix(feature[order], TARGET[order], weight=weight[order])
    torch.testing.assert_close(shuffled, mixed)
    assert torch.equal(shuffled_target, mixed_target)


@pytest.mark.parametrize('num_mixed', [1, 2, 3, 9])
def test_num_mixed_limits_the_images_of_a_class_and_picks_each_equally_often(num_mixed):
    generator = torch.Generator().manual_seed(0)
    picked = torch.zeros(len(TARGET))
    for _ in range(600):
        weight = intra_class_weight(TARGET, num_mixed=num_mixed, generator=generator)
        for c in TARGET.unique():
            members = weight[TARGET == c]
            assert (members > 0).sum() == min(num_mixed, len(members))
            assert members.sum() == pytest.approx(1)
        picked += weight > 0
    expected = torch.tensor([min(num_mixed, n) / n for n in (3, 3, 3, 1, 3, 3, 1, 3)])
    torch.testing.assert_close(picked / 600, expected, atol=0.07, rtol=0)


def test_the_host_never_waits_for_the_device():
    """Meta tensors have no values: whatever reads one on the host raises."""
    feature = torch.randn(8, 5, device='meta')
    target = torch.zeros(8, dtype=torch.int64, device='meta')
    mixed, mixed_target = intra_class_mix(feature, target, num_mixed=2)
    assert mixed.shape == (8, 5)
    assert mixed_target.shape == (8,)


def test_half_precision_accumulates_in_float32():
    target = torch.zeros(4096, dtype=torch.int64)
    feature = torch.full((4096, 2), 60000.0, dtype=torch.float16)  # their plain sum overflows float16
    mixed, _ = intra_class_mix(feature, target)
    torch.testing.assert_close(mixed[0].float(), torch.full((2,), 60000.0), rtol=1e-3, atol=0)
    small = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)  # a bfloat16 sum of 1/4096 steps stalls at 1/16
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mixed, _ = intra_class_mix(small, target)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed[0].float(), torch.ones(2))


def test_class_rows_of_random_batches():
    for seed in range(20):
        target = torch.randint(0, 12, (seed + 1,), generator=torch.Generator().manual_seed(seed))
        row, row_target = class_rows(target)
        classes = sorted(set(target.tolist()))
        assert row.tolist() == [classes.index(y) for y in target.tolist()]
        assert row_target.tolist() == classes + [IGNORE_INDEX] * (len(target) - len(classes))


def test_integration_of_the_two_losses():
    intra, inter = torch.tensor(2.0, requires_grad=True), torch.tensor(6.0, requires_grad=True)
    loss = synermix_loss(intra, inter, 0.25)
    loss.backward()
    assert loss.item() == 0.25 * 2 + 0.75 * 6
    assert (intra.grad.item(), inter.grad.item()) == (0.25, 0.75)


@pytest.mark.parametrize('beta', [-0.1, 1.1, float('nan')])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match=r'beta must be in \[0, 1\], got'):
        synermix_loss(torch.tensor(1.0), torch.tensor(1.0), beta)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(num_mixed=-1), 'num_mixed must be at least 0, got -1'),
        (dict(weight=torch.rand(3)), 'weight must be a floating point tensor of shape'),
        (dict(weight=torch.ones(8, dtype=torch.int64)), 'weight must be a floating point tensor'),
    ],
)
def test_bad_mixing_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        intra_class_mix(torch.randn(8, 5), TARGET, **kwargs)


def test_bad_feature_and_target():
    with pytest.raises(ValueError, match='same length, got 7 and 8'):
        intra_class_mix(torch.randn(7, 5), TARGET)
    with pytest.raises(ValueError, match='target must be class indices'):
        intra_class_mix(torch.randn(8, 5), torch.rand(8, 3))
