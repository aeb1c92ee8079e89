"""What the rates of a processor are measured with: graphs of one kind of work each, as ONNX Runtime runs bundles.

They have the dimensions of a bundle's decoder, because kernels are not equally fast at every size, and they run in the
sessions that bundles run in. A turn goes through all of them, several times, so that none finds its weights in the
processor's cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lvlm_edge.exporter.checkpoints.quantise import Format
from lvlm_edge.exporter.planning import counts, rates
from lvlm_edge.runtime.bundle import Manifest

if TYPE_CHECKING:
    import onnx_ir as ir

Array = NDArray[Any]
Shape = tuple[int, int]

TRIES = 7  # of each graph per turn
BIG = (2048, 16384)  # the matrix that one row's rates are of: 134 MB in float32, more than a cache holds
SMALL_BYTES, SMALL = 32e6, 128  # of the decoder's own matrices, at most, which give what a product takes to begin
SOME = 999_983  # random numbers, which a matrix repeats
REPEATS = 16  # of attention for one row, and of the operators between products
READING = "reading"  # bytes of memory per second, with no product
STORED = {"float32": None, "int8": Format(8), "int4/32": Format(4, 32), "int4/128": Format(4, 128)}


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Of a decoder, and the rows of its prompt."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int

    @classmethod
    def of(cls, manifest: Manifest) -> Dimensions:
        model = {name: int(manifest.model[name]) for name in ("hidden", "ffn", "heads", "kv_heads", "head_dim")}
        return cls(**model, rows=max(2, manifest.counts.prompt_tokens))


@dataclass(frozen=True)
class Timed:
    """A graph, ready to run, and the work that it does."""

    run: Callable[[], Any]
    work: Mapping[str, float]


class Speeds:
    """The graphs for a decoder's dimensions, with so many threads."""

    def __init__(self, dimensions: Dimensions, threads: int) -> None:
        from lvlm_edge.runtime.backends import ort

        runtime, self._threads = ort.library(), threads

        def session(graph: ir.Graph) -> Any:
            import onnx_ir as ir

            content = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
            return ort.load(runtime, Path(graph.name or ""), content=content, threads=threads)

        d, self._buffer = dimensions, np.ones(BIG, np.float32).reshape(-1)
        self._timed: dict[str, Timed] = {}
        for name in rates.FORMATS:
            shapes = {
                rates.ROWS[name]: (d.rows, [(d.hidden, d.ffn), (d.ffn, d.hidden)]),
                rates.ROW[name]: (1, [BIG]),
                rates.START[name]: (1, _small(d, name)),
            }
            self._timed |= {key: _products(session, name, *each) for key, each in shapes.items()}
        for rows, attention, between in (
            (d.rows, rates.ATTENTION_ROWS, rates.ELEMENTS),
            (1, rates.ATTENTION_ROW, rates.OPERATOR),
        ):
            self._timed[attention] = _attention(session, d, rows)
            self._timed[between] = _between(session, d, rows)

    def turn(self) -> dict[str, float]:
        """The rates by the fastest of a few tries of each graph, and that of reading memory, `READING`."""
        seconds = dict.fromkeys((*self._timed, READING), float("inf"))
        parts = np.array_split(self._buffer, self._threads)
        for _ in range(TRIES):
            for name, timed in self._timed.items():
                seconds[name] = min(seconds[name], _seconds(timed.run))
            with ThreadPoolExecutor(self._threads) as pool:
                read = _seconds(lambda: list(pool.map(lambda part: np.dot(part, part), parts)))
                seconds[READING] = min(seconds[READING], read)
        found = rates_of({name: timed.work for name, timed in self._timed.items()}, seconds)
        return found | {READING: self._buffer.nbytes / seconds[READING]}


def rates_of(works: Mapping[str, Mapping[str, float]], seconds: Mapping[str, float]) -> dict[str, float]:
    """Rates by the work of each graph and the time that it took; graphs have the name of the rate that they give.

    The products that give a format's `start` read bytes as well. What they take beside that is their beginning; a
    nanosecond each where the machine got faster in between.
    """
    found = {name: work[name] / seconds[name] for name, work in works.items() if name not in rates.START.values()}
    for name in rates.FORMATS:
        row, start = rates.ROW[name], rates.START[name]
        if start in works:
            count = works[start][start]
            found[start] = count / max(seconds[start] - works[start][row] / found[row], 1e-9 * count)
    return found


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _small(d: Dimensions, name: str) -> list[Shape]:
    """The matrices of a decoder's layers up to `SMALL_BYTES`; those of integers are joined as in `ort.joined`."""
    separate = counts.layer_matrices(d)
    q, k, v, out, gate, up, down = separate
    joined = ((d.hidden, q[1] + k[1] + v[1]), out, (d.hidden, gate[1] + up[1]), down)
    layer, found, size = separate if name == "float32" else joined, list[Shape](), 0.0
    while size < SMALL_BYTES and len(found) < SMALL:
        found.append(_fitting(layer[len(found) % len(layer)], name))
        size += rates.product(found[-1], 1, STORED[name])[rates.ROW[name]]
    return found


def _fitting(shape: Shape, name: str) -> Shape:
    """The matrix with as many input channels as its format's blocks need."""
    how = STORED[name]
    block = (None if how is None else how.block) or 1
    return -(-shape[0] // block) * block, shape[1]


Sessions = Callable[["ir.Graph"], Any]


def _products(session: Sessions, name: str, rows: int, shapes: Sequence[Shape]) -> Timed:
    """Products of rows and a matrix of their own each; those of INT8 and many rows have rows that are rounded."""
    import onnx_ir as ir

    fitting = [_fitting(shape, name) for shape in shapes]
    integers = name == "int8" and rows > 1
    kind = ir.DataType.UINT8 if integers else ir.DataType.FLOAT
    inputs = {width: _value(f"x{width}", (1, rows, width), kind) for width in sorted({s[0] for s in fitting})}
    graph = _Graph(inputs.values())
    for shape in fitting:
        x, weight = inputs[shape[0]], graph.weight(shape, name)
        if integers:
            one = graph.constant(np.ones(1, np.float32))
            offset = graph.constant(np.array(128, np.uint8))
            scale = graph.constant(np.full(shape[1], 0.01, np.float32))
            y = graph.add("com.microsoft::MatMulIntegerToFloat", [x, weight, one, scale, offset])
        else:
            y = graph.add("MatMul", [x, graph.dequantised(weight, shape, STORED[name])])
        graph.output(y, (1, rows, shape[1]))
    ready, rng = session(graph.made()), np.random.default_rng(0)
    feeds: dict[str, Array] = {
        x.name or "": rng.integers(0, 256, (1, rows, width), np.uint8)
        if integers
        else rng.standard_normal((1, rows, width), np.float32)
        for width, x in inputs.items()
    }
    work = rates.total(rates.product(shape, rows, STORED[name]) for shape in fitting)
    return Timed(lambda: ready.run(None, feeds), work)


def _attention(session: Sessions, d: Dimensions, rows: int) -> Timed:
    """Attention of a prompt's rows, or of one row after them, to caches that it writes in place.

    One row is attended for several times over, each to a cache of its own.
    """
    from lvlm_edge.runtime.backends import ort

    size, keys, count = -(-d.head_dim // 16) * 16, d.rows + (rows == 1), 1 if rows > 1 else REPEATS
    rng = np.random.default_rng(0)
    read = {n: (1, rows, h * size) for n, h in (("q", d.heads), ("k", d.kv_heads), ("v", d.kv_heads))}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in read.items()}
    caches = [f"cache{i}" for i in range(2 * count)]
    arrays |= {name: rng.standard_normal((1, d.kv_heads, keys, size), np.float32) for name in caches}
    values = {name: _value(name, array.shape) for name, array in arrays.items()}
    graph = _Graph(values.values())
    lengths = [graph.constant(np.array([keys - 1], np.int32)), graph.constant(np.array(keys, np.int32))]
    options = {"num_heads": d.heads, "kv_num_heads": d.kv_heads}
    results: dict[str, Array] = {}
    for i in range(0, 2 * count, 2):
        own = [values[name] for name in ("q", "k", "v", *caches[i : i + 2])]
        made = graph.several("com.microsoft::GroupQueryAttention", [*own, *lengths], 3, **options)
        results |= {f"y{i}": np.zeros_like(arrays["q"])} | {f"{name} now": arrays[name] for name in caches[i : i + 2]}
        for value, name in zip(made, (f"y{i}", *(f"{name} now" for name in caches[i : i + 2])), strict=True):
            graph.output(value, results[name].shape, name)
    ready = session(graph.made())
    held = arrays | results  # the binding has their addresses
    binding = ort.bound(ready, held)

    def run() -> Any:
        return ready.run_with_iobinding(binding), held

    return Timed(run, rates.attention(4 * count * rows * keys * d.heads * size, rows))


def _between(session: Sessions, d: Dimensions, rows: int) -> Timed:
    """What a decoder's layers do between products: two sums and norms, and the activation that gates.

    Each time with rows that have not been read before, as after the products of a layer.
    """
    widths = {f"{kind}{i}": width for i in range(REPEATS) for kind, width in (("x", d.hidden), ("z", d.ffn))}
    values = {name: _value(name, (1, rows, width)) for name, width in widths.items()}
    graph = _Graph(values.values())
    scale = graph.constant(np.ones(d.hidden, np.float32))
    x, gated = values["x0"], values["z0"]
    for i in range(REPEATS):
        for _ in range(2):
            x = graph.add("RMSNormalization", [graph.add("Add", [x, values[f"x{i}"]]), scale])
        z = values[f"z{i}"]
        gated = graph.add("Mul", [graph.add("Mul", [z, graph.add("Sigmoid", [z])]), gated])
    graph.output(x, (1, rows, d.hidden))
    graph.output(gated, (1, rows, d.ffn))
    ready, rng = session(graph.made()), np.random.default_rng(0)
    feeds = {name: rng.random((1, rows, width), np.float32) for name, width in widths.items()}
    work = rates.elements(REPEATS * rows * (10 * d.hidden + 6 * d.ffn), REPEATS * 6)
    return Timed(lambda: ready.run(None, feeds), work)


def _value(name: str, shape: Sequence[int], kind: Any = None) -> ir.Value:
    import onnx_ir as ir

    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind or ir.DataType.FLOAT))


class _Graph:
    """A graph in the making."""

    def __init__(self, inputs: Any) -> None:
        self.inputs: list[ir.Value] = list(inputs)
        self._nodes: list[ir.Node] = []
        self._constants: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def add(self, kind: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        """The output of a new node; its kind is an operator of ONNX, or `domain::operator`."""
        return self.several(kind, inputs, 1, **attributes)[0]

    def several(self, kind: str, inputs: Sequence[ir.Value], outputs: int, **attributes: Any) -> Sequence[ir.Value]:
        import onnx_ir as ir

        domain, _, operator = kind.rpartition("::")
        node = ir.node(operator, list(inputs), attributes=attributes, domain=domain, num_outputs=outputs)
        self._nodes.append(node)
        for i, value in enumerate(node.outputs):
            value.name = f"n{len(self._nodes)}.{i}"
        return node.outputs

    def constant(self, values: Any) -> ir.Value:
        import onnx_ir as ir

        name = f"c{len(self._constants)}"
        tensor = values if isinstance(values, ir.PackedTensor) else ir.tensor(values, name=name)
        tensor.name = name
        shape, kind = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
        self._constants.append(value)
        return value

    def weight(self, shape: Shape, name: str) -> ir.Value:
        """A matrix of random numbers in a format, without its scales."""
        import onnx_ir as ir

        how, count, rng = STORED[name], shape[0] * shape[1], np.random.default_rng(len(self._constants))
        if how is None:
            return self.constant(np.resize(rng.random(min(SOME, count), np.float32), shape))
        size = count * how.bits // 8
        numbers = np.resize(rng.integers(0, 256, min(SOME, size), np.uint8), size)
        if how.bits == 8:
            return self.constant(numbers.view(np.int8).reshape(shape))
        return self.constant(ir.PackedTensor(numbers, ir.DataType.INT4, shape=ir.Shape(shape)))

    def dequantised(self, weight: ir.Value, shape: Shape, how: Format | None) -> ir.Value:
        """The floats that a matrix stands for."""
        if how is None:
            return weight
        scale = self.constant(np.full(how.scales(shape), 0.01, np.float32))
        blocks = {"axis": 1} if how.block is None else {"axis": 0, "block_size": how.block}
        return self.add("DequantizeLinear", [weight, scale], **blocks)

    def output(self, value: ir.Value, shape: Sequence[int], name: str | None = None) -> None:
        import onnx_ir as ir

        value.name, value.shape, value.type = name or value.name, ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        self._outputs.append(value)

    def made(self) -> ir.Graph:
        import onnx_ir as ir

        return ir.Graph(
            self.inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=self._constants,
            opset_imports={"": 24, "com.microsoft": 1},
            name="rates",
        )
