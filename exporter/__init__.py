"""Checkpoint to bundle, and the proof that the bundle says what PyTorch says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from lvlm_edge.exporter.pack import export
    from lvlm_edge.exporter.planning import Plan
    from lvlm_edge.exporter.profiles import Profile


def plan(
    source: str | Path,
    *,
    method: str = "none",
    device: str | Profile | None = None,
    weights: str = "as-is",
    **options: Any,
) -> dict[str, Any]:
    """Stages, token counts, FLOPs and bytes of a checkpoint under a method, as `plan --json`; reads config.json only.

    Args:
        source: checkpoint folder or Hugging Face id.
        method: token reduction.
        device: profile to predict the fit on, under `fit`.
        weights: format of the decoder's matrices: as-is, int8 or int4; fp8 is known to the prediction alone.
        options: capacities and dtype (`planning.CAPACITIES`), `revision`, and the method's own settings.
    """
    from lvlm_edge.exporter import fit, planning, profiles
    from lvlm_edge.runtime.bundle import FORMATS

    known = {"weights": weights} if weights in FORMATS else {}
    made = _make(source, method, options | known)
    report = planning.report(made)
    if device is not None:
        profile = profiles.find(device) if isinstance(device, str) else device
        report["fit"] = fit.report(made, profile, weights=weights)
    return report


def check_fit(source: str | Path, device: str | Profile, *, method: str = "none", **options: Any) -> None:
    """Nothing, if a checkpoint exported that way can be built and run on a device; reads config.json only.

    Raises:
        FitError: it cannot; the message says by how much, and what would fit.
    """
    from lvlm_edge.exporter import fit, profiles

    profile = profiles.find(device) if isinstance(device, str) else device
    made = _make(source, method, options)
    fit.check(made, profile, weights=made.formats.decoder)


def _make(source: str | Path, method: str, options: dict[str, Any]) -> Plan:
    from lvlm_edge.exporter import checkpoint, planning, spec

    folder = checkpoint.resolve(source, options.pop("revision", None), weights=False)
    capacities = {key: options.pop(key) for key in planning.CAPACITIES if key in options}
    return planning.make(spec.load(folder), method_name=method, options=options, nominal=True, **capacities)


def __getattr__(name: str) -> Any:
    if name == "export":
        from lvlm_edge.exporter.pack import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["check_fit", "export", "plan"]
