"""Dials: names, sites and strengths, and mistakes with them."""

from __future__ import annotations

import math

import pytest
import torch
from planted import tiny_llama

from dsteer.errors import ConfigError, MeasurementError, ModelError
from dsteer.steering.dials import Dial, Dials
from dsteer.steering.intervene import Schedule
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

MODEL = tiny_llama()


def vectors(*sites: str, width: int = 32, **metadata: object) -> SteeringVectorSet:
    return SteeringVectorSet(
        [SteeringVector(torch.full((width,), 1.0 + k), site) for k, site in enumerate(sites)],
        metadata,  # type: ignore[arg-type]
    )


BOTH = vectors("resid_post.1", "resid_post.2")


def two() -> Dials:
    return Dials(
        MODEL,
        [Dial("warm", BOTH, "resid_post.1", 1.0), Dial("brief", BOTH, "resid_post.2", -2.0)],
        positions="generated",
        schedule=Schedule("linear", steps=5),
    )


def test_rows_and_settings() -> None:
    dials = two()
    rows = [dials.plain, dials.strengths, {"warm": 0.5, "brief": 0.0}]
    warm, brief = dials.interventions(rows)
    assert (warm.site, warm.strength) == ("resid_post.1", [0.0, 1.0, 0.5])
    assert (brief.site, brief.strength) == ("resid_post.2", [0.0, -2.0, 0.0])
    assert warm.vector is BOTH["resid_post.1"]
    assert brief.positions == "generated"
    assert brief.schedule == Schedule("linear", steps=5)


def test_what_no_row_turns_is_not_hooked() -> None:
    dials = two()
    assert dials.interventions([dials.plain]) == []
    assert [one.site for one in dials.interventions([{"warm": 0.0, "brief": 1.0}])] == [
        "resid_post.2"
    ]


def test_turning_for_a_request_leaves_the_dials() -> None:
    dials = two()
    assert dials.turned({"brief": 3}) == {"warm": 1.0, "brief": 3.0}
    assert dials.strengths == {"warm": 1.0, "brief": -2.0}
    dials.turn({"brief": 3})
    assert dials.strengths == {"warm": 1.0, "brief": 3.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "1", None])
def test_strengths_that_are_none(value: object) -> None:
    with pytest.raises(ConfigError, match=r"strength .* of warm: expected a"):
        two().turned({"warm": value})  # type: ignore[dict-item]


def test_moving() -> None:
    dials = two()
    dials.move("2")
    assert [dial.site for dial in dials.values()] == ["resid_post.2", "resid_post.2"]
    dials.move("resid_post.1", "brief")
    assert [dial.site for dial in dials.values()] == ["resid_post.2", "resid_post.1"]
    with pytest.raises(ConfigError, match=r"no vector at site 'resid_post.3'; expected one of res"):
        dials.move("3")
    assert [dial.site for dial in dials.values()] == ["resid_post.2", "resid_post.1"]


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="'bref': no vector of this name; did you mean 'brief'"):
        two().turned({"bref": 1.0})
    with pytest.raises(ConfigError, match="no vectors to steer by"):
        Dials(MODEL, [])
    with pytest.raises(ConfigError, match="two vectors are called 'a'"):
        Dials(MODEL, [Dial("a", BOTH, "resid_post.1"), Dial("a", BOTH, "resid_post.2")])
    with pytest.raises(MeasurementError, match="a: strength nan; expected a finite number"):
        Dial("a", BOTH, "resid_post.1", math.nan)
    deep = vectors("resid_post.1", "resid_post.9")
    with pytest.raises(ConfigError, match=r"the model has 4 blocks, so the last is 'resid_post.3'"):
        Dials(MODEL, [Dial("a", deep, "resid_post.9")])
    with pytest.raises(ConfigError, match=r"the model has 4 blocks, so the last is 'resid_post.3'"):
        Dials(MODEL, [Dial("a", deep, "resid_post.1")]).move("9")
    with pytest.raises(ModelError, match="its width is 32, and the vectors are of 8"):
        Dials(MODEL, [Dial("a", vectors("resid_post.1", width=8), "resid_post.1")])
    foreign = vectors("resid_post.1", model_type="gpt2")
    with pytest.raises(ModelError, match="its type is llama, and the vectors are of gpt2"):
        Dials(MODEL, [Dial("a", foreign, "resid_post.1")])


def test_other_units_are_measured_once() -> None:
    asked = []

    def measure(vector: SteeringVector, strength: float) -> float:
        asked.append((vector.site, strength))
        return 10 * strength

    dials = Dials(
        MODEL,
        [Dial("a", BOTH, "resid_post.1", 2.0), Dial("b", BOTH, "resid_post.2", 0.0)],
        measure=measure,
    )
    assert dials.lambdas(dials.strengths) == {"a": 20.0, "b": 0.0}
    (only,) = dials.interventions([dials.strengths, dials.plain])
    assert only.strength == [20.0, 0.0]
    dials.move("2")
    assert dials.lambdas({"a": 2.0}) == {"a": 20.0}
    assert asked == [("resid_post.1", 2.0), ("resid_post.2", 2.0)]  # 0 needs no measuring
