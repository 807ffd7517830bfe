"""Classes mixed across ranks: two processes with half a batch each against one with the whole."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from processes import run_ranks
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timm_synermix import SynerMixTask
from timm_synermix.functional import row_weight
from timm_synermix.task.gather import gather_rows
from timm_synermix.utils.random import seed_of

TARGET = torch.tensor([0, 1, 0, 3, 2, 1, 3, 3, 4])
CUT = [slice(0, 5), slice(5, 9)]  # unequal parts; classes 1 and 3 are in both
ROWS = 7  # per rank, padding included
CASES = [dict(), dict(num_mixed=1), dict(beta=1.0), dict(compiled=True), dict(one_class=True)]


def targets(case):
    """Of one class there is nothing for the second rank to classify."""
    return torch.full_like(TARGET, 2) if case.get('one_class') else TARGET


class Model(nn.Sequential):
    def get_classifier(self):
        return self[-1]


def create_model():
    torch.manual_seed(0)
    return Model(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double()


def images():
    return torch.randn(2, len(TARGET), 3, 6, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def where():
    """Rows of the images among the gathered ones."""
    return torch.cat([rank * ROWS + torch.arange(cut.stop - cut.start) for rank, cut in enumerate(CUT)])


def assert_parts_have_the_same_gradients(task, input, target):
    """One loss after the other, averaged over the ranks with the last; of two batches."""
    wrapped = task.trainable_module
    gradients = []
    for in_parts in (False, True):
        wrapped.zero_grad()
        task.num_batches = 0
        for _ in range(2):
            last = task.num_batches == 1
            parts = task.parts(input, target) if in_parts else [partial(task, input, target)]
            for part in parts:
                with nullcontext() if last and part is parts[-1] else wrapped.no_sync():
                    part()['loss'].backward()
        gradients.append([p.grad.clone() for p in wrapped.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def run_rank(folder):
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    try:
        results = []
        for case in CASES:
            case, target, model = dict(case), targets(case)[CUT[rank]], create_model()
            case.pop('one_class', None)
            compiled = case.pop('compiled', False)
            task = SynerMixTask(model, **{'beta': 0.3, **case}, gather_rows=ROWS, seed=5, verbose=False)
            if compiled:
                task.compile(backend='eager')
            task.trainable_module = DistributedDataParallel(task.trainable_module)
            clean, augmented = images()[:, CUT[rank]]
            result = task(torch.cat([clean, augmented]), target)
            if 'inter_loss' not in result:
                assert len(result['output']) == ROWS  # whatever the number of ranks
            result['loss'].backward()
            results.append((result['intra_loss'], [p.grad for p in model.parameters()]))
            assert_parts_have_the_same_gradients(task, torch.cat([clean, augmented]), target)
        torch.save(results, f'{folder}/rank{rank}.pt')
        with pytest.raises(ValueError, match='at least the 3 rows of this rank, got 2'):
            gather_rows(torch.zeros(3, 1), 2)
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path, monkeypatch):
    run_ranks(run_rank, str(tmp_path), folder=tmp_path)
    ranks = [torch.load(tmp_path / f'rank{rank}.pt') for rank in (0, 1)]
    for case, first, second in zip(CASES, *ranks, strict=True):
        whole_model, target = create_model(), targets(case)
        generator = torch.Generator().manual_seed(seed_of('mix', 5, 0, 0))
        padded = torch.full((2 * ROWS,), -100).scatter_(0, where(), target)
        # the draws of the two ranks, for the images alone
        draws = row_weight(padded.clamp(min=-1) + 1, num_mixed=case.get('num_mixed', 0), generator=generator)[where()]
        monkeypatch.setattr(
            'timm_synermix.task.synermix.row_weight', lambda row, draws=draws, **_: row_weight(row, weight=draws)
        )
        task = SynerMixTask(whole_model, beta=case.get('beta', 0.3), verbose=False)
        clean, augmented = images()
        result = task(torch.cat([clean, augmented]), target)
        loss = result['loss']
        if 'inter_loss' in result:  # the mean over two ranks weighs their images alike, whatever their number
            parts = [nn.functional.cross_entropy(whole_model(augmented[cut]), target[cut]) for cut in CUT]
            loss = loss + 0.7 * (sum(parts) / 2 - nn.functional.cross_entropy(whole_model(augmented), target))
        loss.backward()
        for intra_loss, gradients in (first, second):
            torch.testing.assert_close(intra_loss, result['intra_loss'])
            for got, p in zip(gradients, whole_model.parameters(), strict=True):
                torch.testing.assert_close(got, p.grad)
        apart = SynerMixTask(copy.deepcopy(whole_model), beta=1.0, verbose=False)(clean[CUT[0]], target[CUT[0]])
        assert abs(apart['loss'] - result['intra_loss']) > 1e-3  # one rank by itself is another thing
