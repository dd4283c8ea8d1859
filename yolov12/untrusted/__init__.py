"""Files that somebody else wrote, wherever Ultralytics opens them: weights, data sets, and the names in both.

`docs/reference/untrusted-files.md` lists all of these places.
"""

from __future__ import annotations

import os

TRUST_WEIGHTS = "YOLOV12_TRUST_WEIGHTS"
TRUST_DATA = "YOLOV12_TRUST_DATA"


def is_set(switch: str) -> bool:
    """Return whether the user trusts a kind of file.

    Args:
        switch: Name of the environment variable.
    """
    return os.environ.get(switch) == "1"
