"""``dsteer vectors``: provenance, norms and cosines of files, in tables and as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dsteer import cli
from dsteer.cli.text import table
from dsteer.steering.overview import overview
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

RNG = np.random.default_rng(2)
ROWS = RNG.normal(size=(3, 2, 8))
SITES = ("resid_post.0", "resid_post.1")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    made = []
    for name, rows in zip(("warm", "brief", "dry"), ROWS, strict=True):
        vectors = [SteeringVector(row, site) for row, site in zip(rows, SITES, strict=True)]
        path = tmp_path / f"{name}.safetensors"
        SteeringVectorSet(vectors, {"method": "contrast mean", "hash": "ab" * 32}).save(path)
        made.append(str(path))
    return made


def ask(*arguments: str, width: int = 80) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["vectors", *arguments], env={"COLUMNS": str(width)})
    return result.exit_code, result.stdout, result.stderr


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_tables(files: list[str]) -> None:
    code, out, err = ask(*files)
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert out.count("contrast mean") == 3
    assert f"{'ab' * 6}…" in out
    norms = [f"{np.linalg.norm(rows[0]):.4g}" for rows in ROWS]
    assert ["resid_post.0", *norms] in lines
    mean = np.mean([cosine(ROWS[0][k], ROWS[1][k]) for k in range(2)])
    (warm,) = [line for line in lines if line[:1] == ["warm"] and len(line) == 4]
    assert warm[1:3] == ["1.000", f"{mean:.3f}"]
    last = f"{cosine(ROWS[1][1], ROWS[2][1]):.3f}"
    assert [line for line in lines if line[:1] == ["resid_post.1"]][-1][-1] == last


def test_a_narrow_terminal(files: list[str]) -> None:
    """No line is wider than it, and numbers stay whole."""
    code, out, err = ask(files[0], f"other={files[1]}", width=36)
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 36
    assert f"{cosine(ROWS[0][1], ROWS[1][1]):.3f}" in out


@pytest.mark.parametrize("width", [24, 32, 40, 56, 200])
def test_no_number_is_cut(files: list[str], width: int) -> None:
    """Columns that a terminal has no room for stand below, with the names of the rows again."""
    code, out, err = ask(*files, "--site", "resid_post.1", width=width)
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= width
    expected = [f"{np.linalg.norm(rows[1]):.4g}" for rows in ROWS]
    expected += [f"{cosine(ROWS[a][1], ROWS[b][1]):.3f}" for a, b in ((0, 1), (0, 2), (1, 2))]
    assert set(expected) <= set(out.split())


def test_metadata_in_one_order_and_without_what_a_terminal_obeys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files keep no order, and a foreign one may hold anything."""
    told = {"zeal": 1, "seed": 0, "units": "states\x1b]0;x\x07", "model": "m", "method": "mean"}
    path = tmp_path / "v.safetensors"
    SteeringVectorSet([SteeringVector([1.0], "resid_post.0")], told).save(path)
    found = overview({"v": SteeringVectorSet.load(path)})
    assert list(found["sets"]["v"]["metadata"]) == ["method", "model", "units", "seed", "zeal"]
    with monkeypatch.context() as patched:
        patched.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        cells = list(table(("v", ""), [("units", told["units"])]).columns[1].cells)
    assert [cell.plain for cell in cells] == ["states␛]0;x␇"]


def test_json(files: list[str]) -> None:
    code, out, err = ask(*files[:2], "--site", "resid_post.1", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["sites"] == ["resid_post.1"]
    # the file holds float32
    assert found["cosines"][0]["mean"] == pytest.approx(cosine(ROWS[0][1], ROWS[1][1]), abs=1e-6)
    assert found["sets"]["warm"]["metadata"]["hash"] == "ab" * 32


def test_mistakes(files: list[str]) -> None:
    code, _, err = ask(*files, "--site", "resid_post.7")
    assert (code, err.count("\n")) == (2, 1)
    assert "site 'resid_post.7': no file holds a vector there" in err
    code, _, err = ask(files[0], files[0])
    assert code == 2
    assert "another one is called 'warm'; use NAME=FILE" in err
    code, _, err = ask("nothing.safetensors")
    assert code == 2
    assert "nothing.safetensors" in err
