"""What to calibrate on: images and prompts, chosen at random, as the model reads them."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvlm_edge.exporter.checkpoints import text
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError
from lvlm_edge.exporter.planning import Model
from lvlm_edge.runtime.errors import InputError, UsageError
from lvlm_edge.runtime.pictures.image import open_image
from lvlm_edge.runtime.pictures.views import pixels
from lvlm_edge.runtime.prompt import Text


@dataclass(frozen=True)
class Sample:
    """A picture and what is asked about it; the answer, where there is one, is read along."""

    picture: Path
    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class Case:
    """A sample as the model reads it: token ids, and float32 pixels [1, 3, H, W]."""

    ids: list[int]
    pixels: Tensor


def read_samples(pictures: Path, prompt: str, count: int, seed: int) -> list[Sample]:
    """At most `count` samples of a folder or a JSONL file, in its order.

    Raises:
        UsageError: there is none.
        InputError: a line is no sample.
    """
    if pictures.is_dir():
        from PIL import Image

        known = Image.registered_extensions()
        found = [Sample(path, prompt) for path in sorted(pictures.iterdir()) if path.suffix.lower() in known]
    elif pictures.is_file():
        found = _lines(pictures)
    else:
        raise UsageError(f"{pictures}: no such folder or file; give --pictures a folder or a .jsonl file")
    if not found:
        raise UsageError(f"{pictures}: holds no pictures; give some that are like those to come")
    chosen = sorted(random.Random(seed).sample(range(len(found)), min(count, len(found))))
    return [found[i] for i in chosen]


def _lines(file: Path) -> list[Sample]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as text ({error}); give a folder or a .jsonl file") from error
    return [_line(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _line(file: Path, number: int, line: str) -> Sample:
    wanted = 'expected {"image": path, "prompt": text} and perhaps "answer": text; correct the line'
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"{file}: line {number} is no JSON ({error}), {wanted}") from error
    fields = found if isinstance(found, dict) else {}
    values = [fields.get(name) for name in ("image", "prompt", "answer")]
    if not set(fields) <= {"image", "prompt", "answer"} or not all(
        isinstance(value, str) and value.strip() for value in (values if "answer" in fields else values[:2])
    ):
        raise InputError(f"{file}: line {number} is {line.strip()[:80]}, {wanted}")
    return Sample(file.parent / fields["image"], fields["prompt"], fields.get("answer"))


def cases_of(of: Checkpoint, model: Model, samples: Sequence[Sample]) -> list[Case]:
    """Samples through the checkpoint's own chat template, tokenizer and preprocessing, one view each.

    Raises:
        CheckpointError: it has no tokenizer, or one that cannot be used.
        InputError: a picture cannot be used.
    """
    views = model.pictures[0].views
    with tempfile.TemporaryDirectory() as place:
        template = model.family.chat_template(of)
        known = text.copy(of.folder, Path(place), template, model.spec.image_token_id)
        if known is None:
            raise CheckpointError(f"{of.folder}: has no {text.TOKENIZER}, which prompts need; add its tokenizer")
        words = Text.load(Path(place), known)
        return [
            Case(_ids(words, sample), torch.from_numpy(pixels(open_image(sample.picture), views))) for sample in samples
        ]


def _ids(words: Text, sample: Sample) -> list[int]:
    content = [{"type": "image"}, {"type": "text", "text": sample.prompt}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if sample.answer is None:
        return words.encode_chat(messages)
    messages.append({"role": "assistant", "content": [{"type": "text", "text": sample.answer}]})
    return words.encode_chat(messages, add_generation_prompt=False)
