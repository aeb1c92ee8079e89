"""Certificates: what `lvlm-edge check` found of a bundle. Who can write the bundle can write its certificate too."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from lvlm_edge.runtime.bundle.files import certificate_name, sha256
from lvlm_edge.runtime.errors import BundleError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The verdict of the last check.

    Attributes:
        passed: None where the certificate cannot be read.
        of_this_bundle: it names the hash of the manifest as it is now.
        cases: prompts that were compared.
        steps: most tokens that were decoded behind one of them.
        not_judged: what the checkpoint gave nothing to judge by.
    """

    passed: bool | None
    of_this_bundle: bool
    cases: int = 0
    steps: int = 0
    not_judged: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the bundle as it is now has passed."""
        return self.passed is True and self.of_this_bundle

    def state(self) -> str:
        """What it says, in a few words."""
        if self.passed is None:
            return "damaged"
        return ("passed" if self.passed else "FAILED") + ("" if self.of_this_bundle else ", but of another manifest")


def read(bundle: Path, manifest: str) -> Certificate | None:
    """The certificate of a bundle, or None where it was never checked.

    Args:
        manifest: name of the manifest's file, of which there is one per keep ratio.
    """
    path = bundle / certificate_name(manifest)
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text("utf-8"))
        passed, hashed, steps = stored["passed"], stored["manifest_sha256"], stored["steps"]
        if type(passed) is not bool:
            raise TypeError(f"passed is {passed!r}")
        return Certificate(
            passed=passed,
            of_this_bundle=hashed == sha256(bundle / manifest),
            cases=len(stored["cases"]),
            steps=max(map(int, steps)),
            not_judged=tuple(map(str, stored["not_judged"])),
        )
    except (OSError, RecursionError, ValueError, TypeError, KeyError):
        return Certificate(passed=None, of_this_bundle=False)


def consult(bundle: Path, manifest: str, *, required: bool) -> None:
    """Log a warning of a certificate that does not hold.

    Args:
        required: refuse the bundle instead, also where it has no certificate.

    Raises:
        BundleError: the bundle is to be certified and is not.
    """
    found = read(bundle, manifest)
    if found is None and not required:
        return
    if found is None or not found.holds:
        state = "is missing" if found is None else f"says: {found.state()}"
        said = (
            f"{bundle}: {certificate_name(manifest)} {state}; check the bundle: lvlm-edge check {bundle} --against "
            "CHECKPOINT"
        )
        if required:
            raise BundleError(said)
        log.warning(said)
