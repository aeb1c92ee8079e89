"""The image graphs of every picture against PyTorch."""

from __future__ import annotations

import numpy as np

from lvlm_edge.exporter.proof.cases import Case
from lvlm_edge.exporter.proof.judge import Array, Row, close
from lvlm_edge.exporter.references import Reference
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.pipeline.inputs import Media, media


def seen(pipe: Pipeline, case: Case) -> tuple[Media, ...]:
    """A case's images and videos in the prompt's order, with what they stand for."""
    values = case.pixels if isinstance(case.pixels, np.ndarray) else list(case.pixels)
    return media(pipe.manifest, values, prompt=case.prompt)


def compare(pipe: Pipeline, case: Case, expected: Reference, bound: float) -> list[Row]:
    """Features, and the rows that the decoder reads, view by view: stages `vision`, `projector`, and what is injected.

    Args:
        bound: of the error of a row.
    """
    features, found, kinds = [], dict[str, list[Array]](), []
    for one in seen(pipe, case):
        kinds += [np.full(r.rows, r.kind == "visual") for r in one.picture.runs if r.kind in ("visual", "separator")]
        outputs = _outputs(pipe, one)
        features += outputs["image_features"]
        for name in pipe.manifest.image_rows:
            found.setdefault(name, []).extend(outputs[name])
    wanted = expected.image_features.flatten(0, -2).numpy()
    rows = [close(case.name, "vision", np.concatenate(features), wanted, bound)]
    if not found:
        return rows
    own = np.concatenate(found["image_embeds"])
    embeds = expected.image_embeds.numpy()
    rows.append(close(case.name, "projector", own[np.concatenate(kinds)], embeds, bound))
    for name, injected in expected.injected.items():
        rows.append(close(case.name, name, np.concatenate(found[name]), injected.numpy(), bound))
    return rows


def _outputs(pipe: Pipeline, one: Media) -> dict[str, list[Array]]:
    """Outputs of a picture's graphs, [rows, D] of every run: over its views, then over what those gave together."""
    found = dict[str, list[Array]]()
    for name in one.picture.graphs:
        wanted = {info.name for info in pipe.manifest.graph(name).inputs}
        if "pixel_values" in wanted:
            given = [{"pixel_values": view[None]} for view in one.pixels]
        else:
            given = [{name: np.concatenate(found[name])[None] for name in wanted}]
        for tensors in given:
            for output, values in pipe.run_graph(name, tensors).items():
                found.setdefault(output, []).append(values[0])
    return found
