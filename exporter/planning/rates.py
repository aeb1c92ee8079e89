"""Rates of a processor: what it does per second, by what is done, and how long work takes at them.

Work is a dict of amounts with the names of the rates that it goes at:

- `FORMAT rows`: FLOPs of products with many rows, in a format of the weights.
- `FORMAT row`, `FORMAT start`: bytes that products read, integers and scales, at the rate of products with one row; and
  how many such products there are, each of which takes a while to begin.
- `attention rows`, `attention row`: FLOPs of attention with many queries, and with one.
- `elements`: bytes that operators read and write which are neither of these: norms, sums, activations, rounding.
- `operator`: how many of those there are, each of which takes a while to begin.

The floor is that of the products: the longer of all FLOPs of many rows and all bytes of one row. A prediction has the
products' beginnings and everything else beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lvlm_edge.exporter.checkpoints.quantise import Format

Amounts = Mapping[str, float]

VERSION = 2  # of rates in a file: 1 had float32 alone
FORMATS = ("float32", "int8", "int4/32", "int4/128")
ROWS, ROW, START = ({name: f"{name} {kind}" for name in FORMATS} for kind in ("rows", "row", "start"))
ATTENTION_ROWS, ATTENTION_ROW, ELEMENTS, OPERATOR = "attention rows", "attention row", "elements", "operator"
UNITS = {
    **dict.fromkeys((*ROWS.values(), ATTENTION_ROWS, ATTENTION_ROW), "FLOP/s"),
    **dict.fromkeys((*ROW.values(), ELEMENTS), "bytes/s"),
    **dict.fromkeys((*START.values(), OPERATOR), "1/s"),
}

# What a rate is for: FLOPs, the bytes of weights, or operators whatever their size.
PARTS = {
    "flops": (*ROWS.values(), ATTENTION_ROWS, ATTENTION_ROW, ELEMENTS),
    "bytes": tuple(ROW.values()),
    "layers": (*START.values(), OPERATOR),
}
WEIGHTS = ("as-is", "float", "int8", "int4")  # formats of a plan that there are rates for

FLOAT = 4  # bytes
ROUNDING, ROUNDED = 5, 4.25  # of rows to 8 bits: operators, and what they read and write over the rows' own bytes


def format_of(how: Format | None) -> str:
    """The name of the format whose rate a weight's products go at; the nearest for blocks that were not measured."""
    if how is None:
        return "float32"
    if how.bits == 8:
        return "int8"
    return "int4/32" if how.block is not None and how.block < 128 else "int4/128"


def product(shape: tuple[int, int], rows: int, how: Format | None, count: int = 1) -> dict[str, float]:
    """Products of rows and a matrix [in, out] each, in its format: the product, and rescaling where it is of integers.

    What rounds the rows of an INT8 product is beside it, see `rounding`.
    """
    name, numbers = format_of(how), shape[0] * shape[1]
    size = FLOAT * numbers if how is None else how.integer_bytes(shape) + how.scale_bytes(shape, "float32")
    found: dict[str, float] = {ROW[name]: size * count, START[name]: count}
    if rows > 1:
        found[ROWS[name]] = 2 * rows * numbers * count
        if name == "int8":
            found |= elements(2 * rows * shape[1] * count, count)
    return found


def rounding(rows: int, width: int, count: int = 1) -> dict[str, float]:
    """Activations rounded to 8 bits row by row, for INT8 products of many rows."""
    return elements(ROUNDED * rows * width * count, ROUNDING * count)


def elements(numbers: float, operators: float) -> dict[str, float]:
    """Operators that read and write so many numbers in all."""
    return {ELEMENTS: FLOAT * numbers, OPERATOR: operators}


def attention(flops: float, queries: int) -> dict[str, float]:
    """Attention of so many FLOPs."""
    return {ATTENTION_ROWS if queries > 1 else ATTENTION_ROW: flops}


def total(parts: Iterable[Amounts]) -> dict[str, float]:
    """The sum of amounts, rate by rate."""
    found: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            found[name] = found.get(name, 0) + amount
    return found


def compute(amounts: Amounts, rates: Amounts) -> float:
    """Seconds of the products of many rows."""
    return _seconds(amounts, rates, ROWS.values())


def memory(amounts: Amounts, rates: Amounts) -> float:
    """Seconds of reading the products' weights."""
    return _seconds(amounts, rates, ROW.values())


def floor(amounts: Amounts, rates: Amounts) -> float:
    """Seconds that the products take at least."""
    return max(compute(amounts, rates), memory(amounts, rates))


def predicted(amounts: Amounts, rates: Amounts) -> float:
    """Seconds of products, attention, elements, and of beginning each operator.

    Products of many rows begin while they compute.
    """
    beginning = memory(amounts, rates) + _seconds(amounts, rates, START.values())
    beside = _seconds(amounts, rates, (ATTENTION_ROWS, ATTENTION_ROW, ELEMENTS, OPERATOR))
    return max(compute(amounts, rates), beginning) + beside


def _seconds(amounts: Amounts, rates: Amounts, names: Iterable[str]) -> float:
    return sum(amounts[name] / rates[name] for name in names if amounts.get(name))
