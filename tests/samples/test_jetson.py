"""The table of what fits on which Jetson can be printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SAMPLE = Path(__file__).parents[2] / "samples/jetson/fit_table.py"


def test_the_table_has_a_row_per_device_and_model():
    done = subprocess.run([sys.executable, str(SAMPLE)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + 8 * 3
    nano = next(line for line in lines if line.startswith("| orin-nano-8gb, JetPack 6.2 | 6.9 | 2B"))
    assert nano.endswith("| 7.9 / 9.6 | **4.2 / 4.5** | 7.9 / 9.6 | **4.2 / 4.5** | - |")


def test_a_device_can_be_named_with_its_release():
    done = subprocess.run(
        [sys.executable, str(SAMPLE), "agx-orin-32gb@7.2"], capture_output=True, text=True, check=False
    )

    assert "| agx-orin-32gb, JetPack 7.2 | 30.9 | 7B | **28.6 / 13.9** |" in done.stdout


def test_shared_weights_are_where_the_release_has_modern_graphs():
    done = subprocess.run(
        [sys.executable, str(SAMPLE), "orin-nano-8gb@7.2"], capture_output=True, text=True, check=False
    )

    line = next(line for line in done.stdout.splitlines() if "| 2B |" in line)
    assert line.endswith("| 7.8 / 6.8 | **4.1 / 3.4** | **4.7 / 6.5** |")
