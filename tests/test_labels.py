"""Second images for labels that one image of a batch bears."""

import numpy as np
import pytest
import torch
from timm.data.target_transforms import MultiLabelTarget
from torch.utils.data import Subset

from timm_synermix.data.classes import dataset_targets
from timm_synermix.data.draws import views_of
from timm_synermix.data.labels import LabelSets, dataset_labels
from timm_synermix.data.order import EpochOrder
from timm_synermix.data.sampler import SupplementBatchSampler

generator = np.random.default_rng(7)
LABELS = [sorted(generator.choice(12, generator.integers(0, 4), replace=False).tolist()) for _ in range(60)]
LABELS[5].append(40)  # a label that no other image bears


class Told:
    """A data set that tells the labels of its images."""

    target_transform = MultiLabelTarget(41)
    targets = LABELS


def order(length, seed=3):
    sampler = torch.utils.data.DistributedSampler(range(length), num_replicas=1, rank=0)
    return EpochOrder(sampler, seed)


def bearers(images, c):
    return [i for i in images if c in LABELS[i]]


@pytest.mark.parametrize('epoch', [0, 1])
def test_every_label_of_a_batch_has_two_images_where_the_data_set_has_them(epoch):
    sampler = SupplementBatchSampler(order(60), LabelSets(LABELS), 10, clean_only=True)
    sampler.set_epoch(epoch)
    num_added = num_lone = 0
    for batch in sampler:
        views = [views_of(item) for item in batch]
        own = [view.image for view in views if view.augmented]
        added = [view.image for view in views if not view.augmented]
        lone = [c for i in own for c in LABELS[i] if len(bearers(own, c)) == 1 and len(bearers(range(60), c)) > 1]
        assert len(added) <= len(own)
        assert len(set(added) | set(own)) == len(added) + len(own)
        for c in lone:
            assert len(bearers([*own, *added], c)) > 1
        assert all(set(LABELS[i]) & set(lone) for i in added)
        num_added, num_lone = num_added + len(added), num_lone + len(lone)
    assert 0 < num_added < num_lone  # some serve several


def test_at_most_as_many_images_are_added_as_there_are():
    labels = LabelSets([[0, 1, 2, 3, 4], [5, 6, 7, 8], *[[c] for c in range(9)]])
    partners = labels.partners_for(np.array([0, 1]), np.random.default_rng(0))
    assert len(partners) == 2


@pytest.mark.parametrize('kwargs', [{}, dict(clean_only=True), dict(supplement=False)], ids=str)
def test_with_one_label_per_image_batches_are_those_of_classes(kwargs):
    targets = np.random.default_rng(1).integers(0, 15, 60)
    one = SupplementBatchSampler(order(60), targets, 12, **kwargs)
    several = SupplementBatchSampler(order(60), LabelSets(targets[:, None]), 12, **kwargs)
    for epoch in range(2):
        one.set_epoch(epoch)
        several.set_epoch(epoch)
        batches = [[tuple(views_of(item)) for item in batch] for batch in one]
        images = [[view[0] for view in batch] for batch in batches]
        if kwargs.get('clean_only'):
            assert batches == [[tuple(views_of(item)) for item in batch] for batch in several]
        else:  # an odd batch gets an image more, by another draw
            others = [[views_of(item).image for item in batch] for batch in several]
            assert [len(batch) for batch in images] == [len(batch) for batch in others]
    assert several.cost().size == one.cost().size


def test_fixed_batches_are_of_one_label():
    with pytest.raises(ValueError, match='fixed must be False with several labels per image'):
        SupplementBatchSampler(order(60), LabelSets(LABELS), 10, fixed=True)


def test_labels_are_read_without_images():
    labels = dataset_labels(Told())
    assert [sorted(labels[i].tolist()) for i in range(60)] == LABELS
    part = dataset_labels(Subset(Told(), [5, 0, 7]))
    assert [sorted(part[i].tolist()) for i in range(3)] == [LABELS[5], LABELS[0], LABELS[7]]
    assert dataset_targets(Subset(Told(), [5, 0])) is None
    assert dataset_labels(object()) is None


def test_an_image_without_labels_is_its_own_partner():
    labels = LabelSets([[], [1], [1]])
    assert labels.partners_of(np.array([0, 1, 2]), np.random.default_rng(0)).tolist() == [0, 2, 1]
    assert labels.partners_for(np.array([0]), np.random.default_rng(0)).tolist() == []
