import numpy as np
import pytest
from torch.utils.data import DistributedSampler, SequentialSampler

from timm_synermix import SupplementBatchSampler
from timm_synermix.data.draws import Views, image_of


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


def test_expected_supplements_is_their_mean():
    targets = np.repeat(np.arange(100), 50)
    sampler = create(targets, 128)
    assert sampler.expected_supplements() == pytest.approx(128 * 0.99**127, rel=1e-12)
    sizes = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        sizes += [len(batch) for batch in sampler]
    assert np.mean(sizes) - 5000 / len(sampler) == pytest.approx(sampler.expected_supplements() + 0.5, abs=1.0)
    assert create(targets, 128, supplement=False).expected_supplements() == 0


@pytest.mark.parametrize(('n', 'batch_size', 'message'), [(4, 1, 'batch_size must be at least 2'), (0, 2, 'sampler')])
def test_bad_arguments(n, batch_size, message):
    with pytest.raises(ValueError, match=message):
        create(np.zeros(n, dtype=int), batch_size)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('world', [1, 3])
@pytest.mark.parametrize('batch_size', [2, 7, 16, 1000])
@pytest.mark.parametrize('supplement', [True, False])
def test_fixed_batches_of_random_data_sets(seed, world, batch_size, supplement):
    targets = random_targets(seed)
    class_size = np.bincount(targets)
    for rank in range(world):
        sampler = create(targets, batch_size, rank=rank, world=world, seed=seed, fixed=True, supplement=supplement)
        batches = list(sampler)
        assert batches == list(sampler)
        assert len(batches) == len(sampler) == -(-len(sampler.sampler) // batch_size)
        assert {len(batch) for batch in batches} == {batch_size}
        for batch in batches if supplement else ():
            distinct = np.unique(batch)
            for c in np.unique(targets[batch]):
                assert (targets[distinct] == c).sum() >= min(2, class_size[c]), c
        assert sampler.expected_supplements() == 0


def test_fixed_batches_show_nearly_every_image_once():
    targets = np.random.default_rng(0).integers(0, 100, 5000)
    drawn = np.concatenate(list(create(targets, 128, fixed=True)))
    count = np.bincount(drawn, minlength=5000)
    assert len(drawn) == 40 * 128
    assert (count == 0).sum() < 50
    assert count.max() <= 3
    plain = np.concatenate(list(create(targets, 128, fixed=True, supplement=False)))
    assert (np.bincount(plain, minlength=5000) >= 1).all()


def test_fixed_batches_hold_as_few_pairs_as_possible():
    """Partners are for lone classes alone: with two classes a batch is random, and images keep their order."""
    targets = np.arange(1000) % 2
    sampler = create(targets, 100, fixed=True)
    order = list(sampler.sampler)
    assert {frozenset(batch) for batch in sampler} == {frozenset(order[i : i + 100]) for i in range(0, 1000, 100)}


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


@pytest.mark.parametrize('kwargs', [dict(), dict(fixed=True), dict(clean_only=True)])
@pytest.mark.parametrize('batches_per_update', [1, 2])
def test_an_interval_has_clean_views_in_every_kth_update(kwargs, batches_per_update):
    """Counted over the epochs, 7 batches each: with two for an update the last update of an epoch has one."""
    targets, K = np.repeat(np.arange(30), 7), 3
    sampler = create(targets, 32, interval=K, batches_per_update=batches_per_update, **kwargs)
    update = 0
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == 7
        for number, batch in enumerate(batches):
            marked = [item for item in batch if item == Views(image_of(item), clean=False, augmented=True)]
            if update % K == 0:
                assert not marked
                images = [image_of(item) for item in batch]
                assert np.bincount(targets[images], minlength=30)[targets[images]].min() >= 2
            else:
                assert len(marked) == len(batch)
                assert len(batch) <= 32
            update += (number + 1) % batches_per_update == 0 or number == 6
        if not kwargs:
            drawn = [image_of(item) for batch in batches for item in batch]
            assert set(drawn) == set(range(210))


@pytest.mark.parametrize('name', ['interval', 'batches_per_update'])
def test_an_interval_must_be_positive(name):
    with pytest.raises(ValueError, match=f'{name} must be at least 1, got 0'):
        create([0, 0, 1], 2, **{name: 0})
