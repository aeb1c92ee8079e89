"""Keyword options of public functions, folded into settings."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lvlm_edge.exporter.planning import fold_all
from lvlm_edge.runtime.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Settings:
    rounds: int = 7
    seed: int = 0


def test_what_is_not_given_has_its_default():
    assert fold_all(Settings, {"seed": 3}, "bench") == Settings(rounds=7, seed=3)


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(
        UsageError, match=r"^bench: option 'round' is not known; did you mean rounds\? known: rounds, seed$"
    ):
        fold_all(Settings, {"round": 3}, "bench")
