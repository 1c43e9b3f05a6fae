from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsteer.data.transcript import (
    conversation_key,
    holds_marker,
    parse_transcript,
    parse_turns,
    render_transcript,
)
from dsteer.data.types import Message
from dsteer.errors import DataError

# Pieces that come near to a marker without being one, and real text.
PIECES = ["\n", "\n\n", "Human:", "Assistant:", "Human", ":", " ", "a", "é", "\r", "\u2028", "1. x"]
contents = st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=20)
contents = contents.filter(lambda text: not holds_marker(text))


@st.composite
def dialogues(draw: st.DrawFn) -> list[Message]:
    texts = draw(st.lists(contents, min_size=1, max_size=6))
    return [
        Message(role="assistant" if number % 2 else "user", content=text)
        for number, text in enumerate(texts)
    ]


@given(dialogues())
def test_parsing_inverts_rendering(messages: list[Message]) -> None:
    text = render_transcript(messages)
    assert parse_transcript(text) == messages
    assert render_transcript(parse_transcript(text)) == text


@given(contents, st.lists(st.tuples(st.sampled_from(["Human", "Assistant"]), contents)))
def test_no_byte_is_lost_between_the_markers(preamble: str, turns: list[tuple[str, str]]) -> None:
    text = preamble + "".join(f"\n\n{name}:{raw}" for name, raw in turns)
    found_preamble, found = parse_turns(text)
    names = {"user": "Human", "assistant": "Assistant"}
    rebuilt = found_preamble + "".join(f"\n\n{names[role]}:{raw}" for role, raw in found)
    assert rebuilt == text


def test_blank_lines_and_names_inside_a_turn_do_not_split_it() -> None:
    text = "\n\nHuman: A list:\n\n1. one\n\nand\nHuman: not a turn\n\nAssistant: Yes.\n\nBye."
    assert [message["content"] for message in parse_transcript(text)] == [
        "A list:\n\n1. one\n\nand\nHuman: not a turn",
        "Yes.\n\nBye.",
    ]


def test_an_open_answer_is_a_last_message_without_content() -> None:
    messages = parse_transcript("\n\nHuman: Hi\n\nAssistant:")
    assert messages[-1] == {"role": "assistant", "content": ""}
    assert render_transcript(messages) == "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize("text", ["", "Hello", "Human: Hi\n\nAssistant: Hello"])
def test_text_that_begins_without_marker_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="is no transcript"):
        parse_transcript(text)


def test_what_a_transcript_cannot_hold_is_refused() -> None:
    with pytest.raises(DataError, match="message 1 has the role 'system'"):
        render_transcript([Message(role="system", content="Be brief.")])
    with pytest.raises(DataError, match="message 1 holds"):
        render_transcript([Message(role="user", content="a\n\nAssistant: b")])


def test_a_conversation_is_named_by_its_first_human_turn() -> None:
    key = conversation_key("\n\nHuman: How are you?\n\nAssistant:")
    same = [
        "\n\nHuman:  how ARE\nyou?\n\nAssistant: Fine.\n\nHuman: Good\n\nAssistant:",
        "How are you?",
        [Message(role="system", content="x"), Message(role="user", content="How are you? ")],
    ]
    assert {conversation_key(prompt) for prompt in same} == {key}
    assert conversation_key("\n\nHuman: How are they?\n\nAssistant:") != key
    assert len(key) == 16
