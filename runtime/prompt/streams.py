"""Token ids to text, one by one."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextStream(Protocol):
    """Turns token ids into text one by one; all pieces together are `Text.decode` of all ids."""

    def push(self, token_id: int) -> str:
        """The text that is certain after this token, never a part of a character."""

    def flush(self) -> str:
        """The rest, at the end; an incomplete character becomes U+FFFD."""


class ByteStream:
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


class TokenStream:
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


def is_byte_level(tokenizer: Tokenizer) -> bool:
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
