"""A limit on the time that code which came with a download takes: chat templates that do not end."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

AGAIN = 0.2  # seconds after which a block that caught the exception gets it once more


class TimeLimitError(Exception):
    """Raised inside a block that takes too long."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitError in the block once it has taken so long, in whatever thread it runs.

    Python code is interrupted between two of its instructions, and not inside a library's function.
    """
    thread, lock, ended = ctypes.c_ulong(threading.get_ident()), threading.Lock(), threading.Event()
    interrupt = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def watch() -> None:
        wait = seconds
        while not ended.wait(wait):
            with lock:
                if not ended.is_set():
                    interrupt(thread, ctypes.py_object(TimeLimitError))
            wait = AGAIN

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        with lock:
            ended.set()
            interrupt(thread, None)  # one that was not raised yet is not to be raised behind the block
        watcher.join()
