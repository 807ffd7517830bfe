"""A run's folder as a model of timm: loaded by timm alone, pushed by timm, exported by timm, and described."""

import json
import os
import re

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import _hub

from timm_synermix.engine import checkpoint, timm_folder

DOCS = ROOT / 'docs' / 'scripts.md'


@pytest.fixture(scope='module')
def kept():
    return {}


@pytest.fixture
def run(run_train, kept):
    """A run of two epochs with an own size, crop and mean; one for all tests of this file."""
    if not kept:
        flags = ['--epochs', '2', '--crop-pct', '0.9', '--mean', '0.4', '0.5', '0.6', '--interpolation', 'bilinear']
        kept['run'] = run_train('--synermix', *flags, '--model-kwargs', 'act_layer=relu', '--eval-metric', 'loss')
    return kept['run']


def test_the_folder_is_a_model_of_timm(run):
    model = timm.create_model(f'local-dir:{run.folder}', pretrained=True)
    best = run.checkpoint('model_best')
    assert model.state_dict().keys() == best['state_dict'].keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, best['state_dict'][name]), name
    config = resolve_model_data_config(model)
    assert (config['input_size'], config['crop_pct'], config['interpolation']) == ((3, 32, 32), 0.9, 'bilinear')
    assert tuple(config['mean']) == (0.4, 0.5, 0.6)
    assert 'Resize(size=35, interpolation=bilinear' in str(create_transform(**config))  # 32 / 0.9
    assert model.num_classes == 4
    assert model.pretrained_cfg['label_names'] == ['a', 'b', 'c', 'lone']
    assert sum(isinstance(module, torch.nn.ReLU) for module in model.modules()) > 1  # --model-kwargs
    again = timm.create_model(f'local-dir:{run.folder}', pretrained=True, num_classes=7)
    assert again.num_classes == 7


def as_the_docs_say(number, folder):
    """Run a piece of docs/scripts.md on a folder."""
    (section,) = re.findall(r'^## The model goes home.*?(?=^## )', DOCS.read_text(), re.MULTILINE | re.DOTALL)
    scope = {'timm': timm}
    exec(re.findall(r'```python\n(.*?)```', section, re.DOTALL)[number].replace('output/train/RUN', str(folder)), scope)
    return scope


def test_the_docs_load_it(run):
    scope = as_the_docs_say(0, run.folder)
    assert scope['label_names'] == ['a', 'b', 'c', 'lone']
    assert 'Resize(size=35' in str(scope['transform'])


def test_the_weights_are_one_file_under_two_names(run):
    best, timm_s = (run.folder / name for name in ('model_best.safetensors', 'model.safetensors'))
    assert os.path.samefile(best, timm_s)
    assert load_file(timm_s).keys() == run.checkpoint('model_best')['state_dict'].keys()


def test_a_file_system_without_links_gets_a_copy(run_train, monkeypatch):
    def link(*args, **kwargs):
        raise OSError('no links here')

    monkeypatch.setattr(os, 'link', link)
    folder = run_train('--synermix').folder
    assert (folder / 'model.safetensors').read_bytes() == (folder / 'model_best.safetensors').read_bytes()


def test_the_averaged_weights_are_those_of_the_folder(run_train):
    run = run_train('--model-ema', '--model-ema-decay', '0.5')
    model = timm.create_model(f'local-dir:{run.folder}', pretrained=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, run.checkpoint('model_best')['state_dict_ema'][name]), name


def test_a_run_that_begins_anew_puts_the_weights_aside(run_train):
    folder = run_train('--synermix').folder
    old = (folder / 'model.safetensors').read_bytes()
    run_train('--synermix', '--seed', '1')
    assert (folder / 'model.safetensors.old').read_bytes() == old != (folder / 'model.safetensors').read_bytes()


@pytest.mark.parametrize(
    ('class_to_idx', 'expected'),
    [
        ({'b': 1, 'a': 0}, {'label_names': ['a', 'b']}),
        ({'b': 2, 'a': 0}, {'label_names': {0: 'a', 2: 'b'}}),
        ({}, {}),
    ],
)
def test_names_of_classes(class_to_idx, expected):
    class Run:
        loaders = type('Loaders', (), {'class_to_idx': class_to_idx})
        args = type('Args', (), {'num_classes': 2})

    assert timm_folder.label_config(Run) == expected


# The model card


def test_the_card_is_filled_from_the_run(run, image_folder):
    text = (run.folder / 'README.md').read_text()
    best = min(run.summary(), key=lambda row: row['eval_loss'])
    assert text.startswith('---\ntags:\n- image-classification\n- timm\n- synermix\n')
    assert 'license: unknown' in text  # nobody has said another
    assert '# Model card for run' in text
    assert f'`test_efficientnet`, trained on {image_folder.name}, train.' in text
    assert f'Result of epoch {best["epoch"]:.0f}, the best by loss, on {image_folder.name}, validation' in text
    assert f'  - loss: {best["eval_loss"]:.4g}\n  - top1: {best["eval_top1"]:.4g}\n' in text
    assert 'beta 0.5' in text
    assert '2 epochs, 8 images per update, sgd' in text
    table = dict(re.findall(r'^\| (\w+) \| (\S+) \|$', text, re.MULTILINE))
    assert table['cosine_cohesion'] == f'{best["eval_cosine_cohesion"]:.4g}'
    assert {'silhouette', 'cdnv', 'nc1'} < table.keys()
    assert '![Features of validation images](feature_map.png)' in text
    assert (run.folder / 'feature_map.png').read_bytes().startswith(b'\x89PNG')
    assert 'import timm_synermix' not in text


def load_as_the_card_says(folder):
    (code,) = re.findall(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL)
    scope = {}
    exec(code.replace('FOLDER', str(folder)), scope)
    return code, scope


def test_the_lines_of_the_card_run(run):
    _, scope = load_as_the_card_says(run.folder)
    assert scope['label_names'] == ['a', 'b', 'c', 'lone']
    assert not scope['model'].training


def test_the_card_of_a_cifar_network_says_what_to_import(run_train):
    run = run_train('--model', 'resnet18_cifar', '--val-split', '')
    code, scope = load_as_the_card_says(run.folder)
    assert 'import timm_synermix.cifar_resnet  # makes resnet18_cifar known to timm' in code
    assert scope['model'].conv1.kernel_size == (3, 3)
    text = (run.folder / 'README.md').read_text()
    assert '- loss: ' in text  # of training
    assert 'Cohesion' not in text
    assert 'synermix\n' not in text.partition('# Model card')[0]


# Elsewhere


def test_timm_pushes_it(run, monkeypatch, tmp_path):
    """What would be sent to the Hub is a model of the same weights, size and names."""
    sent = {}

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type('Url', (), {'repo_id': repo_id})

        def file_exists(self, **kwargs):
            return True  # README.md was sent before

        def upload_folder(self, folder_path, **kwargs):
            sent.update({name: open(os.path.join(folder_path, name), 'rb').read() for name in os.listdir(folder_path)})  # noqa: SIM115

    monkeypatch.setattr(_hub, 'HfApi', Api)
    model = as_the_docs_say(1, run.folder)['model']
    assert sent.keys() == {'config.json', 'model.safetensors'}
    for name, content in sent.items():
        (tmp_path / name).write_bytes(content)
    pushed = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert pushed.pretrained_cfg['label_names'] == ['a', 'b', 'c', 'lone']
    assert resolve_model_data_config(pushed) == resolve_model_data_config(model)
    for name, value in pushed.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # 2026-11: of torch's exporter
def test_timm_exports_it_to_onnx(run, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    monkeypatch.chdir(tmp_path)
    model = as_the_docs_say(2, run.folder)['model']
    images = torch.rand(5, 3, 32, 32)
    (logits,) = onnxruntime.InferenceSession(tmp_path / 'model.onnx').run(None, {'input0': images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model.eval()(images).numpy(), atol=1e-4)


def test_a_model_that_json_cannot_tell_trains_all_the_same(run_train, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise ValueError("Model argument 'x' is not serializable")

    monkeypatch.setattr(timm_folder, 'save_config_for_hf', refuse)
    run = run_train('--synermix')
    assert "No config.json, by which timm's local-dir would know the model: Model argument 'x'" in caplog.text
    assert not (run.folder / 'config.json').exists()
    assert (run.folder / 'README.md').exists()


def test_config_is_json_for_people(run):
    config = json.loads((run.folder / 'config.json').read_text())
    assert config['architecture'] == 'test_efficientnet'
    assert config['num_classes'] == 4
    assert checkpoint._SAFETENSORS[1] == _hub.HF_SAFE_WEIGHTS_NAME
