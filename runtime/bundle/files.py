"""Bundles on disk: a folder of `manifest.json`, one ONNX file per graph, one file of weights, tokenizer files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lvlm_edge.runtime.bundle import external
from lvlm_edge.runtime.bundle.manifest import SCHEMA, WIDTHS, FileInfo, Manifest, problems
from lvlm_edge.runtime.bundle.schema import parse
from lvlm_edge.runtime.errors import BundleError, UsageError

MANIFEST = "manifest.json"
CERTIFICATE = "certificate.json"


Stamp = tuple[int, ...]  # device, inode, size and times of a file: another one if it is written or exchanged


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        name: of the manifest's file.
        verified: every file was hashed.
        stamps: of every file, as it was checked.
    """

    folder: Path
    manifest: Manifest
    name: str = MANIFEST
    verified: bool = False
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        return self.folder / name

    def graph(self, file: str) -> bytes:
        """A graph's bytes, which are the listed ones where the bundle is verified, and refer to the weights alone.

        Raises:
            BundleError: altered, no ONNX, or it reads a file that is not the bundle's file of weights.
        """
        path = self.path(file)
        try:
            content = path.read_bytes()
            read = external.locations(content)
        except (OSError, ValueError) as error:
            raise BundleError(f"{path}: cannot be read as ONNX ({error}); export or copy the bundle again") from error
        if self.verified and hashlib.sha256(content).hexdigest() != self.manifest.files[file].sha256:
            raise _altered(path)
        for name in read - {self.manifest.weights}:
            raise BundleError(
                f"{path}: reads weights from {name!r}, expected {self.manifest.weights} alone; do not use this bundle"
            )
        return content

    def check_unchanged(self) -> None:
        """Raise BundleError for a file that was written or exchanged since it was checked."""
        for name, stamp in self.stamps.items():
            path = self.path(name)
            if not path.is_file() or _stamp(path.stat()) != stamp:
                raise BundleError(f"{path}: changed while the bundle was being opened; open it again")


def open_bundle(folder: str | Path, *, verify: bool = True, keep_ratio: float | None = None) -> Bundle:
    """Read and check a bundle.

    Args:
        folder: the bundle.
        verify: hash every file; without it only presence and size are checked.
        keep_ratio: which of the keep ratios that it holds; None for the one it was exported with.

    Raises:
        BundleError: not a bundle, another schema, or a file missing, altered or outside the folder.
        UsageError: it does not hold the ratio.
    """
    folder = Path(folder)
    name, manifest = MANIFEST, load_manifest(folder)
    if keep_ratio is not None and manifest.method_config.get("keep_ratio") != keep_ratio:
        name = _held(folder, keep_ratio)
        manifest = load_manifest(folder, name)
    stamps = {file: _check_file(folder, file, info, verify) for file, info in manifest.files.items()}
    bundle = Bundle(folder, manifest, name, verify, stamps)
    _check_references(bundle)
    return bundle


def ratio_text(keep_ratio: float) -> str:
    """A keep ratio as names and messages have it: short where that says all of it."""
    short = f"{keep_ratio:g}"
    return short if float(short) == keep_ratio else repr(keep_ratio)


def manifest_name(keep_ratio: float) -> str:
    """File of the manifest of a keep ratio that was added to a bundle."""
    return f"manifest.keep-{ratio_text(keep_ratio)}.json"


def certificate_name(manifest: str) -> str:
    """File of the certificate that speaks of a manifest."""
    return manifest.replace("manifest", "certificate", 1)


def keep_ratios(folder: Path) -> list[float]:
    """The keep ratios that a bundle holds, that of its export first; none where its method keeps everything."""
    own = load_manifest(folder).method_config.get("keep_ratio")
    if own is None:
        return []
    names = [path.name for path in folder.glob("manifest.keep-*.json")]
    added = [name.removeprefix("manifest.keep-").removesuffix(".json") for name in names]
    return [own, *sorted((float(name) for name in added if _is_ratio(name)), reverse=True)]


def _is_ratio(text: str) -> bool:
    try:
        return 0 < float(text) <= 1 and ratio_text(float(text)) == text
    except ValueError:
        return False


def _held(folder: Path, keep_ratio: float) -> str:
    """The manifest's file of a keep ratio."""
    found = keep_ratios(folder)
    if keep_ratio not in found:
        held = f"holds keep ratio {', '.join(map(ratio_text, found))}" if found else "keeps every visual token"
        raise UsageError(
            f"{folder}: {held}, not {ratio_text(keep_ratio)}; choose one of them, or add it with lvlm-edge export "
            f"--add-keep-ratio {ratio_text(keep_ratio)} {folder}"
        )
    return manifest_name(keep_ratio)


def load_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """The manifest of a bundle, its own structure checked but not the files it names.

    Args:
        name: its file.

    Raises:
        BundleError: missing, not JSON, a newer schema, or fields missing, unknown or of the wrong type.
    """
    path = folder / name
    if not path.is_file() or not _belongs(folder, path):
        found = f"has no {name} of its own" if folder.is_dir() else "is no folder"
        raise BundleError(f"{folder}: {found}; give a bundle made by `lvlm-edge export`")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse)
    except (OSError, RecursionError, ValueError) as error:
        raise BundleError(f"{path}: is not JSON ({error}); export or copy the bundle again") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise BundleError(f"{path}: schema {schema} is newer than this version reads ({SCHEMA}); upgrade lvlm-edge")
    if schema != SCHEMA:
        raise BundleError(
            f"{path}: schema is {schema!r}, expected {SCHEMA}; make a new bundle: lvlm-edge export CHECKPOINT -o BUNDLE"
        )
    if content.pop("digest", None) != digest(content):
        raise BundleError(f"{path}: was altered (its digest is not that of its content); export or copy it again")
    try:
        manifest: Manifest = parse(Manifest, content, "manifest")
    except (TypeError, ValueError) as error:
        raise BundleError(f"{path}: {error}; export the bundle again") from error
    for what in problems(manifest):
        raise BundleError(f"{path}: {what}; export the bundle again")
    return manifest


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into a folder, with a digest of its fields."""
    content = json.loads(json.dumps(dataclasses.asdict(manifest)))
    text = json.dumps(content | {"digest": digest(content)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", "utf-8")


def digest(content: Mapping[str, Any]) -> str:
    """Hexadecimal sha256 of the fields of a manifest but `digest`, as JSON with sorted keys and without spaces."""
    fields = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _check_file(folder: Path, name: str, info: FileInfo, verify: bool) -> Stamp:
    """The stamp of a file that is there, has the listed size and, where it is to be hashed, the listed content."""
    path = folder / safe_name(name)
    if not _belongs(folder, path):
        raise BundleError(f"{path}: is a link, expected a file inside the bundle; export or copy the bundle again")
    if not path.is_file():
        raise BundleError(f"{path}: is missing; export or copy the bundle again")
    found = path.stat()
    if found.st_size != info.size:
        raise BundleError(
            f"{path}: has {found.st_size} bytes, the manifest says {info.size}; export or copy the bundle again"
        )
    if verify and sha256(path) != info.sha256:
        raise _altered(path)
    return _stamp(found)


def _belongs(folder: Path, path: Path) -> bool:
    """Whether a file is in the bundle's folder itself, or where Hugging Face's cache keeps it.

    There a snapshot is a folder of links into `blobs/` of its own repository's folder.
    """
    home, real = folder.resolve(), path.resolve()
    if not path.is_symlink():
        return real.is_relative_to(home)
    blobs = home.parent.parent / "blobs"
    return home.parent.name == "snapshots" and real.parent == blobs and not blobs.is_symlink() and real.is_file()


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _altered(path: Path) -> BundleError:
    return BundleError(f"{path}: was altered (its sha256 is not the manifest's); export or copy the bundle again")


def safe_name(name: str) -> str:
    """The name, if it stays inside the bundle.

    Raises:
        BundleError: an absolute path, or one with `..`.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise BundleError(f"manifest: file {name!r} points outside the bundle; do not use this bundle")
    if not name.isprintable() or len(name) > 200:
        raise BundleError(f"manifest: {name[:40]!r} is no name of a file; export the bundle again")
    return name


def shared_files(folder: Path, ratios: Iterable[float]) -> dict[str, Any]:
    """Which keep ratios of a bundle read which bytes.

    Returns:
        `files`: of every file its size, its sha256 and the `keep_ratios` that need it. `beyond_weights`: bytes of a
        ratio's files that no ratio before it has, weights left out.

    Raises:
        BundleError: the bundle is damaged.
        UsageError: the bundle lacks a ratio.
    """
    files: dict[str, dict[str, Any]] = {}
    beyond = {}
    for ratio in ratios:
        manifest = open_bundle(folder, verify=False, keep_ratio=ratio).manifest
        new = [name for name in manifest.files if name not in files]
        beyond[ratio_text(ratio)] = sum(manifest.files[name].size for name in new if name != manifest.weights)
        for name, info in manifest.files.items():
            files.setdefault(name, {**dataclasses.asdict(info), "keep_ratios": []})["keep_ratios"].append(ratio)
    return {"files": files, "beyond_weights": beyond}


def _check_references(bundle: Bundle) -> None:
    manifest = bundle.manifest
    named = [g.file for graphs in (manifest.graphs, *manifest.variants.values()) for g in graphs] + [
        manifest.weights,
        manifest.embedding.file,
    ]
    if manifest.text is not None:
        named += [manifest.text.tokenizer, manifest.text.chat_template]
    for name in named:
        if name not in manifest.files:
            raise BundleError(f"manifest: names {name!r}, which is not in its list of files; export the bundle again")
    table = manifest.embedding
    width = WIDTHS.get(table.dtype)
    if width is None:
        raise BundleError(
            f"manifest: embedding dtype is {table.dtype!r}, expected {' or '.join(WIDTHS)}; export the bundle again"
        )
    end = table.offset + table.vocab * table.hidden * width
    if end > manifest.files[table.file].size or min(table.offset, table.vocab - 1, table.hidden - 1) < 0:
        raise BundleError(f"manifest: the embedding reaches past the end of {table.file}; export the bundle again")
