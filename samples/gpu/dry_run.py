"""What ONNX Runtime's CUDA provider makes of bundles, without a GPU: `python samples/gpu/dry_run.py WORK [BUNDLE ...]`.

Runs the backend `ort-cuda` itself on the real onnxruntime-gpu, over stand-ins for CUDA's libraries: which nodes are
placed where, what a decoded token copies and launches, whether decode is captured, and what is allocated for weights
are real. Numbers and speed are not: kernels do nothing.

--export DIR writes the sample's bundles of every method, dtype and lowering (needs the extra `export`); all else needs
onnxruntime-gpu (no GPU and no driver), gcc, nm, and NVIDIA's headers: pip install nvidia-cuda-runtime nvidia-cuda-crt.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import re
import subprocess
import sys
import types
from collections import Counter, defaultdict
from importlib import metadata, util
from pathlib import Path

import click
import numpy as np

from lvlm_edge.runtime import backends
from lvlm_edge.runtime.backends import ort_cuda
from lvlm_edge.runtime.bundle import Bundle, external, open_bundle
from lvlm_edge.runtime.errors import LvlmEdgeError
from lvlm_edge.runtime.pipeline.memory import Memory

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "easyvqa"
METHODS = {  # checkpoint and options
    "none": ("checkpoint", {}),
    "fastv": ("checkpoint", {"method": "fastv", "prune_layer": 2, "keep_ratio": 0.25}),
    "proxyv": ("proxyv", {"method": "proxyv"}),
    "yopo-released": ("yopo", {"method": "yopo", "semantics": "released"}),
    "yopo-dropped": ("yopo", {"method": "yopo", "semantics": "dropped"}),
    "himix": ("himix", {"method": "himix"}),
}
FORMATS = {"int8": {"weights": "int8"}, "int4": {"weights": "int4"}, "shared": {"share_weights": True}}
ALLOCATED = "malloc"


def export_all(target: Path) -> None:
    from lvlm_edge.exporter import export

    cases = [
        (m, low, d, "") for low in ("modern", "legacy") for d in ("float16", "float32", "bfloat16") for m in METHODS
    ]
    cases += [(method, "modern", "float16", kind) for kind in FORMATS for method in ("none", "fastv")]
    for method, lowering, dtype, kind in cases:
        name = "+".join(filter(None, (method, lowering, dtype, kind)))
        checkpoint, options = METHODS[method]
        if not (target / name).is_dir():
            click.echo(name, err=True)
            settings = {"dtype": dtype, "lowering": lowering, "max_text_tokens": 32, "max_new_tokens": 8, "ort": False}
            export(SAMPLE / checkpoint, target / name, **settings | options | FORMATS.get(kind, {}))


# The stand-ins.


def build(folder: Path) -> None:
    """Compile the libraries that the CUDA provider asks for: `stand_ins.c`, and success from everything else."""
    spec = util.find_spec("onnxruntime")
    if spec is None or spec.origin is None or "onnxruntime-gpu" not in {d.name for d in metadata.distributions()}:
        raise click.ClickException("onnxruntime-gpu is not installed; pip install --no-deps onnxruntime-gpu")
    provider = Path(spec.origin).parent / "capi/libonnxruntime_providers_cuda.so"
    headers = next(
        (p / "nvidia/cu13/include" for p in map(Path, sys.path) if (p / "nvidia/cu13/include").is_dir()), None
    )
    if headers is None:
        raise click.ClickException("NVIDIA's headers are missing; pip install nvidia-cuda-runtime nvidia-cuda-crt")
    wanted: defaultdict[str, set[str]] = defaultdict(set, {"libcurand.so.10": set(), "libcuda.so.1": set()})
    for line in subprocess.check_output(["nm", "-D", "-u", provider], text=True).splitlines():
        symbol, _, library = line.split()[-1].partition("@")
        if symbol.startswith("cuTensorMap"):
            library = "libcuda.so.1"
        if library.lstrip("@").startswith("libcu"):
            wanted[library.lstrip("@")].add(symbol)
    folder.mkdir(parents=True, exist_ok=True)
    for library, symbols in wanted.items():
        compile_library(folder / library, symbols, headers)


def compile_library(path: Path, symbols: set[str], headers: Path) -> None:
    """One library that has these symbols, under versions of its own name as NVIDIA's have."""
    own = HERE / "stand_ins.c" if path.name.startswith("libcudart") else None
    written = set(re.findall(r"^[\w *]*?\b(\w+)\(", own.read_text(), re.MULTILINE)) if own else set()
    rest, script = path.with_suffix(".rest.c"), path.with_suffix(".map")
    lines = ["#include <stdlib.h>", "int stand_in;"]
    for symbol in sorted(symbols - written):
        if symbol.endswith(("Create", "Create_v2")):
            lines.append(f"int {symbol}(void **h) {{ *h = calloc(1, 256); return 0; }}")
        elif "GetStatus" in symbol:
            lines.append(f'const char *{symbol}(int s) {{ return "stand-in"; }}')
        else:
            lines.append(f"int {symbol}() {{ return 0; }}")
    rest.write_text("\n".join(lines) + "\n")
    script.write_text(f"{path.name} {{ global: *; }};\n")
    sources = [str(s) for s in (rest, own) if s]
    flags = ["-w", "-shared", "-fPIC", "-O1", "-fno-builtin", f"-I{headers}", f"-Wl,-soname,{path.name}"]
    flags += [f"-Wl,--version-script={script}"] * path.name.startswith(("libcudart", "libcublas"))
    subprocess.check_call(["gcc", *flags, "-o", str(path), *sources])


class Bindings(types.ModuleType):
    """`cuda.bindings.runtime` over the stand-in, whose calls it marks as the backend's."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = enum.IntEnum(
        "cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDeviceToDevice": 3}
    )
    RETURNS = frozenset({"cudaGetDevice", "cudaMalloc", "cudaStreamCreateWithFlags", "cudaDriverGetVersion"})

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__("cuda.bindings.runtime")
        self._library = library
        library.stand_in_who.argtypes = [ctypes.c_char_p]
        library.stand_in_take.restype = ctypes.c_char_p

    def take(self) -> list[list[str]]:
        """What was called since the last time: by whom, what, and with what."""
        return [line.split() for line in self._library.stand_in_take().decode().splitlines()]

    def __getattr__(self, name: str) -> object:
        function = self._library[name]

        def call(*given: int) -> tuple[object, ...]:
            self._library.stand_in_who(b"own")
            try:
                if name == "cudaGetDeviceProperties":
                    major, minor = self._library.stand_in_major(), self._library.stand_in_minor()
                    return 0, types.SimpleNamespace(major=major, minor=minor, integrated=0)
                where = ctypes.c_uint64()
                out = [ctypes.byref(where)] * (name in self.RETURNS)
                status = function(*out, *(ctypes.c_uint64(int(value)) for value in given))
                return (status, where.value) if out else (status,)
            finally:
                self._library.stand_in_who(b"ort")

        return call


# One bundle, in a process of its own.


def child(folder: Path) -> dict[str, object]:
    """What happens when a bundle is opened and decodes."""
    import onnxruntime

    bindings = Bindings(ctypes.CDLL("libcudart.so.13"))
    for name, module in {"cuda": types.ModuleType("cuda"), "cuda.bindings": types.ModuleType("bindings")}.items():
        sys.modules[name] = module
    sys.modules["cuda.bindings.runtime"] = bindings
    opened: list[onnxruntime.InferenceSession] = []

    class Options(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.add_session_config_entry("session.record_ep_graph_assignment_info", "1")

    class Session(onnxruntime.InferenceSession):
        def __init__(self, *given: object, **more: object) -> None:
            super().__init__(*given, **more)
            opened.append(self)

    onnxruntime.SessionOptions, onnxruntime.InferenceSession = Options, Session
    found = ort_cuda.loads  # cuDNN has no stand-in: ONNX Runtime opens it when a graph first needs it
    ort_cuda.loads = lambda file: "cudnn" in file or found(file)
    bundle = open_bundle(folder, verify=False)
    try:
        backend = backends.load("ort-cuda")
        bindings.take()
        memory = Memory(bundle, bundle.manifest, backend)
    except LvlmEdgeError as error:
        return {"problem": str(error)}
    placed: Counter[str] = Counter()
    for session in opened:
        for part in session.get_provider_graph_assignment_info():
            placed[part.ep_name] += len(part.get_nodes())
    events = bindings.take()
    return {
        "nodes": dict(placed),
        "weights": weights(bundle, events),
        "prompt": prompt(bundle, memory, bindings),
        "decode": decode(bundle, memory, bindings),
    }


def weights(bundle: Bundle, events: list[list[str]]) -> dict[str, int]:
    """Bytes of floating-point weights in the file, each once, and what was copied to the device by whom."""
    files = {graph.file for graph in bundle.manifest.graphs}
    found = {w for file in files for w in external.weights(bundle.graph(file)) if w.kind in (1, 10, 16)}
    copied = Counter[str]()
    for by, what, *size in events:
        if what == "copy-H2D":
            copied[by] += int(size[0])
    return {"in_the_file": sum(w.size or 0 for w in found), "by_us": copied["own"], "by_sessions": copied["ort"]}


def prompt(bundle: Bundle, memory: Memory, bindings: Bindings) -> dict[str, object]:
    """Copies of each graph that is not decode's, or what it lacks here."""
    found: dict[str, object] = {}
    for graph in (*bundle.manifest.role("image"), *bundle.manifest.role("prefill")):
        zeros = {t.name: np.zeros(t.shape, np.float32) for t in graph.inputs}
        memory.write([graph], zeros)
        bindings.take()
        try:
            memory.run(graph)
            found[graph.name] = copies(bindings.take())
        except LvlmEdgeError as error:
            found[graph.name] = "needs cuDNN" if "cudnn" in str(error).lower() else str(error)
    return found


def decode(bundle: Bundle, memory: Memory, bindings: Bindings) -> dict[str, object]:
    """What the first token's step and the second's do, from the inputs' writing to the highest logits' reading.

    And what the third does, whose logits are all read.
    """
    graphs = bundle.manifest.role("decode")
    logits = next(t for t in graphs[-1].outputs if t.name == "logits")
    counts = bundle.manifest.counts
    names = {"inputs_embeds", "position_ids", "cache_length", "last_index"} | set(bundle.manifest.image_rows.values())
    steps = []
    for step in range(3):
        length = counts.prompt_tokens + step
        given = {t.name: np.zeros(t.shape, np.float32) for g in graphs for t in g.inputs if t.name in names}
        given |= {name: np.full_like(given[name], length) for name in ("position_ids", "cache_length") if name in given}
        bindings.take()
        memory.write(graphs, given)
        for graph in graphs:
            memory.run(graph, length)
        if memory.finder is not None and step < 2:
            memory.finder.find()
        else:
            memory.buffer(logits).read()
        steps.append(bindings.take())
    first, second = ([what for _, what, *_ in events] for events in steps[:2])
    by_ort = [what for by, what, *_ in steps[1] if by == "ort"]
    replayed = len(graphs) + (memory.finder is not None)
    return {
        "captured": first.count("capture-end") == second.count("graph-launch") == replayed,
        "copies": copies(steps[1]),
        "bytes": sizes(steps[1]),
        "copies_captured": copies(inside(steps[0])),
        "copies_with_logits": copies(steps[2]),
        "bytes_with_logits": sizes(steps[2]),
        "launches": by_ort.count("launch") + by_ort.count("graph-launch"),
        "launches_uncaptured": first.count("launch"),
        "allocations": second.count(ALLOCATED),
    }


def inside(events: list[list[str]]) -> list[list[str]]:
    """What happened while something was captured."""
    found, capturing = [], False
    for event in events:
        capturing = event[1] == "capture-begin" or (capturing and event[1] != "capture-end")
        found += [event] * capturing
    return found


def copies(events: list[list[str]]) -> dict[str, int]:
    """Numbers of copies, by who made them and which way they go."""
    return dict(Counter(f"{by} {what[5:]}" for by, what, *_ in events if what.startswith("copy-")))


def sizes(events: list[list[str]]) -> dict[str, int]:
    """Bytes of copies, as `copies` has their numbers."""
    found = Counter[str]()
    for by, what, *size in events:
        if what.startswith("copy-"):
            found[f"{by} {what[5:]}"] += int(size[0])
    return dict(found)


# The table.


def row(name: str, found: dict[str, dict]) -> str:
    if "problem" in found:
        return f"| {name} | {found['problem']} |"
    step, held = found["decode"], found["weights"]
    inside = Counter(step["copies"]) + Counter(step["copies_captured"])  # what is captured is done again by each replay
    host = sum(n for by, n in inside.items() if by.startswith("ort") and "D2D" not in by)
    own = " + ".join(f"{step['copies'].get(way, 0)} ({step['bytes'].get(way, 0)} B)" for way in ("own H2D", "own D2H"))
    nodes = found["nodes"]
    cpu = sum(n for provider, n in nodes.items() if not provider.startswith("CUDA"))
    once = "yes" if held["by_us"] == held["in_the_file"] else f"no, {held['by_us']} of {held['in_the_file']}"
    captured = "yes" if step["captured"] else "no"
    return (
        f"| {name} | {cpu} of {sum(nodes.values())} | {host} | {own} | {captured} | {step['launches']} "
        f"| {once} | {held['by_sessions']} |"
    )


HEAD = """| bundle | nodes on the CPU | host copies per token in graphs | in and out around them | captured \
| launches | float weights copied once | bytes copied by sessions |
|---|---|---|---|---|---|---|---|"""


@click.command(help=__doc__)
@click.argument("work", type=click.Path(path_type=Path))
@click.argument("bundles", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--export", "target", type=click.Path(path_type=Path), help="Write the sample's bundles there, and end.")
@click.option("--json", "into", type=click.Path(path_type=Path), help="File for all that was found.")
@click.option("--one", is_flag=True, hidden=True)
def main(work: Path, bundles: tuple[Path, ...], target: Path | None, into: Path | None, one: bool) -> None:
    if one:
        click.echo(json.dumps(child(bundles[0])))
        return
    if target is not None:
        export_all(target)
        return
    build(work)
    found, lines = {}, []
    for bundle in bundles:
        command = [sys.executable, __file__, str(work), str(bundle), "--one"]
        environment = {**os.environ, "LD_LIBRARY_PATH": str(work.resolve())}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        lines = done.stdout.splitlines()
        ended = f"ended with {done.returncode}: {done.stderr.strip()[-300:]}"
        found[bundle.name] = json.loads(lines[-1]) if done.returncode == 0 and lines else {"problem": ended}
        if bundle == bundles[0]:
            click.echo(HEAD)
        click.echo(row(bundle.name, found[bundle.name]))
    if into is not None:
        into.write_text(
            json.dumps({"onnxruntime-gpu": metadata.version("onnxruntime-gpu"), "bundles": found}, indent=1)
        )


if __name__ == "__main__":
    main()
