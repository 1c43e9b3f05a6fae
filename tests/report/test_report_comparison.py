"""A study's figures and report from made-up results: complete, honest, and in one file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from fabricate_comparison import comparison, write_study
from test_report_html import Page

from dsteer.errors import StoreError
from dsteer.report import comparison_figures, comparison_html
from dsteer.report.comparison_figures import draw_comparison
from dsteer.report.comparison_html import write_comparison_report
from dsteer.report.comparison_tables import comparison_findings, comparison_tables
from dsteer.report.headline import CONSTANT_BIAS
from dsteer.report.style import styled
from dsteer.report.values import interval
from dsteer.store import read_json, write_json

THREE = ("sft", "dpo", "final")
EIGHT = tuple(f"size-{k}" for k in range(8))

SHAPES: dict[str, dict[str, Any]] = {
    "two": {"names": THREE[:2]},
    "three": {"names": THREE},
    "eight, 32 blocks": {"names": EIGHT, "blocks": 32},
    "eight, few sites": {"names": EIGHT},
    "final_norm alone": {"names": THREE, "blocks": 0},
    "one failed, one apart": {"names": EIGHT[:6], "failed": EIGHT[:1], "apart": EIGHT[1:2]},
    "nothing in common": {"names": THREE, "apart": THREE[1:]},
    "undefined": {"names": THREE, "undefined": True},
    "undefined, eight": {"names": EIGHT, "undefined": True},
    "no rows": {"names": THREE, "rowless": True},
    "one": {"names": THREE[:1]},
    "all but one failed": {"names": THREE, "failed": THREE[1:]},
}


def drawn(result: dict[str, Any], *names: str) -> dict[str, Any]:
    """The data of each figure that a result gives (or of some), laid out but not saved."""
    found = {}
    for name in names or comparison_figures.FIGURES:
        function = comparison_figures.FIGURES[name]
        with styled():
            drawing = function(result)
            if drawing is not None:
                drawing.figure.draw_without_rendering()
                found[name] = drawing.data
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_study_is_drawn_and_told(shape: str) -> None:
    """Warnings are errors, so a layout that collapses or an empty slice would fail here."""
    result = comparison(**SHAPES[shape])
    data = drawn(result)
    alone = shape in ("one", "all but one failed")
    apart = shape == "nothing in common"
    assert ("cosines_over_depth" in data) == (not alone and not apart)
    assert ("principal_angles" in data) == (
        not alone and not apart and "undefined" not in shape and shape != "no rows"
    )
    assert all(each["caption"].endswith(".") for each in data.values())
    said = dict(comparison_findings(result))
    assert said["Keep in mind"] == [CONSTANT_BIAS]
    assert len(said["Compared"]) == len(result["variants"])
    keys = {table.key for table in comparison_tables(result)}
    assert ("comparison-pairs" in keys) == (not alone)
    for table in comparison_tables(result):
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_heat_map_holds_cosines_above_disattenuated_below_and_reliability_between() -> None:
    result = comparison(EIGHT)
    data = drawn(result, "vector_cosines")["vector_cosines"]
    assert list(data["sites"]) == ["resid_post.2", "final_norm"]
    cells = data["sites"]["final_norm"]
    for pair in result["pairs"]:
        i, j = (EIGHT.index(pair[end]) for end in ("a", "b"))
        measured = pair["sites"]["final_norm"]
        assert cells[i][j]["value"] == measured["cosine"]["value"]
        assert cells[j][i]["value"] == measured["disattenuated"]["value"]
    assert [cells[i][i]["value"] for i in range(8)] == [0.95] * 8
    assert "95\u00a0% of random directions in d = 48" in data["caption"]


def test_other_widths_leave_empty_cells_and_undefined_is_none() -> None:
    result = comparison(THREE, apart=THREE[2:])
    cells = drawn(result, "vector_cosines")["vector_cosines"]["sites"]["final_norm"]
    assert [cells[i][2]["value"] for i in (0, 1)] == [None, None]
    data = drawn(comparison(THREE, undefined=True), "vector_cosines")
    cells = data["vector_cosines"]["sites"]["final_norm"]
    assert [cells[i][i]["value"] for i in range(3)] == [None] * 3
    assert cells[1][0]["value"] is None
    assert cells[0][1]["value"] is not None


def test_forest_keeps_values_that_are_off_its_scale() -> None:
    data = drawn(comparison(EIGHT), "variants_forest")["variants_forest"]
    first_token = data["panels"]["kl"]["first token"]
    assert first_token[7]["value"] == pytest.approx(0.6 - 0.4 * 7)
    assert data["panels"]["kl"]["response tokens"][0]["value"] is None
    assert data["panels"]["held_out"]["null_q95"] == [0.1] * 8


def test_same_result_gives_same_files(tmp_path: Path) -> None:
    result = comparison(THREE[:2], blocks=1)
    first = draw_comparison(result, tmp_path / "a")
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True}):  # a user's matplotlibrc
        again = draw_comparison(result, tmp_path / "b")
    assert {path.stem for path in first} == set(comparison_html.FIGURES)
    assert len(first) == 3 * len(comparison_html.FIGURES)
    digests = [[hashlib.sha256(p.read_bytes()).digest() for p in paths] for paths in (first, again)]
    assert digests[0] == digests[1]


def test_figures_of_the_report_are_those_that_are_drawn() -> None:
    assert tuple(comparison_figures.FIGURES) == comparison_html.FIGURES


# ---------------------------------------------------------------------------------- report


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave absent figures absent, for tests of the text alone."""
    monkeypatch.setattr(comparison_figures, "draw_comparison", lambda *_: [])


def report(study: Path, **arguments: Any) -> Page:
    return Page(write_comparison_report(study, **arguments).read_text(encoding="utf-8"))


def test_report_has_findings_figures_table_and_links(tmp_path: Path) -> None:
    result = comparison((*THREE, "lost"), failed=("lost",), blocks=2)
    study = write_study(tmp_path / "study", result)
    page = report(study, title="Three stages")
    assert {"findings", "comparison", "settings", "definitions"} <= set(page.ids)
    assert {f"variant-{name}" for name in result["variants"]} <= set(page.ids)
    assert {f"f-comparison-{name}" for name in comparison_html.FIGURES} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    links = [a["href"] for a in page.all("a")]
    for name in THREE:
        assert f"variants/{name}/report.html" in links
        assert (study / f"variants/{name}/report.html").is_file()
    assert "variants/lost/report.html" not in links
    # all in one file: nothing is loaded from elsewhere
    assert all(str(a["src"]).startswith("data:") for a in page.all("img"))
    assert not page.all("link")
    assert not page.all("script")
    files = [str(link) for link in links if str(link).startswith("comparison/figures/")]
    assert len(files) == 3 * len(comparison_html.FIGURES)
    assert all((study / link).is_file() for link in files)

    text = page.text
    for words in ("Three stages", "A study that never was.", "disattenuated cosine",
                  "lost is not compared: the GPU is out of memory.", CONSTANT_BIAS,
                  "variants.dpo.models.tuned"):  # fmt: skip
        assert words in text
    findings = text[: text.index("Notes and warnings")]
    for pair in result["pairs"]:
        assert interval(pair["sites"]["final_norm"]["cosine"]) in text
    values = {
        pair["sites"]["final_norm"]["cosine"]["value"]: pair["sites"]["final_norm"]
        for pair in result["pairs"]
    }
    for extreme in (min(values), max(values)):
        assert interval(values[extreme]["cosine"]) in findings
        assert interval(values[extreme]["disattenuated"]) in findings
    assert "holds 65.0 % of their unit vectors' squared length" in findings
    assert "0.500 → 0.810 → 0.930" in text
    # each variant's own headline, from its own results
    own = read_json(study / "variants" / "dpo" / "cosine" / "result.json")
    assert interval(own["sites"]["final_norm"]["held_out"]["mean"]) in text


@pytest.mark.usefixtures("undrawn")
def test_undefined_is_said_with_its_reason(tmp_path: Path) -> None:
    result = comparison(THREE, undefined=True, apart=THREE[2:])
    text = report(write_study(tmp_path / "study", result)).text
    assert "a split-half reliability is not positive (-0.1)" in text
    assert "widths differ (48 and 96)" in text
    table = next(t for t in comparison_tables(result) if t.key == "comparison-pairs")
    cells = {row[0]: row for row in table.rows}
    assert cells["sft – dpo"][2] == "undefined"
    assert cells["sft – final"][1:7] == ["–"] * 6


@pytest.mark.usefixtures("undrawn")
def test_names_and_descriptions_are_escaped(tmp_path: Path) -> None:
    result = comparison(THREE)
    result["variants"]["dpo"]["tuned"] = "<script>alert(1)</script>"
    result["notes"].append("<b>bold</b>")
    text = write_comparison_report(write_study(tmp_path / "study", result)).read_text("utf-8")
    assert "<script>" not in text
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" in text


@pytest.mark.usefixtures("undrawn")
def test_same_study_gives_the_same_report(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", comparison(THREE))
    first = write_comparison_report(study).read_bytes()
    assert write_comparison_report(study).read_bytes() == first


def test_a_folder_that_is_no_study_is_one_line(tmp_path: Path) -> None:
    for make, lacking in (
        (lambda: None, "no variants/ here"),
        (lambda: (tmp_path / "variants").mkdir(), "no comparison/result.json here"),
        (lambda: write_json(tmp_path / "comparison" / "result.json", {"variants": {}}), None),
    ):
        make()
        if lacking is None:
            assert write_comparison_report(tmp_path).is_file()
            continue
        with pytest.raises(StoreError, match=lacking) as error:
            write_comparison_report(tmp_path)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "report.html").exists()
