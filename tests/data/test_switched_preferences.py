"""Preferences that switch by prompt group."""

from __future__ import annotations

import pytest

from dsteer.config import PipelineConfig
from dsteer.data.synthetic import World
from dsteer.errors import DataError
from dsteer.pipeline import identify_stages
from dsteer.stages import BY_NAME, needs

SWITCH = [{"polite": 1.0}, {"asking": 1.0}, {"polite": -1.0}]


def test_each_group_prefers_its_own_axis_and_nothing_else_differs() -> None:
    pairs = World(3).pairs(240, differ="preferred", switch=SWITCH)
    groups: dict[str, set[str]] = {}
    for pair in pairs:
        groups.setdefault(pair.tags["axes"], set()).add(pair.tags["topic"])
        name, weight = pair.tags["axes"].split("=")
        better = World().score(str(pair.chosen), name) - World().score(str(pair.rejected), name)
        assert better * float(weight) > 0
        others = {tag[7:] for tag in pair.tags if tag.startswith("chosen.")} - {name}
        assert all(pair.tags[f"chosen.{o}"] == pair.tags[f"rejected.{o}"] for o in others)
    assert set(groups) == {"polite=1", "asking=1", "polite=-1"}
    topics = list(groups.values())
    assert not topics[0] & topics[1]
    assert not topics[0] & topics[2]
    assert not topics[1] & topics[2]


def test_a_shorter_call_gives_the_first_pairs_of_a_longer_one() -> None:
    long = World(1).pairs(60, switch=SWITCH)
    assert World(1).pairs(25, switch=SWITCH) == long[:25]
    assert World(2).pairs(25, switch=SWITCH) != long[:25]


@pytest.mark.parametrize(
    ("switch", "words"),
    [
        ([{"polite": 1.0}], "two or more"),
        ([{"polite": 1.0}, {"polite": 1.0}], "prefer the same"),
        ([{"polite": 1.0}, {"polit": 1.0}], "unknown preference axis"),
        ([{"polite": 1.0}, {}], "no preference axis has a weight"),
    ],
)
def test_nonsense_is_refused_in_one_line(switch: list[dict[str, float]], words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        World().pairs(4, switch=switch)
    assert "\n" not in str(error.value)


def test_a_group_without_a_topic_is_refused() -> None:
    with pytest.raises(DataError, match="without a prompt"):
        World().pairs(4, topics=["cooking"], switch=SWITCH)


def _config(source: dict[str, object], **base: object) -> PipelineConfig:
    return PipelineConfig.model_validate(
        {"name": "x", "data": {"sources": [{"format": "synthetic", **source}]}, "base": base}
    )


def test_axes_and_switch_together_are_refused() -> None:
    with pytest.raises(ValueError, match="axes and switch are both given"):
        _config({"axes": {"polite": 1}, "switch": [{"polite": 1}, {"asking": 1}]})


def test_a_base_with_texts_of_its_own_is_the_same_whatever_the_preferences() -> None:
    texts = {"format": "synthetic", "conversations": 50, "seed": 1}
    one, two = {"axes": {"polite": 1}}, {"switch": [{"polite": 1}, {"asking": 1}]}
    own = [identify_stages(_config(source, texts=texts))["base"] for source in (one, two)]
    assert own[0] == own[1]
    shared = [identify_stages(_config(source))["base"] for source in (one, two)]
    assert shared[0] != shared[1]
    assert needs(BY_NAME["base"], _config(one, texts=texts)) == []
