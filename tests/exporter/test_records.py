"""The records that plug-ins hand into a plan."""

from __future__ import annotations

import dataclasses

import pytest

from lvlm_edge.exporter import families, lowerings, methods
from lvlm_edge.exporter.planning import Family, Lowering, Method


@pytest.mark.parametrize(
    ("load", "names", "record"),
    [
        (methods.load, methods.names, Method),
        (families.load, families.names, Family),
        (lowerings.load, lowerings.names, Lowering),
    ],
)
def test_a_file_ends_with_a_record_of_its_name(load, names, record):
    for name in names():
        found = load(name)

        assert isinstance(found, record)
        assert found.name == name


@pytest.mark.parametrize("record", [methods.load("none"), families.load("llava"), lowerings.load("legacy")])
def test_a_misspelt_field_is_an_error(record):
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    first, *_ = fields
    misspelt = {f"{name}s" if name == first else name: value for name, value in fields.items()}

    with pytest.raises(TypeError, match=f"unexpected keyword argument '{first}s'"):
        type(record)(**misspelt)


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        methods.load("none").one_image = True
