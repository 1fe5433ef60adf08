"""The rules of `configs/`, written down a second time, in Python: what test_recipes.py compares each row with.

From RECIPES' text, not from the YAML; null is None, and a clause that cannot be answered gives None, as SQL does.
The limits are the published ones; a row's `limits` say where a test moved one of a model's column.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
Truth = bool | None
Limits = Mapping[tuple[str, float], float]  # (column, published number): the number in its place


@dataclass(frozen=True)
class Expected:
    """A recipe's rules, written a second time: subset to its clauses in order, and what holds for the whole recipe."""

    subsets: Mapping[str, Sequence[Callable[[Row], Truth]]]
    top: Mapping[str, tuple[str, float]] = field(default_factory=dict)  # subset: (column, fraction)
    same: Callable[[Row], Any] | None = None  # equal values are copies, None is none
    best: Callable[[Row], Any] = lambda row: (-row["width"] * row["height"], row["key"])  # the least of a group stays
    least_side: int = 0
    ratio: float = float("inf")
    listed_bytes: Sequence[str] = ()  # pictures whose MD5 is on a hash list
    listed_url: Callable[[str], bool] = lambda url: False  # whether the SHA-1 of a URL is on one
    untouched: Mapping[str, set[int]] = field(default_factory=dict)  # clauses that no row of the site comes to fail
    references: Sequence[str] = ()  # pictures of the site whose pHash is on the list of reference sets
    smaller: Mapping[str, str] = field(default_factory=dict)  # words of the file, and what stands for them on the site


def over(name: str, limit: float) -> Callable[[Row], Truth]:
    """column >= limit."""
    return lambda row: None if row[name] is None else row[name] >= limit_of(row, name, limit)


def under(name: str, limit: float) -> Callable[[Row], Truth]:
    """column <= limit."""
    return lambda row: None if row[name] is None else row[name] <= limit_of(row, name, limit)


def above(name: str, limit: float) -> Callable[[Row], Truth]:
    """column > limit."""
    return lambda row: None if row[name] is None else row[name] > limit_of(row, name, limit)


def below(name: str, limit: float) -> Callable[[Row], Truth]:
    """column < limit."""
    return lambda row: None if row[name] is None else row[name] < limit_of(row, name, limit)


def limit_of(row: Row, name: str, limit: float) -> float:
    """Where the limit stands."""
    moved: Limits = row["limits"]
    return moved.get((name, limit), limit)


def _is_english(row: Row) -> Truth:
    return None if row["language"] is None else row["language"] == "en"


def _fresh(row: Row) -> Truth:
    return not row["copy"]


def _sure(row: Row) -> Truth:
    return None if row["language_confidence"] is None else row["language_confidence"] >= 0.5


def _good_coyo_image(row: Row) -> bool:
    return row["bytes"] >= 5000 and all(
        under(name, 0.5)(row) is True for name in ("nsfw_score_opennsfw2", "nsfw_score_gantman")
    )


def _harmless(row: Row) -> Truth:
    """Re-LAION research: not (unsafe and a listed word); false and null is false, as in SQL."""
    listed = {"kid", "teenager"} & set(re.findall(r"[a-z]+", (row["text"] or "").lower()))
    if row["punsafe"] is None:
        return None if listed else True
    return not (row["punsafe"] > 0.95 and listed)


def _second(row: Row, names: Sequence[str]) -> float:
    return float(sorted(row[f"p_{name}"] for name in names)[-2])


def _most(row: Row, names: Sequence[str]) -> float:
    return float(max(row[f"p_{name}"] for name in names))


def _unlikely(row: Row) -> bool:
    safe = ("neutral", "selfie", "drawing", "clothes", "advertisement", "news")
    return _second(row, safe) > _most(row, ("porn", "nude", "hentai"))


def _kept_by_laion400m(row: Row) -> bool:
    if _unlikely(row):
        return True
    grown = _second(row, ("adult", "man_woman", "aged")) > _most(row, ("teen", "child", "baby"))
    lifeless = _second(row, ("thing", "house", "plant", "human")) > _most(row, ("animal", "bird", "pet"))
    return not any(word in row["text"].lower() for word in ("teen", "kid", "child", "baby")) and grown and lifeless


_LAION = (over("length", 5), over("bytes", 5000))
_SAFE = under("punsafe", 0.1)
EXPECTED: dict[str, Expected] = {
    "coyo700m": Expected(
        {"coyo": [
            over("bytes", 5000), under("nsfw_score_opennsfw2", 0.5), under("nsfw_score_gantman", 0.5), _is_english,
            over("length", 6), lambda row: row["has_content_word"], over("words", 3), under("words", 256),
            under("length", 1000), under("count", 10), under("profanity", 0), _fresh,
        ]},
        same=lambda row: (row["phash"], row["collapsed"]), least_side=200, ratio=3.0, references=["/8.jpg", "/20.jpg"],
        best=lambda row: (not _good_coyo_image(row), -row["w"] * row["h"], row["key"]),
    ),
    "laion2b": Expected({
        "en": [*_LAION, _fresh, _is_english, _sure, over("clip_similarity_vitb32", 0.28)],
        "multi": [*_LAION, _fresh, lambda row: None if row["language"] is None else row["language"] != "en", _sure,
                  over("clip_similarity_multilingual", 0.26)],
        "nolang": [*_LAION, _fresh, lambda row: (row["language_confidence"] or 0) < 0.5,
                   over("clip_similarity_multilingual", 0.26)],
    }, same=lambda row: row["url"],
        best=lambda row: (not ((row["length"] or 0) >= 5 and row["bytes"] >= 5000), row["key"])),
    "laion400m": Expected({
        "laion400m": [*_LAION, over("clip_similarity_vitb32", 0.3), _kept_by_laion400m],
        "unlikely": [*_LAION, over("clip_similarity_vitb32", 0.3), _unlikely],
    }),
    "laion_aesthetics": Expected({
        "aesthetic_v1": [
            above("aesthetic_score_laion_v1", 7), below("watermark_score", 0.8), below("punsafe", 0.5),
        ],
        "art": [above("aesthetic_score_laion_v1", 8)],
        **{f"v2_{limit}": [over("aesthetic_score_laion_v2", limit / 100)] for limit in (450, 475, 500, 600, 625, 650)},
        "high_resolution": [over("w", 1024), over("h", 1024)],
    }),
    "laion_a": Expected(
        {"laion_a": [over("aesthetic_score_laion_v2", 4.5), _fresh]}, same=lambda row: row["phash"],
        best=lambda row: (-(row["aesthetic_score_laion_v2"] or -9), -row["w"] * row["h"], row["key"]),
    ),
    "relaion": Expected(
        {"research": [_harmless], "research_safe": [under("punsafe", 0.45)]},
        listed_bytes=["/9.jpg"], listed_url=lambda url: url.endswith("3"),
    ),
    "tmars": Expected({"tmars": [_SAFE]}, top={"tmars": ("clip_similarity_text_masked", 0.5)}),
    "align": Expected({"align": [
        lambda row: max(row["w"], row["h"]) < 3 * min(row["w"], row["h"]), under("punsafe", 0.5), under("texts", 3),
        under("count", 10), over("words", 3), under("words", 20), under("rare", 0),
    ]}, least_side=201, ratio=3.0,
        smaller={"url_count <= 1000": "url_count <= 3", "commonest: 100000000": "commonest: 132"}),
    "dfn": Expected({"dfn": []}, top={"dfn": ("clip_similarity_dfn", 0.15)}),
    "webssl": Expected({
        "light_vlm": [_fresh, over("p_yes_webssl_light", 0.5)], "heavy_vlm": [_fresh, over("p_yes_webssl_heavy", 0.5)],
        "light_threshold": [_fresh, over("text_density", 0.04)], "heavy_threshold": [_fresh, over("text_density", 0.4)],
        "light_share": [_fresh], "heavy_share": [_fresh],
    }, top={"light_share": ("text_density", 0.503), "heavy_share": ("text_density", 0.013)},
        same=lambda row: row["digest"]),
    "metadata_only": Expected({}),
}  # fmt: skip
