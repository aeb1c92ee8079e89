"""A traced program to ONNX operators, without tracing it again.

`torch.onnx.export` decomposes every program, which traces it a second time, and reads its table of operators anew for
each: two thirds of an export's time. Nearly all operators of the graphs here have an ONNX form as they are. The few
that have none are written as others that do; a program with any other goes the long way.
"""

from __future__ import annotations

import functools
import logging
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
import torch.onnx.ops
from torch import Tensor
from torch.fx import Node

log = logging.getLogger(__name__)
aten = torch.ops.aten

SAME = (aten.to.dtype, aten.to.device, aten.detach_.default)  # of one tensor; another dtype at most
COMPARISONS = (aten.eq, aten.le, aten.lt, aten.ge, aten.gt)
OWN_DTYPES = (  # whose dtypes differ by their own definition
    *(aten.alias, aten._to_copy, aten.index_select, aten.topk, aten.sym_size, aten.softmax, aten.masked_fill),
    *(operator.getitem, torch.ops.onnx_symbolic._symbolic),
)


@dataclass(frozen=True)
class _Torch:
    """What is used of torch's exporter.

    Attributes:
        table: which operators have an ONNX form.
        convert: a program of such operators, to a program with the attribute `model`.
    """

    table: Any
    convert: Callable[..., Any]


def to_onnx(program: torch.export.ExportedProgram, opset: int) -> ir.Model:
    """The ONNX model of a program, not optimised yet. The program is no longer of use."""
    from onnxscript import version_converter

    with _quiet():
        own = _torch(opset)
        for node in list(program.graph.nodes):
            _rewrite(node)
        if own is None or not all(_has_form(node, own.table) for node in program.graph.nodes):
            return _decomposed(program, opset)
        model: ir.Model = own.convert(program, registry=own.table).model
        version_converter.convert_version(model, opset)
        return model


@functools.cache
def _torch(opset: int) -> _Torch | None:
    """Torch's exporter in parts, which have no public names; None of a version that has others."""
    try:
        return _private(opset)
    except (ImportError, AttributeError) as error:
        log.warning(
            f"torch {torch.__version__}: not the ONNX exporter of torch 2.9 to 2.13 ({error}); graphs are exported by "
            "torch.onnx.export, which takes about four times as long"
        )
        return None


def _private(opset: int) -> _Torch:
    from torch.onnx._internal.exporter import _core, _registration

    table = _registration.ONNXRegistry.from_torchlib(opset_version=opset)
    return _Torch(table, _core._exported_program_to_onnx_program)


def _rewrite(node: Node) -> None:
    """Write an operator that has no ONNX form as one that has, with the same result."""
    if node.target is aten._assert_tensor_metadata.default:
        node.graph.erase_node(node)
    elif node.target in SAME:
        (x, *_), made = node.args, node.meta["val"].dtype
        assert isinstance(x, Node)
        same = x.meta["val"].dtype == made
        node.target, node.args = aten.alias.default if same else aten._to_copy.default, (x,)
        node.kwargs = {} if same else {"dtype": made}
    elif node.target is aten.square.default:
        node.target, node.args = aten.pow.Tensor_Scalar, (*node.args, 2)
    elif node.target is aten.__and__.Tensor:
        node.target = aten.bitwise_and.Tensor


def _has_form(node: Node, table: Any) -> bool:
    """Whether a node has an ONNX form as it is: its operator is in the table, and no dtype has to be promoted."""
    if node.op != "call_function":
        return True
    kind = getattr(node.target, "overloadpacket", node.target)
    return table.is_registered(node.target) and (kind in OWN_DTYPES or _one_dtype(node, kind))


def _one_dtype(node: Node, kind: Any) -> bool:
    """Whether a node reads and makes tensors of one dtype, the bools of comparisons and choices aside."""
    given = _dtypes(n.meta["val"] for n in node.all_input_nodes[kind is aten.where :])
    if kind in COMPARISONS:
        return len(given) == 1 and not (isinstance(node.args[1], float) and not next(iter(given)).is_floating_point)
    made = node.meta["val"]
    return len(given | _dtypes(made if isinstance(made, list | tuple) else [made])) <= 1


def _dtypes(values: Iterable[Any]) -> set[torch.dtype]:
    return {value.dtype for value in values if isinstance(value, Tensor)}


def _decomposed(program: torch.export.ExportedProgram, opset: int) -> ir.Model:
    """The long way: torch decomposes the program and promotes dtypes."""
    exported = torch.onnx.export(
        program, (), None, dynamo=True, opset_version=opset, verbose=False, external_data=False, optimize=False
    )
    assert exported is not None
    return exported.model


def simplify(model: ir.Model) -> None:
    """Fold constants, and drop what is not needed or there twice.

    `onnxscript.optimizer` does the same, with five times as many rules; no other is met in the graphs here.
    """
    from onnx_ir.passes import common as passes
    from onnxscript import optimizer
    from onnxscript.rewriter import RewriteRuleSet
    from onnxscript.rewriter.rules import common as rules

    met = RewriteRuleSet(
        [
            *(rules.collapse_slice_rule, rules.collapse_slice2_rule, rules.reshape_reshape_rule),
            *(rules.squeeze_reshape_1d_rule, rules.unsqueeze_unsqueeze_rule, rules.transpose_transpose_rule),
            *(rules.materialize_reshape_shape_rule, rules.remove_optional_bias_from_conv_rule),
            *(rules.cast_cast_rule, rules.no_op_cast_rule, rules.no_op_expand_rule, rules.no_op_transpose_rule),
        ]
    )
    passes.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        met.apply_to_model(model)
        passes.RemoveUnusedNodesPass()(model)
    for step in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        step(model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes about packages it does not find and its own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
