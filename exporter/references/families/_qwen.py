"""The Qwen-VL line on stock transformers: its own patches, grids, positions and layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lvlm_edge.exporter.references import original
from lvlm_edge.exporter.references.original import Read


class Qwen(original.Original):
    """The parts of a stock model, which sees pictures of any rectangle.

    Attributes:
        whole: the stock model.
    """

    processed: ClassVar[dict[str, Any] | None] = {}

    def __init__(self, whole: Any) -> None:
        language = nn.Module()
        language.model, language.lm_head = whole.model.language_model, whole.lm_head
        language.config = whole.config.text_config
        super().__init__(
            image_token_id=whole.config.image_token_id,
            tower=whole.model.visual,
            projector=whole.model.visual.merger,
            language=language,
            extra={},
            select=(),
            drop_first=False,
        )
        self.whole = whole

    def lay_out(self, prompt: Sequence[int], pixels: Any) -> Read:
        given = self.given(prompt, pixels)
        ids = given["input_ids"]
        images = ids[0] == self.image_token_id
        positions, delta = self.whole.model.get_rope_index(ids, given["mm_token_type_ids"], given.get("image_grid_thw"))
        rows = self.decoder.embed_tokens(ids)[0].clone()
        with original.recorded(self.projector, lambda i, o: i[0]) as seen:
            out = self.whole.model.get_image_features(given["pixel_values"], given["image_grid_thw"])
        embeds = torch.cat(list(out.pooler_output))
        rows[images] = embeds
        merge = self.whole.config.vision_config.spatial_merge_size
        return Read(
            features=self.features(seen[0], given["image_grid_thw"]),
            embeds=embeds,
            rows=rows,
            images=images,
            positions=positions,
            next=int(ids.shape[1] + delta.item()),
            grids=tuple((h // merge, w // merge) for _, h, w in given["image_grid_thw"].tolist()),
            injected=self.injected(out),
        )

    def as_processor(self, views: Tensor) -> Tensor:
        config = self.whole.config.vision_config
        return patches(views, config.patch_size, config.spatial_merge_size)

    def features(self, seen: Tensor, grids: Tensor) -> Tensor:
        """What the merger reads, in merge order, [patches of all images, E]."""
        return seen

    def injected(self, out: Any) -> tuple[Tensor, ...]:
        """What is added after decoder layers, [visual tokens of all images, D] each."""
        return ()

    def at(self, position: int) -> Tensor:
        return torch.full((3, 1, 1), position)

    def answer(self, prompt: Sequence[int], pixels: Any, steps: int) -> tuple[list[int], Tensor]:
        given = self.given(prompt, pixels)
        return original.generated(self.whole, steps, given, given["input_ids"].shape[1])

    def attend_with(self, implementation: str) -> None:
        self.whole.set_attn_implementation(implementation)

    def prefill(self, prompt: Sequence[int], pixels: Any) -> tuple[Any, Any]:
        given = self.given(prompt, pixels)
        out = self.whole(**given, use_cache=True, logits_to_keep=1)
        at = int(given["input_ids"].shape[1] + self.whole.model.rope_deltas.item())
        steps = iter(range(at, at + (1 << 20)))

        def step(token: Tensor, cache: Any) -> Any:
            position = self.at(next(steps))
            return self.whole(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)

        return out, step

    def given(self, prompt: Sequence[int], pixels: Any) -> dict[str, Tensor]:
        """Stock inputs of a prompt with one image token per image.

        Args:
            pixels: [images, 3, H, W], or a list of [1, 3, H, W].
        """
        pictures = [picture[None] for picture in pixels] if isinstance(pixels, Tensor) else list(pixels)
        config = self.whole.config.vision_config
        patch, merge = config.patch_size, config.spatial_merge_size
        grids = [(1, p.shape[2] // patch, p.shape[3] // patch) for p in pictures]
        counts = iter([rows * columns // merge**2 for _, rows, columns in grids])
        ids = [t for i in prompt for t in ([i] * next(counts) if i == self.image_token_id else [i])]
        found = torch.tensor([ids])
        return {
            "input_ids": found,
            "mm_token_type_ids": (found == self.image_token_id).int(),
            "pixel_values": torch.cat([patches(p, patch, merge) for p in pictures]),
            "image_grid_thw": torch.tensor(grids),
        }


def patches(picture: Tensor, patch: int, merge: int) -> Tensor:
    """A picture [1, 3, H, W] as the stock processor cuts it up: two equal frames, [patches, 3 * 2 * patch * patch]."""
    rows, columns = picture.shape[2] // patch // merge, picture.shape[3] // patch // merge
    cells = picture[0].reshape(3, rows, merge, patch, columns, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
    frames = cells[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1)
    return frames.reshape(rows * columns * merge**2, -1)
