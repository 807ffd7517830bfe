"""A small training script of the shape that timm's has had since December 2025: a task that returns the loss."""

import argparse
import logging
import os
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial

import torch
import yaml
from timm import utils
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint

_logger = logging.getLogger('train')

config_parser = parser = argparse.ArgumentParser(description='Config', add_help=False)
parser.add_argument('-c', '--config', default='')

parser = argparse.ArgumentParser(description='Training')
for name, kind, default in [
    ('data-dir', str, ''),
    ('model', str, 'test_resnet'),
    ('resume', str, ''),
    ('num-classes', int, None),
    ('img-size', int, None),
    ('epochs', int, 2),
    ('start-epoch', int, None),
    ('lr', float, 0.05),
    ('drop', float, 0.0),
    ('mixup', float, 0.0),
    ('cutmix', float, 0.0),
    ('mixup-off-epoch', int, 0),
    ('smoothing', float, 0.1),
    ('reprob', float, 0.0),
    ('aug-repeats', int, 0),
    ('grad-accum-steps', int, 1),
    ('clip-grad', float, None),
    ('seed', int, 42),
    ('log-interval', int, 50),
    ('output', str, ''),
    ('experiment', str, ''),
    ('device', str, 'cpu'),
    ('torchcompile', str, ''),
]:
    parser.add_argument('--' + name, type=kind, default=default)
parser.add_argument('-b', '--batch-size', type=int, default=8)
parser.add_argument('-j', '--workers', type=int, default=0)
for name in ('model-ema', 'no-prefetcher', 'amp', 'log-wandb', 'no-eval'):
    parser.add_argument('--' + name, action='store_true')


def _parse_args():
    args_config, remaining = config_parser.parse_known_args()
    if args_config.config:
        with open(args_config.config) as f:
            parser.set_defaults(**yaml.safe_load(f))
    args = parser.parse_args(remaining)
    return args, yaml.safe_dump(args.__dict__)


def main():
    utils.setup_default_logging()
    args, args_text = _parse_args()
    args.prefetcher = not args.no_prefetcher
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    model = create_model(args.model, num_classes=args.num_classes, drop_rate=args.drop)
    if args.num_classes is None:
        args.num_classes = model.num_classes
    data_config = resolve_data_config(vars(args), model=model)
    model.to(device)
    amp_autocast = partial(torch.autocast, device_type=device.type, dtype=torch.bfloat16) if args.amp else nullcontext

    dataset_train = create_dataset('', root=args.data_dir, split='train', is_training=True)
    dataset_eval = create_dataset('', root=args.data_dir, split='validation')
    collate_fn = mixup_fn = None
    mixup_active = args.mixup > 0 or args.cutmix > 0
    if mixup_active:
        mixup_args = dict(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )
        if args.prefetcher:
            collate_fn = FastCollateMixup(**mixup_args)
        else:
            mixup_fn = Mixup(**mixup_args)
    common = dict(
        input_size=data_config['input_size'],
        batch_size=args.batch_size,
        use_prefetcher=args.prefetcher,
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        distributed=args.distributed,
        device=device,
    )
    loader_train = create_loader(
        dataset_train,
        is_training=True,
        interpolation='random',
        re_prob=args.reprob,
        num_aug_repeats=args.aug_repeats,
        collate_fn=collate_fn,
        batch_choice_seed=args.seed,
        **common,
    )
    loader_eval = create_loader(
        dataset_eval, interpolation=data_config['interpolation'], crop_pct=data_config['crop_pct'], **common
    )

    if mixup_active:
        train_loss_fn = SoftTargetCrossEntropy()
    elif args.smoothing:
        train_loss_fn = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    else:
        train_loss_fn = torch.nn.CrossEntropyLoss()
    train_loss_fn = train_loss_fn.to(device=device)
    validate_loss_fn = torch.nn.CrossEntropyLoss().to(device=device)
    task = ClassificationTask(model=model, criterion=train_loss_fn, device=device, verbose=utils.is_primary(args))
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=args.lr)
    start_epoch = resume_task_checkpoint(task, args.resume, optimizer=optimizer) if args.resume else 0
    if args.model_ema:
        task.setup_ema(decay=0.5)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
    if args.distributed:
        task.prepare_distributed()

    saver = output_dir = None
    if utils.is_primary(args):
        output_dir = utils.get_outdir(args.output, args.experiment)
        saver = utils.CheckpointSaver(
            model=model, optimizer=optimizer, args=args, checkpoint_dir=output_dir, recovery_dir=output_dir, task=task
        )
        with open(os.path.join(output_dir, 'args.yaml'), 'w') as f:
            f.write(args_text)
        if args.log_wandb:
            import wandb

            wandb.init(project='standin', config=args)

    best_metric = None
    for epoch in range(start_epoch if args.start_epoch is None else args.start_epoch, args.epochs):
        for part in (loader_train.dataset, loader_train.batch_sampler):
            if hasattr(part, 'set_epoch'):
                part.set_epoch(epoch)
        train_metrics = train_one_epoch(epoch, loader_train, optimizer, args, task, device, amp_autocast, mixup_fn)
        eval_metrics = None
        if not args.no_eval:
            eval_metrics = validate(task.get_eval_model(), loader_eval, validate_loss_fn, args, device, amp_autocast)
            if args.model_ema:
                ema = task.get_eval_model(ema=True)
                eval_metrics = validate(ema, loader_eval, validate_loss_fn, args, device, amp_autocast)
        if output_dir is not None:
            filename = os.path.join(output_dir, 'summary.csv')
            header = best_metric is None and not args.resume
            utils.update_summary(
                epoch, train_metrics, eval_metrics, filename, write_header=header, log_wandb=args.log_wandb
            )
            best_metric, _ = saver.save_checkpoint(epoch, metric=(eval_metrics or train_metrics)['loss'])


def train_one_epoch(epoch, loader, optimizer, args, task, device, amp_autocast, mixup_fn):
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        if args.prefetcher and loader.mixup_enabled:
            loader.mixup_enabled = False
        elif mixup_fn is not None:
            mixup_fn.mixup_enabled = False
    losses_m = utils.AverageMeter()
    task.get_trainable_module().train()
    optimizer.zero_grad()
    for batch_idx, (input, target) in enumerate(loader):
        need_update = batch_idx == len(loader) - 1 or (batch_idx + 1) % args.grad_accum_steps == 0
        if not args.prefetcher:
            input, target = input.to(device=device), target.to(device=device)
            if mixup_fn is not None:
                input, target = mixup_fn(input, target)
        with nullcontext() if need_update else task.no_sync():
            with amp_autocast():
                loss = task(input, target)['loss']
            (loss / args.grad_accum_steps).backward()
        losses_m.update(loss.item(), input.size(0))
        if need_update:
            if args.clip_grad is not None:
                utils.dispatch_clip_grad(task.get_clip_parameters(), value=args.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(step=epoch * len(loader) + batch_idx)
        if batch_idx % args.log_interval == 0 and utils.is_primary(args):
            _logger.info(f'Train: {epoch} [{batch_idx}/{len(loader)}]  Loss: {losses_m.val!r}')
    return OrderedDict(loss=losses_m.avg)


def validate(model, loader, loss_fn, args, device, amp_autocast):
    losses_m, top1_m = utils.AverageMeter(), utils.AverageMeter()
    model.eval()
    with torch.inference_mode():
        for input, target in loader:
            if not args.prefetcher:
                input, target = input.to(device=device), target.to(device=device)
            with amp_autocast():
                output = model(input)
                loss = loss_fn(output, target)
            losses_m.update(loss.item(), input.size(0))
            top1_m.update(utils.accuracy(output, target)[0].item(), output.size(0))
    return OrderedDict([('loss', losses_m.avg), ('top1', top1_m.avg)])


if __name__ == '__main__':
    main()
