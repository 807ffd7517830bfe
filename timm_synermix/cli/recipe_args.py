"""The flags of timm's train.py that make a recipe: optimizer, schedule, augmentation, loss, averages, distillation."""

from __future__ import annotations

import argparse

from timm_synermix.cli.common_args import ParseKwargs


def add_recipe_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of timm's train.py that make a recipe. Names, types and defaults are timm's."""
    for add_args in (
        _add_optimizer_args,
        _add_schedule_args,
        _add_augmentation_args,
        _add_mixup_args,
        _add_loss_args,
        _add_batch_norm_args,
        _add_ema_args,
        _add_scheduled_size_args,
        _add_distillation_args,
    ):
        add_args(parser)


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
    group.add_argument('--reprob', type=float, default=0.0, help='probability of random erasing')
    group.add_argument('--remode', type=str, default='pixel', help='what random erasing fills in: const, rand or pixel')
    group.add_argument('--recount', type=int, default=1, help='areas erased')
    group.add_argument('--resplit', action='store_true', help='no random erasing in the first augmentation split')
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


def _add_mixup_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('MixUp and CutMix')
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


def _add_loss_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Loss')
    group.add_argument(
        '--loss',
        help='training loss: ce, bce, asl, poly or jsd, or of several labels bce, asl, poly, twoway, zlpr or db; '
        'default: ce, of several labels bce',
    )
    group.add_argument(
        '--smoothing', type=float, help='label smoothing; default: 0.1, of several labels (--task multilabel) 0'
    )
    group.add_argument('--jsd-loss', action='store_true', help='same as --loss jsd, over --aug-splits')
    group.add_argument('--bce-loss', action='store_true', help='same as --loss bce')
    group.add_argument('--bce-sum', action='store_true', help='sum the binary cross-entropy over classes')
    group.add_argument('--bce-target-thresh', type=float, help='binarise soft targets at this value')
    group.add_argument('--bce-pos-weight', type=float, help='same as --loss-pos-weight')
    group.add_argument(
        '--loss-pos-weight',
        metavar='WEIGHT',
        help='weight of positive targets, for bce, and asl of several labels: a number, one for each class (a,b,...), '
        'a file of them, or neg_pos: negatives to positives in --class-stats',
    )
    group.add_argument(
        '--loss-class-weight',
        metavar='WEIGHT',
        help='weight of each class, likewise; or inv_freq or effective_num: made from --class-stats',
    )
    group.add_argument(
        '--class-stats',
        default='',
        metavar='FILE',
        help="JSON file with pos_counts of each class and num_samples, as timm's class_weights.py writes",
    )
    group.add_argument('--loss-weight-power', type=float, default=1.0, help='exponent of neg_pos and inv_freq')
    group.add_argument('--loss-weight-beta', type=float, default=0.999, help='beta of effective_num')
    group.add_argument('--loss-weight-max', type=float, help='largest weight made from --class-stats')
    group.add_argument('--poly-epsilon', type=float, default=2.0, help='coefficient of --loss poly')
    group.add_argument('--poly-gamma', type=float, default=0.0, help='focusing of --loss poly of several labels')


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
