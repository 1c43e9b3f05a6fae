"""The λ sweeps in the report: figures 2a and 2b, tables, sentences, and the explorer's data."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricate import edited, fabricate
from fabricate_sweep import NASTY, STRENGTHS, explorer, sweep, with_baselines
from matplotlib.patches import Polygon, Rectangle

from dsteer.report import figures
from dsteer.report.explorer import embedded
from dsteer.report.explorer import explorer as explorer_of
from dsteer.report.headline import headline
from dsteer.report.html import write_report
from dsteer.report.style import PURPLE, SKY, Drawing, styled
from dsteer.report.sweep_figures import (
    fig2a_all_metrics,
    fig2a_interpolation,
    fig2b_all_metrics,
    fig2b_inversion,
)
from dsteer.report.sweep_tables import sweep_tables
from dsteer.report.sweep_values import best, collapse, main_metrics, nearest, stands_out
from dsteer.report.tables import paper_table
from dsteer.report.values import interval

SWEEPS = ("interpolation", "inversion")
FOLDER = Path()  # the figures are drawn from the result alone


def drawn(function: Any, result: dict[str, Any]) -> Drawing:
    with styled():
        drawing = function(result, FOLDER)
        assert drawing is not None
        drawing.figure.draw_without_rendering()
    return drawing


def panel(drawing: Drawing, metric: str) -> Any:
    return drawing.figure.axes[list(drawing.data["metrics"]).index(metric)]


def curve(axes: Any, colour: str = "#0072B2") -> np.ndarray:
    """The y values of the thick curve of v*."""
    lines = [line for line in axes.lines if line.get_color() == colour and line.get_lw() == 1.6]
    assert len(lines) == 1
    return np.asarray(lines[0].get_ydata(), float)


# ---------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("function", "direction"),
    [(fig2a_all_metrics, "interpolation"), (fig2b_all_metrics, "inversion")],
)
def test_every_number_of_the_result_is_in_the_figure(function: Any, direction: str) -> None:
    result = sweep(direction)
    data = drawn(function, result).data
    assert data["strengths"] == STRENGTHS
    assert list(data["metrics"]) == list(result["metrics"])
    for name, metric in result["metrics"].items():
        shown = data["metrics"][name]
        assert list(shown["curves"]) == list(metric["curves"])
        for arm, values in metric["curves"].items():
            for value, point in zip(values, shown["curves"][arm], strict=True):
                wanted = value or dict.fromkeys(("value", "low", "high"))
                assert point == {key: wanted[key] for key in ("value", "low", "high")}
        for key in ("low", "high", "mean", "draws"):
            assert shown["random"][key] == metric["random"][key]
        for key in ("start", "target"):
            assert shown[key]["value"] == metric[key]["value"]
        assert shown["worst"] == metric["worst"]
        found = metric["crossing"]["strength"]
        assert shown["crossing"]["value"] == (found and found["value"])


def test_curves_on_the_canvas_are_those_of_the_result() -> None:
    result = sweep("interpolation")
    drawing = drawn(fig2a_interpolation, result)
    for name in drawing.data["metrics"]:
        wanted = [v["value"] if v else np.nan for v in result["metrics"][name]["curves"]["v"]]
        np.testing.assert_array_equal(curve(panel(drawing, name)), wanted)


def test_undefined_points_are_gaps() -> None:
    result = sweep("interpolation")
    assert result["metrics"]["refusal"]["curves"]["v"][-1] is None
    values = curve(panel(drawn(fig2a_interpolation, result), "refusal"))
    assert np.isnan(values[-1])
    assert np.isfinite(values[:-1]).all()


def test_main_figure_has_nine_panels_of_all_kinds() -> None:
    result = sweep("inversion")
    names = main_metrics(result)
    assert names == list(drawn(fig2b_inversion, result).data["metrics"])
    assert len(names) == 9
    assert {"kl_recovered", "preference_match", "perplexity", "refusal", "degenerate"} <= set(names)
    # Of the oracles, the one whose level changes most: polite by 0.6, brief by 0.1.
    assert "oracle_polite" in names
    assert "oracle_brief" not in names


def test_absent_metrics_make_room_for_others_and_are_named() -> None:
    result = sweep("interpolation")
    for name in ("preference_match", "repetition", "oracle_polite"):
        del result["metrics"][name]
    names = main_metrics(result)
    assert len(names) == 9
    assert {"reward_margin", "distinct_2", "oracle_brief"} <= set(names)
    caption = drawn(fig2a_interpolation, result).data["caption"]
    assert "toxicity (behaviour.toxicity is not configured)" in caption


def test_few_metrics_need_one_figure_only() -> None:
    result = sweep("interpolation")
    result["metrics"] = {k: result["metrics"][k] for k in ("kl_recovered", "refusal")}
    assert list(drawn(fig2a_interpolation, result).data["metrics"]) == ["kl_recovered", "refusal"]
    with styled():
        assert fig2a_all_metrics(result, FOLDER) is None
        assert fig2a_interpolation({"headline": {}}, FOLDER) is None


def test_collapse_is_read_from_the_texts_and_hatched() -> None:
    result = sweep("interpolation")
    shares = dict(zip(STRENGTHS, result["texts"]["degenerate"], strict=True))
    assert shares[3.0] < 0.5 <= shares[4.0]
    assert collapse(result) == (None, 4.0)
    drawing = drawn(fig2a_interpolation, result)
    assert drawing.data["collapse"] == 4.0
    for axes in drawing.figure.axes:
        hatched = [patch for patch in axes.patches if patch.get_hatch()]
        assert len(hatched) == 1
        assert isinstance(hatched[0], Rectangle | Polygon)
        assert hatched[0].get_extents().x0 == pytest.approx(axes.transData.transform((4, 0))[0])
        assert "collapse" in [text.get_text() for text in axes.texts]


def test_no_collapse_no_hatching() -> None:
    drawing = drawn(fig2a_interpolation, sweep("interpolation", collapsed=False))
    assert not any(patch.get_hatch() for axes in drawing.figure.axes for patch in axes.patches)
    assert "Hatched" not in drawing.data["caption"]


def test_collapse_below_zero_and_without_texts() -> None:
    result = sweep("interpolation")
    result["texts"]["degenerate"][:2] = [0.9, 0.5]
    assert collapse(result) == (-1.0, 4.0)
    del result["texts"]
    assert collapse(result) == (None, 4.0)  # as the search for the grid had it
    result["grid"] |= {"collapse": None, "collapse_negative": -3.0}
    assert collapse(result) == (-3.0, None)


def test_crossing_stands_on_the_targets_level() -> None:
    result = sweep("inversion")
    axes = panel(drawn(fig2b_inversion, result), "refusal")
    found = result["metrics"]["refusal"]["crossing"]["strength"]["value"]
    level = result["metrics"]["refusal"]["target"]["value"]
    diamonds = [line for line in axes.lines if line.get_marker() == "D"]
    assert [tuple(line.get_xydata()[0]) for line in diamonds] == [(found, level)]
    other = panel(drawn(fig2b_inversion, result), "kl_recovered")
    assert result["metrics"]["kl_recovered"]["crossing"]["strength"] is None
    assert not [line for line in other.lines if line.get_marker() == "D"]


def test_points_beyond_the_scale_are_marked() -> None:
    result = sweep("interpolation")
    result["metrics"]["perplexity"]["curves"]["v"][-2] |= {"value": 1e9, "low": 1e8, "high": 1e10}
    drawing = drawn(fig2a_interpolation, result)
    assert STRENGTHS[-2] == 4.0
    assert 4.0 in drawing.data["metrics"]["perplexity"]["beyond_scale"]["v"]
    assert panel(drawing, "perplexity").get_ylim()[1] < 1e3
    assert panel(drawing, "kl_recovered").get_ylim()[0] > -1.3


def test_wide_ranges_are_logarithmic_and_shares_never() -> None:
    result = sweep("interpolation")
    values = result["metrics"]["perplexity"]["curves"]["v"]
    for strength, value in zip(STRENGTHS[:-1], values[:-1], strict=True):
        value |= {"value": math.exp(abs(strength) * 3), "low": None, "high": None}
    result["metrics"]["refusal"]["curves"]["v"][4] |= {"value": 1e-4}
    drawing = drawn(fig2a_interpolation, result)
    assert panel(drawing, "perplexity").get_yscale() == "log"
    assert panel(drawing, "refusal").get_yscale() == "linear"


def test_undefined_everywhere_is_said() -> None:
    result = sweep("interpolation")
    metric = result["metrics"]["kl_recovered"]
    metric |= {"curves": {"v": [None] * len(STRENGTHS)}, "random": None, "start": None,
               "target": None, "worst": None}  # fmt: skip
    axes = panel(drawn(fig2a_interpolation, result), "kl_recovered")
    assert "undefined at every λ" in [text.get_text() for text in axes.texts]


def test_single_strength_and_no_intervals() -> None:
    """Warnings are errors: a degenerate axis would fail here."""
    result = sweep("interpolation")
    keep = STRENGTHS.index(1.0)
    result["strengths"] = [1.0]
    for metric in result["metrics"].values():
        metric["curves"] = {
            arm: [{"value": 0.5, "low": None, "high": None}] for arm in metric["curves"]
        }
        metric["random"] |= {k: [metric["random"][k][keep]] for k in ("low", "high", "mean")}
        metric["worst"] = None
    result["texts"]["degenerate"] = [0.0]
    drawn(fig2a_interpolation, result)


@pytest.mark.parametrize("direction", SWEEPS)
def test_baselines_are_drawn_listed_and_told(direction: str) -> None:
    result = with_baselines(sweep(direction))
    drawing = drawn(fig2a_interpolation, result)
    axes = panel(drawing, "kl_recovered")
    for name, colour in (("amplify", SKY), ("noise", PURPLE)):
        (line,) = [line for line in axes.lines if line.get_color() == colour and line.get_lw() == 1]
        wanted = [v["value"] for v in result["metrics"]["kl_recovered"]["curves"][name]]
        assert np.asarray(line.get_ydata(), float) == pytest.approx(wanted)
        assert drawing.data["metrics"]["kl_recovered"]["curves"][name][0]["value"] == wanted[0]
    legend = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert {"layer amplified", "seeded noise"} <= set(legend)
    sign = "−" if direction == "inversion" else "+"
    words = f"layer amplified, the state times 1 {sign} 0.250 λ"
    caption = drawing.data["caption"]
    assert words in caption
    assert "layer amplified 3.10" not in caption  # it adds no vector
    tables = {table.key: table for table in sweep_tables(result)}
    rows = dict(tables[f"{direction}-set-up"].rows)
    assert words in rows["baselines"]
    assert "layer amplified" not in rows["norms of the arms' vectors"]
    arms = tables[f"{direction}-arms"]
    assert [column.title for column in arms.columns][-2:] == ["layer amplified", "seeded noise"]
    assert arms.rows[0][-2:] == ["−0.0500 [−0.0600, −0.0400]", "−0.100 [−0.110, −0.0900]"]
    told = " ".join(dict(headline({}, {direction: result}))[direction.capitalize()])
    assert "layer amplified −5.0\u00a0%" in told
    plain = next(t for t in sweep_tables(sweep(direction)) if t.key == f"{direction}-set-up")
    assert "baselines" not in dict(plain.rows)


# ---------------------------------------------------------------------------------- values


def test_places_of_strengths() -> None:
    result = sweep("interpolation")
    assert STRENGTHS[nearest(result, 1.0) or 0] == 1.0
    assert STRENGTHS[nearest(result, 2.9) or 0] == 3.0
    assert nearest({}, 1.0) is None
    values = [v["value"] for v in result["metrics"]["kl_recovered"]["curves"]["v"]]
    assert best(result) == values.index(max(values))
    assert best({"metrics": {}}) is None


def test_stands_out_of_the_random_band() -> None:
    metric: dict[str, Any] = {
        "curves": {"v": [{"value": 0.5, "low": 0.4, "high": 0.6}]},
        "random": {"low": [0.1], "high": [0.39]},
    }
    assert stands_out(metric, 0) is True
    metric["random"]["high"] = [0.4]
    assert stands_out(metric, 0) is False
    metric["random"] = {"low": [0.61], "high": [0.7]}
    assert stands_out(metric, 0) is True
    metric["random"] = None
    assert stands_out(metric, 0) is None


# ---------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("direction", SWEEPS)
def test_tables_fit_their_columns(direction: str) -> None:
    tables = {table.key: table for table in sweep_tables(sweep(direction))}
    for table in tables.values():
        assert all(len(row) == len(table.columns) for row in table.rows), table.key
        titles = [column.title for column in table.columns]
        assert len(set(titles)) == len(titles)
    assert (f"{direction}-crossings" in tables) == (direction == "inversion")


def test_metrics_table_has_the_numbers_of_the_result() -> None:
    result = sweep("interpolation")
    tables = {table.key: table for table in sweep_tables(result)}
    table = tables["interpolation-metrics"]
    titles = [column.title for column in table.columns]
    assert titles == [
        "metric", "n", "λ = 0", "λ = 1", "random, λ = 1", "λ = 1.5", "random, λ = 1.5",
        "tuned model",
    ]  # fmt: skip
    for row, metric in zip(table.rows, result["metrics"].values(), strict=True):
        values = metric["curves"]["v"]
        assert row[2] == interval(values[STRENGTHS.index(0.0)])
        assert row[3] == interval(values[STRENGTHS.index(1.0)])
        assert row[5] == interval(values[STRENGTHS.index(1.5)])
        assert row[7] == interval(metric["target"])
    assert table.rows[0][4] == "−0.120 to 0.0600"
    arms = tables["interpolation-arms"]
    assert [row[2] for row in arms.rows if row[0].startswith("refusals")] == ["–"]


def test_crossings_say_where_or_why_not() -> None:
    result = sweep("inversion")
    table = next(t for t in sweep_tables(result) if t.key == "inversion-crossings")
    rows = {row[0]: row for row in table.rows}
    met = rows["refusals (share)"]
    assert met[3] == interval(result["metrics"]["refusal"]["crossing"]["strength"])
    assert met[4] == "–"
    assert rows["KL recovered (share)"][3:] == ["–", "the curve stays below the target's level"]


def test_degenerate_outputs_are_counted() -> None:
    result = sweep("interpolation")
    table = next(t for t in sweep_tables(result) if t.key == "interpolation-texts")
    assert [row[0] for row in table.rows][:2] == ["−2", "−1"]
    last = table.rows[-1]
    assert last[1] == "100\u00a0%"
    assert [int(cell) for cell in last[2:]] == [8, 24, 0]


def test_tables_of_an_empty_result() -> None:
    assert sweep_tables({"headline": {}}) == []


def test_paper_table_takes_its_sites_from_the_sweeps() -> None:
    results = {
        "cosine": {"paper_site": "final_norm", "chosen_site": "resid_post.2", "sites": {}},
        "interpolation": sweep("interpolation"),
    }
    table = paper_table(results)
    assert table is not None
    rows = {row[0]: row for row in table.rows}
    curves = results["interpolation"]["metrics"]["kl_recovered"]["curves"]
    i = STRENGTHS.index(1.0)
    assert rows["h + λv dials behaviour"][2:4] == [
        interval(curves["final_norm"][i]),
        interval(curves["v"][i]),
    ]
    assert rows["h_tuned − λv* restores the base"][2:4] == ["not measured", "not measured"]


# ---------------------------------------------------------------------------------- sentences


def sentences(result: dict[str, Any]) -> str:
    stage = result["direction"]
    points = dict(headline({}, {stage: result}))
    return " ".join(points[stage.capitalize()])


def test_sentences_have_the_numbers_of_the_result() -> None:
    result = sweep("inversion")
    said = sentences(result)
    assert "Taking λv* from the tuned model at resid_post.2 recovers 124" in said
    assert "random directions −12.0\u00a0% to 6.0\u00a0%;" in said
    assert interval(result["metrics"]["refusal"]["curves"]["v"][STRENGTHS.index(1.0)]) in said
    assert "comes nearest at λ = 1.5" in said
    assert f"refusals {interval(result['metrics']['refusal']['crossing']['strength'])}" in said
    assert "At no λ of the sweep: KL recovered;" in said
    assert "degenerate from λ ≥ 4" in said
    assert "sham" not in said
    assert "meets" not in sentences(sweep("interpolation"))


def test_within_the_random_band_is_said() -> None:
    result = sweep("interpolation")
    i = STRENGTHS.index(1.0)
    result["metrics"]["refusal"]["random"]["high"][i] = 1.0
    assert "0.0600 to 1.00: not told apart" in sentences(result)


def test_failed_sham_arm_is_said_first() -> None:
    result = sweep("interpolation")
    result["sham"]["logits_identical"] = False
    assert sentences(result).startswith("The sham arm failed: hooks with λ = 0 changed logits")


def test_no_collapse_is_said() -> None:
    assert "At no strength of the sweep" in sentences(sweep("interpolation", collapsed=False))


def test_without_metrics_nothing_is_said() -> None:
    assert "Interpolation" not in dict(headline({}, {"interpolation": {"headline": {}}}))


# ---------------------------------------------------------------------------------- explorer


class Raw(HTMLParser):
    """Scripts and styles as they stand, the policy, and every other element's tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.tags: list[str] = []
        self.policy = ""
        self._open: tuple[str, dict[str, str | None]] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        attributes = dict(attrs)
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(attributes["content"])
        if tag in ("script", "style"):
            self._open = (tag, attributes)
            self.raw.append((tag, attributes, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open:
            tag, attributes, text = self.raw[-1]
            self.raw[-1] = (tag, attributes, text + data)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw_result", lambda *_: [])


@pytest.fixture
def swept(tmp_path: Path, undrawn: None) -> Path:
    return fabricate(tmp_path / "run", stages=SWEEPS)


def page(run: Path) -> tuple[str, Raw]:
    text = write_report(run).read_text(encoding="utf-8")
    return text, Raw(text)


def test_policy_allows_the_inline_script_and_style_alone(swept: Path) -> None:
    _, raw = page(swept)
    code = {
        tag: text
        for tag, attributes, text in raw.raw
        if attributes.get("type") != "application/json"
    }
    assert set(code) == {"script", "style"}
    for tag, text in code.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in raw.policy
    assert raw.policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in raw.policy


def test_nothing_escapes_the_policy(swept: Path) -> None:
    """No handler or style attribute: the policy would block it."""
    text, _ = page(swept)
    outside = re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)
    assert not re.search(r"<[^>]*\son\w+=", outside)
    assert not re.search(r"<[^>]*\sstyle=", outside)


def test_data_come_back_as_they_were(swept: Path) -> None:
    text, raw = page(swept)
    data = [found for _, attributes, found in raw.raw if attributes.get("id") == "x-data"]
    assert len(data) == 1
    assert json.loads(data[0]) == {stage: explorer(stage) for stage in SWEEPS}
    assert data[0].isascii()
    assert not set("<>&") & set(data[0])
    assert raw.tags.count("script") == 2
    assert "img" not in raw.tags
    assert text.count("</script>") == 2


def test_embedded_holds_against_what_closes_scripts() -> None:
    data = {"strengths": [1.0], "prompts": [{"prompt": "</script><!-- \u2028\u2029 &lt;"}]}
    found = explorer_of("interpolation", "Interpolation", data)
    assert found is not None
    assert embedded([found]) == (
        '{"interpolation":{"strengths":[1.0],"prompts":[{"prompt":'
        '"\\u003c/script\\u003e\\u003c!-- \\u2028\\u2029 \\u0026lt;"}]}}'
    )


def test_without_explorer_files_there_is_no_script(swept: Path) -> None:
    for stage in SWEEPS:
        (swept / stage / "explorer.json").unlink()
    text, raw = page(swept)
    assert "script" not in raw.tags
    assert "script-src" not in raw.policy
    assert "λ explorer" not in text


def test_one_explorer_of_two(swept: Path) -> None:
    (swept / "interpolation" / "explorer.json").unlink()
    text, raw = page(swept)
    data = next(found for _, attributes, found in raw.raw if attributes.get("id") == "x-data")
    assert list(json.loads(data)) == ["inversion"]
    assert text.count("<option") == 1


def test_explorer_of_a_stale_stage_is_left_out(swept: Path) -> None:
    with edited(swept / "manifest.json") as manifest:
        del manifest["stages"]["inversion"]
    _, raw = page(swept)
    data = next(found for _, attributes, found in raw.raw if attributes.get("id") == "x-data")
    assert list(json.loads(data)) == ["interpolation"]


@pytest.mark.parametrize("data", [None, {}, {"strengths": [], "prompts": [{}]}, {"strengths": [1]}])
def test_nothing_to_explore(data: Any) -> None:
    assert explorer_of("inversion", "Inversion", data) is None


def test_without_javascript_one_strength_is_shown(swept: Path) -> None:
    text, _ = page(swept)
    static = text[text.index("<noscript>") : text.index("</noscript>")]
    assert static.count("the texts at λ = 1.") == 2
    for words in NASTY:
        assert words in unescape(static)
    assert "<img" not in static
    assert static.count('<span class="mark">refusal</span>') == 2 * 3  # tuned 3, 7 and 11


def test_marks_of_the_static_view() -> None:
    data = copy.deepcopy(explorer("interpolation"))
    data["strengths"] = [s + 3 for s in STRENGTHS]  # −2 is now the nearest to 1
    data["prompts"][0]["steered"][0] = {"text": "", "refusal": True, "degenerate": "role_header"}
    found = explorer_of("interpolation", "Interpolation", data)
    assert found is not None
    assert found.strength == "1"
    assert found.rows[0][1][1] == ("", ["refusal", "degenerate: leaked role header"])


def test_diagnoses_are_a_list(swept: Path) -> None:
    text, _ = page(swept)
    assert text.count("<li>Held-out cosine 0.71 [0.68, 0.74] is below 0.85") == 2
    with edited(swept / "inversion" / "result.json") as result:
        result["diagnoses"] = []
    text, _ = page(swept)
    assert text.count("<li>Held-out cosine") == 1
    assert "None of the failure signatures was found." in text


def test_absent_metrics_have_their_reason(swept: Path) -> None:
    text, _ = page(swept)
    table = text[text.index('id="t-inversion-absent"') :]
    table = table[: table.index("</table>")]
    assert '<th scope="row">toxicity</th>' in table
    assert '<td class="t">behaviour.toxicity is not configured</td>' in table
