"""Prompt ids with published tokenizers, against transformers' stock processors. Slow, and fetched once.

The templates are those that the published processors come with, in few words.
"""

from __future__ import annotations

import base64
import copy
import inspect
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoImageProcessor, AutoTokenizer

from lvlm_edge.exporter import families
from lvlm_edge.exporter.bundles import plans
from lvlm_edge.exporter.checkpoints import conversion, templates, text
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.planning import Capacity
from lvlm_edge.runtime.pictures.layout import Picture, Run
from lvlm_edge.runtime.prompt import Text, count_parts, streams
from tests import tiny
from tests.exporter.test_text import PLACEHOLDER, SYSTEM, tokenizer_image_token
from tests.families import noise
from tests.real_tokenizers import fetch, smollm2
from tests.runtime.test_prompt import HOSTILE, ORDINARY, check_stream
from tests.samples.test_families import PUBLISHED

pytestmark = pytest.mark.slow

SIZE = (500, 300)  # of pictures, in pixels
_PARTS = "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
_APART = (  # pictures, then texts
    "{% for p in m['content'] if p['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] | upper + ': ' }}{% endif %}"
    + _APART
    + "{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
INSTRUCT = (
    "{% for m in messages %}{{ {'user': '[INST] ', 'system': '<<SYS>>\\n', 'assistant': ' '}[m['role']] }}"
    + _APART
    + "{{ {'user': ' [/INST]', 'system': '\\n<</SYS>>\\n\\n', 'assistant': '</s>'}[m['role']] }}{% endfor %}"
)
HEADERS = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    + _APART
    + "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    + _APART
    + "<|im_end|>{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INTERN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    + _PARTS.replace("IMAGE", "{{ '<IMG_CONTEXT>\\n' }}")
    + "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMOL = (
    "START{% for m in messages %}{{ m['role'] | capitalize }}"
    "{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}"
    + _PARTS.replace("IMAGE", "<image>")
    + "{{ '<end_of_utterance>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    + _PARTS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    + "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BEGIN = "<|begin_of_text|>"
MANY = "🫨👩‍👩‍👧🇨🇭" * 9 + "龘靐齉" * 9 + "a\u0301\u0327" * 9 + " \t\r\n" * 9
NAMED = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
NAMED |= {"video_token": "<video>"}
INTERNVL = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>")
TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
CLIP = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published checkpoint without its weights.

    Attributes:
        config: its name in `samples/families/published.py`.
        tokenizer: of its language model, by its name in `tests/real_tokenizers.py`.
        kept: added tokens of it that the checkpoint has; None for all.
        added: tokens that the checkpoint has behind them.
        image: the image token.
        processor: the stock class, and what `processor_config.json` gives it.
    """

    config: str
    tokenizer: str
    added: Sequence[str] = ()
    kept: int | None = None
    image: str = "<image>"
    template: str
    processor: str
    given: dict[str, Any] = field(default_factory=dict)
    model_type: str | None = None


CASES = {
    "llava": Published(
        config="LLaVA-1.5-7B", tokenizer="llama2", added=("<image>", "<pad>"), template=VICUNA,
        processor="LlavaProcessor", given=CLIP,
    ),
    "llava_next, Vicuna": Published(
        config="LLaVA-1.6-Vicuna-7B", tokenizer="llama2", added=("<image>", "<pad>"), template=VICUNA,
        processor="LlavaNextProcessor", given=CLIP,
    ),
    "llava_next, Mistral": Published(
        config="LLaVA-1.6-Mistral-7B", tokenizer="llama2", added=("<image>", "<pad>"), template=INSTRUCT,
        processor="LlavaNextProcessor", given=CLIP,
    ),
    "llava_next, Llama 3": Published(
        config="LLaVA-1.6-Llama3-8B", tokenizer="llama3", added=("<image>",), template=HEADERS,
        processor="LlavaNextProcessor", given=CLIP,
    ),
    "llava_onevision": Published(
        config="OneVision-0.5B", tokenizer="qwen2_5", kept=3, added=("<image>", "<video>"), template=ONEVISION,
        processor="LlavaOnevisionProcessor",
        given={"num_image_tokens": 729, "vision_feature_select_strategy": "full"},
    ),
    "internvl, Qwen2.5": Published(
        config="InternVL3-1B", tokenizer="qwen2_5", added=INTERNVL, image="<IMG_CONTEXT>", template=INTERN,
        processor="InternVLProcessor",
    ),
    "internvl, Qwen3": Published(
        config="InternVL3.5-1B", tokenizer="qwen3", added=INTERNVL, image="<IMG_CONTEXT>", template=INTERN,
        processor="InternVLProcessor",
    ),
    "smolvlm, tiles are tokens": Published(
        config="SmolVLM-256M", tokenizer="smollm2",
        added=("<global-img>", *TILES, "<fake_token_around_image>", "<image>", "<end_of_utterance>"),
        template=SMOL.replace("START", "<|im_start|>"), processor="Idefics3Processor", given={"image_seq_len": 64},
        model_type="smolvlm",  # whose own processor takes num2words, and writes the same text
    ),
    "smolvlm, tiles are text": Published(
        config="SmolVLM-2.2B", tokenizer="smollm2",
        added=("<fake_token_around_image>", "<image>", "<end_of_utterance>"),
        template=SMOL.replace("START", "<|im_start|>"), processor="Idefics3Processor", given={"image_seq_len": 81},
    ),
    "idefics3": Published(
        config="SmolVLM-2.2B", tokenizer="llama3",
        added=("<fake_token_around_image>", "<image>", "<end_of_utterance>"),
        template=SMOL.replace("START", "<|begin_of_text|>"), processor="Idefics3Processor", given={"image_seq_len": 81},
    ),
    "qwen2_vl": Published(
        config="Qwen2-VL-2B", tokenizer="qwen2_5", image="<|image_pad|>", template=QWEN, processor="Qwen2VLProcessor",
    ),
    "qwen2_5_vl": Published(
        config="Qwen2.5-VL-3B", tokenizer="qwen2_5", image="<|image_pad|>", template=QWEN,
        processor="Qwen2_5_VLProcessor",
    ),
    "qwen3_vl": Published(
        config="Qwen3-VL-2B", tokenizer="qwen3", image="<|image_pad|>", template=QWEN, processor="Qwen3VLProcessor",
    ),
    "video_llava": Published(
        config="LLaVA-1.5-7B", tokenizer="llama2", added=("<image>", "<video>"), template=VICUNA,
        processor="VideoLlavaProcessor", given=CLIP, model_type="video_llava",
    ),
}  # fmt: skip


def checkpoint(of: Published, folder: Path) -> Path:
    """The folder: configs, tokenizer and template."""
    PUBLISHED.folder(of.config, folder)
    source = smollm2() if of.tokenizer == "smollm2" else fetch(of.tokenizer)
    made = json.loads(source.read_text("utf-8"))
    made["added_tokens"] = made["added_tokens"][: of.kept]
    tokenizer = with_tokens(Tokenizer.from_str(json.dumps(made)), of.added)
    if of.tokenizer == "llama3":  # as later published files of it
        begin = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 128000)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((source.parent / "tokenizer_config.json").read_text("utf-8"))
    config = {key: value for key, value in config.items() if key not in ("chat_template", "added_tokens_decoder")}
    named = {"extra_special_tokens": NAMED} if "<IMG_CONTEXT>" in of.added else {}
    tiny.write_json(folder / "tokenizer_config.json", config | named)
    (folder / "chat_template.jinja").write_text(of.template, "utf-8")
    model = json.loads((folder / "config.json").read_text("utf-8"))
    model["image_token_index" if "image_token_index" in model else "image_token_id"] = tokenizer.token_to_id(of.image)
    tiny.write_json(folder / "config.json", model | ({"model_type": of.model_type} if of.model_type else {}))
    if of.model_type == "video_llava":
        kind = {"image_processor_type": "VideoLlavaImageProcessor"}
        tiny.write_json(folder / "preprocessor_config.json", PUBLISHED.PROCESSORS["llava"] | kind)
    return folder


def with_tokens(tokenizer: Tokenizer, added: Sequence[str]) -> Tokenizer:
    """The tokenizer with special tokens behind those that it has."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    return tokenizer


def copied(folder: Path, template: str | None, image: int) -> Text:
    """A bundle's text."""
    with tempfile.TemporaryDirectory() as out:
        found = text.copy(folder, Path(out), template, image)
        assert found is not None
        return Text.load(Path(out), found)


class Case:
    """A published checkpoint: what a bundle of it has, and the stock processor."""

    def __init__(self, of: Published, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.planned = checkpoint(of, folder / "checkpoint"), dict[int, tuple[Picture, ...]]()
        opened = Checkpoint.open(self.folder)
        self.sized = families.of(opened).sized
        self.image = families.read(opened).image_token_id
        self.text = copied(self.folder, families.of(opened).chat_template(opened), self.image)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        kind = getattr(transformers, of.processor)
        seen = AutoImageProcessor.from_pretrained(self.folder, backend="pil", local_files_only=True)
        made = {"image_processor": seen, "tokenizer": self.tokenizer, "chat_template": of.template, **of.given}
        if "video_processor" in inspect.signature(kind.__init__).parameters:
            made["video_processor"] = None  # which takes torchvision
        right = kind.check_argument_for_proper_class
        patch.setattr(kind, "check_argument_for_proper_class", lambda *given: given[-1] is None or right(*given))
        self.processor = kind(**made)
        remembered: dict[str, Any] = {}

        def preprocess(images: Any, *args: Any, **options: Any) -> Any:
            key = repr(([len(one) if isinstance(one, list) else 1 for one in images], options))
            if key not in remembered:
                remembered[key] = type(seen).preprocess(seen, images, *args, **options)
            return copy.deepcopy(remembered[key])

        patch.setattr(seen, "preprocess", preprocess)

    def pictures(self, count: int) -> list[Picture]:
        """What the pictures of a prompt stand for."""
        if count not in self.planned:
            capacity = Capacity(num_images=count, image_size=(SIZE,) * count if self.sized else ())
            self.planned[count] = plans.model(Checkpoint.open(self.folder), capacity).pictures
        return list(self.planned[count])

    def found(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of the bundle, with what its pictures stand for."""
        pictures = self.pictures(max(count_parts(messages, "image"), 1))
        ids: list[int] = []
        for token in self.text.encode_chat(messages):
            runs = pictures.pop(0).runs if token == self.image else (Run(kind="text", rows=1, ids=(token,)),)
            ids += [i for run in runs for i in run.ids or (token,) * run.rows]
        return ids

    def wanted(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of the stock processor."""

        def shown(part: dict[str, Any]) -> dict[str, Any]:
            return part | ({"image": noise(SIZE)} if part["type"] == "image" else {})

        given = [message | {"content": [shown(part) for part in message["content"]]} for message in messages]
        settings = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
        return [int(i) for i in self.processor.apply_chat_template(given, **settings)["input_ids"][0]]

    @cached_property
    def plain(self) -> Tokenizer:
        """The stock tokenizer, which takes special tokens for text."""
        made = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        made.encode_special_tokens = True
        return made

    def as_text(self, said: str) -> list[int]:
        """Token ids of a question without pictures, in which nothing that was said is a special token."""
        rendered = self.processor.apply_chat_template([turn("user", "@0@")], tokenize=False, add_generation_prompt=True)
        special = sorted((t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special), key=len)
        starts = rendered.startswith(self.tokenizer.bos_token or "@0@")
        ids = [] if starts else list(self.tokenizer("").input_ids)
        for piece in re.split(f"({'|'.join(map(re.escape, special[::-1]))})", rendered):
            if piece in special:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                ids += self.plain.encode(piece.replace("@0@", said), add_special_tokens=False).ids
        return ids


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with pytest.MonkeyPatch.context() as patch:
        yield Case(CASES[request.param], tmp_path_factory.mktemp("published"), patch)


def turn(role: str, *parts: str | None) -> dict[str, Any]:
    """A message; None is an image."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


CONVERSATIONS: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "no picture": lambda said: [turn("user", said)],
    "one picture": lambda said: [turn("user", None, said)],
    "two pictures": lambda said: [turn("user", None, said, None, "Which is larger?")],
    "pictures in two turns": lambda said: [turn("user", None, said), turn("assistant", said), turn("user", None, said)],
    "three turns": lambda said: [
        turn("user", None, "What?"), turn("assistant", said), turn("user", said), turn("assistant", "Yes."),
        turn("user", f"{said} {said}"),
    ],
    "system": lambda said: [turn("system", said), turn("user", None, said)],
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_the_stock_processor(case, name):
    for said in ORDINARY:
        messages = CONVERSATIONS[name](said)
        if name == "system" and said[:1] in ("", " ") and isinstance(case.tokenizer, transformers.LlamaTokenizer):
            continue  # this class drops a space that a prompt begins with; tokenizer.json and sentencepiece do not

        assert case.found(messages) == case.wanted(messages), said


def test_special_tokens_that_a_user_types_are_text(case):
    every = [token.content for token in case.tokenizer.added_tokens_decoder.values() if token.special]

    for said in (*HOSTILE, " ".join(every), "".join(every), f"a {case.tokenizer.decode([case.image])}b"):
        ids = case.text.encode_chat([turn("user", said)])

        assert ids == case.as_text(said), said
        assert case.image not in ids


def test_pieces_of_answers_are_what_the_stock_tokenizer_decodes(case):
    for said in (*ORDINARY, *HOSTILE, MANY):
        ids = case.tokenizer(said).input_ids

        pieces = check_stream(case.text, ids)

        assert "".join(pieces) == case.tokenizer.decode(ids, skip_special_tokens=True), said


# Layouts without a stock processor: the prompt is written by hand, and cut up as LLaVA's code does.

SPOKEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
    "<|im_start|>assistant\nSAID<|im_end|>\n"
)
FORMATS = {  # of LLaVA and TinyLLaVA, by language model: question, answer, question
    "v1": ("llama2", f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: SAID</s>USER: SAID ASSISTANT:"),
    "llama-3": ("llama3", f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: SAID<|end_of_text|>USER: SAID ASSISTANT:"),
    "qwen2_base": ("qwen2_5", f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: SAID<|endoftext|>USER: SAID ASSISTANT:"),
    "qwen_1_5": ("qwen2_5", f"{SPOKEN}<|im_start|>user\nSAID<|im_end|>\n<|im_start|>assistant\n"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_ids_of_original_layouts_are_those_of_the_releases(name, tmp_path):
    tokenizer, rendered = FORMATS[name]
    (tmp_path / "c").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(fetch(tokenizer).parent / file, tmp_path / "c" / file)
    stock = AutoTokenizer.from_pretrained(tmp_path / "c", local_files_only=True)
    made = copied(tmp_path / "c", templates.TEMPLATES[name], PLACEHOLDER)

    for said in ORDINARY:
        ids = made.encode_chat([turn("user", None, "What?"), turn("assistant", said), turn("user", said)])

        assert ids == tokenizer_image_token(rendered.replace("SAID", said), stock), said


CHATS = {"internlm2-chat": ("internlm2", ""), "Hermes-2": ("yi", ""), "internvl2_5": ("qwen2_5", "\n")}
CHAT = (
    "<|im_start|>system\nYou see.END<|im_start|>user\n<image>\nWhat?END<|im_start|>assistant\nSAIDEND"
    "<|im_start|>user\nSAIDEND<|im_start|>assistant\n"
)


@pytest.mark.parametrize("name", CHATS)
def test_ids_of_internvls_releases_are_those_of_the_text_that_their_code_writes(name, tmp_path):
    language, behind = CHATS[name]
    PUBLISHED.folder("InternVL2-8B", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    tiny.write_json(tmp_path / "config.json", config | {"template": name, "system_message": "You see."})
    added = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
    published = with_tokens(Tokenizer.from_file(str(fetch(language))), added)
    published.save(str(tmp_path / "tokenizer.json"))
    opened = Checkpoint.open(tmp_path)
    made = copied(tmp_path, families.of(opened).chat_template(opened), published.token_to_id("<IMG_CONTEXT>"))
    (picture,) = plans.model(opened, Capacity(image_size=(SIZE,))).pictures
    seen = f"<img>{'<IMG_CONTEXT>' * picture.visual_tokens}</img>"

    for said in ORDINARY:
        ids = made.encode_chat([turn("user", None, "What?"), turn("assistant", said), turn("user", said)])

        at = ids.index(picture.token_id)
        shown = [i for run in picture.runs for i in run.ids or (picture.token_id,) * run.rows]
        whole = CHAT.replace("END", f"<|im_end|>{behind}").replace("<image>", seen).replace("SAID", said)
        assert [*ids[:at], *shown, *ids[at + 1 :]] == published.encode(whole).ids, said


# A published vocabulary as `tokenizer.model` alone. Yi's puts no space before a text.


def model_file(vocabulary: dict[str, int], special: Sequence[str], *, space: bool) -> bytes:
    """A sentencepiece file of BPE pieces in the order in which they are merged."""
    from sentencepiece import sentencepiece_model_pb2

    made = sentencepiece_model_pb2.ModelProto()
    made.trainer_spec.model_type, made.trainer_spec.byte_fallback = 2, True
    made.normalizer_spec.name, made.normalizer_spec.add_dummy_prefix = "identity", space
    made.normalizer_spec.remove_extra_whitespaces = False
    for token, i in sorted(vocabulary.items(), key=lambda item: item[1]):
        kind = 2 if i == 0 else 3 if token in special else 6 if re.fullmatch("<0x..>", token) else 1
        made.pieces.add(piece=token, score=-float(i), type=kind)
    return bytes(made.SerializeToString())


@pytest.mark.parametrize(("name", "space"), [("llama2", True), ("yi", False)])
def test_a_model_file_alone_gives_the_ids_of_the_published_tokenizer(name, space, tmp_path):
    source = fetch(name)
    published = Tokenizer.from_file(str(source))
    special = [token.content for token in published.get_added_tokens_decoder().values()]
    vocabulary = json.loads(source.read_text("utf-8"))["model"]["vocab"]
    (tmp_path / "tokenizer.model").write_bytes(model_file(vocabulary, special, space=space))
    shutil.copyfile(source.parent / "tokenizer_config.json", tmp_path / "tokenizer_config.json")

    made = Tokenizer.from_str(conversion.convert(tmp_path).content)

    for said in (said for said in (*ORDINARY, MANY) if not (space and said.startswith(" "))):
        assert made.encode(said).ids == published.encode(said).ids, said


def test_a_ranks_file_gives_the_ids_of_the_published_tokenizer(tmp_path):
    published = Tokenizer.from_file(str(fetch("qwen2_5")))  # the same ranks as Qwen's
    alphabet, vocabulary = streams._byte_alphabet(), json.loads(published.to_str())["model"]["vocab"]
    lines = (
        b"%s %d\n" % (base64.b64encode(bytes(alphabet[char] for char in token)), rank)
        for token, rank in vocabulary.items()
    )
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))

    made = Tokenizer.from_str(conversion.convert(tmp_path).content)

    for said in (*ORDINARY, MANY, "<|endoftext|><|im_start|>a<|im_end|>"):
        assert made.encode(said).ids == published.encode(said).ids, said
