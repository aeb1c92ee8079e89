"""Chat messages to token ids and token ids back to text.

Special tokens come from the chat template only. What a user types is text, even where it spells `<image>` or `</s>`:
see `Text.encode_chat`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_edge.runtime.errors import BundleError, InputError, LvlmEdgeError
from lvlm_edge.runtime.prompt.chat_template import compile_template, endless, one_line, render
from lvlm_edge.runtime.prompt.escaping import Escaping, map_texts
from lvlm_edge.runtime.prompt.streams import ByteStream, TextStream, TokenStream, is_byte_level
from lvlm_edge.runtime.prompt.time_limit import TimeLimitError

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import AddedToken, Tokenizer


_PROBE = "PROBE"  # stands for a system message
_log = logging.getLogger("lvlm_edge")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What the manifest says about text; files are names in the bundle's folder."""

    tokenizer: str  # tokenizer.json of the tokenizers library, all added tokens included
    chat_template: str  # a Jinja template
    image_token: str  # stands for all visual tokens of one picture
    image_token_id: int  # below 0: the tokenizer does not know the image token, the text is cut up where it stands
    bos_token: str  # "" if the model has none
    eos_token: str  # "" if the model has none
    video_token_id: int | None = None  # of an added token that stands for a video; None if the model sees none


class Text:
    """Chat template and tokenizer of a bundle."""

    def __init__(self, tokenizer: Tokenizer, template: Template, source: str, config: TextConfig) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._source = source
        self._config = config
        self._added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
        self._escaping = Escaping(tokenizer, self._reserved(), source)

    @classmethod
    def load(cls, folder: Path, config: TextConfig) -> Text:
        """Chat template and tokenizer, read from a bundle.

        Raises:
            BundleError: a file is missing or damaged, or the image token is not the one the manifest names.
        """
        tokenizer = _load_tokenizer(folder / config.tokenizer)
        source = _read(folder / config.chat_template)
        text = cls(tokenizer, compile_template(source, folder / config.chat_template), source, config)
        token = text._added.get(config.image_token_id)
        if config.image_token_id < 0:
            if not config.image_token:
                raise BundleError(f"{folder}: the manifest names no image token; export the bundle again")
        elif token is None or token.content != config.image_token:
            found = "no added token" if token is None else repr(token.content)
            raise BundleError(
                f"{folder / config.tokenizer}: token {config.image_token_id} is {found}, the manifest says "
                f"{config.image_token!r}; export the bundle again"
            )
        if config.video_token_id is not None and config.video_token_id not in text._added:
            raise BundleError(
                f"{folder / config.tokenizer}: has no added token {config.video_token_id}, which the manifest gives to "
                "videos; export the bundle again"
            )
        return text

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, as transformers' processors encode it.

        Special tokens are those the template writes. Where a user's text spells one, a character of it is replaced
        by a stand-in while the template is rendered and cut at its special tokens, and put back before the pieces
        between them are encoded. Everything else is left as it is, spaces above all, so that a template that trims
        or tests a text does the same as it would have. Texts that spell none take the direct way.

        Args:
            messages: `{"role": ..., "content": ...}`; the content is a string or a list of parts,
                `{"type": "text", "text": ...}`, `{"type": "image"}` or `{"type": "video"}`, as the template expects it.
            add_generation_prompt: whether to end with what comes before an answer.

        Returns:
            Token ids; the image token appears once for each part of type image, the video token of type video.

        Raises:
            InputError: a text is not Unicode, the template refuses the messages, or it writes another number of image
                or video tokens.
            BundleError: the template does not end, or the tokenizer lacks what it needs.
        """
        plain = [plain_value(message) for message in messages]
        map_texts(plain, _check_text)
        try:
            return self._ids(plain, add_generation_prompt)
        except LvlmEdgeError:
            raise
        except BaseException as error:  # a panic of the tokenizer's Rust code is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise BundleError(
                f"{self._config.tokenizer}: cannot encode this prompt ({one_line(error)}); export the bundle again"
            ) from error

    def system_message(self, system: str) -> dict[str, Any]:
        """A system message in the form that the template reads: text, or a list with a part of type text.

        Templates that take every content as a list leave out one that is text, or refuse it. A template without a place
        for system messages leaves out both, which is logged as a warning.
        """
        forms: tuple[Any, ...] = (system, [{"type": "text", "text": system}])
        messages = [{"role": "system", "content": form} for form in forms]
        for message, form in zip(messages, (_PROBE, [{"type": "text", "text": _PROBE}]), strict=True):
            asked = [{"role": "system", "content": form}, {"role": "user", "content": [{"type": "text", "text": "?"}]}]
            with suppress(InputError):
                if _PROBE in self._render(asked, True):
                    return message
        _log.warning(
            "system message: the chat template has no place for one, so it is left out; put it into the prompt"
        )
        return messages[0]

    def _ids(self, plain: list[Any], add_generation_prompt: bool) -> list[int]:
        """Token ids of messages of plain values."""
        stand_ins = self._escaping.stand_ins(plain)
        rendered = self._render(
            map_texts(plain, lambda text: self._escaping.disguise(text, stand_ins)), add_generation_prompt
        )
        # A template that writes the first token itself gets no second one, as in transformers' processors.
        bos = self._config.bos_token
        bare = bool(bos) and rendered.startswith(bos)
        ids = self._encode(rendered, stand_ins, bare)
        self._check_media(ids, plain)
        return ids

    def _encode(self, rendered: str, stand_ins: Mapping[str, str], bare: bool) -> list[int]:
        """Token ids of a rendered prompt; `bare`: without what is added before and after every sequence."""
        if self._config.image_token_id < 0:
            return self._encode_around(rendered, stand_ins, bare)
        if stand_ins:
            before, after = ((), ()) if bare else self._frame
            return [*before, *self._escaping.encode(rendered, stand_ins), *after]
        ids: list[int] = self._tokenizer.encode(rendered, add_special_tokens=not bare).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> TextStream:
        """A new stream of decoded text."""
        if is_byte_level(self._tokenizer):
            return ByteStream(self._visible_token)
        return TokenStream(self._visible_token, self.decode)

    def _visible_token(self, token_id: int) -> str | None:
        """The token as the decoder sees it; None if it is special or unknown."""
        added = self._added.get(token_id)
        if added is not None:
            return None if added.special else added.content
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def _reserved(self) -> frozenset[str]:
        """What a user cannot write: special tokens, and other added tokens that the template uses."""
        named = {self._config.image_token, self._config.bos_token, self._config.eos_token}
        named |= {token.content for token_id, token in self._added.items() if token_id == self._config.video_token_id}
        return frozenset({self._config.image_token}) | frozenset(
            token.content
            for token in self._added.values()
            if not token.content.isspace()
            and (token.special or token.content in named or token.content in self._source)
        )

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """Token ids that are added before and after every sequence."""
        sample = self._tokenizer.encode("a", add_special_tokens=True)
        added = [mask == 1 for mask in sample.special_tokens_mask]
        first = added.index(False) if False in added else len(added)
        last = len(added) - added[::-1].index(False) if False in added else len(added)
        return sample.ids[:first], sample.ids[last:]

    def _render(self, messages: list[Any], add_generation_prompt: bool) -> str:
        tokens = {"bos_token": self._config.bos_token, "eos_token": self._config.eos_token}
        variables = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return render(self._template, variables | {name: token for name, token in tokens.items() if token})
        except TimeLimitError as error:
            raise endless("chat template") from error
        except Exception as error:
            raise InputError(
                f"chat template: it refuses these messages ({one_line(error)}), expected a conversation in the "
                f"template's form; check the roles and parts of the messages"
            ) from error

    def _encode_around(self, rendered: str, stand_ins: Mapping[str, str], bare: bool) -> list[int]:
        """Token ids of the pieces around the image tokens, each encoded by itself, and the image token's id between.

        Source: `tokenizer_image_token` of LLaVA.
        """
        before, after = ((), ()) if bare else self._frame
        ids = [*before]
        for i, piece in enumerate(rendered.split(self._config.image_token)):
            if i:
                ids.append(self._config.image_token_id)
            if stand_ins:
                ids.extend(self._escaping.encode(piece, stand_ins))
            else:
                ids.extend(self._tokenizer.encode(piece, add_special_tokens=False).ids)
        return [*ids, *after]

    def _check_media(self, ids: Sequence[int], messages: list[Any]) -> None:
        """Raise InputError unless the image and video tokens are as many as the parts that they stand for."""
        for kind, token, noun in (
            ("image", self._config.image_token_id, "pictures"),
            ("video", self._config.video_token_id, "videos"),
        ):
            found, expected = sum(token_id == token for token_id in ids), count_parts(messages, kind)
            if found != expected and token is not None:
                raise InputError(
                    f"chat template: it wrote {found} {kind} tokens for {expected} {noun}, expected one for each; "
                    f"put {noun} where the template reads them"
                )


def count_parts(messages: Sequence[Any], kind: str) -> int:
    """Parts of a type in a conversation: `image` or `video`."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    return sum(isinstance(part, Mapping) and part.get("type") == kind for part in parts)


def _load_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    content = _read(path)
    try:
        tokenizer = Tokenizer.from_str(content)
    except BaseException as error:  # a panic of its Rust code is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(
            f"{path}: not a tokenizer this version reads ({one_line(error)}), expected the tokenizers format; "
            f"export the bundle again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BundleError(f"{path}: no such file, the manifest names it; export or copy the bundle again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{path}: cannot be read ({one_line(error)}), expected text in UTF-8; export or copy the bundle again"
        ) from error


def _check_text(text: str) -> str:
    """The text, if it can be written as UTF-8; bytes that are not UTF-8 reach a program as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"prompt: character {error.start} is not Unicode text ({text[error.start : error.end]!a}), expected UTF-8; "
            "save or type it in UTF-8"
        ) from error
    return text


def plain_value(value: Any) -> Any:
    """The value out of plain types; other objects, such as pictures, become their type's name.

    A template comes with the bundle, and objects have methods it should not reach.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    return f"<{type(value).__name__}>"
