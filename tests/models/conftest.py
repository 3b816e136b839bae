"""timm without torchvision: stand-ins for the names that timm takes from there and no model of ours uses."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence


class _AnyClass(type):
    """A class that has every attribute, such as the members of an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _AnyModule(ModuleType):
    """A package that has every class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _AnyClass(name, (), {"__module__": self.__name__}))
        return getattr(self, name)


class _StandIn(MetaPathFinder, Loader):
    """Finds torchvision and all within."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        inside = fullname.partition(".")[0] == "torchvision"
        return ModuleSpec(fullname, self, is_package=True) if inside else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _AnyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """The module timm, never skipped: `make setup` installs it without torchvision."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_StandIn())
    return importlib.import_module("timm")
