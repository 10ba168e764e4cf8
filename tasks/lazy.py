"""Modules that are loaded when they are first used.

`pyflyte run` imports every task to build the graph; with torch, transformers, Ray and MLflow behind them that would be
most of the time of a run that finds all its results in the cache. Only here are modules of lib loaded late: at the top of
a task's file, under a name, so that layers, cache keys and types see them like any other import.
"""

import importlib
import importlib.util
import sys
from typing import Any


class LazyModule:
    """Stands for a module of the project until one of its names is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # introspection, which must not load anything
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


def lazy(name: str) -> Any:
    """The module `name`, loaded when it is used; at once where `pyflyte run --remote` sends what has been imported.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    if _is_sending(sys.argv):
        return importlib.import_module(name)
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"no module named {name}", name=name)
    return LazyModule(name)


def _is_sending(arguments: list[str]) -> bool:
    return "run" in arguments and bool({"--remote", "-r"} & set(arguments))
