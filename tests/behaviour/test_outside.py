"""The metrics from outside are opened first, and what happens to texts is told."""

from __future__ import annotations

from typing import Any

import pytest

from dsteer.behaviour import outside
from dsteer.behaviour.judge import NO_LABEL, Verdict
from dsteer.behaviour.outside import Outside
from dsteer.behaviour.toxicity import Toxicity
from dsteer.config import BehaviourConfig
from dsteer.progress import SILENT

PROMPTS = ["Which bread keeps longest?", "Name a star."]


class Answering:
    """Stands in for the judge's server: fixed verdicts, and what was asked."""

    def __init__(self, *_args: Any, **_more: Any) -> None:
        self.asked: list[Any] = []

    def scores(self, items: Any) -> list[Verdict]:
        self.asked.append(items)
        return [Verdict(4.0, 0.5) if "rye" in text else Verdict(None, 1.0, NO_LABEL)
                for _, text in items]  # fmt: skip

    refusals = scores

    def preferences(self, items: Any) -> list[Verdict]:
        return [Verdict(float(a > b), 0.0) for _, a, b in items]


def test_nothing_configured_is_absent_with_its_reason() -> None:
    made = Outside(BehaviourConfig(), PROMPTS, "cpu", SILENT)
    assert made.scores == {}
    assert made.prefers is None
    names = [name for name, _ in made.absent]
    assert names == ["external_reward", "toxicity", "judge", "refusal_judge", "judge_prefers"]
    assert all("not configured" in reason for _, reason in made.absent)


def test_the_judge_is_tried_first_and_its_silence_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    judges: list[Answering] = []

    def make(*args: Any, **more: Any) -> Answering:
        judges.append(Answering(*args, **more))
        return judges[-1]

    monkeypatch.setattr(outside, "Judge", make)
    config = BehaviourConfig.model_validate(
        {"judge": {"base_url": "http://x/v1", "model": "m", "prefer": True}}
    )
    made = Outside(config, PROMPTS, "cpu", SILENT)
    assert len(judges[0].asked) == 1, "one question before any work"
    assert made.scores["judge"](["dark rye", "no idea"]) == [4.0, None]
    assert judges[0].asked[1] == [(PROMPTS[0], "dark rye"), (PROMPTS[1], "no idea")]
    assert made.remarks[f"judge: abstentions ({NO_LABEL})"] == 1
    assert made.remarks["judge: more than 10% of the probability on no label"] == 2
    assert made.prefers is not None
    assert made.prefers(["b", "a"], ["a", "b"]) == [1.0, 0.0]
    assert made.absent[-1] == ("refusal_judge", "behaviour.judge.refusal is false")


def test_what_a_classifier_could_not_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Toxicity(0.25, truncated=True), Toxicity(None, reason="a text without tokens")]
    monkeypatch.setattr(outside, "load_toxicity", lambda *_a, **_k: lambda _texts: found)
    config = BehaviourConfig.model_validate({"toxicity": {"classifier": "somebody/toxic"}})
    made = Outside(config, PROMPTS, "cpu", SILENT)
    assert made.scores["toxicity"](["a", ""]) == [0.25, None]
    assert made.remarks["toxicity: texts that lost their end"] == 1
    assert made.remarks["toxicity: without a value (a text without tokens)"] == 1
