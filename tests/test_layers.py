"""Imports point down only, and light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dsteer"

# A module may import its own layer and those below; the report also has a list of its own.
LAYERS = {
    "errors": 0, "names": 0, "config": 0,
    "geometry": 1, "store": 1, "progress": 1, "parallel": 1,
    "models": 2, "data": 2, "activations": 2,
    "training": 3, "steering": 3, "behaviour": 3, "transfer": 3, "report": 3, "mlx": 3,
    "stages": 4, "doctor": 4, "exchange": 4, "serving": 4,
    "pipeline": 5, "study": 5, "nulls": 5, "sharing": 5, "spread": 5, "compare": 5,
    "cli": 6, "__main__": 6,
}  # fmt: skip
REPORT_MAY_USE = {"errors", "store", "progress", "report"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The dsteer parts that a file imports anywhere, type checking included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("dsteer.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = part(path)
    for other in imported(path):
        assert LAYERS[other] <= LAYERS[here], f"{here} imports {other}, a layer above it"
    if here == "report":
        assert imported(path) <= REPORT_MAY_USE
    if here == "stages" and path.name != "__init__.py":
        own = {f"dsteer.stages.{p.stem}" for p in (PACKAGE / "stages").glob("*.py")}
        text = path.read_text(encoding="utf-8")
        for name in own - {"dsteer.stages.__init__"}:
            assert name not in text, f"{path.name} imports another stage"


def test_no_utils_module() -> None:
    assert not list(PACKAGE.rglob("utils.py"))


def test_only_training_imports_trl() -> None:
    users = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if any(name.split(".")[0] == "trl" for name in names):
                users.add(part(path))
    assert users == {"training"}


def heavy_after(code: str) -> set[str]:
    """Which heavy libraries are loaded after running some code in a fresh interpreter."""
    probe = (
        f"import sys\n{code}\n"
        "print(','.join(m for m in ('torch','transformers','trl','datasets','matplotlib')"
        " if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(filter(None, done.stdout.splitlines()[-1].split(",")))


@pytest.mark.parametrize(
    "code",
    [
        "import dsteer",
        "import dsteer.pipeline, dsteer.config, dsteer.store, dsteer.stages",
        "from typer.testing import CliRunner\nfrom dsteer.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0",
        "from typer.testing import CliRunner\nfrom dsteer.cli import app\n"
        "r = CliRunner().invoke(app, ['plan', 'tiny'])\nassert r.exit_code == 0, r.output",
    ],
    ids=["package", "runner", "help", "plan"],
)
def test_light_paths_load_nothing_heavy(code: str) -> None:
    assert heavy_after(code) == set()


def test_report_needs_no_torch() -> None:
    assert not heavy_after("import dsteer.report.html, dsteer.report.figures") & {
        "torch", "transformers", "trl", "datasets",
    }  # fmt: skip


def test_public_names_resolve() -> None:
    import dsteer

    for name in dsteer.__all__:
        assert getattr(dsteer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dsteer.nothing
