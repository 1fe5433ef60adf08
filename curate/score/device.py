"""Where a worker computes, told without loading torch: whether this machine has a GPU that it may use."""

import os
from pathlib import Path


def gpu_present() -> bool:
    """Whether a CUDA device is here and not hidden by CUDA_VISIBLE_DEVICES."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*"))
