"""Checkpoint to bundle, and the proof that the bundle says what PyTorch says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lvlm_edge.exporter.bundles.pack import export
    from lvlm_edge.exporter.devices.profiles import Profile
    from lvlm_edge.exporter.planning import Plan
    from lvlm_edge.exporter.quantisation.calibrate import quantize


def plan(
    source: str | Path,
    *,
    method: str = "none",
    device: str | Profile | None = None,
    weights: str = "as-is",
    rates: str | Path | None = None,
    ratios: Sequence[float] = (),
    **options: Any,
) -> dict[str, Any]:
    """Stages, token counts, FLOPs and bytes of a checkpoint under a method, as `plan --json`; reads config.json only.

    Args:
        source: checkpoint folder or Hugging Face id.
        method: token reduction.
        device: profile to predict for: what fits, under `fit`, and times, under `prediction`.
        weights: format of the decoder's matrices: as-is, float, int8 or int4; fp8 and fp4 are known to predictions
            alone.
        rates: file of `lvlm-edge bench --json`, for times from the rates that it measured.
        ratios: keep ratios to predict beside the plan's own, for a method that has one.
        options: fields of `planning.Capacity` and `planning.Settings`, `revision`, and the method's own settings.
    """
    from pathlib import Path

    from lvlm_edge.exporter import planning
    from lvlm_edge.exporter.devices import cost, fit, profiles
    from lvlm_edge.runtime.bundle import FORMATS

    known = weights in (*FORMATS, planning.FLOAT)
    options |= {"weights": weights} if known else {}
    more = [_make(source, method, options | {"keep_ratio": ratio}) for ratio in ratios]
    made = _make(source, method, options)
    weights = made.formats.decoder if known else weights
    report = planning.report(made)
    if device is not None:
        profile = profiles.find(device) if isinstance(device, str) else device
        report["fit"] = fit.report(made, profile, weights=weights)
        measured = None if rates is None else Path(rates)
        report["prediction"] = cost.report(made, profile, weights=weights, rates=measured)
        rows = [cost.report(each, profile, weights=weights, rates=measured) for each in more]
        report["prediction"]["ratios"] = [{"keep_ratio": r} | row for r, row in zip(ratios, rows, strict=True)]
    return report


def check_fit(source: str | Path, device: str | Profile, *, method: str = "none", **options: Any) -> None:
    """Nothing, if a checkpoint exported that way can be built and run on a device; reads config.json only.

    Raises:
        FitError: it cannot; the message says by how much, and what would fit.
    """
    from lvlm_edge.exporter.devices import fit, profiles

    profile = profiles.find(device) if isinstance(device, str) else device
    made = _make(source, method, options)
    fit.check(made, profile, weights=made.formats.decoder)


def _make(source: str | Path, method: str, options: dict[str, Any]) -> Plan:
    from lvlm_edge.exporter.bundles import plans
    from lvlm_edge.exporter.checkpoints import checkpoint

    options = dict(options)
    folder = checkpoint.resolve(source, options.pop("revision", None), weights=False)
    return plans.plan_of(checkpoint.Checkpoint.open(folder), method=method, nominal=True, options=options)


def __getattr__(name: str) -> Any:
    if name == "export":
        from lvlm_edge.exporter.bundles.pack import export

        return export
    if name == "quantize":
        from lvlm_edge.exporter.quantisation.calibrate import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["check_fit", "export", "plan", "quantize"]
