import itertools

import numpy as np
import pytest
import torch
from timm import create_model
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, SequentialSampler

from timm_synermix import SupplementBatchSampler, SynerMixTask
from timm_synermix.data.draws import Views, image_of
from timm_synermix.data.order import EpochOrder


def create(targets, batch_size, *, rank=0, world=1, **kwargs):
    order = DistributedSampler(range(len(targets)), num_replicas=world, rank=rank, seed=kwargs.get('seed', 0))
    return SupplementBatchSampler(order, targets, batch_size, rank=rank, **kwargs)


def random_targets(seed):
    """Long-tailed classes: some with hundreds of images, some with one, some with none."""
    generator = np.random.default_rng(seed)
    return generator.choice(60, size=generator.integers(80, 400), p=(p := 1.0 / np.arange(1, 61)) / p.sum())


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('world', [1, 3])
@pytest.mark.parametrize('batch_size', [2, 16, 64, 1000])
def test_batches_of_random_data_sets(seed, world, batch_size):
    targets = random_targets(seed)
    class_size = np.bincount(targets)
    samplers = [create(targets, batch_size, rank=rank, world=world, seed=seed) for rank in range(world)]
    lengths = set()
    for sampler in samplers:
        batches = list(sampler)
        lengths.add(len(batches))
        assert len(batches) == len(sampler)
        shard = list(sampler.sampler)
        for start, batch in zip(np.cumsum([0, *map(len, batches)]), batches):
            assert len(batch) % 2 == 0
            distinct = np.unique(batch)
            for c in np.unique(targets[batch]):
                assert (targets[distinct] == c).sum() >= min(2, class_size[c]), (c, start)
        drawn = np.concatenate(batches)
        count = np.bincount(drawn, minlength=len(targets))
        assert (count[shard] >= 1).all()  # each sample of the shard; once, see the next test
    assert len(lengths) == 1


def test_each_sample_is_drawn_exactly_once_without_supplements():
    targets = np.repeat(np.arange(5), 20)
    batches = list(create(targets, 16, supplement=False))
    assert sorted(sum(batches, [])) == list(range(100))
    assert [len(batch) for batch in batches] == [16, 14, 14, 14, 14, 14, 14]


def test_supplements_are_all_that_is_added():
    targets = random_targets(1)
    kept, supplemented = (create(targets, 32, supplement=s, seed=5) for s in (False, True))
    for plain, batch in zip(kept, supplemented):
        plain = plain[:]
        extra = list(batch)
        for index in plain:
            if index in extra:
                extra.remove(index)
        assert len(batch) >= len(plain)
        assert set(targets[extra]) <= set(targets[plain])


def test_batches_are_nearly_equal_and_never_larger_than_asked():
    for n in (7, 129, 255, 1000):
        sampler = create(np.zeros(n, dtype=int), 128)
        sizes = [len(batch) for batch in sampler]
        assert len(sizes) == -(-n // 128)
        assert sum(sizes) == n + n % 2
        assert max(sizes) <= 128
        assert max(sizes) - min(sizes) <= 2


def test_a_pure_function_of_seed_epoch_and_rank():
    targets = random_targets(0)
    first = create(targets, 32)
    assert list(first) == list(first) == list(create(targets, 32))
    epochs = []
    for epoch in (0, 1):
        first.set_epoch(epoch)
        epochs.append(list(first))
    assert epochs[0] == list(create(targets, 32))
    assert epochs[0] != epochs[1]
    assert list(create(targets, 32, seed=1)) != epochs[0]
    assert first.epoch == 1

    still = SequentialSampler(targets)  # whose epochs are alike: partners and places are drawn anew all the same
    still.epoch, still.set_epoch = 0, lambda epoch: setattr(still, 'epoch', epoch)
    epochs = []
    for epoch in (0, 1):
        still.set_epoch(epoch)
        epochs.append(list(SupplementBatchSampler(still, targets, 32)))
    assert epochs[0] != epochs[1]

    shared_order = [list(range(len(targets)))] * 2  # the ranks differ in their partners even for the same shard
    ranks = []
    for rank, order in enumerate(shared_order):
        sampler = DistributedSampler(order, num_replicas=1, rank=0)
        ranks.append(list(SupplementBatchSampler(sampler, targets, 32, rank=rank)))
    assert ranks[0] != ranks[1]


def test_partners_are_other_images_of_the_class_drawn_evenly():
    targets = np.array([0] * 5 + [1] * 5)
    sampler = create(targets, 2)
    drawn = np.zeros((10, 10))
    generator = np.random.default_rng(0)
    for _ in range(4000):
        drawn[np.arange(10), sampler._partners_of(np.arange(10), generator)] += 1
    same_class = targets[:, None] == targets[None]
    assert (drawn.diagonal() == 0).all()
    assert (drawn[~same_class] == 0).all()
    others = drawn[same_class & ~np.eye(10, dtype=bool)]
    assert np.abs(others / 4000 - 0.25).max() < 0.03


def test_a_class_with_one_image_stays_alone_and_nothing_hangs():
    targets = np.arange(12)  # every class has one image
    batches = list(create(targets, 4))
    assert sorted(sum(batches, [])) == list(range(12))


def test_an_odd_batch_of_lone_images_is_made_even():
    batches = list(create(np.arange(3), 4))
    assert len(batches) == 1
    assert len(batches[0]) == 4
    assert set(batches[0]) == {0, 1, 2}


def test_classes_are_spread_over_a_batch():
    """timm's Mixup mixes position i with -1 - i: classes in order would be mixed with each other pairwise."""
    targets = np.repeat(np.arange(2), 500)
    pairs = [targets[i] == targets[j] for b in create(targets, 100) for i, j in zip(b, b[::-1])]
    assert 0.4 < np.mean(pairs) < 0.6


@pytest.mark.parametrize(('n', 'batch_size', 'message'), [(4, 1, 'batch_size must be at least 2'), (0, 2, 'sampler')])
def test_bad_arguments(n, batch_size, message):
    with pytest.raises(ValueError, match=message):
        create(np.zeros(n, dtype=int), batch_size)


def test_partners_of_the_clean_view_alone_stand_last_and_are_marked():
    targets = random_targets(2)
    both, clean = (create(targets, 16, seed=3, clean_only=c) for c in (False, True))
    marked = 0
    for together, batch in zip(both, clean, strict=True):
        base = [i for i in batch if not isinstance(i, Views)]
        partners = [item.image for item in batch if isinstance(item, Views)]
        assert batch == base + [Views(i, clean=True, augmented=False) for i in partners]
        assert len(base) % 2 == 0
        lone = [c for c in np.unique(targets[base]) if len(set(np.array(base)[targets[base] == c])) == 1]
        assert sorted(targets[partners]) == [c for c in lone if (targets == c).sum() > 1]
        assert set(base) <= set(together)
        marked += len(partners)
    assert marked > 20


def test_fixed_and_clean_only_exclude_each_other():
    with pytest.raises(ValueError, match='fixed and clean_only cannot be used together'):
        create([0, 0, 1, 1], 2, fixed=True, clean_only=True)


@pytest.mark.parametrize('repeats', [0, 3])
def test_what_a_step_costs_is_counted(repeats):
    """With three copies of an image in a batch fewer classes are there, and fewer are alone."""
    targets = np.repeat(np.arange(1000), 50)
    images = range(len(targets))
    order = RepeatAugSampler(images, 1, 0, num_repeats=repeats) if repeats else DistributedSampler(images, 1, 0)
    cost = SupplementBatchSampler(order, targets, 128).cost()
    lone = 128 * 0.999**127 if not repeats else 128 / 3 * 0.999 ** (128 / 3 - 1)
    assert cost.partners == pytest.approx(lone, abs=2)
    assert cost.step(0.1) == pytest.approx(2 * (1 + lone / 128), abs=0.04)
    fixed = SupplementBatchSampler(order, targets, 128, fixed=True).cost()
    assert fixed == pytest.approx((128, 0, 128, 128, 1), abs=0.4)
    assert fixed.step(0.1) == pytest.approx(2, abs=1e-9 if repeats else 0.01)
    assert fixed.partners >= 0


@pytest.mark.parametrize(('kwargs', 'step'), [(dict(clean_only=True), 2.28), (dict(fraction=0.125), 1.16)])
def test_what_a_step_of_cheaper_batches_costs(kwargs, step):
    cost = create(np.repeat(np.arange(100), 50), 128, **kwargs).cost()
    assert cost.step(0.1) == pytest.approx(step, abs=0.03)


@pytest.mark.parametrize(('beta', 'rows', 'step'), [(0, 1, 1), (1, 1, 1), (0.5, 3, 4 / 3), (0.1, 2, 1.5)])
def test_what_a_step_of_other_recipes_costs(beta, rows, step):
    """No clean views, clean ones alone, three splits, RegMixup."""
    cost = create(np.repeat(np.arange(100), 50), 128, fixed=True).cost()
    assert cost.step(beta, rows) == pytest.approx(step, abs=0.01)


@pytest.mark.parametrize(('repeats', 'fraction', 'least'), [(0, 1, 1.4), (3, 1, 1.05), (0, 0.5, 1.1), (0, 0.125, 1)])
def test_supplements_raise_the_share_of_rare_classes_by_what_is_said(repeats, fraction, least):
    """A class that is nearly always alone has twice the images, in a batch that has grown by all second images."""
    targets = np.r_[np.repeat(np.arange(40), 100), np.repeat(np.arange(40, 80), 10)]
    images = range(len(targets))
    order = RepeatAugSampler(images, 1, 0, num_repeats=repeats) if repeats else DistributedSampler(images, 1, 0)
    sampler = SupplementBatchSampler(order, targets, 64, fraction=fraction)
    rare, drawn = [], []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        rare += [(targets[list(order)] >= 40).mean()]
        drawn += [(targets[[image_of(item) for batch in sampler for item in batch]] >= 40).mean()]
    assert sampler.cost().prior == pytest.approx(np.mean(drawn) / np.mean(rare), rel=0.06)
    assert sampler.cost().prior > least


def test_seeds_ranks_and_epochs_share_nothing():
    """Ranks share the order of an epoch and nothing else; no order, partners or weights come twice."""
    targets = np.repeat(np.arange(100), 10)
    orders, partners, weights = {}, {}, {}
    task = SynerMixTask(create_model('test_resnet', num_classes=100), verbose=False)
    for seed, rank, epoch in itertools.product(range(4), repeat=3):
        order = EpochOrder(DistributedSampler(targets, num_replicas=1, rank=0), seed)
        sampler = SupplementBatchSampler(order, targets, 50, seed=seed, rank=rank, clean_only=True)
        sampler.set_epoch(epoch)
        orders.setdefault(tuple(order), set()).add((seed, epoch))
        generator = np.random.default_rng([seed, epoch, rank])
        partners[tuple(sampler._partners_of(np.arange(1000), generator))] = seed, rank, epoch
        drawn = [item for batch in sampler for item in batch if isinstance(item, Views)]
        partners[tuple(drawn)] = seed, rank, epoch
        task.seed, task.rank, task.num_batches = seed, rank, len(sampler) * epoch
        weights[tuple(task._draw_mix(torch.arange(50) // 2)[1].tolist())] = seed, rank, epoch
    assert sorted(map(len, orders.values())) == [1] * 16
    assert len(partners) == 2 * 64
    assert len(weights) == 64


@pytest.mark.parametrize('sampler', [RepeatAugSampler, DistributedSampler])
def test_the_order_of_timm_s_samplers_is_of_the_seed_too(sampler):
    orders = []
    for seed in (0, 1):
        order = EpochOrder(sampler(range(100), num_replicas=1, rank=0), seed)
        for epoch in (0, 1):
            order.set_epoch(epoch)
            orders.append(tuple(order))
            assert len(order) == 100
            assert order.epoch == epoch
    assert len(set(orders)) == 4
