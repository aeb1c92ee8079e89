"""The certificate of a bundle: `certificate.json`, written by `check`; `runtime.bundle.certificate` reads it.

It holds what was compared (prompts, the hash of the pixels, the checkpoint), every figure found, the versions of the
packages, and the hash of the manifest, so that a certificate of another export is recognised.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_edge.runtime.bundle import certificate_name, sha256
from lvlm_edge.runtime.bundle.replacing import replacing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lvlm_edge.exporter.proof.cases import Case
    from lvlm_edge.exporter.proof.judge import Verdict
    from lvlm_edge.runtime import Pipeline

PACKAGES = ("lvlm-edge", "torch", "transformers", "onnxruntime", "onnxruntime-gpu", "numpy")


def write(
    pipe: Pipeline, against: Path, cases: Sequence[Case], verdict: Verdict, *, steps: Sequence[int], seed: int
) -> None:
    """Write the certificate of a bundle beside its manifest; it replaces an earlier one as a whole.

    Args:
        pipe: the bundle as it was run.
        against: folder of the checkpoint that it was compared with.
        steps: tokens that were decoded of every case.
        seed: of the random prompts and images.
    """
    bundle = pipe.bundle.folder
    content = {
        "passed": verdict.passed,
        "manifest_sha256": sha256(bundle / pipe.bundle.name),
        "against": str(against),
        "against_config_sha256": sha256(against / "config.json"),
        "backend": pipe.backend.name,
        "machine": platform.machine(),
        "steps": list(steps),
        "seed": seed,
        "cases": [{"name": c.name, "prompt": c.prompt, "pixels_sha256": _digest(c.pixels)} for c in cases],
        "not_judged": verdict.not_judged,
        "rows": [asdict(row) for row in verdict.rows],
        "versions": versions(),
    }
    name = certificate_name(pipe.bundle.name)
    with replacing(bundle / name) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def versions() -> dict[str, str]:
    """Versions of what judged and ran; ONNX Runtime comes in one of two packages."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _digest(values: NDArray[Any] | Sequence[NDArray[Any]]) -> str:
    """sha256 of the bytes of a tensor, or of several one after the other, hexadecimal."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in values)).hexdigest()
