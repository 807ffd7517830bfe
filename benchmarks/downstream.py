#!/usr/bin/env python3
"""What the networks of a grid are good for besides accuracy, and whether cohesion is a sign of it.

    python benchmarks/downstream.py output/reproduce/methods --data-dir DIR

takes the last checkpoint of every run that benchmarks/reproduce.py has finished there, and measures on clean validation
images

- the calibration error of the logits (ECE, 15 bins, per cent; lower is better),
- k-NN: accuracy of 20 nearest neighbours (cosine) among the features of the training images,
- few-shot: accuracy of nearest class means, 5 images each, among classes never trained on, those of DIR that the grid
  left out: 500 draws of 20 classes, features scaled to length 1,
- corrupted: top-1 under Gaussian noise, Gaussian blur, lower contrast, pixelation and JPEG, each at the five strengths
  that CIFAR-10-C has (arXiv 1903.12261), the mean of the 25.

DIR has all classes, the grid may be of a part of them. downstream.md has a table and rank correlations over the runs,
downstream.json the figures, downstream.png shows them against cohesion.
"""

import argparse
import io
import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from PIL import Image
from scipy.stats import rankdata
from sklearn.neighbors import KNeighborsClassifier
from tables import finish, legend_below, table
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from timm_synermix import FeatureHook
from timm_synermix.features import pool_feature
from timm_synermix.models import resnet_cifar as cifar_resnet

assert cifar_resnet  # registers its models with timm

MEASURED = {'knn': 'k-NN %', 'few_shot': 'few-shot %', 'corrupted': 'corrupted %', 'ece': 'ECE % (lower is better)'}
COHESION = {
    'eval_cosine_cohesion': 'cosine cohesion',
    'eval_silhouette': 'silhouette',
    'eval_cdnv': 'CDNV (lower is better)',
    'eval_nc1': 'NC1 (lower is better)',
}
WAYS, SHOTS = 20, 5


def noise(image: Tensor, sigma: float) -> Tensor:
    return image + sigma * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))


def blur(image: Tensor, sigma: float) -> Tensor:
    return TF.gaussian_blur(image, [2 * round(4 * sigma) + 1] * 2, [sigma, sigma])


def contrast(image: Tensor, factor: float) -> Tensor:
    mean = image.mean((2, 3), keepdim=True)
    return mean + factor * (image - mean)


def each(image: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """A change of PIL images on each of a batch."""
    pixels = (255 * image).round().byte().permute(0, 2, 3, 1).numpy()
    changed = np.stack([np.array(change(Image.fromarray(one))) for one in pixels])
    return torch.from_numpy(changed).permute(0, 3, 1, 2) / 255


def pixelate(image: Tensor, factor: float) -> Tensor:
    def change(one: Image.Image) -> Image.Image:
        small = one.resize([int(factor * side) for side in one.size], Image.Resampling.BOX)
        return small.resize(one.size, Image.Resampling.BOX)

    return each(image, change)


def jpeg(image: Tensor, quality: float) -> Tensor:
    def change(one: Image.Image) -> Image.Image:
        file = io.BytesIO()
        one.save(file, 'JPEG', quality=int(quality))
        return Image.open(file)

    return each(image, change)


STRENGTHS: dict[Callable[[Tensor, float], Tensor], list[float]] = {
    noise: [0.04, 0.06, 0.08, 0.09, 0.10],
    blur: [0.4, 0.6, 0.7, 0.8, 1.0],
    contrast: [0.75, 0.5, 0.4, 0.3, 0.15],
    pixelate: [0.95, 0.9, 0.85, 0.75, 0.65],
    jpeg: [80, 65, 58, 50, 40],
}


def corrupted(images: Tensor) -> Iterator[Tensor]:
    """Images uint8 `[N, 3, H, W]` under each corruption in each strength."""
    for corrupt, strengths in STRENGTHS.items():
        for strength in strengths:
            yield (255 * corrupt(images / 255, strength).clamp(0, 1)).round().byte()


def load_images(folder: Path, classes: dict[str, int], config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Images as evaluation sees them, uint8 `[N, 3, H, W]`, and their classes, int64 `[N]`."""
    dataset = create_dataset('', str(folder), class_map=classes)
    dataset.transform = create_transform(**config, is_training=False, use_prefetcher=True)  # leaves them uint8
    samples = [dataset[index] for index in tqdm(range(len(dataset)), desc=folder.name, leave=False)]
    images, targets = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(targets)


def class_numbers(folder: Path) -> dict[str, int]:
    """The classes of an image folder by timm's numbers, which are those of the training."""
    numbers: dict[str, int] = create_dataset('', str(folder)).reader.class_to_idx
    return numbers


class Network:
    """A trained network, from the folder of its run."""

    def __init__(self, folder: Path, device: str) -> None:
        args = yaml.safe_load((folder / 'args.yaml').read_text())
        self.model = timm.create_model(
            args['model'],
            checkpoint_path=str(folder / 'last.pth.tar'),
            num_classes=args['num_classes'],
            **args['model_kwargs'],
        )
        self.config = resolve_data_config(args, model=self.model, verbose=False)
        self.model.to(device).eval()
        self.hook = FeatureHook(self.model)
        mean, std = (torch.tensor(self.config[name], device=device).view(3, 1, 1) for name in ('mean', 'std'))
        self.normalize = lambda images: (images.to(device) - mean) / std

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features, on the CPU, of images uint8 `[N, 3, H, W]`."""
        outputs = (self.hook(self.normalize(batch / 255)) for batch in images.split(250))
        logits, features = zip(*((logits.cpu(), pool_feature(feature).cpu()) for logits, feature in outputs))
        return torch.cat(logits), torch.cat(features)


def measure(
    network: Network, data: dict[str, tuple[Tensor, Tensor]], bad: list[Tensor], top1: float
) -> dict[str, float]:
    """The figures of `MEASURED`, in per cent; few_shot only where there are classes for it.

    Args:
        network: The network.
        data: Images and classes of train, validation and, if there are any, unseen.
        bad: The validation images, corrupted.
        top1: What the training has found.

    Raises:
        RuntimeError: The network is not as accurate as its training found: other images, classes or weights.
    """
    images, target = data['validation']
    logits, features = network(images)
    found = accuracy(logits.argmax(1), target)
    if abs(found - top1) > 1:  # what another precision may do
        raise RuntimeError(f'top-1 must be {top1:.2f} as at the end of the training, got {found:.2f}')
    train_images, train_target = data['train']
    neighbours = KNeighborsClassifier(min(20, len(train_target)), metric='cosine')
    neighbours.fit(network(train_images)[1], train_target)
    under = [accuracy(network(images)[0].argmax(1), target) for images in bad]
    error = multiclass_calibration_error(logits.softmax(1), target, logits.shape[1], n_bins=15)
    result = {
        'knn': accuracy(neighbours.predict(features), target),
        'corrupted': float(np.mean(under)),
        'ece': 100 * error.item(),
    }
    if 'unseen' in data:
        images, target = data['unseen']
        result['few_shot'] = few_shot(F.normalize(network(images)[1]), target)
    return result


def accuracy(predicted: Any, target: Tensor) -> float:
    return 100 * float(np.mean(np.asarray(predicted) == target.numpy()))


def few_shot(features: Tensor, target: Tensor, draws: int = 500) -> float:
    """Accuracy of nearest class means, per cent. Every draw has its classes, and of each the same number of images."""
    generator = torch.Generator().manual_seed(0)
    members = [(target == label).nonzero()[:, 0] for label in target.unique()]
    asked = min(map(len, members)) - SHOTS
    accuracies = []
    for _ in range(draws):
        chosen = torch.randperm(len(members), generator=generator)[:WAYS]
        shuffled = [members[label][torch.randperm(len(members[label]), generator=generator)] for label in chosen]
        images = torch.stack([one[: SHOTS + asked] for one in shuffled])
        means = features[images[:, :SHOTS]].mean(1)
        nearest = torch.cdist(features[images[:, SHOTS:].flatten()], means).argmin(1)
        accuracies.append(accuracy(nearest, torch.arange(len(chosen)).repeat_interleave(asked)))
    return float(np.mean(accuracies))


def measured(results: list[dict[str, Any]]) -> dict[str, str]:
    """The part of `MEASURED` that all results have."""
    return {key: name for key, name in MEASURED.items() if all(key in result for result in results)}


def correlations(results: list[dict[str, Any]]) -> str:
    """Spearman's rank correlations over the runs, and in brackets what is left of them among runs of equal accuracy.

    The latter are partial correlations given top-1: `(r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2))`.
    """
    columns = measured(results)
    keys = ['eval_top1', *COHESION, *columns]
    rank = np.corrcoef(rankdata([[result[key] for result in results] for key in keys], axis=1))

    def cell(x: str, y: str) -> str:
        r_xy, r_xz, r_yz = (rank[keys.index(a), keys.index(b)] for a, b in ((x, y), (x, keys[0]), (y, keys[0])))
        return f'{r_xy:.2f} ({(r_xy - r_xz * r_yz) / np.sqrt((1 - r_xz**2) * (1 - r_yz**2)):.2f})'

    runs = len({result['run'] for result in results})
    lines = [f'| {len(results)} networks, {runs} methods | top-1 % | ' + ' | '.join(columns.values()) + ' |']
    lines.append('| --- ' * (len(columns) + 2) + '|')
    for measure, name in COHESION.items():
        top1 = f'{rank[keys.index(measure), 0]:.2f}'
        lines.append(f'| {name} | {top1} | ' + ' | '.join(cell(measure, key) for key in columns) + ' |')
    return '\n'.join(lines) + '\n'


def draw(names: list[str], results: list[dict[str, Any]], path: Path) -> None:
    """A panel for each figure against cosine cohesion, a dot for each run."""
    from matplotlib.figure import Figure

    columns = measured(results)
    figure = Figure(figsize=(3.2 * len(columns), 4.2), layout='constrained')
    for axes, (key, title) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True):
        for place, name in enumerate(names):
            points = [(result['eval_cosine_cohesion'], result[key]) for result in results if result['run'] == name]
            marker = 'os^Dv<>PX*'[place % 10]
            axes.plot(*zip(*points, strict=True), marker, color=f'C{place % 10}', alpha=0.8, label=name)
        finish(axes, title, 'cosine cohesion')
    legend_below(figure, axes)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('grid', type=Path, help='folder of a grid, with the results and checkpoints of its runs')
    parser.add_argument('--data-dir', type=Path, required=True, help='image folder with validation/, of all classes')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu or cuda')
    args = parser.parse_args()
    paths = [path for path in sorted(args.grid.glob('*.json')) if (path.with_suffix('') / 'last.pth.tar').exists()]
    runs = [json.loads(path.read_text()) for path in paths]
    if len(runs) < 2:
        parser.error(f'grid must have two finished runs or more, got {len(runs)} in {args.grid}')
    if not all(COHESION.keys() <= run.keys() for run in runs):
        parser.error(f'grid must have runs with cohesion, got {args.grid}')
    trained_on = yaml.safe_load((paths[0].with_suffix('') / 'args.yaml').read_text())['data_dir']
    if trained_on is None:
        parser.error(f'grid must be one of image folders, got {args.grid}')
    if not (args.data_dir / 'validation').is_dir():
        parser.error(f'--data-dir must have validation/, got {args.data_dir}')
    classes, all_classes = class_numbers(Path(trained_on) / 'train'), class_numbers(args.data_dir / 'validation')
    if not classes.keys() <= all_classes.keys():
        parser.error(f'--data-dir must have the classes of the grid, got {args.data_dir}')
    networks = (Network(path.with_suffix(''), args.device) for path in paths)
    first = next(networks)  # all have the same data
    data = {split: load_images(Path(trained_on) / split, classes, first.config) for split in ('train', 'validation')}
    unseen = {name: number for number, name in enumerate(sorted(all_classes.keys() - classes.keys()))}
    if len(unseen) >= WAYS:
        data['unseen'] = load_images(args.data_dir / 'validation', unseen, first.config)
    if len(unseen) < WAYS or data['unseen'][1].bincount().min() <= SHOTS:
        data.pop('unseen', None)
        print(f'No few-shot accuracy: it needs {WAYS} other classes, each with more than {SHOTS} images.')
    bad = list(corrupted(data['validation'][0]))
    results = []
    for run, network in zip(tqdm(runs, desc='runs'), chain([first], networks), strict=True):
        result = {key: value for key, value in run.items() if key != 'setting'}
        results.append({**result, **measure(network, data, bad, run['eval_top1'])})
        (args.grid / 'downstream.json').write_text(json.dumps(results, indent=1))
    names = list(dict.fromkeys(result['run'] for result in results))
    text = f'{table(names, results, MEASURED)}\n{correlations(results)}'
    (args.grid / 'downstream.md').write_text(text)
    draw(names, results, args.grid / 'downstream.png')
    print(text)


if __name__ == '__main__':
    main()
