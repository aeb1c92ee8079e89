"""`lvlm-edge inspect`: what a bundle holds. Runs on the device: it needs no PyTorch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lvlm_edge.exporter.commands.options import JSON, KEEP_RATIO
from lvlm_edge.exporter.commands.output import show, table

if TYPE_CHECKING:
    from lvlm_edge.runtime.bundle import Bundle
    from lvlm_edge.runtime.bundle.certificate import Certificate


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@KEEP_RATIO
@click.option("--verify", is_flag=True, help="Verify every file by its hash.")
@JSON
def inspect(bundle: Path, keep_ratio: float | None, verify: bool, as_json: bool) -> None:
    r"""Show what a bundle holds, and verify its files.

    \b
    manifest.json      counts, tensors, caches, preprocessing, sha256 of every file
    vision.onnx        pixels of an image to image features, and to rows of the prompt
    image_kv.onnx      HiMix: image features to keys and values of every layer
    prefill*.onnx      the prompt; several graphs where layers see different rows
    select.onnx        FastV: which visual tokens are kept
    decode.onnx        one token; absent with --share-weights
    NAME.0.onnx, ...   pieces of a graph larger than --max-graph-gb
    *.onnxruntime      graphs that ONNX Runtime runs instead of the portable ones
    *.keep-R.*         graphs and manifest of a keep ratio added later
    export.json        what adding a keep ratio needs
    weights.bin        every weight once, shared by all graphs
    tokenizer.json     with chat_template.jinja, if the checkpoint has them
    certificate.json   result of the last check
    """
    from lvlm_edge.runtime.bundle import certificate as certificates
    from lvlm_edge.runtime.bundle import keep_ratios, open_bundle, shared_files

    opened = open_bundle(bundle, verify=verify, keep_ratio=keep_ratio)
    certificate, ratios = certificates.read(bundle, opened.name), keep_ratios(bundle)
    shared = shared_files(bundle, ratios)
    if as_json:
        said = None if certificate is None else dataclasses.asdict(certificate)
        content = dataclasses.asdict(opened.manifest) | {"certificate": said, "verified": verify}
        click.echo(json.dumps(content | {"keep_ratios": ratios, "shared": shared}, indent=1))
    else:
        _print_bundle(opened, certificate, verify)
        if ratios[1:]:
            _print_shared(shared)


def _print_bundle(opened: Bundle, certificate: Certificate | None, verified: bool) -> None:
    manifest = opened.manifest
    counts = manifest.counts
    tensors = table("graph", "", "tensor", "dtype", "shape")
    for graph in manifest.graphs:
        for kind, infos in (("in", graph.inputs), ("out", graph.outputs)):
            for info in infos:
                tensors.add_row(graph.name, kind, info.name, info.dtype, "x".join(map(str, info.shape)))
    files = table("file", "bytes", "sha256")
    for name, file in manifest.files.items():
        files.add_row(name, f"{file.size:,}", file.sha256[:16])
    caches = sorted({(c.capacity, c.dropped) for c in manifest.cache}, reverse=True)
    show(
        f"{manifest.method} {manifest.method_config or ''} on {manifest.model['family']}, {manifest.dtype}, opset "
        f"{manifest.opset}, from {manifest.provenance.source}",
        f"{_seen(counts)}, {counts.visual_tokens} visual tokens, {counts.kept_tokens} kept; up to "
        f"{counts.text_tokens} text and {counts.new_tokens} new tokens",
        f"weights: {_formats(manifest.formats)}; {_copies(opened)}",
        "caches: " + ", ".join(f"{c} rows ({d} dropped)" for c, d in caches),
        f"generation: {_drawn(manifest.generation)}",
        tensors,
        files,
        f"files {'verified by hash' if verified else 'present, sizes as listed; --verify hashes them'}",
    )
    if certificate is None:
        show("no certificate; lvlm-edge check makes one")
        return
    show(f"certificate: {certificate.state()}; {certificate.cases} prompts, up to {certificate.steps} tokens")
    show("to compare another runtime graph by graph: lvlm-edge check BUNDLE --against CHECKPOINT --save-polygraphy DIR")
    for what in certificate.not_judged:
        show(f"not judged: {what}")


def _formats(formats: Any) -> str:
    """The formats of the parts' matrices."""
    parts = {"decoder": formats.decoder, "vision": formats.vision, "lm_head": formats.head}
    said = ", ".join(f"{part} {kind}" for part, kind in parts.items())
    return said + (f", for prompts {formats.prompt}" if formats.prompt else "")


def _copies(opened: Bundle) -> str:
    """How many bytes of weights ONNX Runtime's sessions hold, one per file of a graph, and how many of them twice."""
    from lvlm_edge.runtime.bundle import external

    manifest, held, once = opened.manifest, 0, dict[int, int]()
    for file in {graph.file for graph in manifest.variants.get("ort", manifest.graphs)}:
        sizes = {weight.offset: weight.size or 0 for weight in external.weights(opened.graph(file))}
        held, once = held + sum(sizes.values()), once | sizes
    twice = held - sum(once.values())
    return f"ONNX Runtime's sessions hold {held / 1e6:,.1f} MB, {twice / 1e6:,.1f} MB of them a second time"


def _seen(counts: Any) -> str:
    """How many images and videos a prompt has."""
    seen = {"image": counts.num_images, "video": counts.num_videos}
    return ", ".join(f"{count} {kind}(s)" for kind, count in seen.items() if count)


def _drawn(generation: Any) -> str:
    """How tokens of an answer are drawn."""
    found = dataclasses.asdict(generation)
    if generation.temperature == 0:
        found = {"repetition_penalty": generation.repetition_penalty}
    ways = ", ".join(f"{name} {value:g}" for name, value in found.items())
    return f"{'sampled' if generation.temperature else 'greedy'}, {ways}"


def _print_shared(shared: dict[str, Any]) -> None:
    from lvlm_edge.runtime.bundle import ratio_text

    files = table("file", "bytes", "sha256", "keep ratios")
    for name, entry in shared["files"].items():
        files.add_row(
            name, f"{entry['size']:,}", entry["sha256"][:16], ", ".join(map(ratio_text, entry["keep_ratios"]))
        )
    show(files)
    for ratio, size in shared["beyond_weights"].items():
        show(f"keep ratio {ratio}: {size:,} bytes of its own")
