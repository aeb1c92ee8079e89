"""One contender of `peers.py`, in a process and a Python of its own: answers seeds on stdin with times on stdout.

Every seed is a fresh picture and prompt of 676 tokens with 576 visual, and 16 greedy tokens. Times begin with the
picture as the model reads it, normalised, and end with a token's id. The first answer has the first token's logits too,
by which the weights are compared. OpenVINO: the three models of an `optimum-intel`
export (encoder, embedding, decoder with its own cache) in OpenVINO's runtime, without GenAI's tokenizer and scheduler.
llama.cpp: its encoder (mtmd) and its decoder, which gets all rows of the prompt in one batch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

TEXT, BEFORE, NEW, VISUAL, SIDE = 100, 35, 16, 576, 336
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Answer = tuple[float, float, np.ndarray]  # seconds to the first token and per token after it, the first token's logits
Contender = Callable[[int], Answer]


def prompt(seed: int, image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens before and after the picture, and the picture, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, image, TEXT)
    return ids[:BEFORE], ids[BEFORE:], rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def normalised(picture: np.ndarray) -> np.ndarray:
    """Pixel values, float32 [1, 3, H, W]."""
    values = (picture / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def image_token(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text("utf-8"))["image_token_index"]


def answer(began: float, logits: np.ndarray, following: Callable[[int, int], np.ndarray]) -> Answer:
    """Times from `began` on, the first logits being found; `following` gives those after a token at a length."""
    token, kept = int(logits.argmax()), logits.copy()
    first = time.perf_counter()
    for i in range(NEW - 1):
        token = int(following(token, TEXT + VISUAL + i).argmax())
    return first - began, (time.perf_counter() - first) / (NEW - 1), kept


def openvino(folder: Path, precision: str, threads: int) -> Contender:
    import openvino as ov

    core = ov.Core()
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    names = ("vision_embeddings", "text_embeddings", "language")
    vision, table, decoder = (
        core.compile_model(folder / f"openvino_{n}_model.xml", "CPU", options).create_infer_request() for n in names
    )
    image = image_token(folder)

    def rows(ids: np.ndarray) -> np.ndarray:
        return table.infer([ids[None]])[table.model_outputs[0]].copy()

    def step(embeds: np.ndarray, length: int) -> np.ndarray:
        inputs = {"inputs_embeds": embeds, "attention_mask": np.ones((1, length), np.int64)}
        inputs |= {"position_ids": np.arange(length - embeds.shape[1], length)[None], "beam_idx": np.zeros(1, np.int32)}
        return decoder.infer(inputs)[decoder.model_outputs[0]][0, -1]

    def once(seed: int) -> Answer:
        before, after, picture = prompt(seed, image)
        pixels = normalised(picture)
        decoder.reset_state()
        began = time.perf_counter()
        seen = vision.infer([pixels])[vision.model_outputs[0]].copy()
        embeds = np.concatenate([rows(before), seen.reshape(1, VISUAL, -1), rows(after)], 1)
        return answer(
            began, step(embeds, TEXT + VISUAL), lambda token, length: step(rows(np.array([token])), length + 1)
        )

    return once


def transformers(folder: Path, precision: str, threads: int) -> Contender:
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.set_num_threads(threads)
    dtype = getattr(torch, precision)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    image = model.config.image_token_id

    @torch.no_grad()
    def once(seed: int) -> Answer:
        before, after, picture = prompt(seed, image)
        tokens = torch.tensor([[*before, *[image] * VISUAL, *after]])
        pixels = torch.from_numpy(normalised(picture)).to(dtype)
        began = time.perf_counter()
        out = model(input_ids=tokens, pixel_values=pixels, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values

        def following(token: int, _: int) -> np.ndarray:
            out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            return out.logits[0, -1].float().numpy()

        return answer(began, out.logits[0, -1].float().numpy(), following)

    return once


def llama(folder: Path, kinds: str, threads: int) -> Contender:
    """`kinds`: formats of decoder and encoder, `Q4_0 Q8_0`."""
    decoder, encoder = kinds.split()
    step = LlamaDecoder(folder / f"decoder-{decoder}.gguf", threads)
    look = LlamaEncoder(folder / f"vision-{encoder}.gguf", step.model, threads)
    table, image = np.load(folder / "embedding.npy"), image_token(folder)

    def once(seed: int) -> Answer:
        before, after, picture = prompt(seed, image)
        chunk = look.chunk(picture)
        step.forget()
        began = time.perf_counter()
        logits = step.rows(np.concatenate([table[before], look.rows(chunk), table[after]]))
        found = answer(began, logits, step.token)
        look.free(chunk)
        return found

    return once


class LlamaDecoder:
    """llama.cpp's decoder with its cache."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.lib = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"{path}: llama.cpp does not load it"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 768, TEXT + VISUAL, TEXT + VISUAL
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, f"{path}: llama.cpp makes no context"
        self.size = llama_cpp.llama_model_n_embd(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.prompt = llama_cpp.llama_batch_init(TEXT + VISUAL, self.size, 1)
        self.single = llama_cpp.llama_batch_init(1, 0, 1)

    def forget(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def rows(self, embeds: np.ndarray) -> np.ndarray:
        """Logits after a prompt, given as rows of the embedding."""
        self._place(self.prompt, 0, len(embeds))
        np.ctypeslib.as_array(self.prompt.embd, embeds.shape)[:] = embeds
        return self._run(self.prompt)

    def token(self, token: int, length: int) -> np.ndarray:
        """Logits after a token."""
        self._place(self.single, length, 1)
        self.single.token[0] = token
        return self._run(self.single)

    def _place(self, batch: Any, start: int, count: int) -> None:
        batch.n_tokens = count
        for i in range(count):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = start + i, 1, 0, i == count - 1

    def _run(self, batch: Any) -> np.ndarray:
        code = self.lib.llama_decode(self.context, batch)
        assert code == 0, f"llama_decode: {code}"
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.vocabulary,))


class LlamaEncoder:
    """llama.cpp's vision encoder and projector."""

    def __init__(self, path: Path, model: Any, threads: int) -> None:
        from llama_cpp import llama_model_n_embd, mtmd_cpp

        self.lib, self.size = mtmd_cpp, llama_model_n_embd(model)
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.warmup = False, threads, False
        self.context = mtmd_cpp.mtmd_init_from_file(str(path).encode(), model, params)
        assert self.context, f"{path}: llama.cpp does not load it"

    def chunk(self, picture: np.ndarray) -> Any:
        """A picture as the encoder reads it; to be freed."""
        import ctypes

        data = picture.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = self.lib.mtmd_bitmap_init(picture.shape[1], picture.shape[0], data)
        part = ctypes.pointer(self.lib.mtmd_input_part(None, bitmap))
        chunks = self.lib.mtmd_input_chunks_init()
        code = self.lib.mtmd_tokenize_from_parts(self.context, chunks, (type(part) * 1)(part), 1, False)
        assert code == 0, f"mtmd_tokenize_from_parts: {code}"
        self.lib.mtmd_bitmap_free(bitmap)
        return chunks

    def rows(self, chunks: Any) -> np.ndarray:
        """The picture's rows, [576, D]."""
        only = self.lib.mtmd_input_chunks_get(chunks, 0)
        count = self.lib.mtmd_input_chunk_get_n_tokens(only)
        assert count == VISUAL, f"{count} rows of a picture, expected {VISUAL}"
        code = self.lib.mtmd_encode_chunk(self.context, only)
        assert code == 0, f"mtmd_encode_chunk: {code}"
        return np.ctypeslib.as_array(self.lib.mtmd_get_output_embd(self.context), (VISUAL, self.size))

    def free(self, chunks: Any) -> None:
        self.lib.mtmd_input_chunks_free(chunks)


def bundle(folder: Path, ratio: str, threads: int) -> Contender:
    from lvlm_edge.runtime import Pipeline

    pipe = Pipeline.load(folder, keep_ratio=float(ratio) if ratio else None, threads=threads)
    image = pipe.manifest.image_token_id

    def once(seed: int) -> Answer:
        before, after, picture = prompt(seed, image)
        ids, pixels = [*before, image, *after], normalised(picture)
        found = pipe.generate_tokens(ids, pixels, max_new_tokens=NEW, ignore_eos=True, logits=seed == 0)
        logits = np.zeros(0) if found.logits is None else found.logits[0]
        return found.seconds["first_token"], found.seconds["decode"] / (NEW - 1), logits

    return once


# By kind: what makes the contender, and the packages whose versions are told.
KINDS: dict[str, tuple[Callable[[Path, str, int], Contender], tuple[str, ...]]] = {
    "transformers": (transformers, ("transformers", "torch")),
    "openvino": (openvino, ("openvino", "optimum-intel")),
    "llama": (llama, ("llama-cpp-python",)),
    "bundle": (bundle, ("onnxruntime",)),
}


def main(kind: str, folder: str, setting: str, threads: str) -> None:
    """A line with versions once the contender is loaded, then a line for every seed."""
    make, packages = KINDS[kind]
    once = make(Path(folder), setting, int(threads))
    print(json.dumps({name: version(name) for name in packages}), flush=True)
    for line in sys.stdin:
        first, each, logits = once(int(line))
        print(json.dumps([first, each, [] if int(line) else logits.tolist()]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
