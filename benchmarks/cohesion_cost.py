#!/usr/bin/env python3
"""What the cohesion metrics add to the time of an evaluation.

    python benchmarks/cohesion_cost.py --data-dir DIR --model resnet18 --num-classes 100 --img-size 32

Evaluations with and without them take turns on the same images; the figure is the ratio of the medians.
"""

import argparse
import statistics
import time

import timm
import torch
from accelerate import Accelerator
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.task import ClassificationEvaluator

from timm_synermix import FeatureHook
from timm_synermix.evaluate import CohesionMeter, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--data-dir', required=True, help='folder with a validation split')
    parser.add_argument('--model', default='resnet18', help='timm model')
    parser.add_argument('--num-classes', type=int, default=100, help='number of classes')
    parser.add_argument('--img-size', type=int, default=32, help='image size in pixels')
    parser.add_argument('--batch-size', type=int, default=128, help='images per batch')
    parser.add_argument('--workers', type=int, default=1, help='data loading processes')
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--rounds', type=int, default=5, help='evaluations of each kind')
    args = parser.parse_args()

    accelerator = Accelerator(cpu=args.device == 'cpu')
    model = timm.create_model(args.model, num_classes=args.num_classes).to(accelerator.device)
    config = resolve_data_config({'img_size': args.img_size}, model=model)
    loader = create_loader(
        create_dataset('', root=args.data_dir, split='validation'),
        (3, args.img_size, args.img_size),
        args.batch_size,
        num_workers=args.workers,
        device=accelerator.device,
        **{name: config[name] for name in ('mean', 'std', 'interpolation', 'crop_pct')},
    )
    hook = FeatureHook(model)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for round in range(args.rounds + 1):
        for measured in (False, True):
            start = time.perf_counter()
            kwargs = {}
            if measured:
                meter = CohesionMeter(args.num_classes, accelerator.device)
                kwargs = dict(feature_hook=hook, on_features=meter.update)
            evaluator = ClassificationEvaluator(accelerator.device)
            evaluate(accelerator, model, loader, evaluator, **kwargs)
            if measured:
                meter.compute()
            if round:  # the first of each imports and warms up
                seconds[measured].append(time.perf_counter() - start)
    without, with_them = (statistics.median(seconds[measured]) for measured in (False, True))
    print(f'{args}; torch {torch.__version__}, {torch.get_num_threads()} threads')
    print(f'{len(loader.dataset)} images: {without:.2f} s without, {with_them:.2f} s with cohesion metrics, ', end='')
    print(f'{100 * (with_them / without - 1):+.1f} %')


if __name__ == '__main__':
    main()
