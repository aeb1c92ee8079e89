"""Fit: does a plan run on a device, and can the device build its engines? From config.json and the profile alone.

The prediction is a sum of bytes, made before any work. Its rules, and where they come from:

- An engine holds one copy of its weights, and engines share none: a prompt engine and a decode engine are two copies
  of the decoder. Measured with TensorRT-RTX 1.7.1 on plans built for compute capability 8.6: separate engines of
  28 MB of weights, 31.1 + 29.6 MB; one engine with two wide optimization profiles (`share_weights`), 36.2 MB. ONNX
  Runtime 1.31.1 also keeps one packed copy for each of the two (measured on x86-64), but for methods whose prompt and
  decode run in one of its sessions: with floats always, with integers where `share_weights` asks for it.
- The embedding lies in a mapped file of which each token reads one row; it is in no engine and counts nothing.
- Bytes per weight of a quantised decoder matrix in an engine, TensorRT-RTX 1.7.1: int4 in blocks of 128 0.58, int8
  per channel 1.07, fp8 per tensor 1.07. Norms, biases, lm_head, projector and vision encoder keep the graph's dtype.
- Building needs the libraries (0.7 GB) and 2.7 times the engine's weights, or 1.8 times where the plan is streamed to
  the disk, measured on the host with TensorRT-RTX 1.7.1 and 2.4 GB of weights. Each engine is built in a process of
  its own, so that the largest decides. With unified memory the builder's workspace comes on top. That TensorRT 10 on
  a Jetson keeps to the same factors is unverified.
- Unified memory counts what host and GPU hold; a card counts what lies on the card.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lvlm_edge.exporter import lowerings, methods, planning
from lvlm_edge.exporter.bundles import plans
from lvlm_edge.exporter.devices import profiles
from lvlm_edge.exporter.devices.profiles import GIB, Profile
from lvlm_edge.exporter.planning import BYTES, Plan
from lvlm_edge.runtime.errors import FitError, UnsupportedError, UsageError, nearest
from lvlm_edge.runtime.pictures.views import view_size

# Bytes per weight in an engine; None: the dtype's. fp4 (NVFP4) is the format's own size, unverified in an engine.
WEIGHTS = {"as-is": None, "int8": 1.07, "int4": 0.58, "fp8": 1.07, "fp4": 0.5625}
ENGINE = 4_000_000  # bytes of an engine beside its weights: 1.8 and 3.3 MB measured, 8.4 MB with two wide profiles
LIBRARIES = 700_000_000  # bytes of Python and the TensorRT libraries in a building process, measured
# Bytes that a process needs beside its buffers. With unified memory the libraries and the CUDA context, on a card the
# context alone (both allowances, unverified); ONNX Runtime on a CPU measured.
OVERHEAD = {"unified": LIBRARIES, "card": 500_000_000, "ort": 150_000_000}
SCRATCH = 256 * 2**20  # bytes that kernels of an engine may ask for beside the activations; an allowance, unverified
IN_MEMORY, STREAMED = 2.7, 1.8  # build peak over an engine's weights
STREAMS_SINCE = (10, 13)  # TensorRT version with build_serialized_network_to_stream


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a plan needs of a device and what there is; bytes throughout.

    Attributes:
        weights: of all engines, every copy.
        caches: key and value caches.
        activations: the largest graph's intermediate values, and what graphs hand to each other.
        workspace: kernels' scratch memory.
        overhead: of the process: libraries, CUDA context.
        build_peak: of the process that builds the largest engine; 0 where nothing is built.
        available: what a process may plan with on the device; None if unknown.
        build_available: the same for building; None where engines are built elsewhere, or nothing is built.
        problems: what the device cannot do at all, whatever its memory.
    """

    device: str
    jetpack: str | None
    lowering: str
    dtype: str
    weight_format: str
    share_weights: bool
    weights: int
    caches: int
    activations: int
    workspace: int
    overhead: int
    build_peak: int
    available: int | None
    build_available: int | None
    problems: tuple[str, ...]

    @property
    def run(self) -> int:
        """Bytes in use while the model answers."""
        return self.weights + self.caches + self.activations + self.workspace + self.overhead

    @property
    def fits_run(self) -> bool:
        return not self.problems and (self.available is None or self.run <= self.available)

    @property
    def fits_build(self) -> bool:
        return not self.problems and (self.build_available is None or self.build_peak <= self.build_available)

    @property
    def fits(self) -> bool:
        return self.fits_run and self.fits_build


@dataclass(frozen=True)
class Remedy:
    """Changes under which a plan fits: as flags, and what it then needs, bytes."""

    changes: tuple[str, ...]
    run: int
    build_peak: int


@dataclass(frozen=True)
class _Case:
    """A plan on a device, in one of the ways it could be built."""

    plan: Plan
    profile: Profile
    weight_format: str

    def fit(self) -> Fit:
        return predict(self.plan, self.profile, weights=self.weight_format)


@dataclass(frozen=True)
class _Change:
    """A flag and what it does to a case; None where the method or device does not have it."""

    flag: str
    apply: Callable[[_Case], _Case | None]


def predict(plan: Plan, profile: Profile, *, weights: str = "as-is") -> Fit:
    """What a plan needs of a device.

    Args:
        weights: format of the decoder's matrices: as-is, int8, int4 or fp8.

    Raises:
        UsageError: an unknown weight format.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"weights: {weights!r} is not known; {nearest(weights, WEIGHTS)}")
    built = profile.builds
    in_one = profile.backend == "ort" and plan.lowering.shares_weights and plan.method.shares_weights
    in_one = in_one and (plan.share_weights or weights == "as-is")
    together = in_one or (profile.backend == "ort-cuda" and weights == "as-is")
    prompt = plan.formats.prompt if profile.backend == "ort" else None
    engines = engine_bytes(_sharing(plan) if together else plan, weights=weights, prompt=prompt)
    memory = _memory(profile)
    usable = None if memory is None else round(memory * profile.usable_share.value)
    # TensorRT-RTX builds anywhere, and for a card TensorRT builds in the host's memory, which the profile cannot know.
    here = profile.backend == "trt" and profile.unified_memory
    place = "ort" if profile.kind == "cpu" else "unified" if profile.unified_memory else "card"
    peak = LIBRARIES + round(max(engines) * _build_factor(profile)) + workspace_bytes(profile) * profile.unified_memory
    return Fit(
        device=profile.name,
        jetpack=profile.jetpack,
        lowering=plan.lowering.name,
        dtype=plan.dtype,
        weight_format=weights,
        share_weights=plan.share_weights,
        weights=sum(engines) + (ENGINE * len(engines) if built else 0),
        caches=plan.kv_cache_bytes(),
        activations=_activations(plan),
        workspace=SCRATCH if built else 0,
        overhead=OVERHEAD[place],
        build_peak=peak if built else 0,
        available=usable,
        build_available=usable if here else None,
        problems=_problems(plan, profile, weights),
    )


def engine_bytes(plan: Plan, *, weights: str = "as-is", prompt: str | None = None) -> tuple[int, ...]:
    """Weight bytes of each engine: vision with projector, those of the prompt's stages, and those of decode.

    Where weights are shared, the stages' engines serve decode too.

    Args:
        weights: format of the decoder's matrices.
        prompt: their format in the prompt's stages, where it is one of their own.
    """
    width = BYTES[plan.dtype]
    count = planning.decoder_weights(plan.spec.decoder)

    def layer(kind: str) -> float:
        return count.matrices * (WEIGHTS[kind] or width) + count.vectors * width

    every = range(plan.spec.decoder.layers)
    runs = [run for stage in plan.stages for run in plan.subgraphs(stage.layers)]
    kinds = [prompt or weights] * len(runs)
    last = len(runs) - 1  # of the prompt
    runs += [] if plan.share_weights else plan.subgraphs(every)
    kinds += [weights] * (len(runs) - len(kinds))
    end = (count.norm + count.head) * width
    layers = [len(run) * layer(kind) for run, kind in zip(runs, kinds, strict=True)]
    decoder = [size + (end if run.stop == every.stop else 0) for size, run in zip(layers, runs, strict=True)]
    decoder[last] += plan.method.own_weights(plan) * width  # of the method, which decode does without
    return tuple(round(size) for size in [sum(planning.vision_weights(plan)) * BYTES[plan.vision_dtype], *decoder])


def workspace_bytes(profile: Profile) -> int:
    """Workspace that TensorRT's builder may use: 1 GiB, or less on small boards."""
    memory = _memory(profile)
    return GIB if memory is None else min(GIB, round(memory / 16))


def _memory(profile: Profile) -> int | None:
    if profile.memory_gb is None:
        return profiles.memory_bytes()
    return round(profile.memory_gb.value * GIB)


def _build_factor(profile: Profile) -> float:
    release = profile.release
    return IN_MEMORY if release and profiles.numbers(release.tensorrt) < STREAMS_SINCE else STREAMED


def _activations(plan: Plan) -> int:
    """Bytes of the largest graph's intermediate values, and of what passes between graphs.

    At its widest a layer holds the residual stream twice beside either queries, keys and values, or gate, up and
    their product. The legacy lowering also has the scores of every head in the dtype and in float32 (operators of
    opset 18 are not sure to be fused), and hands every new cache row out. An upper estimate: what reuses buffers
    within a layer is not seen here.
    """
    d, width = plan.spec.decoder, BYTES[plan.dtype]
    dq, dkv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    legacy = not plan.lowering.shares_weights

    def graph(rows: int, keys: int, hidden: int, heads: int, wide: int) -> int:
        return rows * (2 * hidden + wide) * width + (heads * rows * keys * (width + 4) if legacy else 0)

    seen = BYTES[plan.vision_dtype]
    scratch = [work.activations(seen, scores=legacy) for _, *both in planning.vision_work(plan) for work in both]
    scratch += [graph(s.queries, s.keys, d.hidden, d.heads, max(dq + 2 * dkv, 3 * d.ffn)) for s in plan.stages]
    images = plan.visual_tokens * d.hidden * width
    for picture in plan.pictures:
        columns, rows = view_size(picture.views)
        images += picture.views.count * 3 * columns * rows * seen
    handed = images + plan.prompt_tokens * d.hidden * width + 4 * d.vocab
    handed += sum(s.queries * d.hidden * width for s in plan.stages[:-1])
    if legacy:
        handed += sum(len(s.layers) * s.cached * 2 * dkv * width for s in plan.stages)
    return max(scratch) + handed


def _problems(plan: Plan, profile: Profile, weights: str) -> tuple[str, ...]:
    """What the device cannot do at all, each with what to do instead."""
    found = []
    if plan.dtype not in profile.dtypes:
        found.append(f"does not run {plan.dtype}; choose --dtype {' or '.join(profile.dtypes)}")
    if weights != "as-is" and weights not in profile.quantised.value:
        known = ", ".join(profile.quantised.value)
        found.append(f"does not compute with {weights} weights; it does with {known}")
    release = profile.release
    if release is not None and plan.lowering.name not in profile.lowerings:
        advice = [f"--lowering {name}" for name in profile.lowerings]
        newer = next((r for r in profile.jetpacks if plan.lowering.name in r.lowerings), None)
        advice += [f"--device {profile.name}@{newer.version} once it runs that JetPack"] if newer else []
        found.append(
            f"has TensorRT {release.tensorrt} (JetPack {release.version}), which does not parse the "
            f"{plan.lowering.name} lowering; choose {' or '.join(advice)}"
        )
    if profile.backend == "trt-rtx" and (plan.dtype, plan.lowering.name) == ("float32", "modern"):
        # tensorrt_rtx 1.7.1: "Attention operation was not supported by a dedicated kernel"
        found.append("has no float32 kernel for Attention; choose --dtype float16 or --lowering legacy")
    return tuple(found)


def remedies(plan: Plan, profile: Profile, *, weights: str = "as-is") -> tuple[Remedy, ...]:
    """The smallest sets of changes under which a plan fits, at most four; empty where none does.

    Tried: shared weights, a smaller keep ratio, fewer text tokens, a newer JetPack, quantised decoder matrices.
    """
    start = _Case(plan, profile, weights)
    kinds = [kind for kind in _changes(start) if kind]
    for size in range(1, len(kinds) + 1):
        found = []
        for chosen in itertools.combinations(kinds, size):
            # Each kind lists its mildest change first, so the first that fits is the mildest.
            for changes in itertools.product(*chosen):
                fit = _fit_after(start, changes)
                if fit is not None and fit.fits:
                    found.append(Remedy(tuple(c.flag for c in changes), fit.run, fit.build_peak))
                    break
        if found:
            return tuple(found[:4])
    return ()


def _fit_after(case: _Case | None, changes: tuple[_Change, ...]) -> Fit | None:
    for change in changes:
        case = None if case is None else change.apply(case)
    return None if case is None else case.fit()


def _changes(start: _Case) -> list[list[_Change]]:
    """Changes that could help, by kind, the mildest of a kind first."""
    share = _Change("--share-weights", _shared)
    newest = start.profile.jetpacks[-1].version if start.profile.jetpacks else None
    return [
        [_keep(start.plan, ratio) for ratio in (0.5, 0.25, 0.1)],
        [_text(n) for n in (128, 64, 32) if n < start.plan.text_tokens],
        [_jetpack(start.profile.name, newest)] if newest and newest != start.profile.jetpack else [],
        [share] if not start.plan.share_weights and start.profile.builds else [],
        [_weights(kind) for kind in ("int8", "int4") if _smaller(kind, start)],
    ]


def _shared(case: _Case) -> _Case | None:
    """The case with one copy of the weights, which only the modern lowering can have."""
    return replace(case, plan=_sharing(case.plan)) if case.plan.lowering.shares_weights else None


def _sharing(plan: Plan) -> Plan:
    """The plan whose prompt and decode run in the same graphs."""
    return replace(plan, settings=replace(plan.settings, share_weights=True))


def _keep(plan: Plan, ratio: float) -> _Change:
    """Keep fewer visual tokens: by the plan's own method where it keeps a share, else by the first that does."""
    own = plan.method.name
    names = [own, *methods.names()]
    name = next((n for n in names if "keep_ratio" in {f.name for f in fields(methods.load(n).config)}), own)
    flag = f"--keep-ratio {ratio:g}" if name == own else f"--method {name} --keep-ratio {ratio:g}"

    def apply(case: _Case) -> _Case | None:
        before = asdict(case.plan.config) if name == case.plan.method.name else {}
        return _again(case, name, before | {"keep_ratio": ratio, "keep_tokens": None}, case.plan.text_tokens)

    return _Change(flag, apply)


def _text(tokens: int) -> _Change:
    def apply(case: _Case) -> _Case | None:
        return _again(case, case.plan.method.name, asdict(case.plan.config), tokens)

    return _Change(f"--max-text-tokens {tokens}", apply)


def _again(case: _Case, method: str, options: dict[str, Any], text_tokens: int) -> _Case | None:
    """The case with its plan made anew; None where the plan cannot be made, or keeps more than before."""
    plan = case.plan
    try:
        made = plans.make(
            planning.Model(plan.family, plan.spec, plan.pictures),
            replace(plan.capacity, max_text_tokens=text_tokens),
            replace(plan.settings, share_weights=False, max_graph_gb=planning.MAX_GRAPH_GB),
            method=method,
            options=options,
        )
    except (UsageError, UnsupportedError):
        return None
    if made.kept_tokens > plan.kept_tokens:
        return None
    return replace(case, plan=replace(made, lowering=plan.lowering, settings=plan.settings))


def _jetpack(name: str, version: str) -> _Change:
    def apply(case: _Case) -> _Case:
        newer = case.profile.with_jetpack(version)
        lowering = lowerings.load(newer.lowering)
        return replace(case, profile=newer, plan=replace(case.plan, lowering=lowering))

    return _Change(f"--device {name}@{version}", apply)


def _weights(kind: str) -> _Change:
    return _Change(f"{kind} decoder weights", lambda c: replace(c, weight_format=kind))


def _smaller(kind: str, case: _Case) -> bool:
    size = WEIGHTS[kind]
    assert size is not None
    before = WEIGHTS[case.weight_format] or BYTES[case.plan.dtype]
    return kind in case.profile.quantised.value and size < before


def check(plan: Plan, profile: Profile, *, weights: str = "as-is") -> Fit:
    """The prediction, if the plan fits.

    Raises:
        FitError: a dtype or lowering that the device does not have, or more memory than it has, to run or to build;
            the message says by how much, and what would fit.
    """
    fit = predict(plan, profile, weights=weights)
    if fit.problems:
        raise FitError(f"fit: {profile.name} {fit.problems[0]}")
    over = []
    if fit.available is not None and not fit.fits_run:
        over.append(f"{_gb(fit.run)} to run, {_gb(fit.run - fit.available)} too much")
    if fit.build_available is not None and not fit.fits_build:
        over.append(
            f"{_gb(fit.build_peak)} to build its largest engine, {_gb(fit.build_peak - fit.build_available)} too much"
        )
    if not over:
        return fit
    raise FitError(
        f"fit: {profile.name} has {_gb(fit.available or 0)} for a process, but {plan.method.name} in {plan.dtype} "
        f"needs {' and '.join(over)}; {_advice(_Case(plan, profile, weights))}"
    )


def _advice(case: _Case) -> str:
    found = remedies(case.plan, case.profile, weights=case.weight_format)
    if found:
        return "would fit: " + " | ".join(f"{' and '.join(r.changes)} ({_gb(r.run)})" for r in found)
    strongest = tuple(kind[-1] for kind in _changes(case) if kind)
    least = _fit_after(case, strongest)
    if least is None or not strongest:
        return "choose a larger device (lvlm-edge devices)"
    said = f"even {' and '.join(c.flag for c in strongest)} needs {_gb(least.run)} to run"
    built = f" and {_gb(least.build_peak)} to build" if least.build_available is not None else ""
    return f"{said}{built}; choose a larger device (lvlm-edge devices)"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def report(plan: Plan, profile: Profile, *, weights: str = "as-is") -> dict[str, Any]:
    """The prediction as `plan --json` prints it under `fit`; bytes."""
    fit = predict(plan, profile, weights=weights)
    helps = () if fit.fits else remedies(plan, profile, weights=weights)
    return asdict(fit) | {
        "run": fit.run,
        "fits_run": fit.fits_run,
        "fits_build": fit.fits_build,
        "helps": [asdict(remedy) for remedy in helps],
    }
