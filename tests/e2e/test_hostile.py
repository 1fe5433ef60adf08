"""What a hostile or hasty user does to the command: one message and exit code 2, no traceback, no wrong row."""

import shutil
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from typer.testing import CliRunner

from curate.cli import app, guarded

CAPTIONS = ["<script>alert(1)</script>", "a\0b", "\x1b[31mred\u202e", ":x: [bold]", "x" * 1_000_000, "l1\nl2", "", None]


def call(*words: object) -> tuple[int, str]:
    """Exit code and everything printed; an error that is not an exit fails the test."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit | click.ClickException):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose every URL is refused before a byte is asked for, with names and captions to trip over."""
    folder = tmp_path_factory.mktemp("hos 'tile\" [1]")
    rows = range(len(CAPTIONS))
    pq.write_table(
        pa.table({
            "url": [f"javascript:{row}'\"" for row in rows], "text": CAPTIONS, "": rows, 'q"uote': rows, "select": rows,
            "row_": rows, "half": pa.array([1.0] * len(rows), pa.float16()), 
            "wide": pa.nulls(len(rows), pa.decimal256(60, 1)),
        }),
        folder / "urls.parquet",
    )  # fmt: skip
    write(folder)
    assert call("run", folder / "recipe.yaml")[0] == 0
    return folder


def write(folder: Path, **sections: Any) -> Path:
    """The recipe of this pool."""
    tree = {
        "root": str(folder / "run"),
        "ingest": {"sources": [str(folder.parent / folder.name / "urls.parquet").replace("[1]", "[[]1]")],
                   "rows_per_shard": 3, "columns": {"url": "url", "text": "text"}},
        "fetch": {"allow_networks": ["127.0.0.1/32"]},
        "score": {"text": {"scorer": "text_stats"}},
        "dedup": [{"by": "sha256", "keep": '"q""uote" DESC, key'}],
        "subsets": {"a": {"where": '"select" > 1 AND "q""uote" > 2', "keep_top": {"by": "half", "fraction": 0.5}}},
        "engine": {"driver": "inline"},
        **sections,
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def test_a_run_without_one_image_ends_well_and_counts_every_row(pool: Path) -> None:
    """Guards against failures that vanish, and against releases that cannot be empty."""
    code, words = call("status", pool / "run")
    assert code == 0
    assert "bad_url" in words
    assert "latest release" in words
    code, words = call(
        "sql", "SELECT count(*) AS n, count(*) FILTER (status = 'bad_url') FROM rows", "--root", pool / "run"
    )
    assert (code, words.count(" 8 ")) == (0, 2)


def test_what_came_from_the_web_drives_neither_terminal_nor_page(pool: Path, tmp_path: Path) -> None:
    """Guards against captions that colour, clear or reverse a terminal, and scripts in the report."""
    for words in (["sql", "SELECT text[:40] FROM samples"], ["explain", "javascript:2'\""]):
        code, shown = call(*words, "--root", pool / "run")
        assert code == 0
        assert "\\x1b[31mred\\u202e" in shown
        assert "\x1b" not in shown
    assert ":x: [bold]" in call("sql", "SELECT text[:40] FROM samples", "--root", pool / "run")[1]
    assert call("report", pool / "run", "--out", tmp_path / "page.html")[0] == 0
    assert "<script>" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sql", "SELECT CAST(text AS INT) FROM rows", "--root", "{run}"], "Conversion Error"),
        (["sql", "SELECT * FROM nope", "--root", "{run}"], "views: duplicates"),
        (["sql", "SELECT 1", "--root", "{run}", "--out", "/nonexistent/x.csv"], "Cannot open file"),
        (["report", "{run}", "--out", "/nonexistent/x.html"], "No such file"),
        (["explain", "' OR 1=1 --", "--root", "{run}"], "no sample with key or URL"),
        (["status", "{table}"], "is a file, expected a folder"),
        (["verify", "{table}"], "is a file, expected a folder"),
        (["status", "foo://x"], "Protocol not known"),
        (["explain", "x", "--root", "a\0b"], "is no place"),
        (["status", ""], "is no place"),
        (["plan", "{recipe}", "--set", "engine.driver=spark"], "engine.driver"),
        (["plan", "{recipe}", "--set", "dedup.0.keep=nope"], "dedup.0.keep: nope"),
        (["plan", "{recipe}", "--set", "dedup.0.keep=key LIMIT 1"], "keep: key LIMIT 1"),
        (["plan", "{recipe}", "--set", "dedup.0.keep=key --"], "keep: key --"),
        (["plan", "{recipe}", "--set", "dedup.0.keep=random()"], "keep: random()"),
        (["plan", "{recipe}", "--set", "dedup.0.keep=max(width)"], "keep: max(width)"),
        (["plan", "{recipe}", "--set", "dedup.0.keep=row_"], "columns named row_"),
        (["plan", "{recipe}", "--set", "dedup.0.threshold=0.5"], "dedup.0.threshold"),
        (["plan", "{recipe}", "--set", "root={table}/x"], "is a file, expected a folder"),
    ],
)
def test_wrong_words_get_one_message(pool: Path, words: list[str], told: str) -> None:
    """Guards against tracebacks for what a user can mend."""
    places = {"run": pool / "run", "table": pool / "urls.parquet", "recipe": pool / "recipe.yaml"}
    code, shown = call(*(word.format(**places) if "{" in word else word for word in words))
    assert code == 2
    assert told in shown


def test_an_empty_table_is_a_pool_of_nothing(tmp_path: Path) -> None:
    """Guards against commands that need a first row."""
    pq.write_table(
        pa.table({"url": pa.nulls(0, pa.string()), "text": pa.nulls(0, pa.string())}), tmp_path / "urls.parquet"
    )
    assert call("run", write(tmp_path, dedup=[{"by": "sha256"}], subsets={"a": {}}))[0] == 0
    assert call("explain", "x", "--root", tmp_path / "run")[0] == 2
    assert "views: none yet" in call("sql", "SELECT * FROM samples", "--root", tmp_path / "run")[1]


def test_damaged_shards_are_named_with_what_to_do(pool: Path, tmp_path: Path) -> None:
    """Guards against tracebacks, and against going on with what was damaged by hand."""
    shutil.copytree(pool, tmp_path / "pool")
    recipe = write(tmp_path / "pool")
    run = tmp_path / "pool" / "run"
    first, second, _ = sorted(run.glob("scores_text/*/*.parquet"))
    whole = first.read_bytes()
    first.write_bytes(whole[:200])
    for words in (["status", run], ["run", recipe], ["sql", "SELECT 1", "--root", run]):
        code, shown = call(*words)
        assert code == 2
        assert "delete it and run again" in shown
    first.write_bytes(second.read_bytes())  # a whole file, of another shard
    code, shown = call("run", write(tmp_path / "pool", subsets={"b": {"where": "word_count > 0"}}))
    assert code == 2  # what was tampered with is not worked around
    assert "not aligned" in shown
    assert "delete it" in shown
    first.unlink()
    assert call("run", recipe)[0] == 0
    assert first.read_bytes() == whole
    next(run.glob("samples/*/*.parquet")).unlink()
    code, shown = call("run", recipe)
    assert code == 2
    assert "lost their samples" in shown


def test_ctrl_c_and_the_disk_end_with_a_word() -> None:
    """Guards against an end that does not say whether anything is lost."""

    def ends_with(error: BaseException) -> tuple[int, str]:
        own = typer.Typer()

        def fail() -> None:
            raise error

        own.command()(guarded(fail))
        result = CliRunner().invoke(own, [])
        return result.exit_code, result.output

    assert ends_with(KeyboardInterrupt()) == (
        130, "interrupted: run the same command again, and it goes on where it stopped\n"
    )  # fmt: skip
    code, words = ends_with(OSError(28, "No space left on device", "/data/x"))
    assert (code, words.startswith("OSError: [Errno 28] No space left on device: '/data/x' (test_hostile.py:")) == (
        2,
        True,
    )


def test_a_misspelt_stage_in_workers_is_refused(pool: Path) -> None:
    """Guards against a cap that is silently without effect."""
    code, said = call("plan", write(pool), "--set", "engine.workers.fetsch=64")
    assert code == 2
    assert "engine.workers.fetsch" in said
    assert call("plan", write(pool), "--set", "engine.workers.fetch=64")[0] == 0
