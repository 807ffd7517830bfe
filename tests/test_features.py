import copy

import pytest
import timm
import torch
import torchvision
from timm_models import check_feature_hook, create
from torch import nn

from timm_synermix import FeatureHook, SynerMixTask
from timm_synermix.features import pool_feature

# A model of each kind of classifier: Linear, Conv2d, two heads, an MLP before it, tokens into it.
FAMILIES = [
    'test_resnet',
    'test_vit',
    'test_convnext',
    'test_efficientnet',
    'mobilenetv3_small_050',
    pytest.param('resnetv2_50', marks=pytest.mark.slow),
    'dla34',
    'deit_tiny_distilled_patch16_224',
    'levit_128s',
    pytest.param('levit_384_s8', marks=pytest.mark.slow),
    'repvit_m0_9',
    'crossvit_tiny_240',
    pytest.param('caformer_s18', marks=pytest.mark.slow),
    pytest.param('volo_d1_224', marks=pytest.mark.slow),
    'efficientvit_m0',
]


@pytest.mark.parametrize('name', FAMILIES)
def test_any_family(name):
    check_feature_hook(*create(name))


def test_the_feature_is_what_the_classifier_turns_into_logits():
    model, x = create('test_resnet')
    logits, feature = FeatureHook(model)(x)
    torch.testing.assert_close(model.get_classifier()(feature), logits)
    torch.testing.assert_close(feature, model.forward_head(model.forward_features(x), pre_logits=True))


def test_removing_leaves_the_model_untouched():
    model, x = create('test_vit')
    keys, expected = list(model.state_dict()), model(x)
    hook = FeatureHook(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    assert any(module._forward_pre_hooks for module in model.modules())
    hook.remove()
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_copy_of_a_hooked_model_is_independent():
    """As an EMA makes it: the copy's hook is its own."""
    model, x = create('test_vit')
    hook = FeatureHook(model)
    clone = copy.deepcopy(hook)
    with torch.no_grad():
        for p in clone.model.parameters():
            p.zero_()
        logits, _ = hook(x, lambda f: 2 * f)
        zero, feature = clone(x)
    assert logits.abs().sum() > 0
    assert zero.abs().sum() == 0
    assert feature.abs().sum() == 0


def test_nothing_is_kept_after_a_forward_that_fails():
    model, x = create('test_vit')
    hook = FeatureHook(model)
    expected = model(x)
    with pytest.raises(RuntimeError, match='in the transform'):
        hook(x, lambda f: (_ for _ in ()).throw(RuntimeError('in the transform')))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize('classifier', ['fc', ['fc'], 'classifier'])
def test_any_module_by_name(classifier):
    model = torchvision.models.resnet18(num_classes=5)
    if classifier == 'classifier':  # a container stands for its last layer
        model = torchvision.models.mobilenet_v3_small(num_classes=5)
    model.eval()
    x = torch.randn(2, 3, 64, 64)
    logits, feature = FeatureHook(model, classifier)(x)
    assert torch.equal(logits, model(x))
    assert feature.shape[0] == 2


def test_unknown_name_lists_those_there_are():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"got 'head'. There are: 1, 3\."):
        FeatureHook(model, 'head')
    with pytest.raises(ValueError, match="got '2'"):
        FeatureHook(model, '2')  # there, but not a layer with weights


@pytest.mark.parametrize(
    'kwargs', [dict(model_name='test_vit', num_classes=0), dict(model_name='mobilenetv5_300m_enc')]
)
def test_a_model_without_classifier_is_refused_by_name(kwargs):
    with torch.device('meta'):  # 300 million weights
        model = timm.create_model(**kwargs)
    with pytest.raises(ValueError, match=f'{kwargs["model_name"]} has no classifier'):
        FeatureHook(model)


def test_pool_feature():
    vector, tokens, planes = torch.randn(2, 5), torch.randn(2, 7, 3), torch.randn(2, 4, 2, 2)
    assert torch.equal(pool_feature(vector), vector)
    torch.testing.assert_close(pool_feature(tokens)[1], tokens[1].mean(0))
    joined = pool_feature((vector, tokens, planes))
    assert joined.shape == (2, 5 + 3 + 4)
    torch.testing.assert_close(joined[0, 8:], planes[0].flatten(1).mean(1))


class LoRA(nn.Module):
    """A Linear with a low-rank addition, as it is written by hand; `wrapped` as peft's says what it stands for."""

    def __init__(self, base, wrapped=False):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features)
        if wrapped:
            self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def reset(model):
    model.reset_classifier(7)


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def compiled(model):
    fast = torch.compile(model, backend='eager')
    fast(torch.zeros(2, 3, 32, 32))
    return fast


@pytest.mark.filterwarnings('ignore:torch.ao.quantization is deprecated')
@pytest.mark.filterwarnings('ignore:torch.quantize_per_tensor')
@pytest.mark.parametrize(
    'change', [reset, quantised, compiled, 'LoRA'], ids=lambda change: getattr(change, '__name__', change)
)
def test_a_classifier_that_is_not_seen_is_an_error(change):
    """The hook is older than reset_classifier and LoRA, and knows nothing of a form that was made before it."""
    model = timm.create_model('test_resnet', num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    if change in (quantised, compiled):
        other = change(model)
        hook = FeatureHook(model)
    else:
        hook, other = FeatureHook(model), None
        if change == 'LoRA':
            model.fc = LoRA(model.fc, wrapped=True)
        else:
            change(model)
    with pytest.raises(RuntimeError, match=r'make the FeatureHook .* after changes .* before torch\.compile'):
        hook(x, model=other)
    if change in (reset, 'LoRA'):  # made again it reads what it should
        assert torch.equal(FeatureHook(model)(x)[0], model(x))


def test_a_task_does_not_train_on_a_classifier_it_does_not_see():
    model = timm.create_model('test_resnet', num_classes=5)
    task = SynerMixTask(model, beta=1.0, verbose=False)
    model.reset_classifier(7)
    with pytest.raises(RuntimeError, match='was replaced, by reset_classifier'):
        task(torch.randn(8, 3, 32, 32), torch.tensor([3, 3, 0, 0]))


def test_a_layer_around_the_classifier_is_the_classifier():
    """The logits of reversed features are the logits, reversed; not so if a part of the layer did not see them."""
    model = timm.create_model('test_resnet', num_classes=5).eval()
    model.fc = LoRA(model.fc, wrapped=True)
    x = torch.randn(3, 3, 32, 32)
    logits, feature = FeatureHook(model)(x, lambda f: f.flip(0))
    assert feature.shape == (3, model.fc.in_features)
    assert torch.allclose(logits, model(x).flip(0), atol=1e-6)
    model.fc = LoRA(model.fc.base)
    for hook in (FeatureHook(model), FeatureHook(model)):
        with pytest.raises(RuntimeError, match=r'classifier fc of ResNet is more than its last layer fc\.b'):
            hook(x)
    assert FeatureHook(model, classifier='fc.base')(x)[1].shape == (3, model.num_features)


def test_a_model_of_torchvision_is_told_how_to_name_its_classifier():
    with pytest.raises(ValueError, match=r'ResNet does not say .* classifier=, one of \.\.\., .*fc\.'):
        FeatureHook(torchvision.models.resnet18())
