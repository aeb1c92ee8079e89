"""The image graphs of every picture against PyTorch."""

from __future__ import annotations

import numpy as np

from lvlm_edge.exporter.proof.cases import Case
from lvlm_edge.exporter.proof.judge import Array, Row, close
from lvlm_edge.exporter.references import Reference
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.pipeline.inputs import media


def compare(pipe: Pipeline, case: Case, expected: Reference, bound: float) -> list[Row]:
    """Features, and the rows that the decoder reads, view by view: stages `vision`, `projector`, and what is injected.

    Args:
        bound: of the error of a row.
    """
    features, found = [], dict[str, list[Array]]()
    for one in media(pipe.manifest, case.pixels if isinstance(case.pixels, np.ndarray) else list(case.pixels)):
        for view in one.pixels:
            outputs = pipe.run_graph(one.picture.graphs[0], {"pixel_values": view[None]})
            features.append(outputs["image_features"][0])
            for name in pipe.manifest.image_rows:
                found.setdefault(name, []).append(outputs[name][0])
    wanted = expected.image_features.flatten(0, -2).numpy()
    rows = [close(case.name, "vision", np.concatenate(features), wanted, bound)]
    if not found:
        return rows
    own = np.concatenate(found["image_embeds"])
    kinds = [np.full(run.rows, run.kind == "visual") for p in pipe.manifest.pictures for run in p.runs]
    embeds = expected.image_embeds.numpy()
    rows.append(close(case.name, "projector", own[np.concatenate(kinds)], embeds, bound))
    for name, injected in expected.injected.items():
        rows.append(close(case.name, name, np.concatenate(found[name]), injected.numpy(), bound))
    return rows
