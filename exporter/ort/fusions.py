"""Fused operators of ONNX Runtime: attention, also one that writes its cache, and norms that add a residual.

`GroupQueryAttention` appends keys and values to their caches in place, attends to all up to each row's own, and reads
and writes rows as [1, rows, heads * D_h], so that nothing is transposed. Its kernel on the CPU takes a first prompt's
positions to be 0, 1, 2, ... whatever it is given (onnxruntime 1.31.1), which pruned rows' are not: keys and queries are
rotated by it only where slots of the cache are positions, and by an operator of their own elsewhere.

`MultiHeadAttention` computes an encoder's attention block by block, without a matrix of all rows by all rows. Its
kernel on the CPU takes float32 alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from lvlm_edge.exporter.ort.nodes import CONTRIB, Nodes, made_by, replace, single_reader

HEAD_SIZES = 16  # the operator takes multiples of it
LENGTH = "cache_length"  # the input that is the slot where no rows were dropped
POSITIONS = "position_ids"  # the input that is the rows' positions, where these have one axis


@dataclass(frozen=True)
class _Attention:
    """An attention to a cache that is written before it, and what is read and made.

    Attributes:
        rows: of queries, keys and values, [1, rows, heads * D_h], not rotated yet.
        rotations: of queries and keys.
        writes: of keys and values.
        joined: the result as [1, rows, heads * D_h].
    """

    node: ir.Node
    rows: tuple[ir.Value, ir.Value, ir.Value]
    rotations: tuple[ir.Node, ir.Node]
    writes: tuple[ir.Node, ir.Node]
    joined: ir.Value

    @property
    def slot(self) -> ir.Value:
        """The cache's row that is written first, int64 [1]."""
        slot = self.writes[0].inputs[2]
        assert slot is not None
        return slot


@dataclass
class _Lengths:
    """How many rows caches hold in the end, by the slot that is written first; each computed once."""

    nodes: Nodes
    found: dict[ir.Value, tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    def after(self, attention: _Attention) -> tuple[ir.Value, ir.Value]:
        """The number of rows less one, int32 [1], and the number, an int32 scalar."""
        slot, before, add = attention.slot, attention.node, self.nodes.add
        if slot not in self.found:
            count = add(before, "Shape", [attention.rows[0]], start=1, end=2)
            total = add(before, "Cast", [add(before, "Add", [slot, count])], to=ir.DataType.INT32)
            last = add(before, "Sub", [total, self.nodes.constant("one", np.array([1], np.int32))])
            self.found[slot] = last, add(before, "Squeeze", [total])
        return self.found[slot]


def rewrite(model: ir.Model) -> None:
    """Put fused operators where a graph has their parts; what these leave behind is unused."""
    nodes = Nodes(model.graph, "fused")
    lengths = _Lengths(nodes)
    for node in list(model.graph):
        attention = _attention(node)
        if attention is not None:
            _fuse_attention(nodes, lengths, attention)
        elif encodes(node):
            _fuse_encoder(nodes, node)
    for node in list(model.graph):
        if node.op_type == "RMSNormalization":
            _fuse_norm(nodes, node)


def _fuse_attention(nodes: Nodes, lengths: _Lengths, attention: _Attention) -> None:
    before, writes = attention.node, attention.writes
    heads = {"num_heads": _heads(before.inputs[0]), "kv_num_heads": _heads(before.inputs[1])}
    query, key, value = attention.rows
    tables = attention.rotations[0].inputs[1:4]
    slots_are_positions = _is_length(attention.slot) and _is_input(tables[-1], POSITIONS)
    if not slots_are_positions:
        query = nodes.add(before, "RotaryEmbedding", [query, *tables], num_heads=heads["num_heads"])
        key = nodes.add(before, "RotaryEmbedding", [key, *tables], num_heads=heads["kv_num_heads"])
    inputs = [query, key, value, writes[0].inputs[0], writes[1].inputs[0], *lengths.after(attention)]
    if slots_are_positions:
        inputs += tables
    attended, *caches = nodes.several(
        before, f"{CONTRIB}::GroupQueryAttention", inputs, 3, do_rotary=int(slots_are_positions), **heads
    )
    replace(attention.joined, attended)
    for write, cache in zip(writes, caches, strict=True):
        replace(write.outputs[0], cache)


def encodes(node: ir.Node) -> bool:
    """Whether an attention is an encoder's, of all rows to all rows, that an operator of blocks can be put for."""
    if node.op_type != "Attention" or len(node.inputs) != 3 or node.attributes.get_int("is_causal", 0) != 0:
        return False
    plain = all(value is not None and value.dtype == ir.DataType.FLOAT for value in node.inputs)
    return plain and len({_heads(value) for value in node.inputs}) == 1


def _fuse_encoder(nodes: Nodes, node: ir.Node) -> None:
    """Let an encoder's attention be computed block by block, where its rows are whole before and after it."""
    rows, joined = [_joined(value) for value in node.inputs], _join(node.outputs[0])
    if joined is None or any(value is None for value in rows):
        return
    options: dict[str, Any] = {"num_heads": _heads(node.inputs[0])}
    if "scale" in node.attributes:
        options["scale"] = node.attributes.get_float("scale", 0)
    replace(joined, nodes.add(node, f"{CONTRIB}::MultiHeadAttention", rows, **options))


def _is_input(value: ir.Value | None, name: str) -> bool:
    return value is not None and value.is_graph_input() and value.name == name


def _is_length(slot: ir.Value) -> bool:
    """Whether a slot is the length of the prompt: the input, or its low part (`kv_cache.coded_length`)."""
    if _is_input(slot, LENGTH):
        return True
    low = made_by(slot, "Sub")
    part = low
    for kind in ("Mul", "Cast", "Mul", "Cast"):  # the high part: LENGTHS * integer(float(length) / LENGTHS)
        part = None if part is None else made_by(part.inputs[1 if part is low else 0], kind)
    return low is not None and part is not None and all(_is_input(n.inputs[0], LENGTH) for n in (low, part))


def _attention(node: ir.Node) -> _Attention | None:
    """What a node attends to, if it and what is around it is what the fused operator does."""
    if node.op_type != "Attention" or not _heads_fit(node.inputs[0]):
        return None
    rotated, also = made_by(node.inputs[0], "RotaryEmbedding"), None
    keys, values = (made_by(value, "TensorScatter") for value in node.inputs[1:3])
    if keys is not None and values is not None and keys.inputs[2] is values.inputs[2]:
        also = made_by(keys.inputs[1], "RotaryEmbedding")
    if rotated is None or also is None or keys is None or values is None:
        return None
    if rotated.inputs[1:4] != also.inputs[1:4]:
        return None
    if not (_sees_one_row(node, keys.inputs[2]) or _sees_up_to_itself(node, keys.inputs[2])):
        return None
    rows = [_joined(value) for value in (rotated.inputs[0], also.inputs[0], values.inputs[1])]
    joined = _join(node.outputs[0])
    if joined is None or rows[0] is None or rows[1] is None or rows[2] is None:
        return None
    return _Attention(node, (rows[0], rows[1], rows[2]), (rotated, also), (keys, values), joined)


def _heads(value: ir.Value | None) -> int:
    """The number of heads of [1, heads, rows, D_h]."""
    assert value is not None and value.shape is not None and isinstance(value.shape[1], int)
    return value.shape[1]


def _heads_fit(value: ir.Value | None) -> bool:
    """Whether heads of [1, heads, rows, D_h] are of a size that the operator takes."""
    size = None if value is None or value.shape is None else value.shape[3]
    return isinstance(size, int) and size % HEAD_SIZES == 0


def _sees_one_row(attention: ir.Node, slot: ir.Value | None) -> bool:
    """Whether one query sees all that its cache holds, up to the row at `slot`."""
    query, mask = attention.inputs[0], attention.inputs[3] if len(attention.inputs) > 3 else None
    if query is None or query.shape is None or query.shape[2] != 1 or mask is not None or len(attention.inputs) < 7:
        return False
    held = made_by(attention.inputs[6], "Add")
    return held is not None and slot in held.inputs


def _sees_up_to_itself(attention: ir.Node, slot: ir.Value | None) -> bool:
    """Whether queries see what is cached up to their own rows, the first of which is at `slot`."""
    mask = made_by(attention.inputs[3], "LessOrEqual") if len(attention.inputs) == 4 else None
    last = made_by(mask.inputs[1], "Unsqueeze") if mask is not None else None
    row = made_by(last.inputs[0], "Add") if last is not None else None
    if row is None or row.inputs[1] is not slot:
        return False
    before = made_by(row.inputs[0], "Sub")
    return before is not None and made_by(before.inputs[0], "CumSum") is not None


def _joined(value: ir.Value | None) -> ir.Value | None:
    """Rows [1, rows, heads * D_h] that [1, heads, rows, D_h] are the heads of."""
    if (transposed := made_by(value, "Transpose")) is not None:
        value = transposed.inputs[0]
    split = made_by(value, "Reshape")
    rows = None if split is None else split.inputs[0]
    return rows if rows is not None and rows.shape is not None and len(rows.shape) == 3 else None


def _join(value: ir.Value) -> ir.Value | None:
    """Rows [1, rows, heads * D_h] that are made of [1, heads, rows, D_h], and nothing else is."""
    reader = single_reader(value)
    if reader is not None and reader.op_type == "Transpose":
        reader = single_reader(reader.outputs[0])
    rows = None if reader is None or reader.op_type != "Reshape" else reader.outputs[0]
    return rows if rows is not None and rows.shape is not None and len(rows.shape) == 3 else None


def _fuse_norm(nodes: Nodes, norm: ir.Node) -> None:
    """Let a norm add the residual that it reads."""
    add = made_by(norm.inputs[0], "Add")
    if add is None or any(v is None or v.shape is None or len(v.shape) != 3 for v in add.inputs):
        return
    inputs = [*add.inputs, norm.inputs[1]]
    kind = f"{CONTRIB}::SkipSimplifiedLayerNormalization"
    normed, _, _, total = nodes.several(add, kind, inputs, 4, epsilon=norm.attributes.get_float("epsilon"))
    replace(norm.outputs[0], normed)
    replace(add.outputs[0], total)
