"""Fixed batches: complete, even, with two images of each class, and the same mixture of classes from first to last."""

import math

import numpy as np
import pytest
from scipy.stats import chi2
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler

from timm_synermix import SupplementBatchSampler
from timm_synermix.data.draws import image_of
from timm_synermix.data.fixed_batches import fixed_batches
from timm_synermix.data.order import EpochOrder

DATA = {
    'balanced': np.repeat(np.arange(100), 50),
    'zipf': np.random.default_rng(0).choice(200, 6000, p=(p := 1 / np.arange(1, 201)) / p.sum()),
    'cifar100-lt': np.repeat(np.arange(100), (500 * 100 ** (-np.arange(100) / 99)).astype(int)),
    'odd': np.repeat(np.arange(101), 31),
    'five': np.repeat(np.arange(300), 5),
    'one image': np.r_[np.arange(40), np.repeat(np.arange(40, 60), 40)],
    'tiny': np.array([0, 0, 0, 1, 1, 2, 3, 3, 3]),
}
BATCH = 64


def samplers(targets, batch_size=BATCH, world=1, seed=0, repeats=0, **kwargs):
    images = range(len(targets))
    for rank in range(world):
        one = dict(num_replicas=1, rank=0)
        order = RepeatAugSampler(images, num_repeats=repeats, **one) if repeats else DistributedSampler(images, **one)
        order = EpochOrder(order, seed)
        yield SupplementBatchSampler(
            order, targets, batch_size, fixed=True, seed=seed, rank=rank, world_size=world, **kwargs
        )


def batches_of(*args, epoch=0, **kwargs):
    """The batches of an epoch, of all ranks in turn: [number][rank]."""
    ranks = []
    for sampler in samplers(*args, **kwargs):
        sampler.set_epoch(epoch)
        ranks.append([[image_of(item) for item in batch] for batch in sampler])
        assert len(ranks[-1]) == len(sampler)
    return list(zip(*ranks, strict=True))


def check_batches(batches, targets, limit):
    sizes = {len(batch) for number in batches for batch in number}
    assert all(size % 2 == 0 for size in sizes)
    assert 2 <= min(sizes) <= max(sizes) <= min(limit, min(sizes) + 2)
    class_size = np.bincount(targets)
    for batch in (batch for number in batches for batch in number):
        classes, count = np.unique(targets[np.unique(batch)], return_counts=True)
        assert (count >= np.minimum(2, class_size[classes])).all()


@pytest.mark.parametrize('world', [1, 3])
@pytest.mark.parametrize('name', DATA)
def test_every_image_is_in_one_batch(name, world):
    targets = DATA[name]
    batches = batches_of(targets, world=world)
    assert len(batches) == -(-len(targets) // (world * BATCH))
    check_batches(batches, targets, BATCH)
    count = np.bincount(np.concatenate([batch for number in batches for batch in number]), minlength=len(targets))
    if name == 'tiny' and world == 3:  # 9 images for three batches: 4, 4 and 2
        assert count.sum() == 10
    else:
        assert (count == 1).sum() >= len(targets) - len(targets) % 2
        assert count.min() == 1


@pytest.mark.parametrize(('each', 'batch_size', 'most'), [(3, 128, 24), (5, 128, 0), (13, 128, 0), (3, 100, 30)])
@pytest.mark.parametrize('world', [1, 3])
def test_what_even_batches_force(each, batch_size, most, world):
    """Of classes with three images no batch of 128 can be made; of 126 and 124 it can, with one image twice."""
    targets = np.repeat(np.arange(1000), each)
    batches = batches_of(targets, batch_size, world=world)
    check_batches(batches, targets, batch_size)
    count = np.bincount(np.concatenate([batch for number in batches for batch in number]), minlength=len(targets))
    assert (count == 0).sum() <= most
    assert np.maximum(count - 1, 0).sum() <= most
    if batch_size == 128:
        assert (count > 0).all()


@pytest.mark.parametrize('batch_size', [2, 3, 4, 5])
@pytest.mark.parametrize('name', DATA)
def test_small_batches(name, batch_size):
    """Where no three images fit, a third one is shown with a partner or not at all, with the same chance."""
    targets = DATA[name]
    check_batches(batches_of(targets, batch_size), targets, batch_size + batch_size % 2)
    shown = [
        np.bincount([image for (batch,) in batches_of(targets, batch_size, epoch=epoch) for image in batch]).sum()
        for epoch in range(3)
    ]
    assert np.abs(np.array(shown) - len(targets)).max() <= 3


def test_a_pure_function_of_seed_and_epoch():
    targets = DATA['zipf']
    first = batches_of(targets)
    assert first == batches_of(targets)
    assert first != batches_of(targets, seed=1)
    assert first != batches_of(targets, epoch=1)


@pytest.mark.parametrize(('world', 'repeats'), [(1, 3), (3, 3), (2, 2.5)])
def test_repeated_augmentation_repeats_pairs(world, repeats):
    targets = np.repeat(np.arange(100), 41)
    share = np.zeros(100)
    for epoch in range(6):
        batches = batches_of(targets, world=world, repeats=repeats, epoch=epoch)
        check_batches(batches, targets, BATCH)
        drawn = np.concatenate([batch for number in batches for batch in number])
        assert len(drawn) == pytest.approx(4096, abs=2 * world)  # timm's epoch is a multiple of 256
        count = np.bincount(drawn, minlength=len(targets))
        assert (count > 0).sum() == pytest.approx(4096 / repeats, rel=0.02)
        assert np.floor(repeats) <= np.median(count[count > 0]) <= np.ceil(repeats)
        together = [np.bincount(np.concatenate(number)) for number in batches]
        assert np.mean([count[count > 0].mean() for count in together]) > 0.85 * repeats  # copies stay together
        share += np.bincount(targets[drawn], minlength=100)
    assert (share / share.sum()).std() < 0.004


# The share of every class is the same in every part of an epoch


def expected_statistic(count, expected):
    return ((count - expected) ** 2 / expected).sum()


def drift(images, size, targets, ranks=1):
    """p-values of a chi-square test of the mixture of classes against the part of the epoch, and of the last batch.

    Images come in pairs and triples, so what is counted is images over the mean size of their group. Classes are put
    together, from rare to frequent, into ten groups at most, until a part is expected to have five of each.
    """
    num_batches = len(size) // ranks
    number = np.repeat(np.arange(len(size)) // ranks, size)
    class_size = np.bincount(targets)
    unit = np.where(class_size > 1, 2 + (class_size % 2) * 5 / np.maximum(class_size, 1), 1)  # sum of squares over sum
    parts = min(10, num_batches)
    p = []
    for part, num_parts in ((number * parts // num_batches, parts), (np.where(number == num_batches - 1, 1, 0), 2)):
        table = np.zeros((len(class_size), num_parts))
        np.add.at(table, (targets[images], part), 1 / unit[targets[images]])
        expected = np.outer(table.sum(1), np.bincount(part, minlength=num_parts) / len(images))
        order = np.argsort(class_size, kind='stable')
        least = expected.min(1)[order]
        width = max(5, least.sum() / 10)
        groups = np.minimum(np.floor(np.cumsum(least) / width), np.floor(least.sum() / width) - 1).astype(int)
        if len(set(groups)) < 2 or num_parts < 2:
            continue
        sums = np.zeros((2, groups.max() + 1, num_parts))
        np.add.at(sums[0], groups, table[order])
        np.add.at(sums[1], groups, expected[order])
        present = sums[1].min(1) > 0
        statistic = expected_statistic(sums[0][present], sums[1][present])
        p.append(chi2.sf(statistic, (present.sum() - 1) * (num_parts - 1)))
    return p


def lay_out(targets, batch_size, world, seed):
    generator = np.random.default_rng(seed)
    order = np.argsort(targets, kind='stable')
    class_size = np.bincount(targets)
    first, place = np.cumsum(class_size) - class_size, np.argsort(order)

    def partners_of(images):
        of = targets[images]
        step = generator.integers(1, np.maximum(class_size[of], 2))
        return order[first[of] + (place[images] - first[of] + step) % class_size[of]]

    count = math.ceil(math.ceil(len(targets) / world) / batch_size) * world
    limit = batch_size + batch_size % 2
    return fixed_batches(generator.permutation(len(targets)), targets, count, limit, partners_of, generator)


def random_configuration(seed):
    """Targets, batch size and number of ranks: long tails, few images of each class, equal classes."""
    generator = np.random.default_rng([seed, 1])
    num_classes, count = generator.integers(2, 80), generator.integers(2, 1500)
    weight = 1 / np.arange(1, num_classes + 1) ** generator.uniform(0, 2)
    if seed % 3 == 0:
        targets = generator.choice(num_classes, count, p=weight / weight.sum())
    elif seed % 3 == 1:
        targets = np.repeat(np.arange(num_classes), generator.integers(1, 8, num_classes))
    else:
        targets = np.repeat(np.arange(num_classes), np.maximum(1, (weight * generator.integers(1, 200)).astype(int)))
    targets = np.unique(targets, return_inverse=True)[1]
    return targets, int(generator.integers(2, 70)), int(generator.integers(1, 5))


def check_random_configurations(seeds):
    values = []
    for seed in seeds:
        targets, batch_size, world = random_configuration(seed)
        images, size = lay_out(targets, batch_size, world, seed)
        assert size.min() >= 2
        assert (size % 2 == 0).all()
        assert size.max() - size.min() <= 2
        assert size.max() <= batch_size + batch_size % 2
        starts = np.repeat(np.arange(len(size)), size)
        different = np.unique(np.stack([starts, images]), axis=1)
        classes, count = np.unique(different[0] * targets.size + targets[different[1]], return_counts=True)
        assert (count >= np.minimum(2, np.bincount(targets)[classes % targets.size])).all(), seed
        times = np.bincount(images, minlength=len(targets))
        if batch_size > 5 and len(targets) >= 2 * world:
            assert (times == 0).sum() <= len(size), seed
            assert np.maximum(times - 1, 0).sum() <= len(size) + len(targets) % 2, seed
        values += drift(images, size, targets, world)
    assert len(values) > len(seeds) / 2
    assert min(values) > 1e-3 / len(values)
    return values


def test_random_configurations():
    check_random_configurations(range(300))


@pytest.mark.slow
def test_4000_random_configurations():
    values = check_random_configurations(range(1000, 5000))
    assert np.mean(np.array(values) < 0.01) < 0.02


@pytest.mark.parametrize('world', [1, 3])
@pytest.mark.parametrize('name', [name for name in DATA if name != 'tiny'])
def test_classes_have_their_share_from_the_first_batch_to_the_last(name, world):
    values = []
    for epoch in range(4):
        batches = [batch for number in batches_of(DATA[name], world=world, epoch=epoch) for batch in number]
        values += drift(np.concatenate(batches), np.array(list(map(len, batches))), DATA[name], world)
    assert min(values) > 1e-3 / len(values) / 12


@pytest.mark.parametrize('name', ['zipf', 'cifar100-lt'])
def test_the_test_finds_a_drift(name):
    """An epoch whose first half has four fifths of the images of the rarer half of the classes."""
    targets = DATA[name]
    generator = np.random.default_rng(0)
    rare = np.argsort(np.bincount(targets))[: (targets.max() + 1) // 2]
    early = generator.random(len(targets)) < np.where(np.isin(targets, rare), 0.8, 0.45)
    images, size = [], []
    for half in (np.flatnonzero(early), np.flatnonzero(~early)):
        laid, sizes = lay_out(np.unique(targets[half], return_inverse=True)[1], BATCH, 1, seed=0)
        images.append(half[laid])
        size.append(sizes)
    assert min(drift(np.concatenate(images), np.concatenate(size), targets)) < 1e-6


def test_one_rank_by_itself():
    """Of a rank's own share, as of a sampler that has dealt the images already."""
    targets = DATA['balanced']
    order = DistributedSampler(targets, num_replicas=4, rank=1)
    batches = list(SupplementBatchSampler(order, targets, BATCH, fixed=True))
    check_batches([[batch] for batch in batches], targets, BATCH)
    share = set(order)
    assert len(batches) == -(-len(share) // BATCH)
    assert len(share - set(sum(batches, []))) <= 5  # lone images of the share, every other of which is shown
