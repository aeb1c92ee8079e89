"""Which files an ONNX graph reads besides its own, found without the package onnx: a walk over the protocol buffer."""

from __future__ import annotations

from collections.abc import Iterator

# Fields that lead to tensors, by message: field number to the message there. Source: onnx.proto3 of ONNX 1.19.
INSIDE = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


def locations(model: bytes) -> set[str]:
    """Names of the files that hold external data of a graph's tensors, wherever in the graph these are.

    Args:
        model: the bytes of a ModelProto.

    Raises:
        ValueError: they are no protocol buffer.
    """
    found, view = set[str](), memoryview(model)
    left = [("model", 0, len(model))]
    while left:
        kind, at, end = left.pop()
        pair: dict[int, bytes] = {}
        for number, begin, stop in _fields(view, at, end):
            if kind == "entry":
                pair[number] = bytes(view[begin:stop])
            elif number in INSIDE[kind]:
                left.append((INSIDE[kind][number], begin, stop))
        if pair.get(1) == b"location":
            found.add(pair.get(2, b"").decode("utf-8"))
    return found


def _fields(view: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of every field of a message that has a length."""
    while at < end:
        tag, at = _varint(view, at, end)
        kind, begin = tag & 7, at
        if kind == VARINT:
            _, at = _varint(view, at, end)
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        elif kind == BYTES:
            length, begin = _varint(view, at, end)
            at = begin + length
        else:
            raise ValueError(f"wire type {kind} at byte {begin}")
        if at > end:
            raise ValueError(f"a field that ends at byte {at}, after its message's end at {end}")
        if kind == BYTES:
            yield tag >> 3, begin, at


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    """A number, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number without end at byte {at}")
