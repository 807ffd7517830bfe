import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import validate


def run_validate(monkeypatch, capsys, image_folder, *flags):
    data = ['--data-dir', str(image_folder), '--num-classes', '4', '--img-size', '32', '--device', 'cpu', '-j', '0']
    monkeypatch.setattr(sys, 'argv', ['validate.py', *data, *map(str, flags)])
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    validate.main()
    return json.loads(capsys.readouterr().out.rpartition('--result\n')[2])


@pytest.mark.parametrize('model', ['test_efficientnet', 'test_vit'])
@pytest.mark.parametrize('checkpoint', ['last.pth.tar', 'model_best.safetensors'])
def test_accuracy_is_that_of_training(run_train, monkeypatch, capsys, image_folder, tmp_path, model, checkpoint):
    run = run_train('--synermix', '--model', model, '--crop-pct', '1.0')
    flags = ['--model', model, '--crop-pct', '1.0', '--checkpoint', run.folder / checkpoint]
    files = ['--results-file', tmp_path / 'results.json', '--features-out', tmp_path / 'features.safetensors']
    metrics = run_validate(monkeypatch, capsys, image_folder, *flags, *files)
    expected = run.results[0]['validation']
    assert {name: metrics[name] for name in ('top1', 'top5')} == {name: expected[name] for name in ('top1', 'top5')}
    assert metrics['loss'] == pytest.approx(expected['loss'], rel=1e-5)
    assert json.loads((tmp_path / 'results.json').read_text()) == metrics

    kept = load_file(tmp_path / 'features.safetensors')
    features, targets = kept['features'].double(), kept['targets']
    assert targets.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3]
    means = torch.stack([features[targets == c].mean(0) for c in range(4)])
    intra = (features - means[targets]).square().sum(1).mean().sqrt()
    assert metrics['intra_class_distance'] == pytest.approx(intra.item(), rel=1e-6)
    assert metrics['inter_class_distance'] == pytest.approx(torch.pdist(means).mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--model', 'resnet81'], "--model must be a timm model, got 'resnet81'"),
        (['--model', 'test_vit', '--num-classes', '3'], '--num-classes must cover all 4 classes of the validation set'),
        (['--model', 'test_vit', '--checkpoint', '/nowhere.pth'], '--checkpoint must be a file of weights'),
        (['--model', 'test_vit', '--checkpoint', __file__], '--checkpoint: '),
        (
            ['--model', 'test_vit', '--results-file', '/nowhere/x.json'],
            '--results-file must be in a folder that exists',
        ),
    ],
)
def test_bad_input(monkeypatch, capsys, image_folder, flags, message):
    with pytest.raises(SystemExit) as error:
        run_validate(monkeypatch, capsys, image_folder, *flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
