"""The intra-class loss of a fraction of the images of a batch."""

from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import create_dataset
from torch import nn
from torch.utils.data import DistributedSampler

from timm_synermix import SupplementBatchSampler, SynerMixTask, create_synermix_loader
from timm_synermix.cli.kwargs import largest_batch
from timm_synermix.data.draws import Views
from timm_synermix.data.labels import LabelSets
from timm_synermix.functional import class_rows, row_weight


def create(targets, batch_size, *, seed=0, rank=0, world=1, fixed=False, **kwargs):
    own = dict(num_replicas=1 if fixed else world, rank=0 if fixed else rank, seed=seed)
    kwargs |= dict(seed=seed, rank=rank, fixed=fixed, world_size=world if fixed else 1)
    return SupplementBatchSampler(DistributedSampler(range(len(targets)), **own), targets, batch_size, **kwargs)


@pytest.mark.parametrize('fixed', [False, True])
@pytest.mark.parametrize('seed', range(8))
def test_batches_of_random_data_sets(seed, fixed):
    generator = np.random.default_rng(seed)
    num_classes, world = int(generator.integers(1, 80)), int(generator.integers(1, 4))
    share = 1 / np.arange(1, num_classes + 1)
    targets = generator.choice(num_classes, size=generator.integers(40, 500), p=share / share.sum())
    batch_size, fraction = int(generator.integers(2, 90)), generator.choice([0.05, 0.125, 0.5, 0.9])
    size = np.bincount(targets)
    seen = Counter()
    for rank in range(world):
        sampler = create(targets, batch_size, seed=seed, rank=rank, world=world, fixed=fixed, fraction=fraction)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        for batch in batches:
            assert len(batch) % 2 == 0
            clean = [item for item in batch if not isinstance(item, Views)]
            assert batch[: len(clean)] == clean  # first
            assert all(item == Views(item.image, clean=False) for item in batch[len(clean) :])
            images = clean + [item.image for item in batch[len(clean) :]]
            seen.update(images)
            classes = Counter(targets[clean].tolist())
            assert all(count == min(2, size[c]) for c, count in classes.items())
            assert len(set(clean)) == len(clean)
            present = len(set(targets[images]))
            # of the batch before partners, of which there are as many as clean classes at most
            wanted = {max(2, round(fraction * n / 2)) for n in range(len(images) - len(classes) - 1, len(images) + 1)}
            assert len(classes) in wanted or len(classes) == present
    assert set(seen) == set(range(len(targets)))


def test_each_class_of_a_batch_is_as_likely_to_be_drawn():
    targets = np.repeat(np.arange(6), [60, 60, 30, 30, 6, 6])
    drawn, present = np.zeros(6), np.zeros(6)
    sampler = create(targets, 32, fraction=4 / 32)  # two classes
    for epoch in range(300):
        sampler.set_epoch(epoch)
        for batch in sampler:
            clean = [item for item in batch if not isinstance(item, Views)]
            classes = set(targets[[item.image if isinstance(item, Views) else item for item in batch]])
            drawn[list(set(targets[clean]))] += 1
            for c in classes:
                present[c] += 2 / len(classes)
    assert drawn.sum() == 2 * 300 * 6
    assert abs(drawn - present).max() < 4 * np.sqrt(present.max())


@pytest.mark.parametrize('seed', range(40))
def test_gathered_features_have_room_for_every_clean_view(seed):
    """Small fractions of small batches have two classes all the same."""
    generator = np.random.default_rng(seed)
    batch_size, fraction = int(generator.integers(2, 40)), float(generator.uniform(0.01, 0.99))
    targets = generator.integers(0, int(generator.integers(1, 50)), size=200)
    flags = Namespace(batch_size=batch_size, synermix_fraction=fraction)
    room = largest_batch(flags)
    for batch in create(targets, batch_size, fraction=fraction):
        assert sum(not isinstance(item, Views) for item in batch) <= room


def test_no_partners_where_none_are_wanted():
    targets = np.arange(40) // 2
    for batch in create(targets, 10, fraction=0.1, supplement=False):
        assert len(batch) == 10
        clean = [item for item in batch if not isinstance(item, Views)]
        assert len(set(targets[clean])) == 2  # at least, for BatchNorm


def test_repeated_images_are_no_partners():
    targets = np.array([0, 0, 1, 1, 2])
    sampler = create(targets, 10, fraction=0.6)
    sampler.sampler = [0, 0, 0, 2, 2, 4, 4, 4, 1, 1]
    sampler.sampler = type('Order', (list,), {'epoch': 0})(sampler.sampler)
    for batch in sampler:
        clean = [item for item in batch if not isinstance(item, Views)]
        assert Counter(targets[clean].tolist()) == {0: 2, 1: 2, 2: 1}
        assert Counter(item.image if isinstance(item, Views) else item for item in batch)[4] == 3


@pytest.mark.parametrize('splits', [0, 2])
def test_a_batch_has_clean_views_of_its_first_images(image_folder, splits):
    kwargs = dict(input_size=(3, 16, 16), batch_size=8, num_workers=0, use_prefetcher=False, num_aug_splits=splits)
    whole, some = (
        create_synermix_loader(create_dataset('', root=str(image_folder), split='train'), fraction=f, **kwargs)
        for f in (1.0, 0.5)
    )
    labels = [label for _, label in create_dataset('', root=str(image_folder), split='train').reader]
    clean_view = {}
    for (input, target), batch in zip(whole, whole.batch_sampler, strict=True):
        clean_view.update(zip(batch.items, input[: len(target)]))
    for (input, target), batch in zip(some, some.batch_sampler, strict=True):
        items = batch.items
        clean = [item for item in items if not isinstance(item, Views)]
        assert 0 < len(clean) < len(items) == len(target)
        assert len(input) == len(clean) + max(1, splits) * len(items)
        for view, item in zip(input, clean):
            assert torch.equal(view, clean_view[item])
        assert target.tolist() == [labels[item.image if isinstance(item, Views) else item] for item in items]


class Model(nn.Sequential):
    def get_classifier(self):
        return self[-1]


@pytest.mark.parametrize('mixed', [False, True])
def test_both_losses_equal_a_loop(mixed):
    torch.manual_seed(0)
    model = Model(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 4)).double()
    clean, augmented = torch.randn(5, 3, 2, 2).double(), torch.randn(8, 3, 2, 2).double()
    target = torch.tensor([2, 0, 2, 3, 0, 1, 1, 2])
    mixup_fn = (
        (lambda x, y: ((x + x.flip(0)) / 2, (F.one_hot(y, 4) + F.one_hot(y.flip(0), 4)).double() / 2))
        if mixed
        else None
    )
    task = SynerMixTask(model, mixup_fn=mixup_fn, beta=0.3, fraction=0.6, dtype=torch.float64, verbose=False, seed=3)
    generator = task._next_generator(torch.device('cpu'))
    task.num_batches = 0
    weight = row_weight(class_rows(target[:5])[0], generator=generator).double()
    losses = task(torch.cat([clean, augmented]), target)

    feature = model[:-1](clean)
    intra = []
    for c in (0, 2, 3):
        members = [i for i in range(5) if target[i] == c]
        intra.append(F.cross_entropy(model[-1](sum(weight[i] * feature[i] for i in members))[None], torch.tensor([c])))
    x, y = (augmented, target) if mixup_fn is None else mixup_fn(augmented, target)
    expected = 0.3 * torch.stack(intra).mean() + 0.7 * F.cross_entropy(model(x), y)
    torch.testing.assert_close(losses['loss'], expected)
    assert len(losses['output']) == 8


def test_a_batch_without_clean_views_has_the_recipe_s_loss():
    model = Model(nn.Flatten(), nn.Linear(12, 4)).double()
    task = SynerMixTask(model, beta=0.3, fraction=0.5, dtype=torch.float64, verbose=False)
    input, target = torch.randn(6, 3, 2, 2).double(), torch.tensor([0, 1, 2, 3, 0, 1])
    torch.testing.assert_close(task(input, target)['loss'], F.cross_entropy(model(input), target))
    with pytest.raises(ValueError, match='input must have 6 rows, or 7 to 12 with clean views, got 13'):
        task(torch.randn(13, 3, 2, 2).double(), target)


@pytest.mark.parametrize('fraction', [0.0, -0.5, 1.5, float('nan')])
def test_bad_fractions(fraction):
    with pytest.raises(ValueError, match=r'fraction must be in \(0, 1\]'):
        create([0, 1], 2, fraction=fraction)
    with pytest.raises(ValueError, match=r'fraction must be in \(0, 1\]'):
        SynerMixTask(Model(nn.Flatten(), nn.Linear(12, 4)), fraction=fraction)


def test_clean_partners_and_several_labels_have_no_fraction():
    with pytest.raises(ValueError, match='fraction must be 1 with clean_only'):
        create([0, 0, 1, 1], 2, fraction=0.5, clean_only=True)
    with pytest.raises(ValueError, match='fraction must be 1 with labels'):
        create(LabelSets([[0], [0, 1]]), 2, fraction=0.5)


def test_a_fraction_needs_labels(image_folder):
    images = create_dataset('', root=str(image_folder), split='train')
    images.reader.targets = [[0]] * 19
    with pytest.raises(ValueError, match='fraction must be 1 for ImageDataset, which does not tell its labels'):
        create_synermix_loader(images, 16, 8, fraction=0.5)
