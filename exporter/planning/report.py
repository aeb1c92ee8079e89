"""The plan as `plan --json` prints it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lvlm_edge.exporter.planning import counts
from lvlm_edge.exporter.planning.plan import Plan, dense


def model(plan: Plan) -> dict[str, Any]:
    """The model's dimensions."""
    d = plan.spec.decoder
    return {
        "family": plan.spec.family,
        "layers": d.layers,
        "hidden": d.hidden,
        "heads": d.heads,
        "kv_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "ffn": d.ffn,
        "vocab": d.vocab,
    }


def stages(plan: Plan) -> list[dict[str, Any]]:
    """Counts of every stage."""
    return [
        {"layers": [s.layers.start, s.layers.stop - 1], "queries": s.queries, "keys": s.keys, "cached": s.cached}
        for s in plan.stages
    ]


def report(plan: Plan) -> dict[str, Any]:
    """Method, model, stages, bytes, FLOPs, and the column of the method's paper."""
    unreduced = dense(plan)
    encoders, projector = counts.vision_parts(plan)
    vision = sum(encoder.weights + encoder.folded for encoder in encoders)
    return {
        "method": plan.method.name,
        "config": asdict(plan.config),
        "model": model(plan),
        "dtype": plan.dtype,
        "vision_dtype": plan.vision_dtype,
        "num_images": sum(picture.kind == "image" for picture in plan.pictures),
        "num_videos": sum(picture.kind == "video" for picture in plan.pictures),
        "crops": plan.pictures[0].views.count,
        "canvases": [list(picture.views.canvas.size) for picture in plan.pictures],
        "separators": plan.prompt.separators,
        "visual_tokens": plan.visual_tokens,
        "kept_visual_tokens": plan.kept_tokens,
        "removed_share": 1 - plan.kept_tokens / plan.visual_tokens,
        "text_tokens": plan.text_tokens,
        "new_tokens": plan.new_tokens,
        "stages": stages(plan),
        "parameters": {
            "vision": vision,
            "projector": projector.weights + projector.folded,
            **counts.decoder_parameters(plan.spec.decoder),
        },
        "weights_bytes": counts.weights_bytes(plan),
        "prompt_weights_bytes": counts.prompt_bytes(plan),
        "kv_cache_bytes": plan.kv_cache_bytes(),
        "kv_cache_bytes_dense": unreduced.kv_cache_bytes(),
        "flops": {
            "vision": counts.vision_flops(plan),
            "projector": counts.projector_flops(plan),
            "prefill": counts.prefill_flops(plan),
            "prefill_dense": counts.prefill_flops(unreduced),
            "decode_per_token": counts.decode_flops(plan),
        },
        "paper": plan.method.paper(plan),
    }
