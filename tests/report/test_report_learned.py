"""Learned vectors in the report: figure, tables, sentences, section."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from fabricate import edited, fabricate

from dsteer.report.figures import draw_result
from dsteer.report.html import write_report
from dsteer.report.learned_figures import reward_and_kl
from dsteer.report.learned_tables import METRICS, learned_sentences, learned_tables
from dsteer.report.style import styled
from dsteer.report.values import interval
from dsteer.store import write_json

SITE = "resid_post.2"


def about(value: float, half: float = 0.05) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 64}


def metrics(margin: float, cost: float, kl: float | None = 0.2) -> dict[str, Any]:
    return {
        "reward_margin": about(margin), "preference_accuracy": about(0.8),
        "loss": about(0.7 - margin / 4), "kl_recovered": None if kl is None else about(kl),
        "kl_recovered_first": None if kl is None else about(kl / 2),
        "kl_to_base": about(cost, cost / 10),
    }  # fmt: skip


def learned(label: str, margin: float, gap: float, bound: float | None = None) -> dict[str, Any]:
    curve = [
        {"step": step, "loss": 0.7 - step / 100 if step else None,
         "heldout": {"loss": 0.69 - step / 90, "accuracy": 0.6, "margin": 0.1},
         "norm": {SITE: step / 10}}
        for step in (0, 10, 20)
    ]  # fmt: skip
    against = {name: about(gap, 0.01) for name in METRICS}
    return {
        "label": label, "strength": 1.0, "start": "zero", "max_norm": bound, "chosen_step": 10,
        "curve": curve, "norm": 3.0, "cosine": 0.6, "metrics": metrics(margin, 0.02),
        "against": {"vector": against, "vector_least_loss": against},
    }  # fmt: skip


def made_up() -> dict[str, Any]:
    def own(label: str, strength: float, margin: float, cost: float) -> dict[str, Any]:
        return {"label": label, "strength": strength, "norm": 2 * strength, "cosine": 1.0,
                "metrics": metrics(margin, cost), "against": {}}  # fmt: skip

    band = {"mean": 0.0, "low": -0.2, "high": 0.2}
    random = {"norm": 2.0, "draws": 20, "pairs": 32, "metrics": dict.fromkeys(METRICS, band)}
    return {
        "beta": 0.5, "split": "fit", "n_fit": 512, "n_tune": 64, "n_test": 128,
        "settings": {"steps": 20, "batch_size": 16, "learning_rate": 0.1, "eval_every": 10,
                     "max_length": 512},
        "strengths": [0.5, 1.0, 2.0],
        "candidates": {
            "resid_post.1": {"norm": 1.0, "positions": "all",
                             "kl_recovered": {"all": 0.1, "prompt_last": None}},
            SITE: {"norm": 2.0, "positions": "all",
                   "kl_recovered": {"all": 0.3, "prompt_last": 0.1}},
        },
        "sites": {
            SITE: {
                "positions": "all", "chosen_on": "tune", "vector_norm": 2.0,
                "learned": "learned_zero",
                "arms": {
                    "vector": own("v*, λ = 1", 1.0, 0.4, 0.001),
                    "vector_least_loss": own("v*, λ of least loss", 2.0, 0.9, 0.05),
                    "learned_zero": learned("learned from zero", 1.2, -0.2),
                    "learned_zero_bounded": learned(
                        "learned from zero, ‖v‖ ≤ ‖v*‖", 0.5, 0.001, bound=2.0
                    ),
                },
                "tuned": {**metrics(1.5, 0.03), "kl_recovered": 1.0, "kl_recovered_first": 1.0},
                "random": {"vector": random, "learned_zero": None},
                "cosine_null": {"mean": 0.0, "low": -0.17, "high": 0.18, "draws": 1000},
            }
        },
        "headline": {}, "notes": [],
    }  # fmt: skip


def test_points_stand_where_the_numbers_are() -> None:
    with styled():
        drawing = reward_and_kl(made_up(), Path())
    assert drawing is not None
    points, curves = drawing.figure.axes
    marked = {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in points.lines
        if line.get_marker() not in ("None", "")
    }
    assert marked == {(0.001, 0.4), (0.05, 0.9), (0.02, 1.2), (0.02, 0.5), (0.03, 1.5)}
    assert points.get_xscale() == "log"
    chosen = [line for line in curves.lines if list(line.get_xdata()) == [10.0]]
    assert len(chosen) == 2
    assert {float(line.get_ydata()[0]) for line in chosen} == {0.69 - 10 / 90}
    shown = drawing.data["sites"][SITE]
    assert shown["points"]["learned_zero"]["reward_margin"]["value"] == 1.2
    assert shown["points"]["random"] == {"reward_margin": [-0.2, 0.2]}
    assert "random_learned" not in shown["points"]
    result = made_up()
    wide = {"reward_margin": {"mean": 0.0, "low": -0.5, "high": 0.6}}
    result["sites"][SITE]["random"]["learned_zero"] = {"metrics": wide}
    with styled():
        both = reward_and_kl(result, Path())
    assert both is not None
    levels = {float(line.get_ydata()[0]) for line in both.figure.axes[0].lines if
              line.get_linestyle() == "--"}  # fmt: skip
    assert levels == {-0.5, 0.6}
    assert shown["curves"]["learned_zero"]["train"] == {
        "steps": [10.0, 20.0], "loss": [pytest.approx(0.6), pytest.approx(0.5)]
    }  # fmt: skip
    assert "1.20 [1.15, 1.25]" in drawing.data["caption"]


def test_tables() -> None:
    result = made_up()
    tables = {table.key: table for table in learned_tables(result)}
    assert list(tables) == [
        "learned-set-up", "learned-vectors", "learned-differences", "learned-places"
    ]  # fmt: skip
    rows = {row[1]: row for row in tables["learned-vectors"].rows}
    assert rows["learned from zero"][2:7] == [
        "1.00", "10", "3.00", "0.600", interval(about(1.2))
    ]  # fmt: skip
    assert rows["random, norm of v*, λ = 1"][6] == "−0.200 to 0.200"
    assert "random, norm of learned from zero" not in rows
    assert rows["tuned model"][9] == "1.00"
    assert len(tables["learned-differences"].rows) == 4
    places = tables["learned-places"].rows
    assert places[0] == ["resid_post.1", "1.00", "0.100", "–", "no"]
    assert places[1][-1] == "all tokens"
    for table in tables.values():
        assert all(len(row) == len(table.columns) for row in table.rows)
    result["sites"][SITE]["arms"]["vector"]["metrics"]["kl_recovered"] = None
    (table,) = (t for t in learned_tables(result) if t.key == "learned-vectors")
    assert table.rows[0][9] == "undefined"


def test_sentences() -> None:
    result = made_up()
    first, second = learned_sentences(result)
    assert "held-out reward margin of 1.20 [1.15, 1.25] at a KL to the base of 0.0200" in first
    assert "Its cosine with v* is 0.600 (random directions −0.170 to 0.180)." in first
    assert second.startswith("It does better than v* at λ = 2, the strength of least loss")
    assert "learning can't be told from v* at λ = 1" in second
    result["sites"][SITE]["random"]["learned_zero"] = result["sites"][SITE]["random"]["vector"]
    assert learned_sentences(result)[1] == (
        "Random directions of its norm have margins from −0.200 to 0.200 (middle 95 % of 20, on 32 "
        "test pairs)."
    )
    result["sites"][SITE]["random"]["learned_zero"] = None  # its norm is 0
    gap = result["sites"][SITE]["arms"]["learned_zero"]["against"]["vector_least_loss"]
    gap["loss"] = about(0.2)
    assert learned_sentences(result)[1].startswith("It does worse than v*")
    gap["loss"] = {"value": 0.2, "low": None, "high": None, "n": 1}
    assert learned_sentences(result)[1].startswith("It has no interval to be compared by")
    assert learned_sentences(None) == []


def test_section(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", stages=("data", "activations"))
    result = made_up()
    write_json(run / "learned" / "result.json", result)
    with edited(run / "manifest.json") as manifest:
        manifest["stages"]["learned"] = copy.deepcopy(manifest["stages"]["data"])
    html = write_report(run).read_text(encoding="utf-8")
    assert 'href="learned/figures/reward_and_kl.pdf"' in html
    assert "held-out reward margin of 1.20" in html
    assert [path.name for path in draw_result("learned", result, run / "learned")] == [
        f"reward_and_kl.{s}" for s in ("pdf", "png", "json")
    ]
    assert reward_and_kl({**result, "sites": {}}, Path()) is None
