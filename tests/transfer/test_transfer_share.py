"""Effects and shares against values worked by hand."""

from __future__ import annotations

import pytest
import torch

from dsteer.behaviour.teacher_forced import Scores
from dsteer.data.tokens import Encoded
from dsteer.geometry.intervals import Interval
from dsteer.transfer.answers import Answers, Effects, effects
from dsteer.transfer.share import Draws, band, described, share

DRAWS = Draws(["a", "b", "c", "d"], 200, 0.95, 0)
ONES = torch.ones(4, dtype=torch.float64)


def answers(pairs: int, both: bool) -> Answers:
    text = Encoded((1, 2, 3), 1)
    return Answers([text] * (2 * pairs if both else pairs), pairs, list("abcd")[:pairs], False)


def scores(kl: list[list[float]], likelihood: list[list[float]]) -> Scores:
    table = torch.tensor(kl, dtype=torch.float64)
    return Scores(
        log_likelihood=torch.tensor(likelihood, dtype=torch.float64),
        kl=table,
        kl_reverse=table,
        kl_first=table / 4,
        agreement=table,
        tokens=torch.full((table.shape[1],), 2),
    )


def test_effects_by_hand() -> None:
    # arms: the base as it is, one vector; texts: chosen of two pairs, then rejected
    found = effects(
        scores(
            [[4.0, 2.0, 9.0, 9.0], [1.0, 2.0, 9.0, 9.0]],
            [[-10.0, -10.0, -10.0, -10.0], [-8.0, -11.0, -9.0, -10.0]],
        ),
        answers(2, both=True),
        beta=0.5,
    )
    for name, size in (("kl_recovered", 1.0), ("first_token", 0.25)):
        effect = found[name]
        assert effect is not None
        assert (effect.gained / size).tolist() == [[3.0, 0.0]]
        assert (effect.below / size).tolist() == [4.0, 2.0]
    margin, accuracy = found["reward_margin"], found["reward_accuracy"]
    assert margin is not None
    assert accuracy is not None
    # 0.5 × (2 − 1) and 0.5 × (−1 − 0)
    assert margin.gained.tolist() == [[0.5, -0.5]]
    assert accuracy.gained.tolist() == [[0.5, -0.5]]
    assert margin.below.tolist() == [1.0, 1.0]


def test_what_is_undefined() -> None:
    alone = effects(
        scores([[4.0, 2.0], [1.0, 2.0]], [[-1.0, -1.0], [-1.0, -1.0]]), answers(2, both=False), 0.1
    )
    assert alone["reward_margin"] is None
    assert alone["reward_accuracy"] is None
    agree = effects(
        scores([[0.0] * 4, [1.0] * 4], [[-1.0] * 4, [-1.0] * 4]), answers(2, both=True), 0.1
    )
    assert agree["kl_recovered"] is None
    assert agree["first_token"] is None
    tie = agree["reward_accuracy"]
    assert tie is not None
    assert tie.gained.tolist() == [[0.0, 0.0]], "a tie counts half"


def test_a_share_needs_an_effect() -> None:
    half = torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64)
    found, why = share(half, 2 * half, Interval(1.0, 0.5, 1.5, 4), DRAWS)
    assert why is None
    assert found is not None
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    for low, high, words in (
        (-0.1, 0.4, "includes 0"),
        (0.0, 0.4, "includes 0"),
        (-2.0, -1.0, "lies below 0"),
    ):
        found, why = share(half, half, Interval(0.2, low, high, 4), DRAWS)
        assert found is None
        assert why == f"the interval of the native vector's effect {words}"
    assert share(half, half, Interval(0.2, None, None, 4), DRAWS)[0] is None
    assert share(half, half, None, DRAWS)[1] == "the native vector's effect is undefined"


ROWS = {"native_best": [0], "native": [1], "carried": [2], "shuffled": [3, 4]}


def test_described_by_hand() -> None:
    gained = torch.tensor(
        [
            [2.0, 2, 2, 2],
            [1.25, 1.25, 1.25, 1.25],
            [1.0, 1, 1, 1],
            [0.4, 0, 0, 0.4],
            [-0.8, 0, 0, 0],
        ],
        dtype=torch.float64,
    )
    found = described(Effects(gained, 4 * ONES), ROWS, DRAWS)
    assert found["native_best"]["value"] == 0.5
    assert found["native"]["value"] == 0.3125
    assert found["carried"]["value"] == 0.25
    # 4 of 8 where the native vector does best, 4 of 5 where the carried one acts
    assert found["share"]["value"] == 0.5
    assert found["share_here"]["value"] == pytest.approx(0.8)
    # Σ / 16 of the nulls are 0.05 and −0.05; over the native 0.5 that is ± 0.1
    wanted = {"mean": 0.0, "low": -0.05, "high": 0.05, "draws": 2}
    assert found["nulls"]["shuffled"]["effect"] == pytest.approx(wanted)
    assert found["nulls"]["shuffled"]["share"]["high"] == pytest.approx(0.1)
    assert (found["above_nulls"], found["harms"]) == (True, False)
    low = described(Effects(gained, 4 * ONES), {**ROWS, "carried": [4], "shuffled": [3]}, DRAWS)
    assert (low["above_nulls"], low["harms"]) == (False, False)
    none = described(Effects(-gained, 4 * ONES), ROWS, DRAWS)
    assert none["share"] is None
    assert none["nulls"]["shuffled"]["share"] is None
    assert none["nulls"]["shuffled"]["effect"]["high"] == pytest.approx(0.05)


def test_less_harm_than_the_nulls_is_not_above_them() -> None:
    gained = torch.tensor([[2.0], [2.0], [-1.0], [-3.0], [-4.0]], dtype=torch.float64)
    found = described(Effects(gained.expand(5, 4), 4 * ONES), ROWS, DRAWS)
    assert found["carried"]["low"] == -0.25 > found["nulls"]["shuffled"]["effect"]["high"]
    assert found["above_nulls"] is False
    assert found["harms"] is True


def test_the_ceiling_does_not_fall_with_the_place() -> None:
    """Where the carried vector acts the native one does next to nothing: a share above 1 there."""
    gained = torch.tensor([[2.0], [0.1], [0.2], [0.0], [0.0]], dtype=torch.float64)
    found = described(Effects(gained.expand(5, 4), 4 * ONES), ROWS, DRAWS)
    assert found["share"]["value"] == pytest.approx(0.1)
    assert found["share_here"]["value"] == pytest.approx(2)


def test_band_of_many_draws_is_the_middle() -> None:
    many = band(torch.arange(101.0, dtype=torch.float64).numpy())
    assert (many["low"], many["high"], many["mean"]) == (2.5, 97.5, 50.0)
    few = band(torch.tensor([3.0, 1.0], dtype=torch.float64).numpy())
    assert (few["low"], few["high"], few["draws"]) == (1.0, 3.0, 2)
