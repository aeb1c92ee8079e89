"""Engine sizes of separate and shared graphs, as a Markdown table: `python samples/jetson/plan_sizes.py`.

FastV, float16, by TensorRT-RTX for SM 8.6, without a GPU: the sample, and 6 layers of random weights. Copies are
counted: each up_proj is filled with a number of its own, which is then looked for in the engines, in any order.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lvlm_edge.exporter import export, families, planning
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.devices import engine

SAMPLES = Path(__file__).resolve().parents[1]
sys.path.append(str(SAMPLES / "bench"))
import make_checkpoint as bench  # noqa: E402

VISION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": False, "rope_theta": 10000.0}
FASTV = {"method": "fastv", "prune_layer": 2, "keep_ratio": 0.25, "max_text_tokens": 64, "dtype": "float16"}
GRAPHS = ("vision", "prefill_head", "select", "prefill_tail", "decode")


def mark(folder: Path) -> dict[float, int]:
    """Fill each up_proj of the decoder with a number of its own; how many there are of each."""
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if name.endswith("mlp.up_proj.weight")]
    marks = {201.0 + 2 * i: name for i, name in enumerate(names)}  # larger than any weight, exact in bfloat16
    tensors |= {name: torch.full_like(tensors[name], value) for value, name in marks.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return {value: tensors[name].numel() for value, name in marks.items()}


def count(plans: bytes, value: float) -> int:
    pairs = (np.frombuffer(plans, "<u2", (len(plans) - at) // 2, at) for at in (0, 1))
    return sum(int((pair == np.float16(value).view("<u2")).sum()) for pair in pairs)


with tempfile.TemporaryDirectory() as scratch:
    bench.VISION["s"], bench.SIZES["random"] = VISION, ("s", TEXT)
    shutil.copytree(SAMPLES / "easyvqa/checkpoint", Path(scratch, "sample"))
    bench.main.callback("random", Path(scratch, "random"), 0, True)
    print(f"| MB | way | {' | '.join(GRAPHS)} | sum | decoder's weights | copies |\n|---" + "|---" * 9 + "|")
    for folder in (Path(scratch, "sample"), Path(scratch, "random")):
        marked, d = mark(folder), families.read(Checkpoint.open(folder)).decoder
        w = planning.decoder_weights(d)
        for way in ("separate", "--share-weights"):
            out = export(folder, folder / way, share_weights=way != "separate", **FASTV)
            built = engine.build(out, engine.Settings(backend="trt-rtx", compute_capabilities=("8.6",)))
            plans = {path.stem: path.read_bytes() for path in built.glob("*.engine")}
            sizes = [len(plans.get(name, b"")) / 1e6 for name in GRAPHS]
            sizes += [sum(sizes), 2 * (d.layers * (w.matrices + w.vectors) + w.norm + w.head) / 1e6]
            copies = {f"{count(b''.join(plans.values()), value) / n:.2f}" for value, n in marked.items()}
            cells = " | ".join(f"{size:.1f}" if size else "-" for size in sizes)
            print(f"| {folder.name} | {way} | {cells} | {', '.join(sorted(copies))} |", flush=True)
