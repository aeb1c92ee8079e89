"""easy-VQA (PyPI `easy-vqa`, MIT) as pictures, questions and labels; used to train and to evaluate the sample."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import easy_vqa
import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
SIZE = 96  # pixels after preprocessing
MEAN = STD = 0.5

TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ ' ' if message['role'] == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Split:
    """One split of the data set.

    Attributes:
        pictures: uint8 [N, SIZE, SIZE, 3], resized as the checkpoint's preprocessor does.
        questions: (question, answer, picture index).
        labels: per picture (shape index, colour index), -1 where no question tells it.
    """

    pictures: np.ndarray
    questions: list[tuple[str, str, int]]
    labels: np.ndarray


def prompt(question: str) -> str:
    """The text the model was trained on, as the chat template renders it."""
    return f"USER: <image>\n{question} ASSISTANT:"


def load(name: str) -> Split:
    """The split `train` or `test`."""
    paths, asked = {
        "train": (easy_vqa.get_train_image_paths, easy_vqa.get_train_questions),
        "test": (easy_vqa.get_test_image_paths, easy_vqa.get_test_questions),
    }[name]
    files = paths()
    pictures = np.stack([read(Path(files[i])) for i in range(len(files))])
    questions = list(zip(*asked(), strict=True))
    return Split(pictures, questions, _labels(questions, len(files)))


def read(path: Path) -> np.ndarray:
    """A square picture as uint8 [SIZE, SIZE, 3], up-scaled bicubically."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def normalise(pictures: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1]."""
    return ((pictures.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)


def _labels(questions: list[tuple[str, str, int]], count: int) -> np.ndarray:
    labels = np.full((count, 2), -1)
    for question, answer, picture in questions:
        if answer in SHAPES:
            labels[picture, 0] = SHAPES.index(answer)
        elif answer in COLORS:
            labels[picture, 1] = COLORS.index(answer)
        elif asserts(question) == (answer == "yes"):  # the named shape or colour is there
            for column, words in enumerate((SHAPES, COLORS)):
                named = [w for w in words if re.search(rf"\b{w}\b", question)]
                if named:
                    labels[picture, column] = words.index(named[0])
    return labels


def asserts(question: str) -> bool:
    """Whether `yes` to this question means that the thing is there (False for negated questions)."""
    return not re.search(r"\b(not|no)\b", question)


def tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer, lower-casing, in which every word of `texts` is one token."""
    result = Tokenizer(models.BPE())
    result.normalizer = normalizers.Lowercase()
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    result.train_from_iterator(texts, trainer)
    bos = ("<s>", result.token_to_id("<s>"))
    result.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])
    return result
