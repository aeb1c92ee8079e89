"""Profile: one file of `lvlm_edge.profiles`, validated; every figure carries its source. Imports nothing heavy."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from lvlm_edge.runtime.backends import ort_cuda
from lvlm_edge.runtime.errors import LvlmEdgeError, UnsupportedError, nearest

CHOICES = {
    "kind": ("jetson", "gpu", "cpu"),
    "backend": ("ort", "ort-cuda", "trt", "trt-rtx"),
    "lowering": ("modern", "legacy"),
    "dtypes": ("float32", "float16", "bfloat16"),
    "quantised": ("int8", "int4", "fp8", "fp4"),
    "tflops": ("float32", "float16", "bfloat16", "int8", "fp8", "fp4"),
}
UNVERIFIED = "unverified"
SOURCES = ("https://", "computed: ", "measured: ")  # what a source begins with, if it is not "unverified"
# The compute capability from which the hardware has a dtype.
SINCE = {"bfloat16": (8, 0), "fp8": (8, 9), "fp4": (10, 0)}
# TensorRT versions whose parser takes a lowering. Modern: IAttention came in 10.14, IKVCacheUpdateLayer and
# IRotaryEmbeddingLayer in 10.15. Legacy: opset 18; 8.6 parses up to opset 17.
PARSES = {"legacy": (10, 3), "modern": (10, 15)}
GIB = 2**30

T = TypeVar("T")


class ProfileError(LvlmEdgeError):
    """A profile file is malformed."""


@dataclass(frozen=True)
class Figure(Generic[T]):
    """A value and where it comes from.

    Attributes:
        source: a public address, `computed: ...`, `measured: ...`, or `unverified`.
        note: what else there is to say, such as the conditions of the value.
    """

    value: T
    source: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class JetPack:
    """What a JetPack release brings; versions as `major.minor` or longer."""

    version: str
    l4t: str
    tensorrt: str
    cuda: str
    python: str
    source: str
    note: str = ""

    @property
    def lowerings(self) -> tuple[str, ...]:
        """The lowerings that its TensorRT parses."""
        return tuple(name for name, since in PARSES.items() if numbers(self.tensorrt) >= since)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A device: what runs the graphs there, in which form it wants them, and how much it can take.

    Attributes:
        name: the file's name without `.toml`, with hyphens.
        description: one line for people.
        kind: jetson, gpu (a card or a desktop computer) or cpu.
        backend: what runs the graphs best: ort, ort-cuda, trt or trt-rtx.
        lowering: operators the graphs use by default: modern (opset 24) or legacy (opset 18).
        dtypes: dtypes of graphs that the device runs.
        default_dtype: the one of them used when none is asked for.
        unified_memory: CPU and GPU share one memory.
        quantised: weight formats that the device computes with: int8, int4, fp8, fp4.
        usable_share: of the memory, what a process may plan with; more is missing where the system shares it.
        model: found in /proc/device-tree/model of the board; Jetsons only.
        jetpack: the release assumed where none is named; Jetsons only.
        jetpacks: what each release brings, oldest first; Jetsons only.
        compute_capability: `major.minor`; None for cpu.
        memory_gb: size as the vendor names it, in GiB; None for cpu, whose memory is this machine's.
        bandwidth_gb_s: of the memory, 10^9 bytes per second.
        power_modes: names of the power modes, or the power limit of a card.
        tflops: dense rates by dtype, 10^12 operations per second, a multiply-accumulate being two.
    """

    name: str
    description: str
    kind: str
    backend: str
    lowering: str
    dtypes: tuple[str, ...]
    default_dtype: str
    unified_memory: bool
    quantised: Figure[tuple[str, ...]]
    usable_share: Figure[float]
    model: str | None = None
    jetpack: str | None = None
    jetpacks: tuple[JetPack, ...] = ()
    compute_capability: Figure[str] | None = None
    memory_gb: Figure[float] | None = None
    bandwidth_gb_s: Figure[float] | None = None
    power_modes: Figure[tuple[str, ...]] | None = None
    tflops: Mapping[str, Figure[float]] | None = field(default=None, hash=False)

    @property
    def release(self) -> JetPack | None:
        """The row of `jetpacks` in use."""
        return next((row for row in self.jetpacks if row.version == self.jetpack), None)

    @property
    def lowerings(self) -> tuple[str, ...]:
        """The lowerings that the device's TensorRT (or ONNX Runtime) takes."""
        return CHOICES["lowering"] if self.release is None else self.release.lowerings

    @property
    def backends(self) -> tuple[str, ...]:
        """What runs the graphs: `backend`, and `ort-cuda` where onnxruntime-gpu's wheels have code for the GPU."""
        if self.compute_capability is None or self.backend == ort_cuda.NAME:
            return (self.backend,)
        machine = "aarch64" if self.unified_memory else "x86_64"
        runs = ort_cuda.has_code(numbers(self.compute_capability.value), machine)
        return (self.backend, ort_cuda.NAME) if runs else (self.backend,)

    @property
    def builds(self) -> bool:
        """Whether its backend runs engines that are built from the graphs."""
        return self.backend in ("trt", "trt-rtx")

    def with_jetpack(self, version: str) -> Profile:
        """The profile under another JetPack release, with the newest lowering that it parses.

        Raises:
            UnsupportedError: a release that the profile does not list.
        """
        known = [row.version for row in self.jetpacks]
        if version not in known:
            advice = nearest(version, known) if known else "leave it out, the device is no Jetson"
            raise UnsupportedError(f"profile: {self.name} has no JetPack {version!r}; {advice}")
        found = replace(self, jetpack=version)
        return replace(found, lowering="modern" if "modern" in found.lowerings else "legacy")


DESKTOP = "rtx-4090"
# Compute capability by how names of NVIDIA's GPUs begin. Source: developer.nvidia.com/cuda-gpus.
CAPABILITIES = {
    **dict.fromkeys(("rtx-20", "t4", "t1000"), "7.5"),
    **dict.fromkeys(("a100", "a30"), "8.0"),
    **dict.fromkeys(("rtx-30", "rtx-a", "a10", "a40", "a2", "a16"), "8.6"),
    **dict.fromkeys(("rtx-40", "l40"), "8.9"),
    **dict.fromkeys(("h100", "h200", "gh200"), "9.0"),
    **dict.fromkeys(("b200", "gb200"), "10.0"),
    **dict.fromkeys(("rtx-50", "rtx-pro"), "12.0"),
}


def numbers(version: str) -> tuple[int, ...]:
    """`10.16.1` as (10, 16, 1), for comparing."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def names() -> tuple[str, ...]:
    """The known profiles, sorted."""
    files = resources.files("lvlm_edge.profiles").iterdir()
    return tuple(sorted(_public(f.name.removesuffix(".toml")) for f in files if f.name.endswith(".toml")))


def _public(name: str) -> str:
    return name.replace("_", "-")


def _of_its_kind(name: str) -> str:
    """What to say of a GPU that has no profile and whose compute capability is known from its name; empty of others."""
    found = next((capability for start, capability in CAPABILITIES.items() if name.lower().startswith(start)), "")
    if not found:
        return ""
    same = [known for known in names() if any(known.startswith(s) and name.startswith(s) for s in CAPABILITIES)]
    hint = nearest(name, same).partition("?")[0] + "? Else " if same else ""
    return f"{hint}build for it with --device {DESKTOP} --compute-capability {found}; known: {', '.join(names())}"


def load(name: str) -> Profile:
    """The profile of a name (`orin-nano-8gb`), for one JetPack release where it says so (`orin-nano-8gb@7.2`).

    Raises:
        UnsupportedError: there is no such profile or release.
        ProfileError: its file is malformed.
    """
    plain, at, release = _public(name).partition("@")
    if plain not in names():
        raise UnsupportedError(f"profile: {name!r} is not known; {_of_its_kind(plain) or nearest(plain, names())}")
    file = plain.replace("-", "_") + ".toml"
    profile = parse(plain, resources.files("lvlm_edge.profiles").joinpath(file).read_text(encoding="utf-8"))
    return profile.with_jetpack(release) if at else profile


def find(name: str) -> Profile:
    """The profile of a name, or for `auto` this machine's.

    Raises:
        UnsupportedError: there is none.
    """
    return detect() if name == "auto" else load(name)


def detect(root: Path = Path("/")) -> Profile:
    """This machine's profile: a Jetson by its model, memory and L4T release; anything else is `cpu`.

    Args:
        root: where `etc`, `proc` are.

    Raises:
        UnsupportedError: a Jetson that is not known, or one with a JetPack release that is too old.
    """
    model, found = _read(root / "proc/device-tree/model").rstrip("\0 \n"), l4t(root)
    if found is None and "jetson" not in model.lower():
        return load("cpu")
    boards = [p for p in map(load, names()) if p.model is not None and p.model in model]
    if not boards:
        raise UnsupportedError(f"profile: this board is {model or 'a Jetson'!r}, not known; name one with --device")
    boards.sort(key=lambda p: p.memory_gb.value if p.memory_gb else 0)
    total = memory_bytes(root) or 0
    # The system sees less than the board has: the smallest board with room for what it sees is the one.
    board = next((p for p in boards if p.memory_gb and total <= p.memory_gb.value * GIB), boards[-1])
    if found is None:
        return board
    rows = [r for r in board.jetpacks if numbers(r.l4t)[0] == numbers(found)[0] and numbers(r.l4t) <= numbers(found)]
    if not rows:
        oldest = board.jetpacks[0]
        raise UnsupportedError(
            f"profile: this {board.name} has L4T {found}, expected {oldest.l4t} (JetPack {oldest.version}) or a later "
            "one that is known; update JetPack, or name a release with --device "
            f"{board.name}@{board.jetpack}"
        )
    return board.with_jetpack(rows[-1].version)


def l4t(root: Path = Path("/")) -> str | None:
    """The L4T release of a Jetson such as `36.4.3`, from /etc/nv_tegra_release; None elsewhere."""
    found = re.search(r"#\s*R(\d+).*?REVISION:\s*([\d.]+)", _read(root / "etc/nv_tegra_release"))
    return f"{found[1]}.{found[2]}" if found else None


def memory_bytes(root: Path = Path("/")) -> int | None:
    """Memory of this machine that the system can use, bytes, from /proc/meminfo; None where there is none."""
    found = re.search(r"^MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def parse(name: str, text: str) -> Profile:
    """The profile in a TOML text.

    Args:
        name: the profile's name; the text has to carry the same.
        text: the file's content.

    Raises:
        ProfileError: not TOML, a missing or unknown key, a figure without source, or a value that is not one of the
            choices or contradicts another.
    """
    file = f"profiles/{name.replace('-', '_')}.toml"
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{file}: is not TOML ({error}); correct the file") from error
    check = _Check(file)
    kind = data.get("kind")
    known = [f.name for f in fields(Profile) if kind not in CHOICES["kind"] or f.name not in _NOT_OF[kind]]
    check.keys("", data, known, known if kind in CHOICES["kind"] else ["name", "kind"])
    read = {key: _READ[key](check, key, data[key]) for key in known}
    if read["name"] != name:
        check.wrong("name", f"is {read['name']!r}, expected {name!r}; rename one of them")
    profile = Profile(**read)
    _agree(check, profile)
    return profile


_JETSON_ONLY = {"model", "jetpack", "jetpacks"}
_NOT_OF = {
    "jetson": set[str](),
    "gpu": _JETSON_ONLY,
    "cpu": _JETSON_ONLY | {"compute_capability", "memory_gb", "bandwidth_gb_s", "power_modes", "tflops"},
}


@dataclass(frozen=True)
class _Check:
    """Reads values of one file; every complaint names file and key."""

    file: str

    def wrong(self, key: str, problem: str) -> None:
        raise ProfileError(f"{self.file}: key {key!r} {problem}")

    def keys(self, prefix: str, table: Mapping[str, Any], known: list[str], required: list[str]) -> None:
        for key in table:
            if key not in known:
                self.wrong(prefix + key, f"is not known, {nearest(key, known)}; rename or remove it")
        for key in required:
            if key not in table:
                self.wrong(prefix + key, "is missing; add it")

    def text(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
            self.wrong(key, f"holds {value!r}, expected a string; correct it")
        choices = CHOICES.get(key, ())
        if choices and value not in choices:
            self.wrong(key, f"holds {value!r}; {nearest(value, choices)}")
        return str(value)

    def texts(self, key: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not value:
            self.wrong(key, f"is {value!r}, expected a list of strings; correct it")
        return tuple(self.text(key, item) for item in value)

    def version(self, key: str, value: Any) -> str:
        if not re.fullmatch(r"\d+(\.\d+)+", self.text(key, value)):
            self.wrong(key, f"holds {value!r}, expected a version such as '10.3'; correct it")
        return str(value)

    def truth(self, key: str, value: Any) -> bool:
        if not isinstance(value, bool):
            self.wrong(key, f"holds {value!r}, expected true or false; correct it")
        return bool(value)

    def positive(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            self.wrong(key, f"holds {value!r}, expected a number above 0; correct it")
        return float(value)

    def share(self, key: str, value: Any) -> float:
        if self.positive(key, value) > 1:
            self.wrong(key, f"holds {value!r}, expected a share of at most 1; correct it")
        return float(value)

    def source(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or (value != UNVERIFIED and not value.startswith(SOURCES)):
            expected = ", ".join(f"{s}..." for s in SOURCES)
            self.wrong(key, f"has source {value!r}, expected {expected} or {UNVERIFIED!r}; say where it comes from")
        return str(value)

    def rates(self, key: str, value: Any) -> dict[str, Figure[float]]:
        if not isinstance(value, dict) or not value:
            self.wrong(key, f"is {value!r}, expected figures by dtype; correct it")
        self.keys(f"{key}.", value, list(CHOICES[key]), [])
        return {dtype: _figure(_Check.positive)(self, f"{key}.{dtype}", row) for dtype, row in value.items()}

    def releases(self, key: str, value: Any) -> tuple[JetPack, ...]:
        if not isinstance(value, dict) or not value:
            self.wrong(key, f"is {value!r}, expected a table by release; correct it")
        rows = []
        for version, row in value.items():
            prefix, known = f"{key}.{version}.", [f.name for f in fields(JetPack) if f.name != "version"]
            if not isinstance(row, dict):
                self.wrong(f"{key}.{version}", f"is {row!r}, expected a table; correct it")
            self.keys(prefix, row, known, known[:-1])
            for part in known[:4]:
                self.version(prefix + part, row[part])
            self.source(prefix + "source", row["source"])
            rows.append(JetPack(version=self.version(f"{key}.{version}", version), **row))
        return tuple(sorted(rows, key=lambda r: numbers(r.version)))


def _figure(read: Callable[[_Check, str, Any], T]) -> Callable[[_Check, str, Any], Figure[T]]:
    """Reads `{value = ..., source = "...", note = "..."}`."""

    def figure(check: _Check, key: str, value: Any) -> Figure[T]:
        if not isinstance(value, dict):
            check.wrong(key, f'is {value!r}, expected {{value = ..., source = "..."}}; say where it comes from')
        check.keys(f"{key}.", value, ["value", "source", "note"], ["value", "source"])
        note = check.text(f"{key}.note", value["note"]) if "note" in value else ""
        return Figure(read(check, key, value["value"]), check.source(key, value["source"]), note)

    return figure


_READ: dict[str, Callable[[_Check, str, Any], Any]] = {
    **dict.fromkeys(("name", "description", "kind", "backend", "lowering", "default_dtype", "model"), _Check.text),
    "jetpack": _Check.version,
    "dtypes": _Check.texts,
    "unified_memory": _Check.truth,
    "quantised": _figure(_Check.texts),
    "usable_share": _figure(_Check.share),
    "jetpacks": _Check.releases,
    "compute_capability": _figure(_Check.version),
    "memory_gb": _figure(_Check.positive),
    "bandwidth_gb_s": _figure(_Check.positive),
    "power_modes": _figure(_Check.texts),
    "tflops": _Check.rates,
}


def _agree(check: _Check, profile: Profile) -> None:
    """Raise ProfileError where two keys contradict each other."""
    if profile.default_dtype not in profile.dtypes:
        check.wrong("default_dtype", f"is {profile.default_dtype!r}, expected one of {profile.dtypes}; choose one")
    if profile.jetpack is not None and profile.release is None:
        check.wrong("jetpack", f"is {profile.jetpack!r}, which 'jetpacks' does not list; add it")
    if profile.lowering not in profile.lowerings:
        assert profile.release is not None
        check.wrong(
            "lowering",
            f"is {profile.lowering!r}, but TensorRT {profile.release.tensorrt} of JetPack {profile.jetpack} parses "
            f"{', '.join(profile.lowerings) or 'neither'}; choose another",
        )
    if (profile.kind == "cpu") != (profile.backend == "ort"):
        check.wrong("backend", f"is {profile.backend!r}, but kind is {profile.kind!r}; ort is for cpu alone")
    if profile.compute_capability is not None:
        has = numbers(profile.compute_capability.value)
        for key, dtypes in (("dtypes", profile.dtypes), ("quantised", profile.quantised.value)):
            for dtype in dtypes:
                if has < SINCE.get(dtype, (0, 0)):
                    since = ".".join(map(str, SINCE[dtype]))
                    check.wrong(key, f"holds {dtype!r}, which comes with compute capability {since}; remove it")
