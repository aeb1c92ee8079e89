"""Keyword options of a public function, folded into the frozen dataclass that holds its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from lvlm_edge.runtime.errors import UsageError, nearest

T = TypeVar("T")


def fold(kind: type[T], options: Mapping[str, Any], where: str) -> T:
    """The settings that the options give, defaults for the rest.

    Args:
        kind: a dataclass whose fields have defaults.
        where: the function's name, which messages begin with.

    Raises:
        UsageError: an option that is no field.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise UsageError(f"{where}: option {name!r} is not known; {nearest(name, known)}")
    return kind(**options)
