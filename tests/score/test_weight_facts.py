"""What a release says of the models behind its tables."""

import pyarrow as pa

from curate.schema import KEY, TableSpec
from curate.score.weight_facts import weights_behind


def _spec(name: str, **settings: object) -> TableSpec:
    return TableSpec(name, 1, pa.schema([KEY]), settings)


def test_models_are_found_by_content_and_by_tag_and_own_files_are_told() -> None:
    """Guards against a release that names no licence for a model whose numbers it carries."""
    yunet = "25a606a145a5b6d7271ae138fbd00eba91dad8b83222ae3f2c7ecd0f4a7b0e31"
    found = weights_behind([
        _spec("scores_faces", detector="yunet", weights=yunet), _spec("scores_own", weights={"file": "ab" * 32}),
        _spec("scores_clip", model="ViT-L-14-quickgelu", pretrained="openai"), _spec("scores_text", words=3),
    ])  # fmt: skip
    assert [(row["table"], row["name"], row["licence"]) for row in found[:2]] == [
        ("scores_faces", "yunet-n-640", "Apache-2.0"), ("scores_own", None, None),
    ]  # fmt: skip
    assert found[0]["sha256"] == yunet and found[1]["sha256"] == "ab" * 32
    assert found[2]["table"] == "scores_clip" and found[2]["licence"] == "MIT" and len(found) == 3
