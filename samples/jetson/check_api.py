"""Does every TensorRT that we support have what our code touches? `python samples/jetson/check_api.py`.

Reads the Python binding wheels of each version (from the package index, kept in build/tensorrt-api; nothing of them is
installed or run) and our sources, and prints a table: attribute by version, `there`, `guarded` or MISSING. A name is
there if the binding has it as a string of its own, which is how pybind11 registers attributes. That a name exists says
nothing of its arguments, nor on which class it is.

What our code touches: every attribute of a variable in OBJECTS, and of what it returns; the methods of classes derived
from it, which TensorRT calls; names asked for with hasattr and getattr. A use is guarded where it is reached only if a
name is there: inside `if hasattr(x, "name")` or `x == "trt-rtx"`, after an `if not hasattr(x, "name")` that leaves,
or in a function that the file mentions only at such places. It is `guarded` in a version that lacks the guard too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "exporter/devices/engine.py", *sorted((ROOT / "runtime/backends").glob("trt*.py"))]
# The TensorRT module, and what is made from it. `runtime` and `cuda` are CUDA's.
OBJECTS = frozenset({"trt", "module", "_module", "builder", "network", "parser", "config", "engine"})
OBJECTS |= {"context", "_context", "_runtime", "cache"}
RTX = "trt-rtx"  # as a guard: the flavour itself
# Version: requirement, and the Python that its devices have (JetPack 6 has 3.10, JetPack 7 has 3.12).
WHEELS = {
    "10.3": ("tensorrt-cu12-bindings==10.3.*", "3.10"),
    "10.16": ("tensorrt-cu13-bindings==10.16.*", "3.12"),
    "11.4": ("tensorrt-cu13-bindings==11.4.*", "3.12"),
    "RTX 1.7": ("tensorrt-rtx-cu13-bindings==1.7.*", "3.12"),
}
PLATFORMS = ("manylinux_2_17_x86_64", "manylinux_2_28_x86_64")


@dataclass(frozen=True)
class Use:
    """An attribute that our code touches once all of `guards` are known to be there."""

    name: str
    guards: frozenset[str] = frozenset()


class Reader(ast.NodeVisitor):
    """Collects uses, and where each name of the file is mentioned."""

    def __init__(self, objects: frozenset[str]) -> None:
        self.objects, self.guards, self.within = objects, frozenset[str](), ""
        self.found: list[tuple[str, Use]] = []
        self.mentions: defaultdict[str, list[frozenset[str]]] = defaultdict(list)

    def add(self, name: str, *guards: str) -> None:
        self.found.append((self.within, Use(name, self.guards.union(guards))))

    def touched(self, node: ast.AST) -> bool:
        """Whether an expression is one of the objects, or comes out of one."""
        while not isinstance(node, ast.Name):
            if isinstance(node, ast.Attribute) and node.attr in self.objects:
                return True
            if not isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
                return False
            node = node.func if isinstance(node, ast.Call) else node.value
        return node.id in self.objects

    def generic_visit(self, node: ast.AST) -> None:
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self.block(value, frozenset())
            else:
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        self.visit(child)

    def block(self, nodes: Iterable[ast.AST], guards: frozenset[str]) -> None:
        before, self.guards = self.guards, self.guards | guards
        for node in nodes:
            self.visit(node)
            if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Return | ast.Raise | ast.Continue):
                self.guards |= known(node.test, False)
        self.guards = before

    def branch(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        for part, truth in ((node.body, True), (node.orelse, False)):
            self.block(part if isinstance(part, list) else [part], known(node.test, truth))

    visit_If = visit_IfExp = branch

    def definition(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        if isinstance(node, ast.ClassDef) and any(map(self.touched, node.bases)):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                    self.add(part.name)
        before, self.within = self.within, self.within or node.name
        self.generic_visit(node)
        self.within = before

    visit_FunctionDef = visit_ClassDef = definition

    def visit_Name(self, node: ast.Name) -> None:
        self.mentions[node.id].append(self.guards)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self.touched(node.value) and (node.attr == "__version__" or not node.attr.startswith("__")):
            self.add(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = asked(node)
        if name and self.touched(node.args[0]):
            raises = isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 2
            self.add(name, *(() if raises else (name,)))
        self.generic_visit(node)


def asked(node: ast.AST) -> str:
    """The name in `hasattr(x, "name")` or `getattr(x, "name", ...)`; empty for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
        second = node.args[1] if len(node.args) > 1 else None
        return second.value if isinstance(second, ast.Constant) and isinstance(second.value, str) else ""
    return ""


def known(test: ast.expr, truth: bool) -> frozenset[str]:
    """Names that are there if a condition comes out as `truth`."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return known(test.operand, not truth)
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And if truth else ast.Or):
        return frozenset[str]().union(*(known(value, truth) for value in test.values))
    if truth and isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq):
        other = test.comparators[0]
        return frozenset({RTX} if isinstance(other, ast.Constant) and other.value == RTX else ())
    name = asked(test) if truth and isinstance(test, ast.Call) and ast.unparse(test.func) == "hasattr" else ""
    return frozenset({name} if name else ())


def uses(source: str) -> set[Use]:
    """What a source text touches of TensorRT."""
    tree = ast.parse(source)
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("lvlm_edge")]
    ours = {alias.asname or alias.name for node in imports for alias in node.names}
    reader = Reader(OBJECTS - ours)
    reader.visit(tree)
    outer = {name: frozenset.intersection(*places) for name, places in reader.mentions.items()}
    return {Use(use.name, use.guards | outer.get(within, frozenset())) for within, use in reader.found}


def there(binding: bytes, names: Iterable[str]) -> set[str]:
    """The names that a binding's shared library (x86-64) has as strings.

    Linkers store a string that another one ends in (`Builder`, `INetworkBuilder`) only once, as the longer one's tail:
    a tail counts if an instruction's relative address points at it.
    """
    found, tails = set(), {}
    for name in names:
        for at in re.finditer(re.escape(name.encode()) + b"\0", binding):
            if at.start() == 0 or binding[at.start() - 1] == 0:
                found.add(name)
            else:
                tails[at.start()] = name
    for shift in range(4):
        words = np.frombuffer(binding, "<i4", count=(len(binding) - shift) // 4, offset=shift)
        # in these files code and strings lie at the same offsets as in memory
        targets = words.astype(np.int64) + np.arange(len(words)) * 4 + shift + 4
        found |= {tails[int(at)] for at in targets[np.isin(targets, list(tails))]}
    return found


def wheel(version: str, cache: Path) -> Path | None:
    """The binding wheel of a version, downloaded once; None if it cannot be had."""
    requirement, python = WHEELS[version]
    folder = cache / version.replace(" ", "-")
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", requirement]
        command += ["--python-version", python, "--dest", str(folder)]
        done = subprocess.run(
            [*command, *(f"--platform={name}" for name in PLATFORMS)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            click.echo(f"{requirement}: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}", err=True)
    return next(iter(sorted(folder.glob("*.whl"))), None)


def contents(path: Path, names: set[str]) -> set[str]:
    """The names that a binding wheel has, in its shared library or assigned in its `__init__.py`."""
    with zipfile.ZipFile(path) as archive:
        library = next(name for name in archive.namelist() if name.endswith(".so"))
        package = ast.parse(archive.read(f"{library.split('/')[0]}/__init__.py"))
        assigned = {ast.unparse(t) for n in package.body if isinstance(n, ast.Assign) for t in n.targets}
        flavour = {RTX} if "tensorrt_rtx" in library else set()
        return there(archive.read(library), names) | (assigned & names) | flavour


def verdict(name: str, touched: set[Use], present: set[str]) -> str:
    """`there`, `guarded` or `MISSING`."""
    if name in present:
        return "there"
    return "guarded" if all(use.guards - present for use in touched if use.name == name) else "MISSING"


@click.command()
@click.option("--cache", type=click.Path(path_type=Path), default=ROOT / "build/tensorrt-api", help="Keeps the wheels.")
@click.option("--allow-missing", is_flag=True, help="Go on without a version whose wheel cannot be had.")
def main(cache: Path, allow_missing: bool) -> None:
    """Print which TensorRT has what our code touches; exit 1 if an unguarded attribute is missing in one."""
    touched = {use for path in SOURCES for use in uses(path.read_text("utf-8"))}
    names = {use.name for use in touched}
    wheels = {version: wheel(version, cache) for version in WHEELS}
    needed = names | {guard for use in touched for guard in use.guards}
    has = {version: contents(path, needed) for version, path in wheels.items() if path}
    rows = [[name, *(verdict(name, touched, present) for present in has.values())] for name in sorted(names)]
    for row in [["", *has], *rows]:
        click.echo(row[0].ljust(44) + "".join(cell.ljust(10) for cell in row[1:]).rstrip())
    for version, path in wheels.items():
        states = [row[1 + list(has).index(version)] for row in rows] if path else []
        counts = ", ".join(f"{states.count(state)} {state}" for state in ("there", "guarded", "MISSING"))
        click.echo(f"{version}: {path.name}: {counts}" if path else f"{version}: NOT CHECKED, its wheel cannot be had")
    if any("MISSING" in row for row in rows) or (len(has) < len(wheels) and not allow_missing):
        sys.exit(1)


if __name__ == "__main__":
    main()
