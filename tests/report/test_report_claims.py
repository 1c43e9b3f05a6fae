"""Claims in the report: on top, beside the nulls in tables and figures, and in a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fabricate_comparison import comparison, write_study
from graded import CHOSEN, TOKENS, results, write_run

from dsteer.report.claims_tables import (
    CLAIMS,
    claim_rows,
    claims_sentences,
    claims_table,
    claims_tables,
    variant_verdicts,
    warning,
)
from dsteer.report.comparison_html import write_comparison_report
from dsteer.report.figures import draw_result
from dsteer.report.html import SECTIONS, write_report
from dsteer.report.nulls_figures import NULL_FIGURES
from dsteer.report.nulls_tables import NUMBERS, compared, null_tables
from dsteer.report.values import interval
from dsteer.store import read_json, write_json

NULLS = {
    "coin_flip": {"patched": 0.9, "own": 0.25, "margin": 0.05, "cosine": 0.3},
    "second_seed": {"patched": 0.93, "own": 0.88, "margin": 0.9, "cosine": 0.88},
    "swapped": {"patched": 0.94, "own": 0.85, "margin": -0.8, "cosine": 0.86},
}


def made_up(passed: bool | None = True) -> dict[str, Any]:
    """The result of `claims`, of one claim a verdict."""
    verdicts = ("supported", "not supported", "supported", "not tested", "not tested")
    number = {"words": "a share", "value": 0.9, "low": 0.85, "high": 0.95}
    claims = [
        {
            "name": name,
            "verdict": verdict,
            "number": None if verdict == "not tested" else number,
            "null": None if verdict == "not tested" else number | {"words": "chance", "value": 0.1},
            "rule": f"The rule of {name}.",
            "why": f"Why {name}.",
            "beside": [],
        }
        for name, verdict in zip(CLAIMS, verdicts, strict=True)
    ]
    graded = dict(zip(CLAIMS, verdicts, strict=True))
    return {
        "claims": claims,
        "pairs": {"pair": graded, **dict.fromkeys(NULLS, graded)},
        "nulls": [{"name": name, "kind": name} for name in NULLS],
        "beside": {
            "site": CHOSEN, "norm": 2.0, "random_cosine": 0.24, "reward_margin": number,
            "nulls": {"coin_flip": {"cosine": 0.12, "norm": 1.0, "reward_margin": number,
                                    "difference": number | {"value": 0.7}}},
        },
        "training_seeds": 2,
        "confidence": 0.95,
        "self_check": {
            "passed": passed, "why": "no config", "architecture": "a tiny llama",
            "checks": [{"what": "v* is b", "expected": "0", "found": "3e-7",
                        "passed": passed is True}],
        },
        "headline": graded | {"self_check": "passed" if passed else "failed"},
        "notes": [],
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair with three nulls, one of which lacks stages. Not to be changed."""
    folder = tmp_path_factory.mktemp("claims") / "run"
    write_run(folder, results() | {"claims": made_up()})
    for seed, (name, changes) in enumerate(NULLS.items(), 1):
        found = results(**changes)
        if name == "swapped":
            del found["rank"], found["inversion"]
        write_run(folder / "nulls" / name, found, seed=seed)
    write_json(folder / "summary.json", {})
    draw_result("claims", read_json(folder / "claims" / "result.json"), folder / "claims")
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    """The run's report."""
    return write_report(run).read_text(encoding="utf-8")


def test_the_top_of_the_report_is_the_verdicts(page: str) -> None:
    top = page[page.index('id="findings"') : page.index('class="headline"')]
    for (claim, verdict, *_), entry in zip(claim_rows(made_up()), made_up()["claims"], strict=True):
        assert claim in top
        assert verdict in top
        assert entry["why"] in top
    assert "passed, 1 of 1 checks" in top
    assert "alert" not in top
    section = page[page.index('<section id="claims"') :]
    assert "The rule of reversible." in section
    assert "f-claims-pair_and_nulls" in section


def test_a_failed_self_check_stands_above_all(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"claims": made_up(passed=False)})
    page = write_report(folder).read_text(encoding="utf-8")
    assert page.index("The self-check failed (v* is b)") < page.index('id="t-claims"')
    assert warning(made_up()) is None
    assert "not run (no config)" in claims_sentences(made_up(passed=None))[1]


@pytest.mark.parametrize("stage", NUMBERS)
def test_each_stage_has_its_nulls_beside_it(run: Path, stage: str) -> None:
    (table,) = null_tables(compared(run, list(NULLS)), stage)
    lacks = stage in {"rank", "inversion"}
    assert [row[0] for row in table.rows] == [
        "the pair", "coin-flip labels", "second seed", *(["swapped labels"] if not lacks else [])
    ]  # fmt: skip
    assert all(len(row) == len(table.columns) for row in table.rows)
    # every column was found in some run of this form, but those that these results leave out
    absent = {"vector": {"‖v*‖ / ‖h‖", "KL recovered, answer"}, "spectrum": {"m, debiased",
              "effective rank"}, "rank": {"k₉₀, deployable", "k₉₀, random"},
              "maps": {"R², low rank", "KL, ridge"}}.get(stage, set())  # fmt: skip
    if stage in {"interpolation", "inversion"}:
        absent = {"preference"}
    for number, column in zip(NUMBERS[stage], list(zip(*table.rows, strict=True))[1:], strict=True):
        assert (set(column) == {"–"}) == (number.title in absent), number.title


def test_the_cells_are_the_runs_own_numbers(run: Path) -> None:
    (table,) = null_tables(compared(run, list(NULLS)), "profile")
    column = [c.title for c in table.columns].index("efficiency")
    for row, name in zip(table.rows, ("", *NULLS), strict=True):
        folder = run / "nulls" / name if name else run
        place = read_json(folder / "profile" / "result.json")["sites"][CHOSEN][TOKENS]
        assert row[column] == interval(place["efficiency"])


def test_without_nulls_no_table_and_no_figure(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", results())
    assert null_tables(compared(folder, []), "profile") == []
    assert null_tables(compared(folder, ["missing"]), "profile") == []
    claims = made_up() | {"nulls": []}
    (folder / "claims").mkdir()
    assert draw_result("claims", claims, folder / "claims") == []


@pytest.mark.parametrize("stage", NULL_FIGURES)
def test_figures_hold_the_pair_and_each_null(run: Path, page: str, stage: str) -> None:
    data = read_json(run / "claims" / "figures" / f"{NULL_FIGURES[stage]}.json")
    lacks = stage in {"rank", "inversion"}
    names = ["pair", "coin_flip", "second_seed", *(["swapped"] if not lacks else [])]
    assert data["runs"] == names
    for panel in data["panels"]:
        assert list(panel["runs"]) == names
        for drawn in panel["runs"].values():
            assert len(drawn["x"]) == len(drawn["y"]) > 0
            assert any(value["value"] is not None for value in drawn["y"])
    assert stage in SECTIONS
    section = page[page.index(f'<section id="{stage}"') :]
    section = section[: section.index("</section>")]
    assert f"f-claims-{NULL_FIGURES[stage]}" in section
    assert f"t-nulls-{stage}" in section


def test_figure_numbers_are_the_artifacts(run: Path) -> None:
    data = read_json(run / "claims" / "figures" / "nulls_profile.json")
    margin = data["panels"][2]["runs"]["coin_flip"]
    found = read_json(run / "nulls" / "coin_flip" / "profile" / "result.json")["sites"]
    assert margin["y"][1]["value"] == found[CHOSEN][TOKENS]["v"]["reward_margin"]["value"]
    forest = read_json(run / "claims" / "figures" / "pair_and_nulls.json")
    assert forest["runs"] == ["pair", *NULLS]
    assert len(forest["numbers"]) == 7
    assert forest["numbers"]["k₉₀, oracle"][3]["value"] is None  # swapped has no stage rank
    assert forest["numbers"]["efficiency"][0]["value"] == pytest.approx(0.9 / 0.95)


def test_tables_of_the_section(run: Path) -> None:
    keys = [table.key for table in claims_tables(made_up())]
    assert keys == ["claims-rules", "claims-pairs", "claims-beside", "self-check"]
    alone = made_up() | {"pairs": {"pair": made_up()["pairs"]["pair"]}, "beside": {"nulls": {}}}
    assert [t.key for t in claims_tables(alone)] == ["claims-rules", "self-check"]
    assert claims_table({}) is None
    assert claims_sentences(None) == []


def test_a_study_shows_variants_by_claims(tmp_path: Path) -> None:
    result = comparison(["one", "two"])
    assert variant_verdicts(result["variants"]) is None
    name, other = list(result["variants"])[:2]
    result["variants"][name]["claims"] = made_up()["headline"]
    table = variant_verdicts(result["variants"])
    assert table is not None
    assert table.rows == [[name, *made_up()["headline"].values()]]
    result["variants"][other]["claims"] = made_up(passed=False)["headline"]
    study = write_study(tmp_path / "study", result)
    page = write_comparison_report(study).read_text(encoding="utf-8")
    assert 'id="t-comparison-claims"' in page
    assert f"The self-check of {other} failed" in page
    assert json.dumps(result)  # plain JSON as written
