"""The machine that timings are of: processor, memory, clocks, packages."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("lvlm-edge", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch", "transformers")


def machine() -> dict[str, Any]:
    """What the figures depend on beside the bundles."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "board": _read("/proc/device-tree/model").rstrip("\0 \n") or None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def clocks() -> dict[str, list[float]]:
    """Clocks at this moment in MHz, of the cores and, where the system tells, of devices such as a Jetson's GPU."""
    found = {"cores": [float(line.split(":")[1]) for line in _lines("/proc/cpuinfo") if line.startswith("cpu MHz")]}
    if not found["cores"]:
        found["cores"] = [int(_read(str(p)) or 0) / 1e3 for p in _sorted("cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    for path in sorted(Path("/sys/class/devfreq").glob("*/cur_freq")):
        found[path.parent.name] = [int(_read(str(path)) or 0) / 1e6]
    return found


def _sorted(pattern: str) -> list[Path]:
    return sorted(Path("/sys/devices/system").glob(pattern))


def _lines(path: str) -> list[str]:
    return _read(path).splitlines()


def _field(path: str, name: str) -> str:
    return next((line.split(":", 1)[1].strip() for line in _lines(path) if line.startswith(name)), "")


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return ""
