"""A folder that takes its place as a whole: written beside it, then renamed, so that a kill leaves old or new.

What is written beside `NAME` is in the folder `.NAME.lvlm-edge`, which holds a `lock` with our mark in it. Nothing else
is removed, and no link is followed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lvlm_edge.runtime.errors import LvlmEdgeError, UsageError

MARK = b"lvlm-edge\n"  # content of a lock


@contextmanager
def folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends, and is removed when it fails.

    What a killed export left behind is removed by the next one.

    Raises:
        UsageError: another export is writing there, or `output` is a link.
        LvlmEdgeError: no room, or the folder cannot be written.
    """
    if output.is_symlink():
        raise UsageError(f"{output}: is a link; give the folder that it leads to as --output")
    place = output.resolve()
    made = [parent for parent in place.parents if not parent.exists()]
    try:
        with _on_signals(_interrupt):
            place.parent.mkdir(parents=True, exist_ok=True)
            with _alone(place) as work:
                yield from _partial(place, work)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise LvlmEdgeError(
                f"{output.parent}: no room on the disk ({error.strerror}); free some space or choose another --output"
            ) from error
        raise LvlmEdgeError(f"{output}: cannot be written ({error}); choose another --output") from error
    finally:
        for parent in made:
            with suppress(OSError):  # the bundle is in it
                parent.rmdir()


@contextmanager
def inside(place: Path) -> Iterator[Path]:
    """A folder beside a bundle for files that are to be moved into it; it is removed in the end.

    What a killed run left behind is removed by the next one.

    Raises:
        UsageError: another run is writing there.
        LvlmEdgeError: no room, or the folder cannot be written.
    """
    try:
        with _on_signals(_interrupt), _alone(place.resolve()) as work, _emptied(work / "partial") as partial:
            yield partial
    except OSError as error:
        raise LvlmEdgeError(f"{place}: cannot be written ({error}); free some space, or correct its mode") from error


def _partial(place: Path, work: Path) -> Iterator[Path]:
    old = work / "old"
    if old.is_dir() and not place.exists():  # killed between two renames
        old.rename(place)
    if old.exists():
        shutil.rmtree(old)
    with _emptied(work / "partial") as partial:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _sync(path)
        with _on_signals(signal.SIG_IGN):
            take_place(partial, place, old)


@contextmanager
def _emptied(partial: Path) -> Iterator[Path]:
    """A new folder, which is removed in the end."""
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        yield partial
    finally:
        with _on_signals(signal.SIG_IGN):  # cleaning up is not to be stopped too
            shutil.rmtree(partial, ignore_errors=True)


def work_folder(place: Path) -> Path:
    """Where an export to `place` writes before it is done."""
    return place.with_name(f".{place.name}.lvlm-edge")


@contextmanager
def _alone(place: Path) -> Iterator[Path]:
    """The folder to work in, for one export at a time; a killed one leaves its lock open."""
    work = work_folder(place)
    lock = work / "lock"
    with _opened(work, lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            ours = False
        if not ours:
            raise UsageError(f"{place}: is being written by another export; wait for it or choose another folder")
        try:
            yield work
        finally:
            with _on_signals(signal.SIG_IGN):
                lock.unlink(missing_ok=True)  # before it is let go, so that nobody locks a file that is gone
                with suppress(OSError):  # another export is waiting in it
                    work.rmdir()


def _opened(work: Path, lock: Path) -> Any:
    """The lock, opened; it and its folder are made where they are missing.

    Raises:
        UsageError: they are not ours.
    """
    with suppress(FileExistsError):
        work.mkdir()
    own = not work.is_symlink() and (not os.listdir(work) or lock.is_file())
    if own:
        file = os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b")
        if file.read() in (b"", MARK):
            file.seek(0)
            file.write(MARK)
            file.flush()
            return file
        file.close()
    raise UsageError(f"{work}: was not made by lvlm-edge; move it away or choose another folder")


def take_place(partial: Path, output: Path, old: Path) -> None:
    """Move the finished folder to its place; an old bundle is exchanged for it in one step where the system can."""
    if not output.exists():
        partial.rename(output)
        return
    exchange = 2  # RENAME_EXCHANGE
    libc = ctypes.CDLL(None, use_errno=True)
    here = -100  # AT_FDCWD
    if hasattr(libc, "renameat2") and not libc.renameat2(
        here, os.fsencode(partial), here, os.fsencode(output), exchange
    ):
        return  # the old bundle is now the partial folder, which is removed
    output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def _on_signals(handler: Any) -> Iterator[None]:
    """A handler for what asks a process to end; none where they cannot be set, and for those that are ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
