"""Train digits three times, plain, with MixUp and with SynerMix, and compare the feature spaces.

    python examples/demo.py

runs train.py and validate.py as a user would, prints one table and draws `output/demo/feature_spaces.png`.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import safetensors.torch
import yaml
from sklearn.decomposition import PCA

matplotlib.use('Agg')  # draws to a file, on a machine without a screen too
import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'hparams' / 'digits.yaml'
OUTPUT = Path('output') / 'demo'
METHODS = {
    'plain': [],
    'MixUp': ['--mixup', '0.2'],
    'SynerMix (MixUp)': ['--mixup', '0.2', '--synermix'],
}


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    results, features = {}, {}
    for method, flags in METHODS.items():
        folder = ''.join(filter(str.isalnum, method)).lower()
        command = ['train.py', '--config', str(CONFIG), *flags]
        print(f'{method}: python {" ".join(["train.py", "--config", "hparams/digits.yaml", *flags])}', flush=True)
        start = time.time()
        run([*command, '--device', 'cpu', '--output', str(OUTPUT), '--experiment', folder], OUTPUT / f'{folder}.log')
        seconds = time.time() - start
        results[method], features[method] = evaluate(folder)
        results[method]['seconds'] = seconds
        print(f'    top-1 {results[method]["top1"]:.2f} % after {seconds:.0f} s', flush=True)
    print_table(results)
    path = OUTPUT / 'feature_spaces.png'
    draw(features, results, path)
    print(f'\nThe feature spaces side by side: {path}')


def evaluate(folder: str) -> tuple[dict, dict]:
    """Metrics and features of a run's last checkpoint on the validation images."""
    config = yaml.safe_load(CONFIG.read_text())
    flags = [f'--{name.replace("_", "-")}={config[name]}' for name in ('dataset', 'model', 'num_classes', 'in_chans')]
    flags += [f'--img-size={config["img_size"]}', f'--crop-pct={config["crop_pct"]}', '--workers=1', '--device=cpu']
    run_dir = OUTPUT / folder
    files = [f'--results-file={run_dir / "validation.json"}', f'--features-out={run_dir / "features.safetensors"}']
    run(['validate.py', *flags, f'--checkpoint={run_dir / "last.pth.tar"}', *files], OUTPUT / f'{folder}-validate.log')
    metrics = json.loads((run_dir / 'validation.json').read_text())
    return metrics, safetensors.torch.load_file(run_dir / 'features.safetensors')


def run(command: list[str], log: Path) -> None:
    """Run one of the scripts; if it fails, show the end of its log and stop."""
    with log.open('w') as file:
        process = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], stdout=file, stderr=file)
    if process.returncode:
        sys.exit(f'{command[0]} failed with code {process.returncode}, see {log}:\n{log.read_text()[-2000:]}')


def print_table(results: dict[str, dict]) -> None:
    print(f'\n{"":18}{"top-1 %":>9}{"intra-class":>13}{"inter-class":>13}{"intra/inter":>13}{"seconds":>9}')
    for method, row in results.items():
        intra, inter = row['intra_class_distance'], row['inter_class_distance']
        print(f'{method:18}{row["top1"]:9.2f}{intra:13.3f}{inter:13.3f}{intra / inter:13.3f}{row["seconds"]:9.1f}')
    print('Distances in feature space, on the validation images. Lower intra/inter: tighter classes, further apart.')


def draw(features: dict[str, dict], results: dict[str, dict], path: Path) -> None:
    """Each run's features in the plane in which its class means spread most, a colour per class."""
    figure, axes = plt.subplots(1, len(features), figsize=(4.6 * len(features), 4.8), layout='constrained')
    for axis, (method, data) in zip(axes, features.items(), strict=True):
        points, targets = data['features'].numpy(), data['targets'].numpy()
        means = np.stack([points[targets == digit].mean(0) for digit in range(10)])
        plane = PCA(2).fit(means)
        for digit in range(10):
            axis.scatter(*plane.transform(points[targets == digit]).T, s=10, color=f'C{digit}', alpha=0.6)
        for digit, center in enumerate(plane.transform(means)):
            text = axis.annotate(str(digit), center, ha='center', va='center', weight='bold', fontsize=14)
            text.set_path_effects([withStroke(linewidth=3, foreground='white')])
        ratio = results[method]['intra_class_distance'] / results[method]['inter_class_distance']
        axis.set_title(f'{method}\ntop-1 {results[method]["top1"]:.1f} %, intra/inter {ratio:.3f}')
        axis.set(xticks=[], yticks=[])
    figure.suptitle('Features of the validation digits, in the plane in which the class means spread most')
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    main()
