import numpy as np
import pytest
import torch

from timm_synermix.metrics import InterClassDistance, IntraClassDistance, pool_feature


def intra_by_loop(feature, target):
    squares = [((f - feature[target == y].mean(0)) ** 2).sum() for f, y in zip(feature, target)]
    return np.sqrt(np.mean(squares))


def inter_by_loop(feature, target):
    means = [feature[target == c].mean(0) for c in np.unique(target)]
    return np.mean([np.linalg.norm(a - b) for i, a in enumerate(means) for b in means[:i]])


@pytest.mark.parametrize(
    ('metric_class', 'by_loop'), [(IntraClassDistance, intra_by_loop), (InterClassDistance, inter_by_loop)]
)
@pytest.mark.parametrize('offset', [0.0, 1e4])
def test_distances_equal_a_loop(metric_class, by_loop, offset):
    """In several batches, with a class absent and float32 features far from the origin."""
    generator = np.random.default_rng(0)
    target = generator.choice([0, 1, 2, 4], 200)
    feature = (generator.normal(size=(200, 6)) + target[:, None] + offset).astype(np.float32)
    metric = metric_class(num_classes=5, feature_dim=6)
    for part in np.split(np.arange(200), [3, 50, 51]):
        metric.update(torch.from_numpy(feature[part]), torch.from_numpy(target[part]))
    assert metric.compute().item() == pytest.approx(by_loop(feature.astype(np.float64), target), rel=1e-6)


def test_identical_features():
    metric = IntraClassDistance(2, 3)
    metric.update(torch.full((10, 3), 0.1), torch.tensor([0, 1] * 5))
    assert metric.compute().item() == pytest.approx(0, abs=1e-7)
    metric = InterClassDistance(2, 3)
    metric.update(torch.full((10, 3), 0.1), torch.tensor([0, 1] * 5))
    assert metric.compute().item() == 0


def test_one_class_has_no_distance_to_others():
    metric = InterClassDistance(2, 3)
    metric.update(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    assert metric.compute().isnan()


@pytest.mark.parametrize(
    ('arguments', 'update', 'message'),
    [
        ((0, 3), None, 'num_classes and feature_dim must be positive'),
        ((2, 3), (torch.randn(4, 2), torch.zeros(4)), r'feature must be \[N, 3\]'),
        ((2, 3), (torch.randn(4, 3), torch.zeros(5)), r'target \[N\], got \[4, 3\] and \[5\]'),
    ],
)
def test_bad_arguments(arguments, update, message):
    with pytest.raises(ValueError, match=message):
        IntraClassDistance(*arguments).update(*update)


def test_pool_feature():
    vector, tokens, planes = torch.randn(2, 5), torch.randn(2, 7, 3), torch.randn(2, 4, 2, 2)
    assert torch.equal(pool_feature(vector), vector)
    torch.testing.assert_close(pool_feature(tokens)[1], tokens[1].mean(0))
    joined = pool_feature((vector, tokens, planes))
    assert joined.shape == (2, 5 + 3 + 4)
    torch.testing.assert_close(joined[0, 8:], planes[0].flatten(1).mean(1))
