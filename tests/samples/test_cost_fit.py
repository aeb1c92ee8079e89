"""The constants of the cost model come out of the published rows that are fitted, and predict those held out."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from statistics import median

import pytest

pytestmark = pytest.mark.export

ROOT = Path(__file__).resolve().parents[2]
STORED = json.loads((ROOT / "exporter" / "devices" / "cost.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def script():
    found = importlib.util.spec_from_file_location("cost_fit", ROOT / "samples" / "cost" / "fit.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def plain(classes):
    return {
        name: {
            "efficiency": dict(c.efficiency),
            "bandwidth": c.bandwidth,
            "prompt_layer": c.prompt_layer,
            "decode_layer": c.decode_layer,
        }
        for name, c in classes.items()
    }


def test_refitting_gives_the_stored_constants_and_rows_held_out_have_no_part_in_it(script, monkeypatch):
    rows, models, source = script.load()
    changed = copy.deepcopy(rows)
    for row in changed[1::2]:
        row |= {k: 7 * v for k, v in row.items() if isinstance(v, float)}
    monkeypatch.setattr(script, "load", lambda: (changed, models, source))

    classes, own, held_out, _ = script.fit_all()

    assert plain(classes) == STORED["classes"]
    assert (len(own), len(held_out)) == (6, 6)


def test_errors_on_held_out_rows_are_those_stored_and_small(script):
    # By hand from here on: no function of the script but the prediction itself.
    rows, models, _ = script.load()
    constants = {n: script.cost.Constants(**c) for n, c in STORED["classes"].items()}
    errors = []
    for row in rows[1::2]:
        name = "thor" if row["device"].startswith("thor") else "orin"
        found = list(script.predicted(row, models, constants[name]).values())
        truth = [row["prefill_2048_ms"], row["prefill_short_ms"], 1000 / row["decode_tokens_per_s"], row["vision_ms"]]
        errors += [abs(1000 * p - t) / t for p, t in zip(found, truth, strict=True)]

    assert len(errors) == 24
    assert STORED["held_out"]["all"] == {"median": round(median(errors), 4), "worst": round(max(errors), 4)}
    assert median(errors) <= 0.20
    assert max(errors) <= 0.40


def test_work_of_a_published_row_by_hand(script):
    rows, models, _ = script.load()
    found = script.works(rows[10], models)  # Qwen3-VL-8B in INT4

    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 12288)
    head = 4096 * 151936
    assert found["prefill of 2048"].flops == 36 * (2 * 2048 * layer + 4 * 2048**2 * 4096) + 2 * head
    assert found["decode"].bytes == 36 * (layer * (4 + 16 / 128) / 8 + 2 * 2 * 1024 * 2048) + 2 * head
    tower = 27 * (4 * 1152**2 + 2 * 1152 * 4304)
    merger = 4608**2 + 4608 * 4096
    patches = 2 * 1060 * (tower + 2 * 3 * 16 * 16 * 1152) + 27 * 4 * 1060**2 * 1152
    assert found["vision"].flops == patches + 4 * 2 * 265 * merger
    assert found["vision"].bytes == 2 * (tower + 4 * merger)


def test_windows_of_a_vision_encoder_are_counted(script):
    rows, models, _ = script.load()
    found = script.works(rows[3], models)["vision"]  # Qwen2.5-VL-7B: 4 of 32 layers see everything

    rest = found.flops - 2 * 1396 * (32 * (4 * 1280**2 + 3 * 1280 * 3420) + 6 * 14**2 * 1280)
    rest -= 2 * 349 * (5120**2 + 5120 * 3584)
    assert rest == 4 * 1396 * 1280 * (4 * 1396 + 28 * 64)
