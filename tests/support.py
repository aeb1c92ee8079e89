"""The table of README.md, "What is supported", from results of tests. Run tests, then this on what pytest wrote:

    .venv/bin/pytest -m claims --junitxml build/results.xml
    .venv/bin/python tests/support.py build/results.xml

A test marked `claims` says by passing that a method of a family does something: `equal`, traced graphs run in ONNX
Runtime and their answers are PyTorch's; `builds`, TensorRT-RTX builds every graph. Family and method that the marker
leaves out are parameters of the test. samples/families/support.json keeps the results: those of claims that were
tested again are replaced, and one that never was reads "not run".
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "samples" / "families" / "support.json", ROOT / "README.md"
CLAIMS = {"equal": "runs, answers equal: ONNX Runtime, CPU", "builds": "builds, in float16: TensorRT-RTX 1.7.1"}
PROPERTY = "claim"
# Rows: families, their methods, and models of them.
ROWS = (
    ("llava", "none fastv yopo", "LLaVA-1.5, Hugging Face layout"),
    ("llava_llama", "none fastv proxyv yopo", "original layouts of LLaVA-1.5 and 1.6, ProxyV, YOPO"),
    ("tinyllava", "none fastv yopo himix", "TinyLLaVA; HiMix"),
    ("llava_next llava_onevision", "none fastv", "LLaVA-1.6, LLaVA-OneVision"),
    ("internvl internvl_chat", "none fastv yopo", "InternVL 2 to 3.5, the hub's and the original layout"),
    ("smolvlm idefics3", "none fastv yopo", "SmolVLM, SmolVLM2, Idefics3"),
    ("qwen video_llava", "none fastv", "Qwen-VL-Chat, original layout; Video-LLaVA, also videos"),
    ("qwen2_vl qwen2_5_vl", "none fastv yopo", "Qwen2-VL, Qwen2.5-VL"),
    ("qwen3_vl", "none fastv", "Qwen3-VL (dense)"),
)


def claims(item: Any) -> list[str]:
    """What a collected test claims, `FAMILY METHOD CLAIM` each; a parameter `name` begins with what is not given."""
    marker = item.get_closest_marker("claims")
    if marker is None:
        return []
    given = getattr(item, "callspec", None)
    found = {**(given.params if given is not None else {}), **marker.kwargs}
    in_pytorch = "eager_once" in item.fixturenames or found.get("exported") == "bodies"
    if in_pytorch or found.get("backend", "ort") != "ort":  # others than ONNX Runtime stand in for it
        return []
    method = re.split("[ _,]", found.get("method") or found["name"])[0]
    family = found.get("family") or re.split("[ ,]", found["name"])[0]
    return [f"{family[method] if isinstance(family, dict) else family} {method} {claim}" for claim in marker.args]


def outcomes(report: Path) -> dict[str, str]:
    """By claim, `passed` where every test of it in a JUnit file passed, else `failed`; skipped tests say nothing."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        for entry in case.iter("property"):
            if entry.get("name") == PROPERTY:
                claim = str(entry.get("value"))
                found[claim] = "failed" if failed or found.get(claim) == "failed" else "passed"
    return found


def table(results: dict[str, str]) -> list[str]:
    """Lines of Markdown: in a cell, the methods that do it."""
    lines = [f"| family (`model_type`) | models | {' | '.join(CLAIMS.values())} |", "|---" * (2 + len(CLAIMS)) + "|"]
    for families, methods, models in ROWS:
        cells = [_cell(families.split(), methods.split(), claim, results) for claim in CLAIMS]
        names = " ".join(f"`{family}`" for family in families.split())
        lines.append(f"| {names} | {models} | {' | '.join(cells)} |")
    return lines


def _cell(families: list[str], methods: list[str], claim: str, results: dict[str, str]) -> str:
    """One text where it holds for all families of a row, else one for each."""
    texts = {}
    for family in families:
        by_result: dict[str, list[str]] = {}
        for method in methods:
            by_result.setdefault(results.get(f"{family} {method} {claim}", "not run"), []).append(f"`{method}`")
        passed = [" ".join(by_result.pop("passed"))] if "passed" in by_result else []
        texts[family] = "; ".join(passed + [f"{result}: {' '.join(by_result[result])}" for result in sorted(by_result)])
    if len(set(texts.values())) == 1:
        return texts[families[0]]
    return "; ".join(f"`{family}`: {text}" for family, text in texts.items())


def written(page: str, lines: Iterable[str]) -> str:
    """The page with another table."""
    rows = page.splitlines()
    at = [i for i, row in enumerate(rows) if row.startswith("| family (`model_type`)")]
    end = next(i for i in range(at[0], len(rows)) if not rows[i].startswith("|"))
    return "\n".join([*rows[: at[0]], *lines, *rows[end:]]) + "\n"


def main(reports: Iterable[str]) -> None:
    """Take up results of reports, and write the table."""
    known: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {"results": {}}
    for report in reports:
        known["results"] |= outcomes(Path(report))
        known["date"] = date.today().isoformat()
    known["results"] = dict(sorted(known["results"].items()))
    RESULTS.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    PAGE.write_text(written(PAGE.read_text("utf-8"), table(known["results"])), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
