"""The flags of timm's train.py: names, types and defaults are timm's."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import Any


class ParseKwargs(argparse.Action):
    """`--flag name=value ...` as a dict; a value is a Python literal, or else text.

    The rules are those of `timm.utils.ParseKwargs`, for which all of timm and torch would have to be imported.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        kwargs: dict[str, Any] = {}
        for item in filter(None, values or ()):
            name, equals, value = item.partition('=')
            if not equals:
                parser.error(f'argument {option_string}: must be name=value, got {item!r}')
            try:
                kwargs[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                kwargs[name] = value
        setattr(namespace, self.dest, kwargs)


def add_timm_args(parser: argparse.ArgumentParser) -> None:
    """Add every flag of timm 1.0.31's train.py, but for --config."""
    for add_args in (
        _add_dataset_args,
        _add_model_args,
        _add_device_args,
        _add_optimizer_args,
        _add_schedule_args,
        _add_augmentation_args,
        _add_batch_norm_args,
        _add_ema_args,
        _add_run_args,
        _add_scheduled_size_args,
        _add_naflex_args,
        _add_distillation_args,
    ):
        add_args(parser)


def _add_dataset_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Dataset')
    parser.add_argument('data', nargs='?', help='dataset folder, same as --data-dir (deprecated)')
    group.add_argument('--data-dir', help='folder or tar file of the dataset')
    group.add_argument(
        '--dataset',
        default='',
        help='kind of dataset as TYPE/NAME, e.g. torch/cifar100, hfds/NAME, sklearn/digits; default: an image folder',
    )
    group.add_argument('--train-split', default='train', help='name of the training split')
    group.add_argument(
        '--val-split', default='validation', help='name of the validation split; empty trains without validation'
    )
    group.add_argument(
        '--train-num-samples', type=int, help='number of training samples, for streaming datasets that do not know it'
    )
    group.add_argument(
        '--val-num-samples', type=int, help='number of validation samples, for streaming datasets that do not know it'
    )
    group.add_argument(
        '--dataset-download', action='store_true', help='let datasets that can download themselves do so'
    )
    group.add_argument('--class-map', type=str, default='', help='file that maps class names to indices')
    group.add_argument(
        '--input-img-mode',
        type=str,
        help='PIL mode images are converted to; default by the number of input channels, RGB or L',
    )
    group.add_argument('--input-key', type=str, help='name of the image field of a dataset')
    group.add_argument('--target-key', type=str, help='name of the target field of a dataset')
    group.add_argument(
        '--dataset-trust-remote-code', action='store_true', help='let Hugging Face datasets run code from the hub'
    )


def _add_model_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Model')
    group.add_argument('--model', type=str, default='resnet50', help='name of the timm model')
    group.add_argument('--pretrained', action='store_true', help='start from the pretrained weights of the model')
    group.add_argument('--pretrained-path', type=str, help='load the pretrained weights from this file')
    group.add_argument('--initial-checkpoint', type=str, default='', help='load these weights into the finished model')
    group.add_argument(
        '--resume',
        type=str,
        default='',
        help='continue from this training checkpoint; "auto": from the last one of --experiment, if there is one',
    )
    group.add_argument('--no-resume-opt', action='store_true', help='resume without the optimizer state')
    group.add_argument('--num-classes', type=int, help="number of classes; default: the model's")
    group.add_argument('--gp', type=str, help="global pooling: fast, avg, max, avgmax, catavgmax; default: the model's")
    group.add_argument('--img-size', type=int, help="image size in pixels; default: the model's")
    group.add_argument('--in-chans', type=int, help='number of image channels; default: 3')
    group.add_argument(
        '--input-size', nargs=3, type=int, help='all input dimensions, channels height width, e.g. 3 224 224'
    )
    group.add_argument('--crop-pct', type=float, help='fraction of the resized image that the evaluation crop keeps')
    group.add_argument('--mean', nargs='+', type=float, help='mean of the normalisation, one value or one per channel')
    group.add_argument(
        '--std', nargs='+', type=float, help='standard deviation of the normalisation, one value or one per channel'
    )
    group.add_argument('--interpolation', type=str, default='', help='interpolation of the evaluation resize')
    group.add_argument('-b', '--batch-size', type=int, default=128, help='images per batch and process')
    group.add_argument(
        '-vb',
        '--validation-batch-size',
        type=int,
        help='images per evaluation batch and process; default: --batch-size',
    )
    group.add_argument('--channels-last', action='store_true', help='use the channels-last memory layout')
    group.add_argument('--fuser', type=str, default='', help='TorchScript fuser: te, old or nvfuser')
    group.add_argument('--grad-accum-steps', type=int, default=1, help='batches per optimizer update')
    group.add_argument(
        '--grad-checkpointing', action='store_true', help='recompute activations in the backward pass to save memory'
    )
    group.add_argument('--fast-norm', action='store_true', help='use reduced-precision normalisation layers under AMP')
    group.add_argument(
        '--model-kwargs',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='NAME=VALUE',
        help='further arguments of the model, as name=value',
    )
    group.add_argument('--head-init-scale', type=float, help='factor on the initial weights of the classifier')
    group.add_argument('--head-init-bias', type=float, help='initial bias of the classifier')
    group.add_argument('--torchcompile-mode', type=str, help='mode of torch.compile')
    group.add_argument('--torchscript', action='store_true', help='compile the model with torch.jit.script')
    group.add_argument(
        '--torchcompile',
        nargs='?',
        type=str,
        const='inductor',
        help='compile the model with torch.compile, with this backend (inductor if none is named)',
    )
    group.add_argument(
        '--task',
        default='classification',
        choices=['classification', 'multilabel'],
        help='one class per image, or any number of labels',
    )


def _add_device_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Device and distribution')
    group.add_argument('--device', type=str, default='cuda', help='device to train on: cuda, cpu, mps, ...')
    group.add_argument('--amp', action='store_true', help='automatic mixed precision')
    group.add_argument('--amp-dtype', type=str, default='float16', help='precision of --amp: float16 or bfloat16')
    group.add_argument('--model-dtype', type=str, help='precision of the model itself: float16 or bfloat16')
    group.add_argument('--no-ddp-bb', action='store_true', help='do not broadcast buffers in DDP')
    group.add_argument('--synchronize-step', action='store_true', help='wait for the device at the end of each step')
    group.add_argument('--local_rank', type=int, default=0, help='ignored, set by launchers')
    group.add_argument('--device-modules', nargs='+', type=str, help='Python modules to import for device backends')


def _add_optimizer_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Optimizer')
    group.add_argument('--opt', type=str, default='sgd', help='name of the optimizer')
    group.add_argument('--opt-eps', type=float, help="epsilon; default: the optimizer's")
    group.add_argument('--opt-betas', nargs='+', type=float, help="betas; default: the optimizer's")
    group.add_argument('--momentum', type=float, default=0.9, help='momentum')
    group.add_argument('--weight-decay', type=float, default=2e-05, help='weight decay')
    group.add_argument('--clip-grad', type=float, help='clip the gradient at this value, see --clip-mode')
    group.add_argument('--clip-mode', type=str, default='norm', help='what --clip-grad limits: norm, value or agc')
    group.add_argument(
        '--layer-decay', type=float, help='factor on the learning rate from each layer to the one before'
    )
    group.add_argument('--layer-decay-min-scale', type=float, default=0, help='smallest factor --layer-decay may reach')
    group.add_argument('--layer-decay-no-opt-scale', type=float, help='freeze layers whose factor is below this')
    group.add_argument(
        '--opt-kwargs',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='NAME=VALUE',
        help='further arguments of the optimizer, as name=value',
    )


def _add_schedule_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Learning rate schedule')
    group.add_argument(
        '--sched',
        type=str,
        default='cosine',
        help='schedule: cosine, tanh, step, multistep, plateau, poly, wsd, rsqrt, constant, none',
    )
    group.add_argument('--sched-on-updates', action='store_true', help='step the schedule per update, not per epoch')
    group.add_argument('--lr', type=float, help='learning rate; overrides --lr-base')
    group.add_argument('--lr-base', type=float, default=0.1, help='learning rate at a global batch of --lr-base-size')
    group.add_argument('--lr-base-size', type=int, default=256, help='global batch size that --lr-base is for')
    group.add_argument(
        '--lr-base-scale',
        type=str,
        default='',
        help='how --lr-base grows with the batch: linear or sqrt; default by the optimizer',
    )
    group.add_argument(
        '--lr-noise', nargs='+', type=float, help='fraction(s) of training between which the learning rate is noisy'
    )
    group.add_argument('--lr-noise-pct', type=float, default=0.67, help='limit of the noise')
    group.add_argument('--lr-noise-std', type=float, default=1.0, help='standard deviation of the noise')
    group.add_argument('--lr-cycle-mul', type=float, default=1.0, help='factor on the length from cycle to cycle')
    group.add_argument(
        '--lr-cycle-decay', type=float, default=0.5, help='factor on the learning rate from cycle to cycle'
    )
    group.add_argument('--lr-cycle-limit', type=int, default=1, help='number of cycles')
    group.add_argument('--lr-k-decay', type=float, default=1.0, help='k-decay of cosine and poly')
    group.add_argument('--warmup-lr', type=float, default=1e-05, help='learning rate at the start of the warm-up')
    group.add_argument('--min-lr', type=float, default=0, help='lowest learning rate')
    group.add_argument('--epochs', type=int, default=300, help='number of epochs')
    group.add_argument('--epoch-repeats', type=float, default=0.0, help='passes over a streaming dataset per epoch')
    group.add_argument('--start-epoch', type=int, help='first epoch; overrides that of a checkpoint')
    group.add_argument(
        '--decay-milestones', nargs='+', type=int, default=[90, 180, 270], help='epochs at which multistep decays'
    )
    group.add_argument(
        '--decay-epochs', type=float, default=90, help='epochs between decays of step, or length of the decay of wsd'
    )
    group.add_argument('--warmup-epochs', type=int, default=5, help='epochs of warm-up')
    group.add_argument('--cooldown-epochs', type=int, default=0, help='epochs at --min-lr after the schedule')
    group.add_argument('--patience-epochs', type=int, default=10, help='epochs plateau waits for an improvement')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, help='factor of a decay')
    group.add_argument('--warmup-prefix', action='store_true', help='do not count the warm-up in --epochs')
    group.add_argument('--lr-decay-fn', help='decay of wsd and rsqrt: linear, cosine, 1-sqrt, ...')
    group.add_argument('--lr-stable-timescale', type=float, help='time scale of rsqrt in epochs; default: the warm-up')


def _add_augmentation_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Augmentation and regularisation')
    group.add_argument(
        '--no-aug',
        action='store_true',
        help='train without augmentation; overrides the other flags of this group that augment',
    )
    group.add_argument(
        '--scale', nargs='+', type=float, default=[0.08, 1.0], help='range of the area of the random crop'
    )
    group.add_argument(
        '--ratio', nargs='+', type=float, default=[3 / 4, 4 / 3], help='range of the aspect ratio of the random crop'
    )
    group.add_argument('--hflip', type=float, default=0.5, help='probability of a horizontal flip')
    group.add_argument('--vflip', type=float, default=0.0, help='probability of a vertical flip')
    group.add_argument('--color-jitter', type=float, default=0.4, help='strength of colour jitter')
    group.add_argument('--color-jitter-prob', type=float, help='probability of colour jitter; default: always')
    group.add_argument('--grayscale-prob', type=float, help='probability of a greyscale image')
    group.add_argument('--gaussian-blur-prob', type=float, help='probability of Gaussian blur')
    group.add_argument(
        '--aug-repeats',
        type=float,
        default=0,
        help='augmented copies of an image per epoch; needs several processes, or --synermix',
    )
    group.add_argument('--aug-splits', type=int, default=0, help='augmentation splits of a batch, 0 or 2 and more')
    group.add_argument('--jsd-loss', action='store_true', help='Jensen-Shannon loss over --aug-splits')
    group.add_argument('--bce-loss', action='store_true', help='binary cross-entropy, same as --loss bce')
    group.add_argument('--bce-sum', action='store_true', help='sum the binary cross-entropy over classes')
    group.add_argument('--bce-target-thresh', type=float, help='binarise soft targets at this value')
    group.add_argument('--bce-pos-weight', type=float, help='weight of the positive targets')
    group.add_argument('--reprob', type=float, default=0.0, help='probability of random erasing')
    group.add_argument('--remode', type=str, default='pixel', help='what random erasing fills in: const, rand or pixel')
    group.add_argument('--recount', type=int, default=1, help='areas erased')
    group.add_argument('--resplit', action='store_true', help='no random erasing in the first augmentation split')
    group.add_argument('--mixup', type=float, default=0.0, help='alpha of MixUp, 0 for none')
    group.add_argument('--cutmix', type=float, default=0.0, help='alpha of CutMix, 0 for none')
    group.add_argument(
        '--cutmix-minmax', nargs='+', type=float, help='range of the size of the CutMix box; overrides --cutmix'
    )
    group.add_argument('--mixup-prob', type=float, default=1.0, help='probability of MixUp or CutMix')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, help='probability of CutMix where both are on')
    group.add_argument(
        '--mixup-mode', type=str, default='batch', help='draw MixUp parameters per batch, pair, elem or half'
    )
    group.add_argument(
        '--mixup-off-epoch', type=int, default=0, help='train without MixUp and CutMix from this epoch on, 0 for never'
    )
    group.add_argument('--smoothing', type=float, default=0.1, help='label smoothing')
    group.add_argument(
        '--train-interpolation',
        type=str,
        default='random',
        help='interpolation of the training crop: random, bilinear or bicubic',
    )
    group.add_argument('--drop', type=float, default=0.0, help='dropout of the classifier')
    group.add_argument('--drop-connect', type=float, help='deprecated, use --drop-path')
    group.add_argument('--drop-path', type=float, help='stochastic depth')
    group.add_argument('--drop-block', type=float, help='DropBlock')
    group.add_argument('--train-crop-mode', type=str, help='random crop of training: rrc, rkrc or rkrr')
    group.add_argument('--aa', type=str, help='AutoAugment policy, e.g. rand-m9-mstd0.5-inc1')
    group.add_argument('--loss', help='training loss: ce, bce, asl, poly or jsd; default: ce')


def _add_batch_norm_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Batch norm')
    group.add_argument('--bn-momentum', type=float, help='momentum of BatchNorm')
    group.add_argument('--bn-eps', type=float, help='epsilon of BatchNorm')
    group.add_argument('--sync-bn', action='store_true', help='synchronise BatchNorm across processes')
    group.add_argument(
        '--dist-bn',
        type=str,
        default='reduce',
        help='even out BatchNorm statistics across processes after each epoch: broadcast, reduce or empty',
    )
    group.add_argument('--split-bn', action='store_true', help='separate BatchNorm per augmentation split')


def _add_ema_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Model EMA')
    group.add_argument('--model-ema', action='store_true', help='keep a moving average of the weights')
    group.add_argument(
        '--model-ema-force-cpu', action='store_true', help='keep the average on the CPU, without evaluating it'
    )
    group.add_argument('--model-ema-decay', type=float, default=0.9998, help='decay of the average')
    group.add_argument('--model-ema-warmup', action='store_true', help='warm the decay up')


def _add_run_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Run')
    group.add_argument('--seed', type=int, default=42, help='random seed')
    group.add_argument(
        '--worker-seeding', type=str, default='all', help='which generators of a worker are seeded: all or part'
    )
    group.add_argument('--log-interval', type=int, default=50, help='updates between log lines')
    group.add_argument('--val-interval', type=int, default=1, help='epochs between evaluations')
    group.add_argument(
        '--recovery-interval', type=int, default=0, help='updates between recovery checkpoints, 0 for none'
    )
    group.add_argument('--checkpoint-hist', type=int, default=10, help='checkpoints to keep')
    group.add_argument('-j', '--workers', type=int, default=4, help='data loading processes')
    group.add_argument('--save-images', action='store_true', help='save a batch of training images at every log line')
    group.add_argument('--pin-mem', action='store_true', help='use pinned memory for transfers to the device')
    group.add_argument(
        '--no-prefetcher', action='store_true', help='normalise images in the workers instead of on the device'
    )
    group.add_argument('--output', type=str, default='', help='folder of all runs')
    group.add_argument('--experiment', type=str, default='', help="name of this run's folder in --output")
    group.add_argument(
        '--eval-metric', type=str, default='top1', help='metric that ranks checkpoints: top1, top5 or loss'
    )
    group.add_argument(
        '--tta', type=int, default=0, help='average the logits of this many augmented copies in evaluation'
    )
    group.add_argument(
        '--use-multi-epochs-loader', action='store_true', help='keep the data loader running across epochs'
    )
    group.add_argument('--log-wandb', action='store_true', help='log to Weights & Biases')
    group.add_argument('--wandb-project', type=str, help='project to log to')
    group.add_argument('--wandb-tags', nargs='+', type=str, default=[], help='tags of the run')
    group.add_argument('--wandb-resume-id', type=str, default='', help='id of the run to go on logging to')
    group.add_argument('--stop-epoch', type=int, help='stop after this many epochs, with the schedule of --epochs')
    group.add_argument(
        '--save-epochs', nargs='+', type=int, help='keep a milestone checkpoint after these numbers of epochs'
    )


def _add_scheduled_size_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Scheduled image sizes')
    group.add_argument('--train-img-sizes', nargs='+', type=int, help='image sizes to train with')
    group.add_argument('--train-batch-sizes', nargs='+', type=int, help='batch size at each of --train-img-sizes')
    group.add_argument('--train-size-probs', nargs='+', type=float, help='probability of each of --train-img-sizes')
    group.add_argument(
        '--train-size-schedule',
        type=str,
        default='constant',
        choices=['constant', 'progressive'],
        help='fixed probabilities, or from the first size to the last',
    )
    group.add_argument(
        '--train-size-schedule-spread', type=float, default=0.65, help='width of the progressive window, in sizes'
    )
    group.add_argument(
        '--train-size-random-mix',
        type=float,
        default=0.1,
        help='share of uniformly drawn sizes in a progressive schedule',
    )
    group.add_argument('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, help='batches per epoch')
    group.add_argument(
        '--variable-batch-loss-scale',
        type=str,
        default='none',
        choices=['none', 'sqrt', 'linear'],
        help='scale the loss with the batch size',
    )


def _add_naflex_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('NaFlex (accepted, not supported)')
    group.add_argument('--naflex-loader', action='store_true', help='variable-length batches; not supported')
    group.add_argument(
        '--naflex-train-seq-lens',
        nargs='+',
        type=int,
        default=[128, 256, 576, 784, 1024],
        help='sequence lengths to train with',
    )
    group.add_argument('--naflex-max-seq-len', type=int, default=576, help='sequence length in evaluation')
    group.add_argument('--naflex-patch-sizes', nargs='+', type=int, help='patch sizes to train with')
    group.add_argument('--naflex-patch-size-probs', nargs='+', type=float, help='probability of each patch size')
    group.add_argument(
        '--naflex-loss-scale',
        type=str,
        default='linear',
        choices=['none', 'sqrt', 'linear'],
        help='scale the loss with the batch size',
    )
    group.add_argument('--naflex-patchify-channels-first', action='store_true', help='channels-first patches')


def _add_distillation_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Knowledge distillation')
    group.add_argument('--kd-model-name', type=str, help='name of the teacher model')
    group.add_argument(
        '--kd-distill-type',
        type=str,
        default='logit',
        choices=['logit', 'feature', 'token'],
        help='distil logits, features or a token',
    )
    group.add_argument('--kd-loss-type', type=str, default='kl', help='loss of logit distillation')
    group.add_argument('--distill-loss-weight', type=float, help='weight of the distillation loss')
    group.add_argument('--task-loss-weight', type=float, help='weight of the classification loss')
    group.add_argument('--kd-temperature', type=float, default=4.0, help='softmax temperature')
    group.add_argument('--kd-student-feature-dim', type=int, help="size of the student's features; default: detected")
    group.add_argument('--kd-teacher-feature-dim', type=int, help="size of the teacher's features; default: detected")
    group.add_argument(
        '--kd-token-distill-type',
        type=str,
        default='soft',
        choices=['soft', 'hard'],
        help='soft or hard targets of token distillation',
    )
