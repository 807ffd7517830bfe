import copy
import warnings

import numpy as np
import pytest
import torch
from processes import run_ranks
from sklearn.metrics import calinski_harabasz_score, silhouette_score
from torch import distributed as dist

from timm_synermix.metrics.class_distances import class_distances
from timm_synermix.metrics.class_moments import (
    CDNV,
    CalinskiHarabasz,
    ClassTable,
    CosineCohesion,
    DaviesBouldin,
    FisherRatio,
    InterClassDistance,
    IntraClassDistance,
    MinInterClassDistance,
)
from timm_synermix.metrics.collection import cohesion_metrics, cohesion_place
from timm_synermix.metrics.moments import ClassMoments
from timm_synermix.metrics.nc1 import NC1
from timm_synermix.metrics.silhouette import Silhouette

# The definitions, image by image and pair by pair.


def classes(feature, target):
    return [feature[target == c] for c in np.unique(target)]


def pairs(feature, target):
    groups = classes(feature, target)
    return [(a, b) for i, a in enumerate(groups) for b in groups[:i]]


def distance(a, b):
    return np.linalg.norm(a.mean(0) - b.mean(0))


def variance(a):
    return np.mean([((f - a.mean(0)) ** 2).sum() for f in a])


def intra(feature, target):
    return np.sqrt(np.mean([((f - feature[target == y].mean(0)) ** 2).sum() for f, y in zip(feature, target)]))


def cosine(feature, target):
    unit = feature / np.linalg.norm(feature, axis=1, keepdims=True)
    direction = {c: unit[target == c].sum(0) for c in np.unique(target)}
    return np.mean([u @ direction[y] / np.linalg.norm(direction[y]) for u, y in zip(unit, target)])


def inter(feature, target):
    return np.mean([distance(a, b) for a, b in pairs(feature, target)])


def min_inter(feature, target):
    return min(distance(a, b) for a, b in pairs(feature, target))


def fisher(feature, target):
    between = sum(len(a) * ((a.mean(0) - feature.mean(0)) ** 2).sum() for a in classes(feature, target))
    return between / sum(len(a) * variance(a) for a in classes(feature, target))


def cdnv(feature, target):
    return np.mean([(variance(a) + variance(b)) / (2 * distance(a, b) ** 2) for a, b in pairs(feature, target)])


def nc1(feature, target):
    groups = classes(feature, target)
    within = sum((a - a.mean(0)).T @ (a - a.mean(0)) for a in groups) / len(feature)
    means = np.stack([a.mean(0) for a in groups])
    between = np.cov(means.T, bias=True)
    return np.trace(within @ np.linalg.pinv(np.atleast_2d(between), rcond=1e-10, hermitian=True)) / len(groups)


def davies_bouldin(feature, target):
    groups = classes(feature, target)
    spread = [np.sqrt(variance(a)) for a in groups]
    overlap = [
        max((spread[i] + spread[j]) / distance(a, b) for j, b in enumerate(groups) if i != j)
        for i, a in enumerate(groups)
    ]
    return np.mean(overlap)


METRICS = {
    IntraClassDistance: intra,
    CosineCohesion: cosine,
    InterClassDistance: inter,
    MinInterClassDistance: min_inter,
    FisherRatio: fisher,
    CDNV: cdnv,
    CalinskiHarabasz: calinski_harabasz_score,
    DaviesBouldin: davies_bouldin,
    NC1: nc1,
    Silhouette: silhouette_score,
}


def example(offset=0.0, n=200, dim=6, seed=0, dtype=np.float32):
    """Classes of uneven size in random order; the fourth of five is absent."""
    generator = np.random.default_rng(seed)
    target = generator.choice([0, 1, 2, 4], n, p=[0.4, 0.3, 0.2, 0.1])
    centers = 2 * generator.normal(size=(5, dim))
    return (generator.normal(size=(n, dim)) + centers[target] + offset).astype(dtype), target


def compute(metric, feature, target, cuts=(3, 50, 51)):
    for part in np.split(np.arange(len(target)), cuts):
        metric.update(torch.from_numpy(feature[part]), torch.from_numpy(target[part]))
    return metric.compute()


@pytest.mark.parametrize('offset', [0.0, 1e4], ids=['centred', 'far'])
@pytest.mark.parametrize('dim', [1, 6, 40])
@pytest.mark.parametrize('metric_class', METRICS, ids=lambda m: m.__name__)
def test_equals_the_definition(metric_class, dim, offset):
    """In several batches, one of them empty, of float32 features near the origin and far from it."""
    feature, target = example(offset, dim=dim)
    expected = METRICS[metric_class](feature.astype(np.float64), target)
    value = compute(metric_class(5, dim), feature, target, cuts=(3, 50, 50))
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('metric_class', METRICS, ids=lambda m: m.__name__)
def test_scale_counts_only_for_distances(metric_class):
    feature, target = example()
    once, thrice = (compute(metric_class(5, 6), k * feature, target).item() for k in (1, 3))
    scaled = metric_class in (IntraClassDistance, InterClassDistance, MinInterClassDistance)
    assert thrice == pytest.approx(3 * once if scaled else once, rel=1e-5)


def test_direction_of_better():
    """Tighter classes at the same means are better by every metric that looks at both."""
    feature, target = example()
    means = np.stack([feature[target == c].mean(0) if c != 3 else np.zeros(6) for c in range(5)])
    tight = (means[target] + 0.5 * (feature - means[target])).astype(np.float32)
    for metric_class in METRICS:
        loose_value, tight_value = (compute(metric_class(5, 6), f, target).item() for f in (feature, tight))
        if metric_class in (InterClassDistance, MinInterClassDistance):
            assert tight_value == pytest.approx(loose_value, rel=1e-5)
        else:
            assert (tight_value > loose_value) == metric_class.higher_is_better, metric_class


NAN = float('nan')
DEGENERATE = {
    # of: one class; one image in each of three classes; three classes that are points; all features the same
    IntraClassDistance: ('finite', 0, 0, 0),
    CosineCohesion: ('finite', 1, 1, 1),
    InterClassDistance: (NAN, 'finite', 'finite', 0),
    MinInterClassDistance: (NAN, 'finite', 'finite', 0),
    FisherRatio: (0, float('inf'), float('inf'), NAN),
    CDNV: (NAN, 0, 0, float('inf')),
    CalinskiHarabasz: (NAN, NAN, float('inf'), NAN),
    DaviesBouldin: (NAN, 0, 0, float('inf')),
    NC1: (NAN, 0, 0, NAN),
    Silhouette: (NAN, NAN, 1, 0),
}


@pytest.mark.parametrize('metric_class', METRICS, ids=lambda m: m.__name__)
def test_degenerate_sets(metric_class):
    points = torch.tensor([[1.0, 0.5], [-2.0, 1.0], [0.25, -3.0]])  # sums of these are exact
    sets = [
        (points, torch.zeros(3, dtype=torch.int64)),
        (points, torch.arange(3)),
        (points.repeat(4, 1), torch.arange(3).repeat(4)),
        (points[:1].repeat(12, 1), torch.arange(3).repeat(4)),
    ]
    for (feature, target), expected in zip(sets, DEGENERATE[metric_class], strict=True):
        metric = metric_class(4, 2)
        metric.update(feature, target)
        value = metric.compute().item()
        if expected == 'finite':
            assert 0 < value < float('inf')
        else:
            assert value == pytest.approx(expected, abs=1e-7, nan_ok=True)


@pytest.mark.parametrize('metric_class', [m for m in METRICS if m is not CosineCohesion], ids=lambda m: m.__name__)
def test_rounding_is_not_taken_for_a_spread(metric_class):
    """Points whose sums are not exact: 0.1, a thousand times."""
    target = torch.arange(3).repeat(1000)
    apart = torch.tensor([[0.1, 0.7], [-0.3, 0.1], [1 / 3, 1000.1]])[target]
    for feature, expected in ((apart, DEGENERATE[metric_class][2]), (0 * apart + 0.1, DEGENERATE[metric_class][3])):
        metric = metric_class(4, 2)
        for part in torch.arange(3000).split(7):
            metric.update(feature[part], target[part])
        value = metric.compute().item()
        if expected != 'finite':
            assert value == pytest.approx(expected, abs=1e-7, nan_ok=True)
            assert value == 0 or value in (1, float('inf')) or np.isnan(value)


@pytest.mark.parametrize('spread', [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize('metric_class', [NC1, CDNV, FisherRatio, DaviesBouldin, IntraClassDistance])
def test_near_collapse(metric_class, spread):
    """Where the spread is as small as float32 features can show it."""
    generator = np.random.default_rng(1)
    target = np.arange(2000) % 10
    feature = generator.normal(size=(10, 16))[target] + spread * generator.normal(size=(2000, 16))
    feature = feature.astype(np.float32)
    expected = METRICS[metric_class](feature.astype(np.float64), target)
    assert compute(metric_class(10, 16), feature, target).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('metric_class', METRICS, ids=lambda m: m.__name__)
def test_a_feature_that_is_not_finite_ends_nothing(metric_class, value):
    feature, target = example()
    feature[7] = value
    value = compute(metric_class(5, 6), feature, target).item()
    if metric_class is MinInterClassDistance:  # the other classes may be nearer to each other
        assert value != 0
    else:
        assert not np.isfinite(value)
    assert compute(ClassTable(5, 6), feature, target)['count'].sum() == len(target)


@pytest.mark.parametrize(
    'metric_class', [InterClassDistance, MinInterClassDistance, CDNV, DaviesBouldin, FisherRatio, NC1]
)
def test_many_classes_a_few_rows_at_a_time(metric_class, monkeypatch):
    for module in ('moments', 'class_distances'):
        monkeypatch.setattr(f'timm_synermix.metrics.{module}._BLOCK', 1000)
    generator = np.random.default_rng(0)
    target = np.arange(600) % 300
    feature = generator.normal(size=(600, 3)).astype(np.float32)
    expected = METRICS[metric_class](feature.astype(np.float64), target)
    assert compute(metric_class(300, 3), feature, target).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('metric_class', METRICS, ids=lambda m: m.__name__)
def test_nothing_seen_is_nan(metric_class):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # torchmetrics says so, too
        assert metric_class(3, 2).compute().isnan()


def test_a_million_images_in_one_pass():
    """Far from the origin, in float32; the silhouette is that of a sample."""
    generator = torch.Generator().manual_seed(0)
    metrics = cohesion_metrics(10, 64)
    center = torch.randn(10, 64, generator=generator)
    for _ in range(20):
        target = torch.randint(0, 10, (50_000,), generator=generator)
        metrics.update(center[target] + torch.randn(50_000, 64, generator=generator) + 1000, target)
    values = metrics.compute()
    assert values['intra_class_distance'].item() == pytest.approx(8, rel=1e-3)  # sqrt(64)
    spread = torch.pdist(center).square()
    assert values['cdnv'].item() == pytest.approx((64 / spread).mean().item(), rel=0.02)
    between = torch.cov((center - center.mean(0)).T, correction=0).double()
    expected = torch.linalg.pinv(between, rtol=1e-5, hermitian=True).trace().item() / 10
    assert values['nc1'].item() == pytest.approx(expected, rel=0.02)


def test_the_collection_is_its_metrics():
    """They share a state that is updated once."""
    feature, target = example()
    metrics = cohesion_metrics(5, 6)
    together = compute(metrics, feature, target)
    names = {
        'intra_class_distance', 'cosine_cohesion', 'inter_class_distance', 'min_inter_class_distance', 'fisher_ratio',
        'cdnv', 'calinski_harabasz', 'davies_bouldin', 'nc1', 'silhouette',
    }  # fmt: skip
    assert names < together.keys()
    for metric in copy.deepcopy(list(metrics.values())):
        if isinstance(metric, ClassTable):
            continue
        alone = compute(type(metric)(5, 6), feature, target)
        (name,) = (name for name, other in metrics.items() if type(other) is type(metric))
        assert together[name].item() == pytest.approx(alone.item(), rel=1e-12)
    assert sorted(map(len, metrics.compute_groups.values())) == [1, 10]
    metrics.reset()
    assert compute(metrics, feature, target)['silhouette'] == together['silhouette']


def naive_distances(mean, variance):
    """Smallest and mean distance, CDNV, Davies-Bouldin and nearest classes, pair by pair."""
    distance = np.array([[np.linalg.norm(a - b) for b in mean] for a in mean])
    spread = np.sqrt(variance)
    others = ~np.eye(len(mean), dtype=bool)
    with np.errstate(divide='ignore'):
        ratio = np.where(distance > 0, (variance[:, None] + variance) / (2 * distance**2), np.inf)
        overlap = np.where(distance > 0, (spread[:, None] + spread) / distance, np.inf)
    apart = np.where(others, distance, np.inf)
    return apart.min(), distance[others].mean(), ratio[others].mean(), np.where(others, overlap, 0).max(1).mean(), apart


def test_nearly_equal_means_keep_their_distance(monkeypatch):
    """Where the product of float64 means has no digit left of it; and of pairs of the same means."""
    monkeypatch.setattr('timm_synermix.metrics.class_distances._BLOCK', 300)
    generator = np.random.default_rng(0)
    mean = 100 + 30 * generator.normal(size=(40, 7))
    mean[1] = mean[0] + 1e-7 * generator.normal(size=7)
    mean[5] = mean[30] + 1e-4 * generator.normal(size=7)
    variance = generator.random(40)
    smallest, average, cdnv, davies_bouldin, apart = naive_distances(mean, variance)
    values = class_distances(torch.from_numpy(mean.copy()), torch.from_numpy(variance))
    for value, expected in zip(values[1:5], (average, smallest, cdnv, davies_bouldin)):
        assert value.item() == pytest.approx(expected, rel=1e-9)
    assert values.nearest.tolist() == apart.argmin(1).tolist()
    torch.testing.assert_close(values.nearest_distance, torch.from_numpy(apart.min(1)), rtol=1e-9, atol=0)
    mean[1] = mean[0]
    values = class_distances(torch.from_numpy(mean), torch.from_numpy(variance), rounding=1e-13 * 500)
    assert values.smallest == 0
    assert values.cdnv == values.davies_bouldin == torch.inf


def test_of_very_many_classes_a_seeded_sample_is_compared_with_all(monkeypatch):
    monkeypatch.setattr('timm_synermix.metrics.class_distances._PAIRS', 400 * 100)
    generator = np.random.default_rng(0)
    mean, variance = generator.normal(size=(400, 5)), generator.random(400)
    _, average, cdnv, davies_bouldin, apart = naive_distances(mean, variance)
    tensors = torch.from_numpy(mean), torch.from_numpy(variance)
    one, same, other = (class_distances(tensors[0].clone(), tensors[1], seed=seed) for seed in (0, 0, 1))
    assert len(one.row) == 100
    assert torch.equal(one.row, same.row)
    assert not torch.equal(one.row, other.row)
    assert one.nearest.tolist() == apart.argmin(1)[one.row].tolist()
    assert one.smallest.item() == pytest.approx(apart[one.row].min())
    assert one.mean.item() == pytest.approx(average, rel=0.03)
    assert one.cdnv.item() == pytest.approx(cdnv, rel=0.2)
    assert one.davies_bouldin.item() == pytest.approx(davies_bouldin, rel=0.1)
    target = np.arange(400)
    table = compute(ClassTable(400, 5), mean.astype(np.float32), target)
    known = table['nearest_class'] >= 0
    assert known.nonzero()[:, 0].tolist() == one.row.tolist()
    assert table['nearest_class_distance'].isnan().tolist() == (~known).tolist()


def test_all_metrics_share_two_sums():
    metrics = cohesion_metrics(300, 20)
    sums = {id(metric.moments): metric.moments for name, metric in metrics.items() if name != 'silhouette'}
    (moments,) = sums.values()
    assert moments._made is None  # nothing is there before the first features
    compute(metrics, *example(dim=20))
    assert sum(tensor.numel() for tensor in moments.sums) == 2 * 300 * 20 + 2 * 300 + 20**2
    assert sum(default.numel() for m in metrics.values() for default in m._defaults.values() if len(default)) == 300


def test_where_the_metrics_are_computed(monkeypatch):
    """On the device if they fit, else on the CPU, else nowhere; in words before there are features."""
    assert cohesion_place(1000, 2048, 'cuda') == (torch.device('cuda'), '')
    assert cohesion_place(1000, 2048, 'mps').device == torch.device('cpu')
    assert ClassMoments.memory(21841, 2048) == pytest.approx(3 * 21841 * 2048 * 8, rel=0.3)
    large = cohesion_place(21841, 2048, 'cuda', 1.0)
    assert large.device == torch.device('cpu')
    assert '21,841 classes and 2,048 features take 1.3 GB, above --cohesion-memory 1' in large.reason
    assert cohesion_place(21841, 2048, 'cuda', 2.0) == (torch.device('cuda'), '')
    huge = cohesion_place(10**9, 2048, 'cuda', 1.0)
    assert huge.device is None
    assert huge.reason.endswith('more than the CPU has free: they are left out.')


def test_a_batch_by_itself_and_all_of_them():
    """As torchmetrics' forward has it, of one metric and of the collection."""
    feature, target = map(torch.from_numpy, example())
    for create in (lambda: cohesion_metrics(5, 6), lambda: NC1(5, 6), lambda: ClassTable(5, 6)):
        metric, first, both = create(), create(), create()
        metric(feature[:80], target[:80])
        by_itself = metric(feature[80:], target[80:])
        first.update(feature[80:], target[80:])
        both.update(feature[:80], target[:80])
        both.update(feature[80:], target[80:])
        for got, expected in ((by_itself, first.compute()), (metric.compute(), both.compute())):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-12, equal_nan=True)


def classes_of_features(num_classes, each, separation):
    """Features of classes of different sizes, in random order, and their classes."""
    generator = np.random.default_rng(num_classes)
    target = np.repeat(np.arange(num_classes), np.linspace(0.4 * each, 1.6 * each, num_classes).astype(int))
    mean = separation * generator.normal(size=(num_classes, 32))
    feature = (mean[target] + generator.normal(size=(len(target), 32))).astype(np.float32)
    order = generator.permutation(len(target))
    return feature[order], target[order]


@pytest.mark.parametrize(
    ('num_classes', 'each', 'tolerance'),
    [
        (10, 600, 0.01),
        (100, 60, 0.02),
        (200, 40, 0.02),
        *(pytest.param(n, 20, t, marks=pytest.mark.slow) for n, t in ((500, 0.02), (1000, 0.03))),
    ],
)
@pytest.mark.parametrize('separation', [0.35, 1.2])
def test_silhouette_of_a_sample_is_that_of_all_images(num_classes, each, tolerance, separation):
    feature, target = classes_of_features(num_classes, each, separation)
    value = compute(Silhouette(num_classes, 32), feature, target, range(500, len(target), 500)).item()
    assert value == pytest.approx(silhouette_score(feature, target), abs=tolerance)


def test_silhouette_of_a_seeded_sample():
    feature, target = classes_of_features(20, 200, 1.0)
    cuts = range(90, len(target), 90)
    values = [compute(Silhouette(20, 32, 100, seed), feature, target, cuts).item() for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    sample = Silhouette(20, 32, 100)
    compute(sample, feature, target, cuts)
    kept, classes, _ = sample._sample()
    assert classes.bincount().tolist() == [40] * 20
    places = [np.flatnonzero((feature == f.numpy().astype(np.float32)).all(1))[0] for f in kept]
    assert len(set(places)) == 800
    assert np.mean(places) == pytest.approx(len(target) / 2, rel=0.06)  # of the whole set, not of its end


def test_silhouette_of_very_many_classes_is_of_a_thousand_of_them(monkeypatch):
    monkeypatch.setattr('timm_synermix.metrics.silhouette._CLASSES', 30)
    feature, target = classes_of_features(90, 20, 1.0)
    sample = Silhouette(90, 32, 100)
    value = compute(sample, feature, target, range(100, len(target), 100)).item()
    classes = sample._sample()[1].unique()
    assert len(classes) == 30
    part = np.isin(target, classes)
    assert value == pytest.approx(silhouette_score(feature[part], target[part]), abs=0.02)


def test_table_of_classes():
    feature, target = example()
    table = compute(ClassTable(5, 6), feature, target)
    present = [0, 1, 2, 4]
    means = {c: feature[target == c].mean(0) for c in present}
    for c in present:
        alone = target == c
        assert table['intra_class_distance'][c].item() == pytest.approx(intra(feature[alone], target[alone]), rel=1e-5)
        assert table['cosine_cohesion'][c].item() == pytest.approx(cosine(feature[alone], target[alone]), rel=1e-5)
        assert table['count'][c] == alone.sum()
        apart = {other: np.linalg.norm(means[c] - means[other]) for other in present if other != c}
        assert table['nearest_class'][c] == min(apart, key=apart.get)
        assert table['nearest_class_distance'][c].item() == pytest.approx(min(apart.values()), rel=1e-5)
    assert table['nearest_class'][3] == -1
    assert table['cosine_cohesion'][3].isnan()
    lonely = compute(ClassTable(5, 6), feature[target == 0], target[target == 0])
    assert lonely['nearest_class'].tolist() == [-1] * 5


def run_rank(folder):
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    try:
        feature, target = example(offset=100.0)
        cut = slice(0, 70) if rank == 0 else slice(70, 200)
        torch.save(compute(cohesion_metrics(5, 6), feature[cut], target[cut]), f'{folder}/rank{rank}.pt')
        idle = cohesion_metrics(5, 6)  # of which one process gets nothing
        torch.save(idle.compute() if rank else compute(idle, feature, target), f'{folder}/idle{rank}.pt')
        again = cohesion_metrics(5, 6)  # goes on after it was asked
        compute(again, feature[: 60 + 40 * rank], target[: 60 + 40 * rank], cuts=[])
        more = slice(100, 200 if rank else 100)
        again.update(torch.from_numpy(feature[more]), torch.from_numpy(target[more]))
        values = again.compute()
        torch.save({name: values[name] for name in ('intra_class_distance', 'nc1')}, f'{folder}/again{rank}.pt')
    finally:
        dist.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path):
    run_ranks(run_rank, str(tmp_path), folder=tmp_path)
    feature, target = example(offset=100.0)
    twice = [np.concatenate([part[:60], part]) for part in (feature, target)]
    for metric_class, name in ((IntraClassDistance, 'intra_class_distance'), (NC1, 'nc1')):
        expected = compute(metric_class(5, 6), *twice)
        for rank in (0, 1):
            value = torch.load(tmp_path / f'again{rank}.pt')[name]
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    expected = compute(cohesion_metrics(5, 6), *example(offset=100.0))
    for name in ('rank0', 'rank1', 'idle0', 'idle1'):
        values = torch.load(tmp_path / f'{name}.pt')
        assert values.keys() == expected.keys()
        for name, value in values.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, equal_nan=True, msg=name)


@pytest.mark.parametrize('metric_class', [IntraClassDistance, NC1, Silhouette])
@pytest.mark.parametrize(
    ('arguments', 'update', 'message'),
    [
        ((0, 3), None, 'num_classes and feature_dim must be positive'),
        ((2, 3), (torch.randn(4, 2), torch.zeros(4)), r'feature must be \[N, 3\]'),
        ((2, 3), (torch.randn(4, 3), torch.zeros(5)), r'target \[N\], got \[4, 3\] and \[5\]'),
    ],
)
def test_bad_arguments(metric_class, arguments, update, message):
    with pytest.raises(ValueError, match=message):
        metric_class(*arguments).update(*update)
