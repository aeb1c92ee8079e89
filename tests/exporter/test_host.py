"""`check` judges what the host does around the graphs; tampered with behind right hashes, it fails and says where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lvlm_edge.exporter.proof import host, parity
from lvlm_edge.runtime.bundle import Generation, open_bundle
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
    "a deviation that is 1 in 10^5 off": (
        "pixels",
        field(*PREPROCESSING, "std", value=lambda std: [each * 1.00001 for each in std]),
    ),
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


# What ends an answer and how it is drawn, by the files of a checkpoint.


def stages_of(folder: Path, ends: list[int], **drawn: float) -> tuple[Any, Any]:
    """Rows of a bundle without text that ends at these tokens and draws like that."""
    generation = Generation(**drawn)  # type: ignore[arg-type]
    manifest = SimpleNamespace(eos_token_ids=tuple(ends), text=None, generation=generation)
    pipe: Any = SimpleNamespace(manifest=manifest, bundle=SimpleNamespace(folder=folder))
    return host._ends(pipe, folder, None), host._generation(pipe, folder)


ENDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, list[int]]] = {  # config.json, generation_config.json
    "of the generation": ({"eos_token_id": 3}, {"eos_token_id": 5}, [5]),
    "several": ({"eos_token_id": 3}, {"eos_token_id": [7, 5, 7]}, [5, 7]),
    "of the config": ({"eos_token_id": [3]}, None, [3]),
    "of the config, where the generation has none": ({"eos_token_id": 3}, {"eos_token_id": None}, [3]),
    "the first token": ({"eos_token_id": 3}, {"eos_token_id": 0}, [0]),
    "of the text": ({"eos_token_id": None, "text_config": {"eos_token_id": 4}}, {}, [4]),
    "none": ({"text_config": None}, None, []),
}


@pytest.mark.parametrize("name", ENDS)
def test_answers_end_where_the_checkpoint_says_first(name, tmp_path):
    config, generation, ends = ENDS[name]
    write_json(tmp_path / "config.json", config)
    if generation is not None:
        write_json(tmp_path / "generation_config.json", generation)

    row, _ = stages_of(tmp_path, ends[::-1])
    assert (row.case, row.stage, row.figure, row.bound, row.passed) == ("checkpoint", "end of sequence", 0, 0, True)
    assert row.note == ""
    for wrong in ([*ends, 9], ends[1:] or [8]):
        other, _ = stages_of(tmp_path, wrong)
        assert (other.figure, other.passed) == (1, False)
        assert other.note == f"{sorted(wrong)}, the checkpoint has {ends}"


Drawn = tuple[float, int, float, float]  # temperature, top k, top p, penalty
DRAWN: dict[str, tuple[dict[str, Any] | None, Drawn]] = {
    "nothing said": (None, (0, 0, 1, 1)),
    "not sampled": ({"do_sample": False, "temperature": 0.2, "top_k": 3, "top_p": 0.4}, (0, 0, 1, 1)),
    "a penalty all the same": ({"repetition_penalty": 1.3}, (0, 0, 1, 1.3)),
    "sampled": ({"do_sample": True}, (1, 50, 1, 1)),
    "as said": (
        {"do_sample": True, "temperature": 0.2, "top_k": 3, "top_p": 0.4, "repetition_penalty": 2},
        (0.2, 3, 0.4, 2),
    ),
    "some of it": ({"do_sample": True, "top_p": 0.4, "top_k": None}, (1, 50, 0.4, 1)),
}


@pytest.mark.parametrize("name", DRAWN)
def test_answers_are_drawn_as_transformers_draws_them(name, tmp_path):
    given, wanted = DRAWN[name]
    write_json(tmp_path / "config.json", {})
    if given is not None:
        write_json(tmp_path / "generation_config.json", given)
    fields = ("temperature", "top_k", "top_p", "repetition_penalty")

    row = stages_of(tmp_path, [], **dict(zip(fields, wanted, strict=True)))[1]

    assert (row.stage, row.passed, row.figure) == ("generation defaults", True, 0)
    for i, name_ in enumerate(fields):
        other = list(wanted)
        other[i] += 1
        found = stages_of(tmp_path, [], **dict(zip(fields, other, strict=True)))[1]
        assert (found.passed, found.figure) == (False, 1), name_


@pytest.mark.parametrize(
    ("image", "rendered", "ids"),
    [
        (159, "w5 <image> w6", [1, 5, 159, 6]),
        (159, "<s> w5 <image>", [1, 5, 159]),  # the template's own first token is the only one
        (0, "w5 <image> w6", [1, 5, 159, 6]),
        (-200, "w5 <image> w6 <image>", [1, 5, -200, 6, -200]),
        (-200, "<image> w6", [1, -200, 6]),
        (-200, "<s> w5 <image> w6", [1, 5, -200, 6]),
    ],
)
def test_a_question_is_encoded_with_one_first_token_and_each_image(image, rendered, ids, tmp_path):
    from tokenizers import processors

    tokenizer = tiny.tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = SimpleNamespace(
        tokenizer="tokenizer.json", bos_token="<s>", eos_token="</s>", image_token="<image>", image_token_id=image
    )

    found = host._encoded(tmp_path, config, "{{ messages[0]['content'] }}", [{"role": "user", "content": rendered}])

    assert found == ids


@pytest.mark.parametrize(("own", "wanted", "rows"), [(None, None, 0), (None, "x", 1), ("x", None, 1)])
def test_a_tokenizer_that_one_has_and_the_other_has_not_is_told(own, wanted, rows, monkeypatch, tmp_path):
    monkeypatch.setattr(host.text, "copy", lambda *given, **named: wanted)
    plan: Any = SimpleNamespace(
        family=SimpleNamespace(chat_template=lambda of: None, own_template=False),
        settings=SimpleNamespace(chat_template="checkpoint"),
        spec=SimpleNamespace(image_token_id=3, video_token_id=None),
    )
    pipe: Any = SimpleNamespace(manifest=SimpleNamespace(text=own), bundle=SimpleNamespace(folder=tmp_path))

    found = list(host._prompt(pipe, SimpleNamespace(folder=tmp_path), plan))  # type: ignore[arg-type]

    assert [(row.stage, row.passed) for row in found] == [("tokenizer", False)] * rows


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
