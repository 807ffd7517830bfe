import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

import timm_synermix


def test_a_wheel_holds_the_package_and_both_scripts(tmp_path):
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob('timm_synermix-*.whl')
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {name.partition('/')[0] for name in names if '.dist-info' not in name} == {'timm_synermix'}
        for file in (
            'train.py',
            'validate.py',
            'py.typed',
            'report/templates/report.html',
            'report/templates/report.css',
        ):
            name = f'timm_synermix/{file}'
            assert archive.read(name) == (ROOT / name).read_bytes()
        (entry_points,) = (name for name in names if name.endswith('entry_points.txt'))
        assert b'timm-synermix-train = timm_synermix.entry:train' in archive.read(entry_points)


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
