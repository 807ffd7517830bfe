import email
import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml
from conftest import ROOT, UNPACKED

import timm_synermix


def build(tmp_path_factory, kind, source=ROOT):
    folder = tmp_path_factory.mktemp(kind)
    code = f'from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})'
    subprocess.run([sys.executable, '-c', code], cwd=source, check=True, capture_output=True)
    (file,) = folder.glob('timm_synermix-*')
    return file


@pytest.fixture(scope='session')
def source_tree(tmp_path_factory):
    """The unpacked source distribution."""
    with tarfile.open(build(tmp_path_factory, 'sdist')) as archive:
        archive.extractall(folder := tmp_path_factory.mktemp('unpacked'), **UNPACKED)
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope='session')
def wheel(tmp_path_factory, source_tree):
    """The wheel of the source distribution, as PyPI's users get it."""
    return build(tmp_path_factory, 'wheel', source_tree)


def test_a_wheel_holds_the_package_the_scripts_and_the_recipes(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {name.partition('/')[0] for name in names if '.dist-info' not in name} == {'timm_synermix'}
        files = [
            *('train.py', 'validate.py', 'py.typed', 'report/templates/report.html', 'report/templates/report.css'),
            *(path.relative_to(ROOT / 'timm_synermix').as_posix() for path in (ROOT / 'timm_synermix').rglob('*.py')),
        ]
        for file in files:
            assert archive.read(f'timm_synermix/{file}') == (ROOT / 'timm_synermix' / file).read_bytes()
        recipes = [path.relative_to(ROOT).as_posix() for path in (ROOT / 'hparams').rglob('*.yaml')]
        for file in recipes:
            assert archive.read(f'timm_synermix/{file}') == (ROOT / file).read_bytes()
        assert len(recipes) == sum('/hparams/' in name and name.endswith('.yaml') for name in names) > 40
        (entry_points,) = (name for name in names if name.endswith('entry_points.txt'))
        assert b'timm-synermix-train = timm_synermix.entry:train' in archive.read(entry_points)
        (metadata,) = (name for name in names if name.endswith('METADATA'))
        metadata = email.message_from_bytes(archive.read(metadata))
    assert metadata['Version'] == timm_synermix.__version__
    assert metadata['Description-Content-Type'] == 'text/markdown'
    assert metadata.get_payload().strip() == (ROOT / 'README.md').read_text().strip()
    assert all(re.search('>=|==', need) for need in metadata.get_all('Requires-Dist') if 'extra' not in need)


def test_an_installed_recipe_is_found_by_its_name(wheel, tmp_path):
    """Outside of any clone: with or without ending, as a base of a file of the user, and a file counts more."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / 'site')
    work = tmp_path / 'work'
    work.mkdir()
    (work / 'mine.yaml').write_text('base: cifar100/synermix_mixup\nlr: 0.5\n')
    (work / 'digits.yaml').write_text('lr: 0.25\n')

    configs = [
        'cifar100/synermix_mixup',
        'cifar100/synermix_mixup.yaml',
        'mine.yaml',
        'digits.yaml',
        'digits',
        'no/one',
    ]
    code = f"""
import json, timm_synermix
from timm_synermix.cli.config import load_config
from timm_synermix.cli.train_args import create_parsers
def load(config):
    try:
        return load_config(create_parsers()[1], config)
    except ValueError as error:
        return str(error)
print(json.dumps([timm_synermix.__file__, *map(load, {configs})]))"""
    env = {**os.environ, 'PYTHONPATH': str(tmp_path / 'site')}
    run = subprocess.run([sys.executable, '-c', code], cwd=work, env=env, capture_output=True, text=True, check=True)
    place, named, with_ending, mine, file, digits, unknown = json.loads(run.stdout)
    assert place.startswith(str(tmp_path))
    recipe = yaml.safe_load((ROOT / 'hparams' / 'cifar100' / 'none.yaml').read_text())
    assert named == with_ending
    assert (named['model'], named['synermix'], named['mixup']) == (recipe['model'], True, 1.0)
    assert mine == {**named, 'lr': 0.5}
    assert file == {'lr': 0.25}
    assert digits['dataset'] == 'sklearn/digits'
    assert unknown.startswith('cannot read no/one: ')
    assert all(name in unknown for name in ('digits', 'cifar100/synermix_mixup', 'imagenet/resnet50_a1'))


@pytest.mark.slow
def test_the_tests_of_the_source_distribution_run_there(source_tree):
    files = [path.name for path in (ROOT / 'tests').rglob('*') if path.is_file() and '__pycache__' not in path.parts]
    assert sorted(files) == sorted(path.name for path in (source_tree / 'tests').rglob('*') if path.is_file())
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    tests = ['test_structure.py', 'test_docs.py', 'test_cli.py', 'test_recipes.py']
    command = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider']
    run = subprocess.run(
        [*command, *(f'tests/{name}' for name in tests)], cwd=source_tree, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:]
    collected = subprocess.run(
        [*command, '--collect-only', '-m', ''], cwd=source_tree, env=env, capture_output=True, text=True
    )
    assert collected.returncode == 0, collected.stdout[-3000:]


@pytest.fixture
def setup_py(monkeypatch):
    """What setup.py defines, and what it hands to setuptools as 'given'."""
    given = {}
    monkeypatch.setattr('setuptools.setup', lambda **kwargs: given.update(kwargs))
    monkeypatch.chdir(ROOT)
    return {**runpy.run_path(str(ROOT / 'setup.py')), 'given': given}


def test_readme_of_pypi_has_absolute_links(setup_py):
    """With the address of a repository; every link of README that is one of a file is a file of the repository."""
    readme, address = (ROOT / 'README.md').read_text(), 'https://example.org/name'
    page = setup_py['on_pypi'](readme, address, '1.2')
    links = re.findall(r'\]\((.*?)\)', page)
    assert links
    assert len(links) == readme.count('](')
    for link in links:
        assert re.match('https?://|#', link), link
        if link.startswith(address):
            assert (ROOT / link.removeprefix(address).split('/', 3)[3].partition('#')[0]).exists(), link
    assert '![' in page
    assert all(link.startswith(f'{address}/raw/v1.2/') for link in re.findall(r'!\[[^]]*\]\((.*?)\)', page))
    assert f']({address}/blob/v1.2/docs/method.md#hyper-parameters)' in page
    assert setup_py['on_pypi'](readme, '', '1.2') == readme
    assert setup_py['given']['version'] == timm_synermix.__version__
    assert bool(setup_py['given']['project_urls']) == bool(setup_py['REPOSITORY'])


def test_the_changelog_has_the_usual_form():
    """Keep a Changelog's: what is not released, then versions with their dates; kinds of changes in each."""
    text = (ROOT / 'CHANGELOG.md').read_text()
    versions = re.findall(r'^## (.*)$', text, re.MULTILINE)
    assert versions[0] == '[Unreleased]'
    assert all(re.fullmatch(r'\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d', version) for version in versions[1:])
    kinds = re.findall(r'^### (.*)$', text, re.MULTILINE)
    assert {'Added'} <= set(kinds) <= {'Added', 'Changed', 'Deprecated', 'Removed', 'Fixed', 'Security'}


def test_setup_py_works():
    command = [sys.executable, 'setup.py', '--name']
    assert (
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip() == 'timm-synermix'
    )


def test_what_is_slow_to_import_waits_until_it_is_used():
    """The flags need no torch; training without cohesion metrics and trackers needs no torchmetrics, no matplotlib."""
    modules = 'sys, timm_synermix.cli, timm_synermix.cli.validate_args, timm_synermix.entry'
    before_torch = f'import {modules}; assert "torch" not in sys.modules'
    lean = (
        'import sys, timm; before = set(sys.modules); import timm_synermix.train; '  # timm imports wandb where it is
        'assert not {"torchmetrics", "matplotlib", "sklearn", "wandb"} & (set(sys.modules) - before)'
    )
    for code in (before_torch, lean):
        subprocess.run([sys.executable, '-c', code], check=True)


def test_every_public_name_is_where_the_package_says():
    assert set(timm_synermix.__all__) == set(timm_synermix._MODULES) <= set(dir(timm_synermix))
    for name in timm_synermix.__all__:
        assert getattr(timm_synermix, name) is not None
    assert timm_synermix.data.SupplementBatchSampler is timm_synermix.SupplementBatchSampler
    with pytest.raises(AttributeError, match='no_such_name'):
        timm_synermix.no_such_name  # noqa: B018


def test_installed_scripts_start():
    for script in ('train', 'validate'):
        command = [sys.executable, '-m', f'timm_synermix.{script}', '--help']
        assert 'usage: ' in subprocess.run(command, check=True, capture_output=True, text=True).stdout
