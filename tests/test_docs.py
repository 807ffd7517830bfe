"""The code in the documentation runs."""

import argparse
import re

import pytest
import timm
import torch
from conftest import ROOT
from timm.data import resolve_data_config

from timm_synermix import SynerMixTask, add_manifold_mixup_args, add_synermix_args, create_synermix_loader
from timm_synermix.datasets import create_dataset


def snippets(path):
    return re.findall(r'```python\n(.*?)```', (ROOT / path).read_text(), re.DOTALL)


@pytest.fixture
def timm_script(image_folder):
    """What timm's train.py has at hand where the snippets go, on a few images."""
    parser = argparse.ArgumentParser()
    model = timm.create_model('test_resnet', num_classes=4)
    args = argparse.Namespace(
        batch_size=8, reprob=0.5, scale=[0.5, 1], color_jitter=0.4, train_interpolation='random', seed=1,
        workers=0, distributed=False, prefetcher=True, rank=0,
    )  # fmt: skip
    return dict(
        parser=parser,
        args=args,
        model=model,
        device=torch.device('cpu'),
        dataset_train=create_dataset('', root=str(image_folder), split='train'),
        data_config=resolve_data_config(dict(img_size=32), model=model),
        criterion_kwargs=dict(smoothing=0.1),
        mixup_active=True,
        mixup_args=dict(mixup_alpha=0.2, cutmix_alpha=1.0, prob=1.0, mode='batch', label_smoothing=0.1, num_classes=4),
    )


@pytest.mark.parametrize('prefetcher', [True, False])
def test_three_changes_to_timm_s_script(timm_script, prefetcher):
    flags, loader, task, off, one_after_the_other = snippets('docs/integrate.md')[:5]
    exec(flags, timm_script)
    given = ['--synermix', '--synermix-singletons', 'keep', '--synermix-num-mixed', '2', '--synermix-off-epoch', '1']
    timm_script['args'] = args = timm_script['parser'].parse_args(given, namespace=timm_script['args'])
    args.prefetcher, args.mixup_off_epoch = prefetcher, 2
    timm_script['mixup_fn'] = 'timm_s own'
    exec(loader, timm_script)
    exec(task, timm_script)
    task, loader = timm_script['task'], timm_script['loader_train']
    assert task.num_mixed == 2
    assert not loader.batch_sampler.batch_sampler.supplement
    assert timm_script['mixup_fn'] is None
    losses = {'intra_loss', 'inter_loss'}
    for epoch in range(3):
        timm_script['epoch'] = epoch
        timm_script['dataset_train'].set_epoch(epoch)
        exec(off, timm_script)
        assert loader.batch_sampler.epoch == epoch
        for input, target in loader:
            result = task(input, target)
            result['loss'].backward()
            assert losses & result.keys() == (losses if epoch == 0 else {'inter_loss'})
        assert task.mixup_fn.mixup_enabled == (epoch < 2)
    task.trainable_module.zero_grad()
    exec(one_after_the_other, dict(task=task, input=input, target=target))
    assert all(p.grad.isfinite().all() for p in task.trainable_module.parameters())


def test_without_the_flag_nothing_changes(timm_script):
    flags, loader, task, _ = snippets('docs/integrate.md')[:4]
    exec(flags, timm_script)
    timm_script['args'] = timm_script['parser'].parse_args([], namespace=timm_script['args'])
    exec(loader, timm_script)
    exec(task, timm_script)
    assert 'loader_train' not in timm_script
    assert 'task' not in timm_script


def test_bare_loop(image_folder):
    loader = create_synermix_loader(
        create_dataset('', root=str(image_folder), split='train'), 32, 8, num_workers=0, device=torch.device('cpu')
    )
    scope = dict(batches=[(*x.chunk(2), y) for x, y in loader])
    for snippet in snippets('docs/integrate.md')[7:]:
        exec(snippet, scope)
    assert scope['loss'].isfinite()
    feature = scope['hook'](scope['clean'])[1]
    by_hand = scope['model'].get_classifier()(
        scope['intra_class_mix'](feature, scope['target'], weight=scope['weight'])[0]
    )
    torch.testing.assert_close(scope['logits'], by_hand)  # the two ways agree where both apply


def test_mixers(image_folder):
    model = timm.create_model('test_resnet', num_classes=10)
    scope = dict(model=model, SynerMixTask=SynerMixTask, torch=torch)
    for snippet in snippets('docs/integrate.md')[5:7]:
        exec(snippet, scope)
        result = scope['task'](torch.randn(8, 3, 32, 32), torch.tensor([1, 1, 4, 4]))
        assert result['loss'].isfinite()
    _, soft = scope['mix_squares'](torch.randn(4, 3, 8, 8), torch.arange(4))
    assert soft.sum(1).tolist() == [1.0] * 4


def test_readme_code():
    (snippet,) = snippets('README.md')
    exec(snippet, {})


def test_readme_names_every_synermix_flag_and_what_is_left_out():
    text = (ROOT / 'README.md').read_text()
    parser = argparse.ArgumentParser()
    add_synermix_args(parser)
    add_manifold_mixup_args(parser)
    for action in parser._actions[1:]:
        assert f'`{action.option_strings[0]}' in text, action.option_strings
    assert '--naflex-loader' in text


def test_links_in_the_documents_lead_somewhere():
    for path in [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]:
        for target in re.findall(r'\]\((?!http)([^)#]+)', path.read_text()):
            assert (path.parent / target).exists(), (path.name, target)


def test_every_test_that_the_reliability_table_names_exists():
    text = (ROOT / 'docs/reliability.md').read_text()
    tests = ''.join(path.read_text() for path in (ROOT / 'tests').glob('test_*.py'))
    named = set(re.findall(r'`(test_\w+)`', text))
    assert len(named) > 30
    for name in named:
        assert f'def {name}(' in tests, name
    for row in re.findall(
        r'^\| (?!\*\*|exit|case|what|---|\d)(.*)\|$', text.partition('and its test')[2], re.MULTILINE
    ):
        assert '`test_' in row.rpartition('|')[2], row
