"""Tokenizer and chat template of a checkpoint, as files and settings of the bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lvlm_edge.exporter.checkpoints import conversion
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, read_json
from lvlm_edge.exporter.checkpoints.templates import BRACKETS, ENDS, PLACEHOLDER, PUBLISHED
from lvlm_edge.runtime.errors import BundleError, InputError
from lvlm_edge.runtime.prompt import Text, TextConfig
from lvlm_edge.runtime.prompt.chat_template import one_line

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]}]


def copy(
    folder: Path,
    out: Path,
    published: str | None,
    image_token_id: int,
    chosen: str = "checkpoint",
    *,
    video_token_id: int | None = None,
) -> TextConfig | None:
    """Copy tokenizer and chat template into a bundle; None for a checkpoint without a tokenizer.

    A tokenizer in older files, such as sentencepiece's, is converted.

    Args:
        published: template for a checkpoint that has none, or one that is its language model's and knows no images;
            None where the family has no published one.
        image_token_id: below 0 where the tokenizer has no image token.
        chosen: `published` takes that template even where the checkpoint has one.
        video_token_id: None where videos are not seen.

    Raises:
        CheckpointError: a file is damaged, the tokenizer does not know the image's or the video's token, or the
            template cannot ask about a picture.
        UnsupportedError: a package is missing that converting the tokenizer takes.
    """
    config = _optional(folder / "tokenizer_config.json")
    special = _optional(folder / "special_tokens_map.json") | config
    where = folder / TOKENIZER
    if where.is_file():
        tokenizer = read_json(where)
        shutil.copyfile(where, out / TOKENIZER)
    else:
        converted = conversion.convert(folder)
        if converted is None:
            return None
        where, tokenizer = converted.source, json.loads(converted.content)
        (out / TOKENIZER).write_text(converted.content, "utf-8")
        special = {"bos_token": converted.bos_token, "eos_token": converted.eos_token} | special
    own = None if chosen == "published" else _template(folder, config)
    for token_id, kind in ((image_token_id, "images"), (video_token_id, "videos")):
        if token_id is not None and token_id >= 0 and _token(tokenizer, token_id) is None:
            raise CheckpointError(
                f"{where}: has no added token with the id {token_id} that config.json gives to {kind}; "
                "use the tokenizer that belongs to this checkpoint"
            )
    image_token = PLACEHOLDER if image_token_id < 0 else str(_token(tokenizer, image_token_id))
    template = _chosen(own, published, image_token_id)
    if template is None:
        raise CheckpointError(f"{folder}: has no chat template; add the chat_template.json that belongs to it")
    lost = [token for token in BRACKETS if token in template and token not in _added(tokenizer)]
    if lost:
        raise CheckpointError(
            f"{where}: has no added token {lost[0]!r}, but config.json's mm_use_im_start_end puts it "
            "around images; use the tokenizer that was saved with this checkpoint"
        )
    (out / TEMPLATE).write_text(template, "utf-8")
    text = TextConfig(
        tokenizer=TOKENIZER,
        chat_template=TEMPLATE,
        image_token=image_token,
        image_token_id=image_token_id,
        bos_token=_content(special.get("bos_token")),
        eos_token=_content(special.get("eos_token")),
        video_token_id=video_token_id,
    )
    _ask(folder, out, text, published if template != published else None)
    return text


def _ask(folder: Path, out: Path, config: TextConfig, published: str | None) -> None:
    """Render a question about one picture: what fails is found now, and not on the device.

    Args:
        published: another template that could be used; None where there is none.
    """
    try:
        Text.load(out, config).encode_chat(QUESTION)
    except BundleError as error:
        raise CheckpointError(f"{folder}: its tokenizer or chat template cannot be used ({error})") from error
    except InputError as error:
        reason = str(error).partition(",")[0]
        advice = "" if published is None else "export with --chat-template published, the format of its family, or "
        raise CheckpointError(
            f"{folder}: its chat template cannot ask about a picture, as a language model's own cannot ({reason}); "
            f"{advice}put the template that belongs to this model into {TEMPLATE} beside its config.json"
        ) from error


def encoded(folder: Path, text: str) -> tuple[int, ...] | None:
    """Token ids of a text that holds special tokens, nothing added; None for a checkpoint without a tokenizer.

    Raises:
        CheckpointError: its tokenizer is damaged.
        UnsupportedError: a package is missing that converting the tokenizer takes.
    """
    from tokenizers import Tokenizer

    where = folder / TOKENIZER
    converted = None if where.is_file() else conversion.convert(folder)
    if converted is None and not where.is_file():
        return None
    content = where.read_text("utf-8") if converted is None else converted.content
    try:
        return tuple(Tokenizer.from_str(content).encode(text, add_special_tokens=False).ids)
    except Exception as error:  # the library raises plain Exceptions
        raise CheckpointError(f"{where}: is no tokenizer ({one_line(error)}); restore the file") from error


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """End-of-sequence ids from generation_config.json, else from config.json.

    Raises:
        CheckpointError: they are no numbers.
    """
    config = _optional(folder / "config.json")
    for source in (_optional(folder / "generation_config.json"), config, config.get("text_config") or {}):
        ids = source.get("eos_token_id")
        if ids is not None:
            found = tuple(ids) if isinstance(ids, list) else (ids,)
            if any(type(i) is not int for i in found):
                raise CheckpointError(
                    f"{folder}: eos_token_id is {ids!r}, expected token ids; correct its config files"
                )
            return found
    return ()


def turn_end(out: Path, published: str | None = None) -> tuple[int, ...]:
    """The id of what closes an answer in a bundle's published conversation format; none for another template.

    A language model's own end-of-sequence is not always it: Phi-3's answers end with `<|end|>`.

    Args:
        published: the family's template.
    """
    template = (out / TEMPLATE).read_text("utf-8")
    if template not in PUBLISHED and template != published:
        return ()
    known = _added(read_json(out / TOKENIZER))
    return tuple(known[end] for end in ENDS if end in template and type(known.get(end)) is int)


def _chosen(own: str | None, published: str | None, image_token_id: int) -> str | None:
    """The checkpoint's own template, unless it is its language model's and knows no images as the model does."""
    if own is None or image_token_id >= 0 or published is None:
        return own or published
    marks = (PLACEHOLDER, *(token for token in BRACKETS if token in published))
    return own if all(mark in own for mark in marks) else published


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template, from wherever its vintage of transformers put it."""
    if (folder / TEMPLATE).is_file():
        try:
            return (folder / TEMPLATE).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / TEMPLATE}: cannot be read ({error}); restore the file") from error
    for name in ("chat_template.json", "processor_config.json"):
        found = _optional(folder / name).get("chat_template")
        if isinstance(found, str):
            return found
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _token(tokenizer: dict[str, Any], token_id: int) -> str | None:
    return next((content for content, known in _added(tokenizer).items() if known == token_id), None)


def _added(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Ids of added tokens by what they are written as."""
    added = tokenizer.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return {str(token.get("content")): token.get("id") for token in tokens}


def _content(token: Any) -> str:
    """A special token's text: a string, or an object with `content`, or nothing."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
