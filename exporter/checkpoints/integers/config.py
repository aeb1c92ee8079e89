"""Fields of a `quantization_config`, each checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import regex

from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.runtime.errors import UnsupportedError


def expect(where: str, name: str, value: Any, known: Sequence[Any]) -> None:
    if isinstance(value, bool) is not isinstance(known[0], bool) or value not in known:
        wanted = " or ".join(map(str, known))
        raise UnsupportedError(
            f"{where}: {name} is {value!r}, which is not supported; expected {wanted}; export the "
            "unquantised checkpoint"
        )


def entries(where: str, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key} is {value!r}, expected a JSON object; correct it")
    return value


def names(where: str, config: Mapping[str, Any], key: str) -> list[str]:
    """Names of modules and `re:` patterns of them."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(entry, str) and _compiles(entry) for entry in value):
        raise CheckpointError(f"{where}: {key} is {value!r}, expected a list of names and re: patterns; correct it")
    return value


def _compiles(entry: str) -> bool:
    try:
        regex.compile(entry.removeprefix("re:") if entry.startswith("re:") else "")
    except regex.error:
        return False
    return True


def group_size(where: str, value: Any) -> int | None:
    """Input channels that share a scale; None for -1, which means all of them."""
    if type(value) is not int or (value < 1 and value != -1):
        raise CheckpointError(f"{where}: group_size is {value!r}, expected a whole number above 0, or -1; correct it")
    return None if value == -1 else value


def flag(where: str, config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} is {value!r}, expected true or false; correct it")
    return value
