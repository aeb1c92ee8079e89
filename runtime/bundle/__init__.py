"""Bundles: a folder that an export writes and a device runs; the manifest, and the files that it lists.

- `manifest.json`: counts, every graph's inputs and outputs, cache layout by layer, preprocessing, provenance, sha256 of
  every file, and a digest of all of these.
- `vision.onnx`: `pixel_values` of one view to `image_features` and, where there is a projector, `image_embeds`. One per
  image size where images have several: `vision.0.onnx`, `vision.1.onnx`.
- `image_kv.onnx`: HiMix; image features to keys and values of every layer, once per image.
- `prefill.onnx`, or `prefill_head.onnx` and `prefill_tail.onnx`: the prompt. Two graphs where layers see different
  rows: FastV (with `select.onnx` between them), ProxyV, YOPO `dropped`.
- `decode.onnx`: one token. Layers that keep fewer visual tokens have smaller caches. Absent with `--share-weights`.
- `decode.0.onnx`, `prefill_tail.1.onnx`, ...: pieces of a decoder graph larger than `--max-graph-gb`.
- `*.onnxruntime`: graphs that ONNX Runtime runs instead of the portable ones: prompt and decode in one session, integer
  products, fused attention and norms. Absent with a GPU's `--device`.
- `*.keep-R.onnx`, `manifest.keep-R.json`: what `--add-keep-ratio R` added, on the same weights.
- `export.json`: what is needed to add a keep ratio without the checkpoint.
- `weights.bin`: every weight once, shared by all graphs; with `--prompt-weights int8` the decoder's INT4 matrices as
  INT8 too. The runtime looks the token embedding up in it.
- `tokenizer.json`, `chat_template.jinja`: if the checkpoint has a tokenizer.
- `certificate.json`: what `lvlm-edge check` found: inputs, figures, versions, hashes.

TensorRT engines are code and not part of a bundle: `lvlm-edge build` puts them into the user's cache folder. Nothing is
pickled. A bundle is written next to its place and then renamed. Loading hashes every file first, unless `verify=False`
or `--no-verify` is given.
"""

from lvlm_edge.runtime.bundle.files import (
    CERTIFICATE,
    MANIFEST,
    Bundle,
    certificate_name,
    digest,
    keep_ratios,
    load_manifest,
    manifest_name,
    open_bundle,
    ratio_text,
    safe_name,
    save_manifest,
    sha256,
    shared_files,
)
from lvlm_edge.runtime.bundle.manifest import (
    FORMATS,
    ROLES,
    SCHEMA,
    WIDTHS,
    Cache,
    Counts,
    Embedding,
    FileInfo,
    Generation,
    Graph,
    Manifest,
    Provenance,
    TensorInfo,
    WeightFormats,
)
from lvlm_edge.runtime.bundle.schema import parse

__all__ = [
    "CERTIFICATE",
    "FORMATS",
    "MANIFEST",
    "ROLES",
    "SCHEMA",
    "WIDTHS",
    "Bundle",
    "Cache",
    "Counts",
    "Embedding",
    "FileInfo",
    "Generation",
    "Graph",
    "Manifest",
    "Provenance",
    "TensorInfo",
    "WeightFormats",
    "certificate_name",
    "digest",
    "keep_ratios",
    "load_manifest",
    "manifest_name",
    "open_bundle",
    "parse",
    "ratio_text",
    "safe_name",
    "save_manifest",
    "sha256",
    "shared_files",
]
