"""Words and turns."""

from __future__ import annotations

import pytest

from dsteer.behaviour.words import first_turn, word_counts, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("— … 👍 '-'", []),
        ("Don’t stop-gap, it's_fine", ["don’t", "stop-gap", "it's", "fine"]),
        ("café cafe\u0301", ["café", "cafe\u0301"]),
        ("3.5 x1", ["3", "5", "x1"]),
        ("你好，abc。日本", ["你", "好", "abc", "日", "本"]),
        ("안녕 하세요", ["안녕", "하세요"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected
    assert word_counts([text]) == [len(expected)]


@pytest.mark.parametrize(
    ("text", "turn"),
    [
        ("One turn.", "One turn."),
        (" Yes.\n\nHuman: And now?\n\nAssistant: No.", " Yes.\n\n"),
        ("Assistant: Hello.\nHuman: Hi.", " Hello.\n"),
        ("\n\nHuman:\n\nHuman:", ""),
        ("The Human: a book", "The Human: a book"),
        ("Sure.<|im_end|> I said.", "Sure.<|im_end|> I said."),
        ("Sure.\n<|im_end|>\nmore", "Sure.\n"),
    ],
)
def test_the_first_turn(text: str, turn: str) -> None:
    assert first_turn(text) == turn
