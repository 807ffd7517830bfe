"""The house: which way imports go, how many modules lie at the root of the package, and how long things are."""

import ast
import re
from graphlib import TopologicalSorter

import pytest
import yaml
from conftest import ROOT

PACKAGE = ROOT / 'timm_synermix'
LEVELS = [
    {'functional', 'features', 'utils', 'metrics', 'cli'},
    {'task', 'data', 'models'},
    {'report'},
    {'engine', 'launch'},
    {'train', 'validate'},
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
VERSION = 'timm_synermix.__version__'
DOORS = {'__init__', '__main__', 'cifar_resnet', 'entry'}  # other names of what is inside, for users and for the shell
MODULES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob('*.py')}


def part_of(path):
    """The wing, or the module at the root, that a file belongs to."""
    return path.split('/')[1].removesuffix('.py')


def imported_parts(tree):
    """The parts of the package that a module imports anywhere, for type checkers and inside of functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, 'imports name the package'
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split('.')[1] for name in names if name.startswith('timm_synermix.') and name != VERSION)


ARROWS = {}
for path, tree in MODULES.items():
    ARROWS.setdefault(part_of(path), set()).update(set(imported_parts(tree)) - {part_of(path)})


def functions():
    """Every function of the package: where it is, and its lines without the docstring."""
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                yield f'{path}:{node.lineno} {node.name}', lines


def test_every_part_has_its_place():
    assert ARROWS.keys() - DOORS == LEVEL.keys()


@pytest.mark.parametrize('part', sorted(LEVEL))  # in one order for all workers
def test_a_part_knows_nothing_above_it(part):
    above = {other for other in ARROWS[part] if LEVEL.get(other, len(LEVELS)) > LEVEL[part]}
    assert above - ({'entry'} if part in LEVELS[-1] else set()) == set()


def test_nothing_imports_a_script():
    assert not {part: names for part, names in ARROWS.items() if names & LEVELS[-1]}


def test_no_imports_go_in_circles():
    TopologicalSorter({part: names & LEVEL.keys() for part, names in ARROWS.items()}).prepare()


def test_few_modules_lie_at_the_root():
    assert len([path for path in MODULES if path.count('/') == 1]) <= 12


def test_every_wing_says_what_it_is():
    for path, tree in MODULES.items():
        assert ast.get_docstring(tree), path


def test_functions_are_short():
    assert [(name, lines) for name, lines in functions() if lines > 60] == []


def test_train_py_is_a_story():
    assert len((PACKAGE / 'train.py').read_text().splitlines()) <= 400
    assert [
        (name, lines) for name, lines in functions() if name.startswith('timm_synermix/train.py') and lines > 40
    ] == []


def test_one_version_of_the_linter():
    pinned = re.search(r'"ruff==([\d.]+)"', (ROOT / 'pyproject.toml').read_text())[1]
    assert f'rev: v{pinned} ' in (ROOT / '.pre-commit-config.yaml').read_text()


def test_ci_runs_the_same_targets_everywhere():
    local = re.findall(r'^make (\S+)$', (ROOT / '.ci/run').read_text(), re.MULTILINE)
    workflow = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())
    steps = [step['run'] for step in workflow['jobs']['test']['steps'] if 'run' in step]
    assert steps == [f'make {target}' for target in local]
