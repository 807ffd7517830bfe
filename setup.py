"""The parts of the build that are not plain data; the rest is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# The address of the repository, as https://HOST/OWNER/NAME. While it is empty, the links of README stay relative, which
# nobody can follow on PyPI, and the project has no links there.
REPOSITORY = ''

ROOT = Path(__file__).resolve().parent


def on_pypi(readme: str, repository: str, version: str) -> str:
    """README as a page that stands alone: links and pictures of files are addresses of the version's tag."""
    if not repository:
        return readme

    def absolute(match: re.Match) -> str:
        mark, text, target = match.groups()
        return f'{mark}[{text}]({repository}/{"raw" if mark else "blob"}/v{version}/{target})'

    return re.sub(r'(!?)\[([^]]*)\]\((?!https?:|#)([^)\s]+)\)', absolute, readme)


def version() -> str:
    """The version, which stands in timm_synermix/__init__.py alone."""
    text = (ROOT / 'timm_synermix' / '__init__.py').read_text(encoding='utf-8')
    return re.findall(r"^__version__ = '(.+)'$", text, re.MULTILINE)[0]


setup(
    version=version(),
    long_description=on_pypi((ROOT / 'README.md').read_text(encoding='utf-8'), REPOSITORY, version()),
    long_description_content_type='text/markdown',
    project_urls={'Source': REPOSITORY, 'Changelog': f'{REPOSITORY}/blob/HEAD/CHANGELOG.md'} if REPOSITORY else {},
    # Recipes stay at the top of the repository, and are a part of the installed package.
    packages=[*find_packages(include=['timm_synermix*']), 'timm_synermix.hparams'],
    package_dir={'timm_synermix.hparams': 'hparams'},
    package_data={
        'timm_synermix': ['py.typed', 'report/templates/*'],
        'timm_synermix.hparams': ['**/*.yaml', 'README.md'],
    },
    include_package_data=False,
)
