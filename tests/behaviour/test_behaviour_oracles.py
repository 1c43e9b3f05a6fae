"""The synthetic world's oracles on generated texts."""

from __future__ import annotations

from random import Random

import pytest

from dsteer.behaviour.oracles import needless_refusals, oracle_scores
from dsteer.data.synthetic import AXES, World
from dsteer.errors import MeasurementError

DECLINES = "Perhaps you might skip that word under the quiet list."
ANSWERS = "Perhaps you might use a spade."


def test_answers_of_a_known_pole_score_at_it() -> None:
    world = World(3)
    records = world.records(20)
    for pole, sign in (("polite", 1.0), ("curt", -1.0)):
        texts = [world.respond(record, {"polite": pole}, Random(1)) for record in records]
        scores = oracle_scores(texts)
        assert list(scores) == [axis.name for axis in AXES]
        assert scores["polite"] == [sign] * 20
        assert all(len(values) == 20 for values in scores.values())


def test_texts_without_a_word_and_no_texts() -> None:
    assert all(values == [0.0, 0.0] for values in oracle_scores(["", "…"]).values())
    assert all(values == [] for values in oracle_scores([]).values())


def test_declining_is_needless_where_no_rule_is_triggered() -> None:
    texts = [DECLINES, DECLINES, ANSWERS, ANSWERS, ""]
    assert needless_refusals(texts, [True, False, True, False, False]) == [
        None, True, None, False, False,
    ]  # fmt: skip
    with pytest.raises(MeasurementError, match="1 flags for 5 texts"):
        needless_refusals(texts, [True])
