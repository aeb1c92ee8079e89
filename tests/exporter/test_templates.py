"""The published conversation formats, against what they write literally."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lvlm_edge.exporter.checkpoints.checkpoint import Checkpoint
from lvlm_edge.exporter.checkpoints.templates import TEMPLATES
from lvlm_edge.exporter.families import llava_llama, tinyllava
from lvlm_edge.runtime.prompt import chat_template

CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
SEES = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
ASKED = {
    "v1": f"{CHAT} USER: <image>\nWho? ASSISTANT:",
    "llava_llama_3": (
        f"<bos><|start_header_id|>system<|end_header_id|>\n\n{SEES}<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\n<image>\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "qwen_1_5": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "phi3_instruct": (
        "<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n<image>\nWho?<|end|>\n<|assistant|>\n"
    ),
    "tinyllama": f"{CHAT} USER: <image>\nWho? ASSISTANT:",
    "llama-3": f"{CHAT} USER: <image>\nWho? ASSISTANT:",
    "qwen2_base": f"{CHAT} USER: <image>\nWho? ASSISTANT:",
}
# What follows the question in a second turn, after the answer "It's me."
AGAIN = {
    "v1": " It's me.</s>USER: Really? ASSISTANT:",
    "llava_llama_3": (
        "It's me.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nReally?<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n"
    ),
    "qwen_1_5": "It's me.<|im_end|>\n<|im_start|>user\nReally?<|im_end|>\n<|im_start|>assistant\n",
    "phi3_instruct": "It's me.<|end|>\n<|user|>\nReally?<|end|>\n<|assistant|>\n",
    "tinyllama": " It's me.</s>USER: Really? ASSISTANT:",
    "llama-3": " It's me.<|end_of_text|>USER: Really? ASSISTANT:",
    "qwen2_base": " It's me.<|endoftext|>USER: Really? ASSISTANT:",
}
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}


def rendered(name: str, *messages: object, ask: bool = True) -> str:
    template = chat_template.compile_template(TEMPLATES[name], Path("template"))
    return template.render(messages=list(messages), add_generation_prompt=ask, bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_question_is_asked_as_published(name):
    assert rendered(name, QUESTION) == ASKED[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_goes_on_as_published(name):
    answer, again = {"role": "assistant", "content": "It's me."}, {"role": "user", "content": "Really?"}

    assert rendered(name, QUESTION, answer, again) == ASKED[name] + AGAIN[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_message_takes_the_place_of_the_published_one(name):
    system = {"role": "system", "content": "Be brief."}

    found = rendered(name, system, QUESTION)

    assert found == ASKED[name].replace(CHAT, "Be brief.").replace(SEES, "Be brief.").replace(
        "You are a helpful AI assistant.", "Be brief."
    ).replace("You are a helpful assistant.", "Be brief.")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_string_and_a_list_of_parts_say_the_same(name):
    parts = {"role": "user", "content": [{"type": "text", "text": "it's {{ 'me' }}\n\\n"}]}

    assert rendered(name, parts) == rendered(name, {"role": "user", "content": parts["content"][0]["text"]})


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"architectures": ["LlavaLlamaForCausalLM"], "vocab_size": 32000}, "v1"),
        ({"architectures": ["LlavaLlamaForCausalLM"], "vocab_size": 128256}, "llava_llama_3"),
        ({"architectures": ["LlavaQwenForCausalLM"], "vocab_size": 151646}, "qwen_1_5"),
        ({"architectures": ["LlavaPhiForCausalLM"], "vocab_size": 32064}, "phi3_instruct"),
        ({"architectures": None, "model_type": "llava_phi3"}, "phi3_instruct"),
        ({"architectures": ["LlavaLlamaForCausalLM"], "version": "qwen_1_5"}, "qwen_1_5"),
    ],
    ids=json.dumps,
)
def test_the_decoder_chooses_the_format_of_llava(config, name):
    assert llava_llama.chat_template(Checkpoint(Path(), {"model_type": "llava_llama", **config})) == TEMPLATES[name]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ({"model_type": "llama", "vocab_size": 32000}, "tinyllama"),
        ({"model_type": "llama", "vocab_size": 128256}, "llama-3"),
        ({"model_type": "qwen2", "vocab_size": 151936}, "qwen2_base"),
    ],
    ids=json.dumps,
)
def test_the_decoder_chooses_the_format_of_tinyllava(text, name):
    assert tinyllava.chat_template(Checkpoint(Path(), {"text_config": text})) == TEMPLATES[name]
