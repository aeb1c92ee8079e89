"""A tokenizer in older files, converted to tokenizer.json by transformers' own converters."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, read_json
from lvlm_edge.runtime.errors import UnsupportedError

# The files that hold a vocabulary, and the class that reads them where tokenizer_config.json names none.
KINDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("tokenizer.model",), "LlamaTokenizer"),
    (("vocab.json", "merges.txt"), "Qwen2Tokenizer"),
)
BESIDE = ("special_tokens_map.json", "added_tokens.json")
CONFIG = "tokenizer_config.json"
# Texts that a converted tokenizer has to cut up as the model file does. None begins with a space: there transformers
# has one less.
PROBES = ("a", "What is in it? 12, <b>3.5%</b>", "déjà vu ﬁne½", "这张图片里有什么？", "tabs\tand\nlines  end ", "😀🇨🇭")  # noqa: RUF001
PACKAGES = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}  # that reading tokenizer.model takes


@dataclass(frozen=True)
class Converted:
    """A converted tokenizer: the file it is from, content of tokenizer.json, first and last tokens ("" for none)."""

    source: Path
    content: str
    bos_token: str
    eos_token: str


# Qwen's ranks file: special tokens follow the ranks in this order. Those of `SHOWN` mark places in answers.
RANKS = "qwen.tiktoken"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
SHOWN = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
PICTURES = ("<img>", "</img>", "<imgpad>")


def _ranks(file: Path) -> Converted:
    """A tokenizer from base64 pieces of bytes and their ranks, the order in which they are merged.

    Raises:
        CheckpointError: the file holds something else.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in lines}
        if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([i]) not in ranks for i in range(256)):
            raise ValueError("its ranks are not 0, 1, 2, ... of every byte and more")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: is no ranks file ({error}); restore the file") from error
    byte_level = _byte_level()
    written = {piece: "".join(byte_level[byte] for byte in piece) for piece in ranks}
    merges = [
        (written[piece[:i]], written[piece[i:]])
        for piece in sorted(ranks, key=lambda piece: ranks[piece])
        for i in sorted(range(1, len(piece)), key=lambda i: (ranks.get(piece[:i], -1), ranks.get(piece[i:], -1)))
        if piece[:i] in ranks and piece[i:] in ranks
    ]
    model = models.BPE({written[piece]: rank for piece, rank in ranks.items()}, merges, ignore_merges=True)
    made = Tokenizer(model)
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    for tokens, special in ((SPECIAL, True), (SHOWN, False), (PICTURES, True)):
        made.add_tokens([AddedToken(token, normalized=False, special=special) for token in tokens])
    return Converted(source=file, content=made.to_str(), bos_token="", eos_token=SPECIAL[0])


def _byte_level() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def convert(folder: Path) -> Converted | None:
    """The tokenizer of a folder without tokenizer.json; None where it has none in any form.

    Raises:
        UnsupportedError: a package is missing that the conversion takes.
        CheckpointError: transformers cannot read the tokenizer.
    """
    if (folder / RANKS).is_file():
        return _ranks(folder / RANKS)
    kind = next((kind for kind in KINDS if all((folder / name).is_file() for name in kind[0])), None)
    if kind is None:
        return None
    files, name = kind
    if "tokenizer.model" in files:
        _require_packages(folder / "tokenizer.model")
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    config = {"tokenizer_class": name} | {key: value for key, value in config.items() if key != "auto_map"}
    # A folder of its own: the model's config.json would choose another class, or none.
    with tempfile.TemporaryDirectory() as place:
        for file in (*files, *BESIDE):
            if (folder / file).is_file():
                shutil.copyfile(folder / file, Path(place) / file)
        try:
            if "tokenizer.model" in files:
                config = _spaces(folder / "tokenizer.model") | config
            (Path(place) / CONFIG).write_text(json.dumps(config), "utf-8")
            with _quiet():
                tokenizer = _read(Path(place))
        except Exception as error:  # transformers raises many types; the first line says what is wrong
            reason = " ".join((str(error) or type(error).__name__).splitlines()[0].split())
            raise CheckpointError(
                f"{folder / files[0]}: transformers cannot read this tokenizer ({reason}); save it as tokenizer.json"
            ) from error
    if "tokenizer.model" in files:
        _check_ids(folder / "tokenizer.model", tokenizer)
    return Converted(
        source=folder / files[0],
        content=str(tokenizer.backend_tokenizer.to_str()),
        bos_token=str(tokenizer.bos_token or ""),
        eos_token=str(tokenizer.eos_token or ""),
    )


def _read(folder: Path) -> Any:
    """Transformers' tokenizer of a folder, which has a `backend_tokenizer` of the tokenizers library."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise TypeError(f"{type(tokenizer).__name__} is written in Python alone")
    return tokenizer


def _spaces(file: Path) -> dict[str, Any]:
    """What tokenizer_config.json would say of a model file that puts no space before a text, as Yi's.

    Transformers' LlamaTokenizer does not ask the file.
    """
    import sentencepiece

    begins = "".join(sentencepiece.SentencePieceProcessor(str(file)).encode("a", out_type=str))
    return {} if begins.startswith("▁") else {"add_prefix_space": False}


def _check_ids(file: Path, tokenizer: Any) -> None:
    """Raise CheckpointError unless a converted tokenizer gives the ids of the model file.

    Pieces that it merges in another order, or a text that it does not normalise, would go unseen.
    """
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(str(file))
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    for text in PROBES:
        if any(token in text for token in added):
            continue
        found, wanted = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, pieces.encode(text)
        if found != wanted:
            raise CheckpointError(
                f"{file}: transformers' tokenizer cuts {text!r} up into {found}, this file into {wanted}; save the "
                "tokenizer as tokenizer.json with the code that it belongs to"
            )


def _require_packages(file: Path) -> None:
    missing = [name for module, name in PACKAGES.items() if not _is_there(module)]
    if missing:
        raise UnsupportedError(
            f"{file}: reading it takes {' and '.join(missing)}, not installed here; pip install {' '.join(missing)}"
        )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings, which are about files that are not in the folder."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
