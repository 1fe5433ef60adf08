"""The `curate` command: thin words over what the floors below do. Every error says what to do next."""

import importlib
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from curate.catalog import find_sample, locate_sample, open_catalog, views_of
from curate.cli_pipeline import find_pipeline
from curate.cli_release import export, latest, remove, verify
from curate.cli_sets import entries, pack
from curate.config import Recipe, load_recipe, parse_recipe
from curate.engine.job import PLAN, Job, unpack_spec
from curate.errors import ConfigError, CurateError, PlanError, StoreError, WeightsError
from curate.metrics import Ticker, progress
from curate.removed import unfinished
from curate.report.cost import load_rates, print_estimate
from curate.report.recipes import print_recipes
from curate.report.terminal import complain, print_funnel, print_plan, print_release, print_sample, printable, shown
from curate.rows import SAMPLES
from curate.schema import TableSpec
from curate.store import Store

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Turn tables of image URLs and captions into training sets.\n\n"
    "Start with `curate demo`. Then: write a recipe (see `configs/`), look at it with `curate plan`, run it with "
    "`curate run`, ask the result with `curate status`, `sql` and `explain`. Running anything twice does only what is "
    "missing.",
)
weights_app = typer.Typer(no_args_is_help=True, help="Model files: what is needed, from where, under which licence.")
app.add_typer(weights_app, name="weights")

out = Console(width=None if sys.stdout.isatty() else 160, emoji=False)  # a log has no width, `:x:` is no emoji
RecipeFile = Annotated[Path, typer.Argument(help="Recipe file, e.g. configs/demo.yaml", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key of the recipe; repeat for more.", metavar="a.b=VALUE"),
]
Root = Annotated[
    str, typer.Option("--root", envvar="CURATE_ROOT", help="Root of a run: a folder or URL.", show_default=False)
]
EngineName = Annotated[str | None, typer.Option("--engine", help="ray or inline; overrides engine.driver.")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Errors raised on purpose, and the system's, become one message and exit code 2; others keep their traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except CurateError as error:
            complain(type(error).__name__, str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:  # caught here: Typer would end without a word
            complain("interrupted", "run the same command again, and it goes on where it stopped")
            raise typer.Exit(130) from None
        except OSError as error:
            *_, last = traceback.extract_tb(error.__traceback__)
            place = f"{Path(last.filename).name}:{last.lineno}"
            complain(type(error).__name__, f"{error} ({place})\nmend the disk, permission or network; then run again")
            raise typer.Exit(2) from None

    return run


@app.command()
@guarded
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    engine: EngineName = None,
    retry: Annotated[
        str | None,
        typer.Option(help="Statuses to fetch again, e.g. timeout,dns,http_5xx; set_aside tries given-up shards again."),
    ] = None,
) -> None:
    """Run a recipe: everything that is missing, nothing that is there.

    Example: `curate run configs/coyo700m.yaml --set root=s3://bucket/run --set ingest.sources='["s3://…/*.parquet"]'`
    """
    settings = _recipe(recipe, overrides, engine)
    statuses = {word.strip() for word in (retry or "").split(",") if word.strip()}
    execute(settings, statuses)


@app.command()
@guarded
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[
        float | None,
        typer.Option(help="Only estimate shards, core- and GPU-hours and storage for so many, e.g. 1.2e9."),
    ] = None,
) -> None:
    """Check a recipe and print what a run would do, without running anything.

    Settings, columns, expressions, weights and storage are checked; what is wrong is named with the key. With `--rows`
    neither sources nor weights need to be here: measured rates are multiplied (curate/report/rates.yaml).
    """
    settings = _recipe(recipe, overrides, None)
    if rows is not None:
        if not 1 <= rows < 1e15:
            raise ConfigError(f"--rows {rows}: expected a number of rows, e.g. 1.2e9")
        print_estimate(out, settings, rows, load_rates())
        return
    job = _go(settings, dry=True)
    print_plan(out, job)
    for name, cause in job.set_aside.items():
        out.print(f"set aside: {name}: {cause}", markup=False)


@app.command()
@guarded
def status(where: Annotated[str, typer.Argument(help="Recipe file or root of a run.")]) -> None:
    """What is done and what is not, from the store alone: safe at any time, also beside a run."""
    store, tables, note = _opened(_root_of(where))
    shards = [shard.name for shard in store.shards(tables[0])]
    table = Table("table", "fingerprint", "shards done", "of", title=store.root)
    for spec in tables:
        done = store.done(spec)
        table.add_row(spec.name, spec.fingerprint, f"{len(done & set(shards)):,}", f"{len(shards):,}")
    out.print(table)
    print_funnel(out, store, tables, shards)
    for name, cause in note["set_aside"].items():
        out.print(f"set aside: {name}: {cause}", markup=False)
    for number in unfinished(store):
        words = f"removal {number} is not finished; if none is at work, this finishes it: curate remove {store.root}"
        out.print(words, markup=False, soft_wrap=True)
    newest = latest(store)
    out.print(f"latest release: {store.url('releases/' + newest) if newest else 'none'}", markup=False, soft_wrap=True)


@app.command()
@guarded
def explain(
    sample: Annotated[str, typer.Argument(help="The key of a sample, or its URL.", metavar="KEY-or-URL")],
    root: Root,
    html: Annotated[Path | None, typer.Option("--html", help="Write the copies' pictures to this page.")] = None,
) -> None:
    """Everything known of one sample: its columns, its copies, and for each subset the first clause that refused it."""
    from curate.report.copies import TABLE, group_of, print_copies, write_group  # noqa: PLC0415  # pictures: only here
    from curate.select.step import explain_row  # noqa: PLC0415  # only here

    store, tables, note = _opened(root)
    shards = [shard.name for shard in store.shards(tables[0])]
    recipe = parse_recipe(note["recipe"], store.url(PLAN))
    with open_catalog(store, tables, shards) as connection:
        keys = find_sample(connection, sample)
        if not keys:
            raise PlanError(f"no sample with key or URL {sample!r} under {store.root}")
        for key in keys:
            shard, row = locate_sample(store, connection, tables[0], key)
            print_sample(out, store, tables, shard, row)
            members = group_of(connection, key) if {TABLE, "rows"} <= set(views_of(connection)) else []
            print_copies(out, members)
            if html is not None:
                html.write_text(write_group(store, key, members), encoding="utf-8")
                out.print(f"wrote {html}", markup=False)
            for verdict in explain_row(store, tables, recipe.subsets, shard, row):
                out.print(verdict, markup=False, soft_wrap=True)


@app.command()
@guarded
def sql(
    query: Annotated[str, typer.Argument(help="DuckDB SQL, e.g. 'SELECT status, count(*) FROM images GROUP BY 1'")],
    root: Root,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write Parquet or CSV instead of printing.")] = None,
    limit: Annotated[int, typer.Option(help="Rows printed.", min=0)] = 50,
) -> None:
    """Ask the tables of a run. Views: one per table, and `rows` with all columns side by side.

    Example: `curate sql "SELECT host, avg(clip_similarity_vitl14) …" --root out/demo`
    """
    import duckdb  # noqa: PLC0415  # for its error class only

    store, tables, _ = _opened(root)
    shards = [shard.name for shard in store.shards(tables[0])]
    with open_catalog(store, tables, shards) as connection:
        views = views_of(connection)
        try:
            relation = connection.sql(query)
            if relation is None:
                return
            if out_file is not None:
                writer = relation.write_csv if out_file.suffix == ".csv" else relation.write_parquet
                writer(str(out_file))
                out.print(f"wrote {out_file}", markup=False)
                return
            rows = relation.limit(limit).fetchall()
        except duckdb.Error as error:
            raise PlanError(f"{str(error).strip()}\nviews: {', '.join(views) or 'none yet'}") from None
        table = Table(*(escape(printable(name)) for name in relation.columns))
        for row in rows:
            table.add_row(*(escape(printable(str(value))) for value in row))
        out.print(table)


@app.command()
@guarded
def report(
    where: Annotated[str, typer.Argument(help="Recipe file or root of a run.")],
    out_file: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one HTML page to look at: funnel, scores, pictures of what was kept, dropped and called a copy."""
    from curate.report.page import write_page  # noqa: PLC0415  # pictures are for this command only

    store, tables, _ = _opened(_root_of(where))
    shards = [shard.name for shard in store.shards(tables[0])]
    out_file.write_text(write_page(store, tables, shards), encoding="utf-8")
    out.print(f"wrote {out_file}", markup=False)


for word in (verify, remove, export, pack, entries):
    app.command()(guarded(word))


@app.command()
@guarded
def score(
    paths: Annotated[list[Path], typer.Argument(help="Folders (searched for images) and files.")],
    with_: Annotated[str, typer.Option("--with", help="Scorers or columns, e.g. text_density,num_faces,image_phash.")],
    captions: Annotated[Path | None, typer.Option(help="CSV, TSV or Parquet with columns file and caption.")] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="scores.parquet or .csv; else printed.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Take entries from this recipe's `score:` section too.")] = None,
) -> None:
    """Score a folder of images, without a pool: one row a file, with a status. The quickest way to try a scorer.

    Example: `curate score photos/ --with text_density,num_faces --out scores.parquet`
    """
    from curate.score.folder import score_folder  # noqa: PLC0415  # loads torch

    own = load_recipe(recipe).score if recipe is not None else None
    names = [word.strip() for word in with_.split(",") if word.strip()]
    scored = score_folder(paths, names, captions, out_file, own)
    if scored.table is not None:
        table = Table(*scored.table.column_names)
        for row in scored.table.to_pylist():
            table.add_row(*(shown(value) for value in row.values()))
        out.print(table)
    statuses = ", ".join(f"{name} {count:,}" for name, count in scored.statuses.items())
    out.print(f"{scored.rows:,} files: {statuses}" + (f"; wrote {out_file}" if out_file else ""), markup=False)
    for reason, count in scored.reasons.items():
        out.print(f"  {count:,} × {reason}", markup=False)


@weights_app.command("ls")
@guarded
def weights_ls() -> None:
    """Every model file that a scorer can ask for: licence, size, source, and where it is on this machine."""
    from curate.score import weights  # noqa: PLC0415  # only here

    table = Table("name", "licence", "size", "here", "source")
    for held in weights.ls():
        size = f"{held.weight.size_bytes / 1e6:,.1f} MB" if held.weight.size_bytes else "?"
        table.add_row(held.weight.name, held.weight.licence, size, str(held.path or "no"), held.weight.source)
    out.print(table)


@weights_app.command("pull")
@guarded
def weights_pull(names: Annotated[list[str], typer.Argument(help="Names as `curate weights ls` shows them.")]) -> None:
    """Download model files, going on where an earlier pull stopped; sha256 is verified."""
    from curate.score import weights  # noqa: PLC0415  # only here

    for name in names:
        with progress(f"pull {name} (kB)", (weights.named(name).size_bytes or 0) // 1024) as ticker:
            seen = [0]

            def tell(done: int, _: int | None, seen: list[int] = seen, ticker: Ticker = ticker) -> None:
                ticker.advance((done - seen[0]) // 1024)
                seen[0] = done

            (path,) = weights.pull([name], tell)
        out.print(f"{name}: {path}", markup=False, soft_wrap=True)
        if weights.check([name])[0][0].sha256 is None:
            out.print("  nobody published its sha256: from now on only what came now is taken", markup=False)


@weights_app.command("check")
@guarded
def weights_check(
    names: Annotated[list[str] | None, typer.Argument(help="Names; all when none is given.")] = None,
) -> None:
    """Say of each model file whether it is here and is what was published. Exit code 2 when a named one is not."""
    from curate.score import weights  # noqa: PLC0415  # only here

    states = weights.check(names or [])
    for weight, state in states:
        out.print(f"{weight.name}: {state}", markup=False)
    if names and any(state in ("missing", "wrong content") for _, state in states):
        raise WeightsError("not all are here; `curate weights pull NAME` gets them")


@app.command()
@guarded
def recipes(name: Annotated[str | None, typer.Argument(help="One of them, in full.")] = None) -> None:
    """The recipes that come with curate: what each makes, after which paper, what it needs, what is unverified."""
    print_recipes(out, {file.stem: load_recipe(file) for file in sorted(_configs().glob("*.yaml"))}, name)


@app.command()
@guarded
def demo(
    root: Annotated[Path, typer.Option(help="Where the demo's web and run are kept.")] = Path("out/demo"),
    engine: EngineName = None,
    port: Annotated[int, typer.Option(help="Port of the demo's web server on 127.0.0.1.")] = 18765,
) -> None:
    """Run the whole line offline: draw a small web, serve it on 127.0.0.1, and curate it with the real engine.

    It ends with the funnel, where the subsets lie, how to load them, and what was found of what was planted.
    """
    from curate.demo.run import run_demo  # noqa: PLC0415  # drawing and serving are for the demo only

    run_demo(root, port, lambda overrides: execute(_recipe(_configs() / "demo.yaml", overrides, engine)), out)


def execute(recipe: Recipe, retry: set[str] | None = None) -> Job:
    """Plan, then run, then say what came of it."""
    _go(recipe, dry=True)
    job = _go(recipe, retry=retry or set())
    tables = list(job.tables.values())
    print_funnel(out, job.store, tables, [shard.name for shard in job.store.shards(tables[0])])
    for name, cause in job.set_aside.items():
        out.print(f"set aside: {name}: {cause}", markup=False, soft_wrap=True)
    newest = latest(job.store)
    if newest is not None:
        print_release(out, job.store, newest)
    return job


def _go(recipe: Recipe, *, dry: bool = False, retry: set[str] | None = None) -> Job:
    """Take a recipe's pipeline through a job."""
    retry = retry or set()
    job = Job(recipe, dry=dry, retry=frozenset(retry))
    try:
        find_pipeline(recipe.pipeline)(job)
        (job.check_workers if dry else job.note)()
    finally:
        job.close()
    return job


def _recipe(path: Path, overrides: list[str] | None, engine: str | None) -> Recipe:
    chosen = [*(overrides or []), *([f"engine.driver={engine}"] if engine else [])]
    return load_recipe(path, chosen)


def _configs() -> Path:
    return Path(str(importlib.import_module("configs").__path__[0]))


def _root_of(where: str) -> str:
    if where.endswith((".yaml", ".yml")):
        return load_recipe(where).root
    return where


def _opened(root: str) -> tuple[Store, list[TableSpec], Any]:
    store = Store(root)
    store.check()
    note = store.get_json(PLAN)
    if note is None:
        raise PlanError(f"{root}: no run was ever finished here ({PLAN} is missing); check --root or run a recipe")
    try:
        tables = [unpack_spec(plain) for plain in note["tables"]]
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{store.url(PLAN)}: not a plan that this curate wrote ({error!r}); run the recipe") from None
    return store, sorted(tables, key=lambda spec: spec.name != SAMPLES), note


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
