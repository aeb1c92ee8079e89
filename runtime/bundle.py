"""The bundle's manifest: the only contract between the exporting machine and the device.

A bundle is a folder: `manifest.json`, one ONNX file per graph, one file with every weight, tokenizer files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from lvlm_edge.runtime.errors import BundleError, UsageError
from lvlm_edge.runtime.image import Preprocessing
from lvlm_edge.runtime.prompt import TextConfig

SCHEMA = 3
MANIFEST = "manifest.json"
CERTIFICATE = "certificate.json"
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of what weights, activations and caches are made of
FORMATS = ("as-is", "int8", "int4")  # of matrices
ROLES = frozenset({"image", "prefill", "decode"})

T = TypeVar("T")


@dataclass(frozen=True)
class TensorInfo:
    """A graph's input or output: name, dtype (`float32`, `float16`, `int64`) and fixed shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One graph. Roles: `image` runs once per image, `prefill` in order once per prompt, `decode` once per token.

    Tensors of equal name and shape are one buffer, over all graphs: an output feeds the inputs named like it. Several
    graphs may run one file, each with its own shapes: the file then leaves a number of rows open.

    Attributes:
        names: what the file calls a tensor, where that is not the tensor's name here.
    """

    name: str
    file: str
    role: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    names: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A key and a value cache, [1, heads, capacity, head_dim] each: those of a decoder layer, or of some of its heads.

    Its tensors are named `past_key_values.NAME.key` and `.value`. `dropped` prompt rows never enter it (or, negative,
    so many more than the prompt has): the next slot is the prompt's length, and what was decoded, minus `dropped`.
    """

    name: str
    heads: int
    head_dim: int
    capacity: int
    dropped: int


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the export fixed. `prompt_tokens` = `visual_tokens` + `separators` + `text_tokens` rows, its capacity; or
    `text_tokens` alone, where the decoder reads the encoder's features from its caches.

    `crops` pictures are seen of each image; where there are separators, one row comes after the tokens of each crop.
    """

    num_images: int
    crops: int
    visual_tokens: int
    separators: int
    kept_tokens: int
    text_tokens: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """The token embedding inside a file of the bundle: [vocab, hidden], or transposed when `columns`."""

    file: str
    offset: int
    vocab: int
    hidden: int
    dtype: str
    columns: bool


@dataclass(frozen=True, kw_only=True)
class WeightFormats:
    """How the matrices of a model's parts are kept: `as-is`, `int8` or `int4`; vectors and tables stay as they are.

    `int8` has a scale per output channel, `int4` one per `block` input channels of an output channel. Where `block`
    does not divide a matrix's input channels the block is 32, and where that does not either the matrix is `int8`.

    Attributes:
        decoder: of its layers, a method's own included.
        vision: of the encoder and the projector.
    """

    decoder: str = "as-is"
    vision: str = "as-is"
    head: str = "as-is"
    block: int = 128

    @property
    def small(self) -> bool:
        """Whether any are integers."""
        return (self.decoder, self.vision, self.head) != ("as-is",) * 3


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How a picture becomes `pixel_values`, and how visual tokens lie on it: row-major on `grid` (rows, columns).

    `leading_tokens` visual tokens (a class token) come before the grid's and belong to no patch; `missing_patches`
    patches at the front of the grid have no token.

    With `tiles` (rows, columns) an image is its base view and the tiles of a `canvas` (width, height), each
    preprocessed by itself; the canvas must be the best of `pinpoints` for the image.
    """

    preprocessing: Preprocessing
    grid: tuple[int, int]
    leading_tokens: int
    missing_patches: int
    tiles: tuple[int, int] | None
    canvas: tuple[int, int] | None
    pinpoints: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the bundle comes from: source path or id, revision, sha256 of config.json, versions of what made it."""

    source: str
    revision: str | None
    config_sha256: str
    versions: dict[str, str]


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything the runtime needs to know; `load` checks it strictly.

    Attributes:
        method_config: the method's resolved settings.
        graphs: those that any backend can run or build from.
        forms: by backend, graphs that do the same and suit it better, where there are any.
        decode_offset: position of the first decoded token = prompt tokens (visual and text) + this.
        cache: one entry per decoder layer, or several where its heads hold different rows.
        text: None when the checkpoint had no tokenizer.
    """

    schema: int
    model: dict[str, Any]
    method: str
    method_config: dict[str, Any]
    dtype: str
    opset: int
    lowering: str
    counts: Counts
    decode_offset: int
    stages: tuple[dict[str, Any], ...]
    graphs: tuple[Graph, ...]
    forms: dict[str, tuple[Graph, ...]]
    cache: tuple[Cache, ...]
    embedding: Embedding
    image: ImageConfig
    text: TextConfig | None
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    weights: str
    formats: WeightFormats
    provenance: Provenance
    files: dict[str, FileInfo]

    def graph(self, name: str) -> Graph:
        return next(g for g in self.graphs if g.name == name)

    def form(self, backend: str) -> Manifest:
        """The manifest with the graphs that a backend runs."""
        return dataclasses.replace(self, graphs=self.forms.get(backend, self.graphs))

    def graphs_of(self, file: str) -> tuple[Graph, ...]:
        """The graphs that run a file; more than one where the file leaves sizes open."""
        return tuple(g for g in self.graphs if g.file == file)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, its checked manifest, and the name of the manifest's file."""

    folder: Path
    manifest: Manifest
    name: str = MANIFEST

    def path(self, name: str) -> Path:
        return self.folder / name


def open_bundle(folder: str | Path, *, verify: bool = True, keep_ratio: float | None = None) -> Bundle:
    """Read and check a bundle.

    Args:
        folder: the bundle.
        verify: hash every file; without it only presence and size are checked.
        keep_ratio: which of the keep ratios that it holds; None for the one it was exported with.

    Raises:
        BundleError: not a bundle, another schema, or a file missing, altered or outside the folder.
        UsageError: it does not hold the ratio.
    """
    folder = Path(folder)
    bundle = Bundle(folder, load_manifest(folder))
    if keep_ratio is not None and bundle.manifest.method_config.get("keep_ratio") != keep_ratio:
        name = _held(folder, keep_ratio)
        bundle = Bundle(folder, load_manifest(folder, name), name)
    for name, info in bundle.manifest.files.items():
        _check_file(folder, name, info, verify)
    _check_references(bundle)
    return bundle


def manifest_name(keep_ratio: float) -> str:
    """File of the manifest of a keep ratio that was added to a bundle."""
    return f"manifest.keep-{keep_ratio:g}.json"


def certificate_name(manifest: str) -> str:
    """File of the certificate that speaks of a manifest."""
    return manifest.replace("manifest", "certificate", 1)


def keep_ratios(folder: Path) -> list[float]:
    """The keep ratios that a bundle holds, that of its export first; none where its method keeps everything."""
    own = load_manifest(folder).method_config.get("keep_ratio")
    if own is None:
        return []
    names = [path.name for path in folder.glob("manifest.keep-*.json")]
    added = [name.removeprefix("manifest.keep-").removesuffix(".json") for name in names]
    return [own, *sorted((float(name) for name in added if _is_number(name)), reverse=True)]


def shared_files(folder: Path, ratios: Iterable[float]) -> dict[str, Any]:
    """Which keep ratios of a bundle read which bytes.

    Returns:
        `files`: of every file its size, its sha256 and the `keep_ratios` that need it. `beyond_weights`: bytes of a
        ratio's files that no ratio before it has, weights left out.

    Raises:
        BundleError: the bundle is damaged.
        UsageError: the bundle lacks a ratio.
    """
    files: dict[str, dict[str, Any]] = {}
    beyond = {}
    for ratio in ratios:
        manifest = open_bundle(folder, verify=False, keep_ratio=ratio).manifest
        new = [name for name in manifest.files if name not in files]
        beyond[f"{ratio:g}"] = sum(manifest.files[name].size for name in new if name != manifest.weights)
        for name, info in manifest.files.items():
            files.setdefault(name, {**dataclasses.asdict(info), "keep_ratios": []})["keep_ratios"].append(ratio)
    return {"files": files, "beyond_weights": beyond}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _held(folder: Path, keep_ratio: float) -> str:
    """The manifest's file of a keep ratio."""
    found = keep_ratios(folder)
    if keep_ratio not in found:
        held = f"holds keep ratio {', '.join(f'{r:g}' for r in found)}" if found else "keeps every visual token"
        raise UsageError(
            f"{folder}: {held}, not {keep_ratio:g}; choose one of them, or add it with lvlm-edge export "
            f"--add-keep-ratio {keep_ratio:g} {folder}"
        )
    return manifest_name(keep_ratio)


def load_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """The manifest of a bundle, its own structure checked but not the files it names.

    Args:
        name: its file.

    Raises:
        BundleError: missing, not JSON, a newer schema, or fields missing, unknown or of the wrong type.
    """
    path = folder / name
    if not path.is_file() or path.is_symlink():
        found = f"has no {name} of its own" if folder.is_dir() else "is no folder"
        raise BundleError(f"{folder}: {found}; give a bundle made by `lvlm-edge export`")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse)
    except (OSError, RecursionError, ValueError) as error:
        raise BundleError(f"{path}: is not JSON ({error}); export or copy the bundle again") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise BundleError(f"{path}: schema {schema} is newer than this version reads ({SCHEMA}); upgrade lvlm-edge")
    if schema != SCHEMA:
        raise BundleError(f"{path}: schema is {schema!r}, expected {SCHEMA}; export the bundle again")
    try:
        manifest: Manifest = parse(Manifest, content, "manifest")
    except (TypeError, ValueError) as error:
        raise BundleError(f"{path}: {error}; export the bundle again") from error
    for what, holds in _beliefs(manifest):
        if not holds:
            raise BundleError(f"{path}: {what}; export the bundle again")
    return manifest


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into a folder."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1)
    (folder / MANIFEST).write_text(text + "\n", "utf-8")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _beliefs(m: Manifest) -> Iterator[tuple[str, bool]]:
    """What running a bundle takes for granted, each as what is wrong when it does not hold, and whether it holds."""
    c = m.counts
    yield f"dtype is {m.dtype!r}, expected one of {', '.join(WIDTHS)}", m.dtype in WIDTHS
    yield f"counts are {dataclasses.asdict(c)}, expected numbers above 0", _positive(c)
    rows, crops = c.visual_tokens + c.separators + c.text_tokens, max(1, c.num_images * c.crops)
    yield f"prompt_tokens is {c.prompt_tokens}, not visual + text", c.prompt_tokens in (rows, c.text_tokens)
    yield f"{c.visual_tokens} visual tokens are not {crops} times as many", c.visual_tokens % crops == 0
    yield f"{c.separators} separators for {crops} crops, expected none or one for each", c.separators in (0, crops)
    yield f"kept_tokens is {c.kept_tokens} of {c.visual_tokens} visual tokens", c.kept_tokens <= c.visual_tokens
    yield f"decode_offset is {m.decode_offset}, beyond the prompt", abs(m.decode_offset) <= c.prompt_tokens
    caches = [c.name for c in m.cache]
    yield f"caches are {', '.join(caches)}, expected different names", len(set(caches)) == len(caches)
    yield f"image grid is {m.image.grid}, expected sizes above 0", min(m.image.grid) > 0
    tiles, canvas = m.image.tiles or (1, 0), m.image.canvas
    whole = canvas is None or (canvas in m.image.pinpoints and min(*canvas, *tiles) > 0)
    made = c.crops == tiles[0] * tiles[1] + 1 and (canvas is None) == (m.image.tiles is None) and whole
    yield f"{c.crops} crops are not a base view and tiles of {m.image.tiles} on {canvas}", made
    for form in (m, *(m.form(name) for name in m.forms)):
        yield from _graph_beliefs(form)


def _graph_beliefs(m: Manifest) -> Iterator[tuple[str, bool]]:
    names, roles = [g.name for g in m.graphs], [g.role for g in m.graphs]
    yield f"graphs are {', '.join(names)}, expected different names", len(set(names)) == len(names)
    yield f"roles of the graphs are {', '.join(roles)}, expected image, prefill and decode", set(roles) == ROLES
    yield from _tensor_beliefs(m)


def _positive(c: Counts) -> bool:
    counts = dataclasses.replace(c, separators=1, kept_tokens=1)
    return min(c.separators, c.kept_tokens) >= 0 and min(dataclasses.astuple(counts)) > 0


def _tensor_beliefs(m: Manifest) -> Iterator[tuple[str, bool]]:
    """Tensors that the host reads and writes are there and have the sizes it uses."""
    for graph in m.graphs:
        for tensor in (*graph.inputs, *graph.outputs):
            known = tensor.dtype in {*WIDTHS, "int64"} and all(0 < size < 1 << 40 for size in tensor.shape)
            yield f"{graph.name} has {tensor}, which is no dtype or shape of a tensor", known
    image, first, decode = (next(g for g in m.graphs if g.role == role) for role in ("image", "prefill", "decode"))
    last, decoded = ([g for g in m.graphs if g.role == role][-1] for role in ("prefill", "decode"))
    c, table, channels = m.counts, m.embedding, 3
    each = (c.visual_tokens + c.separators) // (c.num_images * c.crops)
    row, prompt = (1, 1, table.hidden), (1, c.prompt_tokens, table.hidden)
    embeds = [(image, image.outputs, "image_embeds", (1, each, table.hidden))]
    for graph, tensors, name, shape in (
        (image, image.inputs, "pixel_values", (1, channels, *_pixels(image))),
        *(embeds if c.prompt_tokens > c.text_tokens else ()),
        (first, first.inputs, "inputs_embeds", prompt),
        (last, last.outputs, "logits", (1, 1, table.vocab)),
        (decode, decode.inputs, "inputs_embeds", row),
        *((g, g.inputs, "position_ids", row[:2]) for g in m.graphs if g.role == "decode"),
        *((g, g.inputs, "cache_length", (1,)) for g in m.graphs if g.role == "decode"),
        (decoded, decoded.outputs, "logits", (1, 1, table.vocab)),
    ):
        found = [t.shape for t in tensors if t.name == name]
        yield f"{graph.name} has {name} of shape {found}, expected {shape}", found == [shape]


def _pixels(image: Graph) -> tuple[int, ...]:
    """Height and width that the first input says, which nothing else in the manifest does."""
    return image.inputs[0].shape[2:] if image.inputs else ()


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _check_file(folder: Path, name: str, info: FileInfo, verify: bool) -> None:
    path = folder / safe_name(name)
    if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path}: is a link, expected a file inside the bundle; export or copy the bundle again")
    if not path.is_file():
        raise BundleError(f"{path}: is missing; export or copy the bundle again")
    size = path.stat().st_size
    if size != info.size:
        raise BundleError(f"{path}: has {size} bytes, the manifest says {info.size}; export or copy the bundle again")
    if verify and sha256(path) != info.sha256:
        raise BundleError(f"{path}: was altered (its sha256 is not the manifest's); export or copy the bundle again")


def safe_name(name: str) -> str:
    """The name, if it stays inside the bundle.

    Raises:
        BundleError: an absolute path, or one with `..`.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise BundleError(f"manifest: file {name!r} points outside the bundle; do not use this bundle")
    if not name.isprintable() or len(name) > 200:
        raise BundleError(f"manifest: {name[:40]!r} is no name of a file; export the bundle again")
    return name


def _check_references(bundle: Bundle) -> None:
    manifest = bundle.manifest
    named = [g.file for graphs in (manifest.graphs, *manifest.forms.values()) for g in graphs] + [
        manifest.weights,
        manifest.embedding.file,
    ]
    if manifest.text is not None:
        named += [manifest.text.tokenizer, manifest.text.chat_template]
    for name in named:
        if name not in manifest.files:
            raise BundleError(f"manifest: names {name!r}, which is not in its list of files; export the bundle again")
    table = manifest.embedding
    width = WIDTHS.get(table.dtype)
    if width is None:
        raise BundleError(
            f"manifest: embedding dtype is {table.dtype!r}, expected {' or '.join(WIDTHS)}; export the bundle again"
        )
    end = table.offset + table.vocab * table.hidden * width
    if end > manifest.files[table.file].size or min(table.offset, table.vocab - 1, table.hidden - 1) < 0:
        raise BundleError(f"manifest: the embedding reaches past the end of {table.file}; export the bundle again")


def parse(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as an annotated type: dataclasses, tuples, dicts, unions with None, and plain types."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return parse(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        return _parse_fields(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{where} is {type(value).__name__}, expected a list")
        kinds = args[:1] * len(value) if args[1:] == (...,) else args
        if len(kinds) != len(value):
            raise TypeError(f"{where} has {len(value)} entries, expected {len(kinds)}")
        return tuple(parse(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))  # noqa: B905
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise TypeError(f"{where} is {type(value).__name__}, expected an object")
        return {str(k): parse(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, expected a finite number")
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{where} is {type(value).__name__}, expected {kind.__name__}")
    return value


def _parse_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"{where} is {type(value).__name__}, expected an object")
    hints = typing.get_type_hints(kind)
    missing = [name for name in hints if name not in value]
    unknown = [name for name in value if name not in hints]
    if missing or unknown:
        raise TypeError(
            f"{where} lacks {', '.join(missing) or 'nothing'}, has unknown {', '.join(unknown) or 'nothing'}"
        )
    return kind(**{name: parse(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
