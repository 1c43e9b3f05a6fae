"""The transfer in the report: figure, tables, sentences, section."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from fabricate import edited, fabricate

from dsteer.report.figures import draw_result
from dsteer.report.html import write_report
from dsteer.report.style import Drawing, styled
from dsteer.report.transfer_figures import share_of_native
from dsteer.report.transfer_tables import LEVELS, METRICS, transfer_sentences, transfer_tables
from dsteer.report.values import interval, number
from dsteer.store import write_json

NULLS = ("shuffled", "mapped_random", "mean_carried", "mean_state", "random")
WHY = "the interval of the native vector's effect includes 0"


def about(value: float, half: float = 0.1) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 64}


def band(mean: float, draws: int = 20) -> dict[str, Any]:
    half = 0.2 if draws > 1 else 0.0
    return {"mean": mean, "low": mean - half, "high": mean + half, "draws": draws}


def metric(native: float, share: float | None, null: float) -> dict[str, Any]:
    bands = {
        name: {
            "effect": band(null * native, 1 if "mean" in name else 20),
            "share": None if share is None else band(null, 1 if "mean" in name else 20),
        }
        for name in NULLS
    }
    return {
        "native_best": about(native),
        "native": about(native / 2),
        "carried": about(native * (share or 0.5)),
        "share": None if share is None else about(share),
        "why": WHY if share is None else None,
        "share_here": None if share is None else about(2 * share),
        "why_here": WHY if share is None else None,
        "nulls": bands,
        "above_nulls": share is not None,
        "harms": False,
    }


def made_up() -> dict[str, Any]:
    """A result: one metric undefined at λ = 1, one never measured, a null far below the panel."""
    chosen = {
        "sender_site": "resid_post.7", "receiver_site": "resid_post.11", "map": "cca",
        "penalty": 1e-4, "components": 64, "r_squared": 0.41, "carried_norm": 3.0,
        "natural_norm": 2.0, "cosine": 0.57, "kl_recovered_tune": 0.33,
        "native_kl_recovered_tune": 0.6, "positions": "all",
    }  # fmt: skip
    other = {**chosen, "receiver_site": "resid_post.3", "kl_recovered_tune": 0.1, "map": "ridge"}
    worse = {**chosen, "map": "ridge", "kl_recovered_tune": 0.2}
    return {
        "sender": {"base": "owner/a", "tuned": "owner/a-chat", "vectors": None, "width": 64,
                   "blocks": 12, "norms": {"resid_post.7": 1.5}},
        "receiver": {"width": 96, "blocks": 16, "norms": {"resid_post.11": 2.0}},
        "text": {"source": "the train split", "texts": 200,
                 "tokens": {"sender": 20100, "receiver": 20000},
                 "positions": {"fit": 9000, "tune": 2000, "test": 2100}, "sinks": 3},
        "candidates": [worse, other, chosen],
        "chosen": chosen,
        "chosen_on": "tune",
        "chosen_by": "KL recovered at λ = 1",
        "positions": "all",
        "natural_norm": 2.0,
        "strengths": {"grid": [0.5, 1.0], "tuned": {"native": [1.0], "carried": [0.5]}},
        "native_best": {
            level: {"sender_site": None, "receiver_site": "resid_post.15", "map": None,
                    "positions": "generated", "strength": strength}
            for level, strength in (("one", 1.0), ("tuned", 1.5))
        },
        "pairs": {"choice": 16, "tune": 32, "test": 64, "written": False},
        "cosine": {"carried": 0.57, "nulls": {name: band(0.02) for name in NULLS},
                   "above_nulls": True},
        "null_labels": {name: f"null {name}" for name in NULLS},
        "metrics": {
            "kl_recovered": {"one": metric(0.6, 0.55, -3.0), "tuned": metric(0.6, 0.7, -0.1)},
            "first_token": {"one": metric(0.5, 0.4, -0.9), "tuned": metric(0.5, 0.5, -0.1)},
            "reward_margin": {"one": metric(0.01, None, 0.0), "tuned": metric(0.2, 0.8, 0.0)},
            "reward_accuracy": None,
        },
        "headline": {"sender_site": "resid_post.7", "share": 0.55},
        "notes": [],
    }  # fmt: skip


def drawn(result: dict[str, Any]) -> Drawing:
    with styled():
        drawing = share_of_native(result, Path())
        assert drawing is not None
        drawing.figure.draw_without_rendering()
    return drawing


def test_the_figure_holds_every_share() -> None:
    result = made_up()
    data = drawn(result).data
    assert list(data["levels"]) == list(LEVELS)
    for level, shown in data["levels"].items():
        assert list(shown) == ["kl_recovered", "first_token", "reward_margin"]
        for name, values in shown.items():
            share = result["metrics"][name][level]["share"]
            if share is None:
                assert values is None
                continue
            assert values["share"] == {key: share[key] for key in ("value", "low", "high")}
            for null in NULLS:
                wanted = result["metrics"][name][level]["nulls"][null]["share"]
                assert values["nulls"][null] == wanted
    assert data["cosine"]["carried"] == 0.57
    assert set(data["cosine"]["nulls"]) == set(NULLS)
    assert "KL recovered at λ = 1: 0.550 [0.450, 0.650]" in data["caption"]


def test_points_stand_where_the_numbers_are() -> None:
    axes = drawn(made_up()).figure.axes[1]
    blue = [line for line in axes.lines if line.get_color() == "#0072B2"]
    carried = [line for line in blue if line.get_marker() == "o"]
    assert [line.get_ydata()[0] for line in carried] == [0.55, 0.4]
    bars = [line for line in blue if line.get_marker() == "None"]
    assert [list(line.get_ydata()) for line in bars] == [
        pytest.approx([0.45, 0.65]), pytest.approx([0.3, 0.5])
    ]  # fmt: skip
    assert "undefined" in {text.get_text() for text in axes.texts}
    low, high = axes.get_ylim()
    assert low < -1.5 < 1 < high < 2.2
    assert drawn(made_up()).figure.axes[2].get_ylim() == (low, high)


@pytest.mark.parametrize(("share", "inward"), [(3.0, 1.86), (-4.0, -1.36)])
def test_what_lies_beyond_the_panel_is_an_arrow_with_its_value(share: float, inward: float) -> None:
    result = made_up()
    found = result["metrics"]["kl_recovered"]["one"]
    found["share"] = about(share)
    for name in NULLS:
        found["nulls"][name]["share"] = band(share)
    axes = drawn(result).figure.axes[1]
    carried = [
        line for line in axes.lines if line.get_color() == "#0072B2" and line.get_marker() == "o"
    ]
    assert [line.get_ydata()[0] for line in carried] == [0.4], "no point where the share is not"
    arrows = [text for text in axes.texts if getattr(text, "arrow_patch", None) is not None]
    assert [arrow.xyann[1] for arrow in arrows] == [pytest.approx(inward)] * (1 + len(NULLS))
    assert all((arrow.xy[1] > arrow.xyann[1]) == (share > 0) for arrow in arrows)
    assert number(share) in {text.get_text() for text in axes.texts}
    low, high = axes.get_ylim()
    assert low < min(arrow.xy[1] for arrow in arrows)
    assert high > max(arrow.xy[1] for arrow in arrows)


def test_tables() -> None:
    result = made_up()
    tables = {table.key: table for table in transfer_tables(result)}
    assert list(tables) == [
        "transfer-set-up", "transfer-effects-one", "transfer-effects-tuned", "transfer-choices"
    ]  # fmt: skip
    facts = {row[0]: row[1] for row in tables["transfer-set-up"].rows}
    assert facts["sender (A)"] == "owner/a-chat (base owner/a)"
    assert facts["map"] == "cca, penalty 1.00\u00a0×\u00a010⁻⁴, components 64"
    assert facts["shared positions (word ends)"].endswith("test 2,100; attention sinks left out 3")
    assert facts["λ chosen on tune"] == "native 1; carried 0.5"
    rows = {row[0]: row for row in tables["transfer-effects-one"].rows}
    kl = result["metrics"]["kl_recovered"]["one"]
    assert rows["KL recovered"][1:6] == [
        interval(kl[key]) for key in ("native_best", "native", "carried", "share", "share_here")
    ]
    assert rows["KL recovered"][6] == "yes"
    assert rows[METRICS["reward_margin"]][4:6] == [f"undefined: {WHY}"] * 2
    assert rows[METRICS["reward_accuracy"]][1:6] == ["undefined"] * 5
    assert rows["cosine with native v*"][3] == "0.570"
    assert facts["native best, λ = 1"] == "resid_post.15, generated tokens, λ 1"
    assert facts["native best, λ chosen on tune"] == "resid_post.15, generated tokens, λ 1.5"
    assert facts["pairs"] == "tune 32 (the first 16 for the choice of the way), test 64"
    for table in tables.values():
        assert all(len(row) == len(table.columns) for row in table.rows)
    choices = tables["transfer-choices"].rows
    assert [row[:5] for row in choices] == [
        ["resid_post.7", "resid_post.11", "cca", "all", "0.330"],
        ["resid_post.7", "resid_post.3", "ridge", "all", "0.100"],
    ]


def test_sentences() -> None:
    result = made_up()
    (said,) = transfer_sentences(result)
    assert said == (
        "The vector of owner/a-chat (base owner/a), carried from its resid_post.7 to resid_post.11 "
        "by cca, has cosine 0.570 with this pair's own v* (nulls reach 0.220). At "
        "λ = 1 it recovers 0.330 [0.230, 0.430] of the KL, above all nulls; v* recovers "
        "0.600 [0.500, 0.700] where it does best (resid_post.15, generated tokens) and "
        "0.300 [0.200, 0.400] where the carried vector acts; its share of the native best is "
        "0.550 [0.450, 0.650]."
    )
    result["metrics"]["kl_recovered"]["one"]["above_nulls"] = False
    assert "not above all nulls" in transfer_sentences(result)[0]
    result["metrics"]["kl_recovered"]["one"]["harms"] = True
    assert "of the KL, it does harm; v* recovers" in transfer_sentences(result)[0]
    (table,) = (t for t in transfer_tables(result) if t.key == "transfer-effects-one")
    assert table.rows[1][6] == "no: it does harm"
    result["metrics"]["kl_recovered"]["one"] |= {"share": None, "why": WHY}
    assert transfer_sentences(result)[0].endswith(f"is undefined: {WHY}.")
    result["sender"] |= {"tuned": None, "vectors": "a.safetensors"}
    assert transfer_sentences(result)[0].startswith("The vector of a.safetensors (base owner/a)")
    assert transfer_sentences(None) == []


def test_section(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", stages=("data", "activations"))
    result = made_up()
    write_json(run / "transfer" / "result.json", result)
    with edited(run / "manifest.json") as manifest:
        manifest["stages"]["transfer"] = copy.deepcopy(manifest["stages"]["data"])
    html = write_report(run).read_text(encoding="utf-8")
    assert 'href="transfer/figures/share_of_native.pdf"' in html
    assert "owner/a-chat (base owner/a)" in html
    assert "Site pairs, each with its best map" in html
    written = draw_result("transfer", result, run / "transfer")
    assert [path.name for path in written] == [
        f"share_of_native.{s}" for s in ("pdf", "png", "json")
    ]
    assert share_of_native({**result, "metrics": {}}, Path()) is None
