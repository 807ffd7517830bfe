"""A small validation script of the shape that timm's has."""

import argparse
import json
import logging
from collections import OrderedDict

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model, load_checkpoint
from timm.utils import AverageMeter, accuracy, setup_default_logging

_logger = logging.getLogger('validate')

parser = argparse.ArgumentParser(description='Validation')
for name, kind, default in [
    ('data-dir', str, ''),
    ('model', str, 'test_resnet'),
    ('checkpoint', str, ''),
    ('num-classes', int, None),
    ('img-size', int, None),
    ('device', str, 'cpu'),
]:
    parser.add_argument('--' + name, type=kind, default=default)
parser.add_argument('-b', '--batch-size', type=int, default=8)


def validate(args):
    device = torch.device(args.device)
    model = create_model(args.model, num_classes=args.num_classes)
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint)
    data_config = resolve_data_config(vars(args), model=model)
    model = model.to(device)
    loader = create_loader(
        create_dataset(root=args.data_dir, name='', split='validation'),
        input_size=data_config['input_size'],
        batch_size=args.batch_size,
        num_workers=0,
        crop_pct=data_config['crop_pct'],
        device=device,
    )
    top1 = AverageMeter()
    model.eval()
    with torch.inference_mode():
        model(torch.randn((args.batch_size, *data_config['input_size']), device=device))  # to warm up
        for input, target in loader:
            output = model(input)
            top1.update(accuracy(output, target)[0].item(), len(output))
    _logger.info(f' * Acc@1 {top1.avg:.3f}')
    return OrderedDict(model=args.model, top1=round(top1.avg, 4))


def main():
    setup_default_logging()
    args = parser.parse_args()
    results = validate(args)
    print(f'--result\n{json.dumps(results, indent=4)}')


if __name__ == '__main__':
    main()
