"""Try the installed package as somebody who has nothing else: make release, in an environment with the wheel alone.

From an empty folder: a recipe by its name trains, its best weights are evaluated, and the report of the run is written;
the commands are those that the wheel installs.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path


def run(command: str, *flags: str, folder: str) -> str:
    """Run an installed command in a folder; what it prints."""
    program = Path(sysconfig.get_path('scripts')) / command
    print('$', command, *flags, flush=True)
    return subprocess.run([program, *flags], cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        flags = ['--synermix', '--mixup', '0.2', '--device', 'cpu', '--epochs', '2', '--experiment', 'run', '--report']
        output = run('timm-synermix-train', '--config', 'digits', *flags, folder=folder)
        best = max(row['validation']['top1'] for row in json.loads(output.rpartition('--result\n')[2]))
        left = {path.name for path in Path(folder, 'output', 'train', 'run').iterdir()}
        assert {'last.pth.tar', 'model_best.safetensors', 'summary.csv', 'report'} <= left, left
        flags = ['--checkpoint', 'output/train/run/model_best.pth.tar', '--device', 'cpu', '--results-file', 'row.json']
        run('timm-synermix-validate', *flags, '--results-format', 'json', folder=folder)
        row = json.loads(Path(folder, 'row.json').read_text())
        assert row['top1'] == best, (row['top1'], best)
    import timm_synermix  # the installed one: this script stands in tests/

    assert Path(timm_synermix.__file__).is_relative_to(sys.prefix), timm_synermix.__file__
    print(f'timm-synermix {timm_synermix.__version__}, installed: trained, evaluated, reported. top1 {best}')


if __name__ == '__main__':
    main()
