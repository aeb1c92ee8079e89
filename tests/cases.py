"""Which cases of a test run often, and which with `make slow` alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(every: Iterable[tuple[Any, ...]], often: Collection[tuple[Any, ...]]) -> list[Any]:
    """Parameters of a test: every case, slow but for those that run often."""
    every = list(every)
    assert set(often) <= set(every), set(often) - set(every)
    return [pytest.param(*case, marks=() if case in often else pytest.mark.slow) for case in every]


def both(every: Iterable[tuple[Any, ...]], traced: Collection[tuple[Any, ...]]) -> list[Any]:
    """Parameters of a test with the fixture `exported` as the last: every case as bodies, and as traced graphs.

    Args:
        traced: cases whose traced graphs are run often.
    """
    every = list(every)
    graphs = [pytest.param(*case.values, "graphs", marks=case.marks) for case in some(every, traced)]
    return [pytest.param(*case, "bodies") for case in every] + graphs
