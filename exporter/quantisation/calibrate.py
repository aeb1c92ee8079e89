"""Checkpoint to quantised checkpoint: INT4 matrices in the decoder's layers, rounded with an eye on pictures.

nvidia-modelopt searches, one matrix at a time, on rows that the model's own matrices read while it looks at the
pictures. AWQ (arXiv:2306.00978) finds a factor for every input channel; it multiplies the matrix and divides whatever
the channel comes from, so that nothing changes until the matrix is rounded. GPTQ (arXiv:2210.17323) lets the columns
that are not rounded yet make up for those that are.

Where AWQ's factors go, and where they do not:

- of q, k and v, and of gate and up: into the norm before them. FastV, ProxyV, YOPO and HiMix read that norm's output
  through these matrices alone; ProxyV's updates read the rows before it, HiMix's images have a norm of their own.
- of down: into the rows of up. YOPO leaves channels out after both.
- of o: into the rows of v, one factor for query heads that share values. Not in HiMix, whose images have values that
  come from another matrix.

What is written is `compressed-tensors` in its format `pack-quantized`. The model is in memory as a whole, in float32,
and beside it up to `ROWS` rows of what each matrix reads.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lvlm_edge.exporter import planning, references
from lvlm_edge.exporter.bundles import atomic, pack
from lvlm_edge.exporter.checkpoints import checkpoint, preprocess, quantise, spec, text
from lvlm_edge.exporter.checkpoints.checkpoint import CheckpointError, Stored
from lvlm_edge.exporter.checkpoints.quantise import Format
from lvlm_edge.exporter.checkpoints.spec import ModelSpec
from lvlm_edge.exporter.references import original
from lvlm_edge.runtime.errors import InputError, LvlmEdgeError, UnsupportedError, UsageError, nearest
from lvlm_edge.runtime.image import open_image
from lvlm_edge.runtime.image import preprocess as prepared
from lvlm_edge.runtime.prompt import Text

ALGORITHMS: dict[str, Any] = {"awq": {"method": "awq_lite", "alpha_step": 0.1}, "gptq": {"method": "gptq"}}
PROMPT = "Describe the picture."
ROWS = 4096  # of a matrix's inputs, drawn from all prompts
# Matrices of a layer that read the same rows, and so have the same factors. Phi-3 has two of these as one.
GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("qkv_proj",),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("gate_up_proj",),
    ("down_proj",),
)
NORMS = {
    "q_proj": "input_layernorm",
    "qkv_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "gate_up_proj": "post_attention_layernorm",
}
MAKERS = {"o_proj": ("v_proj", "qkv_proj"), "down_proj": ("up_proj", "gate_up_proj")}  # in a fused one the last rows
_WEIGHTS = re.compile(r"^(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$")
_SMALL = re.compile(r"\.(weight_packed|weight_scale|weight_shape|qweight|qzeros|g_idx)$")  # of quantised checkpoints
_INDEX = "model.safetensors.index.json"
_FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Sample:
    """A picture and what is asked about it; the answer, where there is one, is read along."""

    picture: Path
    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class Case:
    """A sample as the model reads it: token ids, and float32 pixels [1, 3, H, W]."""

    ids: list[int]
    pixels: Tensor


def quantize(
    source: str | Path,
    output: str | Path,
    *,
    pictures: str | Path,
    algorithm: str = "awq",
    block_size: int = 128,
    samples: int = 128,
    prompt: str = PROMPT,
    seed: int = 0,
    revision: str | None = None,
    force: bool = False,
    progress: pack.Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint of the same family whose decoder layers have INT4 matrices; its other files are copied.

    The model is in memory as a whole, in float32, and beside it 4,096 rows of what every matrix reads: about 40 GB for
    a decoder of 7 B parameters. GPTQ rounds the whole of a matrix once per input channel: seconds for each at widths
    of 1,000, hours at 10,000.

    Args:
        source: checkpoint folder or Hugging Face id.
        output: folder to write; it appears complete or not at all.
        pictures: to calibrate on: a folder, or a JSONL file of `{"image": path, "prompt": text}`, with an `answer` or
            without; paths are relative to the file.
        algorithm: `awq` or `gptq`.
        block_size: input channels that share a scale: 128 where it divides them, or 32. Matrices that neither divides
            stay as they are.
        samples: of the pictures, chosen at random where there are more.
        prompt: what is asked about the pictures of a folder.
        force: replace an output of this function.

    Returns:
        What was done: `matrices` counts them by block size, `kept` names those that stay, `smoothed` says in how many
        layers AWQ's factors are used, by the first matrix that they multiply.

    Raises:
        UsageError: a setting is out of range, or `output` exists.
        InputError: a picture or a line of the JSONL file cannot be used.
        UnsupportedError: an algorithm or model this version does not know, one that is quantised already, or
            nvidia-modelopt is not there.
        CheckpointError: files missing, damaged, or not fitting config.json; no tokenizer.
        LvlmEdgeError: no room on the disk, or too few pictures.
    """
    output, pictures, tell = Path(output), Path(pictures), progress or (lambda *_: None)
    _check_settings(algorithm, block_size, samples, prompt)
    _require_modelopt()
    _check_output(output, force)
    folder = checkpoint.resolve(source, revision)
    if folder.resolve().is_relative_to(output.resolve()) or output.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{output}: and the checkpoint lie in one another; choose another --output")
    config = spec.read_json(folder / "config.json")
    _check_plain(folder, config)
    chosen = read_samples(pictures, prompt, samples, seed)
    model_spec, stored = spec.load(folder), checkpoint.index(folder)
    method = next(iter(model_spec.settings), "none")
    cases = _cases(folder, config, model_spec, chosen)
    with atomic.folder(output) as partial:
        model = references.load(folder)
        rows = gather(model, method, _method_config(model_spec, method), cases, seed, tell)
        made = _convert(model, rows, _keys(stored, model_spec), stored, algorithm, block_size, method, tell)
        del model, rows
        _write(folder, partial, stored, made, config)
    return {
        "output": str(output),
        "source": str(source),
        "algorithm": algorithm,
        "samples": len(chosen),
        "method": method,
        "matrices": {str(size): count for size, count in sorted(Counter(made.blocks.values()).items())},
        "kept": made.kept,
        "smoothed": made.smoothed,
        "bytes": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
    }


@dataclass
class Made:
    """What becomes of a checkpoint.

    Attributes:
        tensors: of the decoder's layers, by their names in the checkpoint.
        blocks: input channels of a scale, by the names of the modules whose matrices are small.
        others: names of the other linear modules.
        kept: those of them that would be small, but that no block divides their input channels.
        smoothed: layers in which AWQ's factors are used, by the first matrix that they multiply.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    smoothed: dict[str, int] = field(default_factory=dict)


# What is asked for.


def _check_settings(algorithm: str, block_size: int, samples: int, prompt: str) -> None:
    if algorithm not in ALGORITHMS:
        raise UnsupportedError(f"algorithm: {algorithm!r} is not supported; {nearest(algorithm, ALGORITHMS)}")
    if block_size not in quantise.BLOCKS:
        raise UsageError(f"block_size: {block_size}, expected {' or '.join(map(str, quantise.BLOCKS))}")
    if samples < 1:
        raise UsageError(f"samples: {samples}, expected at least 1; raise --samples")
    if not prompt.strip():
        raise UsageError("prompt: is empty; ask something")


def _require_modelopt() -> None:
    try:
        with _silent():
            import modelopt.torch.quantization  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"quantize: nvidia-modelopt cannot be imported ({error}); pip install 'lvlm-edge[quantize]'"
        ) from error


def _check_output(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not force:
        raise UsageError(f"{output}: exists; choose another --output, or replace it with --force")
    if not output.is_dir() or (any(output.iterdir()) and not _is_ours(output)):
        raise UsageError(
            f"{output}: is no quantised checkpoint, so --force does not replace it; choose another --output"
        )


def _is_ours(folder: Path) -> bool:
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    given = found.get("quantization_config") if isinstance(found, dict) else None
    return isinstance(given, dict) and given.get("format") == "pack-quantized"


def _check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for a quantised checkpoint. What `text_config` says may be of the decoder's past."""
    if config.get("quantization_config") or any(_SMALL.search(key) for key in checkpoint.index(folder)):
        raise UnsupportedError(f"{folder}: is quantised already; give the checkpoint that it was made from")


def read_samples(pictures: Path, prompt: str, count: int, seed: int) -> list[Sample]:
    """At most `count` samples of a folder or a JSONL file, in its order.

    Raises:
        UsageError: there is none.
        InputError: a line is no sample.
    """
    if pictures.is_dir():
        from PIL import Image

        known = Image.registered_extensions()
        found = [Sample(path, prompt) for path in sorted(pictures.iterdir()) if path.suffix.lower() in known]
    elif pictures.is_file():
        found = _lines(pictures)
    else:
        raise UsageError(f"{pictures}: no such folder or file; give --pictures a folder or a .jsonl file")
    if not found:
        raise UsageError(f"{pictures}: holds no pictures; give some that are like those to come")
    chosen = sorted(random.Random(seed).sample(range(len(found)), min(count, len(found))))
    return [found[i] for i in chosen]


def _lines(file: Path) -> list[Sample]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as text ({error}); give a folder or a .jsonl file") from error
    return [_line(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _line(file: Path, number: int, line: str) -> Sample:
    wanted = 'expected {"image": path, "prompt": text} and perhaps "answer": text; correct the line'
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"{file}: line {number} is no JSON ({error}), {wanted}") from error
    fields = found if isinstance(found, dict) else {}
    values = [fields.get(name) for name in ("image", "prompt", "answer")]
    if not set(fields) <= {"image", "prompt", "answer"} or not all(
        isinstance(value, str) and value.strip() for value in (values if "answer" in fields else values[:2])
    ):
        raise InputError(f"{file}: line {number} is {line.strip()[:80]}, {wanted}")
    return Sample(file.parent / fields["image"], fields["prompt"], fields.get("answer"))


# What the model reads.


def _cases(folder: Path, config: dict[str, Any], model: ModelSpec, samples: Sequence[Sample]) -> list[Case]:
    """Samples through the checkpoint's own chat template, tokenizer and preprocessing, one crop each.

    Raises:
        CheckpointError: it has no tokenizer, or one that cannot be used.
        InputError: a picture cannot be used.
    """
    family = spec.family(model.family)
    where, fit = family.pictures(config, folder)
    how = preprocess.fitted(pack.preprocessing(where, model.vision), fit, model.vision.image_size)
    with tempfile.TemporaryDirectory() as place:
        known = text.copy(folder, Path(place), family.chat_template(config), model.image_token_id)
        if known is None:
            raise CheckpointError(f"{folder}: has no {text.TOKENIZER}, which prompts need; add its tokenizer")
        words = Text.load(Path(place), known)
        return [
            Case(_ids(words, sample), torch.from_numpy(prepared(open_image(sample.picture), how))) for sample in samples
        ]


def _ids(words: Text, sample: Sample) -> list[int]:
    content = [{"type": "image"}, {"type": "text", "text": sample.prompt}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if sample.answer is None:
        return words.encode_chat(messages)
    messages.append({"role": "assistant", "content": [{"type": "text", "text": sample.answer}]})
    return words.encode_chat(messages, add_generation_prompt=False)


def _method_config(model: ModelSpec, method: str) -> dict[str, Any]:
    """A method's settings as its reference takes them."""
    return asdict(planning.make(model, method_name=method, max_text_tokens=1, max_new_tokens=1).config)


def gather(
    model: Any, method: str, method_config: dict[str, Any], cases: Sequence[Case], seed: int, progress: pack.Progress
) -> dict[str, Tensor]:
    """What the matrices of every layer read while a method's reference reads the cases.

    Returns:
        Rows [about ROWS or fewer, in], float32, drawn at random from every case, by the name of a group's first matrix
        and its layer: `layers.0.q_proj`.

    Raises:
        CheckpointError: the model's logits are not finite.
    """
    run, found = references.module(method).run, dict[str, list[Tensor]]()
    generator = torch.Generator().manual_seed(seed)
    with _hooked(original.view(model).decoder.layers, found, -(-ROWS // len(cases)), generator):
        for i, case in enumerate(cases):
            progress("look at pictures", i, len(cases))
            if not run(model, method_config, case.ids, case.pixels, 1).logits.isfinite().all():
                raise CheckpointError("quantize: the checkpoint answers with numbers that are not finite; correct it")
    return {name: torch.cat(pieces) for name, pieces in found.items()}


@contextmanager
def _hooked(layers: Any, found: dict[str, list[Tensor]], share: int, generator: torch.Generator) -> Iterator[None]:
    """Inside the block, up to `share` rows of every input of every group's first matrix are kept."""

    def keep(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2)
            found.setdefault(name, []).append(rows[torch.randperm(len(rows), generator=generator)[:share]].float())

        return hook

    handles = []
    for i, layer in enumerate(layers):
        linears = _linears(layer)
        for names in _groups(linears):
            handles.append(linears[names[0]].register_forward_pre_hook(keep(f"layers.{i}.{names[0]}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """A decoder layer's matrices by their own names."""
    return {n.rpartition(".")[2]: module for n, module in layer.named_modules() if isinstance(module, nn.Linear)}


def _groups(linears: Mapping[str, nn.Linear]) -> list[tuple[str, ...]]:
    return [names for names in GROUPS if names[0] in linears]


# What becomes of the matrices.


def _keys(stored: Mapping[str, Stored], model: ModelSpec) -> dict[str, str]:
    """Names of a checkpoint's tensors by those of `Parts`."""
    rename = spec.family(model.family).rename
    return {rename(key): key for key in stored}


def _convert(
    model: Any,
    rows: dict[str, Tensor],
    keys: Mapping[str, str],
    stored: Mapping[str, Stored],
    algorithm: str,
    block: int,
    method: str,
    progress: pack.Progress,
) -> Made:
    """What is written of all decoder layers; they are changed in place, and rows given up one after the other.

    Raises:
        UnsupportedError: the checkpoint's matrices are not float32, float16 or bfloat16.
        CheckpointError: a matrix that is not finite.
    """
    layers, made = original.view(model).decoder.layers, Made()
    paths = {id(module): path for path, module in model.named_modules()} if isinstance(model, nn.Module) else {}
    for i, layer in enumerate(layers):
        progress(algorithm, i, len(layers))
        linears = _linears(layer)
        names = {name: keys[f"layers.{i}.{name}.weight"] for name in linears}
        dtype = _dtype(stored, next(iter(names.values())))
        read = {group[0]: rows.pop(f"layers.{i}.{group[0]}") for group in _groups(linears)}
        if algorithm == "awq":
            for name in smooth(layer, read, block, dtype, values_elsewhere=method == "himix"):
                made.smoothed[name] = made.smoothed.get(name, 0) + 1
            small = by_nearest(linears, block, dtype)
        else:
            small = by_gptq(linears, read, block, dtype)
        for name, key in names.items():
            path = paths.get(id(linears[name]), key.removesuffix(".weight"))
            if name in small:
                made.blocks[path] = linears[name].in_features // small[name][1].shape[1]
                made.tensors |= _packed(key, *small[name])
            else:
                made.kept.append(path)
        made.tensors |= _rest(layer, f"layers.{i}.", keys, stored, small)
    made.others = [path for path in _modules(model, stored) if path not in made.blocks]
    return made


def _modules(model: Any, stored: Mapping[str, Stored]) -> list[str]:
    """Names of the linear modules: transformers' own, or for the original layouts those of the tensors."""
    if isinstance(model, nn.Module):
        return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = [key for key, tensor in stored.items() if key.endswith(".weight") and len(tensor.shape) == 2]
    found = [key.removesuffix(".weight") for key in weights if "embed" not in key]
    beside_it = not any("vision_tower" in key for key in found)  # a checkpoint of its own
    return found + ["re:.*vision_tower.*"] * beside_it


def _dtype(stored: Mapping[str, Stored], key: str) -> torch.dtype:
    if stored[key].dtype not in _FLOATS:
        raise UnsupportedError(f"{stored[key].file}: {key} is {stored[key].dtype}; known: {', '.join(_FLOATS)}")
    found: torch.dtype = getattr(torch, stored[key].dtype)
    return found


def _rest(
    layer: nn.Module, prefix: str, keys: Mapping[str, str], stored: Mapping[str, Stored], small: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A layer's other tensors, which factors may have gone into: norms, biases, matrices that stay."""
    found = {}
    for name, tensor in layer.state_dict().items():
        *_, module, kind = name.split(".")
        if not (module in small and kind == "weight"):
            key = keys[f"{prefix}{module}.{kind}"]
            found[key] = tensor.to(_dtype(stored, key))
    return found


@torch.no_grad()
def smooth(
    layer: nn.Module, rows: Mapping[str, Tensor], block: int, dtype: torch.dtype, *, values_elsewhere: bool = False
) -> list[str]:
    """Fold AWQ's factors into a decoder layer, in place; it computes what it did before.

    Args:
        rows: what each group of matrices reads, [n, in], by the group's first name.
        block: input channels that will share a scale.
        dtype: what gains will be kept in; they are rounded to it now, and the matrices make up for that.
        values_elsewhere: the attention also sees values that are not the layer's own.

    Returns:
        The first names of the groups that have factors: where rounding comes nearer to what the group computes.
    """
    linears, done = _linears(layer), []
    for names in _groups(linears):
        first = names[0]
        if first == "o_proj" and values_elsewhere:
            continue
        weight = torch.cat([_evened(linears[name].weight, rows[first]) for name in names])
        maker = _maker(linears, first)
        factor = _factor(weight, rows[first], block, dtype, _heads(layer, linears) if first == "o_proj" else None)
        if factor is None:
            continue
        done.append(first)
        if maker is None:
            factor = _divide_gain(getattr(layer, NORMS[first]), factor, dtype)
        else:
            _divide_rows(maker, _heads(layer, linears).once(factor) if first == "o_proj" else factor)
        for name in names:
            linears[name].weight *= factor
    return done


@dataclass(frozen=True)
class Heads:
    """Query heads of a size that share values: `each` of them."""

    size: int
    each: int

    def shared(self, factor: Tensor) -> Tensor:
        """One factor for all query heads that share values, the geometric mean, [heads * size]."""
        return self._view(factor).log().mean(1, keepdim=True).exp().expand(-1, self.each, -1).reshape(-1)

    def once(self, factor: Tensor) -> Tensor:
        """The factors of each head of values, [kv_heads * size]."""
        return self._view(factor)[:, 0].reshape(-1)

    def _view(self, factor: Tensor) -> Tensor:
        return factor.view(-1, self.each, self.size)


def _heads(layer: Any, linears: Mapping[str, nn.Linear]) -> Heads:
    config = layer.self_attn.config
    return Heads(
        linears["o_proj"].in_features // config.num_attention_heads,
        config.num_attention_heads // config.num_key_value_heads,
    )


def _maker(linears: Mapping[str, nn.Linear], name: str) -> nn.Linear | None:
    """The matrix whose last rows make, channel by channel, what `o_proj` or `down_proj` reads; None for a norm's."""
    return next((linears[maker] for maker in MAKERS.get(name, ()) if maker in linears), None)


def _divide_rows(maker: nn.Linear, factor: Tensor) -> None:
    """The last rows of a matrix, and of its bias, over their factors; in a fused matrix others come before them."""
    maker.weight[-len(factor) :] /= factor[:, None]
    if maker.bias is not None:
        maker.bias[-len(factor) :] /= factor


def _divide_gain(norm: Any, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A gain over its factors, rounded to what it will be kept in; returns the factors that it was really divided by.

    A channel whose gain would become 0 is left alone.
    """
    gain = norm.weight.clone()
    kept = (gain / factor).to(dtype).float()
    kept = torch.where(kept == 0, gain, kept)
    norm.weight.copy_(kept)
    return torch.where(kept == 0, torch.ones_like(gain), gain / kept)


def _factor(weight: Tensor, rows: Tensor, block: int, dtype: torch.dtype, heads: Heads | None) -> Tensor | None:
    """AWQ's factors of a matrix's input channels, [in]; None where it does without them, or stays as it is.

    Args:
        weight: [out, in].
        heads: of a matrix that reads them.
    """
    how = _format(weight, block)
    if how is None:
        return None
    linear = _searched(weight, rows, how, "awq")
    factor: Tensor = 1 / linear.input_quantizer.pre_quant_scale.float()
    factor = factor if heads is None else heads.shared(factor)
    ones, exact = torch.ones_like(factor), rows @ weight.T
    with_factor, without = (
        ((rows / f) @ _dequantised(*_nearest(weight * f, how, dtype)).T - exact).square().sum() for f in (factor, ones)
    )
    return factor if with_factor < without else None


def _evened(weight: Tensor, rows: Tensor) -> Tensor:
    """A matrix over the root mean square of what it makes of its rows, so that no matrix of a group outweighs others.

    Blocks of an output channel have scales of their own: rounding is the same at any size.
    """
    return weight / (rows @ weight.T).square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def _format(weight: Tensor, block: int) -> Format | None:
    """INT4 with the block size that divides a matrix's [out, in] input channels; None where none does."""
    how = quantise.fitting("int4", weight.shape[1], block)
    return how if how is not None and how.bits == 4 else None


def _nearest(weight: Tensor, how: Format, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Integers int8 [out, in] and scales [out, in / block] of a float32 matrix, as `export --weights int4` rounds."""
    matrix = weight.T
    scale = quantise.scales(matrix, how, dtype)
    if not scale.isfinite().all():
        raise CheckpointError(f"quantize: a matrix has weights that are not finite or too large for {dtype}; check it")
    return quantise.integers(matrix, scale, how).T, scale.T


def _dequantised(integers: Tensor, scale: Tensor) -> Tensor:
    return integers * scale.float().repeat_interleave(integers.shape[1] // scale.shape[1], 1)


@torch.no_grad()
def by_nearest(linears: Mapping[str, nn.Linear], block: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Integers int8 [out, in] and scales [out, in / block] in `dtype` of matrices, each rounded to nearest."""
    formats = {name: _format(linear.weight, block) for name, linear in linears.items()}
    return {name: _nearest(linears[name].weight, how, dtype) for name, how in formats.items() if how is not None}


@torch.no_grad()
def by_gptq(
    linears: Mapping[str, nn.Linear], rows: Mapping[str, Tensor], block: int, dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    """The same by GPTQ on the rows that they read, [n, in] by a group's first name."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for names in _groups(linears):
        weight = torch.cat([linears[name].weight for name in names])  # rows of a matrix are rounded each by itself
        how = _format(weight, block)
        if how is None:
            continue
        linear = _searched(weight, rows[names[0]], how, "gptq")
        scale = (linear.weight_quantizer.amax.view(len(weight), -1) / quantise.LARGEST[4]).to(dtype)
        scale = scale.clamp_min(torch.finfo(dtype).tiny)
        integers = quantise.integers(linear.weight.T, scale.T, how).T
        sizes = [linears[name].out_features for name in names]
        cut = zip(torch.split(integers, sizes), torch.split(scale, sizes), strict=True)
        found |= dict(zip(names, cut, strict=True))
    return found


def _searched(weight: Tensor, rows: Tensor, how: Format, algorithm: str) -> Any:
    """What nvidia-modelopt makes of a matrix [out, in] that reads rows [n, in]: its own kind of linear module.

    Raises:
        LvlmEdgeError: GPTQ cannot do with these rows.
    """
    import modelopt.torch.quantization as mtq

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    weights = {"num_bits": 4, "block_sizes": {-1: how.block, "type": "static"}}
    settings = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weights},
    ]
    whole = nn.Sequential(linear)
    with _silent() as said:
        mtq.quantize(whole, {"quant_cfg": settings, "algorithm": ALGORITHMS[algorithm]}, lambda model: model(rows))
    if "not positive definite" in said.getvalue():
        raise LvlmEdgeError("quantize: GPTQ learns too little from these pictures; give more of them, or choose awq")
    return whole[0]


@contextmanager
def _silent() -> Iterator[io.StringIO]:
    """What nvidia-modelopt prints, kept from stdout, where --json may be; its warnings are about other uses."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()) as said:
        warnings.simplefilter("ignore")
        yield said


# What is written.


def _packed(key: str, integers: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """A matrix in `pack-quantized`: eight integers to an int32, the first in the lowest bits, each with 8 added."""
    rows, columns = integers.shape
    nibbles = (integers.to(torch.int32) + 8).view(rows, columns // 8, 8) << torch.arange(0, 32, 4, dtype=torch.int32)
    return {
        f"{key}_packed": nibbles.sum(-1, dtype=torch.int32),
        f"{key}_scale": scale,
        f"{key}_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }


def _write(folder: Path, out: Path, stored: Mapping[str, Stored], made: Made, config: dict[str, Any]) -> None:
    """All files of the checkpoint: weights file by file as they lie there, config.json, copies of the rest."""
    _dump(config | {"quantization_config": described(made)}, out / "config.json")
    places: dict[str, str] = {}
    size = 0
    for file in sorted({tensor.file for tensor in stored.values()}):
        tensors = _tensors([key for key, tensor in stored.items() if tensor.file == file], stored, made.tensors)
        place = out / re.sub(r"^(pytorch_)?(.*)\.bin$", r"\2.safetensors", file.name)
        try:
            save_file(tensors, place, metadata={"format": "pt"})
        except SafetensorError as error:
            raise LvlmEdgeError(f"{out.parent}: cannot be written ({error}); free some space") from error
        shutil.copymode(out / "config.json", place)  # it is made for its owner alone
        places |= dict.fromkeys(tensors, place.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(places.values())) > 1:
        _dump({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}, out / _INDEX)
    _copy(folder, out, {tensor.file.name for tensor in stored.values()} | {"config.json"})


def _tensors(keys: Sequence[str], stored: Mapping[str, Stored], made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What stands for some tensors of a checkpoint; each has its own memory."""
    found: dict[str, Tensor] = {}
    for key in keys:
        small = {name: made[name] for name in (f"{key}_packed", f"{key}_scale", f"{key}_shape") if name in made}
        found |= small or {key: made[key] if key in made else checkpoint.read(stored[key])}
    return {key: tensor.contiguous().clone() for key, tensor in found.items()}


def _copy(folder: Path, out: Path, written: set[str]) -> None:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in written or _WEIGHTS.match(path.name):
            continue
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        else:
            shutil.copyfile(path, out / path.name)


def _dump(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def described(made: Made) -> dict[str, Any]:
    """`quantization_config`, as the library compressed-tensors writes it; a group for every block size."""
    sizes = sorted(set(made.blocks.values()), reverse=True)
    named = {size: [path for path, block in made.blocks.items() if block == size] for size in sizes}
    return {
        "config_groups": {
            f"group_{i}": _scheme(named[size] if len(sizes) > 1 else ["Linear"], size) for i, size in enumerate(sizes)
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": made.others,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _scheme(targets: list[str], size: int) -> dict[str, Any]:
    return {
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": targets,
        "weights": {
            "dynamic": False,
            "group_size": size,
            "num_bits": 4,
            "strategy": "group",
            "symmetric": True,
            "type": "int",
        },
    }
