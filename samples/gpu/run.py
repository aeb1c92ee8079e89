"""Everything that takes a GPU, in one command of 25 minutes: `python samples/gpu/run.py WORK`.

Parity of every method's sample on each backend that loads; then, at LLaVA-1.5-7B's dimensions in float16 with random
weights, times of `none` and `fastv` (25 %) beside transformers on the same GPU, with sdpa and with its compiled static
cache, memory, and the error of logits. Each part is a process of its own with a time limit, and what it found is in
WORK/result.json at once. Needs the extras `export` and `ort-cuda`, 45 GB of disk and 32 GB of the GPU's memory. Without
a GPU it ends with one line and exit code 3. --rehearse runs all of it on the CPU, on a small model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from dry_run import METHODS, SAMPLE

from lvlm_edge.exporter.devices import doctor
from lvlm_edge.exporter.timing.machine import machine
from lvlm_edge.runtime import Pipeline, backends
from lvlm_edge.runtime.bundle import Manifest, external, open_bundle
from lvlm_edge.runtime.errors import LvlmEdgeError

BENCH = Path(__file__).parent.parent / "bench"
BACKENDS = ("ort-cuda", "trt-rtx", "trt")
BUNDLES = {"none": {}, "fastv": {"method": "fastv", "prune_layer": 2, "keep_ratio": 0.25}}
TEXT, NEW, WARM_UP = 100, 64, 2
GOALS = "goals: parity passed; logits within 2e-2; none <= 1.0 x transformers sdpa; fastv <= 0.6 x none; decode >= 70 %"


class Setting:
    """Where and on what the parts run."""

    def __init__(self, work: Path, rehearse: bool) -> None:
        self.work, self.rehearse = work, rehearse
        self.device = "cpu" if rehearse else "cuda"
        self.rounds = 1 if rehearse else 7
        self.size, self.dtype = ("small-picture", "float32") if rehearse else ("llava-7b", "float16")
        self.backends = ("ort",) if rehearse else BACKENDS
        self.checkpoint = work / self.size

    def bundle(self, name: str) -> Path:
        return self.work / f"{self.size}-{name}"

    def question(self, manifest: Manifest) -> tuple[list[int], np.ndarray]:
        """A prompt of `TEXT` tokens with a picture in it, and the picture."""
        rng = np.random.default_rng(0)
        ids = rng.integers(5, manifest.image_token_id - 1, TEXT - 1).tolist()
        shape = next(t.shape for g in manifest.role("image") for t in g.inputs if t.name == "pixel_values")
        return [*ids[:5], manifest.image_token_id, *ids[5:]], rng.standard_normal(shape).astype(np.float32)


def loads(name: str) -> str:
    """What keeps a backend from loading; empty if nothing does."""
    try:
        backends.load(name)
    except LvlmEdgeError as error:
        return str(error)
    return ""


def opened(s: Setting, bundle: Path, backend: str, **options: Any) -> Pipeline:
    """A bundle on a backend, with its engines built first where it takes some."""
    if backend in ("trt", "trt-rtx"):
        from lvlm_edge.exporter.devices import engine

        capability = doctor.report()["gpus"][0]["compute_capability"]
        engine.build(bundle, engine.Settings(backend=backend, compute_capabilities=(capability,)))
    return Pipeline.load(bundle, backend, verify=False, **options)


# The parts.


def parity(s: Setting) -> dict[str, Any]:
    """`check` of every method's sample on every backend."""
    from lvlm_edge.exporter import export
    from lvlm_edge.exporter.proof import parity as proof

    found: dict[str, Any] = {}
    for name, (checkpoint, options) in METHODS.items():
        bundle, dtype = s.work / f"sample-{name}", {"dtype": s.dtype, "ort": False}
        if not bundle.is_dir():
            export(SAMPLE / checkpoint, bundle, max_text_tokens=32, max_new_tokens=8, **dtype | options)
        for backend in s.backends:
            if said := loads(backend):
                found[backend] = said
                continue
            try:
                opened(s, bundle, backend)
                verdict = proof.check(bundle, SAMPLE / checkpoint, backend=backend, store=False)
                failure = str(verdict.first_failure) if verdict.first_failure else None
                found[f"{name} {backend}"] = {"passed": verdict.passed, "rows": len(verdict.rows), "failure": failure}
            except LvlmEdgeError as error:
                found[f"{name} {backend}"] = {"passed": False, "failure": str(error)}
    return found


def export(s: Setting) -> dict[str, Any]:
    """The checkpoint and its bundles."""
    from lvlm_edge.exporter import export as export_bundle

    began = time.perf_counter()
    if not (s.checkpoint / "model.safetensors").exists():
        half = [] if s.rehearse else ["--half"]
        subprocess.run([sys.executable, BENCH / "make_checkpoint.py", s.size, s.checkpoint, *half], check=True)
    for name, options in BUNDLES.items():
        if not s.bundle(name).is_dir():
            settings = {"dtype": s.dtype, "max_text_tokens": TEXT, "max_new_tokens": NEW, "ort": False}
            export_bundle(s.checkpoint, s.bundle(name), **settings | options)
    return {"seconds": time.perf_counter() - began}


def bundles(s: Setting) -> dict[str, Any]:
    """Times, memory and logits of each bundle on each backend; on ort-cuda with CUDA graphs and without."""
    found: dict[str, Any] = {}
    for backend in s.backends:
        if said := loads(backend):
            found[backend] = said
            continue
        for name in BUNDLES:
            for how in ({}, {"capture": False}) if backend == "ort-cuda" else ({},):
                label = " ".join([name, backend, *(["uncaptured"] if how else [])])
                try:
                    found[label] = timed(
                        s, opened(s, s.bundle(name), backend, **how), s.work / f"{label.replace(' ', '-')}.npz"
                    )
                except LvlmEdgeError as error:
                    found[label] = str(error)
    files = sorted(s.work.glob("*-uncaptured.npz"))
    pairs = [(np.load(file), np.load(s.work / f"{file.stem.removesuffix('-uncaptured')}.npz")) for file in files]
    return found | {"same_tokens_uncaptured": [bool((a["tokens"] == b["tokens"]).all()) for a, b in pairs]}


def timed(s: Setting, pipe: Pipeline, into: Path) -> dict[str, Any]:
    """Milliseconds to the first token and per further token: median, least and most; what the GPU holds meanwhile.

    Per token also where all logits come back to the host (`all_logits`).
    """
    prompt, pixels = s.question(pipe.manifest)
    turns = []
    for _ in range(WARM_UP + s.rounds):
        pipe.forget_images()
        answer = pipe.generate_tokens(prompt, pixels, max_new_tokens=NEW, ignore_eos=True, logits=False)
        result = pipe.generate_tokens(prompt, pixels, max_new_tokens=NEW, ignore_eos=True)
        steps = {"decode": answer.seconds["decode"] / (NEW - 1), "all_logits": result.seconds["decode"] / (NEW - 1)}
        turns.append(answer.seconds | steps)
    assert result.logits is not None
    np.savez(into, tokens=result.token_ids, logits=result.logits)
    counted = turns[WARM_UP:]
    stages = {key: spread([1e3 * turn[key] for turn in counted]) for key in counted[0]}
    files = {graph.file for graph in pipe.manifest.role("decode")}
    read = sum(w.size or 0 for file in files for w in external.weights(pipe.bundle.graph(file)))
    same = answer.token_ids == result.token_ids  # chosen from the highest logits, and from all
    return {"ms": stages, "gpu_bytes": used(s), "weights_bytes": read, "same_tokens_of_all_logits": same}


def spread(values: list[float]) -> list[float]:
    return [round(value, 3) for value in (median(values), min(values), max(values))]


def used(s: Setting) -> int | None:
    """Bytes of the GPU's memory in use, by whomever."""
    if s.rehearse:
        return None
    status, free, total = import_module("cuda.bindings.runtime").cudaMemGetInfo()
    return None if int(status) else int(total - free)


def transformers(s: Setting) -> dict[str, Any]:
    """The same checkpoint in transformers, with sdpa and with the compiled static cache; memory and bandwidth."""
    import torch
    from transformers import LlavaForConditionalGeneration

    dtype = getattr(torch, s.dtype)
    model = LlavaForConditionalGeneration.from_pretrained(s.checkpoint, dtype=dtype, attn_implementation="sdpa")
    model = model.to(s.device).eval()
    prompt, pixels = s.question(open_bundle(s.bundle("none"), verify=False).manifest)
    image, count = model.config.image_token_id, model.config.image_seq_length
    ids = [i for token in prompt for i in ([image] * count if token == image else [token])]
    given = {
        "input_ids": torch.tensor([ids], device=s.device),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64, device=s.device),
        "pixel_values": torch.from_numpy(pixels).to(s.device, dtype),
    }
    found: dict[str, Any] = {"bytes_per_second": bandwidth(s)}
    with torch.inference_mode():
        found["logits"] = {path.stem: error(model, given, path) for path in sorted(s.work.glob("none-*.npz"))}
        for label, more in (("sdpa", {}), ("compiled", {"cache_implementation": "static"})):
            if label == "compiled" and s.rehearse:
                continue

            def seconds(new: int, more: dict[str, Any] = more) -> float:
                began = time.perf_counter()
                model.generate(**given, **more, max_new_tokens=new, min_new_tokens=new, do_sample=False)
                if s.device == "cuda":
                    torch.cuda.synchronize()
                return time.perf_counter() - began

            turns = [(seconds(1), seconds(NEW)) for _ in range(WARM_UP + s.rounds)][WARM_UP:]
            first = spread([1e3 * one for one, _ in turns])
            found[label] = {
                "ms": {"first_token": first, "decode": spread([1e3 * (all_ - one) / (NEW - 1) for one, all_ in turns])}
            }
        found["gpu_bytes"] = used(s)
    return found


def error(model: Any, given: dict[str, Any], path: Path) -> dict[str, Any]:
    """How far a bundle's logits are from those of transformers before the same tokens, over the largest of these."""
    import torch

    theirs = np.load(path)
    more = torch.from_numpy(theirs["tokens"][None, :-1]).to(given["input_ids"])
    ids = torch.cat([given["input_ids"], more], 1)
    logits = (
        model(input_ids=ids, pixel_values=given["pixel_values"])
        .logits[0, -len(theirs["tokens"]) :]
        .float()
        .cpu()
        .numpy()
    )
    relative = np.abs(logits - theirs["logits"]).max() / np.abs(logits).max()
    same = (logits.argmax(-1) == theirs["tokens"]).mean()
    return {"largest": float(relative), "same_choices": float(same)}


def bandwidth(s: Setting) -> float:
    """Bytes per second that the device reads and writes when it copies 1 GiB."""
    import torch

    source = torch.empty(1 << (24 if s.rehearse else 30), dtype=torch.uint8, device=s.device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        if s.device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * len(source) / (time.perf_counter() - began))
    return best


PARTS = {part.__name__: part for part in (parity, export, bundles, transformers)}
LIMITS = {"parity": 360, "export": 600, "bundles": 300, "transformers": 240}  # seconds: 25 minutes


def table(found: dict[str, Any]) -> str:
    """What was found, as lines for people."""
    lines = [f"{found['gpu']}; {found['machine']['versions']}", GOALS]
    for name, row in found.get("parity", {}).items():
        lines.append(
            f"| parity | {name} | {row if isinstance(row, str) else 'passed' if row['passed'] else row['failure']} |"
        )
    lines += ["| | first token ms | per token ms | with all logits | GPU GB | weights read, of bandwidth |"]
    lines += ["|---|---|---|---|---|---|"]
    torch = found.get("transformers", {})
    rate = torch.get("bytes_per_second")
    rows = dict(found.get("bundles", {})) | {
        f"transformers {k}": torch[k] | {"gpu_bytes": torch["gpu_bytes"]} for k in ("sdpa", "compiled") if k in torch
    }
    for name, row in rows.items():
        if not isinstance(row, dict):
            lines.append(f"| {name} | {row} |")
            continue
        first, step = row["ms"]["first_token"][0], row["ms"]["decode"][0]
        whole = f"{row['ms']['all_logits'][0]:.2f}" if "all_logits" in row["ms"] else ""
        share = f"{row['weights_bytes'] / (step / 1e3) / rate:.0%}" if rate and "weights_bytes" in row else ""
        memory = f"{row['gpu_bytes'] / 1e9:.1f}" if row["gpu_bytes"] else ""
        lines.append(f"| {name} | {first:.1f} | {step:.2f} | {whole} | {memory} | {share} |")
    for name, row in torch.get("logits", {}).items():
        lines.append(f"logits of {name}: {row['largest']:.1e} of the largest, {row['same_choices']:.0%} equal choices")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--rehearse", is_flag=True, help="On the CPU, with a small model: does the script itself work?")
@click.option("--part", type=click.Choice(list(PARTS)), help="Run one part in this process and print what it found.")
def main(work: Path, rehearse: bool, part: str | None) -> None:
    setting = Setting(work, rehearse)
    if part is not None:
        click.echo("\n" + json.dumps(PARTS[part](setting)))
        return
    report = doctor.report()
    if not report["gpus"] and not rehearse:
        click.echo(f"run.py: there is no GPU here: {report['cuda']}; see `lvlm-edge doctor`", err=True)
        sys.exit(3)
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"gpu": report["gpus"], "machine": machine(), "rehearsal": rehearse}
    for name in PARTS:
        click.echo(f"{name} ...", err=True)
        command = [sys.executable, __file__, str(work), "--part", name, *["--rehearse"] * rehearse]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMITS[name], env=os.environ)
            lines = done.stdout.splitlines()
            found[name] = (
                json.loads(lines[-1]) if done.returncode == 0 else {"problem": f"ended with {done.returncode}"}
            )
        except subprocess.TimeoutExpired:
            found[name] = {"problem": f"took longer than {LIMITS[name]} s"}
        (work / "result.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    click.echo(table(found))


if __name__ == "__main__":
    main()
