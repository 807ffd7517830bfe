import pytest
import timm
import torch

from timm_synermix import SynerMixTask
from timm_synermix.engine.resume import rank_state
from timm_synermix.functional import class_rows, mix_rows, row_weight
from timm_synermix.task.feature_bank import FeatureBank

CLASSES, D = 6, 3


def batch(*target):
    target = torch.tensor(target)
    return torch.randn(len(target), D), target, *class_rows(target)


def test_a_lone_image_is_mixed_with_the_last_feature_of_its_class():
    bank = FeatureBank(CLASSES)
    feature, _, row, row_target = batch(4, 0, 4, 2)
    assert bank.draw(row, row_target) is None
    bank.update((feature,), row, row_target)
    kept = {4: feature[2], 0: feature[1], 2: feature[3]}

    feature, target, row, row_target = batch(2, 5, 4, 4, 0)  # 2 and 0 are alone; so is 5, which the bank does not know
    mix = bank.draw(row, row_target)
    weight = row_weight(row)
    mixed = mix.add_to(mix_rows(feature, row, weight), 0)
    for r, c in enumerate((0, 2, 4, 5)):
        members = target == c
        own = weight[members] @ feature[members]
        if c in (0, 2):
            assert 0 < mix.share[r] < 1
            own = (1 - mix.share[r]) * own + mix.share[r] * kept[c]
        torch.testing.assert_close(mixed[r], own)
    assert mixed[4].abs().sum() == 0  # padding
    assert mix.share[2:].abs().sum() == 0
    assert mix.found.item() == pytest.approx(2 / 3)  # of 2, 5 and 0
    assert bank.draw(*class_rows(torch.tensor([4, 4]))).found == 1
    assert FeatureBank(CLASSES, D).memory == 4 * D * (CLASSES + 1) == bank.features[0].nbytes


def test_shares_are_those_of_two_uniform_draws():
    bank = FeatureBank(1)
    feature, _, row, row_target = batch(0)
    bank.update((feature,), row, row_target)
    shares = torch.stack([bank.draw(row, row_target).share[0] for _ in range(4000)])
    u, v = torch.rand(2, 100000)
    expected = v / (u + v)
    assert shares.mean().item() == pytest.approx(0.5, abs=0.02)
    assert shares.std().item() == pytest.approx(expected.std().item(), rel=0.05)
    assert shares.quantile(0.1).item() == pytest.approx(expected.quantile(0.1).item(), abs=0.02)


def test_several_classifiers_and_feature_maps_keep_their_dtype():
    bank = FeatureBank(CLASSES)
    _, _, row, row_target = batch(0, 3)
    features = torch.randn(2, 4, dtype=torch.bfloat16), torch.randn(2, 5, 1, 1, requires_grad=True)
    bank.update(features, row, row_target)
    mix = bank.draw(row, row_target)
    for i, feature in enumerate(features):
        mixed = mix.add_to(feature, i)
        assert mixed.dtype == feature.dtype
        torch.testing.assert_close(mixed, feature, rtol=1e-2, atol=1e-6)  # a feature mixed with itself
        assert not mix.feature[i].requires_grad


def test_a_feature_that_is_not_finite_is_not_kept_and_touches_no_other_row():
    bank = FeatureBank(CLASSES)
    feature, _, row, row_target = batch(0, 1, 2)
    bank.update((feature,), row, row_target)
    broken = feature.clone()
    broken[0, 0], broken[1, 1] = torch.inf, torch.nan
    bank.update((broken + 1,), row, row_target)
    mixed = bank.draw(row, row_target).add_to(torch.zeros(3, D), 0)
    assert mixed.isfinite().all()
    share = bank.draw(row, row_target, torch.Generator().manual_seed(0))
    expected = torch.cat([feature[:2], feature[2:] + 1]) * share.share[:, None]
    torch.testing.assert_close(share.add_to(torch.zeros(3, D), 0), expected)
    mixed = share._replace(share=torch.zeros(3)).add_to(broken, 0)
    assert torch.equal(mixed[2], broken[2])


def test_state_goes_through_a_checkpoint_and_must_fit():
    bank, other = FeatureBank(CLASSES), FeatureBank(CLASSES)
    other.load_state_dict(bank.state_dict(), torch.device('cpu'))  # before the first step
    feature, _, row, row_target = batch(1, 3)
    assert other.draw(row, row_target) is None
    bank.update((feature,), row, row_target)
    other.load_state_dict(bank.state_dict(), torch.device('cpu'))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    first, second = (b.draw(row, row_target, g) for b, g in zip((bank, other), generators))
    assert torch.equal(first.share, second.share)
    assert torch.equal(first.feature[0], second.feature[0])
    assert torch.equal(first.feature[0], feature)
    with pytest.raises(ValueError, match='feature bank must be of 7 classes, got 6'):
        FeatureBank(7).load_state_dict(bank.state_dict(), torch.device('cpu'))


def test_checkpoints_have_the_bank_of_each_process_once(monkeypatch):
    """That of the first one is in the state of its task; above a size of all there is no other."""
    task = SynerMixTask(timm.create_model('test_resnet', num_classes=5), bank=True, verbose=False)
    clean, augmented = torch.randn(2, 4, 3, 32, 32)
    task(torch.cat([clean, augmented]), torch.arange(4))
    states = [rank_state(task, rank, 3) for rank in range(3)]
    assert ['bank' in state for state in states] == [False, True, True]
    assert 'bank' in task.get_task_state()
    assert task.bank.memory == task.bank.features[0].nbytes
    monkeypatch.setattr('timm_synermix.engine.resume._BANKS', 3 * task.bank.memory - 1)
    assert 'bank' not in rank_state(task, 1, 3)


def test_nothing_is_read_back_from_the_device():
    """On tensors without data, whatever would wait for a value fails."""
    with torch.device('meta'):
        bank = FeatureBank(CLASSES)
        target, feature = torch.zeros(4, dtype=torch.long), torch.zeros(4, D)
        row, row_target = class_rows(target)
        bank.update((feature,), row, row_target)
        assert bank.draw(row, row_target).add_to(feature, 0).shape == (4, D)
