"""Contenders of a bench, each in a process of its own: a bundle on a backend, PyTorch, the machine's own rates.

`python -m lvlm_edge.exporter.timing.contenders JSON` is one of them: it says what it is, and answers a seed per line
with the figures of a turn. See `bench` for what they mean.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lvlm_edge.exporter.timing.speeds import Dimensions, Speeds
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle import Manifest, open_bundle
from lvlm_edge.runtime.errors import LvlmEdgeError, UnsupportedError
from lvlm_edge.runtime.pictures import views
from lvlm_edge.runtime.pipeline.inputs import placed, random_text

Array = NDArray[Any]

PICTURE = (640, 480)  # of random pictures, where every picture belongs on the canvas: width, height
RATES = "rates"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One that takes turns; what its process is told.

    Attributes:
        kind: bundle, torch or rates.
        folder: the bundle; for torch the checkpoint.
        bundle: whose pictures and prompts these are; for torch another folder than its own, for rates whose dimensions.
        keep_ratio: one of those that the bundle holds; None for that of its export.
        text_tokens: of each prompt.
        new_tokens: of each answer.
        engines: folder of TensorRT engines; empty for this user's own.
    """

    name: str
    kind: str
    folder: str = ""
    bundle: str = ""
    keep_ratio: float | None = None
    backend: str = "ort"
    threads: int = 1
    text_tokens: int = 1
    new_tokens: int = 2
    engines: str = ""


class Runner(Protocol):
    """What takes turns.

    Attributes:
        about: what it says of itself.
    """

    about: dict[str, Any]

    def ask(self, seed: int) -> dict[str, Any]:
        """The figures of a turn; seconds and bytes."""


def memory() -> dict[str, int | None]:
    """Memory of this process, bytes: the most it had resident, and what of it now is no page of a mapped file."""
    status = Path("/proc/self/status")

    def of(name: str) -> int | None:
        lines = status.read_text().splitlines() if status.is_file() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)

    peak = of("VmHWM")
    if peak is None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_bytes": peak, "anonymous_bytes": of("RssAnon")}


def prompt(manifest: Manifest, seed: int, text_tokens: int) -> tuple[list[int], list[list[Any]]]:
    """Random text with its images and videos a third into it, and random pictures of the size of a photograph.

    Returns:
        Token ids, and the frames of each video; an image is one frame.
    """
    from PIL import Image

    rng = np.random.default_rng(seed)
    ids = random_text(rng, manifest, text_tokens)
    whole = placed(ids, text_tokens // 3, [picture.token_id for picture in manifest.pictures])
    pictures = []
    for planned in manifest.pictures:
        canvas = planned.views.canvas
        width, height = PICTURE if canvas.rule == "any" else canvas.size
        noise = rng.integers(0, 256, (planned.views.frames or 1, height, width, 3), dtype=np.uint8)
        pictures.append([Image.fromarray(frame) for frame in noise])
    return whole, pictures


def pixels(manifest: Manifest, pictures: Sequence[Sequence[Any]]) -> list[Array]:
    """What the encoder sees of the planned images and videos, float32 [views, 3, H, W] each."""
    pairs = zip(pictures, manifest.pictures, strict=True)
    return [np.concatenate([views.pixels(frame, one.views) for frame in frames]) for frames, one in pairs]


class _BundleRunner:
    """A bundle on a backend."""

    def __init__(self, contender: Contender) -> None:
        options: dict[str, Any] = {"engines": contender.engines} if contender.engines else {}
        if contender.backend == "ort":  # a GPU has threads of its own
            options["threads"] = contender.threads
        self._pipe = Pipeline.load(
            contender.folder, contender.backend, keep_ratio=contender.keep_ratio, verify=False, **options
        )
        self._contender = contender
        manifest = self._pipe.manifest
        self.about: dict[str, Any] = {
            "method": manifest.method,
            "method_config": manifest.method_config,
            "dtype": manifest.dtype,
            "lowering": manifest.lowering,
            "source": manifest.provenance.source,
            "visual_tokens": manifest.counts.visual_tokens,
            "kept_tokens": manifest.counts.kept_tokens,
            "prompt_capacity": manifest.counts.prompt_tokens,
        }

    def ask(self, seed: int) -> dict[str, Any]:
        manifest, new = self._pipe.manifest, self._contender.new_tokens
        ids, pictures = prompt(manifest, seed, self._contender.text_tokens)
        began = time.perf_counter()
        seen = pixels(manifest, pictures)
        prepared = time.perf_counter() - began
        self._pipe.forget_images()
        answer = self._pipe.generate_tokens(ids, seen, max_new_tokens=new, ignore_eos=True, logits=False)
        seconds = answer.seconds
        graphs = {g.name: seconds[g.name] for g in manifest.graphs if g.role != "decode"}
        between = seconds["first_token"] - sum(graphs.values())
        return {
            "stages": {"preprocess": prepared} | graphs | {"between": between},
            "first_token": prepared + seconds["first_token"],
            "decode": seconds["decode"] / (new - 1),
            **memory(),
        }


class _TorchRunner:
    """Transformers on the checkpoint: float32, sdpa, every visual token.

    Raises:
        CheckpointError: the checkpoint is not the bundle's.
        UnsupportedError: its layers need a method's own arithmetic, which transformers does not have.
    """

    def __init__(self, contender: Contender) -> None:
        import torch

        from lvlm_edge.exporter import references
        from lvlm_edge.exporter.proof import parity
        from lvlm_edge.exporter.references import original

        torch.set_num_threads(contender.threads)
        bundle = open_bundle(contender.bundle, verify=False)
        self._contender, self._manifest = contender, bundle.manifest
        folder = Path(contender.folder)
        parity.check_fits(bundle, folder)
        self._view = original.view(references.load(folder))
        if not self._view.answers:
            raise UnsupportedError(
                f"{folder}: transformers cannot run HiMix's layers, so there is nothing to time; leave out --against"
            )
        self._view.attend_with("sdpa")
        self.about: dict[str, Any] = {"method": "none", "dtype": "float32", "source": str(folder)}

    def ask(self, seed: int) -> dict[str, Any]:
        import torch

        from lvlm_edge.exporter import references

        ids, pictures = prompt(self._manifest, seed, self._contender.text_tokens)
        with torch.no_grad():
            began = time.perf_counter()
            canvases = [picture.views.canvas for picture in self._manifest.pictures]
            sizes = [canvas.picture if any(canvas.picture) else canvas.size for canvas in canvases]
            seen = references.given(self._view, pixels(self._manifest, pictures), sizes)
            prepared = time.perf_counter() - began
            out, step = self._view.prefill(ids, seen)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            first = time.perf_counter() - began
            for _ in range(self._contender.new_tokens - 1):
                out = step(token, out.past_key_values)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            whole = time.perf_counter() - began
        return {
            "stages": {"preprocess": prepared, "model": first - prepared},
            "first_token": first,
            "decode": (whole - first) / (self._contender.new_tokens - 1),
            **memory(),
        }


class _RatesRunner:
    """The machine's own rates, at the dimensions of a bundle's decoder and with the contenders' threads."""

    def __init__(self, contender: Contender) -> None:
        dimensions = Dimensions.of(open_bundle(contender.bundle, verify=False).manifest)
        self._speeds = Speeds(dimensions, contender.threads)
        self.about: dict[str, Any] = asdict(dimensions)

    def ask(self, seed: int) -> dict[str, Any]:
        return self._speeds.turn()


RUNNERS: dict[str, Callable[[Contender], Runner]] = {
    "bundle": _BundleRunner,
    "torch": _TorchRunner,
    RATES: _RatesRunner,
}


def _serve(contender: Contender) -> None:
    """Say what the contender is, then answer a seed per line with the figures of a turn, until the input ends."""
    with _own_stdout() as answer:
        try:
            runner = RUNNERS[contender.kind](contender)
            answer(runner.about)
            for line in sys.stdin:
                answer(runner.ask(int(line)))
        except LvlmEdgeError as error:
            answer({"error": str(error), "exit_code": error.exit_code})


@contextlib.contextmanager
def _own_stdout() -> Iterator[Callable[[Any], None]]:
    """Writes answers to stdout; what libraries print meanwhile goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        yield lambda content: print(json.dumps(content), file=out, flush=True)


if __name__ == "__main__":
    _serve(Contender(**json.loads(sys.argv[1])))
