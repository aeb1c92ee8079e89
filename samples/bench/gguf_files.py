"""A checkpoint in LLaVA's layout as llama.cpp's files: `PEERS samples/bench/gguf_files.py CHECKPOINT FOLDER`.

PEERS is a Python with llama-cpp-python and gguf (`peers.py setup`). The decoder is written in float32 and quantized by
llama.cpp; the encoder's matrices have the decoder's type, INT8 beside INT4. FOLDER also gets config.json and the
embedding, from which `contenders.py` looks up the rows of a prompt.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from contenders import MEAN, STD

# Formats, as llama.cpp counts them (enum llama_ftype).
FORMATS = {"F32": 0, "BF16": 32, "Q8_0": 7, "Q4_0": 2}
# The encoder's format beside each of the decoder's.
VISION_FORMATS = {name: "Q8_0" if name == "Q4_0" else name for name in FORMATS}

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
VISION_LAYER = {
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
Read = Callable[[str], np.ndarray]


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of llama.cpp's rotary embedding.

    It rotates rows 2i and 2i + 1 of a head together, transformers rows i and i + half.
    """
    return matrix.reshape(heads, 2, -1, matrix.shape[-1]).swapaxes(1, 2).reshape(matrix.shape)


def decoder(read: Read, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The decoder's tensors by GGUF's names."""
    text = config["text_config"]
    heads = {"self_attn.q_proj": text["num_attention_heads"], "self_attn.k_proj": text["num_key_value_heads"]}
    yield "token_embd.weight", read("language_model.model.embed_tokens.weight")
    for i in range(text["num_hidden_layers"]):
        for name, other in LAYER.items():
            values = read(f"language_model.model.layers.{i}.{name}.weight")
            yield f"blk.{i}.{other}.weight", interleaved(values, heads[name]) if name in heads else values
    yield "output_norm.weight", read("language_model.model.norm.weight")
    if not config["tie_word_embeddings"]:
        yield "output.weight", read("language_model.lm_head.weight")


def encoder(read: Read, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Encoder and projector by GGUF's names, all layers; llama.cpp runs all but the last."""
    at = "vision_tower.vision_model."
    yield "v.class_embd", read(f"{at}embeddings.class_embedding")
    yield "v.patch_embd.weight", read(f"{at}embeddings.patch_embedding.weight")
    yield "v.position_embd.weight", read(f"{at}embeddings.position_embedding.weight")
    parts = {f"{at}pre_layrnorm": "v.pre_ln"}
    for i in range(config["vision_config"]["num_hidden_layers"]):
        parts |= {f"{at}encoder.layers.{i}.{name}": f"v.blk.{i}.{other}" for name, other in VISION_LAYER.items()}
    parts |= {"multi_modal_projector.linear_1": "mm.0", "multi_modal_projector.linear_2": "mm.2"}
    for name, other in parts.items():
        for kind in ("weight", "bias"):
            yield f"{other}.{kind}", read(f"{name}.{kind}")


def write_decoder(path: Path, read: Read, config: dict[str, Any]) -> None:
    """The decoder in float32, without a tokenizer."""
    import gguf

    text = config["text_config"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_rope_dimension_count(text["hidden_size"] // text["num_attention_heads"])
    writer.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_vocab_size(text["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(FORMATS["F32"])
    for name, values in decoder(read, config):
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    _close(writer)


def write_encoder(path: Path, read: Read, config: dict[str, Any], kind: str) -> None:
    """Encoder and projector, matrices in the format `kind`."""
    import gguf

    vision = config["vision_config"]
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", False)  # neither GELU nor SiLU: CLIP's quick GELU
    for key, size in (
        ("image_size", vision["image_size"]),
        ("patch_size", vision["patch_size"]),
        ("embedding_length", vision["hidden_size"]),
        ("feed_forward_length", vision["intermediate_size"]),
        ("projection_dim", vision["projection_dim"]),
        ("block_count", vision["num_hidden_layers"]),
        ("attention.head_count", vision["num_attention_heads"]),
    ):
        writer.add_uint32(f"clip.vision.{key}", size)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", MEAN)
    writer.add_array("clip.vision.image_std", STD)
    for name, values in encoder(read, config):
        values = np.ascontiguousarray(values, np.float32)
        if values.ndim == 2 and "embd" not in name:
            stored = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
        else:
            writer.add_tensor(name, values)
    _close(writer)


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, kind: str) -> None:
    """The decoder in another format, by llama.cpp."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FORMATS[kind]
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        sys.exit(f"{target}: llama.cpp did not write {kind}; its reason stands above")


def main(checkpoint: Path, folder: Path) -> None:
    """Write decoder-FORMAT.gguf and vision-FORMAT.gguf, embedding.npy and config.json."""
    from safetensors import safe_open

    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    with safe_open(checkpoint / "model.safetensors", "np") as tensors:
        write_decoder(folder / "decoder-F32.gguf", tensors.get_tensor, config)
        for kind in sorted(set(VISION_FORMATS.values())):
            write_encoder(folder / f"vision-{kind}.gguf", tensors.get_tensor, config, kind)
        np.save(folder / "embedding.npy", tensors.get_tensor("language_model.model.embed_tokens.weight"))
    for kind in FORMATS:
        if kind != "F32":
            quantize(folder / "decoder-F32.gguf", folder / f"decoder-{kind}.gguf", kind)
    shutil.copy(checkpoint / "config.json", folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
