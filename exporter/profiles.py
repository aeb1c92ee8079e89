"""Profile: one file of `lvlm_edge.profiles`, validated."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from lvlm_edge.runtime.errors import LvlmEdgeError, UnsupportedError, nearest

CHOICES = {
    "backend": ("ort", "trt", "trt-rtx"),
    "lowering": ("modern", "legacy"),
    "dtypes": ("float32", "float16", "bfloat16"),
}


class ProfileError(LvlmEdgeError):
    """A profile file is malformed."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A device: what runs the graphs there, and in which form it wants them.

    Attributes:
        name: the file's name without `.toml`.
        description: one line for people.
        backend: what runs the graphs: ort, trt or trt-rtx.
        lowering: operators the graphs use: modern (opset 24) or legacy (opset 18).
        dtypes: dtypes the device runs.
        default_dtype: the one of them used when none is asked for.
    """

    name: str
    description: str
    backend: str
    lowering: str
    dtypes: tuple[str, ...]
    default_dtype: str


def names() -> tuple[str, ...]:
    """The known profiles, sorted."""
    files = resources.files("lvlm_edge.profiles").iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")))


def load(name: str) -> Profile:
    """The profile of that name.

    Raises:
        UnsupportedError: there is no such profile.
        ProfileError: its file is malformed.
    """
    if name not in names():
        raise UnsupportedError(f"profile: {name!r} is not known; {nearest(name, names())}")
    return parse(name, resources.files("lvlm_edge.profiles").joinpath(f"{name}.toml").read_text(encoding="utf-8"))


def parse(name: str, text: str) -> Profile:
    """The profile in a TOML text.

    Args:
        name: the file's name without `.toml`; the text has to carry the same.
        text: the file's content.

    Raises:
        ProfileError: not TOML, a missing or unknown key, or a value that is not one of the choices.
    """
    file = f"profiles/{name}.toml"
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{file}: is not TOML ({error}); correct the file") from error
    expected = [f.name for f in fields(Profile)]
    for key in data:
        if key not in expected:
            raise ProfileError(f"{file}: key {key!r} is not known, {nearest(key, expected)}; rename or remove it")
    for key in expected:
        if key not in data:
            raise ProfileError(f"{file}: key {key!r} is missing; add it")
        _check(file, key, data[key])
    if data["name"] != name:
        raise ProfileError(f"{file}: key 'name' is {data['name']!r}, expected {name!r}; rename one of them")
    if data["default_dtype"] not in data["dtypes"]:
        found = data["default_dtype"]
        raise ProfileError(f"{file}: key 'default_dtype' is {found!r}, expected one of {data['dtypes']}; choose one")
    return Profile(**{**data, "dtypes": tuple(data["dtypes"])})


def _check(file: str, key: str, value: Any) -> None:
    """Raise ProfileError unless the value has its key's type and is one of its key's choices."""
    many = key == "dtypes"
    if many and not (isinstance(value, list) and value):
        raise ProfileError(f"{file}: key {key!r} is {value!r}, expected a list of strings; correct it")
    for item in value if many else [value]:
        if not isinstance(item, str) or not item:
            raise ProfileError(f"{file}: key {key!r} holds {item!r}, expected a string; correct it")
        if key in CHOICES and item not in CHOICES[key]:
            raise ProfileError(f"{file}: key {key!r} holds {item!r}; {nearest(item, CHOICES[key])}")
