"""Profiles: every shipped file loads, and a wrong one is named with its key."""

from __future__ import annotations

import pytest

from lvlm_edge.exporter import profiles
from lvlm_edge.runtime.errors import UnsupportedError

LINES = {
    "name": 'name = "toy"',
    "description": 'description = "A toy"',
    "backend": 'backend = "ort"',
    "lowering": 'lowering = "modern"',
    "dtypes": 'dtypes = ["float32"]',
    "default_dtype": 'default_dtype = "float32"',
}


def text(**changed: str) -> str:
    return "\n".join({**LINES, **changed}.values())


def test_cpu_is_a_known_profile():
    profile = profiles.load("cpu")

    assert "cpu" in profiles.names()
    assert (profile.backend, profile.lowering) == ("ort", "modern")
    assert (profile.dtypes, profile.default_dtype) == (("float32", "float16"), "float32")


@pytest.mark.parametrize("name", profiles.names())
def test_every_shipped_profile_loads_under_its_own_name(name):
    assert profiles.load(name).name == name


def test_an_unknown_profile_names_the_nearest_and_exits_with_3():
    with pytest.raises(UnsupportedError, match="did you mean cpu") as caught:
        profiles.load("cpuu")

    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["../pyproject", "cpu.toml", "", "/etc/passwd"])
def test_a_profile_is_a_name_and_never_a_path(name):
    with pytest.raises(UnsupportedError):
        profiles.load(name)


def test_a_complete_file_is_accepted():
    assert profiles.parse("toy", text()).description == "A toy"


@pytest.mark.parametrize("key", LINES)
def test_a_missing_key_is_named_with_its_file(key):
    with pytest.raises(profiles.ProfileError, match=rf"profiles/toy\.toml: key '{key}' is missing"):
        profiles.parse("toy", text(**{key: ""}))


def test_an_unknown_key_is_named_with_the_nearest_known_one():
    with pytest.raises(profiles.ProfileError, match=r"profiles/toy\.toml: key 'backnd' .*did you mean backend"):
        profiles.parse("toy", text(backend='backnd = "ort"'))


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("name", 'name = "other"'),
        ("description", "description = 1"),
        ("backend", 'backend = "tflite"'),
        ("lowering", 'lowering = "newest"'),
        ("dtypes", 'dtypes = "float32"'),
        ("dtypes", "dtypes = []"),
        ("dtypes", 'dtypes = ["float32", "float8"]'),
        ("default_dtype", 'default_dtype = "float16"'),
    ],
)
def test_a_wrong_value_is_named_with_its_key(key, line):
    with pytest.raises(profiles.ProfileError, match=rf"profiles/toy\.toml: key '{key}'"):
        profiles.parse("toy", text(**{key: line}))


def test_a_file_that_is_not_toml_is_named():
    with pytest.raises(profiles.ProfileError, match=r"profiles/toy\.toml: is not TOML"):
        profiles.parse("toy", "name = cpu")
