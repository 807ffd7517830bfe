"""Training the classifier alone, the ResNets for small images, and images in memory."""

import os
import tarfile

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.models.resnet import ResNet

import train
from timm_synermix.data.classes import class_names, dataset_targets
from timm_synermix.data.dataset_factory import create_dataset
from timm_synermix.features import find_classifier_leaves
from timm_synermix.models import resnet_cifar as cifar_resnet
from timm_synermix.models.factory import build_model, freeze_backbone


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('flag', ['--pretrained-path', '--initial-checkpoint'])
def test_frozen_backbone(run_train, tmp_path, flag, suffix):
    """Of weights given as a file the classifier's alone change, with both losses; timm loads the checkpoint."""
    model = timm.create_model('test_efficientnet', num_classes=4)
    state = {name: value + 0.01 if 'running_mean' in name else value for name, value in model.state_dict().items()}
    path = tmp_path / f'weights.{suffix}'
    save_file(state, path) if suffix == 'safetensors' else torch.save(state, path)
    run = run_train(flag, str(path), '--freeze', '--synermix', '--mixup', '0.2', '--lr', '0.1', '--model-ema')
    best = timm.create_model(
        'test_efficientnet', num_classes=4, checkpoint_path=str(run.folder / 'model_best.safetensors')
    )
    for name, value in best.state_dict().items():
        if 'num_batches_tracked' not in name:
            assert torch.equal(value, state[name]) != name.startswith('classifier'), name
    assert run.summary()[0]['train_intra_loss'] > 0


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'efficientformer_l1', 'resnetv2_18'])
def test_what_is_trained(name):
    """The leaves of the classifier have gradients, and nothing else; nor does BatchNorm count the images."""
    model = timm.create_model(name, num_classes=3)
    freeze_backbone(model)
    model.train()
    leaves = find_classifier_leaves(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f'{leaf}.{kind}' for leaf in leaves for kind in ('weight', 'bias')}
    before = {n: b.clone() for n, b in model.named_buffers() if 'running' in n}
    size = model.pretrained_cfg['input_size'][-1]
    output = model(torch.randn(2, 3, size, size))
    sum(part.sum() for part in (output if isinstance(output, tuple) else (output,))).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in trained)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers() if n in before)


@pytest.mark.parametrize('depth', [18, 34, 50, 101])
def test_cifar_resnet(depth):
    """As large at every stage as its feature_info says; in all else timm's ResNet."""
    model = timm.create_model(f'resnet{depth}_cifar', num_classes=7).eval()
    plain = timm.create_model(f'resnet{depth}', num_classes=7)
    shapes, expected = ({n: v.shape for n, v in m.state_dict().items()} for m in (model, plain))
    assert shapes.pop('conv1.weight') == (64, 3, 3, 3)
    expected.pop('conv1.weight')
    assert shapes == expected
    with torch.no_grad():
        stages = model.forward_intermediates(torch.randn(1, 3, 32, 32), intermediates_only=True)
    assert [32 // stage.shape[-1] for stage in stages] == [1, 1, 2, 4, 8]
    assert [info['reduction'] for info in model.feature_info] == [1, 1, 2, 4, 8]
    assert isinstance(model, ResNet)


def test_cifar_resnet_by_hand():
    """A 3x3 convolution of stride 1, no max-pool, then the stages."""
    model = timm.create_model('resnet18_cifar', num_classes=7, in_chans=1, channels=(8, 16, 32, 64)).eval()
    assert model.conv1.weight.shape == (64, 1, 3, 3)
    image = torch.randn(2, 1, 32, 32)
    x = model.act1(model.bn1(torch.nn.functional.conv2d(image, model.conv1.weight, padding=1)))
    for name in ('layer1', 'layer2', 'layer3', 'layer4', 'global_pool', 'fc'):
        x = getattr(model, name)(x)
    torch.testing.assert_close(model(image), x)
    assert 'resnet18_cifar' in cifar_resnet.__all__


def test_cifar_resnet_is_trained_and_loads_in_timm(run_train):
    run = run_train('--model', 'resnet18_cifar', '--model-kwargs', 'channels=[8,16,32,64]', '--synermix')
    loaded = timm.create_model(
        'resnet18_cifar',
        num_classes=4,
        channels=(8, 16, 32, 64),
        checkpoint_path=str(run.folder / 'model_best.pth.tar'),
    )
    saved = run.checkpoint('model_best')['state_dict']
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    assert loaded.conv1.weight.shape == (64, 3, 3, 3)


def test_images_in_memory(image_folder, run_train, monkeypatch):
    """Every file is read once, and the run is that of files."""
    flags = ['--synermix', '--epochs', '2']
    on_disk = run_train(*flags, experiment='disk')
    opened, read = [], ReaderImageFolder.__getitem__
    monkeypatch.setattr(ReaderImageFolder, '__getitem__', lambda self, i: (opened.append(i), read(self, i))[1])
    in_memory = run_train(*flags, '--in-memory', experiment='memory')
    assert sorted(opened) == sorted([*range(19), *range(10)])
    assert in_memory.summary() == on_disk.summary()


@pytest.fixture(params=['folder', 'tar', 'digits', 'grey'])
def kind_of_data(request, image_folder, tmp_path):
    if request.param == 'digits':
        return dict(name='sklearn/digits')
    root = image_folder
    if request.param == 'tar':
        root = tmp_path / 'images.tar'
        with tarfile.open(root, 'w') as file:
            file.add(image_folder / 'train', '.')
    return dict(name='', root=str(root), input_img_mode='L' if request.param == 'grey' else 'RGB')


def test_a_memory_reader_has_the_images_of_its_reader(kind_of_data):
    """Through timm's own data set, and again and again."""
    files, memory = (create_dataset(split='train', in_memory=held, **kind_of_data) for held in (False, True))
    assert len(files) == len(memory)
    assert files.filename(3, absolute=True) == memory.filename(3, absolute=True)
    assert class_names(memory) == class_names(files)
    assert len(class_names(memory)) in (4, 10)
    assert dataset_targets(memory).tolist() == [files[i][1] for i in range(len(files))]
    for index in (0, len(files) - 1, 0):
        (image, target), (expected, expected_target) = memory[index], files[index]
        assert target == expected_target
        assert (image.mode, image.tobytes()) == (expected.mode, expected.tobytes())
        image.paste(0, (0, 0, *image.size))


@pytest.mark.parametrize('bad', ['damaged', 'missing'])
def test_an_unreadable_image_in_memory(run_train, tmp_path, image_folder, caplog, bad):
    """Is named where it is used, as without --in-memory."""
    os.symlink(image_folder / 'validation', tmp_path / 'validation')
    for folder in (image_folder / 'train').iterdir():
        (tmp_path / 'train' / folder.name).mkdir(parents=True)
        for image in folder.iterdir():
            os.symlink(image, tmp_path / 'train' / folder.name / image.name)
    path = tmp_path / 'train' / 'a' / 'bad.png'
    path.write_bytes(b'no image') if bad == 'damaged' else os.symlink('/nowhere', path)
    run_train('--in-memory', '-b', '4', data=('--data-dir', str(tmp_path), '--num-classes', '4'))  # shows all 20 images
    assert 'bad.png cannot be read' in caplog.text


def test_a_frozen_network_should_have_weights(run_train, caplog):
    run_train('--freeze')
    assert '--freeze without weights' in caplog.text


def test_every_head_of_a_model_is_scaled():
    """DeiT's distilled form has two; the rest of the model stays."""
    args = ['--device', 'cpu', '--num-classes', '5', '--img-size', '32']
    models = []
    for flags in ([], ['--head-init-scale', '0.5', '--head-init-bias', '-2']):
        torch.manual_seed(0)
        parsed = train.parser.parse_args(['--model', 'deit_tiny_distilled_patch16_224', *args, *flags])
        parsed.distributed = False
        models.append(build_model(timm.create_model, parsed)[0])
        assert models[-1].training
    plain, scaled = (model.state_dict() for model in models)
    for name, value in plain.items():
        if name.startswith('head'):
            expected = value / 2 if name.endswith('weight') else torch.full_like(value, -2)
            assert torch.equal(scaled[name], expected)
        else:
            assert torch.equal(scaled[name], value)
    assert {name for name in plain if name.startswith('head')} == {
        f'{head}.{part}' for head in ('head', 'head_dist') for part in ('weight', 'bias')
    }
