"""Seeded damage to what users bring: `python tests/fuzz.py --cases 10000`, or `make fuzz CASES=10000`.

A case is a kind and a seed. It ends in an answer or in one LvlmEdgeError, within its time limit. Where the damage
cannot change the answer, the answer is that of the undamaged input. A case that fails prints how to rerun it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script
    sys.path.append(str(ROOT))

from lvlm_edge.runtime import Pipeline  # noqa: E402
from lvlm_edge.runtime.errors import LvlmEdgeError  # noqa: E402
from lvlm_edge.runtime.pictures.image import FORMATS  # noqa: E402
from tests import checkpoints, eager, tiny  # noqa: E402

SECONDS = 20  # of a case; a chat template that does not end takes 5
CODES = (1, 2, 3, 4, 5)  # of the errors of the command line
PROMPT = "w5 w6"
VALUES: tuple[Any, ...] = (
    0,
    -1,
    1,
    3,
    29,
    10**6,
    10**30,
    1e308,
    -0.5,
    0.5,
    True,
    None,
    "",
    "x",
    "<image>",
    "\ud800",
    [],
    {},
)
VALUES = (*VALUES, [[]], {"a": 1}, "float16", 2**63, "../x", "\x1b[31m")


class TooSlowError(BaseException):
    """A case takes longer than its time limit."""


class FaultError(AssertionError):
    """A case ended as it must not."""


@dataclass(frozen=True)
class Subject:
    """What cases damage copies of.

    Attributes:
        checkpoint: of tokenizer, picture settings and weights.
        bundle: made of it.
        pipe: the bundle, undamaged.
        picture: a picture of noise, as PNG.
        answer: tokens of `PROMPT` about the picture.
        scratch: a folder for damaged copies.
    """

    checkpoint: Path
    bundle: Path
    pipe: Pipeline
    picture: bytes
    answer: list[int]
    scratch: Path


def subject(checkpoint: Path, bundle: Path, scratch: Path) -> Subject:
    """The undamaged files, and what they answer."""
    torch.set_num_threads(1)
    pipe = Pipeline.load(bundle)
    picture = tiny.picture(scratch / "picture.png").read_bytes()
    return Subject(checkpoint, bundle, pipe, picture, pipe.generate(PROMPT, [picture]).token_ids, scratch)


# Damage.


def spoilt_bytes(content: bytes, dice: random.Random) -> bytes:
    """Bytes changed, cut, doubled, put in or taken out."""
    out = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8, 40))):
        at = dice.randrange(len(out)) if out else 0
        how = dice.randrange(6)
        if how == 0 and out:
            out[at] = dice.randrange(256)
        elif how == 1 and out:
            out[at] ^= 1 << dice.randrange(8)
        elif how == 2:
            del out[at:]
        elif how == 3:
            out[at:at] = dice.randbytes(dice.choice((1, 4, 100)))
        elif how == 4:
            del out[at : at + dice.choice((1, 4, 100))]
        else:
            out[at:at] = out[at : at + dice.choice((1, 16, 400))]
    return bytes(out)


def spoilt_json(content: Any, dice: random.Random) -> Any:
    """Values of nested lists and objects exchanged, removed, doubled or made of another type."""
    content = copy.deepcopy(content)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        place = content
        while isinstance(place, dict | list) and place:
            key = dice.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], dict | list) and place[key] and dice.random() < 0.85:
                place = place[key]
                continue
            change(place, key, dice)
            break
    return content


def change(place: Any, key: Any, dice: random.Random) -> None:
    """One value of a list or an object."""
    how = dice.randrange(5)
    if how == 0:
        del place[key]
    elif how == 1 and isinstance(place, list):
        place.insert(key, copy.deepcopy(place[dice.randrange(len(place))]))
    elif how == 2 and isinstance(place, dict):
        place[f"{key}x"] = place.pop(key)
    elif how == 3 and isinstance(place[key], int | float) and abs(place[key]) < 1e300:
        place[key] = dice.choice((-place[key], place[key] + 1, place[key] * 2, place[key] * 1000, place[key] / 3))
    else:
        place[key] = copy.deepcopy(dice.choice(VALUES))


def shuffled(content: Any, dice: random.Random) -> Any:
    """The same JSON with the keys of its objects in another order."""
    if isinstance(content, dict):
        return {key: shuffled(content[key], dice) for key in dice.sample(list(content), len(content))}
    return [shuffled(each, dice) for each in content] if isinstance(content, list) else content


def text(dice: random.Random) -> str:
    """A prompt: words, special tokens, and characters from all of Unicode, unpaired surrogates too."""
    pieces = [
        "w5",
        "w6 ",
        " ",
        "\n",
        "<image>",
        "<s>",
        "</s>",
        "USER:",
        "ASSISTANT:",
        "{{",
        "{% for %}",
        "\x00",
        "\x1b]0;",
    ]
    pieces += [
        "\u202e",
        "\ufeff",
        "é",
        "e\u0301",
        "👩‍👩‍👧",
        "\ufffd",
        "\ue000",
        "\U000f0000",
        "\U0010ffff",
        "\\",
        "'",
        '"',
        "<image",
        ">",
    ]
    return "".join(
        chr(dice.randrange(0x110000)) if dice.random() < 0.2 else dice.choice(pieces)
        for _ in range(dice.choice((0, 1, 2, 5, 20, 60)))
    )


EIGHT_BITS = ("RGB", "L", "RGBA", "LA", "P", "1", "CMYK")


# Kinds of cases: what is damaged. Each returns whether it was answered.


def pictures(of: Subject, dice: random.Random) -> bool:
    """A picture file. One that Pillow reads as the same pixels gets the same answer."""
    size = (dice.randrange(1, 64), dice.randrange(1, 64))
    mode = dice.choice(("RGB", "RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16", "F"))
    noise = np.random.default_rng(dice.randrange(2**32)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    made = PIL.Image.fromarray(noise)
    made = made.convert("L").convert("I").convert(mode) if mode == "I;16" else made.convert(mode)
    kind, file = dice.choice(("PNG", "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")), io.BytesIO()
    try:
        made.save(file, kind)
    except (OSError, ValueError, KeyError):  # not every format holds every mode
        made.convert("RGB").save(file := io.BytesIO(), kind)
    good = file.getvalue()
    bad = good if dice.random() < 0.1 else spoilt_bytes(good, dice)
    try:
        found = of.pipe.generate(PROMPT, [bad]).token_ids
    except LvlmEdgeError as error:
        if bad == good and kind in FORMATS and mode in EIGHT_BITS:
            raise FaultError(f"refuses a good {kind} of mode {mode}: {error}") from error
        raise
    if decoded(bad) == decoded(good) and found != of.pipe.generate(PROMPT, [good]).token_ids:
        raise FaultError("another answer to the same pixels")
    return True


def decoded(content: bytes) -> tuple[Any, ...]:
    """What Pillow says of a picture that can change what is seen of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with PIL.Image.open(io.BytesIO(content)) as picture:
            about = (picture.info.get("transparency"), dict(picture.getexif()))
            return picture.mode, picture.size, picture.convert("RGBA").tobytes(), about


def prompts(of: Subject, dice: random.Random) -> bool:
    """A prompt and a system message. What a user types is text: no placeholder, no end of sequence."""
    if dice.random() < 0.1 and of.pipe.generate(PROMPT, [of.picture]).token_ids != of.answer:
        raise FaultError("another answer than before the other cases")
    prompt, system = text(dice), text(dice) if dice.random() < 0.3 else None
    ids, _ = of.pipe.prepare(prompt, [of.picture], system=system)
    manifest = of.pipe.manifest
    if ids.count(manifest.pictures[0].token_id) != 1 or set(ids) & set(manifest.eos_token_ids):
        raise FaultError(f"special tokens of a user's text: {ids}")
    found = of.pipe.generate(prompt, [of.picture], system=system).token_ids
    if found != of.pipe.generate_tokens(*of.pipe.prepare(prompt, [of.picture], system=system)).token_ids:
        raise FaultError("two answers to one prompt")
    return True


FREE = (
    ["--stats"],
    ["--no-verify"],
    ["--threads", "1"],
    ["--temperature", "0"],
    ["--top-k", "3", "--temperature", "0"],
)
FREE = (*FREE, ["--top-p", "1"], ["--repetition-penalty", "1"], ["--seed", "7"], ["--max-new-tokens", "8"], ["--fit"])
WORDS = (
    "0",
    "1",
    "-1",
    "8",
    "9",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "0.25",
    "",
    "x",
    "--",
    "-",
    "é",
    "1,2",
    "1x2",
    "99999999999999",
)
WORDS = (*WORDS, "0x10", "1_0", "float16", "fastv", "trt", "ort", "data:,x", "data:image/png;base64,AAAA", "http://")


def options(of: Subject, dice: random.Random) -> bool:
    """A command line. Options that do not concern the answer do not change it."""
    picture = of.scratch / "picture.png"
    asked = ["run", str(of.bundle), "--image", str(picture), "--prompt", PROMPT, "--json"]
    free = [word for option in dice.sample(FREE, dice.randrange(3)) for word in option]
    if dice.random() < 0.2:
        done = command(*asked, *free)
        if done is None or json.loads(done)["token_ids"] != of.answer:
            raise FaultError(f"another answer with {free}")
        return True
    names = [option for each in commands()["run"].params for option in each.opts if option.startswith("--")]
    wrong = [word for _ in range(dice.choice((1, 1, 2, 4))) for word in (dice.choice(names), dice.choice(WORDS))]
    if dice.random() < 0.3:
        name = dice.choice(("plan", "inspect", "devices"))
        names = [option for each in commands()[name].params for option in each.opts if option.startswith("--")]
        place = {"plan": [str(of.checkpoint)], "inspect": [str(of.bundle)], "devices": []}[name]
        asked, wrong = [name, *place], [dice.choice(names), *dice.sample(WORDS, dice.randrange(3))]
    return command(*[*asked, *free, *wrong]) is not None


def commands() -> Any:
    """The commands of the command line, by name."""
    from lvlm_edge.exporter.commands.main import main

    return main.commands  # type: ignore[attr-defined]


def command(*arguments: str) -> str | None:
    """What a command prints; None where it ends with one line and the exit code of an error."""
    done = tiny.cli(*arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    if done.exit_code == 0:
        return str(done.stdout)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.exit_code not in CODES or len(lines) != 1 or not lines[0].startswith("lvlm-edge: "):
        raise FaultError(f"exit code {done.exit_code}, {done.stderr!r}")
    return None


def copied(of: Subject) -> Path:
    """A copy of the bundle to spoil: of graphs and weights made once, of all else as often as it is asked for."""
    folder = of.scratch / "bundle"
    if not folder.is_dir():
        shutil.copytree(of.bundle, folder)
        eager.moved(of.bundle, folder)
    for path in of.bundle.iterdir():
        if path.suffix not in (".onnx", ".bin"):
            shutil.copy(path, folder)
    return folder


def signed(of: Subject, name: str, content: bytes, *, harmless: bool) -> bool:
    """A bundle with another file whose hash is right."""
    folder = copied(of)
    (folder / name).write_bytes(content)
    tiny.sign(folder)
    return said_of(folder, of, harmless=harmless)


def said_of(folder: Path, of: Subject, *, harmless: bool) -> bool:
    """Whether a bundle answers; one that was not harmed has to, and as it did."""
    try:
        found = Pipeline.load(folder).generate(PROMPT, [of.picture]).token_ids
    except LvlmEdgeError as error:
        if harmless:
            raise FaultError(f"refuses what is not damaged: {error}") from error
        raise
    if harmless and found != of.answer:
        raise FaultError("another answer to what is not damaged")
    return True


def tokenizers(of: Subject, dice: random.Random) -> bool:
    """tokenizer.json. The order of its keys, truncation and padding do not matter."""
    good = (of.bundle / "tokenizer.json").read_bytes()
    content, harmless = json.loads(good), dice.random() < 0.2
    if harmless:
        content["truncation"] = dice.choice(
            (None, {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0})
        )
        return signed(
            of,
            "tokenizer.json",
            json.dumps(shuffled(content, dice), indent=dice.choice((None, 3))).encode(),
            harmless=True,
        )
    if dice.random() < 0.4:
        return signed(of, "tokenizer.json", spoilt_bytes(good, dice), harmless=False)
    return signed(of, "tokenizer.json", json.dumps(spoilt_json(content, dice)).encode(), harmless=False)


def templates(of: Subject, dice: random.Random) -> bool:
    """A chat template. Comments do not matter."""
    good = (of.bundle / "chat_template.jinja").read_text("utf-8")
    if dice.random() < 0.15:
        return signed(of, "chat_template.jinja", f"{{# {dice.random()} #}}{good}".encode(), harmless=True)
    if dice.random() < 0.4:
        return signed(of, "chat_template.jinja", spoilt_bytes(good.encode(), dice), harmless=False)
    words = [
        "{{ ",
        " }}",
        "{% ",
        " %}",
        "{%- for m in messages %}",
        "{% endfor %}",
        "{% if x %}",
        "{% endif %}",
        "messages[0]",
        "|length",
    ]
    words += [
        "{{ messages }}",
        "<image>",
        "{{ 'a' * 99 }}",
        "{{ messages|tojson }}",
        "{{ ''.__class__ }}",
        "{{ 1/0 }}",
        "{% set x = 1 %}",
    ]
    words += [
        "{{ raise_exception('no') }}",
        "{{ x.y.z }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10**9)|list }}",
    ]
    words += [
        "{{ strftime_now('%Y\\0') }}",
        "{{ '%s'|format() }}",
        "{{ 2**99 }}",
        "{% generation %}",
        "{{ '{0.a}'.format(1) }}",
    ]
    pieces = [good[: (at := dice.randrange(len(good) + 1))], *dice.choices(words, k=dice.choice((1, 2, 4))), good[at:]]
    return signed(of, "chat_template.jinja", "".join(pieces).encode(), harmless=False)


def manifests(of: Subject, dice: random.Random) -> bool:
    """A manifest. One whose digest is not that of its content is refused, unless it says the same."""
    good = (of.bundle / "manifest.json").read_bytes()
    content, how = json.loads(good), dice.random()
    folder = copied(of)
    if how < 0.15:
        (folder / "manifest.json").write_text(json.dumps(shuffled(content, dice)), "utf-8")
    elif how < 0.4:
        (folder / "manifest.json").write_bytes(spoilt_bytes(good, dice))
        with contextlib.suppress(LvlmEdgeError):
            Pipeline.load(folder)
            return said_of(folder, of, harmless=True)
        return False
    else:
        tiny.write_json(folder / "manifest.json", spoilt_json(content, dice))
    return said_of(folder, of, harmless=how < 0.15)


def configs(of: Subject, dice: random.Random) -> bool:
    """A checkpoint's config.json, for `plan`. Fields that nobody knows do not matter."""
    name = "config.json" if dice.random() < 0.8 else "preprocessor_config.json"
    good = (of.checkpoint / name).read_bytes()
    content, how = json.loads(good), dice.random()
    folder = emptied(of.scratch / "spoilt")
    for path in of.checkpoint.glob("*.json"):
        shutil.copy(path, folder)
    method = dice.choice((["--method", "none"], ["--method", "fastv", "--prune-layer", "1"]))
    if how < 0.15:
        more = {"nobody_knows": dice.choice((1, None, [2]))}
        (folder / name).write_text(json.dumps(shuffled(content | more, dice)), "utf-8")
        if plan_of(folder, method) != plan_of(of.checkpoint, method):
            raise FaultError("another plan of what is not damaged")
        return True
    if how < 0.4:
        (folder / name).write_bytes(spoilt_bytes(good, dice))
    else:
        (folder / name).write_text(json.dumps(spoilt_json(content, dice)), "utf-8")
    return plan_of(folder, method) is not None


def exports(of: Subject, dice: random.Random) -> bool:
    """A checkpoint's settings and tokenizer, for `export` and an answer."""
    folder = emptied(of.scratch / "spoilt")
    for path in of.checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    path = folder / dice.choice([path.name for path in of.checkpoint.glob("*.json")])
    good = path.read_bytes()
    path.unlink()
    if dice.random() < 0.3:
        path.write_bytes(spoilt_bytes(good, dice))
    else:
        path.write_text(json.dumps(spoilt_json(json.loads(good), dice)), "utf-8")
    bundle = emptied(of.scratch / "made") / f"bundle-{dice.randrange(10**9)}"  # bodies are known by their paths
    eager.export(folder, bundle, method="fastv", prune_layer=1, max_text_tokens=24, max_new_tokens=8)
    Pipeline.load(bundle).generate(PROMPT, [of.picture])
    return True


def emptied(folder: Path) -> Path:
    """A folder, made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def plan_of(checkpoint: Path, method: list[str]) -> Any:
    said = command("plan", str(checkpoint), "--json", *method)
    return None if said is None else json.loads(said)


KINDS: dict[str, Callable[[Subject, random.Random], bool]] = {
    each.__name__: each for each in (pictures, prompts, options, tokenizers, templates, manifests, configs, exports)
}


# Running.


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block that warns of nothing: an error is one line, and a warning before it is another.

    Raises:
        FaultError: it warned.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            if said:
                raise FaultError(f"warns: {said[0].filename}:{said[0].lineno}: {said[0].message}")


def late(*_: Any) -> None:
    raise TooSlowError


def case(of: Subject, kind: str, seed: int) -> bool:
    """Whether a case was answered, and not refused.

    Raises:
        FaultError: it ended in another way. The message says how to rerun it.
    """
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with quiet():
            return KINDS[kind](of, random.Random(f"{kind} {seed}"))
    except LvlmEdgeError as error:
        if error.exit_code not in CODES or not str(error).strip():
            raise fault(kind, seed, f"exit code {error.exit_code}: {error}") from error
        return False
    except TooSlowError as error:
        raise fault(kind, seed, f"takes longer than {SECONDS} s") from error
    except Exception as error:
        raise fault(kind, seed, "".join(traceback.format_exception(error)[-8:])) from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault(kind: str, seed: int, what: str) -> FaultError:
    return FaultError(f"{what}\nrerun it: python tests/fuzz.py --kind {kind} --first {seed} --cases 1")


@contextlib.contextmanager
def made() -> Iterator[Subject]:
    """The undamaged files, in a folder of their own."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, eager.running():
        root = Path(name)
        (root / "scratch").mkdir()
        checkpoint = tiny.checkpoint(lambda **options: checkpoints.build(root / "checkpoint", **options))
        capacity: dict[str, Any] = {"max_text_tokens": 24, "max_new_tokens": 8}
        eager.export(checkpoint, root / "bundle", method="fastv", prune_layer=1, **capacity)
        yield subject(checkpoint, root / "bundle", root / "scratch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="of all kinds together [%(default)s]")
    parser.add_argument("--kind", choices=KINDS, action="append", help="of this kind alone; may be given repeatedly")
    parser.add_argument("--first", type=int, default=0, help="the first seed [%(default)s]")
    given = parser.parse_args()
    kinds, found, faults = given.kind or list(KINDS), collections.Counter[str](), list[FaultError]()
    began = time.monotonic()
    with made() as of:
        for i in range(given.cases):
            kind, seed = kinds[i % len(kinds)], given.first + i // len(kinds)
            try:
                found[f"{kind} {'answered' if case(of, kind, seed) else 'refused'}"] += 1
            except FaultError as error:
                faults.append(error)
                print(f"\n{kind} {seed}: {error}", file=sys.stderr, flush=True)
            if i % 100 == 99:
                print(
                    f"{i + 1} of {given.cases} cases, {len(faults)} faults, {time.monotonic() - began:.0f} s",
                    flush=True,
                )
    for kind in kinds:
        print(f"{kind:11} {found[f'{kind} answered']:6} answered {found[f'{kind} refused']:6} refused")
    print(f"{given.cases} cases, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
