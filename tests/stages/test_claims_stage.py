"""The claims stage: pair and nulls from their run folders, and the self-check embedded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from graded import CHOSEN, TOKENS, results, write_run
from measured import measure
from planted import planted_pair
from test_planted_measurement import write_data

from dsteer.config import PipelineConfig, resolved
from dsteer.progress import SILENT
from dsteer.report.claims_tables import CLAIMS
from dsteer.stages import StageContext, call
from dsteer.stages.claims import FEW
from dsteer.steering.vector import SteeringVectorSet
from dsteer.store import Json, read_json, read_tensors, write_json

PASSED = {
    "passed": True,
    "architecture": "tiny llama",
    "checks": [{"what": "v* = b", "expected": "0", "found": "1e-7", "passed": True}],
}
FAILED = PASSED | {
    "passed": False,
    "checks": [{"what": "v* = b", "expected": "0", "found": "3", "passed": False}],
}
STAGES = ("vector", "cosine", "spectrum", "profile", "rank", "maps", "strength", "inversion")


PIPELINE = {
    "name": "made-up",
    "data": {"sources": [{"format": "synthetic"}]},
    "models": {"base": "base"},
    "dpo": {},
    "activations": {},
    **{stage: {} for stage in STAGES},
    "claims": {"bootstrap": 200},
}
"""The pair's."""


def settings(**dpo: Any) -> dict[str, Any]:
    """The config in the manifest of a null that changes the training so."""
    own = resolved(PipelineConfig.model_validate(PIPELINE))
    return own | {"dpo": own["dpo"] | dpo}


CHANGES: dict[str, dict[str, Any]] = {
    "coin_flip": {"labels": "coin_flip"}, "swapped": {"labels": "swapped"},
    "second_seed": {"seed": 1},
}  # fmt: skip


def graded(
    run: Path, nulls: Iterable[str], checked: Json = PASSED, activations: Json = None
) -> Json:
    """The stage's result over a run folder."""
    pipeline = PipelineConfig.model_validate(
        {**PIPELINE, "nulls": {name: {"dpo.seed": 9} for name in nulls}}
    )
    for stage in ("data", "activations"):
        (run / stage).mkdir(exist_ok=True)
        write_json(run / stage / "result.json", (stage == "activations" and activations) or {})
    with (
        patch("dsteer.stages.claims.self_check", return_value=checked) as check,
        patch("dsteer.stages.claims.draw_result"),
    ):
        found = call(StageContext("claims", pipeline, run, SILENT))
    assert check.call_args.args == ("base",)
    return found


def null(
    run: Path, name: str, seed: int, config: dict[str, Any] | None = None, **changes: Any
) -> Path:
    known = settings(**CHANGES.get(name, {}))
    return write_run(run / "nulls" / name, results(**changes), config=config or known, seed=seed)


def test_pair_and_nulls_are_graded_by_the_same_rules(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", results())
    nulls = {
        "coin_flip": null(run, "coin_flip", 1, patched=0.9, own=0.2, margin=0.02, cosine=0.3),
        "second_seed": null(run, "second_seed", 2, margin=0.9),
        "again": null(run, "again", 3, settings(seed=1), margin=0.9),
        "swapped": null(run, "swapped", 4, margin=-1.0),
        "broken": tmp_path / "nowhere",
    }
    result = graded(run, nulls)
    assert [claim["name"] for claim in result["claims"]] == list(CLAIMS)
    assert {claim["verdict"] for claim in result["claims"]} == {"supported"}
    assert result["headline"] == dict.fromkeys(CLAIMS, "supported") | {"self_check": "passed"}
    assert list(result["pairs"]) == ["pair", *nulls]
    specific = {name: grades["preference_specific"] for name, grades in result["pairs"].items()}
    assert specific == {
        "pair": "supported", "coin_flip": "not supported", "second_seed": "supported",
        "again": "supported", "swapped": "not supported", "broken": "not tested",
    }  # fmt: skip
    assert result["pairs"]["coin_flip"]["constant_suffices"] == "not supported"
    assert set(result["pairs"]["broken"].values()) == {"not tested"}
    # the difference is that of the margins as written, pair by pair
    place = f"margin.{TOKENS}.v"
    own, other = (
        read_tensors(folder / "profile" / "pairs.safetensors")[place][1]
        for folder in (run, nulls["coin_flip"])
    )
    told = result["claims"][3]["number"]
    assert told["value"] == pytest.approx(float((own - other).mean()), abs=1e-12)
    # cosines of the two v*s, by hand
    vectors = [
        SteeringVectorSet.load(folder / "vector" / "vectors.safetensors")[CHOSEN].tensor.numpy()
        for folder in (run, nulls["coin_flip"])
    ]
    by_hand = vectors[0] @ vectors[1] / np.prod([np.linalg.norm(v) for v in vectors])
    beside = result["beside"]["nulls"]
    assert beside["coin_flip"]["cosine"] == pytest.approx(float(by_hand), abs=1e-9)
    assert beside["broken"]["cosine"] is None
    assert result["training_seeds"] == 2


def test_seeds_are_counted_by_what_a_null_changes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", results())
    changes: dict[str, dict[str, Any]] = {
        "second_seed": {"seed": 1}, "third": {"seed": 7}, "lower": {"lora": {"rank": 4}},
        "flipped": {"labels": "coin_flip"}, "hot": {"learning_rate": 1.0},
        "same_again": {"seed": 7},
    }  # fmt: skip
    for name, change in changes.items():
        null(run, name, 1, settings(**change))
    result = graded(run, (*changes, "failed_seed"))
    assert {entry["name"]: entry["kind"] for entry in result["nulls"]} == {
        "second_seed": "second_seed", "third": "second_seed", "lower": "lora",
        "flipped": "coin_flip", "hot": "other", "same_again": "second_seed",
        "failed_seed": "other",
    }  # fmt: skip
    assert result["training_seeds"] == 3  # its own, 1 and 7: one that is told twice counts once
    assert not any("training seeds" in note for note in result["notes"])
    assert result["pairs"]["lower"]["low_dimensional"] == "supported"


def test_a_seed_that_failed_does_not_count(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", results())
    assert graded(run, ["second_seed"])["training_seeds"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dpo": {"labels": "given"}}, "coin_flip changes dpo.labels"),
        ({"dpo": {"labels": "coin_flip", "max_steps": 1}}, "coin_flip changes dpo.max_steps"),
        ({"profile": {"response_tokens": 1}}, "coin_flip changes profile"),
    ],
)
def test_a_coin_flip_that_changes_more_is_no_control(
    tmp_path: Path, change: dict[str, dict[str, Any]], words: str
) -> None:
    run, own = write_run(tmp_path / "run", results()), settings()
    changed = own | {section: own[section] | keys for section, keys in change.items()}
    null(run, "coin_flip", 1, changed, margin=0.0)
    result = graded(run, ["coin_flip"])
    assert result["headline"]["preference_specific"] == "not tested"
    assert words in result["claims"][3]["why"]


def test_without_nulls_nothing_is_preference_specific(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", results())
    result = graded(run, ())
    assert result["headline"]["preference_specific"] == "not tested"
    assert "names no null coin_flip" in result["claims"][3]["why"]
    assert result["pairs"].keys() == {"pair"}
    assert any("3 training seeds or more, and this run has 1" in note for note in result["notes"])


def test_few_conversations_are_told(tmp_path: Path) -> None:
    found = results()
    count = len(found["profile"]["conversations"])
    for each, told in ((FEW, False), (FEW - 1, True)):
        found["profile"]["conversations"] = [str(min(i, each - 1)) for i in range(count)]
        notes = graded(write_run(tmp_path / str(each), found), ())["notes"]
        assert any(f"Measured on {each} test conversations" in note for note in notes) == told
    # without them the test prompts whose states were read count
    found["profile"]["conversations"] = []
    run = write_run(tmp_path / "states", found)
    assert not any("Measured on" in note for note in graded(run, ())["notes"])
    read = {"conversations": {"test": ["a", "b", "a"]}}
    notes = graded(run, (), activations=read)["notes"]
    assert any("Measured on 2 test conversations" in note for note in notes)


def test_a_null_that_failed_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", results())
    result = graded(run, ["coin_flip"])
    assert result["headline"]["preference_specific"] == "not tested"
    assert "coin_flip failed" in result["claims"][3]["why"]


def test_a_stage_that_is_out_of_date_does_not_count(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", results())
    path = null(run, "coin_flip", 1, margin=0.0)
    manifest = read_json(path / "manifest.json")
    del manifest["stages"]["profile"]
    write_json(path / "manifest.json", manifest)
    assert graded(run, {"coin_flip": path})["headline"]["preference_specific"] == "not tested"


@pytest.mark.parametrize(
    ("checked", "told", "words"),
    [
        (FAILED, "failed", "The self-check failed (v* = b)"),
        ({"passed": None, "why": "no config", "checks": []}, "not run", "not run: no config"),
    ],
)
def test_a_self_check_that_did_not_pass_is_told(
    tmp_path: Path, checked: Json, told: str, words: str
) -> None:
    result = graded(write_run(tmp_path / "run", results()), {}, checked)
    assert result["headline"]["self_check"] == told
    assert result["self_check"] == checked
    assert any(words in note for note in result["notes"])


def test_a_planted_constant_is_a_shared_shift_that_suffices(tmp_path: Path) -> None:
    base, tuned = planted_pair(1).save(tmp_path / "models")
    run = tmp_path / "run"
    write_data(run)
    settings: dict[str, Any] = {
        "models": {"base": str(base), "tuned": str(tuned), "device": "cpu"},
        "activations": {"noise_floor_prompts": 8, "response_tokens": 4},
        "profile": {"random_pairs": 4},
    }
    for stage in ("activations", "vector", "cosine", "spectrum", "profile"):
        measure(run, stage, **settings)
    with patch("dsteer.stages.claims.self_check", return_value=PASSED):
        result = measure(run, "claims", **settings)
    assert result["headline"] == {
        "shared_shift": "supported",
        "low_dimensional": "not tested",  # no stage rank
        "constant_suffices": "supported",
        "preference_specific": "not tested",
        "reversible": "not tested",
        "self_check": "passed",
    }
    assert result["claims"][0]["number"]["words"].endswith("at resid_post.1")
    assert result["training_seeds"] is None
