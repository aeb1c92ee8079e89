"""One file per lowering: how decoder arithmetic and cache updates are written as ONNX operators.

The record `planning.Lowering` says what a lowering has. Methods and families know nothing of lowerings.
"""

from __future__ import annotations

import importlib
import pkgutil

from lvlm_edge.exporter.planning import Lowering
from lvlm_edge.runtime.errors import UnsupportedError, nearest


def names() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(__path__)]


def load(name: str) -> Lowering:
    """A lowering by name.

    Raises:
        UnsupportedError: there is none of that name.
    """
    if name not in names():
        raise UnsupportedError(f"lowering: {name!r} is not known; {nearest(name, names())}")
    found = importlib.import_module(f"{__name__}.{name}").LOWERING
    assert isinstance(found, Lowering)
    return found
