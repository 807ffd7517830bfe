"""What holds of each flag beside its type: its range, and what it means to a run that goes on or to other processes."""

from __future__ import annotations

import argparse
from typing import Any, Literal, NamedTuple

from timm_synermix.utils.checks import (
    BATCH,
    BETA,
    FRACTION,
    MIX,
    NUM_MIXED,
    POSITIVE_FRACTION,
    SINGLETONS,
    SUPPLEMENT,
    OneOf,
    Range,
)


class Rule(NamedTuple):
    """The facts of a flag.

    Args:
        values: What it may be, each of its values if it has several; None for anything of its type. That a flag which
            is not given is None is always fine.
        pair: It is two values, the lower one first.
        resume: What another value means to a run that goes on.
            'named': it counts from there on, and is named in a warning;
            'free': it changes nothing that is trained;
            'epoch': it decides which images a batch has, and can change between epochs only;
            'kept': the state of the optimizer has it, and keeps its own;
            'fixed': it is another run.
        per_process: The processes of a run may have different ones.
        evaluation: It decides what an evaluation says: validate.py takes it from the run that a checkpoint is of, under
            another name if one is given here.
        needs: The flag without which it has no effect.
        ours: timm's scripts do not have it; abbreviations of timm's flags pass it over.
    """

    values: Range | OneOf | None = None
    pair: bool = False
    resume: Literal['named', 'free', 'epoch', 'kept', 'fixed'] = 'named'
    per_process: bool = False
    evaluation: bool | str = False
    needs: str | None = None
    ours: bool = False


_INT64, _FLOAT32 = 2**63 - 1, 3.4e38

_ANY = Range()
_FROM_0 = Range(0)
_FROM_1 = Range(1)
_ABOVE_0 = Range(0, above=True)
_DTYPE = OneOf(('float32', 'float16', 'bfloat16'))
_IMG_MODE = OneOf(('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I', 'F', 'I;16'))
_INTERPOLATION = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')

# Flags of both scripts have one rule, and every flag has one: a test knows.
_TIMM = {
    # data
    'config': Rule(resume='free', per_process=True),
    'data': Rule(resume='free', per_process=True, evaluation=True),
    'data_dir': Rule(resume='free', per_process=True, evaluation=True),
    'dataset': Rule(resume='epoch', evaluation=True),
    'train_split': Rule(resume='epoch'),
    'val_split': Rule(evaluation='split'),
    'split': Rule(),
    'train_num_samples': Rule(_FROM_1),
    'val_num_samples': Rule(_FROM_1, evaluation='num_samples'),
    'num_samples': Rule(_FROM_1),
    'dataset_download': Rule(resume='free'),
    'class_map': Rule(resume='epoch', evaluation=True),
    'input_img_mode': Rule(_IMG_MODE, evaluation=True),
    'input_key': Rule(evaluation=True),
    'target_key': Rule(evaluation=True),
    'target_format': Rule(evaluation=True),
    'dataset_trust_remote_code': Rule(),
    'real_labels': Rule(),
    'valid_labels': Rule(),
    # model
    'model': Rule(resume='fixed', evaluation=True),
    'pretrained': Rule(resume='free'),
    'pretrained_path': Rule(resume='free'),
    'initial_checkpoint': Rule(resume='free'),
    'checkpoint': Rule(),
    'use_ema': Rule(),
    'no_use_ema': Rule(ours=True),
    'resume': Rule(resume='free'),
    'no_resume_opt': Rule(resume='free'),
    'num_classes': Rule(_FROM_1, resume='fixed', evaluation=True),
    'gp': Rule(evaluation=True),
    'img_size': Rule(_FROM_1, evaluation=True),
    'in_chans': Rule(_FROM_1, resume='fixed', evaluation=True),
    'input_size': Rule(_FROM_1, evaluation=True),
    'use_train_size': Rule(),
    'crop_pct': Rule(Range(0.01, 10), evaluation=True),
    'crop_mode': Rule(OneOf(('center', 'squash', 'border')), evaluation=True),
    'crop_border_pixels': Rule(_FROM_0),
    'mean': Rule(_ANY, evaluation=True),
    'std': Rule(_ABOVE_0, evaluation=True),
    'interpolation': Rule(OneOf(('', *_INTERPOLATION)), evaluation=True),
    'tf_preprocessing': Rule(),
    'channels_last': Rule(evaluation=True),
    'fuser': Rule(OneOf(('', 'te', 'old', 'nvfuser'))),
    'grad_checkpointing': Rule(),
    'fast_norm': Rule(evaluation=True),
    'test_pool': Rule(),
    'reparam': Rule(),
    'model_kwargs': Rule(evaluation=True),
    'head_init_scale': Rule(_ANY),
    'head_init_bias': Rule(_ANY),
    'torchscript': Rule(),
    'torchcompile': Rule(),
    'torchcompile_mode': Rule(needs='torchcompile'),
    'aot_autograd': Rule(),
    'task': Rule(resume='fixed', evaluation=True),
    'multilabel_threshold': Rule(FRACTION, evaluation=True),
    # device and processes
    'device': Rule(resume='free', per_process=True),
    'num_gpu': Rule(),
    'device_modules': Rule(),
    'amp': Rule(evaluation=True),
    'amp_dtype': Rule(OneOf(('float16', 'bfloat16')), evaluation=True),
    'model_dtype': Rule(_DTYPE, evaluation=True),
    'no_ddp_bb': Rule(),
    'synchronize_step': Rule(resume='free'),
    'local_rank': Rule(_ANY, resume='free', per_process=True),
    'workers': Rule(_FROM_0, resume='free', per_process=True),
    'pin_mem': Rule(resume='free', per_process=True),
    'no_prefetcher': Rule(),
    'use_multi_epochs_loader': Rule(resume='free'),
    'worker_seeding': Rule(OneOf(('all', 'part')), resume='free'),
    'seed': Rule(Range(0, 2**32 - 1), resume='epoch'),
    'retry': Rule(),
    # batches
    'batch_size': Rule(_FROM_1, resume='epoch'),
    'validation_batch_size': Rule(_FROM_1, resume='free'),
    'grad_accum_steps': Rule(_FROM_1, resume='epoch'),
    'train_img_sizes': Rule(_FROM_1, resume='epoch'),
    'train_batch_sizes': Rule(_FROM_1, resume='epoch'),
    'train_size_probs': Rule(_FROM_0, resume='epoch'),
    'train_size_schedule': Rule(),
    'train_size_schedule_spread': Rule(_FROM_0),
    'train_size_random_mix': Rule(FRACTION),
    'train_batches_per_epoch': Rule(_FROM_1),
    'variable_batch_loss_scale': Rule(),
    'naflex_loader': Rule(),
    'naflex_train_seq_lens': Rule(_FROM_1),
    'naflex_max_seq_len': Rule(_FROM_1),
    'naflex_patch_sizes': Rule(_FROM_1),
    'naflex_patch_size_probs': Rule(_FROM_0),
    'naflex_loss_scale': Rule(),
    'naflex_patchify_channels_first': Rule(),
    # optimizer
    'opt': Rule(resume='fixed'),
    'opt_eps': Rule(_FROM_0, resume='kept'),
    'opt_betas': Rule(FRACTION, resume='kept'),
    'momentum': Rule(_FROM_0, resume='kept'),
    'weight_decay': Rule(_FROM_0, resume='kept'),
    'clip_grad': Rule(_FROM_0),
    'clip_mode': Rule(OneOf(('norm', 'value', 'agc'))),
    'layer_decay': Rule(Range(0, 10), resume='kept'),
    'layer_decay_min_scale': Rule(_FROM_0),
    'layer_decay_no_opt_scale': Rule(_FROM_0),
    'opt_kwargs': Rule(resume='kept'),
    # schedule
    'sched': Rule(),
    'sched_on_updates': Rule(),
    'lr': Rule(_FROM_0, resume='kept'),
    'lr_base': Rule(_FROM_0, resume='kept'),
    'lr_base_size': Rule(_FROM_1, resume='kept'),
    'lr_base_scale': Rule(OneOf(('', 'linear', 'sqrt')), resume='kept'),
    'lr_noise': Rule(_FROM_0),
    'lr_noise_pct': Rule(_FROM_0),
    'lr_noise_std': Rule(_FROM_0),
    'lr_cycle_mul': Rule(_ABOVE_0),
    'lr_cycle_decay': Rule(_FROM_0),
    'lr_cycle_limit': Rule(_FROM_1),
    'lr_k_decay': Rule(_ABOVE_0),
    'warmup_lr': Rule(_FROM_0),
    'min_lr': Rule(_FROM_0),
    'epochs': Rule(_FROM_1),
    'epoch_repeats': Rule(_FROM_0, resume='epoch'),
    'start_epoch': Rule(_FROM_0, resume='free'),
    'stop_epoch': Rule(_FROM_1, resume='free'),
    'decay_milestones': Rule(_FROM_0),
    'decay_epochs': Rule(_FROM_0),
    'warmup_epochs': Rule(_FROM_0),
    'warmup_prefix': Rule(),
    'cooldown_epochs': Rule(_FROM_0),
    'patience_epochs': Rule(_FROM_0),
    'decay_rate': Rule(_FROM_0),
    'lr_decay_fn': Rule(),
    'lr_stable_timescale': Rule(_ABOVE_0),
    # augmentation and regularisation
    'no_aug': Rule(),
    'scale': Rule(_FROM_0, pair=True),
    'ratio': Rule(_ABOVE_0, pair=True),
    'hflip': Rule(FRACTION),
    'vflip': Rule(FRACTION),
    'color_jitter': Rule(Range(0, 10)),
    'color_jitter_prob': Rule(FRACTION),
    'grayscale_prob': Rule(FRACTION),
    'gaussian_blur_prob': Rule(FRACTION),
    'aa': Rule(),
    'aug_repeats': Rule(_FROM_0, resume='epoch'),
    'aug_splits': Rule(_FROM_0),
    'train_crop_mode': Rule(OneOf(('rrc', 'rkrc', 'rkrr'))),
    'train_interpolation': Rule(OneOf(('random', *_INTERPOLATION))),
    'reprob': Rule(FRACTION),
    'remode': Rule(OneOf(('const', 'rand', 'pixel'))),
    'recount': Rule(_FROM_1),
    'resplit': Rule(),
    'mixup': Rule(_FROM_0),
    'cutmix': Rule(_FROM_0),
    'cutmix_minmax': Rule(FRACTION, pair=True),
    'mixup_prob': Rule(FRACTION),
    'mixup_switch_prob': Rule(FRACTION),
    'mixup_mode': Rule(OneOf(('batch', 'pair', 'elem', 'half'))),
    'mixup_off_epoch': Rule(_FROM_0),
    'smoothing': Rule(FRACTION),
    'drop': Rule(FRACTION),
    'drop_connect': Rule(FRACTION),
    'drop_path': Rule(FRACTION),
    'drop_block': Rule(FRACTION),
    # loss
    'loss': Rule(OneOf(('ce', 'bce', 'asl', 'poly', 'jsd', 'twoway', 'zlpr', 'db'))),
    'loss_pos_weight': Rule(),
    'loss_class_weight': Rule(),
    'class_stats': Rule(),
    'loss_weight_power': Rule(_ANY),
    'loss_weight_beta': Rule(FRACTION),
    'loss_weight_max': Rule(_FROM_0),
    'poly_epsilon': Rule(_ANY),
    'poly_gamma': Rule(_FROM_0),
    'jsd_loss': Rule(),
    'bce_loss': Rule(),
    'bce_sum': Rule(),
    'bce_target_thresh': Rule(FRACTION),
    'bce_pos_weight': Rule(_FROM_0),
    # distillation
    'kd_model_name': Rule(),
    'kd_distill_type': Rule(),
    'kd_loss_type': Rule(),
    'distill_loss_weight': Rule(_FROM_0),
    'task_loss_weight': Rule(_FROM_0),
    'kd_temperature': Rule(_ABOVE_0),
    'kd_student_feature_dim': Rule(_FROM_1),
    'kd_teacher_feature_dim': Rule(_FROM_1),
    'kd_token_distill_type': Rule(),
    # batch norm and average
    'bn_momentum': Rule(FRACTION),
    'bn_eps': Rule(_FROM_0, evaluation=True),
    'sync_bn': Rule(),
    'dist_bn': Rule(OneOf(('', 'broadcast', 'reduce'))),
    'split_bn': Rule(),
    'model_ema': Rule(),
    'model_ema_force_cpu': Rule(),
    'model_ema_decay': Rule(FRACTION),
    'model_ema_warmup': Rule(),
    # what to keep and to look at
    'output': Rule(resume='free'),
    'experiment': Rule(resume='free'),
    'checkpoint_hist': Rule(_FROM_1, resume='free'),
    'recovery_interval': Rule(_FROM_0, resume='free'),
    'save_epochs': Rule(_FROM_1),  # with plateau an evaluation is a step of the schedule
    'save_images': Rule(resume='free'),
    'log_interval': Rule(_FROM_1, resume='free'),
    'log_freq': Rule(_FROM_1),
    'val_interval': Rule(_FROM_1),
    'eval_metric': Rule(),
    'tta': Rule(Range(0, 1), resume='free'),
    'log_wandb': Rule(resume='free'),
    'wandb_project': Rule(resume='free'),
    'wandb_tags': Rule(resume='free'),
    'wandb_resume_id': Rule(resume='free'),
    'results_file': Rule(),
    'results_format': Rule(OneOf(('csv', 'json'))),
    'metrics_avg': Rule(),
}


_OURS = {
    'regmixup': Rule(),
    'synermix': Rule(resume='epoch'),
    'synermix_beta': Rule(BETA, needs='synermix'),
    'synermix_mix': Rule(MIX, needs='synermix'),
    'synermix_num_mixed': Rule(NUM_MIXED, needs='synermix'),
    'synermix_singletons': Rule(SINGLETONS, resume='epoch', needs='synermix'),
    'synermix_supplement': Rule(SUPPLEMENT, resume='epoch', needs='synermix'),
    'synermix_batch': Rule(BATCH, resume='epoch', needs='synermix'),
    'synermix_gather': Rule(needs='synermix'),
    'synermix_fraction': Rule(POSITIVE_FRACTION, resume='epoch', needs='synermix'),
    'synermix_off_epoch': Rule(_FROM_0, resume='epoch', needs='synermix'),
    'manifold_mixup': Rule(_FROM_0),
    'manifold_mixup_layers': Rule(needs='manifold_mixup'),
    'freeze': Rule(),
    'crop_padding': Rule(Range(0, 1024)),
    'cutout': Rule(_FROM_0),
    'in_memory': Rule(resume='free'),
    'on_device': Rule(),
    'strict_data': Rule(resume='free'),
    'max_bad_steps': Rule(_FROM_0, resume='free'),
    'cohesion': Rule(resume='free'),
    'cohesion_memory': Rule(_FROM_0, resume='free', needs='cohesion'),
    'report': Rule(resume='free'),
    'log_with': Rule(resume='free'),
    'compare': Rule(),
    'features_out': Rule(),
}

RULES: dict[str, Rule] = {**_TIMM, **{name: rule._replace(ours=True) for name, rule in _OURS.items()}}


def names_with(**facts: Any) -> list[str]:
    """The flags of which all of these facts hold, e.g. `names_with(resume='epoch')`."""
    return [name for name, rule in RULES.items() if facts.items() <= rule._asdict().items()]


def flag(name: str) -> str:
    """The flag of an argument's name."""
    return '--' + name.replace('_', '-')


def check_values(args: argparse.Namespace) -> None:
    """Refuse values that a flag cannot have.

    Raises:
        ValueError: Names the flag, the rule and the value.
    """
    for name, value in vars(args).items():
        rule = RULES.get(name)
        if rule is None or value is None:
            continue
        if rule.pair and not (len(value) == 2 and value[0] <= value[1]):
            raise ValueError(f'{flag(name)} must be two values, the lower one first, got {value}')
        for item in value if isinstance(value, list) else [value]:
            if rule.values is not None:
                rule.values.check(flag(name), item)
            if isinstance(item, (int, float)) and abs(item) > (_INT64 if isinstance(item, int) else _FLOAT32):
                raise ValueError(f'{flag(name)} must be a number that fits 64 bits or float32, got {item}')
