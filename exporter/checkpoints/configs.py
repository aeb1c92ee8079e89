"""A decoder from its part of a config.json, whatever family's layout it comes in."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.checkpoints.spec import DecoderSpec
from lvlm_edge.runtime.errors import UnsupportedError, nearest


@dataclass(frozen=True)
class Kind:
    """What a kind of decoder has, beside what its config says.

    Attributes:
        window: `no`, `always` (config's `sliding_window`), or `asked` (where `use_sliding_window` is true, in layers
            from `max_window_layers` on, or in those that `layer_types` names).
        qkv_bias: queries, keys and values have biases and the output has none; else `attention_bias` says so of all.
        qk_norm: queries and keys are RMS-normalised per head.
    """

    window: str = "no"
    qkv_bias: bool = False
    qk_norm: bool = False


KINDS = {
    "llama": Kind(),
    "mistral": Kind(window="always"),
    "phi3": Kind(window="always"),
    "qwen2": Kind(window="asked", qkv_bias=True),
    "qwen3": Kind(window="asked", qk_norm=True),
}
DECODERS = ("llama", "mistral", "phi3", "qwen2")
HOW_TO_ADD = (
    "transformers has this model, but the exporter has no graphs for it: CONTRIBUTING.md says what a new family takes"
)
LAYER_TYPES = ("full_attention", "sliding_attention")
# The others change their tables with the prompt's length; longrope does so beyond the length that it was extended from.
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "longrope")

# What a field that config.json leaves out means: the defaults of transformers' config classes (tested against them).
# Written here because reading a config must not load PyTorch, which those classes do.
_DECODER = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6,
            "hidden_act": "silu", "head_dim": None, "tie_word_embeddings": False}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_DECODER, "intermediate_size": 11008, "num_key_value_heads": None, "vocab_size": 32000,
              "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    "mistral": {**_DECODER, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000,
                "max_position_embeddings": 131072, "sliding_window": 4096},
    "phi3": {**_DECODER, "hidden_size": 3072, "intermediate_size": 8192, "num_key_value_heads": None,
             "vocab_size": 32064, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None},
    "qwen2": {**_DECODER, "intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936,
              "max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False,
              "max_window_layers": 28},
    "qwen3": {**_DECODER, "intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936,
              "head_dim": 128, "max_position_embeddings": 32768, "attention_bias": False, "sliding_window": 4096,
              "use_sliding_window": False, "max_window_layers": 28},
}  # fmt: skip


def completed(
    where: str,
    given: dict[str, Any],
    known: Collection[str],
    kind: Any = None,
    defaults: Mapping[str, Mapping[str, Any]] = DEFAULTS,
) -> dict[str, Any]:
    """A part of a config with every field that decides something, and its kind as `model_type`.

    Args:
        where: the part, for errors.
        given: the fields it has.
        known: kinds that are supported.
        kind: instead of the part's own `model_type`.
        defaults: what a field that is left out means, by kind.

    Raises:
        UnsupportedError: a kind that is not known.
    """
    kind = given.get("model_type") if kind is None else kind
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedError(f"{where}.model_type is {kind!r}, not supported; {advice(str(kind), known)}")
    return {**defaults[kind], **given, "model_type": kind}


def advice(kind: str, known: Collection[str]) -> str:
    """A clause that names the known kinds: the nearest first, unless transformers has the kind, which is no typo then.

    Looked up in the text of transformers' files, since importing it loads PyTorch.
    """
    package = importlib.util.find_spec("transformers")
    for folder in (package.submodule_search_locations or ()) if package is not None else ():
        files = sorted((Path(folder) / "models" / "auto").glob("*.py"))
        if any(f'("{kind}", ' in file.read_text("utf-8") for file in files):
            return f"known: {', '.join(sorted(known))}; {HOW_TO_ADD}"
    return nearest(kind, known)


def decoder(
    family: str,
    text: dict[str, Any],
    *,
    tied: bool = False,
    sections: tuple[int, ...] = (),
    interleaved: bool = False,
) -> DecoderSpec:
    """The decoder from its completed config.

    Args:
        family: for errors.
        tied: lm_head and embedding are one tensor, whatever the part itself says.
        sections, interleaved: see `DecoderSpec.rope_sections`.

    Raises:
        UnsupportedError: rotary tables that are not fixed, or rotate a part of each head only.
        CheckpointError: rotary parameters that are no object, or layers that slide without a window.
    """
    kind, heads = KINDS[text["model_type"]], text["num_attention_heads"]
    bias = bool(text.get("attention_bias", False))
    rope = _rope(family, text)
    return DecoderSpec(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        heads=heads,
        kv_heads=heads if text["num_key_value_heads"] is None else text["num_key_value_heads"],
        head_dim=text["head_dim"] or (text["hidden_size"] // heads if heads else 0),
        ffn=text["intermediate_size"],
        vocab=text["vocab_size"],
        eps=text["rms_norm_eps"],
        mlp_act=text["hidden_act"],
        qkv_bias=kind.qkv_bias or bias,
        o_bias=not kind.qkv_bias and bias,
        mlp_bias=bool(text.get("mlp_bias", False)),
        tied=bool(tied or text["tie_word_embeddings"]),
        window=_window(family, text, kind),
        max_positions=_positions(rope, text["max_position_embeddings"]),
        rope={"rope_parameters": rope, "max_position_embeddings": text["max_position_embeddings"]},
        qk_norm=kind.qk_norm,
        rope_sections=sections,
        rope_interleaved=interleaved,
    )


def _positions(rope: dict[str, Any], most: Any) -> Any:
    """Positions up to which the rotary tables do not change.

    Raises:
        CheckpointError: tables that do change, without the position from which they do so.
    """
    if rope["rope_type"] != "longrope":
        return most
    original = rope["original_max_position_embeddings"]
    if type(original) is not int or original < 1:
        raise CheckpointError(
            f"config.json: original_max_position_embeddings is {original!r}, expected a whole number above 0; add it"
        )
    return min(original, most)


def _window(family: str, text: dict[str, Any], kind: Kind) -> int | None:
    """Tokens that the layers which slide attend to; None where none does. Source: transformers' config classes."""
    width = text["sliding_window"] if kind.window == "always" or text.get("use_sliding_window") else None
    if kind.window == "no" or (kind.window == "always" and width is None):
        return None
    if kind.window == "asked":
        types, first = text.get("layer_types"), text.get("max_window_layers", 0)
        if type(first) is not int or not isinstance(types, list | None):
            wrong = ("max_window_layers", first) if type(first) is not int else ("layer_types", types)
            raise CheckpointError(f"config.json: {wrong[0]} is {wrong[1]!r}, of the wrong kind; correct it")
        if types is None:
            slides = width is not None and first < text["num_hidden_layers"]
        else:
            unknown = [name for name in types if name not in LAYER_TYPES]
            if unknown:
                raise UnsupportedError(f"{family}: layer_types has {unknown[0]!r}; known: {', '.join(LAYER_TYPES)}")
            slides = "sliding_attention" in types
        if not slides:
            return None
    if type(width) is not int or width < 1:
        raise CheckpointError(f"config.json: sliding_window is {width!r}, expected a whole number above 0; correct it")
    return width


def _rope(family: str, text: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters in today's form; older configs have `rope_theta` and `rope_scaling` in their place."""
    given = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"config.json: rope_parameters is {type(given).__name__}, expected an object; correct it")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "dynamic":  # which changes nothing up to max_position_embeddings, and a plan goes no further
        given, kind = {key: value for key, value in given.items() if key != "factor"}, "default"
    if kind == "su":  # the first releases' word
        kind = "longrope"
    if kind not in STATIC_ROPE:
        raise UnsupportedError(
            f"{family}: rope_type is {kind!r}, not supported (or its tables change with the prompt); "
            f"{nearest(str(kind), STATIC_ROPE)}"
        )
    share = given.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0))
    if text["model_type"] == "phi3" and share != 1.0:
        raise UnsupportedError(f"{family}: partial_rotary_factor is {share!r}, expected 1.0; use another checkpoint")
    rest = {key: value for key, value in given.items() if key != "type"}
    if kind == "longrope":
        rest = {"original_max_position_embeddings": text.get("original_max_position_embeddings"), **rest}
    return {"rope_theta": text.get("rope_theta", 10000.0), **rest, "rope_type": kind}
