"""Name -> implementation, filled by importing every module of a room.

Adding a loss, a selector or a model family is adding one file: it decorates itself with
``REGISTRY.register(name)`` and `Registry.discover` finds it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Generic, TypeVar

from megatron_miniplm.core.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """One kind of exchangeable part, looked up by name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: enter an implementation under `name`; a name is taken once."""

        def enter(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return enter

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise ConfigError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}")
        return self._items[name]

    def names(self) -> list[str]:
        """Registered names, sorted."""
        return sorted(self._items)

    @staticmethod
    def discover(package: ModuleType) -> None:
        """Import every module of a room, so that each enters its registry."""
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
