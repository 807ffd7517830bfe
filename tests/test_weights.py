"""Files of weights: whatever lies under their name, one plain reason; and what timm would make of the good ones."""

import io

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import convert_splitbn_model

from timm_synermix.cli.train_args import create_parsers
from timm_synermix.cli.validate_args import create_parser
from timm_synermix.models.factory import build_model, load_model
from timm_synermix.utils.safe_load import check_finite, is_sound, read_weights

FLAGS = ('--initial-checkpoint', '--pretrained-path', '--checkpoint')


def load(flag, path, *flags, create_model=timm.create_model):
    """The model of train.py or of validate.py with a file of weights."""
    given = [*([flag, str(path)] if path else []), '--model', 'test_resnet', '--num-classes', '2', *flags]
    if flag == '--checkpoint':
        return load_model(create_model, create_parser().parse_args(given))
    args = create_parsers()[1].parse_args(given)
    args.distributed, args.device = False, 'cpu'
    return build_model(create_model, args)[0]


def save(path, legacy=False, **kwargs):
    content = timm.create_model('test_resnet', **{'num_classes': 2, **kwargs}).state_dict()
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return content


class Unknown:
    pass


def whole_model():
    file = io.BytesIO()
    torch.save({'model': Unknown()}, file)
    return file.getvalue()


def two_numbers():
    file = io.BytesIO()
    torch.save({'epoch': 3, 'lr': 0.1}, file)
    return file.getvalue()


NOT_WEIGHTS = {
    'LFS': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n', 'it is a pointer of Git LFS'),
    'page': (b'\n<!DOCTYPE html><html><head><title>Sign in', 'it is a web page'),
    'page of bytes': ('<html lang="fr">é'.encode(), 'it is a web page'),
    'csv': (b'epoch,train_loss\n0,1.5\n', 'it is text'),
    'UTF-8': ('größe: 3\n'.encode(), 'it is text'),
    'empty': (b'', 'it is empty'),
    'picture': (b'\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR' + bytes(100), 'it is not a file of weights'),
    'code': (whole_model(), 'could run code (test_weights.Unknown)'),
    'numbers': (two_numbers(), 'it holds no weights but dict of epoch, lr'),
    'cut short': (two_numbers()[:-40], ''),
}


@pytest.mark.parametrize('flag', FLAGS)
@pytest.mark.parametrize('kind', NOT_WEIGHTS)
def test_what_is_no_file_of_weights_is_named(tmp_path, flag, kind):
    content, reason = NOT_WEIGHTS[kind]
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f'^{flag}: .*weights.pth cannot be loaded') as error:
        load(flag, path)
    assert reason in str(error.value)
    assert ('run code' in str(error.value)) == (kind == 'code')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('flag', FLAGS)
def test_a_flipped_byte_is_found(tmp_path, flag):
    path = tmp_path / 'weights.pth'
    weights = save(path)
    content = bytearray(path.read_bytes())
    at = content.index(weights['conv1.0.weight'].numpy().tobytes())
    content[at + 1] ^= 1  # a small change of one weight
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)['conv1.0.weight'], weights['conv1.0.weight'])  # torch itself takes it
    with pytest.raises(ValueError, match=r'cannot be loaded.*: checksum of '):
        load(flag, path)


@pytest.mark.parametrize('flag', FLAGS)
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('kind', ['safetensors', 'legacy'])
def test_weights_that_are_not_finite_are_refused(tmp_path, flag, value, kind):
    """In formats without checksums."""
    path = tmp_path / f'weights.{kind}'
    weights = save(path, legacy=True)
    weights['bn1.running_var'][3] = value
    safetensors.torch.save_file(weights, path) if kind == 'safetensors' else torch.save(
        weights, path, _use_new_zipfile_serialization=False
    )
    with pytest.raises(ValueError, match=r'cannot be loaded.*: bn1\.running_var is not finite'):
        load(flag, path)


def test_a_mask_is_no_damage():
    mask = torch.full((3, 3), -torch.inf).triu(1)
    assert is_sound(mask)
    assert is_sound(mask.to(torch.float16))
    assert not is_sound(torch.tensor([1.0, -torch.inf]))
    check_finite({'mask': mask, 'steps': torch.tensor(3), 'eights': torch.ones(2).to(torch.float8_e4m3fn)})


@pytest.mark.parametrize('flag', ['--initial-checkpoint', '--checkpoint'])
def test_what_does_not_fit_is_said(tmp_path, flag):
    path = tmp_path / 'w.pth'
    save(path, num_classes=1000)
    with pytest.raises(
        ValueError, match=r'size mismatch, it is of 1000 classes and the model of 2: fc\.weight, fc\.bias'
    ):
        load(flag, path)
    save(path, in_chans=1)
    with pytest.raises(
        ValueError, match=r'size mismatch, conv1\.0\.weight is \[\d+, 1, 3, 3\] in it and \[\d+, 3, 3, 3\]'
    ):
        load(flag, path)
    weights = save(path)
    weights['else.weight'] = weights.pop('conv1.0.weight')
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r'it lacks conv1\.0\.weight; it has besides else\.weight$'):
        load(flag, path)


def test_a_pretrained_path_is_read_as_timm_reads_it(tmp_path):
    """Another classifier, and another number of channels."""
    for number, content in enumerate(({'num_classes': 1000}, {'num_classes': 3})):
        path = tmp_path / f'{number}.pth'
        save(path, **content)
        torch.manual_seed(0)
        model = load('--pretrained-path', path, '--in-chans', '1')
        torch.manual_seed(0)
        overlay = dict(file=str(path), num_classes=-1)
        other = timm.create_model(
            'test_resnet', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=2, in_chans=1
        )
        for name, value in other.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
        assert 'state_dict' not in model.pretrained_cfg


@pytest.mark.parametrize('flag', FLAGS)
def test_the_batch_norms_of_split_bn_are_left_out(tmp_path, flag):
    path = tmp_path / 'w.pth'
    model = timm.create_model('test_resnet', num_classes=2)
    torch.save({'state_dict': convert_splitbn_model(model, 3).state_dict()}, path)
    assert any('aux_bn' in name for name in torch.load(path)['state_dict'])
    loaded = load(flag, path)
    assert torch.equal(loaded.state_dict()['conv1.0.weight'], model.state_dict()['conv1.0.weight'])


@pytest.mark.parametrize('legacy', [False, True])
def test_a_moving_average_is_found_in_every_format(tmp_path, legacy):
    path = tmp_path / 'w.pth'
    weights = save(path)
    average = {name: value + 1 for name, value in weights.items()}
    torch.save({'state_dict': weights, 'state_dict_ema': average}, path, _use_new_zipfile_serialization=not legacy)
    for flags, expected in (([], weights), (['--use-ema'], average)):
        state = load('--checkpoint', path, *flags).state_dict()
        assert torch.equal(state['fc.weight'], expected['fc.weight'])
    assert torch.equal(read_weights(str(path))['fc.weight'], average['fc.weight'])  # as timm


class HubError(Exception):
    """As the hub's client has them: no OSError."""


@pytest.mark.parametrize(
    'error', [HubError('no route to host'), OSError('offline'), RuntimeError('No pretrained weights')]
)
@pytest.mark.parametrize(('flag', 'remedy'), [('--pretrained', '--pretrained-path'), ('--checkpoint', '--checkpoint')])
def test_pretrained_weights_that_cannot_be_had(error, flag, remedy):
    def offline(name, pretrained=False, **kwargs):
        if pretrained:
            raise error
        return timm.create_model(name, **kwargs)

    with pytest.raises(
        ValueError, match=rf'--pretrained: the weights of test_resnet cannot be had: .*; {remedy} takes a'
    ):
        load(flag, None, '--pretrained', create_model=offline)
