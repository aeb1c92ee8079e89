"""Which tensors of a bundle are the host's."""

from __future__ import annotations

from lvlm_edge.runtime.backends import host_tensors
from lvlm_edge.runtime.bundle import Graph, TensorInfo


def graph(name: str, role: str, inputs: str, outputs: str) -> Graph:
    def infos(names: str) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(each, "float32", (1,)) for each in names.split())

    return Graph(name=name, file=f"{name}.onnx", role=role, inputs=infos(inputs), outputs=infos(outputs), names={})


DECODE = graph("decode", "decode", "inputs_embeds past_key_values.0.key", "logits present.0.key")


def test_what_passes_between_graphs_stays_on_the_device():
    graphs = [
        graph("vision", "image", "pixel_values", "image_embeds"),
        graph("head", "prefill", "inputs_embeds", "hidden score present.0.key"),
        graph("tail", "prefill", "hidden score visual_index", "logits kept_visual"),
        DECODE,
    ]

    found = host_tensors(graphs)

    assert found == {"pixel_values", "image_embeds", "inputs_embeds", "visual_index", "logits", "kept_visual"}


def test_the_host_collects_what_the_encoder_says_of_each_crop():
    graphs = [
        graph("vision", "image", "pixel_values", "image_features"),
        graph("image_caches", "image", "image_features write_index", "present.0.key"),
        graph("prefill", "prefill", "inputs_embeds past_key_values.0.key", "logits present.0.key"),
        DECODE,
    ]

    found = host_tensors(graphs)

    assert found == {"pixel_values", "image_features", "write_index", "inputs_embeds", "logits"}
