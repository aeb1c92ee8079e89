"""JSON values to annotated dataclasses, strictly: no field missing, unknown or of another type."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar


def parse(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as an annotated type: dataclasses, tuples, dicts, unions with None, and plain types."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or isinstance(kind, TypeVar):  # what a type variable stands for, its owner parses
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return parse(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        return _parse_fields(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{where} is {type(value).__name__}, expected a list")
        kinds = args[:1] * len(value) if args[1:] == (...,) else args
        if len(kinds) != len(value):
            raise TypeError(f"{where} has {len(value)} entries, expected {len(kinds)}")
        return tuple(parse(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))  # noqa: B905
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise TypeError(f"{where} is {type(value).__name__}, expected an object")
        return {str(k): parse(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, expected a finite number")
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{where} is {type(value).__name__}, expected {kind.__name__}")
    return value


def _parse_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"{where} is {type(value).__name__}, expected an object")
    hints = typing.get_type_hints(kind)
    missing = [name for name in hints if name not in value]
    unknown = [name for name in value if name not in hints]
    if missing or unknown:
        raise TypeError(
            f"{where} lacks {', '.join(missing) or 'nothing'}, has unknown {', '.join(unknown) or 'nothing'}"
        )
    return kind(**{name: parse(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
