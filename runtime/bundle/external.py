"""What an ONNX graph reads besides its own file, and which operators it has, found without the package onnx.

A walk over the protocol buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Weight:
    """An initializer of a graph whose rows are in another file.

    Attributes:
        kind: of its elements, as TensorProto numbers them.
        offset: of its first byte in that file.
        size: bytes; None where the graph does not say.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    size: int | None


def locations(model: bytes) -> set[str]:
    """Names of the files that hold external data of a graph's tensors, wherever in the graph these are.

    Args:
        model: the bytes of a ModelProto.

    Raises:
        ValueError: they are no protocol buffer.
    """
    pairs = [fields for kind, fields in _messages(model) if kind == "entry"]
    return {_text(pair, 2) for pair in pairs if _text(pair, 1) == "location"}


def operators(model: bytes) -> set[tuple[str, str]]:
    """Domain and name of every operator that a graph asks for, in its subgraphs and functions too.

    Args:
        model: the bytes of a ModelProto.

    Raises:
        ValueError: they are no protocol buffer.
    """
    return {(_text(fields, 7), _text(fields, 4)) for kind, fields in _messages(model) if kind == "node"}


def _messages(model: bytes) -> Iterator[tuple[str, dict[int, memoryview]]]:
    """Every message on the way to a tensor: its kind, and by number the last of its fields that have a length."""
    view = memoryview(model)
    left = [("model", 0, len(model))]
    while left:
        kind, at, end = left.pop()
        fields = {}
        for number, begin, stop in _fields(view, at, end):
            if stop is not None:
                fields[number] = view[begin:stop]
                if number in INSIDE[kind]:
                    left.append((INSIDE[kind][number], begin, stop))
        yield kind, fields


def _text(fields: Mapping[int, memoryview], number: int) -> str:
    """A field of text; empty where it is not there."""
    return bytes(fields.get(number, b"")).decode("utf-8")


def weights(model: bytes) -> tuple[Weight, ...]:
    """The initializers of a graph, not of its subgraphs, that are in another file.

    Args:
        model: the bytes of a ModelProto.

    Raises:
        ValueError: they are no protocol buffer, or an offset is no number.
    """
    view = memoryview(model)
    graphs = [(b, e) for number, b, e in _fields(view, 0, len(model)) if number == 7 and e is not None]
    tensors = [(b, e) for graph in graphs for number, b, e in _fields(view, *graph) if number == 5 and e is not None]
    return tuple(found for at in tensors if (found := _weight(view, *at)) is not None)


def _weight(view: memoryview, at: int, end: int) -> Weight | None:
    """A TensorProto, if its rows are elsewhere."""
    name, kind, shape, said = "", 0, list[int](), dict[bytes, str]()
    for number, begin, stop in _fields(view, at, end):
        if number == 1 and stop is None:
            shape.append(begin)
        elif number == 1 and stop is not None:  # packed
            while begin < stop:
                size, begin = _varint(view, begin, stop)
                shape.append(size)
        elif number == 2:
            kind = begin
        elif number == 8:
            name = bytes(view[begin:stop]).decode("utf-8")
        elif number == 13 and stop is not None:
            pair = {key: bytes(view[b:e]) for key, b, e in _fields(view, begin, stop) if e is not None}
            said[pair.get(1, b"")] = pair.get(2, b"").decode("utf-8")
    if b"location" not in said:
        return None
    length = said.get(b"length")
    return Weight(name, kind, tuple(shape), int(said.get(b"offset", "0")), None if length is None else int(length))


def _fields(view: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int | None]]:
    """Number, begin and end of every field of a message that has a length; number, value and None of an integer."""
    while at < end:
        tag, at = _varint(view, at, end)
        kind, begin = tag & 7, at
        if kind == VARINT:
            value, at = _varint(view, at, end)
            yield tag >> 3, value, None
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
