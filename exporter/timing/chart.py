"""Chart: the stages of a bench as bars beside their floors, a PNG drawn with Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_edge.runtime.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

LEFT, WIDTH, RIGHT = 240, 640, 200  # pixels: names, bars, figures
LINE, BAR, MARGIN = 26, 16, 16
TEXT, BASE, FLOOR, RANGE = (30, 30, 30), (70, 130, 180), (200, 30, 30), (20, 60, 100)
SUFFIX = ".png"


def check(target: Path) -> None:
    """Raise UsageError for a path that `save` cannot write to, before the work is done."""
    if target.suffix.lower() != SUFFIX or target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"{target}: cannot be written as a chart; give a path in a folder that exists, ending in .png")


def rows(report: Mapping[str, Any]) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Contenders with what is drawn of each: its stages, the first token, and decode."""
    return [
        (row["name"], [*row["stages"], row["first_token"] | {"name": "first token"}, row["decode"]])
        for row in report["contenders"]
    ]


def draw(report: Mapping[str, Any]) -> Image:
    """A bar from 0 to the median per stage, a line over its range, and a mark at its floor; one scale for all."""
    from PIL import Image, ImageDraw, ImageFont

    groups = rows(report)
    lines = sum(len(bars) + 1 for _, bars in groups) + 1
    sheet = Image.new("RGB", (LEFT + WIDTH + RIGHT, lines * LINE + 2 * MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    longest: float = max(bar["high_ms"] for _, bars in groups for bar in bars)

    def across(ms: float) -> int:
        return LEFT + round(WIDTH * ms / longest)

    top = MARGIN
    for name, bars in groups:
        pen.text((MARGIN, top), name, TEXT, font)
        for bar in bars:
            top += LINE
            middle = top + BAR // 2
            pen.text((2 * MARGIN, top), bar["name"], TEXT, font)
            pen.rectangle((LEFT, top, across(bar["median_ms"]), top + BAR), BASE)
            pen.line((across(bar["low_ms"]), middle, across(bar["high_ms"]), middle), RANGE, 2)
            said = f"{bar['median_ms']:,.4g} ms"
            if "floor_ms" in bar:
                at = across(bar["floor_ms"])
                pen.rectangle((at - 1, top - 3, at + 1, top + BAR + 3), FLOOR)
                said += f", floor {bar['floor_ms']:,.3g}"
            pen.text((across(bar["high_ms"]) + 6, top), said, TEXT, font)
        top += LINE
    pen.text((MARGIN, top), "bar: median; line: lowest to highest; red: floor", TEXT, font)
    return sheet


def save(report: Mapping[str, Any], target: Path) -> None:
    """Write the chart; an error leaves nothing half-written and what was there before.

    Raises:
        UsageError: it cannot be written.
    """
    from lvlm_edge.runtime.bundle.replacing import replacing

    try:
        with replacing(target) as partial:
            draw(report).save(partial)
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error}); give another path") from error
