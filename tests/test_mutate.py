"""The changes that `tests/mutate.py` makes, and the places where it makes none."""

from __future__ import annotations

import ast
import textwrap

import pytest

from tests import mutate


def changes(source: str) -> set[str]:
    source = textwrap.dedent(source)
    found = mutate.Changes("file.py", source).found
    for each in found:
        changed = source.encode()[: each.start] + each.new.encode() + source.encode()[each.end :]
        ast.parse(changed)  # what does not compile is no mutant
    return {f"{' '.join(each.old.split())} -> {each.new.strip()}" for each in found}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = a < b", ["< -> <=", "< -> >="]),
        ("x = a not in b", ["not in -> in"]),
        ("x = a - b", ["- -> +"]),
        ("x = ('é', a - b)", ["- -> +"]),
        ("x = a and b or c", ["and -> or", "or -> and"]),
        ("x = 0", ["0 -> 1"]),
        ("x = 7", ["7 -> 8", "7 -> (6)"]),
        ("x = True", ["True -> False"]),
        ("x = not a", ["not -> "]),
        ("if a:\n    b.c = d", ["a -> (not a)", "b.c = d -> pass"]),
        ("a(b)", ["a(b) -> pass"]),
        ("a += b", ["a += b -> pass"]),
        ("x = a.reshape(2, -1)", ["2 -> 3", "2 -> (1)", "1 -> (0)"]),
        ("x = zip(a, b, strict=False)", ["False -> True"]),
        ("x = file.read(MOST + 1)", ["+ -> -", "1 -> 2", "1 -> (0)"]),
        ("raise E(f'{1 + 2}')", ["raise E(f'{1 + 2}') -> pass"]),
    ],
    ids=str,
)
def test_changes_are_small(source, found):
    assert changes(source) == set(found)


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring."""',
        "x: list[1] = a",
        "if TYPE_CHECKING:\n    x = 1",
        "log.info(1 + 2)",
        "warnings.warn(1)",
        "assert a < 1",
        "x = f'{a - 1}'",
        "x = 'a' + b",
        "x = {'help': 1}",
        "x = 1000",
        "x = file.read(1 << 20)",
        "x = zip(a, b, strict=True)",
        "x = secrets.token_hex(8)",
        "x = json.dumps(a, indent=1)",
        "def f() -> UsageError:\n    return a + 1",
    ],
)
def test_nothing_is_changed_that_nobody_can_tell(source):
    assert changes(source) == set()


def test_changes_that_were_found_to_be_none_are_still_there_to_be_left_out():
    for file, lines in mutate.SAME.items():
        source = (mutate.ROOT / file).read_text("utf-8")
        every, left = (
            [(m.line, m.old.strip(), m.new.strip()) for m in mutate.Changes(name, source).found]
            for name in ("other", file)
        )
        for begins, old, new in lines:
            at = [i for i, line in enumerate(source.splitlines(), 1) if line.strip().startswith(begins)]
            assert at, (file, begins)
            assert all((line, old, new) in every and (line, old, new) not in left for line in at), (file, begins)


def test_every_file_that_is_changed_has_tests():
    for file in mutate.selected(mutate.MUTATED):
        selections = mutate.selections(file)
        names = [name for selection in selections for name in selection if name.endswith(".py")]
        assert names
        assert all((mutate.ROOT / name).is_file() for name in names)
