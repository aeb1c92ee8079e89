"""What an export is asked for: capacities and settings, whose fields are the flags of the command line.

A field's metadata holds the flag's help and, where it takes one of several words, these words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from lvlm_edge.exporter.checkpoints import quantise
from lvlm_edge.runtime.bundle import FORMATS, WIDTHS, WeightFormats
from lvlm_edge.runtime.errors import UnsupportedError, UsageError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FLOAT = "float"  # matrices in the bundle's dtype, also where the checkpoint's are integers
WEIGHTS = (*FORMATS, FLOAT)
LARGEST = {  # what can be counted and traced
    "num_images": 4096, "num_videos": 4096, "num_frames": 4096, "max_text_tokens": 1 << 22, "max_new_tokens": 1 << 22,
}  # fmt: skip
LARGEST_SIDE = 1 << 16  # of a picture, in pixels
TEMPLATES = ("checkpoint", "published")
MAX_GRAPH_GB = 8.0  # a graph's weights: one of 12.4 GB took 20.3 GB to build, one of 13.2 GB more than 22.8 GB
Size = tuple[int, int]

T = TypeVar("T", bound="DataclassInstance")


class PlanError(UsageError):
    """A method's setting or a capacity is out of range."""


def setting(default: Any, text: str, choices: tuple[str, ...] = (), metavar: str = "", shown: str = "") -> Any:
    """A field with its help text, and the words that it takes.

    Args:
        shown: what the help says of the default, where its value does not tell.
    """
    of_default = {"default": shown} if shown else {}
    return field(default=default, metadata={"help": text, "choices": choices, "metavar": metavar} | of_default)


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a prompt and its answer may hold; fixed at export."""

    num_images: int = setting(
        None, "Images in a prompt, at least 1, or 0 beside videos.", shown="1, or 0 with --num-videos"
    )
    num_videos: int = setting(0, "Videos in a prompt, 0 or more. video_llava only.")
    num_frames: int | None = setting(
        None, "Frames of each video, at least 1. Longer videos are sampled evenly.", shown="8, as in training"
    )
    max_text_tokens: int = setting(
        256, "Text tokens of a prompt, at least 1: beside images and videos, begin-of-sequence included."
    )
    max_new_tokens: int = setting(128, "Tokens of an answer, at least 1.")
    image_size: tuple[Size, ...] = setting(
        (),
        "Width and height in pixels of the images that the bundle is for. Required where the visual tokens depend on "
        "it: LLaVA-NeXT, LLaVA-OneVision, InternVL, SmolVLM, Qwen2-VL and later; chooses the tiles of LLaVA's original "
        "any-resolution layouts. May be given once per image, for images of several sizes.",
        metavar="WxH",
    )
    grid: tuple[int, int] | None = setting(
        None,
        "Rows and columns of tiles; replaces --image-size for InternVL, SmolVLM, and LLaVA's original any-resolution "
        "layouts.",
        metavar="RxC",
    )

    def __post_init__(self) -> None:
        given: Any = self.image_size
        images: Any = self.num_images
        if len(given) == 2 and all(isinstance(side, int) for side in given):  # one size, as (width, height)
            given = (given,)
        object.__setattr__(self, "image_size", tuple(tuple(size) for size in given))
        if images is None:
            sized = len(self.image_size) or int(self.grid is not None)
            object.__setattr__(self, "num_images", sized if self.num_videos else 1)
        self._check_counts()
        for width, height in self.image_size:
            if min(width, height) < 1 or max(width, height) > LARGEST_SIDE:
                raise PlanError(
                    f"plan: --image-size is {width}x{height}; give width x height in pixels, up to {LARGEST_SIDE} each"
                )
        if (self.image_size or self.grid) and not self.num_images:
            raise PlanError("plan: --image-size and --grid are for images, but --num-images is 0; leave them out")
        if self.image_size and self.grid is not None:
            raise PlanError("plan: --image-size and --grid both decide the tiles; give one of them")
        if len(self.image_size) > 1 and len(self.image_size) != self.num_images:
            if self.num_images != 1:
                raise PlanError(
                    f"plan: {len(self.image_size)} sizes of pictures for {self.num_images} images; give one "
                    "--image-size for all, or one for each"
                )
            object.__setattr__(self, "num_images", len(self.image_size))

    def _check_counts(self) -> None:
        for name, most in LARGEST.items():
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            least = 0 if name == "num_videos" or (name == "num_images" and self.num_videos) else 1
            if value is not None and value < least:
                raise PlanError(f"plan: {name} is {value}, expected at least {least}; raise {flag}")
            if value is not None and value > most:
                raise PlanError(f"plan: {name} is {value}, expected at most {most}; lower {flag}")
        if self.num_frames is not None and not self.num_videos:
            raise PlanError("plan: --num-frames is for videos; give --num-videos too, or leave it out")

    @property
    def sizes(self) -> tuple[Size | None, ...]:
        """The size of each planned image; None where none was given."""
        if not self.image_size:
            return (None,) * self.num_images
        return self.image_size if len(self.image_size) > 1 else self.image_size * self.num_images


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Precision, formats and lowering of an export."""

    dtype: str = setting(
        "float32",
        "Precision of activations, caches and unquantised weights: float32, float16 or bfloat16.",
        tuple(WIDTHS),
    )
    vision_dtype: str | None = setting(
        None,
        "Precision of the vision encoder and projector: float32, float16 or bfloat16; by default that of --dtype. "
        "Trained encoders of some families overflow in float16.",
        tuple(WIDTHS),
    )
    lowering: str = setting(
        "modern",
        "ONNX operators of the graphs: modern (opset 24) or legacy (opset 18, TensorRT 10.3).",
        ("modern", "legacy"),
    )
    share_weights: bool = setting(
        False,
        "Run prompt and decode in the same graphs, so that TensorRT engines, and ONNX Runtime's sessions of INT8 and "
        "INT4 matrices, hold the decoder's weights once and not twice; ONNX Runtime's tokens then take longer. Methods "
        "none and fastv, modern lowering.",
    )
    max_graph_gb: float = setting(
        MAX_GRAPH_GB,
        "Weights that one decoder graph may hold, in GB, above 0; a larger decoder is split into several graphs.",
    )
    weights: str = setting(
        "as-is",
        "Format of the decoder's matrices: as-is (also integers that the checkpoint stores), float (dequantize), int8 "
        "(a scale per output channel) or int4 (a scale per block of input channels).",
        WEIGHTS,
    )
    vision_weights: str = setting(
        "as-is", "Format of the vision encoder's and projector's matrices: as-is, float, int8 or int4.", WEIGHTS
    )
    head_weights: str | None = setting(
        None,
        "Format of lm_head's matrix: as-is, float, int8 or int4; by default int8 where the decoder's matrices are "
        "int8 or int4, else the decoder's format.",
        WEIGHTS,
    )
    prompt_weights: str | None = setting(
        None,
        "Format of the decoder's INT4 matrices in ONNX Runtime's graphs of prompts: int8 (prompts take about half the "
        "time; the bundle holds these matrices twice). By default int4. --dtype float32, without --share-weights.",
        ("int8",),
    )
    block_size: int = setting(128, "Input channels that share an INT4 scale: 128 where it divides them, or 32.")
    adapter: str | None = setting(
        None,
        "Folder of a LoRA adapter, as peft saves it, to merge into CHECKPOINT's matrices. `check` merges it too.",
    )
    chat_template: str = setting(
        TEMPLATES[0],
        "Chat template of the bundle: checkpoint (its own, or the published one of its family where it has none) or "
        "published.",
        TEMPLATES,
    )

    def __post_init__(self) -> None:
        for name in ("dtype", "vision_dtype"):
            value = getattr(self, name)
            if value not in WIDTHS and not (name == "vision_dtype" and value is None):
                raise UnsupportedError(f"{name}: {value!r} is not supported; {nearest(str(value), WIDTHS)}")
        if not self.max_graph_gb > 0:
            raise PlanError(f"plan: max_graph_gb is {self.max_graph_gb:g}, expected more than 0; raise --max-graph-gb")
        for name in ("weights", "vision_weights", "head_weights"):
            value = getattr(self, name)
            if value not in WEIGHTS and not (name == "head_weights" and value is None):
                raise UnsupportedError(f"{name}: {value!r} is not supported; {nearest(str(value), WEIGHTS)}")
        if self.prompt_weights not in (None, "int8"):
            raise UnsupportedError(f"prompt_weights: {self.prompt_weights!r} is not supported; expected int8")
        if self.block_size not in quantise.BLOCKS:
            raise PlanError(f"block_size: {self.block_size}, expected 32 or 128")
        if self.chat_template not in TEMPLATES:
            raise UnsupportedError(
                f"chat_template: {self.chat_template!r} is not supported; {nearest(str(self.chat_template), TEMPLATES)}"
            )

    @property
    def requested(self) -> WeightFormats:
        """The formats that are asked for; `float` and `as-is` differ where the checkpoint has integers."""
        head = self.head_weights
        if head is None:
            head = self.weights if self.weights in ("as-is", FLOAT) else "int8"
        return WeightFormats(
            decoder=self.weights,
            vision=self.vision_weights,
            head=head,
            block=self.block_size,
            prompt=self.prompt_weights,
        )


def fold_all(record: type[T], options: Mapping[str, Any], where: str) -> T:
    """A record from keyword options, each of which is a field.

    Args:
        where: the function's name, which messages begin with.

    Raises:
        UsageError: an option that is no field.
    """
    known = [f.name for f in dataclasses.fields(record)]
    for name in options:
        if name not in known:
            raise UsageError(f"{where}: option {name!r} is not known; {nearest(name, known)}")
    return record(**options)


def fold(record: type[T], options: Mapping[str, Any]) -> tuple[T, dict[str, Any]]:
    """A record from the keyword options that are its fields, and the options that are not; None means not given."""
    names = {f.name for f in dataclasses.fields(record)}
    own = {key: value for key, value in options.items() if key in names and value is not None}
    return record(**own), {key: value for key, value in options.items() if key not in names}
