"""A loader around another one."""

from __future__ import annotations

from typing import Any


class WrappedLoader:
    """Passes over a loader are a subclass's own, by `__iter__`; in all else it is the loader."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__['_loader'], name)
