"""The recipes that come with the package, by name: `--config cifar100/synermix_mixup`."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def recipe_folder() -> Path:
    """The folder of the recipes: hparams/ of the installed package, or the one beside it in a clone."""
    installed = _PACKAGE / 'hparams'
    return installed if installed.is_dir() else _PACKAGE.parent / 'hparams'


def recipe_names() -> list[str]:
    """The names of all recipes: their paths in hparams/ without the ending."""
    folder = recipe_folder()
    return sorted(path.relative_to(folder).with_suffix('').as_posix() for path in folder.rglob('*.yaml'))


def find_config(name: str, folder: str = '') -> str:
    """The file that a config's name means: a file of that name, or else a recipe of the package.

    Args:
        name: A path, or the name of a recipe, with or without its ending.
        folder: Where a path begins.

    Raises:
        ValueError: There is neither; names the recipes.
    """
    path, names = os.path.join(folder, name), recipe_names()
    if os.path.exists(path) and not os.path.isdir(path):
        return path
    if name.removesuffix('.yaml') in names:
        return str(recipe_folder() / name.removesuffix('.yaml')) + '.yaml'
    if os.path.isdir(path):
        return path  # which cannot be read, as whoever reads it will say
    raise ValueError(f'cannot read {path}: no such file, and no recipe of that name; there are {", ".join(names)}')
