"""A checkpoint that talks, as small as one can be: 2 layers, 4 visual tokens, a tokenizer of words `w3`..`w158`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_edge.runtime.bundle import digest, sha256
from tests import checkpoints
from tests.checkpoints import IMAGE

SIZES: dict[str, Any] = {
    "seed": 7,
    "text": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    | {"num_key_value_heads": 2},
    "vision": {"image_size": 28, "num_hidden_layers": 2},
}
PROMPT = [5, IMAGE, 6, 7]
CAPACITY = ["--max-text-tokens", "24", "--max-new-tokens", "8"]


def checkpoint(checkpoint_once: Callable[..., Path]) -> Path:
    """The checkpoint, made once, with tokenizer and picture settings."""
    folder = checkpoint_once(**SIZES)
    if not (folder / "preprocessor_config.json").is_file():
        tokenizer().save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
        write_json(
            folder / "preprocessor_config.json",
            {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "crop_size": 28},
        )
    return folder


def bundle(checkpoint_once: Callable[..., Path], export_once: Callable[..., Path], method: str, **options: Any) -> Path:
    """One of its bundles, made once and not to be changed: room for 24 text tokens and 8 new ones."""
    settings = {"none": {}, "fastv": {"prune_layer": 1}}[method] | options
    return export_once(
        checkpoint(checkpoint_once), method=method, **{"max_text_tokens": 24, "max_new_tokens": 8} | settings
    )


def pixels() -> Any:
    """A preprocessed noise picture, [1, 3, 28, 28]."""
    return checkpoints.pixels(28)


def tokenizer() -> Any:
    """One token per word; every other word is `<unk>`."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, IMAGE))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<image>")])
    return made


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    """A noise picture; the suffix chooses its format."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def dumps(content: Any) -> str:
    return json.dumps(content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON; a bundle's manifest with the right digest."""
    if isinstance(content, dict) and "digest" in content:
        content = content | {"digest": digest(content)}
    path.write_text(json.dumps(content), "utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def change_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON object; None removes one."""
    content = read_json(path) | fields
    write_json(path, {key: value for key, value in content.items() if value is not None})


def cli(*arguments: Any) -> Any:
    """The command line, in this process."""
    from click.testing import CliRunner

    from lvlm_edge.exporter.commands.main import main

    return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="lvlm-edge")


def refused(code: int, *arguments: Any) -> str:
    """What the command line says, on one line, when it ends with this code; nothing else may be printed."""
    done = cli(*arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("lvlm-edge: ")
    assert done.stdout == ""
    return str(lines[0])


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content, and every folder."""
    found = sorted(path for path in folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}


def sign(bundle: Path) -> None:
    """Make a manifest's hashes those of a bundle's altered files, so that its integrity holds."""
    manifest = read_json(bundle / "manifest.json")
    for name, info in manifest["files"].items():
        info |= {"size": (bundle / name).stat().st_size, "sha256": sha256(bundle / name)}
    write_json(bundle / "manifest.json", manifest)
