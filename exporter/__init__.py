"""Checkpoint to bundle, and the proof that the bundle says what PyTorch says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from lvlm_edge.exporter.pack import export


def plan(source: str | Path, *, method: str = "none", **options: Any) -> dict[str, Any]:
    """Stages, token counts, FLOPs and bytes of a checkpoint under a method, as `plan --json`; reads config.json only.

    Args:
        source: checkpoint folder or Hugging Face id.
        method: token reduction.
        options: capacities and dtype (`planning.CAPACITIES`), `revision`, and the method's own settings.
    """
    from lvlm_edge.exporter import checkpoint, planning, spec

    folder = checkpoint.resolve(source, options.pop("revision", None), weights=False)
    capacities = {key: options.pop(key) for key in planning.CAPACITIES if key in options}
    return planning.report(planning.make(spec.load(folder), method_name=method, options=options, **capacities))


def __getattr__(name: str) -> Any:
    if name == "export":
        from lvlm_edge.exporter.pack import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["export", "plan"]
