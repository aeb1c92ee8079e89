"""Packaging: pyproject.toml lists every folder that holds code, and data and type markers travel along."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = SETUP["tool"]["setuptools"]
FOLDERS = SETUPTOOLS["package-dir"]


def folder_of(package: str) -> Path:
    top = ".".join(package.split(".")[:2])
    return ROOT / FOLDERS[top] / Path(*package.split(".")[2:])


def test_pyproject_lists_every_folder_that_holds_python_files():
    found = {
        ".".join([top, *file.parent.relative_to(ROOT / folder).parts])
        for top, folder in FOLDERS.items()
        for file in (ROOT / folder).rglob("*.py")
    }

    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_every_package_says_what_it_holds(package):
    source = (folder_of(package) / "__init__.py").read_text(encoding="utf-8")

    assert ast.get_docstring(ast.parse(source)), f"{package}: __init__.py has no docstring"


def test_every_file_without_code_is_package_data():
    for top, folder in FOLDERS.items():
        patterns = SETUPTOOLS["package-data"][top]
        listed = {file for pattern in patterns for file in (ROOT / folder).glob(pattern)}
        data = {
            file
            for file in (ROOT / folder).rglob("*")
            if file.is_file() and file.suffix not in {".py", ".pyc"} and not file.name.startswith(".")
        }

        assert data == listed, f"{top}: package-data of pyproject.toml does not match the folder"


@pytest.mark.parametrize("package", ["lvlm_edge.exporter", "lvlm_edge.runtime"])
def test_the_packages_are_marked_as_typed(package):
    assert (folder_of(package) / "py.typed").exists()


def test_nothing_makes_lvlm_edge_more_than_a_namespace():
    import lvlm_edge

    assert lvlm_edge.__file__ is None
