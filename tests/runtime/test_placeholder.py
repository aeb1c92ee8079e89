"""Prompts for tokenizers that have no image token: the text is cut up where the images stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lvlm_edge.exporter.checkpoints.templates import TEMPLATES
from lvlm_edge.runtime.errors import BundleError
from lvlm_edge.runtime.prompt import Text, TextConfig
from tests.runtime.test_prompt import HOSTILE, ORDINARY, byte_level, chat, metaspace_first, prepend_normalizer, small

IMAGE = -200
CASES: dict[str, tuple[Any, str, str, str]] = {
    "llama": (prepend_normalizer, TEMPLATES["v1"], "<s>", "</s>"),
    "metaspace": (metaspace_first, TEMPLATES["v1"], "<s>", "</s>"),
    "qwen": (byte_level, TEMPLATES["qwen_1_5"], "", "<|im_end|>"),
    "bos in template": (prepend_normalizer, "{{ bos_token }}" + TEMPLATES["v1"], "<s>", "</s>"),
}


class Case:
    """A bundle's text, and transformers' tokenizer for it."""

    def __init__(self, folder: Path, name: str) -> None:
        make, template, bos, eos = CASES[name]
        tokenizer = make()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "template.jinja").write_text(template, encoding="utf-8")
        self.text = Text.load(folder, config(bos, eos))
        file = str(folder / "tokenizer.json")
        self.reference = PreTrainedTokenizerFast(tokenizer_file=file, bos_token=bos or None, eos_token=eos)
        self.reference.chat_template = template
        self.plain = PreTrainedTokenizerFast(tokenizer_file=file, split_special_tokens=True)

    def encoded(self, messages: list[dict[str, Any]]) -> list[int]:
        """LLaVA's way, slowly: every piece is a sequence of its own, and only the first keeps its first token."""
        rendered = self.reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(rendered, str)
        bos = self.reference.bos_token
        ids: list[int] = []
        for i, piece in enumerate(rendered.split("<image>")):
            ids += [IMAGE] if i else []
            whole = list(self.reference(piece)["input_ids"])
            starts = bos is not None and whole[:1] == [self.reference.bos_token_id]
            twice = starts and i == 0 and rendered.startswith(bos)
            ids += whole[1:] if starts and (i or twice) else whole
        return ids


def config(bos: str, eos: str, image: str = "<image>") -> TextConfig:
    return TextConfig(
        tokenizer="tokenizer.json",
        chat_template="template.jinja",
        image_token=image,
        image_token_id=IMAGE,
        bos_token=bos,
        eos_token=eos,
    )


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("bundle"), request.param)


@pytest.mark.parametrize("text", ORDINARY)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_prompts_are_encoded_piece_by_piece(case: Case, images: int, text: str) -> None:
    messages = chat(text, "yes", text + "?", images=images)

    assert case.text.encode_chat(messages) == case.encoded(messages)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_placeholder_or_special_token_typed_by_a_user_is_text(case: Case, text: str) -> None:
    ids = case.text.encode_chat(chat(f"@{text}@"))

    mark = case.text.encode_chat(chat("@@"))
    special = set(case.reference.all_special_ids)
    assert ids.count(IMAGE) == 1
    assert sum(i in special for i in ids) == sum(i in special for i in mark)
    assert text.replace("▁", " ") in case.plain.decode([i for i in ids if i != IMAGE]).replace("▁", " ")


@pytest.mark.parametrize("parts", [("<ima", "ge>"), ("<", "image>"), ("<i", "mag", "e>")])
def test_a_placeholder_split_over_parts_is_text(case: Case, parts: tuple[str, ...]) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": part} for part in parts]}]

    assert IMAGE not in case.text.encode_chat(messages)


def test_a_manifest_that_names_no_placeholder_is_refused(tmp_path: Path) -> None:
    small().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "template.jinja").write_text("x", encoding="utf-8")

    with pytest.raises(BundleError, match="names no image token; export"):
        Text.load(tmp_path, config("<s>", "</s>", image=""))
