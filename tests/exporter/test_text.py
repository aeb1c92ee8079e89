"""Tokenizers and chat templates of checkpoints, as a bundle has them, against transformers' own tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from lvlm_edge.exporter.checkpoints import text
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError
from lvlm_edge.exporter.families import llava_llama
from lvlm_edge.runtime.pipeline.inputs import user_turn
from lvlm_edge.runtime.prompt import Text
from tests import tiny
from tests.runtime.test_prompt import small

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
BRACKETS = ("<im_start>", "<im_end>")
PLACEHOLDER = -200


def saved(folder: Path, *, added: tuple[str, ...] = BRACKETS, **config: object) -> Checkpoint:
    """A folder with a tokenizer and a config.json of LLaVA's original layout."""
    tokenizer = small()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    tiny.write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    tiny.write_json(folder / "config.json", {"model_type": "llava_llama", **config})
    return Checkpoint.open(folder)


def copied(of: Checkpoint, out: Path) -> Text:
    """A bundle's text."""
    out.mkdir()
    found = text.copy(of.folder, out, llava_llama.chat_template(of), PLACEHOLDER)
    assert found is not None
    return Text.load(out, found)


def tokenizer_image_token(prompt: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids with -200 where images stand. Source: the function of this name in LLaVA's `mm_utils.py`."""
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
    found, offset = [], 0
    if chunks and chunks[0] and chunks[0][0] == tokenizer.bos_token_id:
        offset = 1
        found.append(chunks[0][0])
    for i, chunk in enumerate(chunks):
        found += ([PLACEHOLDER] if i else []) + chunk[offset:]
    return found


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("asked", "mark"), [(True, "<im_start><image><im_end>\n"), (False, "<image>\n")])
def test_images_stand_between_two_tokens_where_llava_was_trained_so(asked, mark, images, tmp_path):
    of = saved(tmp_path, mm_use_im_start_end=asked)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = None

    ids = copied(of, tmp_path / "out").encode_chat(user_turn("What is it?", images, None))

    prompt = f"{SYSTEM} USER: {mark * images}What is it? ASSISTANT:"
    tokens = tokenizer_image_token(prompt, tokenizer)
    assert [i for i in ids if i not in (1, 2)] == tokens
    assert (tokenizer.convert_tokens_to_ids("<im_start>") in ids) is asked


def test_a_tokenizer_without_the_two_tokens_is_refused(tmp_path):
    of = saved(tmp_path, added=("<im_start>",), mm_use_im_start_end=True)

    with pytest.raises(CheckpointError, match=r"tokenizer.json: has no added token '<im_end>', but .*saved with this"):
        copied(of, tmp_path / "out")


def test_a_template_without_the_two_tokens_gives_way_to_the_published_one(tmp_path):
    of = saved(tmp_path, mm_use_im_start_end=True)
    (tmp_path / "chat_template.jinja").write_text("<image>", "utf-8")

    copied(of, tmp_path / "out")

    assert (tmp_path / "out" / "chat_template.jinja").read_text("utf-8") == llava_llama.chat_template(of)
    assert text.turn_end(tmp_path / "out") == (2,)
