"""A first reading in another process, for readers whose compiled code a damaged file can make abort."""

from __future__ import annotations

import subprocess
import sys

TRIAL_S = 600


def survives(code: str, raw: bytes) -> bool:
    """Whether a new interpreter runs `code` to its end, with `raw` on its standard input, in ten minutes."""
    try:
        done = subprocess.run([sys.executable, "-c", code], input=raw, capture_output=True, timeout=TRIAL_S)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
