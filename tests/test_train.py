"""train.py as a user runs it, on a few images."""

import copy
import io
import json
import math
import re
import sys
import tarfile
from functools import partial

import pytest
import timm
import torch
from conftest import SMALL, assert_same_run, make_image_folder, make_run
from safetensors.torch import load_file, save_file
from timm.optim import Lookahead
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils.agc import adaptive_clip_grad
from torch import nn

import train
from timm_synermix import SynerMixTask, report
from timm_synermix.cli.checks import replaced
from timm_synermix.engine import build, task, train_loader
from timm_synermix.metrics.collection import METRIC_NAMES

FILES = {
    'args.yaml',
    'summary.csv',
    'last.pth.tar',
    'model_best.pth.tar',
    'model_best.safetensors',
    'model.safetensors',
    'config.json',
    'README.md',
    'checkpoint-0.pth.tar',
}
TIMM_COLUMNS = ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    'flags',
    [
        [],
        ['--mixup', '0.5'],
        ['--synermix'],
        ['--synermix', '--mixup', '0.5', '--cutmix', '1.0', '--mixup-mode', 'elem'],
    ],
    ids=lambda flags: ' '.join(flags[:2]) or 'plain',
)
def test_files_and_result_are_timm_s(run_train, flags):
    run = run_train(*flags)
    picture = {'feature_map.png'} if '--synermix' in flags else set()
    assert {path.name for path in run.folder.iterdir()} == FILES | picture
    (row,) = run.summary()
    extra = ['train_intra_loss', 'train_inter_loss'] if '--synermix' in flags else []
    cohesion = [f'eval_{name}' for name in METRIC_NAMES] if '--synermix' in flags else []
    assert list(row) == TIMM_COLUMNS + extra + cohesion
    (result,) = run.results
    assert result['epoch'] == 0
    assert result['validation']['top1'] == row['eval_top1']
    assert result['train']['loss'] == row['train_loss']
    if extra:
        beta = 0.1 if '--mixup' in flags else 0.5
        expected = beta * row['train_intra_loss'] + (1 - beta) * row['train_inter_loss']
        assert row['train_loss'] == pytest.approx(expected, rel=1e-5)


def test_checkpoints_load_in_timm(run_train):
    run = run_train('--synermix', '--model-ema', '--model-ema-decay', '0.5')
    state = run.checkpoint()
    assert not all(torch.equal(state['state_dict'][n], state['state_dict_ema'][n]) for n in state['state_dict'])
    create = dict(model_name='test_efficientnet', num_classes=4)
    model = timm.create_model(checkpoint_path=str(run.folder / 'model_best.pth.tar'), **create)
    assert_same_weights(model.state_dict(), state['state_dict_ema'])  # timm prefers the average
    best = timm.create_model(checkpoint_path=str(run.folder / 'model_best.safetensors'), **create)
    assert_same_weights(best.state_dict(), model.state_dict())
    assert load_file(run.folder / 'model_best.safetensors').keys() == state['state_dict'].keys()

    task = ClassificationTask(model, verbose=False)
    optimizer = timm.optim.create_optimizer_v2(model, opt='sgd', lr=0.1, weight_decay=2e-5, momentum=0.9)
    assert resume_task_checkpoint(task, str(run.folder / 'last.pth.tar'), optimizer) == 1
    assert_same_weights(model.state_dict(), state['state_dict'])


def test_accuracy_is_that_of_timm_s_evaluation(run_train, image_folder):
    run = run_train('--synermix')
    model = timm.create_model('test_efficientnet', num_classes=4, checkpoint_path=str(run.folder / 'last.pth.tar'))
    config = timm.data.resolve_data_config(dict(img_size=32), model=model)
    dataset = timm.data.create_dataset(
        '', root=str(image_folder), split='validation', transform=timm.data.create_transform(**config)
    )
    model.eval()
    with torch.no_grad():
        predicted = [model(image[None]).argmax().item() == target for image, target in dataset]
    assert run.results[0]['validation']['top1'] == pytest.approx(100 * sum(predicted) / len(predicted))


WORK_WITH_SYNERMIX = [
    '--no-aug --in-chans 1 --smoothing 0 --clip-grad 1.0',
    '--no-prefetcher --reprob 0.5 --aug-repeats 3 --recovery-interval 1',
    '--epoch-repeats 2 --train-num-samples 10 --val-split= --use-multi-epochs-loader',
    '--aa rand-m9-mstd0.5 --reprob 0.3 --color-jitter 0.4 --tta 1 --eval-metric loss --save-images',
    '--manifold-mixup 0.2 --manifold-mixup-layers 0 blocks.1 --channels-last',
    '--synermix-singletons keep --synermix-num-mixed 2 --loss poly --opt lookahead_sgd --lr 1e-3 --model-ema '
    '--model-ema-force-cpu',
    '--synermix-singletons bank --grad-accum-steps 2 --lr-base-scale sqrt --checkpoint-hist 1',
    '--synermix-supplement clean --mixup 0.5 --reprob 0.5 --clip-grad 0.1 --clip-mode value --sched plateau',
    '--synermix-batch fixed --cutmix 1 --mixup 0.1 --bce-loss --bce-target-thresh 0.2 --model-ema --model-ema-warmup',
    '--manifold-mixup 1 --amp --amp-dtype bfloat16 --clip-grad 0.1 --clip-mode agc --sched none',
    '--synermix-fraction 0.3 --mixup 0.5 --reprob 0.5 --sched-on-updates --drop 0.2 --drop-path 0.1 '
    '--head-init-scale 0.1 --head-init-bias -2',
    '--synermix-beta 0 --loss bce --mixup 0.2 --sched wsd --decay-epochs 1 --lr-decay-fn linear --warmup-epochs 0',
    '--synermix-beta 1 --model-dtype bfloat16 --grad-checkpointing --synchronize-step --pin-mem',
    '--opt adamw --layer-decay 0.7 --lr 1e-3 --mixup 0.2 --mixup-mode half',
    '--opt adahessian --lr 1e-3 --cutmix-minmax 0.2 0.6 --mixup-mode pair',
]


@pytest.mark.filterwarnings('ignore:Using backward\\(\\) with create_graph:UserWarning')  # adahessian asks for it
@pytest.mark.filterwarnings('ignore:PlateauLRScheduler is deprecated:FutureWarning')
@pytest.mark.filterwarnings('ignore:.*pin_memory.*:UserWarning')
@pytest.mark.parametrize('flags', WORK_WITH_SYNERMIX)
def test_flags_that_work_with_synermix(run_train, flags):
    """Each flag in one of these runs."""
    run = run_train('--synermix', *flags.split())
    (row,) = run.summary()
    assert 0 < row['train_loss'] < 10
    assert (run.folder / 'last.pth.tar').exists()
    for flag, written in {'--save-images': 'train-batch-0.jpg', '--recovery-interval': 'recovery-0-2.pth.tar'}.items():
        assert (run.folder / written).exists() == (flag in flags)
    assert ('train_intra_loss' in row) == ('--synermix-beta 0' not in flags)
    assert ('train_inter_loss' in row) == ('--synermix-beta 1' not in flags)


def test_manifold_mixup_alone(run_train, caplog):
    """With beta 0: MixUp's own loss, higher than that of one-hot targets, and no clean images."""
    caplog.set_level('INFO')
    run = run_train('--manifold-mixup', '1', '--smoothing', '0', '--mixup-off-epoch', '1', '--epochs', '2')
    assert 'Manifold MixUp of input, blocks.1, blocks.2, alpha 1' in caplog.text
    assert 'train_intra_loss' not in run.summary()[0]
    assert run.summary()[0]['train_inter_loss'] == run.summary()[0]['train_loss']


def test_the_feature_bank_is_resumed(run_train):
    first = run_train('--synermix', '--synermix-singletons', 'bank').checkpoint()['task_state']['bank']
    assert first['filled'].tolist() == [True] * 4 + [False]
    flags = ['--synermix', '--synermix-singletons', 'bank', '--resume', 'auto', '--epochs', '2', '--val-split', '']
    second = run_train(*flags).checkpoint()['task_state']['bank']
    assert not torch.equal(first['feature0'], second['feature0'])
    other = run_train(*flags, '--epochs', '3', '--synermix-off-epoch', '1').checkpoint()['task_state']['bank']
    assert torch.equal(other['feature0'], second['feature0'])  # it is taken over, and stays as it is when off


@pytest.mark.parametrize('more', [[], ['--synermix-supplement', 'clean']], ids=str)
def test_augmentation_splits(run_train, more):
    flags = ['--aug-splits', '2', '--jsd-loss', '--split-bn', '--resplit', '--reprob', '0.5', '--aa', 'augmix-m3-w2-d1']
    run = run_train('--synermix', *flags, '--epochs', '2', '--model-ema', *more)
    row = run.summary()[-1]
    assert row['train_loss'] == pytest.approx(0.5 * (row['train_intra_loss'] + row['train_inter_loss']), rel=1e-4)
    assert any('aux_bn' in name for name in run.checkpoint()['state_dict'])


@pytest.mark.parametrize('more', [['--mixup', '0.5'], ['--synermix-off-epoch', '1']], ids=str)
def test_scheduled_sizes(run_train, more):
    flags = ['--train-img-sizes', '32', '48', '--train-batch-sizes', '8', '4', '--train-size-schedule', 'progressive']
    run = run_train('--synermix', *flags, '--variable-batch-loss-scale', 'sqrt', '--epochs', '2', *more)
    first, second = run.summary()
    assert first['train_intra_loss'] > 0
    assert ('train_intra_loss' in second and second['train_intra_loss'] > 0) == ('--mixup' in more)


def test_timm_flags_without_synermix(run_train):
    for i, flags in enumerate(
        [
            ['--train-img-sizes', '32', '48', '--train-batch-sizes', '8', '4', '--variable-batch-loss-scale', 'sqrt'],
            ['--aug-splits', '2', '--jsd-loss', '--split-bn', '--resplit', '--reprob', '0.5', '--aa', 'rand-m9'],
            ['--mixup', '1.0', '--no-prefetcher'],
            ['--mixup', '1.0', '--mixup-mode', 'half'],
        ]
    ):
        run = run_train(*flags, experiment=str(i))
        assert list(run.summary()[0]) == TIMM_COLUMNS


@pytest.mark.parametrize('kind', ['logit', 'feature'])
@pytest.mark.parametrize('flags', [[], ['--synermix', '--mixup', '0.5']], ids=['plain', 'synermix'])
def test_distillation(run_train, monkeypatch, kind, flags):
    """The teacher's weights would come from a hub: a random teacher stands in. A resumed run ends as a whole one."""
    create = timm.task.distillation.create_model

    def teacher(*args, **kwargs):
        torch.manual_seed(7)
        return create(*args, **{**kwargs, 'pretrained': False})

    monkeypatch.setattr('timm.task.distillation.create_model', teacher)
    flags = ['--kd-model-name', 'test_resnet', '--kd-distill-type', kind, '--model-ema', '--epochs', '2', *flags]
    run = run_train(*flags, experiment='whole')
    (row, _) = run.summary()
    assert {'train_task_loss', 'train_kd_loss'} <= row.keys()
    assert ('train_intra_loss' in row) == ('--synermix' in flags)
    assert set(run.checkpoint()['state_dict']) == set(timm.create_model('test_efficientnet').state_dict())
    assert ('projection' in run.checkpoint().get('task_state', {})) == (kind == 'feature')
    run_train(*flags, '--stop-epoch', '1')
    assert_same_run(run_train(*flags, '--resume', 'auto'), run)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_multilabel(run_train, tmp_path):
    pytest.importorskip('datasets', reason='needs the package datasets')
    root = make_image_folder(tmp_path / 'images', {'train': {'': 12}, 'validation': {'': 4}})
    for split, count in (('train', 12), ('validation', 4)):
        rows = [dict(file_name=f'{i}.png', labels=[i % 3, 3] if i % 2 else [i % 3]) for i in range(count)]
        (root / split / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    data = ('--dataset', f'hfds/{root}', '--data-dir', str(tmp_path / 'cache'), '--target-key', 'labels')
    for flags in ([], ['--mixup', '0.5'], ['--mixup', '0.5', '--no-prefetcher']):
        run = run_train('--task', 'multilabel', '--num-classes', '4', *flags, data=data)
        assert {'eval_map', 'eval_macro_f1'} <= run.summary()[0].keys()


def test_accumulated_gradients_are_the_mean_over_batches():
    """train_one_epoch against a hand-written loop, for a last window that is shorter."""
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(5)]
    model = nn.Linear(3, 2)
    reference = nn.Linear(3, 2)
    reference.load_state_dict(model.state_dict())
    args = train.parser.parse_args(['--device', 'cpu', '--grad-accum-steps', '2'])
    accelerator = train.create_train_accelerator(args)
    task = ClassificationTask(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    run = make_run(args, accelerator, task, optimizer, batches)
    metrics = train.train_one_epoch(run, epoch=0)

    sgd = torch.optim.SGD(reference.parameters(), lr=0.5)
    losses = []
    for window in (batches[:2], batches[2:4], batches[4:]):
        sgd.zero_grad()
        each = [nn.functional.cross_entropy(reference(x), y) for x, y in window]
        losses += [loss.item() for loss in each]
        torch.stack(each).mean().backward()
        sgd.step()
    torch.testing.assert_close(model.weight, reference.weight)
    assert metrics['loss'] == pytest.approx(sum(losses) / 5)


@pytest.mark.parametrize(('scale', 'factor'), [('none', 1), ('sqrt', 0.5**0.5), ('linear', 0.5)])
def test_the_loss_of_a_smaller_batch_is_scaled(scale, factor):
    """A batch of 4 images, where -b is 8."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    model = nn.Linear(3, 2)
    gradient = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model.weight)[0]
    expected = model.weight.detach() - factor * gradient
    args = train.parser.parse_args(['--device', 'cpu', '-b', '8', '--variable-batch-loss-scale', scale])
    accelerator, optimizer = train.create_train_accelerator(args), torch.optim.SGD(model.parameters(), lr=1)
    task = ClassificationTask(model, verbose=False)
    train.train_one_epoch(make_run(args, accelerator, task, optimizer, [(x, y)]), epoch=0)
    torch.testing.assert_close(model.weight.detach(), expected)


@pytest.mark.parametrize(
    ('mode', 'clip'),
    [
        ('norm', torch.nn.utils.clip_grad_norm_),
        ('value', torch.nn.utils.clip_grad_value_),
        ('agc', lambda parameters, value: adaptive_clip_grad(list(parameters)[:-2], value)),
    ],
)
def test_each_mode_clips_in_its_way(mode, clip):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    reference = copy.deepcopy(model)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    args = train.parser.parse_args(['--device', 'cpu', '--clip-grad', '0.1', '--clip-mode', mode])
    accelerator, optimizer = train.create_train_accelerator(args), torch.optim.SGD(model.parameters(), lr=1)
    run = make_run(args, accelerator, ClassificationTask(model, verbose=False), optimizer, [])
    train.update_weights(run, 1)
    clip(reference.parameters(), 0.1)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q - q.grad)


def test_each_rank_draws_its_own_numbers():
    """What a step drops depends on the rank, and on nothing that was before."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 2))
    batches = [(torch.randn(4, 50), torch.tensor([0, 1, 0, 1]))]
    args = train.parser.parse_args(['--device', 'cpu'])
    accelerator, optimizer = train.create_train_accelerator(args), torch.optim.SGD(model.parameters(), lr=0)
    run = make_run(args, accelerator, ClassificationTask(model, verbose=False), optimizer, batches)
    losses = []
    for rank in (0, 1, 0):
        run.args = replaced(run.args, rank=rank)
        losses.append(train.train_one_epoch(run, epoch=0)['loss'])
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize(
    ('flags', 'dtype'), [([], torch.float32), (['--amp', '--amp-dtype', 'bfloat16'], torch.bfloat16)]
)
def test_forwards_are_autocast(flags, dtype):
    model, seen = nn.Linear(3, 2), []
    model.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    args = train.parser.parse_args(['--device', 'cpu', *flags])
    accelerator, optimizer = train.create_train_accelerator(args), torch.optim.SGD(model.parameters(), lr=1)
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    run = make_run(args, accelerator, ClassificationTask(model, verbose=False), optimizer, batches)
    train.train_one_epoch(run, epoch=0)
    assert seen == [dtype]
    assert model.weight.dtype == torch.float32


def test_lookahead_ends_an_epoch_with_its_slow_weights(monkeypatch):
    model, calls = nn.Linear(3, 2), []
    monkeypatch.setattr(Lookahead, 'sync_lookahead', lambda self: calls.append(self))
    args = train.parser.parse_args(['--device', 'cpu'])
    accelerator, optimizer = train.create_train_accelerator(args), Lookahead(torch.optim.SGD(model.parameters(), lr=1))
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))] * 2
    run = make_run(args, accelerator, ClassificationTask(model, verbose=False), optimizer, batches)
    train.train_one_epoch(run, epoch=0)
    assert calls == [optimizer]


def test_real_photographs_are_learnt(run_train, photographs):
    data = ('--data-dir', str(photographs), '--num-classes', '5')
    flags = ['--synermix', '--mixup', '0.2', '-b', '64', '--opt', 'adamw', '--lr', '2e-3', '--warmup-epochs', '0']
    run = run_train(*flags, '--epochs', '3', '--model', 'test_resnet', '-j', '2', data=data)
    first, *_, last = run.summary()
    assert last['eval_top1'] > 40  # 20 is chance
    assert last['train_intra_loss'] < first['train_intra_loss']
    assert last['train_inter_loss'] < first['train_inter_loss']


# Schedule, resume and stop


@pytest.mark.parametrize('flags', [[], ['--synermix', '--mixup', '0.5']], ids=['plain', 'synermix'])
def test_stop_and_resume_auto(run_train, flags):
    whole = run_train('--epochs', '3', *flags, experiment='whole')
    flags = ('--epochs', '3', '--resume', 'auto', *flags)
    stopped = run_train('--stop-epoch', '1', *flags)  # no checkpoint yet: a fresh start
    assert [row['epoch'] for row in stopped.summary()] == [0]
    resumed = run_train(*flags)
    assert [row['epoch'] for row in resumed.summary()] == [0, 1, 2]
    assert [row['lr'] for row in resumed.summary()] == [row['lr'] for row in whole.summary()]
    assert {path.name for path in resumed.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}
    best = max(resumed.summary(), key=lambda row: row['eval_top1'])['eval_top1']
    assert resumed.checkpoint('model_best')['metric'] == best
    assert 'resume: auto' in (resumed.folder / 'args.yaml').read_text()
    finished = (resumed.folder / 'summary.csv').read_text()
    assert run_train(*flags).results == []  # nothing is left to do
    assert (resumed.folder / 'summary.csv').read_text() == finished


def test_resume_a_file_into_another_folder(run_train):
    first = run_train('--synermix', '--model-ema')
    second = run_train(
        '--synermix',
        '--model-ema',
        '--epochs',
        '2',
        '--resume',
        str(first.folder / 'last.pth.tar'),
        experiment='second',
    )
    assert [row['epoch'] for row in second.summary()] == [1]
    assert len(first.summary()) == 1


def test_a_fresh_run_starts_the_summary_anew(run_train):
    run_train('--epochs', '2')
    assert [row['epoch'] for row in run_train().summary()] == [0]


def test_milestones_and_evaluation_interval(run_train):
    run = run_train('--epochs', '5', '--val-interval', '2', '--save-epochs', '1', '--stop-epoch', '3')
    assert [row['epoch'] for row in run.summary()] == [0, 1, 2]  # milestone, interval, stop
    assert (run.folder / 'milestone-1.pth.tar').exists()
    assert run.checkpoint('milestone-1')['epoch'] == 0


def test_synermix_and_mixup_can_be_turned_off(run_train, monkeypatch):
    shapes = []
    original = SynerMixTask.parts

    def parts(self, input, target):
        shapes.append((len(input) // len(target), self.mixup_fn.mixup_enabled))
        return original(self, input, target)

    monkeypatch.setattr(SynerMixTask, 'parts', parts)
    flags = ['--synermix', '--mixup', '1', '--epochs', '3', '--synermix-off-epoch', '1', '--mixup-off-epoch', '2']
    run = run_train(*flags)
    assert list(dict.fromkeys(shapes)) == [(2, True), (1, True), (1, False)]
    header, *rows = (run.folder / 'summary.csv').read_text().split()
    assert 'lr,train_intra_loss,train_inter_loss,' in header
    assert [row.split(',')[6] == '' for row in rows] == [False, True, True]


@pytest.mark.parametrize(
    'flags',
    [
        [],
        ['--grad-accum-steps', '2', '--clip-grad', '0.5', '--mixup', '0.5'],
        ['--clip-grad', '0.01', '--clip-mode', 'agc'],
    ],
    ids=' '.join,
)
def test_one_loss_after_the_other_trains_the_same_model(run_train, monkeypatch, flags):
    flags = ['--synermix', *flags, '--lr', '0.01', '--epochs', '2']
    apart = run_train(*flags)
    monkeypatch.setattr(SynerMixTask, 'parts', lambda self, input, target: [partial(self.forward, input, target)])
    summed = run_train(*flags, experiment='summed')
    for name, value in apart.checkpoint()['state_dict'].items():
        torch.testing.assert_close(value, summed.checkpoint()['state_dict'][name], atol=1e-5, rtol=1e-4)
    for row, other in zip(apart.summary(), summed.summary(), strict=True):
        assert row['train_loss'] == pytest.approx(other['train_loss'], rel=1e-5)
        assert row['train_intra_loss'] == pytest.approx(other['train_intra_loss'], rel=1e-4)


def test_the_same_seed_gives_the_same_run(run_train):
    flags = ['--synermix', '--mixup', '0.5', '--epochs', '2', '--reprob', '0.5']
    a, b = run_train(*flags, experiment='a'), run_train(*flags, experiment='b')
    assert_same_weights(a.checkpoint()['state_dict'], b.checkpoint()['state_dict'])
    c = run_train(*flags, '--seed', '7', experiment='c')
    assert a.summary() == b.summary() != c.summary()


# Models


def test_a_caller_can_bring_its_own_model(run_train, monkeypatch):
    class Own(nn.Module):
        num_classes = 4

        def __init__(self):
            super().__init__()
            self.pretrained_cfg = {}
            self.body = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))

        def forward(self, x):
            return self.body(x)

    monkeypatch.setattr(train, 'create_model', lambda name, **kwargs: Own())
    run = run_train('--model', 'my_own')
    assert set(run.checkpoint()['state_dict']) == {'body.2.weight', 'body.2.bias'}


def test_image_size_reaches_models_of_fixed_size(run_train):
    run = run_train('--model', 'test_vit', '--synermix')
    assert run.checkpoint()['state_dict']['pos_embed'].shape[1] == 1 + (32 // 16) ** 2


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_initial_weights_from_a_file(run_train, tmp_path, suffix):
    state = timm.create_model('test_efficientnet', num_classes=4).state_dict()
    path = tmp_path / f'weights.{suffix}'
    save_file(state, path) if suffix == 'safetensors' else torch.save(state, path)
    for flag in ('--initial-checkpoint', '--pretrained-path'):
        run = run_train('--synermix', flag, str(path), '--lr', '0', '--warmup-epochs', '0', '--weight-decay', '0')
        trained = run.checkpoint()['state_dict']
        assert torch.equal(trained['conv_stem.weight'], state['conv_stem.weight'])


@pytest.mark.slow
def test_compile(run_train):
    run = run_train('--synermix', '--mixup', '0.5', '--torchcompile', 'eager', '--model-ema')
    assert set(run.checkpoint()['state_dict']) == set(timm.create_model('test_efficientnet').state_dict())


# Bad input: exit code 2, one line, nothing written

BAD = {
    '--data-dir /nowhere': (['--data-dir', '/nowhere'], '--data-dir must be a folder'),
    'one class': (['--data-dir', '{root}/train/a', '--val-split', ''], 'expected a folder for each class'),
    'classes': (['--num-classes', '3'], '--num-classes must cover all 4 classes of the training set, got 3'),
    'model': (['--model', 'resnet81'], "--model must be a timm model, got 'resnet81'; did you mean"),
    'no classifier': (['--num-classes', '0'], '--num-classes must be at least 1, got 0'),
    'cuda': (['--device', 'cuda'], '--device cuda: there is no CUDA device here'),
    'float16': (['--amp'], '--amp on the CPU needs --amp-dtype bfloat16'),
    'resume': (['--resume', '/nowhere.pth.tar'], '--resume must be a checkpoint file'),
    'weights': (['--initial-checkpoint', '/nowhere.pth'], '--initial-checkpoint must be a file of weights'),
    'image size': (
        ['--model', 'test_vit', '--img-size', '50'],
        '--img-size: --model test_vit cannot take images of 3x50x50: Input height (50) should be divisible',
    ),
    'interpolation': (
        ['--aa', 'rand-m9', '--train-interpolation', 'lanczos'],
        '--train-interpolation must be random, nearest, bilinear or bicubic with --aa, whose rotations have no other',
    ),
    'splits': (
        ['--aug-splits', '3', '--mixup', '0.2'],
        '--aug-splits cannot be used together with --mixup or --cutmix',
    ),
    'few images': (['--batch-size', '32'], '--batch-size must be at most the number of training'),
    'split': (['--val-split', 'tset'], "has no split 'tset', only train, validation"),
    'output': (['--output', '/dev/null/runs'], "--output: cannot write to the run's folder /dev/null/runs/run"),
    'no checkpoint': (['--resume', '{root}/train/a/0.png'], '--resume: '),
    'policy': (['--aa', 'nonsense'], 'Unknown AA policy nonsense'),
    'optimizer': (['--opt', 'sgdd'], 'sgdd'),
    'stop': (['--stop-epoch', '9'], '--stop-epoch must be at most the 1 epochs'),
    'loss': (['--loss', 'asl', '--mixup', '1'], 'does not support Mixup'),
    'loss name': (['--loss', 'mse'], "--loss must be one of ce, bce, asl, poly, jsd, twoway, zlpr, db, got 'mse'"),
    'sched': (['--sched', 'linear'], "Unknown scheduler 'linear'"),
    'eval metric': (['--eval-metric', 'f1'], '--eval-metric must be one of loss, top1, top5, got f1'),
    'layer': (
        ['--manifold-mixup', '1', '--manifold-mixup-layers', 'layer1'],
        '--manifold-mixup: layers: this model has no',
    ),
    'checkpointing': (['--manifold-mixup', '1', '--grad-checkpointing'], 'alone with gradient checkpointing'),
    'two mixers': (['--manifold-mixup', '1', '--mixup', '1'], '--manifold-mixup and --mixup or --cutmix cannot be'),
    'mode': (['--manifold-mixup', '1', '--mixup-mode', 'elem'], '--manifold-mixup and --mixup-mode elem cannot be'),
    'sizes': (
        ['--synermix-batch', 'fixed', '--synermix-supplement', 'clean'],
        '--synermix-batch fixed and --synermix-supplement clean cannot be used together',
    ),
    'bank': (
        ['--synermix-gather', '--synermix-singletons', 'bank'],
        '--synermix-singletons bank and --synermix-gather cannot be used together',
    ),
    'repeats': (['--aug-repeats', '3', '--synermix-singletons', 'bank'], 'bank and --aug-repeats cannot be used'),
    'channels': (['--in-chans', '1', '--input-size', '3', '32', '32'], 'Conflicting input channel counts'),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason='asks for a GPU that must not be there')
@pytest.mark.parametrize('name', BAD)
def test_bad_input(run_train, image_folder, tmp_path, capsys, name):
    flags, message = BAD[name]
    flags = [flag.format(root=image_folder) for flag in flags]
    with pytest.raises(SystemExit) as error:
        run_train(*([] if name in ('few images', 'splits') else ['--synermix']), *flags)
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert ': error: ' in text.strip().splitlines()[-1]
    assert not (tmp_path / 'run').exists()


def test_ctrl_c_while_building(run_train, monkeypatch, caplog):
    monkeypatch.setattr(train, 'create_train_accelerator', lambda args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as error:
        run_train()
    assert error.value.code == 130
    assert 'nothing to continue' in caplog.text


@pytest.mark.parametrize('when', [0, 1])
def test_ctrl_c_says_how_to_continue(run_train, tmp_path, monkeypatch, caplog, when):
    original = train.train_one_epoch

    def interrupted(run, epoch):
        if epoch == when:
            raise KeyboardInterrupt
        return original(run, epoch)

    monkeypatch.setattr(train, 'train_one_epoch', interrupted)
    with pytest.raises(SystemExit) as error:
        run_train('--epochs', '3')
    assert error.value.code == 130
    for advice in (f'--output {tmp_path}', '--experiment run --resume auto') if when else ('nothing to continue',):
        assert advice in caplog.text


@pytest.mark.parametrize('watched', [True, False])
def test_a_bar_for_a_person_and_log_lines_otherwise(run_train, monkeypatch, caplog, watched):
    shown = io.StringIO()
    shown.isatty = lambda: watched
    monkeypatch.setattr(sys, 'stderr', shown)
    for name in ('COLUMNS', 'LINES'):  # of a narrow terminal the bar is cut
        monkeypatch.setenv(name, '120')
    caplog.set_level('INFO')
    run = run_train('--synermix')
    assert bool(re.search(r'Train 0  33%\|#+\s*\| 1/3', shown.getvalue())) == watched
    assert ('Loss' in shown.getvalue() and 'Intra' in shown.getvalue() and 'img/s' in shown.getvalue()) == watched
    assert ('Train: 0 [   0/3 ( 33%)]  Loss: ' in caplog.text) == (not watched)
    (left,) = re.findall(r'Train: 0 done in .*images/s  Loss: (\S+)  Intra: \S+  Inter: \S+', caplog.text)
    assert float(left) == pytest.approx(run.summary()[0]['train_loss'], rel=5e-3)


# Flags reach the place where they act


def build_run(monkeypatch, tmp_path, image_folder, *flags):
    data = ['--data-dir', str(image_folder), '--num-classes', '4', '--output', str(tmp_path), '--experiment', 'built']
    monkeypatch.setattr(sys, 'argv', ['train.py', *SMALL, *data, *flags])
    return train.build(*train._parse_args())


def test_synermix_flags_reach_the_task_and_the_loader(run_train, monkeypatch):
    seen = {}

    def spy(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: seen.update(kwargs) or original(*args, **kwargs))

    spy(task, 'SynerMixTask')
    spy(train_loader, 'create_synermix_loader')
    given = dict(beta='0.3', num_mixed='2', singletons='bank', supplement='clean')
    flags = [part for name, value in given.items() for part in (f'--synermix-{name.replace("_", "-")}', value)]
    run_train('--synermix', *flags, '--crop-pct', '0.7', '--interpolation', 'bilinear', '--seed', '5')
    expected = dict(beta=0.3, num_mixed=2, bank=True, singletons='bank', supplement='clean', seed=5)
    expected.update(crop_pct=0.7, clean_interpolation='bilinear')
    assert {name: seen[name] for name in expected} == expected
    run_train('--synermix', '--synermix-batch', 'fixed', '--synermix-gather', experiment='other')
    assert seen['batch'] == 'fixed'
    assert seen['gather_rows'] == 0  # one process has nothing to gather


def test_the_average_follows_the_weights(run_train):
    state = run_train('--synermix', '--model-ema', '--model-ema-decay', '0').checkpoint()
    assert_same_weights(state['state_dict'], state['state_dict_ema'])
    state = run_train('--synermix', '--model-ema', '--model-ema-decay', '1').checkpoint()
    name = 'classifier.weight'
    assert not torch.equal(state['state_dict'][name], state['state_dict_ema'][name])


def test_the_schedule_steps_per_update(run_train):
    flags = ['--lr', '0.1', '--warmup-epochs', '0', '--epochs', '2', '--stop-epoch', '1']
    assert run_train(*flags).summary()[0]['lr'] == pytest.approx(0.1)
    assert run_train(*flags, '--sched-on-updates').summary()[0]['lr'] == pytest.approx(0.05)  # cosine, half way


@pytest.mark.parametrize('mode', ['norm', 'value'])
def test_gradients_are_clipped(run_train, mode):
    flags = ['--weight-decay', '0', '--sched', 'none']
    still = run_train(*flags, '--lr', '0').checkpoint()['state_dict']
    clipped = run_train(*flags, '--lr', '1', '--clip-grad', '1e-9', '--clip-mode', mode).checkpoint()['state_dict']
    torch.testing.assert_close(clipped['classifier.weight'], still['classifier.weight'], atol=1e-6, rtol=0)
    moved = run_train(*flags, '--lr', '1').checkpoint()['state_dict']
    assert (moved['classifier.weight'] - still['classifier.weight']).abs().max() > 1e-3


def test_resume_brings_the_optimizer_back(run_train, monkeypatch, tmp_path, image_folder):
    saved = run_train('--synermix')
    path = str(saved.folder / 'last.pth.tar')
    state = build_run(monkeypatch, tmp_path, image_folder, '--epochs', '2', '--resume', path)
    state = state.trained.optimizer.state_dict()
    for i, expected in saved.checkpoint()['optimizer']['state'].items():
        assert torch.equal(state['state'][i]['momentum_buffer'], expected['momentum_buffer'])
    fresh = build_run(monkeypatch, tmp_path, image_folder, '--epochs', '2', '--resume', path, '--no-resume-opt')
    assert not fresh.trained.optimizer.state_dict()['state']


@pytest.mark.parametrize(
    ('flags', 'expected'),
    [
        ([], 0.1 * 8 / 256),
        (['--grad-accum-steps', '4'], 0.1 * 32 / 256),
        (['--opt', 'adamw'], 0.1 * (8 / 256) ** 0.5),
        (['--opt', 'adamw', '--lr-base-scale', 'linear', '--lr-base', '0.2'], 0.2 * 8 / 256),
        (['--lr', '0.7'], 0.7),
    ],
)
def test_learning_rate_scales_with_the_batch(flags, expected):
    args = train.parser.parse_args(['-b', '8', *flags])
    args.world_size = 1
    assert build.resolve_lr(args) == pytest.approx(expected)
    args.world_size = 2
    scale = 2**0.5 if flags == ['--opt', 'adamw'] else 1 if '--lr' in flags else 2
    assert build.resolve_lr(args) == pytest.approx(scale * expected)


@pytest.mark.filterwarnings('ignore:PlateauLRScheduler is deprecated:FutureWarning')
def test_plateau_lowers_the_loss_when_there_is_no_validation(monkeypatch, tmp_path, image_folder):
    run = build_run(monkeypatch, tmp_path, image_folder, '--sched', 'plateau', '--val-split', '')
    assert run.trained.scheduler.lr_scheduler.mode == 'min'


def test_mixup_in_the_collate_function_ends_at_its_epoch(run_train, monkeypatch):
    mixed = []
    original = ClassificationTask.forward

    def forward(self, input, target):
        mixed.append(bool(((target > 0) & (target < 1)).any()))
        return original(self, input, target)

    monkeypatch.setattr(ClassificationTask, 'forward', forward)
    run_train('--mixup', '1', '--mixup-off-epoch', '1', '--smoothing', '0', '--epochs', '2', '-j', '1')
    assert mixed == [True] * 2 + [False] * 2


def test_channels_last_reaches_the_model(run_train, monkeypatch):
    layouts = []

    def create_model(*args, **kwargs):
        model = timm.create_model(*args, **kwargs)
        model.conv_stem.register_forward_pre_hook(
            lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
        return model

    monkeypatch.setattr(train, 'create_model', create_model)
    for flags in ([], ['--channels-last']):
        layouts.clear()
        run_train('--synermix', *flags)
        assert set(layouts) == {bool(flags)}  # of both views, and in evaluation


def test_repeated_augmentation_goes_on_without_synermix(run_train):
    flags = ['--synermix', '--aug-repeats', '3', '--synermix-off-epoch', '1', '--epochs', '2', '-b', '32']
    assert len(run_train(*flags).summary()) == 2


def test_a_resume_with_more_columns_keeps_them_all(run_train):
    run_train('--synermix', '--no-cohesion')
    rows = run_train('--synermix', '--resume', 'auto', '--epochs', '2').summary()
    assert rows[0].keys() == rows[1].keys()
    assert math.isnan(rows[0]['eval_cdnv'])
    assert rows[1]['eval_cdnv'] > 0
    assert [row['epoch'] for row in rows] == [0, 1]
    assert rows[0]['eval_loss'] > 0


def test_a_diverged_run_is_measured_and_saved(run_train):
    """Its one update breaks the weights."""
    run = run_train('--synermix', '--opt', 'sgd', '--lr', '1e20', '--warmup-epochs', '0', '-b', '20')
    assert math.isnan(run.summary()[0]['eval_nc1'])
    assert (run.folder / 'last.pth.tar').exists()


@pytest.mark.parametrize(
    ('flags', 'rows'),
    [
        (['--synermix', '--mixup', '1', '--mixup-off-epoch', '1', '--epochs', '2'], ['clean', 'augmented', 'mixed']),
        (['--mixup', '1'], ['mixed']),
        (['--mixup', '1', '--regmixup'], ['augmented', 'mixed']),
        (['--no-prefetcher'], ['augmented']),
    ],
)
def test_report_at_the_end(run_train, monkeypatch, flags, rows):
    examples = {}
    original = report.example_images
    monkeypatch.setattr(report, 'example_images', lambda *args: examples.update(original(*args)) or examples)
    run = run_train('--report', *flags)
    text = (run.folder / 'report' / 'report.html').read_text()
    assert list(examples) == rows
    for name in ('Comparison', 'Training curves', 'Feature maps', 'Examples', 'lone', 'the best by top1'):
        assert name in text
    assert len({images.numpy().tobytes() for images in examples.values()}) == len(rows)  # each row shows another thing
    assert all(images.min() >= 0 and images.max() <= 1 for images in examples.values())


def test_no_report_of_a_finished_run(run_train, caplog):
    run_train('--synermix')
    run_train('--synermix', '--resume', 'auto', '--report')
    assert 'No report without training: validate.py --compare ' in caplog.text


@pytest.mark.parametrize('flags', [['--synermix', '--reprob', '0.5'], []], ids=['synermix', 'plain'])
def test_a_stream_is_trained(run_train, image_folder, tmp_path, flags):
    pytest.importorskip('webdataset', reason='needs the package webdataset')
    with tarfile.open(tmp_path / 'train-0000.tar', 'w') as file:
        for i, path in enumerate(sorted((image_folder / 'train').rglob('*.png'))):
            (tmp_path / 'cls').write_text(str(i % 4))
            file.add(path, arcname=f'{i:04}.png')
            file.add(tmp_path / 'cls', arcname=f'{i:04}.cls')
    data = ('--dataset', 'wds/local', '--data-dir', str(tmp_path), '--train-split', 'train-0000.tar')
    data += ('--train-num-samples', '19', '--val-split', '', '--num-classes', '4')
    for workers in ('0', '1'):
        (row,) = run_train(*flags, '-b', '4', '-j', workers, data=data).summary()
        assert 0 < row['train_loss'] < 10
        assert ('train_intra_loss' in row) == bool(flags)
