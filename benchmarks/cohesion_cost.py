#!/usr/bin/env python3
"""What the cohesion metrics add to the time of an evaluation.

    python benchmarks/cohesion_cost.py --data-dir DIR --model resnet18 --num-classes 100 --img-size 32

Two figures: the time spent in the metrics themselves, as a share of the evaluation without them; and evaluations with
and without them that take turns, whose ratio a busy machine blurs. Medians over the rounds.
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
from timm_synermix.engine.evaluate import evaluate
from timm_synermix.metrics.collection import CohesionMeter


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
    plain, measured, inside = [], [], []
    for _ in range(args.rounds + 1):
        start = time.perf_counter()
        evaluate(accelerator, model, loader, ClassificationEvaluator(accelerator.device))
        plain.append(time.perf_counter() - start)

        meter, spent = CohesionMeter(args.num_classes, accelerator.device), 0.0

        def update(feature: torch.Tensor, target: torch.Tensor, meter: CohesionMeter = meter) -> None:
            nonlocal spent
            begin = now(accelerator.device)
            meter.update(feature, target)
            spent += now(accelerator.device) - begin

        start = time.perf_counter()
        evaluator = ClassificationEvaluator(accelerator.device)
        evaluate(accelerator, model, loader, evaluator, feature_hook=hook, on_features=update)
        begin = now(accelerator.device)
        meter.compute()
        inside.append(spent + now(accelerator.device) - begin)
        measured.append(time.perf_counter() - start)
    without, with_them, own = (statistics.median(values[1:]) for values in (plain, measured, inside))  # 1: warm
    print(f'{args}; torch {torch.__version__}, {torch.get_num_threads()} threads')
    print(f'{len(loader.dataset)} images, {without:.2f} s without cohesion metrics')
    print(f'in the metrics themselves: {own:.3f} s, {100 * own / without:.1f} %')
    print(f'evaluations that took turns: {with_them:.2f} s with them, {100 * (with_them / without - 1):+.1f} %')


def now(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == '__main__':
    main()
