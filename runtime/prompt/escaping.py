"""Text that a user typed stays text, even where it spells `<image>` or `</s>`: see `Escaping`.

A character of what spells a reserved token is replaced by a private stand-in while the template is rendered and cut at
its special tokens, and put back before the pieces between them are encoded.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_NOT_TEXT = frozenset({"role", "type"})  # keys of a message whose values a program sets, not a user


class Escaping:
    """Keeps what a user types from being read as a reserved token.

    Args:
        tokenizer: of the bundle.
        reserved: what a user cannot write: contents of added tokens, and an image token that the tokenizer does not
            know.
        source: the chat template, whose characters are no stand-ins.
    """

    def __init__(self, tokenizer: Tokenizer, reserved: frozenset[str], source: str) -> None:
        self._tokenizer, self._reserved, self._source = tokenizer, reserved, source
        self._added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()

    def stand_ins(self, messages: list[Any]) -> dict[str, str]:
        """A private character for every one that must not be seen; there are none for an ordinary prompt."""
        texts = list(texts_of(messages))
        risky = {text[index] for text in texts for index in self._risky(text)}
        if not risky:
            return {}
        used = set(self._source).union(*texts)
        private = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
        return dict(zip(sorted(risky), private, strict=False))

    def disguise(self, text: str, stand_ins: Mapping[str, str]) -> str:
        """The text with a stand-in for every character that must not be seen."""
        if not stand_ins:
            return text
        risky = self._risky(text)
        return "".join(stand_ins[char] if index in risky else char for index, char in enumerate(text))

    def encode(self, rendered: str, stand_ins: Mapping[str, str]) -> list[int]:
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

    @cached_property
    def _plain_tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """Copies that take reserved tokens for text: for the start of a sequence, and for anywhere else."""
        at_start, elsewhere = (plain_tokenizer(self._tokenizer, self._reserved, first=first) for first in (True, False))
        return at_start, elsewhere

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


def texts_of(value: Any) -> Iterator[str]:
    """All strings that a user may have written: every one except roles and types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _NOT_TEXT:
                yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with all strings that a user may have written changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: item if key in _NOT_TEXT else map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_texts(item, change) for item in value]
    return value


def plain_tokenizer(tokenizer: Tokenizer, reserved: frozenset[str], *, first: bool) -> Tokenizer:
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
