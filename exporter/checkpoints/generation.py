"""generation_config.json -> how answers are drawn by default, as transformers' `generate` draws them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, read_json
from lvlm_edge.runtime.bundle import Generation

FILE = "generation_config.json"

# What transformers takes for a field that is missing or null (`GenerationConfig._get_default_generation_params`).
_DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number from 0", lambda value: value >= 0),
    "top_k": ("a whole number from 0", lambda value: type(value) is int and value >= 0),
    "top_p": ("a number above 0 and up to 1", lambda value: 0 < value <= 1),
    "repetition_penalty": ("a number above 0", lambda value: value > 0),
}
# Fields that change answers too, with the values that change nothing.
_OTHERS: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0,), "no_repeat_ngram_size": (0,), "min_length": (0,),
    "min_new_tokens": (0,), "encoder_repetition_penalty": (1,), "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],), "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "sequence_bias": ([], {}), "guidance_scale": (1,),
    "exponential_decay_length_penalty": (), "watermarking_config": (), "stop_strings": ([],),
}  # fmt: skip
_OTHERS_OF_SAMPLING = {"min_p": (0,), "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": ()}


def read(folder: Path) -> Generation:
    """What the file says; greedy where there is none, or where it does not ask for sampling.

    Raises:
        CheckpointError: a field is out of its range.
    """
    given = _given(folder)
    values = _DEFAULTS | {name: given[name] for name in _DEFAULTS if name in given}
    for name, (expected, holds) in _RANGES.items():
        value = values[name]
        if type(value) not in (int, float) or not math.isfinite(value) or not holds(value):
            raise CheckpointError(f"{folder / FILE}: {name} is {value!r}, expected {expected}; correct it")
    penalty = float(values["repetition_penalty"])
    if not _samples(folder, given):
        return Generation(repetition_penalty=penalty)
    return Generation(
        temperature=float(values["temperature"]),
        top_k=values["top_k"],
        top_p=float(values["top_p"]),
        repetition_penalty=penalty,
    )


def not_applied(folder: Path) -> list[str]:
    """Names of fields that change the answers of transformers, and not those of a bundle."""
    given = _given(folder)
    known = _OTHERS | (_OTHERS_OF_SAMPLING if _samples(folder, given) else {})
    return [name for name, neutral in known.items() if name in given and given[name] not in neutral]


def _given(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    return {name: value for name, value in read_json(path).items() if value is not None} if path.is_file() else {}


def _samples(folder: Path, given: dict[str, Any]) -> bool:
    found = given.get("do_sample", False)
    if not isinstance(found, bool):
        raise CheckpointError(f"{folder / FILE}: do_sample is {found!r}, expected true or false; correct it")
    return found
