"""What makes a run's folder a model of timm: config.json beside the best weights, and a model card filled from the run.

`timm.create_model('local-dir:FOLDER', pretrained=True)` then gives the best weights, with their image size, crop, mean
and names of classes. The weights themselves are `RunSaver`'s.
"""

from __future__ import annotations

import csv
import logging
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from timm import model_entrypoint

from timm_synermix.cli.kwargs import mixup_active
from timm_synermix.engine.reporting import data_name
from timm_synermix.engine.tracker_start import recipe_name
from timm_synermix.utils.files import replacing
from timm_synermix.utils.timm_private import generate_readme, save_config_for_hf

if TYPE_CHECKING:
    from timm_synermix.engine.run import Run

_logger = logging.getLogger(__name__)

_PICTURE = 'feature_map.png'
_PAPER = 'SynerMix ([arXiv 2403.14137](https://arxiv.org/abs/2403.14137))'


def write_timm_folder(run: Run, folder: str, epoch: int) -> None:
    """Write config.json and README.md, the model card, of the best epoch so far. Models that are not timm's have none.

    Args:
        run: The run.
        folder: Its folder, with summary.csv and the best weights.
        epoch: The best epoch.
    """
    model = run.trained.model
    if 'architecture' not in (getattr(model, 'pretrained_cfg', None) or {}):  # no model of timm's
        return
    try:
        with replacing(os.path.join(folder, 'config.json')) as path:
            save_config_for_hf(model, path, label_config(run), data_config=run.loaders.data_config)
    except ValueError as error:  # JSON does not know an argument of the model
        _logger.warning(f"No config.json, by which timm's local-dir would know the model: {error}")
    with replacing(os.path.join(folder, 'README.md')) as path, open(path, 'w', encoding='utf-8') as file:
        file.write(model_card(run, folder, epoch))


def finish_timm_folder(run: Run, folder: str, epoch: int) -> None:
    """At the end of a run, draw the features of its best epoch for the model card.

    If it was resumed after its best epoch, there are none; if it was killed after its last checkpoint, the card itself
    may be missing.
    """
    reported = run.evaluation.reported
    is_drawn = reported is not None and reported.epoch == epoch
    if reported is not None and is_drawn:
        from timm_synermix.report.feature_map import feature_map  # slow to import
        from timm_synermix.report.plots import unknown_glyphs

        features = [(f'epoch {epoch}', reported.cohesion.features, reported.cohesion.targets)]
        with replacing(os.path.join(folder, _PICTURE)) as path, unknown_glyphs():
            feature_map(features, run.loaders.class_names).savefig(path, dpi=110, format='png')
    if is_drawn or not os.path.exists(os.path.join(folder, 'README.md')):
        write_timm_folder(run, folder, epoch)


def label_config(run: Run) -> dict[str, Any]:
    """The names of the classes in timm's terms: a list of them, or by number where some numbers have no name."""
    names = {number: name for name, number in run.loaders.class_to_idx.items()}
    if not names:
        return {}
    whole = sorted(names) == list(range(run.args.num_classes))
    return {'label_names': [names[number] for number in sorted(names)] if whole else names}


def model_card(run: Run, folder: str, epoch: int) -> str:
    """The model card, by timm's own function, and the cohesion of the classes below it."""
    args, architecture = run.args, run.trained.model.pretrained_cfg['architecture']
    with open(os.path.join(folder, 'summary.csv'), newline='', encoding='utf-8') as file:
        row = next((row for row in csv.DictReader(file) if row['epoch'] == str(epoch)), {})
    results = {name: f'{float(value):.4g}' for name, value in row.items() if value}
    columns = list(row)
    is_cohesion = {name: name.startswith('eval_') and columns.index(name) > columns.index('lr') for name in columns}
    evaluated, split = ('eval', args.val_split) if args.val_split else ('train', args.train_split)
    card = {
        'tags': ['image-classification', 'timm', *(['synermix'] if args.synermix else [])],
        'license': 'unknown',  # that is for whoever publishes the weights to say
        'description': f'`{architecture}`, trained on {data_name(args, args.train_split)}.',
        'details': {
            'Images': ', '.join(f'{name} {value}' for name, value in run.loaders.data_config.items()),
            'Recipe': recipe_of(run),
            f'Result of epoch {epoch}, the best by {run.evaluation.metric}, on {data_name(args, split)}': {
                name.removeprefix(f'{evaluated}_'): value
                for name, value in results.items()
                if name.startswith(evaluated) and not is_cohesion[name]
            },
            'Made with': ', '.join(f'{name} {version(name)}' for name in ('timm', 'torch')),
        },
        'usage': usage(architecture),
    }
    text = generate_readme(card, args.experiment)
    measured = {name.removeprefix('eval_'): value for name, value in results.items() if is_cohesion[name]}
    if measured:
        lines = ['## Cohesion of the classes', '', '| metric | value |', '| --- | --- |']
        lines += [f'| {name} | {value} |' for name, value in measured.items()]
        if os.path.exists(os.path.join(folder, _PICTURE)):
            lines += ['', f'![Features of validation images]({_PICTURE})']
        text += '\n' + '\n'.join(lines) + '\n'
    return text


def recipe_of(run: Run) -> str:
    """What a run trained with, in a line."""
    args = run.args
    method = [f'{_PAPER}, beta {run.trained.task.beta:g}'] if args.synermix else []
    if mixup_active(args):
        method.append(f'MixUp {args.mixup:g}, CutMix {args.cutmix:g}')
    if args.manifold_mixup:
        method.append(f'Manifold MixUp {args.manifold_mixup:g}')
    images = args.batch_size * args.world_size * args.grad_accum_steps
    method += [
        f'{run.place.num_epochs} epochs',
        f'{images} images per update',
        f'{args.opt}, learning rate {args.lr:g}',
    ]
    return ', '.join([recipe_name(args), *method, f'seed {args.seed}']) + '. All flags are in args.yaml.'


def usage(architecture: str) -> str:
    """Lines of Python that load the model of a folder; first of all what makes its name known to timm."""
    module = model_entrypoint(architecture).__module__
    if module == 'timm_synermix.models.resnet_cifar':
        module = 'timm_synermix.cifar_resnet'  # its documented name
    known = [] if module.startswith('timm.') else [f'import {module}  # makes {architecture} known to timm', '']
    lines = [
        'import timm',
        *known,
        "model = timm.create_model('local-dir:FOLDER', pretrained=True).eval()  # or 'hf-hub:NAME', once it is there",
        'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))',
        "label_names = model.pretrained_cfg.get('label_names')",
    ]
    return '\n'.join(['```python', *lines, '```'])
