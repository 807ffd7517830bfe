#!/usr/bin/env python3
"""Evaluate a checkpoint: timm's accuracy, and how tight and how far apart its classes are in feature space.

python validate.py --data-dir DIR --model resnet50 --checkpoint output/train/RUN/model_best.pth.tar
"""

import argparse
import json
import os
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from timm import create_model
from timm.data import create_loader, resolve_input_data_config
from timm.models import load_checkpoint
from timm.task import ClassificationEvaluator
from timm.utils import ParseKwargs, setup_default_logging
from torch import Tensor

from timm_synermix.checkpoint import load_errors
from timm_synermix.cli import TrainParser, usage_errors
from timm_synermix.datasets import check_classes, create_dataset
from timm_synermix.evaluate import evaluate
from timm_synermix.features import FeatureHook
from timm_synermix.metrics import InterClassDistance, IntraClassDistance
from timm_synermix.models import build_classifier, check_weights_file

parser = TrainParser(
    description='Evaluate an image classifier.', formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
parser.add_argument('data', nargs='?', help='dataset folder, same as --data-dir (deprecated)')
parser.add_argument('--data-dir', help='folder or tar file of the dataset')
parser.add_argument('--dataset', default='', help='kind of dataset as TYPE/NAME; default: a folder of images')
parser.add_argument('--split', default='validation', help='name of the split')
parser.add_argument('--class-map', default='', help='file that maps class names to indices')
parser.add_argument('--model', '-m', default='resnet50', help='name of the timm model')
parser.add_argument('--pretrained', action='store_true', help='evaluate the pretrained weights of the model')
parser.add_argument('--checkpoint', default='', help='evaluate these weights, .pth.tar or .safetensors')
parser.add_argument('--use-ema', action='store_true', help='evaluate the moving average in the checkpoint')
parser.add_argument('--num-classes', type=int, help="number of classes; default: the model's")
parser.add_argument('--img-size', type=int, help="image size in pixels; default: the model's")
parser.add_argument('--in-chans', type=int, help='number of image channels; default: 3')
parser.add_argument('--input-size', nargs=3, type=int, help='all input dimensions, channels height width')
parser.add_argument('--mean', nargs='+', type=float, help='mean of the normalisation')
parser.add_argument('--std', nargs='+', type=float, help='standard deviation of the normalisation')
parser.add_argument('--interpolation', default='', help='interpolation of the resize')
parser.add_argument('--crop-pct', type=float, help='fraction of the resized image that the crop keeps')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, help='further arguments of the model')
parser.add_argument('-b', '--batch-size', type=int, default=256, help='images per batch')
parser.add_argument('-j', '--workers', type=int, default=4, help='data loading processes')
parser.add_argument('--device', default='cuda', help='device to evaluate on: cuda, cpu, mps, ...')
parser.add_argument('--amp', action='store_true', help='automatic mixed precision, in bfloat16')
parser.add_argument('--results-file', help='write the results to this file, as JSON')
parser.add_argument('--features-out', help='write features and targets to this file, as safetensors')


def main() -> None:
    setup_default_logging()
    args = parser.parse_args()
    with usage_errors(parser):
        if args.device.startswith('cuda') and not torch.cuda.is_available():
            raise ValueError(f'--device {args.device}: there is no CUDA device here; --device cpu runs on the CPU')
        check_weights_file('--checkpoint', args.checkpoint)
        for flag, path in (('--results-file', args.results_file), ('--features-out', args.features_out)):
            if path and not os.path.isdir(os.path.dirname(path) or '.'):
                raise ValueError(f"{flag} must be in a folder that exists, got '{path}'")
        accelerator = Accelerator(cpu=args.device == 'cpu', mixed_precision='bf16' if args.amp else None)
        if accelerator.num_processes > 1:
            raise ValueError(f'validate.py runs in one process, got {accelerator.num_processes}')
        model, loader = build(args, accelerator.device)

    metrics, features, targets = evaluate_features(accelerator, model, loader)
    print(f'--result\n{json.dumps(metrics, indent=4)}')
    if args.features_out:
        safetensors.torch.save_file({'features': features, 'targets': targets}, args.features_out)
    if args.results_file:
        with open(args.results_file, 'w') as file:
            json.dump(metrics, file, indent=4)


def build(args: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """The model with its weights, and the loader of its evaluation images."""
    model = build_classifier(create_model, args, pretrained=args.pretrained, num_classes=args.num_classes)
    if args.checkpoint:
        with load_errors(f'--checkpoint: {args.checkpoint} cannot be loaded into {args.model}'):
            load_checkpoint(model, args.checkpoint, use_ema=args.use_ema)
    config = resolve_input_data_config(model, args=vars(args), use_test_size=True)
    dataset = create_dataset(
        args.dataset,
        root=args.data_dir or args.data,
        split=args.split,
        class_map=args.class_map,
        input_img_mode='RGB' if config['input_size'][0] == 3 else 'L',
    )
    check_classes(None, dataset, model.num_classes)
    names = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    loader = create_loader(
        dataset,
        batch_size=args.batch_size,
        num_workers=args.workers,
        device=device,
        **{name: config[name] for name in names},
    )
    return model.to(device), loader


def evaluate_features(accelerator: Accelerator, model: Any, loader: Any) -> tuple[dict[str, float], Tensor, Tensor]:
    """Evaluate a model and keep its features, in one pass.

    Returns:
        metrics: timm's loss, top1 and top5, and the intra-class and inter-class distance.
        features: float32 `[N, D]`, in the order of the data set.
        targets: int64 `[N]`.
    """
    batches: list[tuple[Tensor, Tensor]] = []

    def keep(feature: Tensor, target: Tensor) -> None:
        batches.append((feature.float().cpu(), target.cpu()))

    evaluator = ClassificationEvaluator(accelerator.device)
    metrics = evaluate(accelerator, model, loader, evaluator, feature_hook=FeatureHook(model), on_features=keep)
    features, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    shape: dict[str, int] = dict(num_classes=model.num_classes, feature_dim=features.shape[1])
    for name, metric in dict(
        intra_class_distance=IntraClassDistance(**shape), inter_class_distance=InterClassDistance(**shape)
    ).items():
        metric.update(features, targets)
        metrics[name] = metric.compute().item()
    return metrics, features, targets


if __name__ == '__main__':
    main()
