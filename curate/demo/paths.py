"""Where the demo's own weights lie, without importing torch to say so."""

from pathlib import Path


def weights_dir() -> Path:
    """The folder of the demo's tiny CLIP; open_clip loads it as `local-dir:<this folder>`. For the demo only."""
    return Path(__file__).parent / "weights"
