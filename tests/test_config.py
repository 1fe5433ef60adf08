"""Recipe files: what is wrong is named with its key, before anything runs."""

from pathlib import Path

import pytest

from curate.config import load_recipe, parse_recipe
from curate.errors import ConfigError

MINIMAL = {"root": "out", "ingest": {"sources": ["a.parquet"]}}


def test_sections_may_be_left_out_or_empty() -> None:
    """Guards against recipes that must spell out what they do not use."""
    recipe = parse_recipe({**MINIMAL, "score": None, "dedup": None, "subsets": None, "emit": None, "fetch": None})
    assert recipe == parse_recipe(MINIMAL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fetch": {"timout_s": 3}}, "fetch.timout_s: unknown key"),
        ({"emit": {"samples_per_shard": 0}}, "emit.samples_per_shard"),
        ({"fetch": {"allow_networks": ["127.0.0.1/33"]}}, "fetch.allow_networks"),
        ({"subsets": {"a-b": {"where": "true"}}}, "subsets"),
        ({"subsets": {"a": {"keep_top": {"by": "x", "fraction": 1.5}}}}, "subsets.a.keep_top.fraction"),
        ({"ingest": {}}, "sources"),
        ({"ingest": {"where": "width > 1"}}, "or both"),
        ({"root": None}, "root"),
        ({"root": ""}, "root"),
        ({"root": "a\0b"}, "root"),
        ({"ingest": {"sources": [""]}}, "ingest.sources.0"),
        ({"subsets": {"good": {}, "Good": {}}}, "good and Good differ only in upper and lower case"),
        ({"score": {"a": {"scorer": "phash"}, "A": {"scorer": "text_stats"}}}, "a and A differ only"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], words: str) -> None:
    """Guards against errors that send people to the source."""
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        parse_recipe({**MINIMAL, **change})


def test_overrides_reach_into_sections_and_lists(tmp_path: Path) -> None:
    """Guards against `--set` that silently sets nothing."""
    file = tmp_path / "r.yaml"
    file.write_text("root: out\ningest: {sources: [a]}\ndedup:\n  - {by: sha256}\n")
    recipe = load_recipe(
        file, ["emit.seed=7", "dedup.0.by=image_phash", "ingest.sources=[b, c]", "fetch.contact=a@b.c"]
    )
    assert (recipe.emit.seed, recipe.dedup[0].by, recipe.ingest.sources) == (7, "image_phash", ["b", "c"])
    for bad in ("emit.seed", "=3", "emit.seed.x=1", "dedup.4.by=x", "emit.sed=1"):
        with pytest.raises(ConfigError):
            load_recipe(file, [bad])


@pytest.mark.parametrize("text", ["", "- a", "a: [", "!!python/object/apply:os.system ['true']", "[" * 3000])
def test_broken_and_hostile_files_are_refused(tmp_path: Path, text: str) -> None:
    """Guards against YAML that runs code, and against tracebacks for typos."""
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load_recipe(file)
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    """Guards against a subset that plain YAML silently forgets, because a later one has its name."""
    file = tmp_path / "r.yaml"
    file.write_text("root: out\ningest: {sources: [a]}\nsubsets:\n  a: {where: x}\n  b: {}\n  a: {where: y}\n")
    with pytest.raises(ConfigError, match="'a' is written twice"):
        load_recipe(file)
    file.write_text(
        "root: out\ningest: {sources: [a]}\nsubsets:\n  a: &a {where: x}\n  b: &b {<<: *a, where: y}\n"
        "  c: {<<: *b, where: z}\n"
    )
    assert load_recipe(file).subsets["c"].where == "z"  # a merge is not a repetition
