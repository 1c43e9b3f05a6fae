"""The stage ``reversal`` on planted truth: v* is b, so taking it off is the base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from measured import measure
from planted import planted_pair

from dsteer.config import DpoConfig
from dsteer.data.jsonl import read_pairs, write_pairs
from dsteer.data.synthetic import World
from dsteer.errors import ConfigError
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
    assert way["reward_margin"]["value"] == pytest.approx(0, abs=1e-4)
    # a constant is no preference: eight margins do not tell their mean from 0, so no share of it
    assert way["way_back"] is None
    assert "includes 0" in way["way_back_why"]
    # one addition and one subtraction in float32, each within half a unit of the last place
    assert way["undoing"]["rounding"] <= 2**-22
    assert way["optimiser_steps"] == 0


def test_the_tuned_model_itself_is_nowhere_on_its_way(found: Json) -> None:
    tuned = found["ways"]["tuned"]
    assert tuned["recovered"]["value"] == 0
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
    (table,) = reversal_tables(found | {"seconds": seconds})
    column = [column.title for column in table.columns].index("time, s")
    assert table.rows[0][column] == "–"
    assert all(row[column] != "–" for row in table.rows[1:])
    assert not list(folder.glob("*/checkpoints"))


class _AskedError(Exception):
    pass


@pytest.fixture
def trained(
    tmp_path: Path, planted: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., DpoConfig]:
    """What is asked of a training that undoes one of the run itself, of seven steps."""
    run, settings = planted
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(settings["models"]["tuned"], tmp_path / "run" / "dpo" / "model")
    write_json(tmp_path / "run" / "dpo" / "result.json", {"curve": {"train": [{"step": 7}]}})

    def ask(way: str, **dpo: Any) -> DpoConfig:
        asked: list[DpoConfig] = []

        def train(*given: Any, **_: Any) -> None:
            asked.append(given[4])
            raise _AskedError

        monkeypatch.setattr("dsteer.stages.reversal.train_dpo", train)
        models = {"base": settings["models"]["base"], "device": "cpu"}
        changes = {**settings, "models": models, "dpo": dpo, "reversal": {"ways": [way]}}
        with pytest.raises(_AskedError):
            measure(tmp_path / "run", "reversal", **changes)
        return asked[0]

    return ask


def test_undoing_takes_the_steps_that_were_taken_and_stops_at_no_kl(trained: Any) -> None:
    found = trained(
        "dpo_swapped", max_steps=90, stop_at_kl=0.1, method="simpo", label_smoothing=0.1
    )
    assert (found.max_steps, found.stop_at_kl, found.method) == (7, None, "simpo")
    found = trained("sft_rejected", method="simpo", label_smoothing=0.1)
    assert (found.method, found.loss_type, found.label_smoothing) == ("dpo", "sft", 0)


def test_training_that_was_not_on_the_given_labels_is_not_undone(trained: Any) -> None:
    with pytest.raises(ConfigError, match=r"dpo\.labels is swapped; take this way out"):
        trained("dpo_swapped", labels="swapped")


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
