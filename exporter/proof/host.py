"""What the host does around the graphs, against the checkpoint: plan, pictures, prompts, answers, embedding."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_edge.exporter.bundles import graph_set, plans, ratios
from lvlm_edge.exporter.checkpoints import text
from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint, read_json
from lvlm_edge.exporter.planning import Plan
from lvlm_edge.exporter.proof.judge import CHECKPOINT, Row, close
from lvlm_edge.exporter.references.original import Original
from lvlm_edge.runtime import Pipeline
from lvlm_edge.runtime.bundle import sha256
from lvlm_edge.runtime.pipeline.inputs import user_turn

QUESTION = "What is shown here? 1 <2> déjà vu"


def compare(
    pipe: Pipeline, of: Checkpoint, plan: Plan, model: Original, sizes: Sequence[tuple[int, int]], seed: int
) -> tuple[list[Row], list[str]]:
    """Rows, and what could not be judged.

    Args:
        of: the checkpoint.
        plan: of the bundle, made from it.
        model: the reference.
        sizes: (width, height) of the made-up pictures and videos.
        seed: of these pictures.
    """
    folder = of.folder
    rows = [
        _equal("config", pipe.manifest.provenance.config_sha256, sha256(folder / "config.json")),
        *(_equal(stage, found, wanted) for stage, found, wanted in _settings(pipe, plan)),
        _ends(pipe, folder, plan.family.chat_template(of)),
        _generation(pipe, folder),
    ]
    prompt, pixels = list(_prompt(pipe, of, plan)), list(_pixels(pipe, of, model, sizes, seed))
    missing = [what for what, found in ((NO_PROMPT, prompt), (NO_PIXELS, pixels)) if not found]
    return rows + prompt + pixels, missing


NO_PROMPT = "prompt: the checkpoint has no tokenizer.json"
NO_PIXELS = "pixels: transformers has no image processor that makes this checkpoint's pictures; settings were judged"


def _equal(stage: str, found: Any, wanted: Any, note: str = "") -> Row:
    same = _plain(found) == _plain(wanted)
    return Row(case=CHECKPOINT, stage=stage, figure=float(not same), bound=0, passed=same, note="" if same else note)


def _plain(value: Any) -> Any:
    """A value as JSON has it, so that tuples are lists."""
    return json.loads(json.dumps(value, default=asdict))


def planned(pipe: Pipeline, of: Checkpoint) -> Plan:
    """The plan of the export made again from the checkpoint, with what the bundle was asked for."""
    folder, manifest = pipe.bundle.folder, pipe.manifest
    capacity = ratios.capacity(folder)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest.method_config.items()}
    return plans.make(
        plans.model(of, capacity),
        capacity,
        ratios.settings(folder),
        method=manifest.method,
        options=options,
        formats=manifest.formats,
    )


def _settings(pipe: Pipeline, plan: Plan) -> Iterator[tuple[str, Any, Any]]:
    """Fields of the manifest, and what they are by the plan."""
    manifest = pipe.manifest
    for name, wanted in graph_set.planned(plan).items():
        yield name, getattr(manifest, name), wanted
    yield "positions", manifest.axes, plan.axes
    yield "preprocessing", manifest.pictures, plan.pictures
    yield "precision", (manifest.dtype, manifest.lowering), (plan.dtype, plan.lowering.name)


def _ends(pipe: Pipeline, folder: Path, published: str | None) -> Row:
    """End-of-sequence ids: those of generation_config.json, else of config.json; and what closes published answers."""
    config = read_json(folder / "config.json")
    path = folder / "generation_config.json"
    sources = (read_json(path) if path.is_file() else {}, config, config.get("text_config") or {})
    ids: Any = next((s["eos_token_id"] for s in sources if s.get("eos_token_id") is not None), [])
    wanted = set(ids) if isinstance(ids, list) else {ids}
    found = set(pipe.manifest.eos_token_ids)
    more = set(text.turn_end(pipe.bundle.folder, published)) if pipe.manifest.text is not None else set()
    note = f"{sorted(found)}, the checkpoint has {sorted(wanted)}"
    return _equal("end of sequence", sorted(found), sorted(wanted | more), note)


def _generation(pipe: Pipeline, folder: Path) -> Row:
    """What answers are drawn with by default: that of generation_config.json, by transformers' rules."""
    path = folder / "generation_config.json"
    given = {name: value for name, value in (read_json(path) if path.is_file() else {}).items() if value is not None}
    wanted = {"temperature": 0, "top_k": 0, "top_p": 1, "repetition_penalty": given.get("repetition_penalty", 1)}
    if given.get("do_sample"):
        drawn = (("temperature", 1), ("top_k", 50), ("top_p", 1))
        wanted |= {name: given.get(name, default) for name, default in drawn}
    found = asdict(pipe.manifest.generation)
    return _equal("generation defaults", found, wanted, f"{found}, the checkpoint has {wanted}")


def _prompt(pipe: Pipeline, of: Checkpoint, plan: Plan) -> Iterator[Row]:
    """Tokenizer, chat template and the token ids of a question."""
    found, folder = pipe.manifest.text, pipe.bundle.folder
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        published = plan.family.chat_template(of)
        chosen = plan.settings.chat_template if plan.family.own_template else "published"
        image, video = plan.spec.image_token_id, plan.spec.video_token_id
        wanted = text.copy(of.folder, out, published, image, chosen, video_token_id=video)
        if found is None or wanted is None:
            if found is not wanted:
                yield _equal("tokenizer", found, wanted)
            return
        yield _equal("tokenizer", sha256(folder / found.tokenizer), sha256(out / wanted.tokenizer))
        template = (out / wanted.chat_template).read_text("utf-8")
        yield _equal("chat template", (folder / found.chat_template).read_text("utf-8"), template)
        yield _equal("special tokens", found, wanted)
        counts = pipe.manifest.counts
        messages = user_turn(QUESTION, counts.num_images, None, videos=counts.num_videos)
        yield _equal("prompt ids", pipe.encode(messages), _encoded(out, wanted, template, messages))


def _encoded(folder: Path, config: Any, template: str, messages: list[Any]) -> list[int]:
    """Token ids as transformers makes them, an image's placeholder standing for itself."""
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": config.bos_token or None, "eos_token": config.eos_token or None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / config.tokenizer), **special)
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    starts = bool(config.bos_token) and rendered.startswith(config.bos_token)
    if config.image_token_id >= 0:
        return list(tokenizer(rendered, add_special_tokens=not starts)["input_ids"])
    ids = [] if starts else tokenizer("", add_special_tokens=True)["input_ids"]
    for i, piece in enumerate(rendered.split(config.image_token)):
        ids += ([config.image_token_id] if i else []) + tokenizer(piece, add_special_tokens=False)["input_ids"]
    return list(ids)


def _pixels(
    pipe: Pipeline, of: Checkpoint, model: Original, sizes: Sequence[tuple[int, int]], seed: int
) -> Iterator[Row]:
    """Made-up pictures and frames through transformers' image processor, where the checkpoint names one."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor

    named = [name for name in ("preprocessor_config.json", "processor_config.json") if (of.folder / name).is_file()]
    if model.processed is None or not named:
        return
    rng = np.random.default_rng(seed)
    counts = [picture.views.frames for picture in pipe.manifest.pictures]
    made = [rng.integers(0, 256, (n or 1, h, w, 3), np.uint8) for n, (w, h) in zip(counts, sizes, strict=True)]
    pictures = [Image.fromarray(frame) for frames in made for frame in frames]
    images = [frames[0] for frames, count in zip(made, counts, strict=True) if not count]
    videos = [frames for frames, count in zip(made, counts, strict=True) if count]
    processor = AutoImageProcessor.from_pretrained(of.folder, backend="pil", local_files_only=True)
    given: Any = [pictures] if len(pictures) > 1 and _joins(processor) else pictures
    wanted = np.asarray(processor(images=given, return_tensors="np", **model.processed)["pixel_values"])
    seen = pipe.pixels(images, videos)
    own = np.concatenate([model.as_processor(torch.from_numpy(views)).numpy() for views in seen])
    wanted = wanted.reshape(-1, *own.shape[1:])
    if len(wanted) > len(own):  # views of zeros, where pictures have different numbers of them
        wanted = wanted[[bool(view.any()) for view in wanted]]
    yield close(CHECKPOINT, "pixels", own, wanted, 1e-6)


def _joins(processor: Any) -> bool:
    """Whether an image processor takes the pictures of a conversation as one list."""
    return "batch_num_images" in getattr(processor, "model_input_names", ())
