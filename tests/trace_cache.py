"""Traced graphs kept on disk, for all tests and every process of a run: tracing is nearly all of an export's time.

A graph is looked up by everything it depends on: its tensors and body, the plan, the sources of the exporter, the
versions of the packages that trace, and the code that the exporter's functions are bound to at that moment. A test
that puts another function in place therefore finds no graph of the right one. What has no such text, for example a
body that a test file defines, is traced and not kept.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import os
import pkgutil
import sys
import sysconfig
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import onnx
import onnx_ir as ir

from tests.locks import locked

Trace = Callable[[Any, Any, Any, Any], ir.Model]
BOUND = (
    "families",
    "graphs",
    "lowerings",
    "methods",
    "planning",
)  # packages of the exporter whose functions shape a graph
SHARED = ("families", "graphs", "lowerings")  # those that shape the graphs of `blocks`
# Of a spec: what no body in `blocks` reads.
UNREAD = ("settings", "vision", "prequantised", "image_token_id", "video_token_id")
RECORDS = ("family", "method", "lowering")  # of a plan: what is told by its name
GIVEN_LATER = ("weights", "vision_weights", "head_weights", "block_size")  # of settings: given after tracing
DECODER = ("layers.", "norm.", "lm_head.", "rope_")  # begin the names of weights that an encoder does not have
VERSIONS = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
SKIPPED = (  # of a class: what Python makes of the rest
    *("__dict__", "__weakref__", "__doc__", "__abstractmethods__", "_abc_impl"),
    *("__dataclass_fields__", "__dataclass_params__"),
)
CachedFunction = type(functools.cache(id))
PLAIN = (bool, int, float, complex, str, bytes, range, type(None), type(...))


CACHED: dict[Any, Any] = {}  # what stands in the place of `trace.trace`, and for what: no difference to a graph


class UnkeptError(Exception):
    """Something that no text describes, so that the graph cannot be looked up."""


def cached(right: Trace, folder: Path) -> Trace:
    """`trace` that takes a graph from the folder, or puts it there."""

    @functools.wraps(right)
    def trace(graph: Any, parts: Any, plan: Any, mode: Any) -> ir.Model:
        try:
            name = key(graph, parts, plan)
        except UnkeptError:
            return right(graph, parts, plan, mode)
        path = folder / name
        with locked(path):
            if not path.is_file():
                write(path, right(graph, parts, plan, mode), parts)
        return read(path)

    CACHED[trace] = right
    return trace


@functools.cache
def refused(right: Trace) -> Trace:
    """What stands in the place of `trace` in a test that is not marked `export`."""

    @functools.wraps(right)
    def trace(*_: Any) -> ir.Model:
        raise AssertionError("this test exports: mark it `export`")

    CACHED[trace] = right
    return trace


def write(path: Path, model: ir.Model, parts: Any) -> None:
    """Keep a traced model, without its weights: they are fake, and stand as inputs in the file."""
    graph, known = model.graph, {name for name, _ in parts.named_parameters()}
    weights = [value for name, value in list(graph.initializers.items()) if name in known]
    for value in weights:
        graph.initializers.pop(str(value.name))
        value.const_value = None
        graph.inputs.append(value)
    content = [str(len(weights)).encode(), ir.to_proto(model).SerializeToString()]
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(b"\n".join(content))
    partial.replace(path)


def read(path: Path) -> ir.Model:
    """A model as it was traced; the content of its weights can be asked for no more than that of fake ones."""
    count, _, content = path.read_bytes().partition(b"\n")
    model = ir.from_proto(onnx.ModelProto.FromString(content))
    graph = model.graph
    weights = list(graph.inputs)[len(graph.inputs) - int(count) :]
    for value in weights:
        graph.inputs.remove(value)
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.ExternalTensor("fake", 0, 0, value.dtype, shape=value.shape, name=str(value.name))
        graph.register_initializer(value)
    return model


def key(graph: Any, parts: Any, plan: Any) -> str:
    """The name of a graph's file.

    Raises:
        UnkeptError: it depends on something that has no text.
    """
    for module in {type(m).__module__ for m in parts.modules()}:
        if not module.startswith(("torch.", *(f"lvlm_edge.exporter.{name}" for name in BOUND))):
            raise UnkeptError(f"parts of {module}")
    weights = [(name, tuple(p.shape), str(p.dtype)) for name, p in parts.named_parameters()]
    body = graph.body.func if isinstance(graph.body, functools.partial) else graph.body
    if body is own_bodies()["vision"]:
        seen = [fields(plan.spec, (*UNREAD, "decoder")), fields(plan.spec.vision, ("pinpoints",))]
        weights = [weight for weight in weights if not weight[0].startswith(DECODER)]
    elif body in own_bodies().values():
        seen = [fields(plan.spec, UNREAD), described(plan.all_groups()), plan.positions, plan.share_weights]
        seen += [plan.axes, plan.injected, plan.method.fewer_pictures]
    else:
        names = [getattr(plan, record).name for record in RECORDS]
        seen = [names, fields(plan, (*RECORDS, "settings", "formats")), fields(plan.settings, GIVEN_LATER)]
    packages = SHARED if body in own_bodies().values() else BOUND
    precision = [plan.dtype, plan.vision_dtype, plan.lowering.name, plan.vision_lowering is plan.lowering]
    text = [fields(graph, ("file",)), seen, precision, weights, bound(packages), sources()]
    return hashlib.sha256(repr(text).encode()).hexdigest()


def fields(value: Any, without: tuple[str, ...]) -> list[tuple[str, str]]:
    """Texts of the fields of a dataclass."""
    return [(f.name, described(getattr(value, f.name))) for f in dataclasses.fields(value) if f.name not in without]


def own_bodies() -> dict[str, Any]:
    """Bodies that know of no method: they read dimensions, groups of caches and positions."""
    from lvlm_edge.exporter.families import _llava
    from lvlm_edge.exporter.graphs import blocks

    return {"vision": _llava._vision, "prefill": blocks._prefill, "decode": blocks._decode}


@functools.cache
def sources() -> str:
    """The exporter's and the runtime's files, and the versions of what traces."""
    found = hashlib.sha256()
    for folder in ("exporter", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return repr([found.hexdigest(), [metadata.version(name) for name in VERSIONS], sys.version])


def bound(packages: tuple[str, ...]) -> str:
    """The code and constants that the modules of some packages hold at this moment."""
    found = hashlib.sha256()
    for module in modules(packages):
        for name, value in sorted(vars(module).items()):
            if not name.startswith("__") and not isinstance(value, ModuleType):
                while isinstance(value, FunctionType) and value in CACHED:
                    value = CACHED[value]
                found.update(f"{module.__name__}.{name}={described(value)}\n".encode())
    return found.hexdigest()


@functools.cache
def modules(packages: tuple[str, ...]) -> tuple[ModuleType, ...]:
    found = []
    for name in packages:
        package = importlib.import_module(f"lvlm_edge.exporter.{name}")
        inside = [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
        found += [package, *map(importlib.import_module, inside)]
    return tuple(found)


def described(value: Any, inside: tuple[int, ...] = ()) -> str:
    """A text that two values share only if graphs made with them are the same.

    Args:
        inside: ids of what the value is a part of.

    Raises:
        UnkeptError: there is none.
    """
    if id(value) in inside:
        return "itself"
    within = (*inside, id(value))
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, FunctionType):
        return _simple_function(value) if value.__closure__ is None else _function(value, within)
    if isinstance(value, CachedFunction):
        return f"cached({described(value.__wrapped__, within)})"
    if isinstance(value, functools.partial):
        return f"partial({described([value.func, value.args, value.keywords], within)})"
    if isinstance(value, type):
        return _class(value, within)
    if isinstance(value, Mapping):
        return repr([(described(k, within), described(v, within)) for k, v in value.items()])
    if isinstance(value, set | frozenset):
        return repr(sorted(described(v, within) for v in value))
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}{[described(v, within) for v in value]}"
    if isinstance(value, property | staticmethod | classmethod | functools.cached_property):
        made = [getattr(value, name, None) for name in ("fget", "__func__", "func")]
        return f"{type(value).__name__}{[described(v, within) for v in made]}"
    if dataclasses.is_dataclass(value):
        fields = [(f.name, described(getattr(value, f.name), within)) for f in dataclasses.fields(value)]
        return f"{type(value).__qualname__}({fields})"
    return _other(value)


@functools.cache
def _simple_function(value: FunctionType) -> str:
    """`_function` of one that holds nothing; its text never changes."""
    return _function(value, ())


def _function(value: FunctionType, within: tuple[int, ...]) -> str:
    """A function's code, defaults and what it holds; of one of a library its name.

    A test file's function has no text: it may call any other by name.
    """
    file = value.__code__.co_filename
    if file.startswith(LIBRARIES):
        held = [cell.cell_contents for cell in value.__closure__ or ()] if hasattr(value, "__wrapped__") else []
        own = [described(f, within) for f in held if isinstance(f, FunctionType)]
        return f"{value.__module__}.{value.__qualname__}{own}"
    own = file == "<string>" or resolved(file).is_relative_to(ROOT)
    if not own or resolved(file).is_relative_to(ROOT / "tests"):
        raise UnkeptError(f"{value.__qualname__} of {file}")
    held = [cell.cell_contents for cell in value.__closure__ or () if cell.cell_contents is not value]
    more = [value.__defaults__, value.__kwdefaults__, held]
    return f"{value.__qualname__}{_code(value.__code__)}{[described(v, within) for v in more]}"


@functools.cache
def resolved(file: str) -> Path:
    return Path(file).resolve()


def _code(code: CodeType) -> str:
    consts = [_code(c) if isinstance(c, CodeType) else described(c) for c in code.co_consts]
    return repr([code.co_code, code.co_names, code.co_varnames, code.co_freevars, consts])


def _class(value: type, within: tuple[int, ...]) -> str:
    """A class of the exporter by what is in it; any other by its name."""
    if not value.__module__.startswith("lvlm_edge."):
        return f"{value.__module__}.{value.__qualname__}"
    held = [(name, described(v, within)) for name, v in sorted(vars(value).items()) if name not in SKIPPED]
    return f"{value.__qualname__}{held}"


def _other(value: Any) -> str:
    """What has neither code nor parts, by its own text or its name."""
    text = repr(value)
    if " at 0x" not in text:
        return text
    raise UnkeptError(text)
