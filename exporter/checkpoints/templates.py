"""Chat templates of the published conversation formats, for checkpoints that bring none of their own.

Source: `conversation.py` of LLaVA, LLaVA-NeXT and ProxyV; `data/template/` of TinyLLaVA-Factory.
"""

from __future__ import annotations

CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SEES = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
PLACEHOLDER = "<image>"  # where an image stands in a prompt
BRACKETS = ("<im_start>", "<im_end>")  # around it, in models of LLaVA that were trained with `mm_use_im_start_end`

_IMAGES = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
)
_TEXTS = "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"


def _template(
    system: tuple[str, str, str],
    user: tuple[str, str],
    assistant: tuple[str, str],
    *,
    before: str = "",
    ask: str | None = None,
    trim: bool = False,
) -> str:
    """A Jinja template.

    Args:
        system: what opens the system message, the message where a conversation has none, what closes it.
        user: what opens and closes a question.
        assistant: what opens and closes an answer.
        before: an expression written before everything.
        ask: what comes before an answer that is to be generated; by default what opens an answer.
        trim: take white space off the ends of every message.
    """
    opened, default, closed = map(_quoted, system)
    trimmed = "{% set content = content | trim %}" if trim else ""
    content = (
        "{% set content %}{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}" + _IMAGES + _TEXTS + "{% endif %}{% endset %}" + trimmed
    )
    roles = "".join(
        f"{{% {word} message['role'] == '{role}' %}}{{{{ {start} }}}}{{{{ content }}}}{{{{ {end} }}}}"
        for word, role, start, end in (
            ("if", "system", opened, closed),
            ("elif", "user", *map(_quoted, user)),
            ("elif", "assistant", *map(_quoted, assistant)),
        )
    )
    return (
        (f"{{{{ {before} }}}}" if before else "")
        + f"{{% if messages[0]['role'] != 'system' %}}{{{{ {opened} + {default} + {closed} }}}}{{% endif %}}"
        + "{% for message in messages %}"
        + content
        + roles
        + "{% else %}{{ raise_exception('role ' + message['role'] + ' is not known') }}{% endif %}{% endfor %}"
        + f"{{% if add_generation_prompt %}}{{{{ {_quoted(assistant[0] if ask is None else ask)} }}}}{{% endif %}}"
    )


def turns(roles: tuple[str, str, str], end: str, system: str, *, image: str, before: str = "") -> str:
    """A Jinja template of messages `role, content, end`, whose contents have their parts in order.

    Args:
        roles: what opens a system message, a question, and an answer.
        system: the message where a conversation has none.
        image: what stands for an image.
        before: a variable that is written before everything where it is known.
    """
    names = dict(zip(("system", "user", "assistant"), roles, strict=True))
    opened = "".join(
        f"{{% {'if' if i == 0 else 'elif'} message['role'] == '{name}' %}}{{{{ {_quoted(role)} }}}}"
        for i, (name, role) in enumerate(names.items())
    )
    default = _quoted(roles[0] + system + end)
    return (
        (f"{{% if {before} is defined %}}{{{{ {before} }}}}{{% endif %}}" if before else "")
        + f"{{% if messages[0]['role'] != 'system' %}}{{{{ {default} }}}}{{% endif %}}"
        + "{% for message in messages %}"
        + opened
        + "{% else %}{{ raise_exception('role ' + message['role'] + ' is not known') }}{% endif %}"
        + "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        + "{% for part in message['content'] %}"
        + f"{{% if part['type'] == 'image' %}}{{{{ {_quoted(image)} }}}}"
        + "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        + f"{{{{ {_quoted(end)} }}}}{{% endfor %}}"
        + f"{{% if add_generation_prompt %}}{{{{ {_quoted(roles[2])} }}}}{{% endif %}}"
    )


def _quoted(text: str) -> str:
    """A Jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _vicuna(end: str) -> str:
    """`USER: ... ASSISTANT: ...` after a system sentence, answers closed by `end`."""
    return _template(("", CHAT, " "), ("USER: ", " "), ("ASSISTANT: ", end), ask="ASSISTANT:")


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


# What closes an answer, in whichever of these formats.
ENDS = ("</s>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>")
TEMPLATES = {
    "v1": _vicuna("</s>"),
    # The release's evaluation gets the first token twice, from the template and the tokenizer; training had it once.
    "llava_llama_3": _template(
        (_header("system"), SEES, "<|eot_id|>"),
        (_header("user"), "<|eot_id|>"),
        (_header("assistant"), "<|eot_id|>"),
        before="bos_token",
        trim=True,
    ),
    "qwen_1_5": _template(
        ("<|im_start|>system\n", "You are a helpful assistant.", "<|im_end|>\n"),
        ("<|im_start|>user\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "<|im_end|>\n"),
    ),
    "phi3_instruct": _template(
        ("<|system|>\n", "You are a helpful AI assistant.", "<|end|>"),
        ("\n<|user|>\n", "<|end|>"),
        ("\n<|assistant|>\n", "<|end|>"),
    ),
    "tinyllama": _vicuna("</s>"),
    "llama-3": _vicuna("<|end_of_text|>"),
    "qwen2_base": _vicuna("<|endoftext|>"),
}


def bracketed(template: str) -> str:
    """A template of `TEMPLATES` with a token before and after every image."""
    return template.replace(PLACEHOLDER, PLACEHOLDER.join(BRACKETS))


PUBLISHED = frozenset({*TEMPLATES.values(), *map(bracketed, TEMPLATES.values())})
