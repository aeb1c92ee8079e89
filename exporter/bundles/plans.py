"""From what is asked to a final plan: family, method and lowering by their names, options folded into records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lvlm_edge.exporter import families, lowerings, methods, planning
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.planning import Capacity, Model, Plan, Settings, fold
from lvlm_edge.runtime.bundle import WeightFormats
from lvlm_edge.runtime.errors import UnsupportedError
from lvlm_edge.runtime.pictures.layout import Picture


def model(checkpoint: Checkpoint, capacity: Capacity) -> Model:
    """A checkpoint's family, its spec, and what each planned image or video stands for; reads configs alone.

    Raises:
        UnsupportedError: videos, of a family that sees none.
    """
    family, spec = families.of(checkpoint), families.read(checkpoint)
    if capacity.num_videos and not family.frames:
        raise UnsupportedError(
            f"{family.name}: videos are not supported for this family, but {capacity.num_videos} are planned; leave "
            "out --num-videos, or use a checkpoint of video_llava"
        )
    return Model(family, spec, family.pictures(checkpoint, spec, capacity))


def plan_of(checkpoint: Checkpoint, *, method: str = "none", nominal: bool = False, options: Mapping[str, Any]) -> Plan:
    """The plan of a checkpoint, from its configs alone.

    Args:
        method: name of the reduction.
        nominal: where a file beside config.json is missing, count with what config.json says of it.
        options: fields of `Capacity` and `Settings`, and the method's own settings; None means not given.

    Raises:
        UsageError: an option that neither has, or one out of range.
        UnsupportedError: a model, method or lowering that is not known.
    """
    capacity, rest = fold(Capacity, options)
    settings, rest = fold(Settings, rest)
    return make(model(checkpoint, capacity), capacity, settings, method=method, options=rest, nominal=nominal)


def make(
    model: Model,
    capacity: Capacity,
    settings: Settings,
    *,
    method: str,
    options: Mapping[str, Any],
    nominal: bool = False,
    formats: WeightFormats | None = None,
) -> Plan:
    """The plan of a model under a method by its name; see `planning.make`."""
    record = methods.load(method)
    return planning.make(
        model,
        method=record,
        lowering=lowerings.load(settings.lowering),
        config=planning.configure(record, model.spec, options, nominal=nominal),
        capacity=capacity,
        settings=settings,
        formats=formats,
    )


def load_model(spec: ModelSpec[Any], pictures: tuple[Picture, ...]) -> Model:
    """A spec and its pictures with the family that they are of."""
    return Model(families.load(spec.family), spec, pictures)
