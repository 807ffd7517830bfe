"""A script of somebody else: its modules, the names it uses, and putting others in their place."""

from __future__ import annotations

import ast
import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any


class LaunchError(Exception):
    """A script cannot be run with SynerMix. The message says why, in one line."""


class Script:
    """A script, by its path. What is replaced in it stays so until `restore`."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).resolve()
        if not self.path.is_file():
            raise LaunchError(f'there is no script {path}')
        self._restore = ExitStack()

    def run(self) -> None:
        """Call `main()` of the script, loaded as the module of its name; without one run it as `python` does.

        Raises:
            LaunchError: The script, or what it imports, is not there.
        """
        if not self._has_main():
            runpy.run_path(str(self.path), run_name='__main__')
            return
        spec = importlib.util.spec_from_file_location(self.path.stem, self.path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        before = sys.modules.get(self.path.stem)
        sys.modules[self.path.stem] = module
        self._restore.callback(partial(_put_back, sys.modules, self.path.stem, before))
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            raise LaunchError(f'{self.path} cannot be loaded: {error}') from error
        module.main()

    def _has_main(self) -> bool:
        """Whether the script defines a main() that can be called without arguments."""
        for node in ast.parse(self.path.read_bytes()).body:
            if isinstance(node, ast.FunctionDef) and node.name == 'main':
                return len(node.args.posonlyargs + node.args.args) == len(node.args.defaults)
        return False

    def modules(self) -> Iterator[ModuleType]:
        """The script, and what it has imported from its own folder."""
        folder = f'{self.path.parent}{os.sep}'
        for module in list(sys.modules.values()):
            if (getattr(module, '__file__', None) or '').startswith(folder) and not _is_ours(module):
                yield module

    def mentions(self, name: str) -> bool:
        """Whether a name occurs in the code of the script or of its modules, however it is imported."""
        files = {self.path, *(Path(str(module.__file__)) for module in self.modules())}
        return any(
            name in _names(compile(file.read_bytes(), str(file), 'exec')) for file in files if file.suffix == '.py'
        )

    def replace(self, original: Any, replacement: Any) -> None:
        """Put an object in the place of another one, under every name that a module has for it."""
        for module in list(sys.modules.values()):
            if not isinstance(module, ModuleType) or _is_ours(module):
                continue
            for name, value in list(vars(module).items()):
                if value is original:
                    self.set_attribute(module, name, replacement)

    def set_attribute(self, holder: Any, name: str, value: Any) -> None:
        """Set an attribute until `restore`."""
        self._restore.callback(setattr, holder, name, getattr(holder, name))
        setattr(holder, name, value)

    def own(self, name: str) -> list[Callable[..., Any]]:
        """The functions of that name which the script defines itself."""
        functions = [vars(module).get(name) for module in self.modules()]
        return list({id(f): f for f in functions if callable(f) and not f.__module__.startswith('timm.')}.values())

    def restore(self) -> None:
        """Take everything back that was replaced."""
        self._restore.close()


def _put_back(modules: dict[str, ModuleType], name: str, before: ModuleType | None) -> None:
    if before is None:
        modules.pop(name, None)
    else:
        modules[name] = before


def _is_ours(module: ModuleType) -> bool:
    return module.__name__.partition('.')[0] == 'timm_synermix'


def _names(code: CodeType) -> set[str]:
    """The names in a code object, and in those inside of it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))
