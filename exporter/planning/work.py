"""Work: the products of an encoder or projector, from which FLOPs, weights, bytes and activations all come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """Rows times a matrix [inputs, outputs]; `count` such products, each with its own matrix.

    A convolution is a product that keeps floats, whatever the format of matrices (`matrix` is False).
    """

    inputs: int
    outputs: int
    rows: int
    count: int = 1
    matrix: bool = True


@dataclass(frozen=True)
class Attention:
    """Every query against every key: scores and their sum over values, `count` times."""

    queries: int
    keys: int
    heads: int
    size: int
    count: int = 1


@dataclass(frozen=True)
class Work:
    """What a part of a model does once.

    Attributes:
        steps: its products and attentions.
        vectors: numbers of weights that are in no product: norms, biases, tables.
        layers: that have a fixed time each on a device.
        hidden: width of the residual stream.
        wide: values per row beside it, where a layer is at its widest.
        rows: rows of the residual stream.
        folded: numbers of weights of the checkpoint that are summed into others and are in no graph.
        part: whose weights they are: work of one part is done with the same weights, which count once.
    """

    steps: tuple[Product | Attention, ...] = ()
    vectors: int = 0
    layers: int = 0
    hidden: int = 0
    wide: int = 0
    rows: int = 0
    folded: int = 0
    part: str = "vision"

    @property
    def products(self) -> tuple[Product, ...]:
        return tuple(step for step in self.steps if isinstance(step, Product))

    @property
    def flops(self) -> int:
        """2 x multiply-accumulate of products and attention rectangles."""
        products = sum(p.inputs * p.outputs * p.rows * p.count for p in self.products)
        attentions = (step for step in self.steps if isinstance(step, Attention))
        return 2 * products + sum(4 * a.queries * a.keys * a.heads * a.size * a.count for a in attentions)

    @property
    def weights(self) -> int:
        """Numbers of weights, each counted once."""
        return sum(p.inputs * p.outputs * p.count for p in self.products) + self.vectors

    def bytes(self, width: int, matrix: Callable[[tuple[int, int]], int]) -> int:
        """Bytes of the weights.

        Args:
            width: bytes of a number that is in no matrix.
            matrix: shape (inputs, outputs) -> bytes of a matrix in its format.
        """
        found = sum(matrix((p.inputs, p.outputs)) * p.count for p in self.products if p.matrix)
        plain = sum(p.inputs * p.outputs * p.count for p in self.products if not p.matrix)
        return found + (plain + self.vectors) * width

    def activations(self, width: int, *, scores: bool) -> int:
        """Bytes of intermediate values at the widest.

        Args:
            width: bytes of an activation.
            scores: attention scores of every head are held too, in the dtype and in float32.
        """
        attentions = [step for step in self.steps if isinstance(step, Attention)]
        held = max((a.heads * a.queries * a.keys * (width + 4) for a in attentions), default=0) if scores else 0
        return self.rows * (2 * self.hidden + self.wide) * width + held
