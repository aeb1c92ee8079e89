"""LLaVA-NeXT's original layout: tiles put together to one map, its padding cut off, a newline behind every row.

Source: `prepare_inputs_labels_for_multimodal` and `unpad_image` of LLaVA-NeXT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lvlm_edge.exporter.references import original
from lvlm_edge.exporter.references.original import Read


class Unpadded(original.Original):
    """A model in parts, whose rows depend on the pictures' sizes.

    Attributes:
        canvases: (width, height) of each, in the order in which they are tried.
        most: tiles whose cells a picture may have; None for any number.
    """

    canvases: Sequence[tuple[int, int]] = ()
    most: int | None = None

    def lay_out(self, prompt: Sequence[int], pixels: Any) -> Read:
        features, _ = self.see(pixels)
        tokens = self.projector(features)
        side, n = self.tower.config.image_size, int(tokens.shape[1] ** 0.5)
        blocks, start = [], 0
        for width, height in self.sizes:
            canvas = self._canvas(width, height)
            columns, rows = canvas[0] // side, canvas[1] // side
            part = tokens[start : start + 1 + rows * columns]
            start += len(part)
            blocks.append(self._packed(part, rows, columns, n, (width, height)))
        left, found, visual = list(blocks), [], []
        for token in prompt:
            row = left.pop(0) if token == self.image_token_id else self.embed([token])
            found.append(row)
            visual += [token == self.image_token_id] * len(row)
        whole, embeds = torch.cat(found), torch.cat(blocks)
        positions = torch.arange(len(whole))[None]
        images = torch.tensor(visual)
        return Read(features=features, embeds=embeds, rows=whole, images=images, positions=positions, next=len(whole))

    def _canvas(self, width: int, height: int) -> tuple[int, int]:
        best, shown, waste = self.canvases[0], 0, math.inf
        for wide, high in self.canvases:
            scale = min(wide / width, high / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            if kept > shown or (kept == shown and wide * high - kept < waste):
                best, shown, waste = (wide, high), kept, wide * high - kept
        return best

    def _packed(self, part: Tensor, rows: int, columns: int, n: int, size: tuple[int, int]) -> Tensor:
        """Rows of one picture [V, D], from its base view and tiles [1 + tiles, n * n, D]."""
        assert self.newline is not None
        cells = part[1:].view(rows, columns, n, n, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
        _, high, wide = cells.shape
        width, height = size
        if width / height > wide / high:
            cut = (high - int(height * (wide / width))) // 2
            cells = cells[:, cut : high - cut]
        else:
            cut = (wide - int(width * (high / height))) // 2
            cells = cells[:, :, cut : wide - cut]
        if self.most is not None:
            times = math.sqrt(cells.shape[1] * cells.shape[2] / (self.most * n**2))
            if times > 1.1:
                smaller = [int(cells.shape[1] // times), int(cells.shape[2] // times)]
                cells = F.interpolate(cells[None], smaller, mode="bilinear")[0]
        ends = self.newline[:, None, None].expand(*cells.shape[:-1], 1)
        return torch.cat([part[0], torch.cat([cells, ends], -1).flatten(1).T])
