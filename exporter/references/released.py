"""Checkpoints in the layouts of the methods' own releases, on transformers' modules: LLaVA's original, and TinyLLaVA's.

A layout is a config and names of tensors; the modules are transformers' own, in float32 with eager attention.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, read_json
from lvlm_edge.exporter.references import stored
from lvlm_edge.exporter.references.original import Original
from lvlm_edge.exporter.references.unpadded import Unpadded

DECODERS = {
    "llava": "llama",  # the first releases; the hub's layout, which has the name now, is not read here
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_phi": "phi3",
    "llava_phi3": "phi3",
    "llava_qwen": "qwen2",
}
CLASSES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaPhiForCausalLM": "phi3",
    "LlavaPhi3ForCausalLM": "phi3",
    "LlavaQwenForCausalLM": "qwen2",
}
OWN = ("image_newline", "vision_mlp_layers.", "proxyv_initializer.")  # tensors of `model.` that no module here takes
HIMIX = ("k_proj_img", "v_proj_img", "input_layernorm_img")
IMAGE = -200  # LLaVA's placeholder; its configs do not say so


def known(config: dict[str, Any]) -> bool:
    """Whether a config.json is of one of the layouts read here."""
    kind = config.get("model_type")
    return kind == "tinyllava" or (kind in DECODERS and (kind != "llava" or "mm_vision_tower" in config))


def load(folder: Path) -> Original:
    """A checkpoint with every tensor accounted for; its config must be `known`.

    Raises:
        CheckpointError: tensors are missing, unknown or misshapen, or transformers does not know a part.
    """
    config = stored.plain(read_json(folder / "config.json"))
    state = {k: v for k, v in stored.state(folder).items() if not k.endswith("rotary_emb.inv_freq")}
    model = _tinyllava(folder, config, state) if config["model_type"] == "tinyllava" else _llava(folder, config, state)
    if state:
        raise CheckpointError(f"{folder}: holds tensors that nothing takes: {', '.join(sorted(state)[:4])}")
    return model


def _llava(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Original:
    extra: dict[str, Tensor] = {}
    for prefix in OWN:
        extra |= {prefix + name: tensor for name, tensor in _take(state, "model." + prefix).items()}
    tower = _tower(folder, config["mm_vision_tower"], _take(state, "model.vision_tower.vision_tower."))
    sizes = config["hidden_size"], config["mm_hidden_size"]
    projector = _projector(folder, config["mm_projector_type"], *sizes, _take(state, "model.mm_projector."))
    named = [CLASSES[name] for name in config.get("architectures") or () if name in CLASSES]
    kind = named[0] if named else DECODERS[config["model_type"]]  # releases exist whose model_type is another's
    language = _module(folder, config | {"model_type": kind}, _take(state, ""))
    siglip = tower.config.model_type == "siglip_vision_model"  # LLaVA takes its last layer off, and drops no token
    unpads = "proxyv" not in config and config.get("mm_patch_merge_type") == "spatial_unpad"
    model = (Unpadded if unpads else Original)(
        image_token_id=config.get("image_token_index", IMAGE),
        tower=tower,
        projector=projector,
        language=language,
        extra=extra,
        select=[-2 if siglip else config.get("mm_vision_select_layer", -2)],
        drop_first=not siglip and config.get("mm_vision_select_feature", "patch") == "patch",
    )
    if isinstance(model, Unpadded):
        model.canvases = _canvases(config["image_grid_pinpoints"], tower.config.image_size)
        most = str(config["image_aspect_ratio"]).partition("anyres_max_")[2]
        model.most = int(most) if most else None
    return model


def _canvases(given: Any, side: int) -> list[tuple[int, int]]:
    """(width, height) of every canvas; `(1x1),...,(6x6)` are tiles."""
    if not isinstance(given, str):
        return [(width, height) for width, height in given]
    if "x" not in given:
        return [(width, height) for width, height in ast.literal_eval(given)]
    first, *_, last = [tuple(map(int, pair.strip("()").split("x"))) for pair in re.findall(r"\(\d+x\d+\)", given)]
    wide, high = range(first[0], last[0] + 1), range(first[1], last[1] + 1)
    return [(i * side, j * side) for i in wide for j in high]


def _tinyllava(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Original:
    text = _take(state, "language_model.")
    extra = {name.removeprefix("model."): text.pop(name) for name in list(text) if any(own in name for own in HIMIX)}
    tower = _module(folder, config["vision_config"], _vision(_take(state, "vision_tower._vision_tower.")))
    connector = _take(state, "connector._connector.")
    wide, narrow = config["text_config"]["hidden_size"], config["vision_config"]["hidden_size"]
    return Original(
        image_token_id=config.get("image_token_index", IMAGE),
        tower=tower,
        projector=_projector(folder, config.get("connector_type"), wide, narrow, connector) if connector else None,
        language=_module(folder, config["text_config"], text),
        extra=extra,
        select=[config.get("vision_feature_layer", -2)],
        drop_first=config.get("vision_feature_select_strategy", "patch") == "patch",
    )


def _take(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, by the rest of their names; they leave the state."""
    return {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}


def _vision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tower's tensors, of a vision model or of the two-sided model it is half of."""
    vision = {k.removeprefix("vision_model."): v for k, v in state.items() if k.startswith("vision_model.")}
    return {k: v for k, v in (vision or state).items() if not k.endswith("position_ids")}


def _tower(folder: Path, source: str, inside: dict[str, Tensor]) -> Any:
    """The vision tower: its config from the folder or id that is named, its weights from there or from inside."""
    beside = folder / source  # an absolute path stays what it is
    home = beside if beside.is_dir() else checkpoint.resolve(source, weights=not inside)
    config = stored.plain(read_json(home / "config.json"))
    if not inside:
        inside = stored.state(home)
    return _module(home, config.get("vision_config", config), _vision(inside))


def _projector(folder: Path, kind: Any, wide: int, narrow: int, state: dict[str, Tensor]) -> nn.Module:
    if kind != "mlp2x_gelu":
        raise CheckpointError(f"{folder}: the projector is {kind!r}, expected 'mlp2x_gelu'")
    projector = nn.Sequential(nn.Linear(narrow, wide), nn.GELU(), nn.Linear(wide, wide))
    try:
        projector.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the projector does not fit its config ({error})") from error
    return projector.eval()


def _module(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """Transformers' module of a config with exactly these weights."""
    import transformers

    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
        "clip_vision_model": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
        "siglip_vision_model": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
    }
    name = config.get("model_type")
    if name not in kinds:
        raise CheckpointError(f"{folder}: a part has model_type {name!r}, expected one of {', '.join(kinds)}")
    settings, kind = kinds[name]
    try:
        model, report = kind.from_pretrained(
            None,
            config=settings.from_dict(config),
            state_dict=state,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many types; the first line says what is wrong
        raise CheckpointError(f"{folder}: transformers cannot load it ({str(error).splitlines()[0]})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            names = ", ".join(sorted(map(str, report[problem]))[:4])
            raise CheckpointError(f"{folder}: {name} has {problem.replace('_', ' ')}: {names}")
    return model.eval()
