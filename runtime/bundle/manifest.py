"""The manifest's fields: the only contract between the exporting machine and the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lvlm_edge.runtime.pictures.layout import Picture, is_complete, positions_of
from lvlm_edge.runtime.pictures.views import FITS, RULES, WHOLE, covered, view_size
from lvlm_edge.runtime.prompt import TextConfig

SCHEMA = 5
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes of what weights, activations and caches are made of
FORMATS = ("as-is", "int8", "int4")  # of matrices
ROLES = frozenset({"image", "prefill", "decode"})


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
    """What the export fixed, of all pictures together.

    Attributes:
        visual_tokens: those in the prompt, or in caches where the decoder's layers read their features.
        kept_tokens: visual tokens left after the last reduction.
        text_tokens: capacity for text tokens of the prompt, without those that pictures bring.
        prompt_tokens: rows of the padded prompt: those of the pictures, and `text_tokens`.
        new_tokens: capacity for generated tokens.
    """

    num_images: int
    visual_tokens: int
    kept_tokens: int
    text_tokens: int
    prompt_tokens: int
    new_tokens: int
    num_videos: int = 0


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
        prompt: of the decoder's INT4 matrices in ONNX Runtime's graphs of prompts; None where they are INT4 there too.
    """

    decoder: str = "as-is"
    vision: str = "as-is"
    head: str = "as-is"
    block: int = 128
    prompt: str | None = None

    @property
    def quantized(self) -> bool:
        """Whether any part is kept as integers."""
        return (self.decoder, self.vision, self.head, self.prompt) != (*("as-is",) * 3, None)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How answers are drawn where nothing else is asked for, by the checkpoint's generation_config.json.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: 0 keeps all tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


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
        variants: by backend, graphs that do the same and suit it better, where there are any.
        axes: of positions: 1, or 3 (time, row, column).
        pictures: what each image and video of a prompt stands for, in the order of the plan: images first.
        image_rows: by output of the image graphs, the prompt's tensor that takes its rows.
        fewer_pictures: prompts may have fewer pictures than planned, or none.
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
    axes: int
    stages: tuple[dict[str, Any], ...]
    graphs: tuple[Graph, ...]
    variants: dict[str, tuple[Graph, ...]]
    cache: tuple[Cache, ...]
    embedding: Embedding
    pictures: tuple[Picture, ...]
    image_rows: dict[str, str]
    fewer_pictures: bool
    text: TextConfig | None
    eos_token_ids: tuple[int, ...]
    generation: Generation
    weights: str
    formats: WeightFormats
    provenance: Provenance
    files: dict[str, FileInfo]

    def graph(self, name: str) -> Graph:
        return next(g for g in self.graphs if g.name == name)

    def for_backend(self, backend: str) -> Manifest:
        """The manifest with the graphs that a backend runs."""
        return dataclasses.replace(self, graphs=self.variants.get(backend, self.graphs))

    @property
    def image_token_id(self) -> int:
        """The placeholder of an image, or of a video where no image is planned."""
        return self.pictures[0].token_id

    @property
    def placeholders(self) -> dict[int, str]:
        """Tokens that stand for an image or a video in a prompt, planned or not, and which of the two it is."""
        text = [] if self.text is None else [(self.text.image_token_id, "image"), (self.text.video_token_id, "video")]
        named = [(picture.token_id, picture.kind) for picture in self.pictures]
        return {token: kind for token, kind in (*named, *text) if token is not None}

    @property
    def views(self) -> int:
        """Views of all pictures together: runs of the vision encoder."""
        return sum(picture.views.count for picture in self.pictures)

    def role(self, role: str) -> tuple[Graph, ...]:
        """The graphs of a role, in order."""
        return tuple(graph for graph in self.graphs if graph.role == role)

    @property
    def selects(self) -> bool:
        """Whether a graph chooses which visual tokens are kept, and says so in `kept_visual`."""
        return any(info.name == "kept_visual" for graph in self.graphs for info in graph.outputs)

    def graphs_of(self, file: str) -> tuple[Graph, ...]:
        """The graphs that run a file; more than one where the file leaves sizes open."""
        return tuple(g for g in self.graphs if g.file == file)


def problems(m: Manifest) -> Iterator[str]:
    """What contradicts itself in a manifest: running a bundle takes each of these for granted."""
    return (what for what, holds in _beliefs(m) if not holds)


def _beliefs(m: Manifest) -> Iterator[tuple[str, bool]]:
    """What is wrong when a belief does not hold, and whether it holds."""
    c = m.counts
    yield f"dtype is {m.dtype!r}, expected one of {', '.join(WIDTHS)}", m.dtype in WIDTHS
    yield f"counts are {dataclasses.asdict(c)}, expected numbers above 0", _positive(c)
    kinds = [picture.kind for picture in m.pictures]
    planned = ["image"] * c.num_images + ["video"] * c.num_videos
    yield f"{len(kinds)} pictures, expected {c.num_images} images and {c.num_videos} videos", kinds == planned
    yield from _token_beliefs(m)
    yield f"axes is {m.axes}, expected 1 or 3", m.axes in (1, 3)
    for picture in m.pictures:
        yield f"picture {picture} is not made of whole runs", all(map(is_complete, picture.runs)) and bool(picture.runs)
        yield f"picture {picture} has an impossible canvas", _possible(picture)
    visual = sum(picture.visual_tokens for picture in m.pictures)
    yield f"{c.visual_tokens} visual tokens, the pictures have {visual}", c.visual_tokens == visual
    rows = sum(picture.rows() for picture in m.pictures) + c.text_tokens
    yield f"prompt_tokens is {c.prompt_tokens}, not pictures and text ({rows})", c.prompt_tokens == rows
    taken = positions_of(m.pictures, m.axes) <= c.prompt_tokens
    yield "pictures take more positions than the prompt has rows", taken
    yield f"kept_tokens is {c.kept_tokens} of {c.visual_tokens} visual tokens", c.kept_tokens <= c.visual_tokens
    drawn = m.generation
    held = drawn.temperature >= 0 and drawn.top_k >= 0 and 0 < drawn.top_p <= 1 and drawn.repetition_penalty > 0
    yield f"generation is {dataclasses.asdict(drawn)}, out of its range", held
    caches = [cache.name for cache in m.cache]
    yield f"caches are {', '.join(caches)}, expected different names", len(set(caches)) == len(caches)
    for variant in (m, *(m.for_backend(name) for name in m.variants)):
        yield from _graph_beliefs(variant)


def _token_beliefs(m: Manifest) -> Iterator[tuple[str, bool]]:
    """All images have one placeholder, and all videos another: those of the tokenizer, where there is one."""
    own = {"image": set[int | None](), "video": set[int | None]()}
    for picture in m.pictures:
        own[picture.kind].add(picture.token_id)
    if m.text is not None:
        own["image"].add(m.text.image_token_id)
        own["video"] |= {m.text.video_token_id} if own["video"] or m.text.video_token_id is not None else set()
    tokens = [token for kind in own.values() for token in kind]
    single = max(map(len, own.values())) <= 1 and len(set(tokens)) == len(tokens)
    yield f"placeholders are {own}, expected one for images, and another for videos", single


def _possible(picture: Picture) -> bool:
    """Whether a picture's views are made of sizes above 0, and its canvas is one that its rule can give."""
    views, canvas = picture.views, picture.views.canvas
    sizes = (*canvas.size, *(views.tiles or (1,)), canvas.factor, views.frames + 1)
    if canvas.rule not in RULES or views.fit not in FITS or views.whole not in WHOLE or (views.frames and views.tiles):
        return False
    free = (canvas.longest, *canvas.picture, *canvas.cells)
    if min(sizes) < 1 or max(*sizes, *free) > 1 << 20 or min(free) < 0:
        return False
    if any(canvas.picture) and not (all(free[1:]) and all(map(len, covered(canvas.picture, canvas)))):
        return False
    among = canvas.among if canvas.rule in ("pinpoints", "ratio") else (canvas.size,)
    return canvas.size in among and all(min(size) > 0 for size in among)


def _graph_beliefs(m: Manifest) -> Iterator[tuple[str, bool]]:
    names, roles = [g.name for g in m.graphs], [g.role for g in m.graphs]
    yield f"graphs are {', '.join(names)}, expected different names", len(set(names)) == len(names)
    yield f"roles of the graphs are {', '.join(roles)}, expected image, prefill and decode", set(roles) == ROLES
    for picture in m.pictures:
        known = bool(picture.graphs) and set(picture.graphs) <= {g.name for g in m.role("image")}
        yield f"graphs of a picture are {', '.join(picture.graphs)}, which are no image graphs", known
    yield from _tensor_beliefs(m)


def _positive(c: Counts) -> bool:
    counts = dataclasses.replace(c, kept_tokens=1, num_images=1, num_videos=1)
    free = (c.kept_tokens, c.num_images, c.num_videos)
    return min(free) >= 0 and c.num_images + c.num_videos > 0 and min(dataclasses.astuple(counts)) > 0


def _tensor_beliefs(m: Manifest) -> Iterator[tuple[str, bool]]:
    """Tensors that the host reads and writes are there and have the sizes it uses."""
    for graph in m.graphs:
        for tensor in (*graph.inputs, *graph.outputs):
            known = tensor.dtype in {*WIDTHS, "int64"} and all(0 < size < 1 << 40 for size in tensor.shape)
            yield f"{graph.name} has {tensor}, which is no dtype or shape of a tensor", known
    first, last, decode = m.role("prefill")[0], m.role("prefill")[-1], m.role("decode")
    c, table = m.counts, m.embedding
    row, prompt = (1, 1, table.hidden), (1, c.prompt_tokens, table.hidden)
    for graph, tensors, name, shape in (
        (first, first.inputs, "inputs_embeds", prompt),
        (last, last.outputs, "logits", (1, 1, table.vocab)),
        (decode[0], decode[0].inputs, "inputs_embeds", row),
        *((g, g.inputs, "position_ids", (m.axes, 1)) for g in decode),
        *((g, g.inputs, "cache_length", (1,)) for g in decode),
        (decode[-1], decode[-1].outputs, "logits", (1, 1, table.vocab)),
    ):
        found = [t.shape for t in tensors if t.name == name]
        yield f"{graph.name} has {name} of shape {found}, expected {shape}", found == [shape]
    kinds = [t.dtype for graph in (last, decode[-1]) for t in graph.outputs if t.name == "logits"]
    yield f"logits are {', '.join(kinds)}, expected float32", set(kinds) == {"float32"}
    yield from _image_beliefs(m)


def _image_beliefs(m: Manifest) -> Iterator[tuple[str, bool]]:
    """The graphs of every picture take its views, and return as many rows as it has in the prompt."""
    hidden = m.embedding.hidden
    for picture in m.pictures:
        graphs = [g for g in m.role("image") if g.name in picture.graphs]
        seen = [t for g in graphs for t in g.inputs if t.name == "pixel_values"]
        width, height = view_size(picture.views)
        shapes = [t.shape for t in seen]
        yield f"pixel_values are {shapes}, expected [1, 3, {height}, {width}]", shapes == [(1, 3, height, width)]
        per_view = bool(graphs) and any(t.name == "pixel_values" for t in graphs[-1].inputs)
        times = picture.views.count if per_view else 1
        image = picture.rows("visual", "separator")
        for name in m.image_rows:
            found = [t.shape for g in graphs for t in g.outputs if t.name == name]
            right = len(found) == 1 and found[0] == (1, image // times, hidden) and image % times == 0
            yield f"{name} has shape {found}, expected {image} rows of {hidden} from {times} runs", right
    prompt = {t.name: t.shape for g in m.role("prefill") for t in g.inputs}
    for name in m.image_rows.values():
        found_shape = prompt.get(name)
        expected = (1, m.counts.prompt_tokens, hidden)
        yield f"prompt tensor {name} has shape {found_shape}, expected {expected}", found_shape == expected
