#!/usr/bin/env python3
"""What the networks of a grid are good for besides accuracy: is cohesion a sign of any of it?

    python benchmarks/downstream.py output/reproduce/methods --data-dir DIR

takes the last checkpoint of every run that benchmarks/reproduce.py has finished there, and measures on clean validation
images

- the calibration error of the logits (ECE, 15 bins, per cent; lower is better),
- k-NN: accuracy of 20 nearest neighbours (cosine) among the features of the training images,
- few-shot: accuracy of nearest class means, 5 images each, among classes never trained on, those of DIR that the grid
  left out: 500 draws of 20 classes, features scaled to length 1,
- corrupted: top-1 under Gaussian noise, Gaussian blur, lower contrast, pixelation and JPEG, each at the five strengths
  that CIFAR-10-C has (arXiv 1903.12261), the mean of the 25.

downstream.md has a table and the rank correlations over the runs, downstream.json the figures, downstream.png shows
them against cohesion.
"""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from PIL import Image
from scipy.stats import spearmanr
from sklearn.neighbors import KNeighborsClassifier
from tables import COLUMNS, table
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from timm_synermix import FeatureHook, cifar_resnet
from timm_synermix.features import pool_feature

assert cifar_resnet  # registers its models with timm

MEASURED = {'ece': 'ECE %', 'knn': 'k-NN %', 'few_shot': 'few-shot %', 'corrupted': 'corrupted %'}
SHOTS = 5
COHESION = ['eval_cosine_cohesion', 'eval_cdnv', 'eval_nc1', 'eval_silhouette']


def noise(image: Tensor, sigma: float) -> Tensor:
    return image + sigma * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))


def blur(image: Tensor, sigma: float) -> Tensor:
    return TF.gaussian_blur(image, [2 * round(4 * sigma) + 1] * 2, [sigma, sigma])


def contrast(image: Tensor, factor: float) -> Tensor:
    mean = image.mean((2, 3), keepdim=True)
    return mean + factor * (image - mean)


def pixelate(image: Tensor, factor: float) -> Tensor:
    size = [int(factor * length) for length in image.shape[2:]]
    return F.interpolate(F.interpolate(image, size, mode='area'), image.shape[2:])


def jpeg(image: Tensor, quality: float) -> Tensor:
    def through_jpeg(pixels: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, 'JPEG', quality=int(quality))
        return np.array(Image.open(file))

    pixels = (255 * image).round().byte().permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(np.stack([through_jpeg(one) for one in pixels])).permute(0, 3, 1, 2) / 255


# name, images [N, 3, H, W] in [0, 1] with a strength to such images, and the five strengths
CORRUPTIONS: list[tuple[Callable[[Tensor, float], Tensor], list[float]]] = [
    (noise, [0.04, 0.06, 0.08, 0.09, 0.10]),
    (blur, [0.4, 0.6, 0.7, 0.8, 1.0]),
    (contrast, [0.75, 0.5, 0.4, 0.3, 0.15]),
    (pixelate, [0.95, 0.9, 0.85, 0.75, 0.65]),
    (jpeg, [80, 65, 58, 50, 40]),
]


def load_images(folder: Path, classes: list[str], config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Images as evaluation sees them, uint8 `[N, 3, H, W]`, and their classes, int64 `[N]`."""
    class_map = {name: index for index, name in enumerate(classes)}
    dataset = create_dataset('', str(folder), class_map=class_map)
    dataset.transform = create_transform(**config, is_training=False, use_prefetcher=True)  # leaves them uint8
    samples = [dataset[index] for index in tqdm(range(len(dataset)), desc=folder.name, leave=False)]
    images, targets = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(targets)


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
        """Logits and features, on the CPU, of images uint8 or in [0, 1]."""
        scale = 1 if images.is_floating_point() else 255
        outputs = (self.hook(self.normalize(batch / scale)) for batch in images.split(250))
        logits, features = zip(*((logits.cpu(), pool_feature(feature).cpu()) for logits, feature in outputs))
        return torch.cat(logits), torch.cat(features)


def measure(network: Network, data: dict[str, tuple[Tensor, Tensor]], corrupted: list[Tensor]) -> dict[str, float]:
    """The figures of `MEASURED`, in per cent; few_shot only where there are classes for it."""
    images, target = data['validation']
    logits, features = network(images)
    error = multiclass_calibration_error(logits.softmax(1), target, logits.shape[1], n_bins=15)
    train_images, train_target = data['train']
    neighbours = KNeighborsClassifier(min(20, len(train_target)), metric='cosine')
    neighbours.fit(network(train_images)[1], train_target)
    under = [accuracy(network(images)[0].argmax(1), target) for images in corrupted]
    result = {
        'ece': 100 * error.item(),
        'knn': accuracy(neighbours.predict(features), target),
        'corrupted': float(np.mean(under)),
    }
    if 'unseen' in data:
        images, target = data['unseen']
        result['few_shot'] = few_shot(F.normalize(network(images)[1]), target)
    return result


def accuracy(predicted: Any, target: Tensor) -> float:
    return 100 * float(np.mean(np.asarray(predicted) == target.numpy()))


def few_shot(features: Tensor, target: Tensor, ways: int = 20, shots: int = SHOTS, draws: int = 500) -> float:
    """Accuracy of nearest class means, per cent; every draw has its classes, its given images and all their others."""
    generator = torch.Generator().manual_seed(0)
    members = [(target == label).nonzero()[:, 0] for label in target.unique()]
    accuracies = []
    for _ in range(draws):
        chosen = torch.randperm(len(members), generator=generator)[:ways]
        shuffled = [members[label][torch.randperm(len(members[label]), generator=generator)] for label in chosen]
        means = torch.stack([features[images[:shots]].mean(0) for images in shuffled])
        asked = torch.cat([images[shots:] for images in shuffled])
        place = torch.cat([torch.full((len(images) - shots,), way) for way, images in enumerate(shuffled)])
        accuracies.append(accuracy(torch.cdist(features[asked], means).argmin(1), place))
    return float(np.mean(accuracies))


def correlations(results: list[dict[str, Any]]) -> str:
    """Spearman's rank correlations over the runs, a row for each measure of cohesion."""
    columns = {'eval_top1': COLUMNS['eval_top1'], **MEASURED}
    columns = {key: name for key, name in columns.items() if all(key in result for result in results)}
    lines = ['| | ' + ' | '.join(columns.values()) + ' |', '| --- ' * (len(columns) + 1) + '|']
    for measure in (*COHESION, 'eval_top1'):
        values = [[result[key] for result in results] for key in (measure, *columns)]
        ranks = [spearmanr(values[0], other).statistic for other in values[1:]]
        lines.append(f'| {COLUMNS[measure]} | ' + ' | '.join(f'{rank:.2f}' for rank in ranks) + ' |')
    return '\n'.join(lines) + '\n'


def draw(names: list[str], results: list[dict[str, Any]], path: Path) -> None:
    """A panel for each figure against cosine cohesion, a dot for each run."""
    from matplotlib.figure import Figure

    columns = {key: name for key, name in MEASURED.items() if all(key in result for result in results)}
    figure = Figure(figsize=(3.2 * len(columns), 4.2), layout='constrained')
    for axes, (key, title) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True):
        for place, name in enumerate(names):
            points = [(result['eval_cosine_cohesion'], result[key]) for result in results if result['run'] == name]
            marker = 'os^Dv<>PX*'[place % 10]
            axes.plot(*zip(*points, strict=True), marker, color=f'C{place % 10}', alpha=0.8, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel('cosine cohesion')
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('grid', type=Path, help='folder of a grid, with the results and checkpoints of its runs')
    parser.add_argument('--data-dir', type=Path, required=True, help='image folder with validation/, of all classes')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu or cuda')
    args = parser.parse_args()
    paths = [path for path in sorted(args.grid.glob('*.json')) if (path.with_suffix('') / 'last.pth.tar').exists()]
    if not paths:
        parser.error(f'there is no finished run in {args.grid}')
    if not (args.data_dir / 'validation').is_dir():
        parser.error(f'--data-dir must have validation/, got {args.data_dir}')
    results = measure_all(paths, args.data_dir, args.device)
    names = list(dict.fromkeys(result['run'] for result in results))
    (args.grid / 'downstream.json').write_text(json.dumps(results, indent=1))
    text = f'{table(names, results, MEASURED)}\n{correlations(results)}'
    (args.grid / 'downstream.md').write_text(text)
    draw(names, results, args.grid / 'downstream.png')
    print(text)


def measure_all(paths: list[Path], data_dir: Path, device: str) -> list[dict[str, Any]]:
    """The results of runs with what is measured here added; all of them have the data of the first."""
    first = Network(paths[0].with_suffix(''), device)
    trained_on = Path(yaml.safe_load((paths[0].with_suffix('') / 'args.yaml').read_text())['data_dir'])
    classes = class_names(trained_on / 'train')
    unseen = sorted(set(class_names(data_dir / 'validation')) - set(classes))
    data = {split: load_images(trained_on / split, classes, first.config) for split in ('train', 'validation')}
    if unseen:
        images, target = load_images(data_dir / 'validation', unseen, first.config)
        if target.bincount().min() > SHOTS:  # one is left to ask for
            data['unseen'] = images, target
    images = data['validation'][0] / 255
    corrupted = [corrupt(images, strength).clamp(0, 1) for corrupt, strengths in CORRUPTIONS for strength in strengths]
    results = []
    for path in tqdm(paths, desc='runs'):
        result = {key: value for key, value in json.loads(path.read_text()).items() if key != 'setting'}
        results.append({**result, **measure(Network(path.with_suffix(''), device), data, corrupted)})
    return results


def class_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


if __name__ == '__main__':
    main()
