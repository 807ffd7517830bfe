"""Run timm's own tests of its train.py and validate.py with those of this project in their place: make timm-tests.

The tests are in timm's source distribution, which pip downloads. Those are run that import train or validate, and are
all to pass; none may be skipped but for want of a GPU.
"""

import ast
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from timm_synermix.cli.timm_args import TIMM_VERSION

ROOT = Path(__file__).resolve().parent.parent
FILES = ('test_train_resume.py', 'test_multilabel.py')


def download(folder: Path) -> Path:
    """timm's folder of tests."""
    command = ['pip', 'download', '--quiet', '--no-binary', ':all:', '--no-deps', f'timm=={TIMM_VERSION}']
    subprocess.run([sys.executable, '-m', *command, '--dest', folder], check=True)
    with tarfile.open(folder / f'timm-{TIMM_VERSION}.tar.gz') as file:
        safely = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}  # since 3.10.12 and 3.11.4
        file.extractall(folder, [member for member in file if '/tests/' in member.name], **safely)
    return folder / f'timm-{TIMM_VERSION}' / 'tests'


def tests_of_the_scripts(path: Path) -> list[str]:
    """The tests of a file that import train or validate, by themselves or by a helper or fixture of the file."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    users = {'train', 'validate'}
    for _ in functions:
        users |= {function.name for function in functions if users & names_in(function)}
    return [f'{path}::{name}' for name in sorted(users) if name.startswith('test_')]


def names_in(function: ast.FunctionDef) -> set[str]:
    """The modules that a function imports, the functions it calls and the fixtures it asks for."""
    names = {argument.arg for argument in function.args.args}
    for node in ast.walk(function):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names.add(node.func.id)
    return names


class Skips:
    """What was skipped, and why."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.reasons.append(str(report.longrepr))


def main() -> int:
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        tests = download(Path(folder))
        chosen = [test for name in FILES for test in tests_of_the_scripts(tests / name)]
        skips = Skips()
        options = ['-q', '-rs', '-c', '/dev/null', '-p', 'no:cacheprovider', f'--rootdir={tests.parent}']
        code = pytest.main([*options, *chosen], plugins=[skips])
    missing = [reason for reason in skips.reasons if 'CUDA' not in reason]
    for reason in missing:
        print(f'must not be skipped: {reason}')
    return int(code) or len(missing)


if __name__ == '__main__':
    sys.exit(main())
