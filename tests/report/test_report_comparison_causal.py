"""What variants measured by changing states stands in the table, the findings and the figures."""

from __future__ import annotations

import json

from fabricate_comparison import around, comparison

from dsteer.report.comparison_causal import causal_values
from dsteer.report.comparison_causal_figures import claims_matrix, variants_causal
from dsteer.report.comparison_tables import comparison_findings, comparison_tables
from dsteer.report.style import styled
from dsteer.report.values import DASH, interval
from dsteer.store import Json

NAMES = ("none", "both", "plain")


def measured(efficiency: Json) -> dict[str, dict[str, Json]]:
    """Results of the stages of one variant, in their own forms, worked out by hand."""
    place = {
        "v": {"kl_recovered": around(0.9), "kl_recovered_answers": around(0.3)},
        "patched": {"kl_recovered": around(0.9), "kl_recovered_answers": around(0.6)},
        "random": {"kl_recovered_answers": {"low": -0.1, "median": 0.0, "high": 0.1}},
        "efficiency": efficiency,
    }
    reached = {"value": 3, "low": 2, "high": 5}
    return {
        "dpo": {
            "test": {"reward_accuracy": around(0.9), "reward_margin": around(1.0)},
            "kl_to_base": around(0.02, 0.003),
        },
        "profile": {
            "chosen": {"site": "resid_post.1", "tokens": "all", "on": "tune"},
            "sites": {"resid_post.1": {"all": place, "prompt_last": {}}},
            "readout_share": around(0.2),
        },
        "rank": {
            "sites": {
                "final_norm": {"tokens": "all", "width": 8, "k90": {}},
                "resid_post.1": {
                    "tokens": "all",
                    "width": 8,
                    "k50": {},
                    "k90": {"oracle": reached},
                },
            }
        },
        "maps": {
            "sites": {"resid_post.1": {"r2": {"translation": around(0.4), "ridge": around(0.5)}}},
            "kl": {"resid_post.1": {"tokens": "all", "recovered": {"translation": around(0.1)}}},
        },
        "groups": {
            "headline": {"site": "resid_post.1"},
            "groups": [{"name": "a"}, {"name": "b"}],
            "expected": {"participation": 2.0},
            "sites": {
                "resid_post.1": {
                    "means": {"participation": around(1.5)},
                    "removal": {
                        "own": {"margin_taken": around(0.8)},
                        "others": {"margin_taken": around(0.1)},
                    },
                }
            },
        },
        "interpolation": {
            "grid": {
                "probes": [{"strength": 0.0, "degenerate": 0.1}],
                "collapse": 8.0,
                "collapse_negative": -4.0,
            }
        },
        "reversal": {
            "ways": {
                "tuned": {"way_back": around(0.0)},
                "inversion": {"way_back": around(0.7), "kl_to_base": around(0.2)},
            }
        },
        "claims": {"claims": [{"name": "shared_shift", "verdict": "supported"}]},
    }


def test_numbers_are_read_where_the_profile_chose() -> None:
    results = measured(around(0.5))
    found = causal_values(lambda stage: results.get(stage, {}))
    assert found["profile"] == {
        "site": "resid_post.1", "tokens": "all", "v": around(0.3), "patched": around(0.6),
        "random": 0.1, "efficiency": around(0.5), "readout_share": around(0.2),
    }  # fmt: skip
    assert found["rank"]["site"] == "resid_post.1"
    assert found["rank"]["k90"]["oracle"]["value"] == 3
    assert found["maps"]["r2"]["ridge"] == around(0.5)
    assert found["maps"]["kl"] == {"translation": around(0.1), "ridge": None}
    assert found["claims"] == {"shared_shift": "supported"}
    assert found["collapse"] == {"up": 8.0, "down": 4.0}
    assert found["reversal"] == {
        "inversion": {"way_back": around(0.7), "accuracy": None, "kl_to_base": around(0.2),
                      "recovered": None},
    }  # fmt: skip
    given = {"interpolation": {"grid": {"probes": [], "collapse": None}}}
    assert causal_values(lambda stage: given.get(stage, {}))["collapse"] is None
    assert found["dpo"] == {
        "reward_accuracy": around(0.9),
        "reward_margin": around(1.0),
        "kl_to_base": around(0.02, 0.003),
    }
    assert found["groups"] == {
        "site": "resid_post.1", "groups": 2, "expected": 2.0, "participation": around(1.5),
        "own": around(0.8), "others": around(0.1),
    }  # fmt: skip


def test_a_variant_without_the_stages_has_none() -> None:
    assert set(causal_values(lambda stage: {}).values()) == {None}


def test_rows_and_matrix_tell_each_variant_and_leave_what_it_lacks_blank() -> None:
    tables = {table.key: table for table in comparison_tables(comparison(NAMES))}
    rows = {row[0]: row[1:-1] for row in tables["comparison-variants"].rows}
    assert rows["answers' KL: v*"] == [
        interval(around(0.6)),
        interval(around(0.0)),
        DASH,
    ]
    assert rows["rank of the groups' v: planted"] == ["2.00", DASH, DASH]
    assert rows["margin taken with one v: the others'"] == [interval(around(0.5)), DASH, DASH]
    assert rows["k₉₀: deployable"][0].startswith("4")
    assert rows["k₉₀: deployable"][1:] == [DASH, DASH]
    assert rows["|λ| of collapse: upward"] == ["8.00", "9.00", DASH]
    assert "|λ| of collapse: downward" not in rows, "none was found in any"
    assert rows["undone by tuned − λv*: way back"] == [interval(around(0.3)), DASH, DASH]
    assert not any("SFT" in row for row in rows)


def test_findings_tell_what_random_directions_reach_too() -> None:
    said = dict(comparison_findings(comparison(NAMES)))
    first, second = said["What states cause"]
    assert "random" not in first
    assert "not told from random directions" in second
    (words,) = said["Groups of prompts"]
    assert "rank (participation) 1.2" in words
    assert "the planted preferences 2.00;" in words
    assert said["Collapse"] == [
        "none: half of the sound texts are degenerate from λ = 8.00 up.",
        "both: half of the sound texts are degenerate from λ = 9.00 up.",
    ]
    (words,) = said["Undoing the tuning"]
    assert words.startswith("none: tuned − λv* takes 0.300 [0.260, 0.340] of the margin and 0.0400")
    assert said["Claims"][1] == "low dimensional: supported in none; not supported in both."


def test_figures_hold_each_number_and_are_absent_without_any() -> None:
    result = comparison(NAMES)
    with styled():
        forest, matrix = variants_causal(result), claims_matrix(result)
        assert forest is not None
        assert matrix is not None
        for drawing in (forest, matrix):
            drawing.figure.draw_without_rendering()
    series = forest.data["panels"]["profile"]["v*"]
    assert [each["value"] for each in series] == [0.6, 0.0, None]
    assert set(matrix.data["verdicts"]) == {"none", "both"}
    json.dumps(forest.data)  # plain values
    for entry in result["variants"].values():
        del entry["causal"]
    assert variants_causal(result) is None
    assert claims_matrix(result) is None
