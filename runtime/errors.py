"""Errors a user can act on; the command line prints them on one line and exits with `exit_code`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LvlmEdgeError(Exception):
    """Base of all errors that read *where: what was found, what was expected; what to do*."""

    exit_code = 1


class UsageError(LvlmEdgeError):
    """An argument is out of range or missing."""

    exit_code = 2


class InputError(UsageError):
    """A picture or prompt cannot be used: unreadable, too long, or the wrong number of images."""


class UnsupportedError(LvlmEdgeError):
    """A model, method or feature this version does not know."""

    exit_code = 3


class FitError(LvlmEdgeError):
    """The work does not fit the device."""

    exit_code = 4


class BundleError(LvlmEdgeError):
    """A bundle is damaged, altered, or made for another version."""

    exit_code = 5


class DeviceError(LvlmEdgeError):
    """The GPU, its driver or TensorRT failed at something it was asked to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause naming the known names, the closest first: `did you mean fastv? known: fastv, none`."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}known: {', '.join(names)}"
