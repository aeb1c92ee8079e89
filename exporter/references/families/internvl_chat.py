"""InternVL in its releases' layout, on the stock model of the hub's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvlm_edge.exporter.checkpoints import text
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, read_json
from lvlm_edge.exporter.references import stored
from lvlm_edge.exporter.references.families import internvl

TOWER, DECODER, PROJECTOR = "model.vision_tower.", "model.language_model.", "model.multi_modal_projector."
LAYER = TOWER + r"encoder.layer.\1."
NAMES = (
    (r"vision_model\.embeddings\.class_embedding", TOWER + "embeddings.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", TOWER + "embeddings.position_embeddings"),
    (r"vision_model\.embeddings\.patch_embedding", TOWER + "embeddings.patch_embeddings.projection"),
    (r"vision_model\.encoder\.layers\.(\d+)\.norm1", LAYER + "layernorm_before"),
    (r"vision_model\.encoder\.layers\.(\d+)\.norm2", LAYER + "layernorm_after"),
    (r"vision_model\.encoder\.layers\.(\d+)\.ls1", LAYER + "lambda_1"),
    (r"vision_model\.encoder\.layers\.(\d+)\.ls2", LAYER + "lambda_2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.attn\.proj", LAYER + "attention.projection_layer"),
    (r"vision_model\.encoder\.layers\.(\d+)\.attn", LAYER + "attention"),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp", LAYER + "mlp"),
    (r"mlp1\.0", PROJECTOR + "layer_norm"),
    (r"mlp1\.1", PROJECTOR + "linear_1"),
    (r"mlp1\.3", PROJECTOR + "linear_2"),
    (r"language_model\.(output|lm_head)", "lm_head"),
    (r"language_model\.model\.tok_embeddings", DECODER + "embed_tokens"),
    (r"language_model\.model\.layers\.(\d+)\.attention_norm", DECODER + r"layers.\1.input_layernorm"),
    (r"language_model\.model\.layers\.(\d+)\.ffn_norm", DECODER + r"layers.\1.post_attention_layernorm"),
    (r"language_model\.model\.layers\.(\d+)\.attention\.wo", DECODER + r"layers.\1.self_attn.o_proj"),
    (r"language_model\.model\.layers\.(\d+)\.attention", DECODER + r"layers.\1.self_attn"),
    (r"language_model\.model\.layers\.(\d+)\.feed_forward\.w1", DECODER + r"layers.\1.mlp.gate_proj"),
    (r"language_model\.model\.layers\.(\d+)\.feed_forward\.w2", DECODER + r"layers.\1.mlp.down_proj"),
    (r"language_model\.model\.layers\.(\d+)\.feed_forward\.w3", DECODER + r"layers.\1.mlp.up_proj"),
    (r"language_model\.model", DECODER.rstrip(".")),
)
KINDS = {"InternLM2ForCausalLM": "llama", "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"} | {
    "Phi3ForCausalLM": "phi3"
}
MISSING = {"hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 48, "num_attention_heads": 25}


class Chat(internvl.Intern):
    """The parts of a stock model, whose pictures the release's own code makes views of, and not transformers."""

    processed = None


def load(folder: Path) -> Chat:
    """A checkpoint's weights in the stock model.

    Raises:
        CheckpointError: its tensors are not the model's.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    given = read_json(folder / "config.json")
    config = InternVLConfig(**_config(folder, given))
    whole, report = InternVLForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=_state(stored.state(folder), config),
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            names = ", ".join(sorted(map(str, report[problem]))[:4])
            raise CheckpointError(f"{folder}: it has {problem.replace('_', ' ')}: {names}")
    if given.get("ps_version", "v1") == "v1":
        shuffle = whole.model.pixel_shuffle
        whole.model.pixel_shuffle = lambda x, scale_factor: shuffle(x, scale_factor).permute(0, 2, 1, 3).contiguous()
    around = [i for token in ("<img>", "</img>") for i in text.encoded(folder, token) or ()]
    return Chat(whole.eval(), around, _counts(given, config.vision_config.image_size[0]))


def _config(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    seen, spoken = {**MISSING, **given["vision_config"]}, dict(given["llm_config"])
    kind = KINDS[spoken["architectures"][0]]
    if spoken["architectures"][0] == "InternLM2ForCausalLM":
        spoken["attention_bias"] = spoken.get("bias", True)
    spoken = {key: value for key, value in spoken.items() if key not in ("auto_map", "attn_implementation")}
    names = {"attention_bias": "qkv_bias", "use_qk_norm": "qk_normalization"}
    defaults = {"attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm", "image_size": 224}
    vision = {name: seen.get(names.get(name, name), default) for name, default in defaults.items()}
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    vision |= {name: seen[name] for name in (*kept, "hidden_act", "layer_norm_eps") if name in seen}
    return {
        "vision_config": {"model_type": "internvl_vision", **vision},
        "text_config": {**spoken, "model_type": kind, "tie_word_embeddings": False},
        "image_token_id": (text.encoded(folder, "<IMG_CONTEXT>") or (0,))[0],
        "downsample_ratio": given.get("downsample_ratio", 0.5),
        "vision_feature_layer": given.get("select_layer", -1),
        "tie_word_embeddings": False,
    }


def _state(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Tensors by the stock model's names."""
    d, found = config.text_config, dict[str, Tensor]()
    each = d.num_attention_heads // d.num_key_value_heads
    for key, tensor in state.items():
        name = key
        for pattern, to in NAMES:
            name, changed = re.subn(rf"^{pattern}(?=\.|$)", to, name)
            if changed:
                break
        if name.endswith((".attention.qkv.weight", ".attention.qkv.bias")):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace(".qkv.", f".{part}_proj.")] = rows.clone()
        elif ".wqkv." in name:
            width = tensor.shape[0] // (each + 2) // d.num_key_value_heads
            groups = tensor.view(d.num_key_value_heads, each + 2, width, *tensor.shape[1:])
            for part, rows in (("q", groups[:, :each]), ("k", groups[:, each]), ("v", groups[:, each + 1])):
                found[name.replace(".wqkv.", f".{part}_proj.")] = rows.reshape(-1, *tensor.shape[1:]).clone()
        elif not name.endswith("rotary_emb.inv_freq"):
            found[name] = tensor
    return found


def _counts(given: dict[str, Any], side: int) -> Any:
    """A function of (height, width) that says how many views the release makes of a picture."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    def count(height: int, width: int) -> int:
        if not given.get("dynamic_image_size", False):
            return 1
        bounds = given.get("min_dynamic_patch", 1), given.get("max_dynamic_patch", 6)
        columns, rows = get_optimal_tiled_canvas((height, width), (side, side), *bounds)
        return int(columns * rows + (columns * rows > 1 and given.get("use_thumbnail", False)))

    return count
