"""What the commands share in printing: tables, lines and the progress bar."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def visible(text: str) -> str:
    r"""A text that a terminal only shows: control characters but line ends and tabs are written out, as in `\x1b`."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


PIPED = 500  # columns of a table that goes to a file or another program
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def table(*columns: str) -> Any:
    """A table whose cells are shown as they are; styles are given as `rich.text.Text`."""
    from rich import box
    from rich.table import Table

    class Plain(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            super().add_row(*(visible(cell) if isinstance(cell, str) else cell for cell in cells), **options)

    return Plain(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


def show(*things: Any) -> None:
    """Print texts as they are, tables and styled texts."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPED
    console = Console(highlight=False, soft_wrap=False, markup=False, width=width)
    for thing in things:
        console.print(visible(thing) if isinstance(thing, str) else thing)


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
