"""`check` judges what the host does around the graphs; tampered with behind right hashes, it fails and says where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvlm_edge.exporter.proof import parity
from lvlm_edge.runtime.bundle import open_bundle
from tests import eager, tiny
from tests.tiny import read_json, sign, write_json

FASTV = {"method": "fastv", "prune_layer": 1, "max_text_tokens": 24, "max_new_tokens": 8}
Change = Callable[[Path, dict[str, Any]], None]
PREPROCESSING = ("pictures", 0, "views", "how")


def field(*path: Any, value: Any) -> Change:
    """A field of the manifest, by the names and places on the way to it, set to a value or changed by a function."""

    def change(_: Path, manifest: dict[str, Any]) -> None:
        inside: Any = manifest
        for name in path[:-1]:
            inside = inside[name]
        inside[path[-1]] = value(inside[path[-1]]) if callable(value) else value

    return change


def file(name: str, change: Callable[[str], str]) -> Change:
    def rewrite(bundle: Path, _: dict[str, Any]) -> None:
        text = (bundle / name).read_text("utf-8")
        assert change(text) != text
        (bundle / name).write_text(change(text), "utf-8")

    return rewrite


def exchanged(text: str, one: str, other: str) -> str:
    return text.replace(f'"{one}"', "@").replace(f'"{other}"', f'"{one}"').replace("@", f'"{other}"')


def rows_exchanged(bundle: Path, manifest: dict[str, Any]) -> None:
    table = manifest["embedding"]
    width = {"float32": np.float32, "float16": np.float16}[table["dtype"]]
    shape = (table["hidden"], table["vocab"]) if table["columns"] else (table["vocab"], table["hidden"])
    stored = np.memmap(bundle / table["file"], width, "r+", table["offset"], shape)
    rows = stored.T if table["columns"] else stored
    rows[[100, 101]] = rows[[101, 100]]
    stored.flush()


TAMPERED: dict[str, tuple[str, Change]] = {
    "another mean": ("preprocessing", field(*PREPROCESSING, "mean", value=[0.5, 0.5, 0.5])),
    "another deviation": ("preprocessing", field(*PREPROCESSING, "std", value=[1.0, 1.0, 1.0])),
    "half the scale": ("preprocessing", field(*PREPROCESSING, "rescale", value=lambda scale: scale / 2)),
    "nearest pixels": ("preprocessing", field(*PREPROCESSING, "resample", value=0)),
    "another edge": ("preprocessing", field(*PREPROCESSING, "shortest_edge", value=29)),
    "no end of sequence": ("end of sequence", field("eos_token_ids", value=[])),
    "another end of sequence": ("end of sequence", field("eos_token_ids", value=[9])),
    "another first token": ("special tokens", field("text", "bos_token", value="w9")),
    "an answer in the template": ("chat template", file("chat_template.jinja", lambda text: "Answer no. " + text)),
    "two words exchanged": ("tokenizer", file("tokenizer.json", lambda text: exchanged(text, "w10", "w11"))),
    "two rows exchanged": ("embedding", rows_exchanged),
    "another checkpoint's config": ("config", field("provenance", "config_sha256", value="0" * 64)),
    "another keep ratio": ("counts", field("method_config", "keep_ratio", value=lambda ratio: ratio / 2)),
    "fewer kept tokens": ("counts", field("counts", "kept_tokens", value=lambda kept: kept - 1)),
}


@pytest.fixture(scope="module")
def checkpoint(checkpoint_once) -> Path:
    return tiny.checkpoint(checkpoint_once)


@pytest.mark.parametrize("what", TAMPERED)
def test_check_finds(what, checkpoint, eager_once, tmp_path):
    stage, change = TAMPERED[what]
    bundle = eager.export(checkpoint, tmp_path / "bundle", **FASTV)
    assert "special tokens" in {row.stage for row in parity.check(bundle, checkpoint, steps=1, store=False).rows}
    manifest = read_json(bundle / "manifest.json")
    change(bundle, manifest)
    write_json(bundle / "manifest.json", manifest)
    sign(bundle)
    open_bundle(bundle)

    verdict = parity.check(bundle, checkpoint, steps=1, store=False)

    assert stage in {row.stage for row in verdict.rows if not row.passed}


def test_what_was_judged_and_what_was_not(checkpoint, checkpoint_once, gqa, eager_once):
    bundle = tiny.bundle(checkpoint_once, eager_once, "fastv")
    verdict = parity.check(bundle, checkpoint, steps=2, store=False)

    assert verdict.passed, verdict.first_failure
    assert verdict.not_judged == ()
    assert {"preprocessing", "pixels", "tokenizer", "chat template", "prompt ids", "end of sequence", "embedding"} <= {
        row.stage for row in verdict.rows if row.case == "checkpoint"
    }

    silent = parity.check(eager_once(gqa), gqa, steps=2, store=False)
    assert [what.partition(":")[0] for what in silent.not_judged] == ["prompt", "pixels"]
