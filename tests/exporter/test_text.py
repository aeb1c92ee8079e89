"""Tokenizers and chat templates of checkpoints, as a bundle has them, against transformers' own tokenizers."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lvlm_edge.exporter.checkpoints import conversion, text
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, CheckpointError
from lvlm_edge.exporter.families import llava_llama
from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.errors import UnsupportedError
from lvlm_edge.runtime.pipeline.inputs import user_turn
from lvlm_edge.runtime.prompt import Text
from tests import eager, tiny
from tests.runtime.test_prompt import ORDINARY, WORDS, small

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


# Tokenizers in older files.


def pieces(folder: Path, **changed: object) -> None:
    """Write a `tokenizer.model` like Llama's, or changed."""
    (folder / "words").write_text("\n".join(WORDS * 50), "utf-8")
    settings = {
        "model_type": "bpe", "vocab_size": 310, "byte_fallback": True, "unk_id": 0, "bos_id": 1, "eos_id": 2,
        "pad_id": -1, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2,
    }  # fmt: skip
    names = {"input": str(folder / "words"), "model_prefix": str(folder / "m")}
    sentencepiece.SentencePieceTrainer.train(**names, **settings | changed)
    (folder / "m.model").rename(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer.model`, and one named `bytes` in it with `vocab.json` and `merges.txt`."""
    folder = tmp_path_factory.mktemp("trained")
    pieces(folder)
    (folder / "bytes").mkdir()
    plain = ByteLevelBPETokenizer()
    plain.train_from_iterator(WORDS, vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    plain.save_model(str(folder / "bytes"))
    return folder


def older(trained: Path, folder: Path, kind: str, config: dict[str, object] | None) -> Checkpoint:
    """A checkpoint of LLaVA's original layout with a tokenizer in older files."""
    for name in ("tokenizer.model",) if kind == "sentencepiece" else ("bytes/vocab.json", "bytes/merges.txt"):
        (folder / Path(name).name).write_bytes((trained / name).read_bytes())
    if config is not None:
        tiny.write_json(folder / "tokenizer_config.json", config)
    tiny.write_json(folder / "config.json", {"model_type": "llava_llama"})
    return Checkpoint.open(folder)


LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None}
OLDER = {
    "LLaVA": ("sentencepiece", LLAMA | {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}}),
    "before 4.34": ("sentencepiece", LLAMA | {"legacy": True}),
    "no first token": ("sentencepiece", LLAMA | {"add_bos_token": False}),
    "Qwen": ("bytes", QWEN),
}


@pytest.mark.parametrize("name", OLDER)
def test_a_tokenizer_in_older_files_is_converted(name, trained, tmp_path):
    kind, config = OLDER[name]
    of = older(trained, tmp_path, kind, config)
    stock = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)

    copied(of, tmp_path / "out")

    found = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for line in (*ORDINARY, "USER: </s>x ASSISTANT: <|im_end|>\n"):
        assert found.encode(line).ids == stock(line).input_ids, line
    if kind == "sentencepiece":
        pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
        for line in (line for line in ORDINARY if not line.startswith(" ")):  # there transformers has a space less
            assert found.encode(line, add_special_tokens=False).ids == pieces.encode(line), line


@pytest.mark.parametrize(("kind", "like"), [("sentencepiece", "LlamaTokenizer"), ("bytes", "Qwen2Tokenizer")])
def test_without_a_config_the_files_say_which_tokenizer_it_is(kind, like, trained, tmp_path):
    import transformers

    of = older(trained, tmp_path, kind, None)
    stock = getattr(transformers, like).from_pretrained(tmp_path, local_files_only=True)

    found = copied(of, tmp_path / "out")

    assert found._tokenizer.encode("A cat, 3 dogs").ids == stock("A cat, 3 dogs").input_ids
    assert found._config.eos_token == stock.eos_token


@pytest.mark.parametrize("config", [None, LLAMA, LLAMA | {"legacy": True}, {"tokenizer_class": "InternLM2Tokenizer"}])
def test_a_model_file_that_puts_no_space_before_a_text_is_converted_so(config, tmp_path):
    pieces(tmp_path, add_dummy_prefix=False)
    if config is not None:
        tiny.write_json(tmp_path / "tokenizer_config.json", config)
    released = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))

    made = Tokenizer.from_str(conversion.convert(tmp_path).content)

    for line in ORDINARY:
        ids = made.encode(line, add_special_tokens=False).ids
        assert ids == released.encode(line) and made.decode(ids) == released.decode(ids) == line, line
    assert made.encode("</s>a", add_special_tokens=False).ids == [2, *released.encode("a")]


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        (LLAMA, {"normalization_rule_name": "nmt_nfkc"}),  # which LlamaTokenizer leaves out
        ({"tokenizer_class": "InternLM2Tokenizer"}, {}),  # the space in front, which others leave out
    ],
)
def test_a_conversion_that_gives_other_ids_than_the_model_file_is_refused(config, changed, tmp_path):
    pieces(tmp_path, **changed)
    tiny.write_json(tmp_path / "tokenizer_config.json", config)

    with pytest.raises(CheckpointError, match=r"tokenizer.model: transformers' tokenizer cuts '.*' up into \[.*save"):
        conversion.convert(tmp_path)


# Tokens that a checkpoint adds, in the files of transformers 4.
ADDED = {
    "added_tokens.json": {"added_tokens.json": {"<image>": 310, "<pad>": 311, "<|im_end|>": 312}},
    "tokenizer_config.json": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(310 + i): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
                for i, token in enumerate(("<image>", "<pad>", "<|im_end|>"))
            }
        }
    },
}


@pytest.mark.parametrize("where", ADDED)
def test_added_tokens_beside_a_model_file_keep_their_ids(where, trained, tmp_path):
    of = older(trained, tmp_path, "sentencepiece", LLAMA | ADDED[where].get("tokenizer_config.json", {}))
    if where == "added_tokens.json":
        tiny.write_json(tmp_path / where, ADDED[where][where])
    released = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))

    made = copied(of, tmp_path / "out")._tokenizer

    for line in (line for line in ORDINARY if not line.startswith(" ")):
        ids = made.encode(f"{line}<image>{line}<|im_end|>", add_special_tokens=False).ids
        assert ids[: ids.index(310)] == released.encode(line) and ids[-1] == 312, line
        # Behind a token no space is put (`legacy` is false): what the model file gives a line behind another.
        behind = released.encode("x\n" + line)[len(released.encode("x\n")) :] if line else []
        assert ids[ids.index(310) + 1 : -1] == behind, line


def test_the_prompt_of_a_released_llava_is_that_of_its_own_code(trained, tmp_path):
    of = older(trained, tmp_path, "sentencepiece", OLDER["LLaVA"][1])
    stock = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)

    ids = copied(of, tmp_path / "out").encode_chat(user_turn("What is it?", 1, None))

    assert ids == tokenizer_image_token(f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:", stock)


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_a_missing_package_is_named_with_its_command(missing, trained, tmp_path, monkeypatch):
    of, find = older(trained, tmp_path, "sentencepiece", LLAMA), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))

    with pytest.raises(UnsupportedError, match=f"pip install {missing.rpartition('.')[2]}$"):
        copied(of, tmp_path / "out")


def test_a_tokenizer_that_cannot_be_converted_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_text("not a model", "utf-8")

    with pytest.raises(CheckpointError, match=r"tokenizer.model: transformers cannot read this tokenizer \("):
        conversion.convert(tmp_path)


def test_a_folder_without_a_vocabulary_has_no_tokenizer(tmp_path):
    tiny.write_json(tmp_path / "tokenizer_config.json", LLAMA)
    (tmp_path / "vocab.json").write_text("{}", "utf-8")

    assert conversion.convert(tmp_path) is None


# Templates that know no pictures.

TEXT_ONLY = {
    "joins the parts": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
    "prints the parts": "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
    "leaves pictures out": (
        "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endfor %}"
    ),
    "refuses parts": "{% if messages[0]['content'] is not string %}{{ raise_exception('Only text!') }}{% endif %}",
}


@pytest.fixture
def silent(checkpoint_once, tmp_path) -> Path:
    return Path(shutil.copytree(tiny.checkpoint(checkpoint_once), tmp_path / "checkpoint"))


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_a_template_that_cannot_ask_about_a_picture_is_refused_at_export(name, silent, tmp_path):
    (silent / "chat_template.jinja").write_text(TEXT_ONLY[name], "utf-8")

    message = tiny.refused(1, "export", silent, "-o", tmp_path / "bundle", *tiny.CAPACITY)

    assert "its chat template cannot ask about a picture" in message
    assert "--chat-template published" in message and "chat_template.jinja" in message
    assert not (tmp_path / "bundle").exists()


def test_the_published_format_can_be_taken_in_its_place(silent, tmp_path, eager_once):
    (silent / "chat_template.jinja").write_text(TEXT_ONLY["joins the parts"], "utf-8")
    stock = PreTrainedTokenizerFast(tokenizer_file=str(silent / "tokenizer.json"))

    bundle = eager.export(silent, tmp_path / "bundle", max_text_tokens=24, max_new_tokens=8, chat_template="published")

    found = Pipeline.load(bundle).encode(user_turn("w5 w6", 1, None))
    assert found == stock("USER: <image>\nw5 w6 ASSISTANT:").input_ids
    assert parity.check(bundle, silent, steps=1, store=False).passed
    assert "known: checkpoint, published" in tiny.refused(
        3, "export", silent, "-o", tmp_path / "other", "--chat-template", "mine"
    )
