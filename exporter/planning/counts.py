"""FLOPs and bytes of a plan: 2 x multiply-accumulate, full attention rectangles, also where masked."""

from __future__ import annotations

from typing import Protocol

from lvlm_edge.exporter.checkpoints import quantise
from lvlm_edge.exporter.checkpoints.spec import DecoderSpec
from lvlm_edge.exporter.planning.plan import BYTES, Plan, decoder_weights
from lvlm_edge.exporter.planning.records import Stage
from lvlm_edge.exporter.planning.work import Work

INT8 = quantise.Format(8)


class Layer(Protocol):
    """The dimensions of a decoder layer."""

    @property
    def hidden(self) -> int: ...
    @property
    def ffn(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def vision_work(plan: Plan) -> tuple[tuple[int, Work, Work], ...]:
    """Of each planned image: its views, the encoder's work per view, and the projector's for all of them."""
    return tuple((p.views.count, *plan.family.work(plan.spec, p)) for p in plan.pictures)


def vision_flops(plan: Plan) -> int:
    """FLOPs of the vision encoder over all views of all images."""
    return sum(views * encoder.flops for views, encoder, _ in vision_work(plan))


def projector_flops(plan: Plan) -> int:
    """FLOPs of the projector over all images; none where there is no projector."""
    return sum(projector.flops for _, _, projector in vision_work(plan))


def vision_parts(plan: Plan) -> tuple[tuple[Work, ...], Work]:
    """Work of each vision encoder, and of the projector, whose weights count once."""
    seen = vision_work(plan)
    return tuple({encoder.part: encoder for _, encoder, _ in seen}.values()), seen[0][2]


def vision_weights(plan: Plan) -> tuple[int, int]:
    """Numbers of weights of the vision encoders and of the projector, each counted once."""
    encoders, projector = vision_parts(plan)
    return sum(encoder.weights for encoder in encoders), projector.weights


def layer_flops(d: DecoderSpec, queries: int, keys: int) -> int:
    """FLOPs of one decoder layer: every row projected and fed forward, each query against each key."""
    dq, dkv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    return 2 * queries * (2 * d.hidden * dq + 2 * d.hidden * dkv + 3 * d.hidden * d.ffn) + 4 * queries * keys * dq


def prefill_flops(plan: Plan) -> int:
    """FLOPs of the decoder over the padded prompt, with lm_head on the one emitted row."""
    d = plan.spec.decoder
    return sum(stage_flops(d, stage) for stage in plan.stages) + head_flops(d)


def head_flops(d: DecoderSpec) -> int:
    """FLOPs of lm_head on one row."""
    return 2 * d.hidden * d.vocab


def stage_flops(d: DecoderSpec, stage: Stage) -> int:
    """FLOPs of a prefill stage's layers, without lm_head."""
    if stage.flops is not None:
        return stage.flops
    scores = 2 * stage.scored * d.heads * d.head_dim
    return len(stage.layers) * layer_flops(d, stage.queries, stage.keys) + scores


def decode_flops(plan: Plan) -> int:
    """FLOPs of one decoded token, attending to full caches."""
    d = plan.spec.decoder
    attended = sum(4 * len(g.queries) * d.head_dim * plan.capacity_of(g) for g in plan.all_groups())
    return d.layers * layer_flops(d, 1, 0) + attended + head_flops(d)


def weights_bytes(plan: Plan) -> int:
    """Bytes of every weight the graphs and the embedding read, each counted once; without rotary tables.

    A quantised head is not the embedding's table, which stays in the plan's dtype.
    """
    d, width = plan.spec.decoder, BYTES[plan.dtype]
    encoders, projector = vision_parts(plan)
    seen = sum(
        work.bytes(BYTES[plan.vision_dtype], lambda shape: _matrix_bytes(plan, "vision", shape))
        for work in (*encoders, projector)
    )
    w = decoder_weights(d)
    matrices = d.layers * sum(_matrix_bytes(plan, "decoder", shape) for shape in layer_matrices(d)) + prompt_bytes(plan)
    head = _matrix_bytes(plan, "head", (d.hidden, d.vocab))
    table = w.head * (1 if not d.tied or plan.formats.head != "as-is" else 0)
    others = d.layers * w.vectors + w.norm + table + plan.method.own_weights(plan)
    return seen + matrices + head + others * width


def prompt_bytes(plan: Plan) -> int:
    """Bytes of the decoder's matrices that graphs of prompts have in a format of their own, a method's own left out."""
    if plan.formats.prompt is None:
        return 0
    d, block = plan.spec.decoder, plan.formats.block
    small = [shape for shape in layer_matrices(d) if quantise.fitting(plan.formats.decoder, shape[0], block) != INT8]
    return d.layers * sum(_matrix_bytes(plan, "prompt", shape) for shape in small)


def layer_matrices(d: Layer) -> tuple[tuple[int, int], ...]:
    """Shapes of the matrices [in, out] of a decoder layer, in the order in which they are read."""
    dq, dkv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    attention = ((d.hidden, dq), (d.hidden, dkv), (d.hidden, dkv), (dq, d.hidden))
    return *attention, (d.hidden, d.ffn), (d.hidden, d.ffn), (d.ffn, d.hidden)


def _matrix_bytes(plan: Plan, part: str, shape: tuple[int, int]) -> int:
    """Bytes of a matrix [in, out] of a part, in its format; zero points of the checkpoint's take as many as scales."""
    dtype = plan.vision_dtype if part == "vision" else plan.dtype
    how = quantise.fitting(getattr(plan.formats, part), shape[0], plan.formats.block)
    if how is None:
        return shape[0] * shape[1] * BYTES[dtype]
    stored = plan.spec.prequantised
    shifted = getattr(plan.settings.requested, part) == "as-is" and stored is not None and not stored.symmetric
    return how.integer_bytes(shape) + how.scale_bytes(shape, dtype) * (2 if shifted else 1)


def decoder_parameters(d: DecoderSpec) -> dict[str, int]:
    """Numbers of weights of the decoder with its embedding, and of lm_head; none for a head that is the embedding."""
    w = decoder_weights(d)
    return {
        "decoder": d.layers * (w.matrices + w.vectors) + w.norm + w.head,
        "head": 0 if d.tied else w.head,
    }
