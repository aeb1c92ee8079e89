"""One file per lowering: how decoder arithmetic and cache updates are written as ONNX operators.

A lowering has `OPSET`, `rms_norm`, `layer_norm`, `rotate`, `attend`, and what a graph takes, returns and does with its
caches: `prefill_inputs`, `prefill_outputs`, `store` for a prompt, `decode_inputs`, `decode_outputs`, `append` for one
token. Methods and families know nothing of lowerings; `blocks` asks for the plan's.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from lvlm_edge.runtime.errors import UnsupportedError, nearest


def names() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(__path__)]


def load(name: str) -> ModuleType:
    """A lowering by name.

    Raises:
        UnsupportedError: there is none of that name.
    """
    if name not in names():
        raise UnsupportedError(f"lowering: {name!r} is not known; {nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")
