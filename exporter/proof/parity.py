"""Bundle against PyTorch: graph by graph, then end to end; the result is the bundle's certificate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lvlm_edge.exporter import methods, references
from lvlm_edge.exporter.bundles import plans, ratios
from lvlm_edge.exporter.checkpoints import checkpoint
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError
from lvlm_edge.exporter.planning import fold_all
from lvlm_edge.exporter.proof import as_run, certificate, host, polygraphy, tensors, vision
from lvlm_edge.exporter.proof.cases import Case as Case
from lvlm_edge.exporter.proof.cases import planned_sizes, ranked
from lvlm_edge.exporter.proof.cases import synthetic as synthetic
from lvlm_edge.exporter.proof.judge import SCORE_TOLERANCE, TOLERANCE, answers, apart, close, error_of, judged, kept_set
from lvlm_edge.exporter.proof.judge import Row as Row
from lvlm_edge.exporter.proof.judge import Verdict as Verdict
from lvlm_edge.exporter.references import Reference
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime import bundle as manifests
from lvlm_edge.runtime.bundle import Bundle, WeightFormats
from lvlm_edge.runtime.bundle.kv_cache import PRESENT
from lvlm_edge.runtime.errors import UsageError
from lvlm_edge.runtime.pictures.layout import Picture
from lvlm_edge.runtime.pipeline.inputs import media

Array = NDArray[Any]

PARTS = ("key", "value")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to compare; keyword options of `check`.

    Attributes:
        steps: tokens per prompt, at most the bundle's capacity; behind the longest prompt it is the whole capacity.
        backend: what runs the bundle.
        engines: folder of TensorRT engines; by default this user's own.
        keep_ratio: one of those that the bundle holds; that of its export by default.
        seed: of the made-up prompts and pictures.
        save_polygraphy: folder to write inputs and outputs of every graph to, in polygraphy's formats.
    """

    steps: int = 16
    backend: str = "ort"
    engines: Path | None = None
    keep_ratio: float | None = None
    seed: int = 0
    save_polygraphy: Path | None = None


def check(
    bundle: str | Path,
    against: str | Path,
    *,
    cases: Sequence[Case] | None = None,
    question: tuple[Any, ...] | None = None,
    store: bool = True,
    **options: Any,
) -> Verdict:
    """Compare a bundle with PyTorch running its checkpoint, and store the result in the bundle.

    Args:
        against: checkpoint folder or Hugging Face id.
        cases: prompts; by default `synthetic` ones.
        question: a prompt, its images, and maybe its videos, to compare on too, through the bundle's own
            preprocessing.
        store: write `certificate.json` into the bundle.
        options: fields of `Settings`.

    Raises:
        UsageError: an option that is not known, or no cases.
        InputError: the question does not fit the bundle.
        BundleError: the bundle is damaged or altered.
        CheckpointError: transformers cannot load the checkpoint, or it is not the bundle's.
        UnsupportedError: it is not for the bundle's method.
    """
    settings = fold_all(Settings, options, "check")
    if cases is not None and not cases and question is None:
        raise UsageError("check: no cases are given, expected at least one; leave `cases` out for made-up ones")
    backend, keep_ratio, seed = settings.backend, settings.keep_ratio, settings.seed
    if settings.save_polygraphy is not None:
        polygraphy.check_target(settings.save_polygraphy, backend)
    exact = {"exact": True} if backend == "ort" else {}  # small integers are multiplied as what they stand for
    own: dict[str, Any] = {} if settings.engines is None else {"engines": settings.engines}
    pipe = Pipeline.load(bundle, backend, keep_ratio=keep_ratio, certified=None, portable=True, **exact, **own)
    folder = checkpoint.resolve(against)
    check_fits(pipe.bundle, folder)
    model = references.load(folder, ratios.settings(pipe.bundle.folder).adapter)
    of = checkpoint.Checkpoint.open(folder)
    plan = host.planned(pipe, of)
    sizes = planned_sizes(pipe, ratios.capacity(pipe.bundle.folder))
    around, not_judged = host.compare(pipe, of, plan, references.view(model), sizes, seed)
    around = tensors.compare(pipe, of, plan, model) + around
    cases = synthetic(pipe, seed, sizes) if cases is None else list(cases)
    if question is not None:
        prompt, pixels = pipe.prepare(*question)
        assert pixels is not None
        seen = [pipe.manifest.pictures.index(one.picture) for one in media(pipe.manifest, pixels, prompt=prompt)]
        asked = tuple(sizes[i] for i in seen)
        cases.append(Case(name="question", prompt=tuple(prompt), pixels=pixels, sizes=asked))
    steps = _steps(pipe, cases, settings.steps)
    rounded = ratios.rounded(pipe.bundle.folder) if pipe.manifest.formats.quantized else WeightFormats()
    given = [_run(pipe, model, case, n) for case, n in zip(cases, steps, strict=True)] if rounded.quantized else []
    if given:
        references.quantised.apply(model, rounded, pipe.manifest.dtype)
    rows = around + [row for case, n in zip(cases, steps, strict=True) for row in judged(compare, pipe, model, case, n)]
    rows += _losses(pipe, cases, given)
    if backend in pipe.manifest.variants or (exact and pipe.manifest.formats.quantized):
        quick = Pipeline.load(bundle, backend, keep_ratio=keep_ratio, certified=None, verify=False, **own)
        rows += as_run.compare(quick, model, cases, steps)
    verdict = Verdict(rows=tuple(rows), not_judged=tuple(not_judged))
    if settings.save_polygraphy is not None:
        polygraphy.save(pipe, max(cases, key=lambda case: len(case.prompt)), settings.save_polygraphy)
    if store:
        try:
            certificate.write(pipe, folder, cases, verdict, steps=steps, seed=seed)
        except OSError as error:
            reason = f"{pipe.bundle.folder}: the certificate cannot be written ({error.strerror or error})"
            verdict = replace(verdict, unwritten=f"{reason}; free some space, or correct the folder's mode")
    return verdict


def check_fits(bundle: Bundle, folder: Path) -> None:
    """Raise an error for a checkpoint that cannot be the one that was exported."""
    manifest, of = bundle.manifest, checkpoint.Checkpoint.open(folder)
    _, found, pictures = plans.model(of, ratios.capacity(bundle.folder))
    method = methods.load(manifest.method)
    method.resolve(found, method.config(**manifest.method_config))
    for name, theirs, ours in (
        ("vocabulary", found.decoder.vocab, manifest.embedding.vocab),
        ("hidden size", found.decoder.hidden, manifest.embedding.hidden),
        ("layers", found.decoder.layers, len({_layer(cache) for cache in manifest.cache})),
        ("placeholders", [p.token_id for p in pictures], [p.token_id for p in manifest.pictures]),
        ("visual tokens", sum(p.visual_tokens for p in pictures), manifest.counts.visual_tokens),
        ("projector", not found.reads_features, bool(manifest.image_rows)),
        ("separators", _separators(pictures), _separators(manifest.pictures)),
    ):
        if theirs != ours:
            raise CheckpointError(
                f"{folder}: {name}: {theirs}, the bundle has {ours}; give the checkpoint that was exported"
            )


def _separators(pictures: Sequence[Picture]) -> bool:
    return any(picture.rows("separator") for picture in pictures)


def compare(pipe: Pipeline, model: Any, case: Case, steps: int) -> list[Row]:
    """Every comparison of one case. Each graph is fed what PyTorch had, so that a difference shows where it arises."""
    manifest = pipe.manifest
    run = references.module(manifest.method).run
    pixels = references.given(model, case.pixels, case.sizes)
    expected: Reference = run(model, manifest.method_config, case.prompt, pixels, steps)
    rows = vision.compare(pipe, case, expected, TOLERANCE[manifest.dtype]) + _image_kv(pipe, case, expected)
    pictures = [one.picture for one in vision.seen(pipe, case)]
    inputs = pipe.prefill_inputs(case.prompt, _image_rows(pipe, expected, pictures), pictures)
    rows += _caches(pipe, case, expected, inputs)
    if expected.kept is not None:
        selected, kept = _selection(pipe, case, expected, inputs)
        rows += selected
        if not np.array_equal(kept, expected.kept.numpy()) and all(row.passed for row in rows):
            expected = run(model, manifest.method_config, case.prompt, pixels, steps, kept=torch.from_numpy(kept))
    pipe.forget_images()  # caches may hold what PyTorch made of them
    forced = pipe.score_tokens(case.prompt, case.pixels, expected.tokens)
    answer = pipe.generate_tokens(case.prompt, case.pixels, max_new_tokens=steps, ignore_eos=True)
    if not np.isfinite(forced[0]).all():
        rows.append(_overflow(pipe, case, inputs))
    return (
        rows + answers(case.name, expected, forced, answer.token_ids, TOLERANCE[manifest.dtype]) + _highest(pipe, case)
    )


def _highest(pipe: Pipeline, case: Case) -> list[Row]:
    """The logits that the backend calls the highest, where it looks for them, among all that it computed last."""
    highest = pipe.highest()
    if highest is None:
        return []
    logits = pipe.buffer(pipe.manifest.role("decode")[-1].name, "logits").read().reshape(-1)
    above = np.flatnonzero(logits > highest.scores.min())
    wrong = int((logits[highest.ids] != highest.scores).sum()) + len(np.setdiff1d(above, highest.ids))
    return [Row(case=case.name, stage="highest logits", figure=wrong, bound=0, passed=wrong == 0)]


def _overflow(pipe: Pipeline, case: Case, inputs: dict[str, Array]) -> Row:
    """The first layer whose keys or values of a prompt are not finite, which PyTorch's in float32 are."""
    tensors: dict[str, Array] = dict(inputs)
    for graph in pipe.manifest.role("prefill"):
        tensors |= pipe.run_graph(graph.name, _named(graph, tensors))
    parts = [(cache, part) for cache in pipe.manifest.cache for part in PARTS]
    found = (c for c, part in parts if not np.isfinite(tensors.get(f"{PRESENT}.{c.name}.{part}", np.zeros(1))).all())
    cache = next(found, None)
    where = "behind the last layer" if cache is None else f"first in layer {_layer(cache)}"
    note = f"{where}; activations left the range of {pipe.manifest.dtype}: export with --dtype bfloat16 or float32"
    return Row(case=case.name, stage="finite", figure=1, bound=0, passed=False, note=note)


def _steps(pipe: Pipeline, cases: Sequence[Case], most: int) -> list[int]:
    """Tokens of every case: as asked, and the whole capacity behind the longest prompt."""
    capacity = pipe.manifest.counts.new_tokens
    longest = max(cases, key=lambda case: len(case.prompt))
    return [capacity if case is longest else min(most, capacity) for case in cases]


def _run(pipe: Pipeline, model: Any, case: Case, steps: int) -> Reference:
    """What PyTorch says of a case."""
    run = references.module(pipe.manifest.method).run
    pixels = references.given(model, case.pixels, case.sizes)
    found: Reference = run(model, pipe.manifest.method_config, case.prompt, pixels, steps)
    return found


def _losses(pipe: Pipeline, cases: Sequence[Case], given: Sequence[Reference]) -> list[Row]:
    """What rounded weights cost: answers against the checkpoint's own weights, told and not judged."""
    rows = []
    for case, expected in zip(cases, given, strict=False):
        steps = len(expected.tokens)
        answer = pipe.generate_tokens(case.prompt, case.pixels, max_new_tokens=steps, ignore_eos=True)
        error, same = apart(answer.token_ids, answer.logits, expected.tokens, expected.logits.numpy())
        note = f"{same} of {steps} tokens are the checkpoint's"
        rows.append(Row(case=case.name, stage="loss", figure=error, bound=None, passed=True, note=note))
    return rows


def _image_kv(pipe: Pipeline, case: Case, expected: Reference) -> list[Row]:
    """What caches hold of images before the prompt's rows, made from PyTorch's own features."""
    if expected.image_kv is None:
        return []
    graphs = [g for g in pipe.manifest.role("image") if not any(g.name in p.graphs for p in pipe.manifest.pictures)]
    features = expected.image_features.flatten(0, 1).numpy()[None]
    given = {"image_features": features, "write_index": np.zeros(1, np.int64)}
    outputs: dict[str, Array] = {}
    for graph in graphs:
        outputs |= pipe.run_graph(graph.name, _named(graph, given), length=0)
    found = []
    for cache in pipe.manifest.cache:
        wanted = expected.image_kv[_layer(cache)].numpy()
        own = np.stack([outputs[f"{PRESENT}.{cache.name}.{part}"][0, :, : wanted.shape[2]] for part in PARTS])
        found.append((cache, [error_of(a, b) for a, b in zip(own, wanted, strict=True)]))
    return [_worst(pipe, case, "image K/V", found)]


def _caches(pipe: Pipeline, case: Case, expected: Reference, inputs: dict[str, Array]) -> list[Row]:
    """A row per prefill graph: the prompt's keys and values that it caches, from PyTorch's own image embeddings."""
    if expected.cache is None:
        return []
    rows = []
    for graph in (g for g in pipe.manifest.graphs if g.role == "prefill"):
        outputs = pipe.run_graph(graph.name, _named(graph, inputs), length=0)
        found = []
        for cache in (c for c in pipe.manifest.cache if f"{PRESENT}.{c.name}.key" in outputs):
            start, count = max(0, -cache.dropped), int(inputs["last_index"][0]) + 1 - max(0, cache.dropped)
            parts = [outputs[f"{PRESENT}.{cache.name}.{part}"][0].astype(np.float32) for part in PARTS]
            start = start if parts[0].shape[1] == cache.capacity else 0  # a graph returns a cache, or rows for it
            own = [part[:, start : start + count] for part in parts]
            wanted = [part.numpy() for part in expected.cache[_layer(cache)]]
            found.append((cache, _unordered(own, wanted, TOLERANCE[pipe.manifest.dtype])))
        if found:
            rows.append(_worst(pipe, case, f"{graph.name} caches", found))
    return rows


def _layer(cache: manifests.Cache) -> int:
    """A cache is named after its layer, and after its heads where the layer has several."""
    return int(cache.name.partition(".")[0])


def _unordered(own: list[Array], wanted: list[Array], bound: float) -> list[float]:
    """Errors of cached keys and values, whose rows and heads may stand in another order than the reference's.

    Attention does not ask for an order among what is cached, and a bundle may leave out rows and heads that nobody
    reads, or copy heads, or hold zeros for values that count for nothing. Each row that it has must be one of the
    reference's, keys and values alike; that none is lost shows in the logits.

    Args:
        own: keys and values, [heads, rows, d].
        wanted: the reference's, at least as many rows.
    """
    if len(own[0]) != len(wanted[0]):  # the last row is the same in both
        apart = np.abs(own[0][:, None, -1] - wanted[0][None, :, -1]).max(-1)
        wanted = [part[apart.argmin(1)] for part in wanted]
    surplus = own[0].shape[1] - wanted[0].shape[1]
    if surplus > 0:
        return [float(surplus)] * 2
    errors = [error_of(a, b) for a, b in zip(own, wanted, strict=True)] if own[0].shape == wanted[0].shape else [np.inf]
    if max(errors) <= bound:
        return errors
    a, b = own[0][0], wanted[0][0]
    apart = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    key, value = (part[:, apart.argmin(1)] for part in wanted)
    lost = error_of(b, a[apart.argmin(0)]) if a.shape == b.shape else 0.0
    silent = (own[1] == 0).all(-1, keepdims=True)
    return [max(error_of(own[0], key), lost), error_of(np.where(silent, value, own[1]), value)]


def _worst(pipe: Pipeline, case: Case, stage: str, found: list[tuple[manifests.Cache, list[float]]]) -> Row:
    """One row for several caches, whose note names the first that is wrong."""
    bound = TOLERANCE[pipe.manifest.dtype]
    figure = max(error for _, errors in found for error in errors)
    names = (
        f"layer {c.name}, {part}s" for c, errors in found for part, e in zip(PARTS, errors, strict=True) if e > bound
    )
    first = next(names, None)
    note = "" if first is None else f"first in {first}"
    return Row(case=case.name, stage=stage, figure=figure, bound=bound, passed=first is None, note=note)


def _image_rows(pipe: Pipeline, expected: Reference, pictures: Sequence[Picture]) -> dict[str, Array]:
    """PyTorch's rows of a prompt's images, with the bundle's separators, as the vision graph left them.

    Args:
        pictures: what the prompt's images stand for.
    """
    if not pipe.manifest.image_rows:
        return {}
    runs = [run for p in pictures for run in p.runs if run.kind != "text"]
    kinds = np.concatenate([np.full(run.rows, run.kind == "visual") for run in runs])
    embeds = np.zeros((len(kinds), pipe.manifest.embedding.hidden), np.float32)
    embeds[kinds] = expected.image_embeds.numpy()
    if not kinds.all():
        embeds[~kinds] = pipe.buffer("vision", "image_embeds").read()[0, -1:]
    return {"image_embeds": embeds} | {name: wanted.numpy() for name, wanted in expected.injected.items()}


def _selection(pipe: Pipeline, case: Case, expected: Reference, inputs: dict[str, Array]) -> tuple[list[Row], Array]:
    """Head, scores and kept indices, from PyTorch's own image embeddings."""
    assert expected.hidden is not None and expected.score is not None and expected.kept is not None
    graphs = [g for g in pipe.manifest.graphs if g.role == "prefill"]
    chooses = next(i for i, g in enumerate(graphs) if "kept_visual" in {t.name for t in g.outputs})
    for graph in graphs[:chooses]:
        head = pipe.run_graph(graph.name, _named(graph, inputs))
    real = int(inputs["last_index"][0]) + 1
    select = pipe.run_graph(graphs[chooses].name, _named(graphs[chooses], inputs))
    kept, score, reference = select["kept_visual"], head["score"][0], expected.score.numpy()
    error = float(np.abs(score - reference).max())
    bound = SCORE_TOLERANCE[pipe.manifest.dtype] * float(reference.max())
    rows = [
        _close(pipe, case, "head", head["hidden"][0, :real], expected.hidden),
        Row(case=case.name, stage="scores", figure=error, bound=bound, passed=error <= bound),
        kept_set(case.name, kept, reference, expected.kept.numpy(), error, ranked(pipe, case)),
        _order(case, select, inputs, head["hidden"][0], kept),
    ]
    return rows, kept


def _order(case: Case, select: dict[str, Array], inputs: dict[str, Array], hidden: Array, kept: Array) -> Row:
    """Kept rows must be the hidden rows of text and kept tokens, in sequence order, with their own positions."""
    slots = np.sort(np.concatenate([inputs["text_index"], inputs["visual_index"][np.sort(kept)]]))
    last = int(inputs["last_index"][0]) - (len(inputs["visual_index"]) - len(kept))
    wrong = int((select["kept_position_ids"] != inputs["position_ids"][:, slots]).any(0).sum())
    wrong += int((np.sort(kept) != kept).sum())
    wrong += int((select["kept_hidden"][0] != hidden[slots]).any(1).sum())
    wrong += int(select["kept_last_index"][0] != last)
    return Row(case=case.name, stage="kept order", figure=wrong, bound=0, passed=wrong == 0)


def _close(pipe: Pipeline, case: Case, stage: str, found: Array, expected: torch.Tensor) -> Row:
    return close(case.name, stage, found, expected.numpy(), TOLERANCE[pipe.manifest.dtype])


def _named(graph: manifests.Graph, inputs: dict[str, Array]) -> dict[str, Array]:
    return {t.name: inputs[t.name] for t in graph.inputs if t.name in inputs}
