"""The stage ``reversal`` on planted truth: v* is b, so taking it off is the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from measured import measure
from planted import planted_pair

from dsteer.data.jsonl import read_pairs, write_pairs
from dsteer.data.synthetic import World
from dsteer.report.reversal_tables import reversal_sentences, reversal_tables
from dsteer.stages.reversal import swapped
from dsteer.store import Json, read_json, write_json

SIZES = {"train": 16, "fit": 8, "tune": 5, "test": 8}
STEPS = 3


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("reversal")
    made = planted_pair(1, size=1.0, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                        max_position_embeddings=512)  # fmt: skip
    base, tuned = made.save(root)
    run = root / "run"
    pairs, start = World(0).pairs(sum(SIZES.values())), 0
    (run / "data").mkdir(parents=True)
    for split, size in SIZES.items():
        write_pairs(run / "data" / f"{split}.jsonl", pairs[start : start + size])
        start += size
    settings = {
        "models": {"base": str(base), "tuned": str(tuned), "device": "cpu"},
        "activations": {"noise_floor_prompts": 2, "response_tokens": 0},
        "inversion": {},
        "reversal": {"pairs": 8, "bootstrap": 50, "steps": STEPS, "learning_rate": 1e-3},
    }
    measure(run, "activations", "vector", **settings)
    (run / "inversion").mkdir()
    write_json(run / "inversion" / "result.json", {"site": "resid_post.1", "positions": "all"})
    return run, settings


@pytest.fixture(scope="module")
def found(planted: tuple[Path, dict[str, Any]]) -> Json:
    run, settings = planted
    return measure(run, "reversal", figures=True, **settings)


def test_taking_the_planted_vector_off_is_the_base(found: Json) -> None:
    way = found["ways"]["inversion"]
    assert way["strength"] == 1.0
    # float32 states; KL of equal predictions is below 1e-12 a token, R divides two sums of KL
    assert way["recovered"]["value"] == pytest.approx(1, abs=1e-4)
    assert way["way_back"]["value"] == pytest.approx(1, abs=1e-3)
    # one addition and one subtraction in float32, each within half a unit of the last place
    assert way["undoing"]["rounding"] <= 2**-22
    assert way["optimiser_steps"] == 0


def test_the_tuned_model_itself_is_nowhere_on_its_way(found: Json) -> None:
    tuned = found["ways"]["tuned"]
    assert tuned["recovered"]["value"] == 0
    assert tuned["way_back"]["value"] == 0
    assert tuned["kl_to_tuned"]["value"] == pytest.approx(0, abs=1e-9)  # rounding of float32 logits


@pytest.mark.parametrize("way", ["dpo_swapped", "sft_rejected"])
def test_trained_ways_took_the_steps_and_moved_the_weights(found: Json, way: str) -> None:
    told = found["ways"][way]
    assert told["optimiser_steps"] == STEPS
    assert told["undoing"]["changed_share"] > 0
    assert told["undoing"]["distance_to_tuned"] > 0
    assert told["kl_to_tuned"]["value"] > 0


def test_times_stand_beside_the_result(planted: tuple[Path, dict[str, Any]], found: Json) -> None:
    folder = planted[0] / "reversal"
    seconds = read_json(folder / "timing.json")["seconds"]
    assert set(seconds) == {"inversion", "dpo_swapped", "sft_rejected"}
    assert "seconds" not in str(found)
    assert (folder / "figures" / "ways_back.png").is_file()


def test_swapping_twice_is_nothing(planted: tuple[Path, dict[str, Any]]) -> None:
    pairs = read_pairs(planted[0] / "data" / "train.jsonl")
    once = swapped(pairs)
    assert [pair.chosen for pair in once] == [pair.rejected for pair in pairs]
    assert swapped(once) == pairs


def test_every_way_has_its_row_and_its_sentence(found: Json) -> None:
    (table,) = reversal_tables(found)
    assert [row[0] for row in table.rows][:2] == ["tuned model, as it is", "tuned − λv*"]
    assert len(table.rows) == 4
    assert all(len(row) == len(table.columns) for row in table.rows)
    said = reversal_sentences(found)
    assert len(said) == 3
    assert f"after {STEPS} optimiser steps" in said[1]
    assert reversal_tables({}) == []
    assert reversal_sentences(None) == []
