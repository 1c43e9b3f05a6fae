"""Control in the report: figures, tables, sentences."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from fabricate import edited, fabricate

from dsteer.report.control_figures import control_grid, control_matrix
from dsteer.report.control_tables import control_sentences, control_tables
from dsteer.report.figures import draw_result
from dsteer.report.html import write_report
from dsteer.report.style import styled
from dsteer.report.values import interval
from dsteer.store import write_json

AXES, ORACLES = ("enthusiastic", "numbered"), ("brief", "enthusiastic", "numbered")


def about(value: float, half: float = 0.1) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 64}


def setting(site: str) -> dict[str, Any]:
    return {
        "site": site, "read": "last", "positions": "all", "strength": 0.5,
        "strength_in_vectors": 0.7, "tune_move": 0.9, "tune_selective": 0.8,
        "tune_degenerate": 0.05,
    }  # fmt: skip


def oracle(move: float, stands_out: bool) -> dict[str, Any]:
    return {
        "move": about(move), "up": about(move), "down": about(-move),
        "at": {"+": about(move), "-": about(-move)},
        "random": {"low": -0.2, "high": 0.15, "draws": 20}, "stands_out": stands_out,
    }  # fmt: skip


def measured(axis: str, own: float, other: str) -> dict[str, Any]:
    oracles = {name: oracle(0.01, False) for name in ORACLES} | {
        axis: oracle(own, own > 0),
        "brief": oracle(0.25, other == "brief"),
    }
    return {
        "setting": setting("resid_post.2"),
        "separation": {"accuracy": 0.95, "cohens_d": 3.0, "n": 180},
        "oracles": oracles, "own": oracles[axis]["move"], "worst_other": "brief",
        "leakage": 0.25 / own if own > 0 else None,
        "leakage_undefined": None if own > 0 else "the vector doesn't clearly raise its own oracle",
        "others_stand_out": ["brief"] if other == "brief" else [],
        "degenerate": {"+": 0.01, "-": 0.02},
    }  # fmt: skip


def dial(r2: float | None) -> dict[str, Any]:
    return {
        "cells": [[about(0.8 * i + 0.02 * j) for j in (-1, 0, 1)] for i in (-1, 0, 1)],
        "own": about(0.8), "own_at": [about(0.7), about(0.8), about(0.9)], "cross": about(0.02),
        "interaction": about(0.03), "dependence": 0.04, "additive_r2": r2,
        "additive_undefined": None if r2 is not None else "the oracle is the same in all cells",
    }  # fmt: skip


def made_up() -> dict[str, Any]:
    return {
        "axes": list(AXES), "oracles": list(ORACLES),
        "descriptions": {name: f"what {name} is" for name in ORACLES},
        "pairs": dict.fromkeys(AXES, 180), "prompts": {"tune": 64, "test": 128},
        "base": {"scores": {name: about(0.0) for name in ORACLES}, "degenerate": 0.0},
        "measured": {
            "enthusiastic": measured("enthusiastic", 0.96, "none"),
            "numbered": measured("numbered", -0.1, "brief"),
        },
        "grid": {
            "axes": list(AXES), "levels": [-1, 0, 1], "cosine": 0.06,
            "settings": dict.fromkeys(AXES, setting("resid_post.3")),
            "degenerate": [[0.1, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.2]],
            "oracles": {"enthusiastic": dial(0.998), "numbered": dial(None)},
            "others": {"brief": {"low": -0.1, "high": 0.2}},
        },
        "headline": {}, "notes": ["a note"],
    }  # fmt: skip


def test_tables() -> None:
    result = made_up()
    tables = {table.key: table for table in control_tables(result)}
    assert list(tables) == [
        "control-settings", "control-matrix", "control-enthusiastic", "control-numbered",
        "control-grid", "control-cells",
    ]  # fmt: skip
    for table in tables.values():
        assert all(len(row) == len(table.columns) for row in table.rows)
    matrix = {row[0]: row[1:] for row in tables["control-matrix"].rows}
    assert matrix["enthusiastic"] == ["0.25", "0.96*", "0.010", "0.26"]
    assert matrix["numbered"][0] == "0.25*"
    assert matrix["numbered"][-1] == "undefined: the vector doesn't clearly raise its own oracle"
    assert [row[:3] for row in tables["control-settings"].rows[:2]] == [
        ["enthusiastic", "alone", "resid_post.2"], ["enthusiastic", "at once", "resid_post.3"]
    ]  # fmt: skip
    grid = {row[0]: row[1:] for row in tables["control-grid"].rows}
    assert grid["enthusiastic"][0] == interval(about(0.8))
    assert grid["numbered"][-1] == "undefined: the oracle is the same in all cells"
    cells = tables["control-cells"].rows
    assert cells[0] == ["−λ", "−λ", interval(about(-0.82)), interval(about(-0.82)), "10.0\u00a0%"]
    # The oracle of the second axis has its own level as first index.
    assert cells[2][:4] == ["−λ", "+λ", interval(about(-0.78)), interval(about(0.78))]


def test_sentences() -> None:
    said = control_sentences(made_up())
    assert said[0] == (
        "The contrast vector of enthusiastic moves its own oracle by 0.960 [0.860, 1.06]; no other "
        "oracle moves clearly more than under random directions (most: brief 0.250 [0.150, "
        "0.350], leakage 0.260)."
    )
    assert "not clearly more than random directions of its norm do; it also moves brief" in said[1]
    assert "leakage undefined: the vector doesn't clearly raise its own oracle" in said[1]
    assert "through that of numbered; at one level of its own it depends on numbered" in said[2]
    assert control_sentences(None) == []
    result = made_up() | {"grid": {"axes": list(AXES), "undefined": "no site"}}
    assert control_sentences(result)[-1] == "Both axes at once: undefined, no site."
    assert [table.key for table in control_tables(result)][-1] == "control-numbered"


def test_figures_hold_every_number() -> None:
    result = made_up()
    with styled():
        matrix, grid = control_matrix(result, Path()), control_grid(result, Path())
    assert matrix is not None
    assert grid is not None
    assert matrix.data["moves"]["numbered"]["brief"] == {"move": about(0.25), "stands_out": True}
    shown = [text.get_text() for text in matrix.figure.axes[0].texts]
    assert shown == ["0.25", "0.96*", "0.01", "0.25*", "0.01", "−0.10"]
    assert grid.data["cells"]["enthusiastic"] == result["grid"]["oracles"]["enthusiastic"]["cells"]
    lines = [line.get_ydata() for line in grid.figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert any(abs(y[2] - 0.8) < 1e-12 for y in lines)  # own level + at the other's 0
    with styled():
        assert control_matrix({}, Path()) is None
        assert control_grid(result | {"grid": None}, Path()) is None


def test_section(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", stages=("data", "base"))
    write_json(run / "control" / "result.json", made_up())
    with edited(run / "manifest.json") as manifest:
        manifest["stages"]["control"] = copy.deepcopy(manifest["stages"]["data"])
    html = write_report(run).read_text(encoding="utf-8")
    for name in ("control_matrix", "control_grid"):
        assert f'href="control/figures/{name}.pdf"' in html
    assert "The contrast vector of enthusiastic moves its own oracle" in html
    assert len(draw_result("control", made_up(), run / "control")) == 6
