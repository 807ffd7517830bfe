"""Train digits three times, plain, with MixUp and with SynerMix, and compare the feature spaces.

    python examples/demo.py

runs train.py and validate.py as a user would, prints one table, and leaves a page of curves and pictures under
`output/demo/report/report.html`.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path('output') / 'demo'
METHODS = {
    'plain': [],
    'MixUp': ['--mixup', '0.2'],
    'SynerMix': ['--mixup', '0.2', '--synermix'],
}


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    seconds = {}
    for method, flags in METHODS.items():
        print(f'{method}: python train.py {" ".join(["--config", "hparams/digits.yaml", *flags])}', flush=True)
        start = time.time()
        command = ['train.py', '--config', str(ROOT / 'hparams' / 'digits.yaml'), *flags, '--cohesion']
        run([*command, '--device', 'cpu', '--output', str(OUTPUT), '--experiment', method], OUTPUT / f'{method}.log')
        seconds[method] = time.time() - start
    results = compare()
    print(f'\n{"":18}{"top-1 %":>9}{"intra-class":>13}{"inter-class":>13}{"intra/inter":>13}{"seconds":>9}')
    for method, row in zip(METHODS, results, strict=True):
        intra, inter = row['intra_class_distance'], row['inter_class_distance']
        print(f'{method:18}{row["top1"]:9.2f}{intra:13.3f}{inter:13.3f}{intra / inter:13.3f}{seconds[method]:9.1f}')
    print('Distances in feature space, on the validation images. Lower intra/inter: tighter classes, further apart.')
    print(f'\nCurves, feature spaces and more: {OUTPUT / "report" / "report.html"}')


def compare() -> list[dict]:
    """Metrics of the last checkpoints on the validation images, and the report."""
    checkpoints = [str(OUTPUT / method / 'last.pth.tar') for method in METHODS]
    files = ['--report', str(OUTPUT / 'report'), '--results-file', str(OUTPUT / 'results.json')]
    data = ['--dataset', 'sklearn/digits', '--device', 'cpu', '--workers', '1']
    run(['validate.py', *data, '--compare', *checkpoints, *files, '--results-format', 'json'], OUTPUT / 'validate.log')
    return json.loads((OUTPUT / 'results.json').read_text())


def run(command: list[str], log: Path) -> None:
    """Run one of the scripts; if it fails, show the end of its log and stop."""
    with log.open('w') as file:
        process = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], stdout=file, stderr=file)
    if process.returncode:
        sys.exit(f'{command[0]} failed with code {process.returncode}, see {log}:\n{log.read_text()[-2000:]}')


if __name__ == '__main__':
    main()
