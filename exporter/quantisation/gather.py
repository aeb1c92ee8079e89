"""The inputs of a model's matrices while it answers samples, taken by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lvlm_edge.exporter import references
from lvlm_edge.exporter.bundles import pack
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.quantisation.layer import groups_of, linears_of
from lvlm_edge.exporter.quantisation.samples import Case
from lvlm_edge.exporter.references import original

ROWS = 4096  # of a matrix's inputs, drawn from all prompts


def gather(
    model: Any, method: str, method_config: dict[str, Any], cases: Sequence[Case], seed: int, progress: pack.Progress
) -> dict[str, Tensor]:
    """What the matrices of every layer read while a method's reference reads the cases.

    Returns:
        Rows [about ROWS or fewer, in], float32, drawn at random from every case, by the name of a group's first matrix
        and its layer: `layers.0.q_proj`.

    Raises:
        CheckpointError: the model's logits are not finite.
    """
    run, found = references.module(method).run, dict[str, list[Tensor]]()
    generator = torch.Generator().manual_seed(seed)
    with _hooked(original.view(model).decoder.layers, found, -(-ROWS // len(cases)), generator):
        for i, case in enumerate(cases):
            progress("look at pictures", i, len(cases))
            if not run(model, method_config, case.ids, case.pixels, 1).logits.isfinite().all():
                raise CheckpointError("quantize: the checkpoint answers with numbers that are not finite; correct it")
    return {name: torch.cat(pieces) for name, pieces in found.items()}


@contextmanager
def _hooked(layers: Any, found: dict[str, list[Tensor]], share: int, generator: torch.Generator) -> Iterator[None]:
    """Inside the block, up to `share` rows of every input of every group's first matrix are kept."""

    def keep(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2)
            found.setdefault(name, []).append(rows[torch.randperm(len(rows), generator=generator)[:share]].float())

        return hook

    handles = []
    for i, layer in enumerate(layers):
        linears = linears_of(layer)
        for names in groups_of(linears):
            handles.append(linears[names[0]].register_forward_pre_hook(keep(f"layers.{i}.{names[0]}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
