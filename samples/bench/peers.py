"""Bundles against transformers, OpenVINO and llama.cpp on the same weights, in turns, and the tables of the result.

    python samples/bench/peers.py setup build/peers            # OpenVINO and llama.cpp, an environment of their own
    python samples/bench/peers.py run --peers build/peers      # makes what is missing, measures, prints the tables
    python samples/bench/peers.py run --peers build/peers --write        # and writes them to the two README.md

Every contender is a process of its own that answers one prompt at a time, all of them in turns (see contenders.py for
what they do). Turns end once no contender's median passes another's any more, with `--rounds` or `--minutes`. A prompt
during which other processes took more than `--busy` of the processors is asked again with another picture, five times
at most; the share that others took is printed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FIGURES = HERE / "peers.json"
SIZE, CAPACITY = "smol", ("--max-text-tokens", "100", "--max-new-tokens", "64")
PACKAGES = {
    "openvino": ("openvino==2026.4.1", "optimum-intel[openvino]==2.2.0"),
    "llama": ("llama-cpp-python==0.3.36", "gguf==0.19.0"),
}
MODULES = {"openvino": ("openvino", "optimum.intel"), "llama": ("llama_cpp", "gguf")}
FASTV = ("--method", "fastv", "--prune-layer", "2", "--keep-ratio", "0.25")
INT8, INT4 = (("--weights", name, "--vision-weights", "int8") for name in ("int8", "int4"))
BUNDLES = {
    "none": (),
    "none-int8": INT8,
    "none-int4": INT4,
    "none-int4-int8": (*INT4, "--prompt-weights", "int8"),
    "fastv": FASTV,
    "fastv-int8": (*FASTV, *INT8),
    "fastv-int4-int8": (*FASTV, *INT4, "--prompt-weights", "int8"),
}
OPENVINO = {
    "openvino-fp16": ("--weight-format", "fp16"),
    "openvino-int8": ("--weight-format", "int8"),
    "openvino-int4": ("--weight-format", "int4", "--group-size", "64"),  # the default, 128, does not divide 576 columns
}
# Rows of the table: kind, folder below WORK after the size, setting, text.
ROWS = (
    ("transformers", "", "float32", "transformers, sdpa, float32"),
    ("transformers", "", "bfloat16", "transformers, sdpa, bfloat16"),
    ("openvino", "openvino-fp16", "f32", "OpenVINO, float16 weights, float32"),
    ("openvino", "openvino-fp16", "bf16", "OpenVINO, float16 weights, bfloat16"),
    ("openvino", "openvino-int8", "f32", "OpenVINO, int8 weights, float32"),
    ("openvino", "openvino-int8", "bf16", "OpenVINO, int8 weights, bfloat16"),
    ("openvino", "openvino-int4", "f32", "OpenVINO, int4 weights, float32"),
    ("openvino", "openvino-int4", "bf16", "OpenVINO, int4 weights, bfloat16"),
    ("llama", "llama", "F32 F32", "llama.cpp, F32"),
    ("llama", "llama", "BF16 BF16", "llama.cpp, BF16"),
    ("llama", "llama", "Q8_0 Q8_0", "llama.cpp, Q8_0"),
    ("llama", "llama", "Q4_0 Q8_0", "llama.cpp, Q4_0, encoder Q8_0"),
    ("bundle", "none", "", "bundle `none`, float32"),
    ("bundle", "none-int8", "", "bundle `none`, int8"),
    ("bundle", "none-int4", "", "bundle `none`, int4"),
    ("bundle", "none-int4-int8", "", "bundle `none`, int4, prompts int8"),
    ("bundle", "fastv", "", "bundle `fastv`, keep 25 %, float32"),
    ("bundle", "fastv-int8", "", "bundle `fastv`, keep 25 %, int8"),
    ("bundle", "fastv-int4-int8", "", "bundle `fastv`, keep 25 %, int4, prompts int8"),
)
# Formats that stand beside each other: the word that a bundle's row ends in, and peers' rows.
_INT4 = ("OpenVINO, int4 weights, float32", "OpenVINO, int4 weights, bfloat16", "llama.cpp, Q4_0, encoder Q8_0")
BESIDE = {
    "float32": ("transformers, sdpa, float32", "OpenVINO, float16 weights, float32", "llama.cpp, F32"),
    "int8": ("OpenVINO, int8 weights, float32", "OpenVINO, int8 weights, bfloat16", "llama.cpp, Q8_0"),
    "int4": ("OpenVINO, int4 weights, float32", "OpenVINO, int4 weights, bfloat16", "llama.cpp, Q4_0, encoder Q8_0"),
    "prompts int8": (
        "OpenVINO, int4 weights, float32",
        "OpenVINO, int4 weights, bfloat16",
        "llama.cpp, Q4_0, encoder Q8_0",
    ),
}
TITLE, RATIOS = "| | first token ms | per token ms |", "| bundle | peer | first token | per token |"
FRONT = {
    "transformers, sdpa, float32": "transformers {transformers}, sdpa",
    "OpenVINO, float16 weights, float32": "OpenVINO {openvino}, float16 weights",
    "llama.cpp, F32": "llama.cpp (llama-cpp-python {llama-cpp-python}), F32",
    "bundle `none`, float32": "bundle `none`",
    "bundle `fastv`, keep 25 %, float32": "bundle `fastv`, layer 2, keep 25 %",
}
LEAST, STEADY, TRIES = 5, 3, 5  # turns at least; turns with the same order; prompts for one figure
Turn = Sequence[float]  # seconds to the first token and per token, share of the processors that others took
Found = dict[str, list[Turn]]  # by text of the row


# What is measured ---------------------------------------------------------------------------------


def missing(kind: str, python: Path | None) -> str | None:
    """What to do about a peer that is not installed; None where it is."""
    if kind not in PACKAGES:
        return None
    if python and python.exists():
        imports = "; ".join(f"import {name}" for name in MODULES[kind])
        if subprocess.run([python, "-c", imports], capture_output=True, check=False).returncode == 0:
            return None
    where = python.parents[1] if python else Path("build/peers")
    return f"{kind}: not installed in {where}, left out; python samples/bench/peers.py setup {where}"


def make(kind: str, folder: str, work: Path, python: Path | None) -> Path:
    """The folder that a contender reads, made where it is missing."""
    checkpoint = work / SIZE
    if not (checkpoint / "model.safetensors").exists():
        _run(sys.executable, HERE / "make_checkpoint.py", SIZE, checkpoint)
    target = work / f"{SIZE}-{folder}" if folder else checkpoint
    if target.exists():
        return target
    if kind == "bundle":
        command = [sys.executable, "-m", "lvlm_edge.exporter.commands.main", "export", checkpoint, "-q"]
        _run(*command, "-o", target, *CAPACITY, *BUNDLES[folder])
    elif kind == "openvino":
        task = ("--task", "image-text-to-text", *OPENVINO[folder])
        _run(python, "-m", "optimum.commands.optimum_cli", "export", "openvino", "-m", checkpoint, *task, target)
    elif kind == "llama":
        _run(python, HERE / "gguf_files.py", checkpoint, target)
    return target


def _run(*command: Any) -> None:
    words = [str(word) for word in command]
    print(*words, file=sys.stderr)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{done.stderr.strip()}\n{words[0]}: ended with {done.returncode}, see above")


class Contender:
    """A process that answers seeds with times."""

    def __init__(self, command: Sequence[Any], threads: int, log: Path) -> None:
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, env=environment,
            )  # fmt: skip

    def loaded(self) -> dict[str, str]:
        """Wait until it answers; versions of its packages."""
        return self._line()

    def ask(self, seed: int) -> tuple[float, float, list[float], float]:
        """Seconds to the first token and per token, logits for seed 0, share of the processors that others took."""
        before = self._clocks()
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        first, each, logits = self._line()
        every, idle, own = (b - a for a, b in zip(before, self._clocks(), strict=True))
        return first, each, logits, max(0.0, (every - idle - own) / max(every, 1))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(errors="replace").splitlines()[-1:]
            sys.exit(f"{self.log}: the contender ended with {self.process.wait()}: {' '.join(tail)}")
        return json.loads(line)

    def _clocks(self) -> tuple[int, int, int]:
        """Ticks of all processors, of these idle, and of the process in them."""
        every = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        own = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(every), every[3] + every[4], int(own[11]) + int(own[12])


def measure(
    contenders: dict[str, Contender], rounds: int, busy: float, until: float
) -> tuple[Found, dict[str, list[float]]]:
    """Turns of each contender, and the logits of a turn before them that does not count."""
    logits = {name: contender.ask(0)[2] for name, contender in contenders.items()}
    found: Found = {name: [] for name in contenders}
    seed = 0
    for turn in range(rounds):
        for name, contender in contenders.items():
            tried = []
            while len(tried) < TRIES and (not tried or tried[-1][2] > busy):
                seed += 1
                first, each, _, others = contender.ask(seed)
                tried.append((first, each, others))
            found[name].append(min(tried, key=lambda one: one[2]))
        print(f"turn {turn + 1}: others took {share(found):.0%}", file=sys.stderr)
        if settled(found) or time.monotonic() > until:
            break
    return found, logits


def agreement(logits: dict[str, list[float]]) -> dict[str, float]:
    """Correlation of logits with those of the first contender.

    The highest, far above the others, is left out: a random checkpoint repeats the token that it has just seen.
    """
    first = np.array(next(iter(logits.values())))
    others = np.arange(first.size) != first.argmax()
    return {name: float(np.corrcoef(first[others], np.array(row)[others])[0, 1]) for name, row in logits.items()}


def order(found: Found, figure: int, turns: int) -> list[str]:
    """Contenders by the median of their first turns."""
    return sorted(found, key=lambda name: median(turn[figure] for turn in found[name][:turns]))


def settled(found: Found) -> bool:
    """Whether no two figures changed places in the last turns."""
    turns = len(next(iter(found.values())))
    if turns < max(LEAST, STEADY + 1):
        return False
    return all(
        order(found, figure, turns - back) == order(found, figure, turns)
        for figure in (0, 1)
        for back in range(1, STEADY)
    )


def share(found: Found) -> float:
    """Median share of the processors that other processes took."""
    return median(turn[2] for turns in found.values() for turn in turns)


# What is written ----------------------------------------------------------------------------------


def figure(turns: Sequence[Turn], which: int, digits: int) -> str:
    """Median and minimum in ms."""
    values = [turn[which] * 1e3 for turn in turns]
    return f"{median(values):.{digits}f} ({min(values):.{digits}f})"


def table(found: Found) -> list[str]:
    """All contenders: medians, the lowest in brackets."""
    rows = [f"| {name} | {figure(turns, 0, 0)} | {figure(turns, 1, 1)} |" for name, turns in found.items()]
    return [TITLE, "|---|---|---|", *rows]


def ratios(found: Found) -> list[str]:
    """Bundles over peers of the same format: below 1 where the bundle is faster."""
    lines = [RATIOS, "|---|---|---|---|"]
    for name in found:
        for peer in BESIDE[name.rpartition(", ")[2]] if name.startswith("bundle") else ():
            if peer in found:
                parts = [median(t[i] for t in found[name]) / median(t[i] for t in found[peer]) for i in (0, 1)]
                lines.append(f"| {name.removeprefix('bundle ')} | {peer} | {parts[0]:.2f} | {parts[1]:.2f} |")
    return lines


def front(found: Found, versions: dict[str, str]) -> list[str]:
    """The table of README.md: medians."""
    lines = [TITLE, "|---|---|---|"]
    for name, text in FRONT.items():
        medians = [median(turn[i] for turn in found[name]) * 1e3 for i in (0, 1)]
        lines.append(f"| {text.format(**versions)} | {medians[0]:.0f} | {medians[1]:.1f} |")
    return lines


def written(page: str, lines: Sequence[str]) -> str:
    """The page with another table in the place of the one that begins with the same line."""
    rows = page.splitlines()
    start = rows.index(lines[0])
    end = next((i for i in range(start, len(rows)) if not rows[i].startswith("|")), len(rows))
    return "\n".join([*rows[:start], *lines, *rows[end:]]) + "\n"


def claimed(page: str, found: Found) -> str:
    """README.md with its sentence on what FastV does to the time to first token."""
    none, fastv = (median(turn[0] for turn in found[name]) * 1e3 for name in list(FRONT)[-2:])
    return re.sub(
        r"time to first token from \d+ to \d+ ms", f"time to first token from {none:.0f} to {fastv:.0f} ms", page
    )


def pages(figures: dict[str, Any]) -> dict[Path, str]:
    """Both pages with the tables of the figures."""
    found = figures["turns"]
    own = written(written((HERE / "README.md").read_text("utf-8"), table(found)), ratios(found))
    return {
        HERE / "README.md": own,
        ROOT / "README.md": claimed(
            written((ROOT / "README.md").read_text("utf-8"), front(found, figures["versions"])), found
        ),
    }


# Commands -----------------------------------------------------------------------------------------


@click.group()
def main() -> None:
    """Bundles against transformers, OpenVINO and llama.cpp."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--only", type=click.Choice(list(PACKAGES)), help="One of the peers.")
def setup(folder: Path, only: str | None) -> None:
    """An environment of their own for OpenVINO and llama.cpp, which is compiled for this processor."""
    venv.create(folder, with_pip=True)
    os.environ["CMAKE_ARGS"] = "-DGGML_NATIVE=ON"
    for kind in [only] if only else PACKAGES:
        _run(folder / "bin" / "python", "-m", "pip", "install", "-q", *PACKAGES[kind])


@main.command()
@click.option("--peers", type=click.Path(path_type=Path), help="What `setup` made; without it, transformers alone.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench"), show_default=True)
@click.option("--rounds", default=15, show_default=True, help="Turns at most.")
@click.option("--minutes", default=30.0, show_default=True, help="The turn during which they are over is the last.")
@click.option("--threads", default=2, show_default=True)
@click.option("--busy", default=0.05, show_default=True, help="Share that others may take of the processors.")
@click.option("--only", help="Rows whose text this regular expression finds.")
@click.option("--write", is_flag=True, help="Write figures and tables; needs all rows.")
def run(
    peers: Path | None,
    work: Path,
    rounds: int,
    minutes: float,
    threads: int,
    busy: float,
    only: str | None,
    write: bool,
) -> None:
    """Measure, and print the tables."""
    python = peers / "bin" / "python" if peers else None
    absent = {kind: text for kind in PACKAGES if (text := missing(kind, python))}
    rows = [row for row in ROWS if row[0] not in absent and re.search(only or "", row[3])]
    print(*absent.values(), sep="\n", end="\n" if absent else "", file=sys.stderr)
    if write and len(rows) < len(ROWS):
        raise click.UsageError("--write needs all rows: run without --only, with every peer installed")
    folders = {row: make(row[0], row[1], work, python) for row in rows}
    began, contenders = time.monotonic(), {}
    for row in rows:
        kind, _, setting, text = row
        command = [python if kind in PACKAGES else sys.executable, HERE / "contenders.py", kind, folders[row], setting]
        log = work / f"peers-{len(contenders)}.log"
        contenders[text] = Contender([*command, threads], threads, log)
    versions = {name: number for contender in contenders.values() for name, number in contender.loaded().items()}
    found, logits = measure(contenders, rounds, busy, began + 60 * minutes)
    for contender in contenders.values():
        contender.close()
    figures = {
        "date": date.today().isoformat(), "threads": threads, "others": round(share(found), 3), "versions": versions,
        "turns": {name: [[round(value, 5) for value in turn] for turn in turns] for name, turns in found.items()},
        "agreement": {name: round(value, 6) for name, value in agreement(logits).items()},
    }  # fmt: skip
    print(*table(figures["turns"]), "", *ratios(figures["turns"]), sep="\n")
    print(json.dumps({key: figures[key] for key in ("date", "threads", "others", "versions", "agreement")}))
    if write:
        FIGURES.write_text(json.dumps(figures, separators=(",", ":")) + "\n", "utf-8")
        for path, text in pages(figures).items():
            path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
