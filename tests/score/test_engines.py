"""The same scores on both engines, bit for bit."""

from pathlib import Path
from typing import TYPE_CHECKING

from curate.engine.inline import InlineDriver
from curate.schema import Shard
from curate.score.stage import score_stages
from tests.score.tiny import IMAGES, SAMPLES, encoded, filled, picture, tiny_clip

if TYPE_CHECKING:
    from curate.engine.ray import RayDriver


def test_ray_gives_the_bits_of_one_process(tmp_path: Path, ray_driver: "RayDriver") -> None:
    """Guards against thread counts, batches or models that depend on the engine: releases must be identical."""
    section = {
        "clip_tiny": {"scorer": "clip", "model": f"local-dir:{tiny_clip(tmp_path / 'clip')}"},
        "phash": {"scorer": "phash"},
        "facts": {"scorer": "image_facts"},
        "text": {"scorer": "text_stats"},
    }
    found: list[dict[str, bytes]] = []
    for driver in (InlineDriver(), ray_driver):
        root = tmp_path / driver.name
        shards: list[Shard] = []
        for number in range(3):
            data = [None if row == 4 else encoded(picture(100 * number + row)) for row in range(70)]
            store, shard = filled(root, data, [f"thing {row % 9}" for row in range(70)], f"s-{number}")
            shards.append(shard)
        stages = score_stages(section, SAMPLES, IMAGES)
        reports = [report for reports in driver.run(store, stages, shards) for report in reports]
        assert all(report.set_aside is None for report in reports)
        tables = [spec for stage in stages for spec in stage.tables]
        paths = [store.shard_path(spec, shard.name) for spec in tables for shard in shards]
        found.append({path: store.get_bytes(path) for path in paths})
    assert found[0] == found[1]
