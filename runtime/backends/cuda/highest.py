"""The graph that finds the highest logits on the device, so that the host need not read a row of the whole vocabulary.

It turns logits [1, 1, V] into one row of float32 [1, 2 K + 1]: the K highest scores in falling order, their token ids,
and the sum of all magnitudes, which is not finite where a logit is not. Which of equal scores come first is the
device's choice, so that those above the last one alone are sure to be all that there are.

The runtime goes without the package onnx, and the graph is written as a protocol buffer here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from lvlm_edge.runtime.backends import Buffer, Highest, Session
from lvlm_edge.runtime.bundle import TensorInfo

FILE = "highest.onnx"  # what its engine is listed as
COUNT = 64  # scores that come back
WIDTH = 1024  # of a row that is searched by itself: a GPU searches rows beside each other, and one row alone
LARGEST = 1 << 24  # token ids come back as float32, which holds no odd number above
OPSET, IR_VERSION = 18, 8  # of the legacy lowering, which every runtime here loads
FLOAT, INT64 = 1, 7  # TensorProto's numbers
INT = 2  # AttributeProto's
LOWEST = -3.4028234663852886e38  # float32's; ranks what fills the last row behind every logit


@dataclass(frozen=True)
class OnDevice:
    """The graph over the logits' buffer, and the buffer of its row."""

    session: Session
    row: Buffer

    def find(self) -> Highest | None:
        self.session.run()
        row = self.row.read().reshape(-1)
        ids = row[COUNT : 2 * COUNT].astype("int64")
        order = ids.argsort()
        return Highest(ids[order], row[:COUNT][order]) if math.isfinite(row[-1]) else None


def row_of(logits: TensorInfo) -> TensorInfo | None:
    """The graph's output; None where the host reads a whole row of logits instead.

    Args:
        logits: float32 [1, 1, V].
    """
    vocab = logits.shape[-1]
    return TensorInfo("highest", "float32", (1, 2 * COUNT + 1)) if COUNT < vocab < LARGEST else None


def graph(vocab: int) -> bytes:
    """The bytes of its ModelProto: every row's highest, then the highest of these."""
    rows = -(-vocab // WIDTH)
    width = -(-vocab // rows)
    count = min(COUNT, width)
    nodes = [
        _node("Reshape", ["logits", "flat_shape"], "flat"),
        _node("Abs", ["flat"], "magnitudes"),
        _node("ReduceSum", ["magnitudes", "last_axis"], "sum", keepdims=1),
        _node("Pad", ["flat", "padding", "lowest"], "padded"),
        _node("Reshape", ["padded", "rows_shape"], "rows"),
        _node("TopK", ["rows", "count_of_row"], "row_scores", "row_columns", axis=1),
        _node("Cast", ["row_columns"], "columns", to=FLOAT),
        _node("Add", ["columns", "row_begins"], "row_ids"),
        _node("Reshape", ["row_scores", "flat_shape"], "some_scores"),
        _node("Reshape", ["row_ids", "flat_shape"], "some_ids"),
        _node("TopK", ["some_scores", "count"], "scores", "places", axis=1),
        _node("GatherElements", ["some_ids", "places"], "ids", axis=1),
        _node("Concat", ["scores", "ids", "sum"], "highest", axis=1),
    ]
    constants = [
        _integers("flat_shape", [1, -1]),
        _integers("last_axis", [1]),
        _integers("padding", [0, 0, 0, rows * width - vocab]),
        _tensor("lowest", FLOAT, [], struct.pack("<f", LOWEST)),
        _integers("rows_shape", [rows, width]),
        _integers("count_of_row", [count]),
        _tensor("row_begins", FLOAT, [rows, 1], struct.pack(f"<{rows}f", *range(0, rows * width, width))),
        _integers("count", [COUNT]),
    ]
    content = [_field(1, node) for node in nodes] + [_field(2, "highest")] + [_field(5, c) for c in constants]
    content += [_field(11, _value("logits", [1, 1, vocab])), _field(12, _value("highest", [1, 2 * COUNT + 1]))]
    return _field(1, IR_VERSION) + _field(7, b"".join(content)) + _field(8, _field(1, "") + _field(2, OPSET))


# Messages of onnx.proto3, by the numbers of their fields.


def _field(number: int, value: int | str | bytes) -> bytes:
    """A field of a message: a whole number from 0, a text, or a message in it."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _node(operator: str, inputs: Sequence[str], *outputs: str, **attributes: int) -> bytes:
    content = [_field(1, name) for name in inputs] + [_field(2, name) for name in outputs] + [_field(4, operator)]
    content += [_field(5, _field(1, name) + _field(3, v) + _field(20, INT)) for name, v in attributes.items()]
    return b"".join(content)


def _integers(name: str, values: Sequence[int]) -> bytes:
    return _tensor(name, INT64, [len(values)], struct.pack(f"<{len(values)}q", *values))


def _tensor(name: str, kind: int, shape: Sequence[int], content: bytes) -> bytes:
    return b"".join(_field(1, size) for size in shape) + _field(2, kind) + _field(8, name) + _field(9, content)


def _value(name: str, shape: Sequence[int]) -> bytes:
    """A ValueInfoProto of float32."""
    sizes = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, FLOAT) + _field(2, sizes)))
