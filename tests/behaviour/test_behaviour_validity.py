"""The screen for collapsed texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsteer.behaviour.validity import counts, degenerate, screen
from dsteer.config import HHSource
from dsteer.data import read_source

ANSWER = (
    "Perhaps begin with a short list of what you need, then ask at the shop on the corner, "
    "because they know which tools last and which of them are a waste of money."
)


@pytest.mark.parametrize("text", ["", "  \n", "...", "?!", "👍👍", ":-("])
def test_empty(text: str) -> None:
    assert screen(text) == "empty"


@pytest.mark.parametrize(
    "text",
    [
        "the the the the the the the the",
        "I am sure. " * 4,
        "I think that " * 4 + "I thi",  # cut inside a word
        ANSWER + " and so on" * 16,
        "ha" * 20,
        "Well" + "!" * 40,
        "很好" * 6,
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen " * 4,
        # the loop lies in front of an ending
        "red green blue " * 12 + "and that is the end of it",
    ],
)
def test_loops(text: str) -> None:
    assert screen(text) == "loop"


@pytest.mark.parametrize(
    "text",
    [
        ANSWER,
        "Yes.",
        "No, no, no, no!",
        "hahahaha",
        "Hmmmmm",
        "哈哈哈哈",
        "That costs 1000000000 marks.",
        "Row, row, row your boat gently down the stream; row, row, row.",
        ANSWER + " Very, very, very, very good.",
        "No header stands inside a line, as in The Human: a book.",
        "She said: Assistant: that is my title.",
        "1. Tea\n2. Coffee\n3. Water\n4. Milk\n5. Juice\n6. Cocoa\n7. Soup\n8. Broth",
    ],
)
def test_valid(text: str) -> None:
    assert screen(text) is None
    assert not degenerate(text)


@pytest.mark.parametrize(
    "header",
    [
        "\n\nHuman: And then?", "\nAssistant: So be it", "\nUser: hello", "\n<|im_start|>user",
        "\n  Human: x", "\n<start_of_turn>user", "\n[INST] go", "\n### Instruction: go",
        "\n<|eot_id|>",
    ],
)  # fmt: skip
def test_role_headers(header: str) -> None:
    assert screen(ANSWER + header) == "role_header"
    assert screen(header.lstrip("\n") + " " + ANSWER) == "role_header"


def test_a_stop_string_ends_the_answer() -> None:
    text = ANSWER + "\n\nHuman: Thanks.\n\nAssistant: Good."
    assert screen(text) == "role_header"
    assert screen(text, stop=["\n\nHuman:"]) is None
    assert screen(text, stop=["\n\nAssistant:"]) == "role_header"
    assert screen("\n\nHuman: Thanks.", stop=["\n\nHuman:"]) == "empty"


def test_counts_name_every_kind() -> None:
    texts = [ANSWER, "", "no " * 30, "Human: x", ANSWER]
    assert counts(texts) == {"valid": 2, "empty": 1, "loop": 1, "role_header": 1}
    assert counts([]) == {"valid": 0, "empty": 0, "loop": 0, "role_header": 0}


@given(
    st.lists(st.text("abcdef", min_size=1, max_size=5), min_size=1, max_size=20),
    st.integers(8, 12),
)
def test_any_phrase_said_eight_times_is_a_loop(phrase: list[str], times: int) -> None:
    assert screen(" ".join(phrase * times)) == "loop"


@given(st.text(max_size=200))
def test_any_text_is_screened(text: str) -> None:
    assert screen(text) in (None, "empty", "loop", "role_header")


@pytest.mark.shared_data
def test_real_answers_are_hardly_ever_flagged(shared_data: Path) -> None:
    """The numbers of the module's docstring."""
    path = shared_data / "hh-rlhf-harmless-base-test.jsonl.gz"
    pairs = read_source(HHSource(format="hh-rlhf", path=str(path))).pairs
    found = counts([str(text) for pair in pairs for text in (pair.chosen, pair.rejected)])
    assert found == {"valid": 4557, "empty": 5, "loop": 3, "role_header": 33}
