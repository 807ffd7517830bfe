import copy
from collections import Counter

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm_models import always_zero, check_manifold_mixup, create
from torch import nn
from torch._dynamo.testing import CompileCounter

from timm_synermix import ManifoldMixup, SynerMixTask

# Taps in feature_info as they are, lists of tensors, parts of images first, lists that are never called, names that do
# not exist, and residual branches.
FAMILIES = {
    'test_resnet': ['input', 'layer1', 'layer2'],
    'test_vit': ['input', 'blocks.1', 'blocks.2'],
    'test_efficientnet': ['input', 'blocks.1', 'blocks.2'],
    'crossvit_tiny_240': ['input', 'blocks.0', 'blocks.1'],
    'tnt_s_legacy_patch16_224': ['input', 'blocks.2', 'blocks.5'],
    'coat_tiny': ['input', 'serial_blocks1.1'],
    'mvitv2_tiny': ['input', 'stages.0', 'stages.2'],
    'efficientvim_m1': ['input', 'stages.0'],
}
LARGE = {'crossvit_tiny_240', 'tnt_s_legacy_patch16_224', 'coat_tiny', 'mvitv2_tiny'}


@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in FAMILIES])
def test_default_layers_of_families_are_exact(name):
    assert check_manifold_mixup(*create(name)) == FAMILIES[name]


def test_swin_mixes_after_its_first_two_stages():
    model = timm.create_model('swin_tiny_patch4_window7_224', img_size=56, num_classes=7)
    assert ManifoldMixup(model, 7, (3, 56, 56)).layers == ['input', 'layers.0', 'layers.1']


def test_index_counts_feature_info_after_the_input():
    model, x = create('test_resnet')
    assert check_manifold_mixup(model, x, [0, '1', 4]) == ['input', 'act1', 'layer3']


class Net(nn.Module):
    """Two layers with a shortcut round the second, whose share of the sum is a parameter."""

    num_classes = 4

    def __init__(self, shortcut=0.0):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)
        self.shortcut = nn.Parameter(torch.tensor(shortcut))
        self.unused = nn.Linear(1, 1)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(6, 4)
        self.feature_info = [dict(module='first'), dict(module='gone'), dict(module='second')]

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        x = self.first(x)
        return self.fc(self.drop(self.second(x) + self.shortcut * x).relu().mean((2, 3)))


def test_a_layer_inside_a_branch_is_refused_however_small_the_rest_is():
    for shortcut in (1.0, 1e-6, 0.0):  # a branch that starts at zero learns
        with pytest.raises(ValueError, match=r"'second' cannot be mixed.* Some that can: input, first\."):
            ManifoldMixup(Net(shortcut), 4, (3, 8, 8), layers=['second'])


def test_mixing_equals_a_loop_over_the_images():
    model = Net(0.5).double().eval()
    x, target = torch.randn(5, 3, 8, 8, dtype=torch.double), torch.tensor([0, 3, 1, 1, 2])
    mixup_fn = ManifoldMixup(model, 4, (3, 8, 8), layers=['first'], label_smoothing=0.2)
    np.random.seed(3)
    np.random.random(), np.random.choice(1)
    lam = np.random.beta(1.0, 1.0)
    np.random.seed(3)
    same, soft = mixup_fn(x, target)
    assert torch.equal(same, x)
    with mixup_fn.mixing(len(x)):
        logits = model(x)
    for i in range(5):
        hidden = lam * model.first(x[i : i + 1]) + (1 - lam) * model.first(x[4 - i : 5 - i])
        expected = model.fc((model.second(hidden) + 0.5 * hidden).relu().mean((2, 3)))[0]
        torch.testing.assert_close(logits[i], expected, atol=1e-6, rtol=1e-6)  # lam is in float32
        label = torch.full((4,), 0.2 / 4)
        label[target[i]] += 0.8 * lam
        label[target[4 - i]] += 0.8 * (1 - lam)
        torch.testing.assert_close(soft[i], label)


def test_draws_are_uniform_over_layers_and_beta_distributed():
    model = Net()
    mixup_fn = ManifoldMixup(model, 4, (3, 8, 8), layers=['input', 'first'], alpha=0.3, prob=0.75)
    x, target = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    layers, lams = Counter(), []
    for _ in range(2000):
        mixed, soft = mixup_fn(x, target)
        if soft[0, 0] in (0, 1):
            continue
        layers[not torch.equal(mixed, x)] += 1
        lams.append(soft[0, 0].item())
        assert torch.equal(soft[0, 0], soft[1, 1])
    assert len(lams) == pytest.approx(1500, abs=80)
    assert layers[True] == pytest.approx(len(lams) / 2, abs=80)
    assert np.mean(lams) == pytest.approx(0.5, abs=0.03)
    assert np.var(lams) == pytest.approx(0.25 / (2 * 0.3 + 1), rel=0.1)  # of Beta(a, a)
    mixup_fn.mixup_enabled = False
    mixed, soft = mixup_fn(x, target)
    assert torch.equal(mixed, x)
    assert torch.equal(soft, torch.eye(4)[:2])


def test_draws_of_a_generator_are_its_own():
    """The same from the same seed, whatever the global generator is at, and that is left alone."""

    def draws(seed):
        mixup_fn = ManifoldMixup(Net(), 4, (3, 8, 8), layers=['input', 'first'], generator=np.random.default_rng(seed))
        images = torch.ones(2, 3, 8, 8) * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
        return [(mixed[0, 0, 0, 0].item(), soft[0, 0].item()) for mixed, soft in
                (mixup_fn(images, torch.tensor([0, 1])) for _ in range(20))]  # fmt: skip

    state = np.random.get_state()[1].tolist()
    first, other = draws(5), draws(6)
    assert np.random.get_state()[1].tolist() == state
    np.random.seed(9)
    assert first == draws(5) != other
    assert {mixed > 0 for mixed, _ in first} == {True, False}  # both layers are drawn
    assert len({lam for _, lam in first}) == 20


def test_the_model_is_left_as_it_was():
    model = Net().train()
    model.first.eval()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ManifoldMixup(model, 4, (3, 8, 8), layers=['first'])
    assert model.training
    assert model.second.training
    assert not model.first.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert list(model.state_dict()) == list(state)
    assert [len(module._forward_hooks) for module in model.children()] == [1, 0, 0, 0, 0]


def test_a_layer_that_is_passed_by_later_is_not_silent():
    model = Net()
    mixup_fn = ManifoldMixup(model, 4, (3, 8, 8), layers=['first'])
    mixup_fn(torch.randn(2, 3, 8, 8), torch.arange(2))
    with pytest.raises(RuntimeError, match='first took no part'), mixup_fn.mixing(2):
        pass


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(alpha=0.0), 'alpha must be above 0, got 0.0'),
        (dict(alpha=float('inf')), 'alpha must be above 0, got inf'),
        (dict(layers='first'), "list of at least one layer, got 'first'"),
        (dict(prob=1.5), r'prob must be in \[0, 1\], got 1.5'),
        (dict(layers=[]), 'at least one layer'),
        (dict(layers=[3]), 'indices from 0 to 2 for this model, got 3'),
        (dict(layers=['stage1']), "no layer 'stage1'; it has input, first, second, drop, fc, among"),
        (dict(layers=['unused']), "'unused' cannot be mixed"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ManifoldMixup(Net(), 4, (3, 8, 8), **kwargs)


def test_hidden_layers_and_gradient_checkpointing_exclude_each_other():
    """The recomputation in the backward pass would not mix."""
    model = timm.create_model('test_vit', num_classes=4, img_size=32)
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match="layers must be 'input' alone with gradient checkpointing"):
        ManifoldMixup(model, 4, (3, 32, 32))
    assert ManifoldMixup(model, 4, (3, 32, 32), layers=['input']).layers == ['input']


def test_a_model_without_a_layer_to_mix_mixes_the_input_and_says_so(caplog):
    class Flat(nn.Sequential):
        def get_classifier(self):
            return self[1]

        def forward(self, x):
            return self[1](x.flatten(1))

    assert ManifoldMixup(Flat(nn.Identity(), nn.Linear(12, 4)), 4, (3, 2, 2)).layers == ['input']
    assert 'mixes the input alone' in caplog.text


@pytest.mark.parametrize('layer', ['input', 'layer1'])
def test_synermix_with_manifold_mixup(layer):
    """The clean images of a SynerMix step are not mixed with those of other classes; the augmented ones are."""
    model = timm.create_model('test_resnet', num_classes=7).eval()
    x, target = torch.randn(8, 3, 32, 32), torch.tensor([0, 0, 1, 1])
    mixup_fn = ManifoldMixup(model, 7, (3, 32, 32), layers=[layer])
    task = SynerMixTask(model, mixup_fn=mixup_fn, beta=0.5, verbose=False)
    task.eval()
    with torch.no_grad(), always_zero():
        result = task(torch.cat([x[:1]] * 2 + [x[1:2]] * 2 + [x[4:]]), target)
        clean, augmented = model(x[:2]), model(x[4:].flip(0))
    intra = nn.functional.cross_entropy(clean, torch.tensor([0, 1]))
    inter = nn.functional.cross_entropy(augmented, target.flip(0))
    torch.testing.assert_close(result['intra_loss'], intra)
    torch.testing.assert_close(result['inter_loss'], inter)


def test_a_layer_named_twice_is_mixed_once():
    model, x = create('test_resnet')
    assert check_manifold_mixup(model, x, ['layer1', '2', 'layer1']) == ['layer1']


def test_the_next_layer_may_work_in_place():
    class Sequence(nn.Sequential):
        def get_classifier(self):
            return self[-1]

    layers = [nn.Conv2d(3, 6, 3), nn.SiLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    assert ManifoldMixup(Sequence(*layers), 4, (3, 8, 8), layers=['0']).layers == ['0']


@pytest.mark.parametrize('length', [1, 3, 4, 5, 12])
def test_a_side_output_that_is_not_of_images_is_refused(length):
    """Of the length of some batch it would be mixed, of any other not."""

    class Pair(nn.Conv2d):
        def forward(self, x):
            return super().forward(x), torch.arange(6.0 * length).view(length, 6)

    class Side(Net):
        def forward(self, x):
            x, bias = self.first(x)
            return self.fc(x.mean((2, 3)) + bias[0])

    model = Side()
    model.first = Pair(3, 6, 3)
    with pytest.raises(ValueError, match="'first' cannot be mixed"):
        ManifoldMixup(model, 4, (3, 8, 8), layers=['first'])


def test_a_torchvision_model_by_the_name_of_its_classifier():
    model = torchvision.models.resnet18(num_classes=4)
    mixup_fn = ManifoldMixup(model, 4, (3, 32, 32), classifier='fc', layers=['layer1'])
    assert model.layer1._forward_hooks
    mixup_fn.remove()
    assert not model.layer1._forward_hooks


@pytest.mark.parametrize('kwargs', [dict(beta=0.0), dict(beta=0.5), dict(bank=True)])
def test_compiled_without_graph_breaks(kwargs):
    """One graph for all layers and values of lam; one more for the step before the bank is filled."""
    model = timm.create_model('test_resnet', num_classes=4)
    mixup_fn = ManifoldMixup(model, 4, (3, 32, 32))
    task = SynerMixTask(model, mixup_fn=mixup_fn, verbose=False, **kwargs)
    reference = copy.deepcopy(task)
    torch.compiler.reset()  # forget what other tests' batches taught it
    counter = CompileCounter()
    task.compile(backend=counter, fullgraph=True)
    for i in range(20):
        x, target = torch.randn(8, 3, 32, 32), torch.tensor([0, 0, 1, 2])
        np.random.seed(i)
        compiled = task(x, target)['loss']
        np.random.seed(i)
        eager = reference(x, target)['loss']
        torch.testing.assert_close(compiled, eager)
        compiled.backward()
    assert counter.frame_count == (2 if 'bank' in kwargs else 1)
