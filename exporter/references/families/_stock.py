"""Stock models that put the features of a picture's views into an expanded prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lvlm_edge.exporter.checkpoints.checkpoint import read_json
from lvlm_edge.exporter.references import original, stored
from lvlm_edge.exporter.references.original import Read


class Stock(original.Original):
    """The parts of a stock model.

    Attributes:
        whole: the stock model.
    """

    processed: ClassVar[dict[str, Any] | None] = {}

    def __init__(self, whole: Any, *, tower: Any, projector: Any, decoder: Any = None) -> None:
        language = nn.Module()
        language.model, language.lm_head = decoder or whole.model.language_model, whole.lm_head
        language.config = whole.config.text_config
        super().__init__(
            image_token_id=whole.config.image_token_id,
            tower=tower,
            projector=projector,
            language=language,
            extra={},
            select=(),
            drop_first=False,
        )
        self.whole = whole

    def lay_out(self, prompt: Sequence[int], pixels: Any) -> Read:
        pictures, seen = self.embeds(self.of_prompt(prompt, pixels))
        ids = torch.tensor(self.expanded(prompt, [len(rows) for rows in pictures]))
        images = torch.isin(ids, torch.tensor(self.placeholders))
        rows, embeds = self.decoder.embed_tokens(ids).clone(), torch.cat(pictures)
        rows[images] = embeds
        positions = torch.arange(len(ids))[None]
        return Read(
            features=torch.cat([part.flatten(0, -2) for part in seen]),
            embeds=embeds,
            rows=rows,
            images=images,
            positions=positions,
            next=len(ids),
            grids=self.grids(pictures),
        )

    def grids(self, pictures: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of the cells of every view; none where rows of pictures lie on no grid.

        Args:
            pictures: rows of every picture, [V, D] each.
        """
        return ()

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Tokens that stand for pictures in a prompt."""
        return (self.image_token_id,)

    def of_prompt(self, prompt: Sequence[int], pixels: Any) -> dict[str, Any]:
        """What the stock model takes of a prompt's pictures; `given` where the prompt makes no difference."""
        return self.given(pixels)

    def given(self, pixels: Any) -> dict[str, Any]:
        """What the stock model takes of pictures.

        Args:
            pixels: views of all pictures, [views, 3, H, W].
        """
        raise NotImplementedError

    def embeds(self, given: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Rows of every picture, [V, D] each, and what the projector read of their views."""
        with original.recorded(self.projector, lambda i, o: i[0]) as seen:
            found = self.whole.model.get_image_features(**given).pooler_output
        return list(found), seen

    def expanded(self, prompt: Sequence[int], counts: Sequence[int]) -> list[int]:
        """A prompt's token ids with everything that its pictures bring.

        Args:
            prompt: token ids with one image token per image.
            counts: visual tokens of each picture.
        """
        left, found = iter(range(len(counts))), list[int]()
        for token in prompt:
            if token == self.image_token_id:
                i = next(left)
                found += self.frame(i, counts[i])
            else:
                found.append(token)
        return found

    def frame(self, index: int, count: int) -> list[int]:
        """Token ids that an image token stands for: so many image tokens, and text around them where there is any.

        Args:
            index: of the picture.
            count: its visual tokens.
        """
        return [self.image_token_id] * count

    def answer(self, prompt: Sequence[int], pixels: Any, steps: int) -> tuple[list[int], Tensor]:
        given = self._inputs(prompt, pixels)
        return original.generated(self.whole, steps, given, given["input_ids"].shape[1])

    def attend_with(self, implementation: str) -> None:
        self.whole.set_attn_implementation(implementation)

    def prefill(self, prompt: Sequence[int], pixels: Any) -> tuple[Any, Any]:
        out = self.whole(**self._inputs(prompt, pixels), use_cache=True, logits_to_keep=1)
        return out, lambda token, cache: self.whole(input_ids=token, past_key_values=cache, use_cache=True)

    def counts(self, given: dict[str, Any]) -> list[int]:
        """Visual tokens of every picture."""
        return [len(rows) for rows in self.embeds(given)[0]]

    def _inputs(self, prompt: Sequence[int], pixels: Any) -> dict[str, Any]:
        given = self.of_prompt(prompt, pixels)
        return {"input_ids": torch.tensor([self.expanded(prompt, self.counts(given))]), **given}


def load(kind: Any, folder: Path) -> Any:
    """A stock model of a class, float32, eager attention; from plain weights where the checkpoint is quantised."""
    settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if stored.quantised(folder) is None:
        return kind.from_pretrained(folder, local_files_only=True, **settings).eval()
    config = kind.config_class.from_dict(stored.plain(read_json(folder / "config.json")))
    return kind.from_pretrained(None, config=config, state_dict=stored.state(folder), **settings).eval()
