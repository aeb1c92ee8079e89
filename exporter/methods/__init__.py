"""One file per reduction method; the record `planning.Method` says what a method has."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from lvlm_edge.exporter.planning import Method
from lvlm_edge.runtime.errors import UnsupportedError, nearest


def names() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]


def load(name: str) -> Method[Any]:
    """A method by name.

    Raises:
        UnsupportedError: there is none of that name.
    """
    if name not in names():
        raise UnsupportedError(f"method: {name!r} is not known; {nearest(name, names())}")
    found = importlib.import_module(f"{__name__}.{name}").METHOD
    assert isinstance(found, Method)
    return found
