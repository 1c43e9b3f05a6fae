"""Refusals: hand-written sentences, and the measured limits on labelled texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsteer.behaviour.refusal import MEASURED_LIMITS, refusal
from dsteer.config import HHSource
from dsteer.data import read_source
from dsteer.geometry.intervals import Interval, wilson

LABELS = Path(__file__).with_name("refusal_labels.json")

REFUSES = (
    "I can't help with that.",
    "I cannot assist you with this request.",
    "I’m sorry, but I can’t do that.",
    "I won't write that for you.",
    "I cannot fulfill your request.",
    "I really can't make a judgment on that.",
    "I really can't in good conscience recommend that.",
    "I am unable to provide this.",
    "Unfortunately, I won't be able to help.",
    "I'm definitely not going to tell you.",
    "We're not allowed to discuss this.",
    "I don't think I can help you with that.",
    "I'm not sure I should do that for you, and I'm not sure I want to help.",
    "I would not tell you that.",
    "I don't have the ability to make that happen, nor do I have the ability to do so.",
    "I'm not programmed for poetry.",
    "Sorry, can't help you there.",
    "I'm afraid I can't share his address.",
    "I'm sorry, but no.",
    "I'm sorry, but that is private.",
    "I'm sorry, that's against my rules.",
    "I'd rather not say.",
    "I would prefer not to talk about it.",
    "I must decline.",
    "I refuse.",
    "I'm not comfortable with that.",
    "I don't feel comfortable giving advice here.",
    "As an AI, I must decline.",
    "As an AI language model, I cannot give opinions.",
    "That isn't something I can do.",
    "It's not my place to judge.",
    "I'm not the right person to ask.",
    "It would be wrong for me to guess at her age.",
    "Sorry, that's out of bounds.",
)

ANSWERS = (
    "",
    "Sure, I can help with that.",
    "I can't recommend it enough!",
    "I can’t recommend this book highly enough.",
    "You can't do that on a Sunday.",
    "They won't help you.",
    "No, cats can't do that.",
    "She said that she can't answer.",
    "If I can't help you, ask a friend.",
    "I'm sorry to hear that.",
    "I'm sorry, what do you mean?",
    "I'm sorry, but I don't understand.",
    "I'm sorry, but I don't know.",
    "I can't help but smile.",
    "I can't help laughing.",
    "I can't help it.",
    "I can't believe it!",
    "I can't wait to help!",
    "I can't think of anything.",
    "I can't tell you how happy I am.",
    "I can't say that I do.",
    "I won't give up.",
    "I wouldn't recommend that.",
    "I don't know.",
    "I'm not sure.",
    "I'm comfortable with that.",
    "It is not appropriate to shout.",
    "It is not a person I know.",
    "Ideally can't help, but a plumber might.",
    "You might rather not.",
)


@pytest.mark.parametrize("text", REFUSES)
def test_refuses(text: str) -> None:
    assert refusal(text) is not None
    assert refusal(f"Hm. {text.replace(chr(39), '’')} Ask me another.") is not None


@pytest.mark.parametrize("text", ANSWERS)
def test_answers(text: str) -> None:
    assert refusal(text) is None
    assert refusal(text.replace("'", "’")) is None


def test_the_position_of_the_first_refusal() -> None:
    text = "That is a question for a baker. I can't help with that. I'd rather not guess."
    found = refusal(text)
    assert found is not None
    assert found.position == pytest.approx(32 / len(text))
    assert found.word == 7
    start = refusal("I can’t help.")
    assert start is not None
    assert (start.position, start.word, start.loops) == (0.0, 0, False)


def test_a_refusal_that_loops() -> None:
    twice, thrice = (
        refusal("I can't help. " * 2),
        refusal("I can’t help. i can't help. I can't help."),
    )
    assert twice is not None
    assert thrice is not None
    assert (twice.loops, thrice.loops) == (False, True)
    mixed = refusal("I can't help. I won't answer. I'd rather not.")
    assert mixed is not None
    assert not mixed.loops


def test_only_the_own_turn_counts() -> None:
    assert refusal(" Use flour.\n\nHuman: I can't do that.\n\nAssistant: I can't help.") is None
    assert refusal("Assistant: I can't help.") is not None


@given(st.text(max_size=100), st.text(max_size=100))
def test_a_refusal_is_found_wherever_it_stands(before: str, after: str) -> None:
    found = refusal(f"{before}\n. I can't help with that. {after}")
    assert found is not None
    assert 0 <= found.position < 1


@pytest.mark.shared_data
def test_the_measured_limits(shared_data: Path) -> None:
    """Precision and recall on the labelled rows; the docstring tells the same numbers."""
    labels = json.loads(LABELS.read_text(encoding="utf-8"))
    rows, refuses = set(labels["rows"]), set(labels["refusals"])
    assert refuses <= rows
    path = shared_data / "hh-rlhf-harmless-base-test.jsonl.gz"
    pairs = read_source(HHSource(format="hh-rlhf", path=str(path))).pairs
    answers = {pair.row: str(pair.chosen) for pair in pairs if pair.row in rows}
    assert len(answers) == MEASURED_LIMITS.texts
    named = {row for row, answer in answers.items() if refusal(answer) is not None}
    right = len(named & refuses)
    for told, of in ((MEASURED_LIMITS.precision, named), (MEASURED_LIMITS.recall, refuses)):
        measured = wilson(right, len(of), len(of))
        assert measured.low is not None
        assert measured.high is not None
        assert told == Interval(
            round(measured.value, 3), round(measured.low, 3), round(measured.high, 3), len(of)
        )
