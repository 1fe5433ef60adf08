"""The floors of DESIGN.md: a module imports only from floors below it and from its own package."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ("ingest", "fetch", "score", "dedup", "retrieve", "balance", "select", "emit", "report", "demo")
FLOORS = {
    "curate.errors": 0, "curate.schema": 0, "curate.tar": 0, "curate.image_sets": 1,
    "curate.config": 1, "curate.store": 1, "curate.metrics": 1, "curate.rows": 1, "curate.catalog": 1,
    "curate.removed": 1, "curate.scratch": 1, "curate.presence": 1, "curate.overrides": 1,
    "curate.retry": 2, "curate.across": 2, "curate.vectors": 2, "curate.stage": 2, "curate.engine": 2,
    **{f"curate.{domain}": 3 for domain in DOMAINS}, "curate.torch": 3,
    "pipelines": 4, "configs": 4,
    "curate.cli": 5, "curate.cli_release": 5, "curate.cli_sets": 5, "curate.cli_pipeline": 5,
}  # fmt: skip


def _floor(module: str) -> tuple[str, int]:
    for name in (".".join(module.split(".")[:2]), module.split(".", maxsplit=1)[0]):
        if name in FLOORS:
            return name, FLOORS[name]
    raise AssertionError(f"{module} stands on no floor: add it to DESIGN.md's layout and to FLOORS")


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            if node.module == "curate":
                found |= {f"curate.{alias.name}" for alias in node.names}
    return {
        name
        for name in found
        if name.split(".")[0] in ("curate", "pipelines") and name not in ("curate", "curate.__version__")
    }


def test_modules_import_only_from_below() -> None:
    """Guards against domains that grow into one another until nothing can be changed alone."""
    wrong = []
    for path in [*ROOT.glob("curate/**/*.py"), *ROOT.glob("pipelines/*.py")]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module in ("curate", "pipelines"):
            continue
        name, floor = _floor(module)
        for imported in _imports(path):
            other, below = _floor(imported)
            # Floors 0 to 2 are layers of plain modules: within one, order is by need. Domains are sealed.
            if below > floor or (below == floor == 3 and other != name):
                wrong.append(f"{module} imports {imported}")
    assert wrong == []


def test_importing_curate_loads_neither_torch_nor_ray() -> None:
    """Guards against a `curate --help` that takes ten seconds."""
    modules = "curate, curate.cli, curate.config, curate.store, curate.stage, curate.engine.job"
    code = f"import {modules}, sys; print(sorted({{'torch', 'ray', 'open_clip', 'faiss'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_only_one_file_imports_ray() -> None:
    """Guards against Ray in a stage, which would make it untestable without a cluster."""
    users = [
        str(path.relative_to(ROOT))
        for path in ROOT.glob("curate/**/*.py")
        if any(
            name.split(".")[0] == "ray"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        )
    ]
    assert users == ["curate/engine/ray.py"]


def test_pipelines_are_short() -> None:
    """Guards against recipes that stop reading like a method section."""
    long = [path.name for path in ROOT.glob("pipelines/*.py") if len(path.read_text().splitlines()) > 120]
    assert long == []
