"""Bench: time to first token by stage, decode speed and peak memory of bundles on this machine, beside their floors.

Every contender (a bundle on a backend, PyTorch, and the measurement of the machine's own rates) is a process of its
own. Runs are interleaved, one prompt at a time, so that background load affects all of them equally. A turn has a fresh
image and a fresh prompt, the same for all. Runs on the device: PyTorch is imported for `against` alone, and where
onnx_ir is not installed there are no floors.

What is timed:

- `preprocess`: a picture in memory to pixel values; reading a file, chat template and tokenizer are not in it.
- every graph of image and prompt, as `Result.seconds` has it. The projector is part of the graph `vision`.
- `between`: what the host does beside them: token embedding, filling buffers, choosing the token.
- `first_token`: all of these. `decode`: per token after the first.

A floor is what a graph's products take at the best rates that were measured in any turn: all FLOPs of many rows, or all
bytes of weights that are read, whichever takes longer, each format at its own rate. Weights that stay in a cache from
one token to the next can be read faster than that. A prediction is of the median rates, and has beside the products
what each takes to begin, attention, and all other operators; see `planning.rates`. `select` only moves rows and has
neither.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lvlm_edge.exporter.planning import fold_all
from lvlm_edge.exporter.planning import rates as measured
from lvlm_edge.exporter.timing.contenders import RATES, Contender, Runner
from lvlm_edge.exporter.timing.machine import clocks, machine
from lvlm_edge.exporter.timing.speeds import READING, Dimensions
from lvlm_edge.runtime.bundle import Bundle, Graph, Manifest, open_bundle
from lvlm_edge.runtime.errors import LvlmEdgeError, UsageError

Progress = Callable[[str, int, int], None]

TORCH = "PyTorch"


class Worker:
    """A contender's process.

    Raises:
        LvlmEdgeError: the contender cannot begin, or ends; with the exit code of its own error.
    """

    def __init__(self, contender: Contender) -> None:
        self.name = contender.name
        threads = str(contender.threads)
        own = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": "1" if contender.kind == RATES else threads}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lvlm_edge.exporter.timing.contenders", json.dumps(asdict(contender))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | own,
            start_new_session=True,  # a Ctrl-C is for the parent, which ends them all
        )
        try:
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, seed: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says what happened
            self._process.stdin.write(f"{seed}\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LvlmEdgeError(
                f"bench: the process of {self.name} ended with code {self._process.wait()}, expected timings; look at "
                "what it printed, and at the memory that is left (-9 is the system's own end of it)"
            )
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            error = LvlmEdgeError(found["error"])
            error.exit_code = found["exit_code"]
            raise error
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to time; keyword options of `bench`.

    Attributes:
        backends: `ort`, `ort-cuda`, `trt` or `trt-rtx`.
        keep_ratios: those of the ratios that every bundle holds which are to be timed; by default that of its export.
        against: checkpoint of the first bundle, to time PyTorch with too: transformers in float32 with sdpa, on every
            visual token whatever the bundle's method.
        rounds: measured rounds.
        warm_up: rounds before them, not measured.
        threads: of every contender; by default as many as this process may use.
        text_tokens: of a prompt; by default the smallest capacity among the bundles.
        new_tokens: of an answer, at least 2; by default 16, or the smallest capacity.
        seed: of the images and prompts.
        verify: hash the bundles' files first.
        engines: folder of TensorRT engines; by default this user's own.
    """

    backends: Sequence[str] = ("ort",)
    keep_ratios: Sequence[float] = ()
    against: str | Path | None = None
    rounds: int = 7
    warm_up: int = 1
    threads: int | None = None
    text_tokens: int | None = None
    new_tokens: int | None = None
    seed: int = 0
    verify: bool = True
    engines: Path | None = None


def bench(bundles: Sequence[str | Path], *, progress: Progress | None = None, **options: Any) -> dict[str, Any]:
    """Time bundles, each on each backend, in turns; see the module for what is timed.

    Args:
        bundles: folders.
        options: fields of `Settings`.

    Returns:
        `contenders` with median, lowest and highest of every figure and all its values, `rates`, `machine`, `notes`.

    Raises:
        BundleError: a bundle is damaged.
        UsageError: an option is unknown, a count is out of range for a bundle, a bundle lacks a keep ratio, or
            something is given twice.
        UnsupportedError: a backend that is not there, or PyTorch cannot run the checkpoint as it is.
        CheckpointError: the checkpoint is not the first bundle's.
    """
    settings = fold_all(Settings, options, "bench")
    backends, keep_ratios, against = settings.backends, settings.keep_ratios, settings.against
    opened = {
        (folder, ratio): open_bundle(folder, verify=settings.verify, keep_ratio=ratio)
        for folder in map(Path, bundles)
        for ratio in keep_ratios or (None,)
    }
    room = [(b.manifest.counts.text_tokens, b.manifest.counts.new_tokens) for b in opened.values()]
    text = _within("--text-tokens", settings.text_tokens, 1, min(t for t, _ in room), min(t for t, _ in room))
    new = _within("--new-tokens", settings.new_tokens, 2, min(n for _, n in room), min(16, *(n for _, n in room)))
    common: dict[str, Any] = {
        "threads": settings.threads or len(os.sched_getaffinity(0)),
        "text_tokens": text,
        "new_tokens": new,
    }
    engines = "" if settings.engines is None else str(settings.engines)
    names = _names([Path(folder) for folder in bundles], keep_ratios, backends)
    contenders = [
        Contender(
            name=name,
            kind="bundle",
            folder=str(f),
            bundle=str(f),
            keep_ratio=ratio,
            backend=backend,
            engines=engines,
            **common,
        )
        for (f, ratio, backend), name in names.items()
    ]
    if against is not None:
        from lvlm_edge.exporter.checkpoints import checkpoint

        folder, first = str(checkpoint.resolve(against)), str(bundles[0])
        contenders.append(Contender(name=TORCH, kind="torch", folder=folder, bundle=first, backend=TORCH, **common))
    notes = []
    if not _has_onnx_ir():
        notes.append("no floors: onnx_ir is not installed here, which counts a graph's FLOPs")
    elif "ort" in backends:
        contenders.append(Contender(name=RATES, kind=RATES, bundle=str(bundles[0]), **common))
    notes += [f"no floors for {b}: the rates measured are those of a processor" for b in backends if b != "ort"]
    before = clocks()
    turns, about = _run(
        contenders, rounds=settings.rounds, warm_up=settings.warm_up, seed=settings.seed, progress=progress
    )
    rates = best_rates(turns.pop(RATES), about.pop(RATES)) if RATES in turns else None
    first_ratio = next(iter(keep_ratios), None)
    rows = [
        _row(
            c,
            turns[c.name],
            about[c.name],
            opened[Path(c.bundle), c.keep_ratio if c.kind == "bundle" else first_ratio],
            rates if c.backend == "ort" and c.kind == "bundle" else None,
            notes,
        )
        for c in contenders
        if c.kind != RATES
    ]
    _compare(rows, turns)
    notes.append("preprocess: a picture in memory to pixels, without reading a file, chat template and tokenizer")
    if any(any(s["name"] == "vision" for s in row["stages"]) for row in rows):
        notes.append("vision: encoder and projector, which are one graph")
    if against is not None:
        notes.append("PyTorch: float32, sdpa, every visual token; one stage, its vision encoder in it")
    return {
        "machine": machine() | {"clocks_mhz": {"before": before, "after": clocks()}},
        **common,
        "rounds": settings.rounds,
        "warm_up": settings.warm_up,
        "seed": settings.seed,
        "rates": rates,
        "contenders": rows,
        "notes": list(dict.fromkeys(notes)),
    }


def interleaved(
    runners: Mapping[str, Runner], *, rounds: int, warm_up: int, seed: int = 0, progress: Progress | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Turns by contender, without those of `warm_up`.

    In every round each takes one turn, all with one seed; every other round goes backwards through them, so that none
    always follows the same one.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runners}
    for turn in range(warm_up + rounds):
        for name in list(runners)[:: -1 if turn % 2 else 1]:
            if progress:
                progress(name, turn, warm_up + rounds)
            answer = runners[name].ask(seed + turn)
            if turn >= warm_up:
                found[name].append(answer)
    return found


def _run(
    contenders: Sequence[Contender], **settings: Any
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """Turns by contender, and what each says of itself; they begin one after the other."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for contender in contenders:
            workers[contender.name] = worker = Worker(contender)
            stack.callback(worker.close)
        return interleaved(workers, **settings), {name: worker.about for name, worker in workers.items()}


def _within(flag: str, value: int | None, least: int, most: int, default: int) -> int:
    found = default if value is None else value
    if not least <= found <= most:
        raise UsageError(f"bench: {flag} is {found}, the bundles hold {least} to {most}; choose one of these")
    return found


def _names(
    folders: Sequence[Path], ratios: Sequence[float], backends: Sequence[str]
) -> dict[tuple[Path, float | None, str], str]:
    """Names of (folder, keep ratio, backend): the folder's where that tells them apart, what else there are more of."""
    if any(len(set(some)) < len(some) for some in (folders, ratios, backends)):
        raise UsageError("bench: a bundle, keep ratio or backend is given twice; name each once")
    plain = [f.name for f in folders]
    shown = {f: f.name if plain.count(f.name) == 1 and f.name not in (RATES, TORCH) else str(f) for f in folders}
    return {
        (f, r, b): shown[f] + ("" if r is None else f", keep {r:g}") + (f", {b}" if len(backends) > 1 else "")
        for f in folders
        for r in ratios or (None,)
        for b in backends
    }


def _has_onnx_ir() -> bool:
    from importlib.util import find_spec

    return find_spec("onnx_ir") is not None


# Figures of the turns.


def summarised(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and range in ms, and every value."""
    times = [s * 1e3 for s in seconds]
    return {"median_ms": median(times), "low_ms": min(times), "high_ms": max(times), "all_ms": times}


def best_rates(turns: Sequence[Mapping[str, float]], of: Mapping[str, int]) -> dict[str, Any]:
    """The highest rates of all turns, for floors, and the medians, for predictions.

    Args:
        of: dimensions of the decoder that they were measured at.
    """
    best, usual = (
        {name: over([turn[name] for turn in turns]) for name in measured.UNITS if name in turns[0]}
        for over in (max, median)
    )
    floats = measured.ROW["float32"]  # no product reads faster than memory is read
    best[floats] = max(best[floats], *(turn[READING] for turn in turns))
    return {"version": measured.VERSION, "of": dict(of), "best": best, "median": usual, "units": measured.UNITS}


def _row(
    contender: Contender,
    turns: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    bundle: Bundle,
    rates: Mapping[str, Any] | None,
    notes: list[str],
) -> dict[str, Any]:
    """What is reported of one contender."""
    work = {} if rates is None else _fitting_works(bundle, contender, rates["of"], notes)

    def with_floor(name: str, seconds: Sequence[float]) -> dict[str, Any]:
        own = work.get(name)
        found: dict[str, Any] = {"name": name} | summarised(seconds)
        if own is not None and rates is not None and own["flops"]:  # moving rows has no floor by its weights
            at_least = measured.floor(own["work"], rates["best"]) * 1e3
            expected = measured.predicted(own["work"], rates["median"]) * 1e3
            found |= own | _beside(found["median_ms"], at_least, expected)
        return found

    stages = [with_floor(name, [turn["stages"][name] for turn in turns]) for name in turns[0]["stages"]]
    first = summarised([turn["first_token"] for turn in turns])
    if any("floor_ms" in stage for stage in stages):
        sums = (sum(stage.get(key, 0.0) for stage in stages) for key in ("floor_ms", "predicted_ms"))
        first |= _beside(first["median_ms"], *sums)
    return {
        "name": contender.name,
        "kind": contender.kind,
        "folder": contender.folder,
        "keep_ratio": contender.keep_ratio,
        "backend": contender.backend,
        **about,
        "stages": stages,
        "first_token": first,
        "decode": with_floor("decode", [turn["decode"] for turn in turns]),
        "memory": {
            "peak_bytes": max(turn["peak_bytes"] for turn in turns),
            "anonymous_bytes": max(turn["anonymous_bytes"] or 0 for turn in turns) or None,
            "how": "peak_bytes: most that was resident at any time, mapped file pages with it; anonymous_bytes: "
            "without those, the most after any turn",
        },
    }


def _beside(median_ms: float, floor_ms: float, predicted_ms: float) -> dict[str, float]:
    return {
        "floor_ms": floor_ms,
        "times_floor": median_ms / floor_ms,
        "predicted_ms": predicted_ms,
        "times_predicted": median_ms / predicted_ms,
    }


def _compare(rows: Sequence[dict[str, Any]], turns: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Give each row its ratios to the base, PyTorch or else the first: medians of the ratios of each round."""
    base = next((row for row in rows if row["kind"] == "torch"), rows[0])
    for row in rows:
        row["ratio_to"] = base["name"]
        for key in ("first_token", "decode"):
            pairs = zip(turns[row["name"]], turns[base["name"]], strict=True)
            row[key]["ratio"] = median(ours[key] / theirs[key] for ours, theirs in pairs)


def _fitting_works(
    bundle: Bundle, contender: Contender, of: Mapping[str, int], notes: list[str]
) -> dict[str, dict[str, Any]]:
    """The works of a bundle whose decoder has the dimensions that the rates were measured at."""
    own = asdict(Dimensions.of(bundle.manifest)) | {"rows": of["rows"]}
    if own != dict(of):
        notes.append(f"no floors for {contender.name}: the rates are of the first bundle's dimensions; time it alone")
        return {}
    return works(bundle, contender, notes)


def works(bundle: Bundle, contender: Contender, notes: list[str]) -> dict[str, dict[str, Any]]:
    """FLOPs, bytes and work of every graph of image and prompt, and of `decode`, the graphs of one token together.

    A graph whose rows are decided at run time (`--share-weights`) has none, nor one of float16; a note says so.
    """
    from lvlm_edge.exporter.graphs import graph as graphs
    from lvlm_edge.exporter.timing import amounts

    manifest = bundle.manifest
    found: dict[str, dict[str, Any]] = {}
    files = [g.file for g in manifest.graphs]
    for graph in manifest.graphs:
        if files.count(graph.file) > 1:
            notes.append("graphs that share weights are for any number of rows: no floors for them")
            continue
        if contender.text_tokens < manifest.counts.text_tokens and amounts.is_open(bundle, graph, contender.backend):
            notes.append("prompts are shorter than planned: no floors for them; leave out --text-tokens")
            continue
        path = bundle.path(graph.file)
        eight = 8 if contender.backend == "ort" and manifest.formats.prompt and graph.role == "prefill" else None
        work = amounts.of(path, integers=eight)
        if work is None:
            notes.append("graphs of float16: no floors for them, the rates are of float32 and integers")
            continue
        runs = _runs(graph, manifest)
        name = "decode" if graph.role == "decode" else graph.name
        before = found.get(name, {"flops": 0.0, "bytes": 0.0, "work": {}})
        found[name] = {
            "flops": before["flops"] + float(graphs.flops(path)) * runs,
            "bytes": before["bytes"] + float(_weights(path)) * runs,
            "work": measured.total([before["work"], *[work] * runs]),
        }
    if "decode" in found:
        read = cache_bytes(manifest, contender)
        found["decode"]["bytes"] += read
        heads = manifest.model["heads"] / manifest.model["kv_heads"]
        found["decode"]["work"][measured.ATTENTION_ROW] = 2 * heads * read / measured.FLOAT
    return found


def _runs(graph: Graph, manifest: Manifest) -> int:
    """How often a prompt runs a graph: that of the pixels once per crop."""
    seen = any(info.name == "pixel_values" for info in graph.inputs)
    return sum(p.views.count for p in manifest.pictures if graph.name in p.graphs) if seen else 1


def cache_bytes(manifest: Manifest, contender: Contender) -> float:
    """Bytes of the cache rows that a token reads, in the middle of the answer."""
    counts = manifest.counts
    rows = counts.prompt_tokens - counts.text_tokens + contender.text_tokens + contender.new_tokens / 2
    width = {"float32": 4, "float16": 2, "bfloat16": 2}[manifest.dtype]
    return sum(2 * c.heads * c.head_dim * width * (rows - c.dropped) for c in manifest.cache)


def _weights(path: Path) -> int:
    """Bytes of the initializers of a graph file."""
    import onnx_ir as ir

    values = ir.load(path).graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)
