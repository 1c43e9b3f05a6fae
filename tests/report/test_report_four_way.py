"""The four-way figure, its tables and sentences, from made-up artifacts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricate_template import write_template
from matplotlib.colors import to_hex

from dsteer.report.figures import FIGURES, draw_result
from dsteer.report.four_way_tables import four_way_sentences, four_way_tables
from dsteer.report.headline import headline
from dsteer.report.html import write_report
from dsteer.report.style import styled
from dsteer.report.values import interval
from dsteer.store import read_json

PARTS = ("training_raw", "template_base", "interaction")


def result_of(
    blocks: int = 3, norm: bool = True, still: tuple[int, ...] = (), **given: float
) -> dict[str, Any]:
    random = np.random.default_rng(5)
    sites = [f"resid_post.{k}" for k in range(blocks)] + ["final_norm"] * norm
    base = {site: random.normal(size=(40, 12)) for site in sites}
    delta = {
        site: (0.3 * random.normal(size=12) + 0.1 * random.normal(size=(40, 12))) * (k not in still)
        for k, site in enumerate(sites)
    }
    return write_template(Path(), base, delta, **given)


def drawn(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    draw_result("template", result, folder)
    return json.loads((folder / "figures" / "four_way.json").read_text(encoding="utf-8"))


def test_figure_holds_every_number_it_shows(tmp_path: Path) -> None:
    result = result_of()
    found = drawn(result, tmp_path)
    for site, row in result["sites"].items():
        shown = found["sites"][site]
        assert list(shown["shares"]) == list(PARTS)
        assert sum(share["value"] for share in shown["shares"].values()) == pytest.approx(1)
        for part in PARTS:
            expected = row["parts"][part]["share"]
            assert shown["shares"][part] == {key: expected[key] for key in ("value", "low", "high")}
        assert shown["relative_norms"].keys() == {*PARTS, "training_templated", "template_tuned"}
    share = result["sites"]["final_norm"]["parts"]["template_base"]["share"]["value"]
    assert f"template, base {100 * share:.1f}" in found["caption"]
    assert "60 test prompts" in found["caption"]


def test_marks_stand_at_the_numbers(tmp_path: Path) -> None:
    result = result_of()
    with styled():
        drawing = FIGURES["template"]["four_way"](result, tmp_path)
    assert drawing is not None
    upper, lower = drawing.figure.axes
    for axes, key, parts in ((upper, "share", PARTS), (lower, "relative_norm", (PARTS[0],))):
        marks = [line for line in axes.lines if line.get_marker() not in ("None", "", None)]
        for line, part in zip(marks, parts, strict=False):
            expected = [row["parts"][part][key]["value"] for row in result["sites"].values()]
            np.testing.assert_allclose(line.get_ydata(), expected)
    looks = {
        (handle.get_marker(), to_hex(handle.get_markerfacecolor()))
        for handle in drawing.figure.legends[0].legend_handles
    }
    assert len(looks) == 5
    assert len({marker for marker, _ in looks}) == 3, "kinds differ by more than colour"


def test_zero_and_undefined_are_said_and_never_drawn(tmp_path: Path) -> None:
    result = result_of(still=(0,))
    caption = drawn(result, tmp_path / "zero")["caption"]
    assert "Exactly zero and not drawn: training, raw text at resid_post.0" in caption
    nothing = result_of(still=(0,), template=0.0)
    found = drawn(nothing, tmp_path / "undefined")
    assert found["sites"]["resid_post.0"]["shares"]["template_base"]["value"] is None
    assert "Hatched, undefined: resid_post.0 (there is no displacement)." in found["caption"]
    shares, norms, directions = four_way_tables(nothing)[1:4]
    assert shares.rows[0][1:] == ["undefined"] * 8
    assert directions.rows[0][1:] == ["undefined"] * 7
    assert norms.rows[0][2] == "0 [−0.0300, 0.0300]"
    assert four_way_sentences(nothing, ["resid_post.0"])[0] == (
        "At resid_post.0: undefined, there is no displacement."
    )


@pytest.mark.parametrize(
    ("why", "words"),
    [("rounding", "the displacement is within rounding"),
     ("one_conversation", "the test prompts are of one conversation"),
     ("scatter", "the mean displacement is not told from 0 beside the prompts' scatter")],
)  # fmt: skip
def test_why_a_site_is_undefined_is_said(tmp_path: Path, why: str, words: str) -> None:
    result = result_of()
    row = result["sites"]["final_norm"]
    row |= {"undefined": True, "why": why, "cosines": dict.fromkeys(row["cosines"])}
    for part in row["parts"].values():
        part["share"] = None
    caption = drawn(result, tmp_path)["caption"]
    assert f"At final_norm shares are undefined: {words}." in caption
    assert f"Hatched, undefined: final_norm ({words})." in caption
    assert four_way_sentences(result, [])[0] == f"At final_norm: undefined, {words}."
    with styled():
        drawing = FIGURES["template"]["four_way"](result, tmp_path)
    assert drawing is not None
    upper, lower = drawing.figure.axes
    assert [sum(patch.get_hatch() is not None for patch in axes.patches)
            for axes in (upper, lower)] == [1, 1]  # fmt: skip


def test_a_part_not_told_from_zero_has_no_norm(tmp_path: Path) -> None:
    result = result_of()
    parts = result["sites"]["resid_post.1"]["parts"]
    parts["training_raw"] |= {"norm": None, "relative_norm": None}
    caption = drawn(result, tmp_path)["caption"]
    assert "Not told from 0, so without a norm: training, raw text at resid_post.1." in caption
    norms = four_way_tables(result)[2]
    assert norms.rows[1][3] == "undefined"
    said = four_way_sentences(result, ["resid_post.1"])[0]
    assert "Training moves raw text by nothing that is told from 0 and text in the" in said


def test_a_norm_within_rounding_is_no_number(tmp_path: Path) -> None:
    result = result_of()
    part = result["sites"]["resid_post.1"]["parts"]["interaction"]
    part |= {"relative_norm": {"value": 1e-9, "low": 0.0, "high": 2e-9}, "within_rounding": True}
    found = drawn(result, tmp_path)
    assert found["sites"]["resid_post.1"]["relative_norms"]["interaction"]["value"] is None
    assert "Within rounding, so without a norm: interaction at resid_post.1." in found["caption"]
    _, shares, norms, *_ = four_way_tables(result)
    assert norms.rows[1][7] == shares.rows[1][3] == shares.rows[1][8] == "within rounding"
    said = four_way_sentences(result, ["resid_post.1"])[0]
    assert "0\u00a0% (within rounding) their interaction" in said
    result["sites"]["resid_post.1"]["parts"]["training_raw"]["within_rounding"] = True
    assert (
        "moves raw text by nothing above rounding"
        in four_way_sentences(result, ["resid_post.1"])[0]
    )


def test_kl_within_rounding_is_said() -> None:
    result = result_of()
    for item in result["kl"].values():
        item["recovered"] = None
    table = four_way_tables(result)[-1]
    assert {row[3] for row in table.rows} == {"undefined"}
    assert "Recovered is undefined: the base's KL on raw text is not above" in table.caption
    assert all("recovers" not in said for said in four_way_sentences(result, []))


@pytest.mark.parametrize(
    "shape",
    [{"blocks": 0}, {"blocks": 1, "norm": False, "still": (0,), "template": 0.0},
     {"norm": False, "template": 1e3}, {"blocks": 40, "template": 1e-3}],
)  # fmt: skip
def test_every_shape_of_run(tmp_path: Path, shape: dict[str, Any]) -> None:
    result = result_of(**shape)
    assert drawn(result, tmp_path)["caption"].endswith(".")
    tables = four_way_tables(result)
    assert ("template-kl" in [table.key for table in tables]) == shape.get("norm", True)
    for table in tables:
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_tables_hold_the_results_numbers() -> None:
    result = result_of()
    prompts, shares, norms, directions, kl = four_way_tables(result)
    assert ["left out of test: template refuses", "4"] in prompts.rows
    assert ["chat template: read at the token", "'\\n' in 100 % of the prompts"] in [
        [cell.replace("\u00a0", " ") for cell in row] for row in prompts.rows
    ]
    row = result["sites"]["final_norm"]
    assert shares.rows[-1][0] == "final_norm"
    assert shares.rows[-1][1:4] == [interval(row["parts"][part]["share"]) for part in PARTS]
    assert norms.rows[-1][2] == interval(row["parts"]["total"]["relative_norm"])
    assert directions.rows[-1][1] == interval(row["cosines"]["training_forms"])
    assert directions.rows[-1][5] == interval(row["held_out"]["raw"]["templated"])
    assert len(kl.rows) == len(result["kl"])
    recovered = {line[0]: line[3] for line in kl.rows}
    assert recovered["base on raw text + both"] == interval(result["kl"]["v_both"]["recovered"])


def test_sentences_tell_the_sites_asked_for() -> None:
    result = result_of()
    said = four_way_sentences(result, [])
    part = result["sites"]["final_norm"]["parts"]["template_base"]["share"]["value"]
    assert re.match(rf"At final_norm, {100 * part:.1f}.% \[", said[0])
    assert "is the template" in said[0]
    assert "both 70.0" in said[1]
    assert four_way_sentences(result, ["resid_post.1", "elsewhere"])[0].startswith(
        "At resid_post.1,"
    )
    assert four_way_sentences(None, []) == []


def test_the_report_has_the_section_and_the_finding(drawn_run: Path) -> None:
    text = write_report(drawn_run).read_text(encoding="utf-8")
    assert 'id="f-template-four_way"' in text
    assert 'id="t-template-shares"' in text
    sentence = four_way_sentences(read_json(drawn_run / "template" / "result.json"), [])[-1]
    assert sentence in text.replace("&#39;", "'")


def test_a_run_without_activations_says_what_was_read() -> None:
    manifest = {"config": {"models": {"base": "small", "tuned": "small-it"}}}
    (title, (said,)), *points = headline(manifest, {"template": result_of()})
    assert title == "Compared"
    assert said == (
        "The base small, with the tuned small-it, at 4 sites on N = 140 prompts (fit 80, test 60), "
        "each read raw and through the chat template, at the token from which the models answer."
    )
    assert points[0][0] == "Template and training"
    assert headline(manifest, {})[0][1] == [
        "The base small, with the tuned small-it. No activations were read."
    ]
