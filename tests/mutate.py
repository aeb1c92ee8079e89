"""Which share of small changes to the code the tests notice: `python tests/mutate.py --count 200 --seed 0`.

Each mutant is one change of one expression or statement, made in a copy of the sources. Its tests are those that
`TESTS` maps to the file: quick ones first, the next only where those passed. A mutant is caught where a test fails, or
takes longer than its time limit. Changes that nobody can tell are not made: in docstrings, annotations, error messages,
log lines, assertions (`strict=True` of `zip` among them), `TYPE_CHECKING` blocks and help texts, to numbers of three
digits and more, which are limits and sizes of buffers, to the indent of JSON, to how much of a file is read at a time,
to the length of random names, and those of `SAME`.

Tests run in forks of a process that has imported the libraries, so that a mutant takes seconds.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = tuple(f"runtime/{name}" for name in ("pipeline", "pictures", "prompt", "bundle"))
MUTATED = (*RUNTIME, "exporter/methods", "exporter/proof")
LIMIT = 180  # seconds of a selection of tests
QUICK, EXPORTS = (
    ("-m", "not slow and not export and not trt and not gpu and not weights"),
    ("-m", "export and not slow"),
)

Selection = tuple[str, ...]


def quick(*files: str, only: str = "") -> Selection:
    """The tests of files that export nothing."""
    return (*(f"tests/{file}" for file in files), *QUICK, *(("-k", only) if only else ()))


def exporting(*files: str, only: str = "") -> Selection:
    """The tests of files that export."""
    return (*(f"tests/{file}" for file in files), *EXPORTS, *(("-k", only) if only else ()))


PIPELINE = exporting("runtime/test_pipeline.py", only="not host_touches and not interleaved and not thread")
RUNS = exporting("runtime/test_anyres.py", "runtime/test_sources.py")
BUNDLE = exporting("runtime/test_bundle.py", "runtime/test_external.py", only="not damage and not single_bit")
SEEN = quick(
    *(f"exporter/families/test_{name}.py" for name in ("internvl", "llava_next", "smolvlm", "unpadded")),
    only="sizes or grids or boxes or cells_lie or as_the_release_counts",
)
MANIFEST = quick("runtime/test_manifest.py")
INPUTS = quick("runtime/test_inputs.py", "runtime/test_memory.py")
SPLIT = exporting("exporter/test_split.py", only="bodies_of_small")
FEWER = exporting("exporter/test_fastv.py", only="text_alone and bodies")


def of_method(name: str) -> tuple[Selection, ...]:
    """Tests of a method that has weights of its own, by its name."""
    return (
        quick("exporter/test_method_counts.py", "exporter/test_method_pieces.py", "exporter/test_planning.py"),
        exporting("exporter/test_savings.py", only=f"to_the_last_one and {name}"),
        exporting("exporter/test_methods.py", only=f"bodies and {name}"),
        exporting("exporter/test_check_methods.py", only=f"a_clean_bundle and bodies and {name}"),
        exporting("exporter/test_bad_methods.py", only=f"{name} and not graphs"),
        quick("exporter/test_bad_methods.py"),
    )


JUDGE = quick("exporter/test_judge.py")
CHECK = exporting("exporter/test_check.py", only="(names_the_stage or certificate or command) and not graphs")
CLEAN = exporting("exporter/test_check_methods.py", only="a_clean_bundle and bodies and not yopo and not float16")
MISTAKES = exporting("exporter/test_check_methods.py", only="himix and not graphs")
TESTS: dict[str, tuple[Selection, ...]] = {  # by the beginning of a file's path; the first that fits
    "runtime/pipeline/sampling": (quick("runtime/test_sampling.py", "runtime/test_highest.py"), PIPELINE),
    "runtime/pipeline": (INPUTS, quick("runtime/test_layout.py"), PIPELINE, RUNS, FEWER),
    "runtime/pictures/layout": (quick("runtime/test_inputs.py", "runtime/test_layout.py"), MANIFEST, BUNDLE, PIPELINE),
    "runtime/pictures": (
        quick(*(f"runtime/test_{name}.py" for name in ("image", "anyres", "views", "sources", "layout"))),
        SEEN,
        RUNS,
        BUNDLE,
    ),
    "runtime/prompt": (quick("runtime/test_prompt.py", "runtime/test_placeholder.py"), PIPELINE),
    "runtime/bundle": (
        quick(*(f"runtime/test_{name}.py" for name in ("manifest", "external", "layout", "certificate"))),
        quick("exporter/test_atomic.py"),
        BUNDLE,
        PIPELINE,
        exporting("exporter/test_ratios.py"),
    ),
    "exporter/methods/fastv": (
        quick("exporter/test_fastv.py", "exporter/test_planning.py", "exporter/test_method_counts.py"),
        exporting("exporter/test_fastv.py", only="bodies"),
        SPLIT,
    ),
    "exporter/methods/none": (exporting("exporter/test_none.py", only="bodies"), SPLIT),
    "exporter/methods/proxyv": of_method("proxyv"),
    "exporter/methods/_proxyv": of_method("proxyv"),
    "exporter/methods/yopo": of_method("yopo"),
    "exporter/methods/_yopo": of_method("yopo"),
    "exporter/methods/himix": of_method("himix"),
    "exporter/proof/judge": (JUDGE, CHECK),
    "exporter/proof/cases": (JUDGE, CLEAN),
    "exporter/proof/certificate": (exporting("exporter/test_judge.py"), CHECK),
    "exporter/proof/host": (quick("exporter/test_host.py"), exporting("exporter/test_host.py"), CLEAN),
    "exporter/proof/as_run": (JUDGE, exporting("exporter/test_as_run.py")),
    "exporter/proof/polygraphy": (JUDGE, exporting("exporter/test_polygraphy.py")),
    "exporter/proof/unrounded": (quick("exporter/test_unrounded.py"), exporting("exporter/test_as_run.py")),
    "exporter/proof/tensors": (
        quick("exporter/test_weights.py"),
        exporting("exporter/test_host.py"),
        exporting("exporter/test_tampered.py"),
        CLEAN,
    ),
    "exporter/proof": (
        quick("exporter/test_judge.py", "exporter/test_check_methods.py"),
        CLEAN,
        CHECK,
        MISTAKES,
        exporting("exporter/test_judge.py"),
        exporting("exporter/test_as_run.py", only="every_format"),
    ),
}


@dataclass(frozen=True)
class Mutant:
    """A change: where it is, what is there and what comes in its place."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}:{self.line}: {old} -> {new}"


# Changes.

FLIPS: dict[type[ast.cmpop], tuple[str, ...]] = {  # what is written there, and what may take its place
    ast.Lt: ("<", "<=", ">="),
    ast.LtE: ("<=", "<", ">"),
    ast.Gt: (">", ">=", "<="),
    ast.GtE: (">=", ">", "<"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
}
SAME = {  # of a file, how a line begins, and what is changed there to what: with why nobody can tell
    "runtime/pipeline/decoder.py": [
        ("self._begun = 0", "0", "1"),  # only told from later numbers
        ("self._begun += 1", "1", "2"),  # the same
        ("number = self._begun = self._begun + 1", "1", "2"),
        ("self._restored = 0", "0", "1"),  # set with every prompt, before anything reads it
        ("self._restored = 0", "self._restored = 0", "pass"),
        ("self._next = 0", "0", "1"),  # the same
        ("self._next = 0", "self._next = 0", "pass"),
    ],
    "runtime/pictures/views.py": [
        ("if wide < high:", "<", "<="),  # a picture in the canvas's own shape fills it either way
    ],
    "runtime/pictures/sources.py": [
        ("content: bytes = answer.read(MOST + 1)", "1", "2"),  # too much is too much
    ],
    "runtime/bundle/manifest.py": [
        ("sizes = (*canvas.size, *(views.tiles or (1,))", "1", "2"),  # between the least and the most
    ],
    "exporter/proof/parity.py": [
        ("if len(own[0]) != len(wanted[0]):", "0", "1"),  # keys and values have the same heads
        ("found = (c for c, part in parts if not np.isfinite(", "1", "2"),  # zeros are finite, however many
        ("quick = Pipeline.load(bundle, backend", "False", "True"),  # hashes files that were hashed already
    ],
    "runtime/prompt/time_limit.py": [
        ("watcher = threading.Thread(", "True", "False"),  # it is waited for
    ],
    "exporter/proof/polygraphy.py": [
        ("np.save(file,", "False", "True"),  # of arrays of numbers nothing is pickled
    ],
    "exporter/proof/unrounded.py": [
        ("super().__init__(runtime, 0, True)", "0", "1"),  # threads
    ],
    "runtime/pictures/image.py": [
        ("part = min(parts, default=8)", "8", "9"),  # Pillow takes no more than an eighth
    ],
    "exporter/proof/tensors.py": [
        ("if plan.axes > 1:", ">", ">="),  # stock transformers makes three axes of one by itself
        ("if plan.axes > 1:", ">", "<="),
        ("if plan.axes > 1:", "1", "2"),
        ("if plan.axes > 1:", "1", "(0)"),
        ("turns = decoder.rotary_emb(torch.zeros(1)", "1", "2"),  # of which the precision is read alone
        ("turns = decoder.rotary_emb(torch.zeros(1)", "1", "(0)"),
    ],
    "exporter/proof/host.py": [
        ("made = [rng.integers(0, 256, (n or 1, h, w, 3", "0", "1"),  # the darkest pixel of a made-up picture
        ("made = [rng.integers(0, 256, (n or 1, h, w, 3", "3", "4"),  # or one with transparency
        ("processor = AutoImageProcessor.from_pretrained(", "True", "False"),  # the folder is there
    ],
}
AMOUNTS = ("read", "token_hex")  # calls of these whose arguments are constants say how much is taken at a time
SILENT = ("logging", "logger", "log", "warnings")  # calls on these are nobody's behaviour


class Changes(ast.NodeVisitor):
    """Every change of a module, in its order."""

    def __init__(self, file: str, source: str) -> None:
        self.file, self.source = file, source
        self.starts = [0]
        for line in source.encode().splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.bytes = source.encode()
        self.found: list[Mutant] = []
        self.open_sizes: set[ast.expr] = set()
        self.visit(ast.parse(source))

    def place(self, node: ast.AST) -> tuple[int, int]:
        """Where a node is, in bytes."""
        assert isinstance(node, (ast.expr, ast.stmt))
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def add(self, start: int, end: int, new: str) -> None:
        line = self.bytes[:start].count(b"\n") + 1
        mutant = Mutant(self.file, line, start, end, self.bytes[start:end].decode(), new)
        text = self.bytes.splitlines()[line - 1].decode().strip()
        if not any(
            text.startswith(begins) and (mutant.old.strip(), new.strip()) == (a, b)
            for begins, a, b in SAME.get(self.file, ())
        ):
            self.found.append(mutant)

    def between(self, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """Change the operator between two operands."""
        start, end = self.place(left)[1], self.place(right)[0]
        gap = self.bytes[start:end].decode()
        if gap.count(old) == 1 and "#" not in gap:
            self.add(start, end, gap.replace(old, new))

    def drop(self, node: ast.stmt) -> None:
        self.add(*self.place(node), "pass")

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
            old, *others = FLIPS[type(operator)]
            for new in others:
                self.between(left, right, old, new)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts = any(isinstance(side, ast.JoinedStr) or is_text(side) for side in (node.left, node.right))
        if isinstance(node.op, ast.Add | ast.Sub) and not texts:
            old, new = ("+", "-") if isinstance(node.op, ast.Add) else ("-", "+")
            self.between(node.left, node.right, old, new)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between(left, right, old, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self.add(self.place(node)[0], self.place(node.operand)[0], "")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value, (start, end) = node.value, self.place(node)
        if isinstance(value, bool):
            self.add(start, end, str(not value))
        elif isinstance(value, int | float) and abs(value) < 100:
            if node not in self.open_sizes:  # -2 says of a size what -1 says
                self.add(start, end, repr(value + 1))
            if value:
                self.add(start, end, f"({value - 1!r})")

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "reshape":
            self.open_sizes |= {n.operand for n in ast.walk(node) if isinstance(n, ast.UnaryOp)}
        if not is_amount(node):
            self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        believed = node.arg == "strict" and isinstance(node.value, ast.Constant) and node.value.value is True
        if node.arg != "indent" and not believed:
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self.condition(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.condition(node.test)
        self.generic_visit(node)

    def condition(self, test: ast.expr) -> None:
        """Negate what is no comparison, and so on, itself."""
        if isinstance(test, ast.Name | ast.Attribute | ast.Call | ast.Subscript):
            start, end = self.place(test)
            self.add(start, end, f"(not {self.bytes[start:end].decode()})")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not is_silent(node.value):
            self.drop(node)
            self.generic_visit(node)
        elif not isinstance(node.value, ast.Constant | ast.Call):
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            self.drop(node)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.drop(node)
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self.drop(node)

    visit_Continue = visit_Break  # type: ignore[assignment]

    def visit_Raise(self, node: ast.Raise) -> None:
        self.drop(node)  # and nothing inside it: that is a message

    def visit_Assert(self, node: ast.Assert) -> None:
        """Nothing: what we believe of ourselves."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Nothing: a message."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Dict(self, node: ast.Dict) -> None:
        if not any(isinstance(key, ast.Constant) and key.value == "help" for key in node.keys):
            self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for child in node.body:
            self.visit(child)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        returned = "" if node.returns is None else ast.unparse(node.returns)
        if returned.endswith("Error") or node.name == "__repr__":
            return
        for default in (*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)):
            self.visit(default)
        for child in node.body:
            self.visit(child)


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def is_amount(call: ast.Call) -> bool:
    """Whether a call takes so much of something at a time, and the amount changes nothing else."""
    named = isinstance(call.func, ast.Attribute) and call.func.attr in AMOUNTS
    return named and not any(isinstance(part, ast.Name) for each in call.args for part in ast.walk(each))


def is_silent(call: ast.Call) -> bool:
    """Whether a call is one of a logger or of warnings."""
    owner = call.func
    while isinstance(owner, ast.Attribute | ast.Call):
        owner = owner.value if isinstance(owner, ast.Attribute) else owner.func
    return isinstance(owner, ast.Name) and owner.id.lower().lstrip("_") in SILENT


def mutants(files: Sequence[str]) -> list[Mutant]:
    """All mutants of files below the root."""
    return [m for file in files for m in Changes(file, (ROOT / file).read_text("utf-8")).found]


def selected(names: Sequence[str]) -> list[str]:
    """The files that names stand for: files, or folders with all of theirs."""
    found = list[str]()
    for name in names:
        path = ROOT / name
        found += [str(p.relative_to(ROOT)) for p in (sorted(path.glob("*.py")) if path.is_dir() else [path])]
    return [file for file in found if any(file.startswith(name) for name in TESTS)]


# Running.


def copy_sources(folder: Path) -> None:
    """The sources and tests as they are now, and links to what they read."""
    ignored = shutil.ignore_patterns("__pycache__", "oracles", ".oracles", "samples")
    for name in ("exporter", "runtime", "profiles", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("samples", "tests/oracles", "tests/samples"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    for name in ("pyproject.toml", "constraints.txt", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, folder / name)
    package = folder / ".types" / "lvlm_edge"
    package.mkdir(parents=True)
    for name in ("exporter", "runtime", "profiles"):
        (package / name).symlink_to(folder / name)


def preload(folder: Path) -> None:
    """Import what tests import, but none of the project's own."""
    sys.dont_write_bytecode = True
    os.chdir(folder)
    sys.path[:] = [
        str(folder / ".types"),
        str(folder),
        *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "tests"),
    ]
    import numpy  # noqa: F401
    import onnx  # noqa: F401
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import PIL.Image  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401
    import torch
    import torch.onnx._internal.exporter._registration
    from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration  # noqa: F401
    from transformers.models.got_ocr2 import image_processing_pil_got_ocr2  # noqa: F401
    from transformers.models.idefics3 import image_processing_pil_idefics3  # noqa: F401
    from transformers.models.llava_next import modeling_llava_next  # noqa: F401

    torch.set_num_threads(1)


def passes(selection: Selection, folder: Path, log: Path) -> bool | None:
    """Whether tests pass in a fork; None where they took too long."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.setsid()
        with log.open("wb") as output:
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
        import pytest

        options = ["-x", "-n", "0", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=line", "--seed", "0"]
        code = 3
        with contextlib.suppress(BaseException):
            code = int(pytest.main([*selection, *options, "--basetemp", str(folder / "tmp" / "tests")]))
        os._exit(code)
    ended = time.monotonic() + LIMIT
    while time.monotonic() < ended:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) in (0, 5)  # 5: no test of that kind
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def selections(file: str) -> tuple[Selection, ...]:
    return next(found for name, found in TESTS.items() if file.startswith(name))


@contextlib.contextmanager
def mutated(mutant: Mutant, folder: Path) -> Iterator[None]:
    """The copy with the change."""
    path = folder / mutant.file
    right = path.read_bytes()
    assert right[mutant.start : mutant.end].decode() == mutant.old
    path.write_bytes(right[: mutant.start] + mutant.new.encode() + right[mutant.end :])
    try:
        yield
    finally:
        path.write_bytes(right)


def compiles(mutant: Mutant, folder: Path) -> bool:
    with mutated(mutant, folder):
        try:
            compile((folder / mutant.file).read_bytes(), mutant.file, "exec")
        except SyntaxError:
            return False
    return True


def verdict(mutant: Mutant, folder: Path) -> str:
    """`caught`, `timeout` or `survived`."""
    (folder / "tmp").mkdir(exist_ok=True)
    try:
        with mutated(mutant, folder):
            for selection in selections(mutant.file):
                passed = passes(selection, folder, folder / "log")
                if not passed:
                    return "timeout" if passed is None else "caught"
        return "survived"
    finally:
        shutil.rmtree(folder / "tmp", ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=MUTATED, help="files or folders to change; default: %(default)s")
    parser.add_argument("--count", type=int, default=60, help="mutants to make; 0 for all [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="which ones [%(default)s]")
    parser.add_argument(
        "--skip", type=int, default=0, help="leave out the first of them, which ran before [%(default)s]"
    )
    parser.add_argument("--minutes", type=float, default=600, help="begin no mutant after so long [%(default)s]")
    parser.add_argument("--unchecked", action="store_true", help="do not run the tests without a change first")
    parser.add_argument("--list", action="store_true", help="print the mutants and run no test")
    given = parser.parse_args()
    every = mutants(selected(given.files))
    chosen = random.Random(given.seed).sample(every, len(every))[: given.count or None][given.skip :]
    print(f"{len(chosen)} of {len(every)} mutants, seed {given.seed}", flush=True)
    if given.list:
        print(*chosen, sep="\n")
        return
    os.environ.setdefault("LVLM_EDGE_ORACLES", str(ROOT / "tests" / ".oracles"))
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        os.environ["LVLM_EDGE_TRACES"] = str(folder / "traces")
        (folder / "traces").mkdir()
        copy_sources(folder)
        preload(folder)
        if not given.unchecked:
            check_clean(chosen, folder)
        run_all(chosen, folder, time.monotonic() + 60 * given.minutes)


def check_clean(chosen: Sequence[Mutant], folder: Path) -> None:
    """End the program where tests fail without any change."""
    files = {mutant.file for mutant in chosen}
    for selection in dict.fromkeys(s for file in sorted(files) for s in selections(file)):
        (folder / "tmp").mkdir(exist_ok=True)
        began = time.monotonic()
        if not passes(selection, folder, folder / "log"):
            sys.exit(f"tests fail without any change: {' '.join(selection)}\n{(folder / 'log').read_text()[-3000:]}")
        print(f"clean {time.monotonic() - began:5.1f} s  {' '.join(selection)}", flush=True)


def run_all(chosen: Sequence[Mutant], folder: Path, until: float) -> None:
    """Print the verdict of every mutant, and the share that was caught."""
    found = dict.fromkeys(("caught", "timeout", "survived"), 0)
    survivors = list[Mutant]()
    for i, mutant in enumerate(chosen, 1):
        if time.monotonic() > until:
            break
        if not compiles(mutant, folder):
            continue
        began = time.monotonic()
        said = verdict(mutant, folder)
        found[said] += 1
        survivors += [mutant] if said == "survived" else []
        print(f"{i:4} {said:8} {time.monotonic() - began:5.1f} s  {mutant}", flush=True)
    ran = sum(found.values())
    print(
        f"\n{ran} mutants: {ran - found['survived']} caught ({found['timeout']} by the time limit), "
        f"{found['survived']} survived: {100 * (ran - found['survived']) / max(ran, 1):.1f} % caught"
    )
    for mutant in survivors:
        print(f"  {mutant}")


if __name__ == "__main__":
    main()
