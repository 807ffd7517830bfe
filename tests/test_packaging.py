import subprocess
import sys
import zipfile

from conftest import ROOT


def test_a_wheel_holds_the_package_and_both_scripts(tmp_path):
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob('timm_synermix-*.whl')
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {name.partition('/')[0] for name in names if '.dist-info' not in name} == {'timm_synermix'}
        for script in ('train.py', 'validate.py'):  # links in the repository
            assert archive.read(f'timm_synermix/{script}') == (ROOT / script).read_bytes()
        (entry_points,) = (name for name in names if name.endswith('entry_points.txt'))
        assert b'timm-synermix-train = timm_synermix.train:main' in archive.read(entry_points)


def test_setup_py_works():
    command = [sys.executable, 'setup.py', '--name']
    assert (
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip() == 'timm-synermix'
    )


def test_installed_scripts_start():
    for script in ('train', 'validate'):
        command = [sys.executable, '-m', f'timm_synermix.{script}', '--help']
        assert 'usage: ' in subprocess.run(command, check=True, capture_output=True, text=True).stdout
