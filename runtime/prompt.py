"""Chat messages to token ids and token ids back to text.

Special tokens come from the chat template only. What a user types is text, even where it spells `<image>` or `</s>`:
see `Text.encode_chat`.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lvlm_edge.runtime.errors import BundleError, InputError

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import AddedToken, Tokenizer


_NOT_TEXT = frozenset({"role", "type"})  # keys of a message whose values a program sets, not a user


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What the manifest says about text; files are names in the bundle's folder."""

    tokenizer: str  # tokenizer.json of the tokenizers library, all added tokens included
    chat_template: str  # a Jinja template
    image_token: str  # stands for all visual tokens of one picture
    image_token_id: int  # below 0: the tokenizer does not know the image token, the text is cut up where it stands
    bos_token: str  # "" if the model has none
    eos_token: str  # "" if the model has none


class TextStream(Protocol):
    """Turns token ids into text one by one; all pieces together are `Text.decode` of all ids."""

    def push(self, token_id: int) -> str:
        """The text that is certain after this token, never a part of a character."""

    def flush(self) -> str:
        """The rest, at the end; an incomplete character becomes U+FFFD."""


class Text:
    """Chat template and tokenizer of a bundle."""

    def __init__(self, tokenizer: Tokenizer, template: Template, source: str, config: TextConfig) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._source = source
        self._config = config
        self._added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()

    @classmethod
    def load(cls, folder: Path, config: TextConfig) -> Text:
        """Chat template and tokenizer, read from a bundle.

        Raises:
            BundleError: a file is missing or damaged, or the image token is not the one the manifest names.
        """
        tokenizer = _load_tokenizer(folder / config.tokenizer)
        source = _read(folder / config.chat_template)
        text = cls(tokenizer, _compile(source, folder / config.chat_template), source, config)
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
        return text

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, as transformers' processors encode it.

        Special tokens are those the template writes. Where a user's text spells one, a character of it is replaced
        by a stand-in while the template is rendered and cut at its special tokens, and put back before the pieces
        between them are encoded. Everything else is left as it is, spaces above all, so that a template that trims
        or tests a text does the same as it would have. Texts that spell none take the direct way.

        Args:
            messages: `{"role": ..., "content": ...}`; the content is a string or a list of parts,
                `{"type": "text", "text": ...}` or `{"type": "image"}`, as the template expects it.
            add_generation_prompt: whether to end with what comes before an answer.

        Returns:
            Token ids; the image token appears once for each part of type image.

        Raises:
            InputError: the template refuses the messages, or writes another number of image tokens.
        """
        plain = [_plain(message) for message in messages]
        stand_ins = self._stand_ins(plain)
        rendered = self._render(_map_texts(plain, lambda text: self._disguise(text, stand_ins)), add_generation_prompt)
        # A template that writes the first token itself gets no second one, as in transformers' processors.
        bos = self._config.bos_token
        bare = bool(bos) and rendered.startswith(bos)
        if self._config.image_token_id < 0:
            ids = self._encode_around(rendered, stand_ins, bare)
        elif stand_ins:
            before, after = ((), ()) if bare else self._frame
            ids = [*before, *self._encode_disguised(rendered, stand_ins), *after]
        else:
            ids = self._tokenizer.encode(rendered, add_special_tokens=not bare).ids
        self._check_images(ids, plain)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> TextStream:
        """A new stream of decoded text."""
        if _is_byte_level(self._tokenizer):
            return _ByteStream(self._visible_token)
        return _TokenStream(self._visible_token, self.decode)

    def _visible_token(self, token_id: int) -> str | None:
        """The token as the decoder sees it; None if it is special or unknown."""
        added = self._added.get(token_id)
        if added is not None:
            return None if added.special else added.content
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    @cached_property
    def _reserved(self) -> frozenset[str]:
        """What a user cannot write: special tokens, and other added tokens that the template uses."""
        named = {self._config.image_token, self._config.bos_token, self._config.eos_token}
        unknown = {self._config.image_token} if self._config.image_token_id < 0 else set()
        return frozenset(unknown) | frozenset(
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

    @cached_property
    def _plain_tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """Copies that take reserved tokens for text: for the start of a sequence, and for anywhere else."""
        at_start, elsewhere = (
            _plain_tokenizer(self._tokenizer, self._reserved, first=first) for first in (True, False)
        )
        return at_start, elsewhere

    def _render(self, messages: list[Any], add_generation_prompt: bool) -> str:
        variables = {"bos_token": self._config.bos_token, "eos_token": self._config.eos_token}
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{name: token for name, token in variables.items() if token},
            )
        except Exception as error:
            raise InputError(
                f"chat template: it refuses these messages ({_one_line(error)}), expected a conversation in the "
                f"template's form; check the roles and parts of the messages"
            ) from error

    def _stand_ins(self, messages: list[Any]) -> dict[str, str]:
        """A private character for every one that must not be seen; there are none for an ordinary prompt."""
        texts = list(_texts(messages))
        risky = {text[index] for text in texts for index in self._risky(text)}
        if not risky:
            return {}
        used = set(self._source).union(*texts)
        private = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
        return dict(zip(sorted(risky), private, strict=False))

    def _disguise(self, text: str, stand_ins: Mapping[str, str]) -> str:
        if not stand_ins:
            return text
        risky = self._risky(text)
        return "".join(stand_ins[char] if index in risky else char for index, char in enumerate(text))

    def _risky(self, text: str) -> set[int]:
        """Indices of characters without which the text, or the text and what is around it, spells no reserved token.

        They are never spaces.
        """
        spans = list(self._spelled(text))
        start, stop = len(text) - len(text.lstrip()), len(text.rstrip())  # a template may trim
        for token in self._reserved:
            for length in range(1, len(token)):
                if text.endswith(token[:length], start, stop):
                    spans.append((stop - length, stop))
                if text.startswith(token[-length:], start, stop):
                    spans.append((start, start + length))
        visible = ((index for index in range(*span) if not text[index].isspace()) for span in spans)
        return {index for first in visible for index in itertools.islice(first, 1)}

    def _spelled(self, text: str) -> Iterator[tuple[int, int]]:
        """Where the text spells a reserved token, literally or after the tokenizer's normalisation."""
        for token in self._reserved:
            at = text.find(token)
            while at >= 0:
                yield at, at + len(token)
                at = text.find(token, at + 1)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        for token_id, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            content = self._added[token_id].content if token_id in self._added else None
            if content in self._reserved and content not in text[first:last]:
                # Every character, since other reserved tokens may begin inside.
                yield from ((index, index + 1) for index in range(first, last))

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
                ids.extend(self._encode_disguised(piece, stand_ins))
            else:
                ids.extend(self._tokenizer.encode(piece, add_special_tokens=False).ids)
        return [*ids, *after]

    def _encode_disguised(self, rendered: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Token ids of rendered text: reserved tokens where it spells them, disguised text in between."""
        real = str.maketrans({private: char for char, private in stand_ins.items()})
        at_start, elsewhere = self._plain_tokenizers
        encoding = self._tokenizer.encode(rendered, add_special_tokens=False)
        ids: list[int] = []
        done = 0

        def encode_up_to(stop: int) -> None:
            tokenizer = elsewhere if done else at_start
            ids.extend(tokenizer.encode(rendered[done:stop].translate(real), add_special_tokens=False).ids)

        for token_id, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            added = self._added.get(token_id)
            # The tokenizer also returns a special token for an unknown character, such as a stand-in.
            if added is None or added.content not in self._reserved or added.content not in rendered[first:last]:
                continue
            encode_up_to(first)
            ids.append(token_id)
            done = last
        encode_up_to(len(rendered))
        return ids

    def _check_images(self, ids: Sequence[int], messages: list[Any]) -> None:
        found = sum(token_id == self._config.image_token_id for token_id in ids)
        expected = sum(
            isinstance(part, dict) and part.get("type") == "image"
            for message in messages
            if isinstance(message.get("content"), list)
            for part in message["content"]
        )
        if found != expected:
            raise InputError(
                f"chat template: it wrote {found} image tokens for {expected} pictures, expected one for each; "
                f"put pictures where the template reads them"
            )


class _ByteStream:
    """Stream for byte-level tokenizers: tokens are bytes, and bytes become characters when complete."""

    def __init__(self, token: Callable[[int], str | None]) -> None:
        self._token = token
        self._bytes = _byte_alphabet()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        token = self._token(token_id) or ""
        known = [self._bytes.get(char) for char in token]
        # Added tokens are written as they are, so a character may be outside the alphabet of bytes.
        raw = token.encode() if None in known else bytes(byte for byte in known if byte is not None)
        return self._decoder.decode(raw)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _TokenStream:
    """Stream for other tokenizers: decodes each new token after the one before it, since spaces depend on that.

    Tokens of single bytes (`<0xE4>`) are held back until another token comes: the decoder turns all bytes of such a
    run into U+FFFD when one of them is wrong.
    """

    def __init__(self, token: Callable[[int], str | None], decode: Callable[[list[int]], str]) -> None:
        self._token = token
        self._decode = decode
        self._before: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        token = self._token(token_id)
        if token is None:
            return ""
        self._held.append(token_id)
        return "" if _is_byte(token) else self.flush()

    def flush(self) -> str:
        if not self._held:
            return ""
        shown = len(self._decode(self._before))
        text = self._decode(self._before + self._held)
        self._before, self._held = self._held, []
        return text[shown:]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's decoder reads every token as bytes and does nothing else."""
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {}
    steps = decoder.get("decoders", [decoder])
    return steps[0].get("type") == "ByteLevel" and all(step.get("type") in ("ByteLevel", "Fuse") for step in steps)


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level tokenizers. Source: GPT-2, `bytes_to_unicode`."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in shown}
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def _plain_tokenizer(tokenizer: Tokenizer, reserved: frozenset[str], *, first: bool) -> Tokenizer:
    """A copy that takes reserved tokens for text.

    Args:
        tokenizer: the original.
        reserved: contents of the added tokens.
        first: whether it encodes the start of a sequence, where some tokenizers put a space.
    """
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in reserved
    if not first:
        _never_prepend(content["pre_tokenizer"])
    copy = Tokenizer.from_str(json.dumps(content))
    copy.encode_special_tokens = True
    return copy


def _never_prepend(pre_tokenizer: dict[str, Any] | None) -> None:
    """Changes, in place, a space at the start of a sequence to none."""
    if pre_tokenizer is None:
        return
    if pre_tokenizer.get("prepend_scheme") == "first":
        pre_tokenizer["prepend_scheme"] = "never"
    for step in pre_tokenizer.get("pretokenizers", ()):
        _never_prepend(step)


def _load_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    content = _read(path)
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:
        raise BundleError(
            f"{path}: not a tokenizer this version reads ({_one_line(error)}), expected the tokenizers format; "
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
            f"{path}: cannot be read ({_one_line(error)}), expected text in UTF-8; export or copy the bundle again"
        ) from error


def _compile(source: str, path: Path) -> Template:
    """The chat template, in the environment transformers renders it in.

    Raises:
        BundleError: the template has a syntax error.

    Source: `utils/chat_template_utils.py` of transformers 5.23.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks answers for training and means nothing here."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 wants it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise BundleError(
            f"{path}: not a chat template ({_one_line(error)}), expected a Jinja template; export the bundle again"
        ) from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; the filter of the same name in Jinja escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _plain(value: Any) -> Any:
    """The value out of plain types; other objects, such as pictures, become their type's name.

    A template comes with the bundle, and objects have methods it should not reach.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _texts(value: Any) -> Iterator[str]:
    """All strings that a user may have written: every one except roles and types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _NOT_TEXT:
                yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with all strings that a user may have written changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: item if key in _NOT_TEXT else _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return value


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
