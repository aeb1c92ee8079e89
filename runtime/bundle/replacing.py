"""A file that takes its place as a whole: written beside it under a name of our own, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(place: Path, mode: int = 0o666) -> Iterator[Path]:
    """An empty new file in the folder of `place` that takes its place when the block ends, or is removed.

    A link at `place` is replaced and what it leads to is left alone.

    Args:
        mode: of the file, less the process's umask.

    Raises:
        OSError: the file cannot be made or moved.
    """
    partial = place.with_name(f".{place.stem}.{secrets.token_hex(8)}.lvlm-edge{place.suffix}")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode))
    try:
        yield partial
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)
