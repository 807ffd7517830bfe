"""Train digits three times, plain, with MixUp and with SynerMix, and compare the feature spaces.

    python examples/demo.py

runs train.py and validate.py as a user would, prints one table, and leaves a page of curves and pictures under
`output/demo/report/report.html`.
"""

import json
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
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
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # so small a network is not faster with more
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, reversed(METHODS)))  # the longest first
    print(f'\n{"":18}{"top-1 %":>9}{"intra-class":>13}{"inter-class":>13}{"intra/inter":>13}')
    for method, row in zip(METHODS, compare(), strict=True):
        intra, inter = row['intra_class_distance'], row['inter_class_distance']
        print(f'{method:18}{row["top1"]:9.2f}{intra:13.3f}{inter:13.3f}{intra / inter:13.3f}')
    print('Distances in feature space, on the validation images. Lower intra/inter: tighter classes, further apart.')
    print(f'\nCurves, feature spaces and more: {OUTPUT / "report" / "report.html"}')


def train(method: str) -> None:
    """Train one of the networks, into a folder of its name."""
    flags = METHODS[method]
    print(' '.join([f'{method}: python train.py --config hparams/digits.yaml', *flags]), flush=True)
    command = ['train.py', '--config', str(ROOT / 'hparams' / 'digits.yaml'), *flags, '--cohesion']
    command += ['--device', 'cpu', '--output', str(OUTPUT), '--experiment', method]
    run(command, OUTPUT / f'{method}.log')


def compare() -> list[dict]:
    """Metrics of the last checkpoints on the validation images, and the report."""
    checkpoints = [str(OUTPUT / method / 'last.pth.tar') for method in METHODS]
    files = ['--report', str(OUTPUT / 'report'), '--results-file', str(OUTPUT / 'results.json')]
    data = ['--dataset', 'sklearn/digits', '--device', 'cpu', '--workers', '1']
    run(['validate.py', *data, '--compare', *checkpoints, *files, '--results-format', 'json'], OUTPUT / 'validate.log')
    return json.loads((OUTPUT / 'results.json').read_text())


def run(command: list[str], log: Path) -> None:
    """Run one of the scripts; if it fails, show the end of its log and stop."""
    process = PROCESSES.Process(target=run_script, args=(command, str(log)))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f'{command[0]} failed with code {process.exitcode}, see {log}:\n{log.read_text("utf-8")[-2000:]}')


def run_script(command: list[str], log: str) -> None:
    """In a process of its own: be `python COMMAND > LOG`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    multiprocessing.set_start_method(None, force=True)  # for the workers of its loaders: the platform's
    sys.argv = [str(ROOT / command[0]), *command[1:]]
    from timm_synermix import entry

    {'train.py': entry.train, 'validate.py': entry.validate}[command[0]]()


# torch and timm take seconds to import: processes are forked off one that has done so.
PROCESSES = multiprocessing.get_context('forkserver' if sys.platform != 'win32' else 'spawn')

if __name__ == '__main__':
    if sys.platform != 'win32':
        PROCESSES.set_forkserver_preload(['timm_synermix.train', 'timm_synermix.validate', 'timm_synermix.report'])
    main()
