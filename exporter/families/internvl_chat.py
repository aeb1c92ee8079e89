"""InternVL 2 to 3 in their releases' own layout (`model_type: internvl_chat`), with InternLM2, Qwen2, Llama or Phi-3.

Sources: `modeling_internvl_chat.py`, `modeling_internlm2.py` and `conversation.py` of OpenGVLab/InternVL, and the model
cards' `dynamic_preprocess`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_edge.exporter.checkpoints import configs, integers, text
from lvlm_edge.exporter.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    Derived,
    Source,
    apart,
    renamed,
)
from lvlm_edge.exporter.checkpoints.preprocess import IMAGENET_MEAN, IMAGENET_STD
from lvlm_edge.exporter.checkpoints.spec import PLACEHOLDER_ID, DecoderSpec, ModelSpec
from lvlm_edge.exporter.checkpoints.templates import turns
from lvlm_edge.exporter.families import _intern
from lvlm_edge.exporter.families._intern import VisionSpec
from lvlm_edge.exporter.planning import Capacity, Family
from lvlm_edge.runtime.errors import UnsupportedError, nearest
from lvlm_edge.runtime.pictures.image import Preprocessing
from lvlm_edge.runtime.pictures.layout import Picture, Run

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = {
    "InternLM2ForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
}
IMAGE = "<IMG_CONTEXT>"

# What a field that config.json leaves out means; the encoder's are those of InternViT-6B.
DEFAULTS: dict[str, Any] = {
    "downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v1", "dynamic_image_size": False,
    "use_thumbnail": False, "min_dynamic_patch": 1, "max_dynamic_patch": 6, "pad2square": False,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 48, "num_attention_heads": 25,
    "image_size": 224, "patch_size": 14, "qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6, "hidden_act": "gelu", "num_channels": 3,
}  # fmt: skip

# The system messages of the releases, and what opens and closes messages.
INTERNVL2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
)
INTERNVL2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)
_ROLES = ("<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n")
TEMPLATES = {
    "Hermes-2": (_ROLES, "<|im_end|>", INTERNVL2),
    "internlm2-chat": (_ROLES, "<|im_end|>", INTERNVL2),
    "phi3-chat": (("<|system|>\n", "<|user|>\n", "<|assistant|>\n"), "<|end|>", INTERNVL2),
    "internvl2_5": (_ROLES, "<|im_end|>\n", INTERNVL2_5),
}

_NAMES = (
    (r"^vision_model\.embeddings\.class_embedding$", "vision.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "vision.position_embeddings"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "vision.patch_embedding."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.norm1\.", r"vision.layers.\1.layernorm_before."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.norm2\.", r"vision.layers.\1.layernorm_after."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.ls", r"vision.layers.\1.lambda_"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.attn\.proj\.", r"vision.layers.\1.projection_layer."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.(attn|mlp)\.", r"vision.layers.\1."),
    (r"^mlp1\.0\.", "projector.norm."),
    (r"^mlp1\.1\.", "projector.linear_1."),
    (r"^mlp1\.3\.", "projector.linear_2."),
    (r"^language_model\.(output|lm_head)\.", "lm_head."),
    (r"^language_model\.model\.(tok_embeddings|embed_tokens)\.", "embed."),
    (r"^language_model\.model\.", ""),
    (r"^(layers\.\d+)\.attention_norm\.", r"\1.input_layernorm."),
    (r"^(layers\.\d+)\.ffn_norm\.", r"\1.post_attention_layernorm."),
    (r"^(layers\.\d+)\.attention\.wo\.", r"\1.o_proj."),
    (r"^(layers\.\d+)\.feed_forward\.w1\.", r"\1.gate_proj."),
    (r"^(layers\.\d+)\.feed_forward\.w3\.", r"\1.up_proj."),
    (r"^(layers\.\d+)\.feed_forward\.w2\.", r"\1.down_proj."),
    (r"^(layers\.\d+)\.(self_attn|attention|mlp)\.", r"\1."),
)
_UNUSED = re.compile(r"(position_ids|rotary_emb\.inv_freq)$|^vision\.layers\.\d+\.")


def read(of: Checkpoint) -> ModelSpec[VisionSpec]:
    """The spec from config.json.

    Raises:
        UnsupportedError: an encoder, decoder, RoPE, or way of seeing pictures that is not known.
        CheckpointError: fields that are not valid or contradict each other.
    """
    full, where = {**DEFAULTS, **of.config}, of.folder / "config.json"
    seen = {**ENCODER, **(full.get("vision_config") or {})}
    layer, count, size = full["select_layer"], seen["num_hidden_layers"], full.get("force_image_size")
    if type(layer) is not int or type(count) is not int or not -count - 1 <= layer <= count:
        raise CheckpointError(f"{where}: select_layer is {layer!r}, expected one of {count!r} layers; correct it")
    for name, value, wanted in (
        ("ps_version", full["ps_version"], ("v1", "v2")),
        ("pad2square", full["pad2square"], (False,)),
        ("force_image_size", size, (None, seen["image_size"])),
        ("vision_config.num_channels", seen["num_channels"], (3,)),
    ):
        if value not in wanted:
            known = " or ".join(map(repr, wanted))
            raise UnsupportedError(f"internvl_chat: {name} is {value!r}, not supported; expected {known}")
    image = text.encoded(of.folder, IMAGE) or (PLACEHOLDER_ID,)
    if len(image) != 1:
        raise CheckpointError(f"{of.folder}: its tokenizer has no token {IMAGE}; use the one of this checkpoint")
    try:
        spec = ModelSpec(
            family="internvl_chat",
            vision=VisionSpec(
                layers=layer % (count + 1),
                hidden=seen["hidden_size"],
                heads=seen["num_attention_heads"],
                ffn=seen["intermediate_size"],
                image_size=seen["image_size"],
                patch=seen["patch_size"],
                eps=seen["layer_norm_eps"],
                mlp_act=seen["hidden_act"],
                projector_act="gelu",
                qkv_bias=bool(seen["qkv_bias"]),
                qk_norm=bool(seen["qk_normalization"]),
                norm=seen["norm_type"],
                positions=True,
                last_norm=False,
                merge=int(1 / full["downsample_ratio"]),
                by_columns=full["ps_version"] == "v1",
            ),
            decoder=_decoder(full),
            image_token_id=image[0],
        )
        return _intern.check(spec, where)
    except (TypeError, ZeroDivisionError) as error:  # sums with a field that is no number, or is 0
        raise CheckpointError(f"config.json: a field has a value of the wrong kind ({error}); correct it") from error


def _decoder(full: Mapping[str, Any]) -> DecoderSpec:
    """The decoder, by the first of `llm_config.architectures`; a head is always stored."""
    given = full.get("llm_config") or {}
    name = (given.get("architectures") or [None])[0]
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"internvl_chat: llm_config.architectures is {name!r}; {nearest(str(name), ARCHITECTURES)}"
        )
    kind = ARCHITECTURES[name]
    bias = {"attention_bias": given.get("bias", True)} if name.startswith("InternLM2") else {}
    own = configs.completed("internvl_chat: llm_config", {**given, **bias}, configs.DECODERS, kind)
    return configs.decoder("internvl_chat", {**own, "tie_word_embeddings": False})


def chat_template(of: Checkpoint) -> str:
    """The published conversation format that config.json names.

    Raises:
        UnsupportedError: a format that is not known.
    """
    name = of.config.get("template")
    if name not in TEMPLATES:
        raise UnsupportedError(f"internvl_chat: template is {name!r}; {nearest(str(name), TEMPLATES)}")
    roles, end, system = TEMPLATES[name]
    return turns(roles, end, of.config.get("system_message") or system, image=f"{IMAGE}\n", before="bos_token")


def pictures(of: Checkpoint, spec: ModelSpec[VisionSpec], capacity: Capacity) -> tuple[Picture, ...]:
    """Tiles and thumbnail between `<img>` and `</img>`; one view where config.json asks for no tiles."""
    full, where, side = {**DEFAULTS, **of.config}, of.folder / "config.json", spec.vision.image_size
    how = Preprocessing(resize_to=(side, side), width_first=True, rescale=1 / 255, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    bounds = _intern.tiles_of(where, full["min_dynamic_patch"], full["max_dynamic_patch"])
    if not full["dynamic_image_size"]:
        bounds = (1, 1)
    before, behind = (Run(kind="text", rows=1, ids=_intern.token(of, token)) for token in _intern.AROUND)
    return _intern.pictures(spec, capacity, how, bounds, (before, behind), thumbnail=bool(full["use_thumbnail"]))


def weights(of: Checkpoint, spec: ModelSpec[VisionSpec], pictures: tuple[Picture, ...]) -> dict[str, Source]:
    """Tensors by their names in `Parts`: queries, keys and values apart, and gate and up projections."""
    d, v = spec.decoder, spec.vision
    found = renamed(integers.index(of), rename, of.folder)
    queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    for name in list(found):
        if re.match(r"vision\.layers\.\d+\.qkv\.", name):
            found |= apart(found, name, "qkv", {"q_proj": v.hidden, "k_proj": v.hidden, "v_proj": v.hidden})
        elif re.match(r"layers\.\d+\.qkv_proj\.", name):
            found |= apart(found, name, "qkv_proj", {"q_proj": queries, "k_proj": keys, "v_proj": keys})
        elif re.match(r"layers\.\d+\.gate_up_proj\.", name):
            found |= apart(found, name, "gate_up_proj", {"gate_proj": d.ffn, "up_proj": d.ffn})
        elif re.match(r"layers\.\d+\.wqkv\.", name):
            found |= _grouped(name, found.pop(name), d, of.folder)
    return found


def _grouped(name: str, fused: Source, d: DecoderSpec, folder: Path) -> dict[str, Source]:
    """InternLM2's wqkv: for every KV head its query heads, then one key head and one value head.

    Raises:
        CheckpointError: another number of rows than config.json says.
    """
    each = d.heads // d.kv_heads
    rows = d.kv_heads * (each + 2) * d.head_dim
    if not fused.shape or fused.shape[0] != rows:
        raise CheckpointError(
            f"{folder}: {fused.key} is {list(fused.shape)}, config.json says {rows} rows; correct config.json"
        )
    rest = fused.shape[1:]

    def part(chosen: slice) -> Tensor:
        groups = fused.read().reshape(d.kv_heads, each + 2, d.head_dim, *rest)[:, chosen]
        return groups.reshape(-1, *rest).contiguous()

    chosen = {"q_proj": slice(0, each), "k_proj": slice(each, each + 1), "v_proj": slice(each + 1, each + 2)}
    found: dict[str, Source] = {}
    for own, which in chosen.items():
        shape = (d.kv_heads * (which.stop - which.start) * d.head_dim, *rest)
        found[name.replace("wqkv", own)] = Derived(fused.file, fused.key, shape, fused.dtype, partial(part, which))
    return found


def rename(key: str) -> str:
    """A checkpoint's tensor name as the name it has in `Parts`."""
    for pattern, to in _NAMES:
        key = re.sub(pattern, to, key)
    return key


def unused(name: str) -> bool:
    """Whether a (renamed) tensor may be there without being read: buffers, the encoder's last layers."""
    return bool(_UNUSED.search(name))


FAMILY = Family(
    name="internvl_chat",
    vision=VisionSpec,
    read=read,
    pictures=pictures,
    work=_intern.work,
    weights=weights,
    rename=rename,
    unused=unused,
    extend=_intern.extend,
    graphs=_intern.graphs,
    chat_template=chat_template,
    sized=True,
    own_template=False,
)
