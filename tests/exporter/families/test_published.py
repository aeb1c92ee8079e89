"""Published dimensions, cut to 4 layers of decoder and encoder and filled with random weights, against stock models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvlm_edge.exporter import export, references
from lvlm_edge.runtime import Pipeline
from tests.families import noise
from tests.samples.test_families import PUBLISHED

OTHERS = ("internvl_chat", "qwen")  # which transformers has no models of
STOCK = {name for name, (config, _) in PUBLISHED.PUBLISHED.items() if config["model_type"] not in OTHERS}
LAYERS, TOKENS, SIZE = 4, 32, (672, 448)
DEPTHS = ("num_hidden_layers", "depth")
SPECIAL = {  # text around a picture's visual tokens, by family
    "internvl": ("<img>", "</img>"),
    "idefics3": (
        "<fake_token_around_image>", "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
    ),
}  # fmt: skip


def cut(config: dict[str, Any]) -> dict[str, Any]:
    """A config of fewer layers."""
    found = json.loads(json.dumps(config))
    for part in (found, found.get("text_config", {}), found.setdefault("vision_config", {})):
        part |= {name: LAYERS for name in DEPTHS if name in part}
    seen = found["vision_config"]
    if found["model_type"].startswith("qwen"):
        seen["depth"] = LAYERS
    elif "num_hidden_layers" not in seen and found["model_type"] != "llava_onevision":
        seen["num_hidden_layers"] = LAYERS
    elif found["model_type"] == "llava_onevision":
        found["vision_config"] = PUBLISHED.SIGLIP | {"num_hidden_layers": LAYERS}
    seen |= {name: [1, 2, 3] for name in ("deepstack_visual_indexes",) if name in seen}
    if found["model_type"] == "qwen2_5_vl":
        seen["fullatt_block_indexes"] = [1, 3]
    return found


def checkpoint(name: str, folder: Path) -> Path:
    """A random checkpoint of a stock model in bfloat16, with the config and processor of the published one."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    PUBLISHED.folder(name, folder)
    config = cut(PUBLISHED.PUBLISHED[name][0])
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.5 if "embed_tokens" in key else weight[0].numel() ** -0.5)
    model.save_pretrained(folder / "made")
    for file in (folder / "made").glob("*.safetensors*"):
        shutil.move(file, folder / file.name)
    tokenizer(folder, config)
    return folder


def tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """A tokenizer that knows the image token and what stands around it."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    image = config.get("image_token_id", config.get("image_token_index"))
    around = SPECIAL.get(config["model_type"], ())
    words = {"<unk>": 0, "\n": 1, "\n\n": 2, "<image>": image} | {token: 3 + i for i, token in enumerate(around)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("\n\n", "isolated")
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<image>", *around)])
    made.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}"
    template += "{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind), "utf-8")


@pytest.mark.export
@pytest.mark.parametrize("name", sorted(STOCK))
@pytest.mark.slow
def test_32_greedy_tokens_are_those_of_stock_generate(name, tmp_path):
    folder = checkpoint(name, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    sized = {} if config["model_type"] == "llava" else {"image_size": SIZE}
    bundle = export(folder, tmp_path / "bundle", max_text_tokens=16, max_new_tokens=TOKENS, **sized)
    pipe = Pipeline.load(bundle, verify=False)
    prompt = [7, 8, pipe.manifest.image_token_id, 9, 10, 11, 12]
    pixels = pipe.pixels([noise(SIZE)])[0]

    found = pipe.generate_tokens(prompt, pixels, ignore_eos=True)

    model = references.view(references.load(folder))
    with torch.no_grad():
        tokens, logits = model.answer(prompt, references.given(model, pixels, [SIZE]), TOKENS)
    close = np.abs(found.logits - logits.numpy()).max() / np.abs(logits.numpy()).max()
    assert found.token_ids == tokens
    assert close < 1e-3
