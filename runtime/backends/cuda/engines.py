"""Where a bundle's engines are, their record `engines.json`, and the proof that a plan is the one that was built.

A plan is executable code. Engines are in this user's cache folder and not in the bundle, so that none of a bundle that
arrives with engines is opened. One is opened only if `lvlm-edge build` listed it there for this machine and bundle, its
bytes are still the listed ones, and nobody else can write it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import platform
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_edge.runtime.bundle import MANIFEST, Bundle, sha256
from lvlm_edge.runtime.errors import BundleError

SCHEMA = 2  # of engines.json, which the builder writes
ENGINES = "engines.json"
PORTABLE = "portable"  # one plan for every GPU from Ampere on (TensorRT-RTX)
MODULES = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}  # backend to Python package


def home() -> Path:
    """The folder of all engines of this user: `lvlm-edge/engines` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvlm-edge" / "engines"


def folder(bundle: Bundle, backend: str, base: Path | None = None) -> Path:
    """Where the engines of a bundle for a backend lie: a folder named after the hash of its `manifest.json`.

    Args:
        base: folder of all engines; `home()` by default.
    """
    return (base or home()) / sha256(bundle.path(MANIFEST))[:32] / backend


@dataclass(frozen=True)
class Wrong:
    """Makes the error for an engine that cannot be used, with the command that builds one that can."""

    folder: Path
    backend: str

    def __call__(self, what: str, found: str) -> BundleError:
        return BundleError(
            f"{self.backend}: {what}: {found}; run lvlm-edge build {self.folder} --device NAME on this device "
            "(names: lvlm-edge devices)"
        )


def entry_of(
    bundle: Bundle,
    file: str,
    source: str,
    *,
    place: Path,
    version: str,
    capability: tuple[int, int],
    wrong: Wrong,
) -> dict[str, Any]:
    """What `engines.json` says of a file's engine, once everything it says of this machine and bundle is true.

    Args:
        source: sha256 of the graph.
        place: folder of the engines.
        version: of TensorRT.
        capability: of the GPU.
    """
    manifest, backend = bundle.manifest, wrong.backend
    record = _record(place / ENGINES, wrong)
    here = f"{sys.platform}-{platform.machine()}"
    weights = manifest.files[manifest.weights].sha256
    for key, what, mine in (
        ("flavour", "engines are of", MODULES[backend]),
        ("version", f"engines were built by {MODULES[backend]}", version),
        ("platform", "engines were built on", here),
    ):
        if record.get(key) != mine:
            raise wrong(ENGINES, f"{what} {record.get(key)!r}, this machine has {mine!r}")
    settings = record.get("settings")
    targets = settings.get("compute_capabilities") if isinstance(settings, dict) else None
    own = "{}.{}".format(*capability)
    portable = backend == "trt-rtx" and capability >= (8, 0)
    if not isinstance(targets, list) or not (own in targets or (portable and PORTABLE in targets)):
        raise wrong(ENGINES, f"engines are for compute capability {targets}, this GPU has {own}")
    if record.get("weights_sha256") != weights:
        raise wrong(ENGINES, "engines were built from other weights than the bundle's")
    entry = record["engines"].get(file)
    if not isinstance(entry, dict):
        raise wrong(ENGINES, f"lists no engine of {file}, and one that is not listed is not opened")
    name, aliases = entry.get("file"), entry.get("aliases")
    if not isinstance(name, str) or not name or Path(name).name != name or not isinstance(aliases, dict):
        raise wrong(ENGINES, f"what it says of {file} cannot be read")
    if entry.get("graph_sha256") != source:
        raise wrong(name, f"was built from another {file} than the bundle's")
    return entry


def _check_own(path: Path, found: os.stat_result, wrong: Wrong) -> None:
    """Raise unless nobody but this user, and root, can have written a file."""
    if found.st_uid not in (os.geteuid(), 0):
        raise wrong(str(path), f"belongs to user {found.st_uid}, and an engine is code")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise wrong(str(path), f"can be written by others (mode {found.st_mode & 0o777:o}), and an engine is code")


def _record(path: Path, wrong: Wrong) -> dict[str, Any]:
    try:
        for one in (path.parent, path):
            _check_own(one, one.stat(), wrong)
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise wrong(str(path), "is not there, so no engine was built") from None
    except (OSError, RecursionError, ValueError) as error:
        raise wrong(str(path), f"cannot be read ({error})") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA or not isinstance(record.get("engines"), dict):
        raise wrong(str(path), f"schema is {schema!r}, expected {SCHEMA}")
    return dict(record)


@contextlib.contextmanager
def checked_plan(path: Path, entry: dict[str, Any], wrong: Wrong) -> Iterator[memoryview]:
    """A plan's bytes, mapped, which are those that were built: what is hashed is what TensorRT then reads."""
    try:
        if path.is_symlink():
            raise wrong(path.name, "is a link, expected the file that was built")
        with path.open("rb") as file:
            _check_own(path, os.fstat(file.fileno()), wrong)
            size = os.fstat(file.fileno()).st_size
            if size != entry.get("size") or size == 0:
                raise wrong(path.name, f"has {size} bytes, {ENGINES} says {entry.get('size')}")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise wrong(path.name, f"cannot be read ({error.strerror})") from error
    with mapped, memoryview(mapped) as content:
        if hashlib.sha256(content).hexdigest() != entry.get("sha256"):
            raise wrong(path.name, f"was altered (its sha256 is not that in {ENGINES})")
        yield content
