"""Bundle to TensorRT engines, one graph after the other, each in a process of its own so that its memory comes back.

Runs where the engines are needed, or for TensorRT-RTX anywhere; never imports torch. A plan is executable code: it is
built from the bundle's graphs, listed with its hash in `engines.json` in this user's cache folder, and never shipped.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lvlm_edge.runtime import bundle as manifests
from lvlm_edge.runtime.backends.cuda import highest
from lvlm_edge.runtime.backends.cuda.engines import ENGINES as ENGINES
from lvlm_edge.runtime.backends.cuda.engines import MODULES, SCHEMA, folder
from lvlm_edge.runtime.backends.cuda.engines import PORTABLE as PORTABLE
from lvlm_edge.runtime.bundle import kv_cache
from lvlm_edge.runtime.bundle.replacing import replacing
from lvlm_edge.runtime.errors import BundleError, LvlmEdgeError, UnsupportedError, UsageError

WORKSPACE = 1 << 30  # bytes
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a plan depends on beside its graph.

    Attributes:
        backend: `trt` (TensorRT) or `trt-rtx` (TensorRT-RTX).
        compute_capabilities: `major.minor`, or `portable`; for `trt` always this machine's.
        optimisation_level: 0 (fast to build) to 5, None for TensorRT's default.
    """

    backend: str
    compute_capabilities: tuple[str, ...] = (PORTABLE,)
    workspace: int = WORKSPACE
    optimisation_level: int | None = None


def build(
    bundle: str | Path,
    settings: Settings,
    *,
    graphs: Iterable[str] | None = None,
    keep_ratio: float | None = None,
    engines: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Build a bundle's engines. What is up to date stays; after a kill the same call goes on where it stopped.

    Args:
        graphs: names of graphs to build; all by default, and the one that finds the highest logits.
        keep_ratio: one of those that the bundle holds; that of its export by default.
        engines: folder of all engines; by default this user's own (`runtime.backends.cuda.engines.home`).

    Returns:
        The folder with the engines and `engines.json`.

    Raises:
        BundleError: the bundle is damaged or altered.
        UnsupportedError: TensorRT is not installed here, or does not take a graph.
        UsageError: an unknown graph or compute capability.
    """
    opened = manifests.open_bundle(bundle, keep_ratio=keep_ratio)
    version = _version(settings.backend)
    wanted = _chosen(opened.manifest, graphs)
    out = _made(folder(opened, settings.backend, engines))
    common = {
        "schema": SCHEMA,
        "flavour": MODULES[settings.backend],
        "version": version,
        "platform": f"{sys.platform}-{platform.machine()}",
        "settings": json.loads(json.dumps(asdict(settings))),
        "weights_sha256": opened.manifest.files[opened.manifest.weights].sha256,
    }
    record = _read(out / ENGINES)
    if {key: record.get(key) for key in common} != common:
        record = {**common, "engines": {}}
    with tempfile.TemporaryDirectory() as own:
        sources = [_source(opened, file) for file in wanted]
        sources += [] if graphs is not None else _highest(opened.manifest, Path(own))
        for i, source in enumerate(sources):
            entry = record["engines"].get(source.file)
            if entry is None or not _current(entry, out, source.sha256):
                if progress:
                    progress(f"building {source.file}", i, len(sources))
                record["engines"][source.file] = _build_one(source, out, settings, progress)
                _write(out / ENGINES, record)
    _write(out / ENGINES, record)
    return out


@dataclass(frozen=True)
class Source:
    """A file that an engine is built from.

    Attributes:
        file: what its engine is listed as.
        graphs: that run it.
    """

    file: str
    path: Path
    sha256: str
    graphs: tuple[manifests.Graph, ...] = ()


def _source(bundle: manifests.Bundle, file: str) -> Source:
    """A graph of the bundle, once it is sure that it reads the bundle's weights alone."""
    bundle.graph(file)
    manifest = bundle.manifest
    return Source(file, bundle.path(file), manifest.files[file].sha256, manifest.graphs_of(file))


def _highest(manifest: manifests.Manifest, folder: Path) -> list[Source]:
    """The graph that finds the highest logits, written into a folder, where this vocabulary has one."""
    vocab = manifest.embedding.vocab
    if highest.row_of(manifests.TensorInfo("logits", "float32", (1, 1, vocab))) is None:
        return []
    path = folder / highest.FILE
    path.write_bytes(highest.graph(vocab))
    return [Source(highest.FILE, path, manifests.sha256(path))]


def _made(out: Path) -> Path:
    """The folder of the engines, which this user alone can read and write, and not where a link leads to."""
    for path in (out.parent, out):
        if path.is_symlink():
            raise BundleError(f"{path}: is a link, expected a folder of engines; remove it and build again")
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be made ({error.strerror}); choose another folder with --engines"
            ) from error
    for left in out.glob(".*.lvlm-edge*"):  # by a killed build
        left.unlink()
    return out


def _chosen(manifest: manifests.Manifest, names: Iterable[str] | None) -> list[str]:
    """Files of the graphs, each once: graphs of one file are one engine."""
    known = {graph.name: graph.file for graph in manifest.graphs}
    for name in names or ():
        if name not in known:
            raise UsageError(f"build: graph {name!r} is not in the bundle; its graphs: {', '.join(known)}")
    return list(dict.fromkeys(known[name] for name in names or known))


def _version(backend: str) -> str:
    """Version that the installed TensorRT gives itself, asked in another process: it is not imported here."""
    if backend not in MODULES:
        raise UnsupportedError(f"build: backend {backend!r} has no engines; choose a device with trt or trt-rtx")
    name = MODULES[backend]
    asked = [sys.executable, "-c", f"import {name}; print({name}.__version__)"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        advice = "pip install tensorrt-rtx" if backend == "trt-rtx" else "install TensorRT (on a Jetson: from JetPack)"
        last = (done.stderr.strip().splitlines() or ["it does not load"])[-1]
        raise UnsupportedError(f"build: {name} is not installed here ({last}); {advice}")
    return done.stdout.strip()


def _current(entry: dict[str, Any], out: Path, graph_sha256: str) -> bool:
    path = out / str(entry.get("file"))
    same = entry.get("graph_sha256") == graph_sha256 and path.is_file() and path.stat().st_size == entry.get("size")
    return same and manifests.sha256(path) == entry.get("sha256")


def _build_one(source: Source, out: Path, settings: Settings, progress: Progress | None) -> dict[str, Any]:
    """Build one engine in a process of its own; its entry for `engines.json`."""
    plan = out / f"{Path(source.file).stem}.engine"
    with replacing(plan, 0o600) as partial:
        said = _work(source, partial, settings, progress)
    return {
        "file": plan.name,
        "size": plan.stat().st_size,
        "sha256": manifests.sha256(plan),
        "graph_sha256": source.sha256,
        "aliases": _aliases(source.graphs[0]) if source.graphs else {},
        "peak_bytes": said["peak"],
        "seconds": said["seconds"],
    }


def _work(source: Source, plan: Path, settings: Settings, progress: Progress | None) -> dict[str, Any]:
    """Build a plan in another process; what that says last: its `peak` memory in bytes, and `seconds`."""
    profiles = _profiles(source.graphs) if source.graphs else []
    job = {"onnx": str(source.path), "plan": str(plan), "profiles": profiles, **asdict(settings)}
    worker = subprocess.Popen(
        [sys.executable, "-m", __name__, json.dumps(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"CUDA_MODULE_LOADING": "LAZY"},
    )
    assert worker.stdout is not None and worker.stderr is not None
    said: dict[str, Any] = {}
    try:
        for line in worker.stdout:
            said = json.loads(line) if line.startswith("{") else said
            if progress and "done" in said:
                progress(f"building {source.file}: {said['phase']}", said["done"], said["total"])
        noise = worker.stderr.read()
        status = worker.wait()
    finally:
        if worker.poll() is None:
            worker.kill()
    if status != 0 or "peak" not in said:
        reason = said.get("error") or (noise.strip().splitlines() or [f"it ended with status {status}"])[-1]
        if "cudaError 35" in reason:
            # What TensorRT-RTX falls back to without a GPU; its own log does not say what made it.
            reason += "; without a GPU it says this when memory ran out or a head size has no attention kernel"
        raise LvlmEdgeError(
            f"{source.path}: {MODULES[settings.backend]} did not build it ({reason}); see "
            "`lvlm-edge devices` for dtypes and lowerings, or export with --lowering legacy"
        )
    return said


def _aliases(graph: manifests.Graph) -> dict[str, str]:
    """Outputs that must have the memory of an input: caches that the graph writes in place."""
    inputs = {info.name: info.shape for info in graph.inputs}
    pairs = {info.name: kv_cache.shared_name(info.name) for info in graph.outputs}
    shapes = {info.name: info.shape for info in graph.outputs}
    return {o: i for o, i in pairs.items() if o != i and inputs.get(i) == shapes[o]}


def _profiles(graphs: Sequence[manifests.Graph]) -> list[dict[str, list[list[int]]]]:
    """An optimization profile per graph of a file: of each input whose shape differs, the least, usual and most.

    All reach from the smallest to the largest shape: profiles of one exact shape each would be two copies of the
    weights, in two layouts, where these are one.
    """
    shapes = [{g.names.get(t.name, t.name): t.shape for t in g.inputs} for g in graphs]
    open_ = [name for name, shape in shapes[0].items() if any(other[name] != shape for other in shapes)]
    least = {name: [min(sizes) for sizes in zip(*(s[name] for s in shapes), strict=True)] for name in open_}
    most = {name: [max(sizes) for sizes in zip(*(s[name] for s in shapes), strict=True)] for name in open_}
    return [{name: [least[name], list(own[name]), most[name]] for name in open_} for own in shapes] if open_ else []


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("engines"), dict) else {}


def _write(path: Path, record: dict[str, Any]) -> None:
    with replacing(path, 0o600) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


# The worker process. Only what follows imports TensorRT.


def work(job: dict[str, Any]) -> None:
    """Parse one graph and stream its plan to a file; progress, errors and the peak go to stdout as JSON lines."""
    import importlib
    import time

    trt = importlib.import_module(MODULES[job["backend"]])
    began, errors = time.perf_counter(), []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                errors.append(message)

    log = Log()
    builder = trt.Builder(log)
    strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strong is None else 1 << int(strong))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["onnx"]):
        _fail(" ".join(parser.get_error(i).desc() for i in range(parser.num_errors)), errors)
    config = builder.create_builder_config()
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace"])
    if job["optimisation_level"] is not None:
        config.builder_optimization_level = job["optimisation_level"]
    if job["backend"] == "trt-rtx":
        owned = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)  # lets decode be captured as a CUDA graph
        if owned is not None:
            config.set_flag(owned)
        _target(trt, config, job["compute_capabilities"])
    config.progress_monitor = _monitor(trt)
    if not _stream(trt, builder, network, config, job["plan"]):
        _fail("no engine came out", errors)
    print(json.dumps({"peak": _peak(), "seconds": round(time.perf_counter() - began, 2)}), flush=True)


def _peak() -> int:
    """Peak resident memory of this process, bytes; 0 where the system does not tell."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def _target(trt: Any, config: Any, capabilities: list[str]) -> None:
    """Compile for the given compute capabilities; none set means one portable plan."""
    if capabilities == [PORTABLE]:
        return
    config.num_compute_capabilities = len(capabilities)
    for i, name in enumerate(capabilities):
        found = getattr(trt.ComputeCapability, "SM" + name.replace(".", ""), None)
        if found is None:
            known = [n for n in dir(trt.ComputeCapability) if n.startswith("SM")]
            _fail(f"compute capability {name} is no target of TensorRT-RTX; targets: {', '.join(known)}", [])
        config.set_compute_capability(found, i)


def _stream(trt: Any, builder: Any, network: Any, config: Any, path: str) -> bool:
    """Write the plan as it is made where this TensorRT can, else from memory; whether there is one."""
    if not hasattr(builder, "build_serialized_network_to_stream"):  # before 10.13
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            return False
        Path(path).write_bytes(plan)
        return True
    with open(path, "wb") as file:

        class Writer(trt.IStreamWriter):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: bytes) -> int:
                return file.write(data)

        return bool(builder.build_serialized_network_to_stream(network, config, Writer()))


def _monitor(trt: Any) -> Any:
    """TensorRT's progress monitor, printing phases as JSON lines."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            line = {"phase": phase_name, "done": step, "total": self.steps.get(phase_name, step)}
            print(json.dumps(line), flush=True)
            return True

    return Monitor()


def _fail(reason: str, errors: list[str]) -> None:
    detail = f"{reason}; {errors[-1]}" if errors else reason
    print(json.dumps({"error": " ".join(detail.split())[:600]}), flush=True)
    sys.exit(1)


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
