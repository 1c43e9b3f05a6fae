"""The small choices of a transfer: depths, neutral texts, names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dsteer.activations.sites import all_sites
from dsteer.data.types import PreferencePair
from dsteer.steering.vector import SteeringVector
from dsteer.transfer.answers import Answers, Effects
from dsteer.transfer.share import Draws, described
from dsteer.transfer.study import _Run, _Setting, depths, label, neutral_texts


@pytest.mark.parametrize(
    ("blocks", "found"),
    [(2, [0, 1]), (4, [0, 1, 2, 3]), (8, [1, 3, 5, 7]), (32, [7, 15, 23, 31]), (5, [0, 1, 3, 4])],
)
def test_depths_are_the_ends_of_the_quarters(blocks: int, found: list[int]) -> None:
    assert depths(all_sites(blocks)) == [f"resid_post.{block}" for block in found]


def test_depths_without_blocks() -> None:
    assert depths(["final_norm"]) == ["final_norm"]


def test_one_neutral_text_a_conversation() -> None:
    pairs = [
        PreferencePair("Hi.", " Yes.", " No.", conversation="a"),
        PreferencePair("Hi.", " Perhaps.", " No.", conversation="a"),
        PreferencePair("Alone.", conversation="b"),
        PreferencePair(
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ho?"}],
            "Ho.",
            "Hum.",
            conversation="c",
        ),
    ]
    assert neutral_texts(pairs) == ["Hi. Yes.", "Alone.", "Be brief.\n\nHo?\n\nHo."]


def test_results_name_no_path(tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    assert label(str(tmp_path / "chat")) == "chat"
    assert label("owner/model") == "owner/model"
    (tmp_path / "run" / "dpo" / "model").mkdir(parents=True)
    assert label(str(tmp_path / "run" / "dpo" / "model")) == "run/dpo/model"


def false_alarms(ways: int, ways_of_nulls: int, runs: int = 100) -> float:
    """How often a random vector, the best of some ways on tune, is said to be above 20 nulls.

    What unit vectors gain on a pair is ⟨v, g⟩, with g a vector of the task and of the pair's own.
    """
    rng = np.random.default_rng(0)
    run: Any = object.__new__(_Run)
    run.config = SimpleNamespace(positions="all", choice_pairs=32)
    answers = Answers([], 0, [], written=False)
    found = 0
    for _ in range(runs):
        task = rng.standard_normal(32)
        task *= 3 / np.linalg.norm(task)
        on_tune, on_test = (task + 0.6 * rng.standard_normal((n, 32)) for n in (32, 64))
        units = rng.standard_normal((ways + 20 * ways_of_nulls, 32))
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        mean = on_tune.mean(axis=0)
        run._recovered = lambda settings, *_, mean=mean: [
            float(setting.vector.tensor.numpy() @ mean) for setting in settings
        ]
        vectors = [SteeringVector(row, "resid_post.0") for row in units]
        offers = [vectors[:ways]] + [
            vectors[start : start + ways_of_nulls]
            for start in range(ways, len(vectors), ways_of_nulls)
        ]
        choices, _ = run._choose(offers, answers, None)
        arms = np.stack([task, *(choice.setting.vector.tensor.numpy() for choice in choices)])
        effects = Effects(torch.from_numpy(arms @ on_test.T), torch.ones(64, dtype=torch.float64))
        rows = {"native_best": [0], "native": [0], "carried": [1], "random": range(2, 22)}
        draws = Draws([str(pair) for pair in range(64)], 100, 0.95, 0)
        found += described(effects, rows, draws)["above_nulls"]
    return found / runs


def test_the_verdict_is_calibrated_where_much_is_chosen_from() -> None:
    """A vector that knows nothing is one of 21 that are alike: above the other 20 in 1/21 of runs
    at most (0.048; of 100 runs, 0.11 is three standard errors above it)."""
    assert false_alarms(12, 12) < 0.11
    assert false_alarms(12, 1) > 0.2, "against nulls that chose nothing it would be above them"


def test_of_equals_the_first_is_chosen() -> None:
    run: Any = object.__new__(_Run)
    run.config = SimpleNamespace(positions="auto", choice_pairs=2)
    run._recovered = lambda *_: [0.1, 0.3, 0.2, 0.3, 0.1, 0.0]
    vectors = [SteeringVector(np.eye(3)[i], "final_norm") for i in range(2)]
    ((choice,), ((first, _),)) = run._choose([vectors], Answers([], 0, [], written=False), None)
    assert choice.index == 0
    assert choice.setting == _Setting(vectors[0], "prompt_last")
    assert list(first.values()) == [0.1, 0.3, 0.2]
