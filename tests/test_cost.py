"""What `curate plan --rows` multiplies: every recipe, against sums made here, and the README's copies of its output."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

import configs
from curate.config import Recipe, load_recipe
from curate.report.cost import estimate, gpu_hours_per_million, load_rates, print_estimate
from tests.e2e.conftest import curate

CONFIGS = Path(str(configs.__path__[0]))
FILES = sorted(CONFIGS.glob("*.yaml"))
README = Path(__file__).parents[1] / "README.md"
# What nobody has measured here: any other line without a rate is a name that rates.yaml does not know.
WITHOUT_RATE = {"smolvlm2-2.2b", "synset_words", "clip xlm-roberta-base-ViT-B-32", "clip demo"}


def _recipe(name: str) -> Recipe:
    return load_recipe(CONFIGS / f"{name}.yaml")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_scorer_has_a_rate_or_is_known_to_have_none(file: Path) -> None:
    """Guards against a scorer whose cost is forgotten because its name is spelt otherwise in the rates."""
    lines = [line for line in estimate(load_recipe(file), 1e9, load_rates()) if line.step == "score"]
    for line in lines:
        names = set(line.what.partition(": ")[2].split(", ") if ": " in line.what else [line.what])
        assert not math.isnan(line.core_hours) or names & WITHOUT_RATE, line
        assert line.stored_bytes >= 0
    assert len(lines) >= len(load_recipe(file).score)


def test_hours_and_bytes_are_rows_times_rates() -> None:
    """Guards against hours of another model, milliseconds read as seconds, and features that nobody stores."""
    rates, rows = load_rates(), 5.85e9
    lines = {line.what: line for line in estimate(_recipe("laion2b"), rows, rates)}
    large = lines["clip_vitl14: clip ViT-L-14"]
    assert large.gpu_hours == pytest.approx(rows / 312 / 3600)
    assert 5000 < (large.gpu_hours or 0) < 5500  # LAION: a week on 32 A100, 5,376 GPU-hours
    assert large.core_hours == pytest.approx(rows * rates["cpu_ms"]["clip ViT-L-14"] / 1000 / 3600)
    assert large.stored_bytes == pytest.approx(rows * (22 + 2 * (768 + 768)))
    fetched = next(line for line in lines.values() if line.step == "fetch")
    assert fetched.stored_bytes == pytest.approx(rows * (110 + 37600))  # 384 px: LAION's 220 TB
    known, without = gpu_hours_per_million(_recipe("laion2b"), rates)
    assert known == pytest.approx(1e6 / 3600 * (1 / 312 + 1 / 1800))
    assert len(without) == 2  # the multilingual CLIP and the watermark detector


def test_a_sum_says_what_it_leaves_out() -> None:
    """Guards against a total that looks whole and is not."""
    told = io.StringIO()
    print_estimate(Console(file=told, width=160), _recipe("webssl"), 2e9, load_rates())
    (total,) = [line for line in told.getvalue().splitlines() if "total" in line]
    assert total.count(" +") == 2
    assert "no rate" in told.getvalue()
    told = io.StringIO()
    print_estimate(Console(file=told, width=160), _recipe("dfn"), 2e9, load_rates())
    (total,) = [line for line in told.getvalue().splitlines() if "total" in line]
    assert "309" in total  # GPU-hours: 2e9 / 1800 / 3600


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_has_its_estimate(file: Path) -> None:
    """Guards against a recipe whose estimate fails, forgets a section, or hides what its authors published."""
    told, recipe = io.StringIO(), load_recipe(file)
    print_estimate(Console(file=told, width=200), recipe, 12.8e9, load_rates())
    lines = told.getvalue().splitlines()
    assert f"12,800,000,000 rows in {12_800_000_000 // recipe.ingest.rows_per_shard:,} shards" in lines[0]
    steps = {line.split("│")[1].strip() for line in lines if line.startswith("│")}
    sections = {"cells", "retrieve", "hierarchy", "balance", "experts", "dedup", "score"}
    assert {name for name in sections if getattr(recipe, name)} == steps & sections
    assert {"ingest", "fetch", "total"} <= steps
    if recipe.about is not None and recipe.about.published:
        assert lines[-1].startswith(f"published: {recipe.about.published[:40]}")


@pytest.mark.parametrize(("name", "rows"), [("lvd142m", "1.2e9"), ("webssl", "2e9")])
def test_the_readme_shows_what_the_command_prints(name: str, rows: str) -> None:
    """Guards against a README whose figures were measured with other rates."""
    told = curate("plan", CONFIGS / f"{name}.yaml", "--rows", rows).stdout
    shown = README.read_text(encoding="utf-8").split(f"curate plan configs/{name}.yaml --rows {rows}\n")[1]
    assert [line.strip() for line in shown.split("```")[0].strip().splitlines()] == [
        line.strip() for line in told.strip().splitlines()
    ]


def test_a_number_of_rows_that_is_none_is_refused() -> None:
    """Guards against an estimate for minus one rows."""
    wrong = curate("plan", CONFIGS / "dfn.yaml", "--rows", "-1", check=False)
    assert wrong.returncode == 2
    assert "--rows" in wrong.stderr
