from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsteer.data import load_preferences
from dsteer.data.preference import read_preferences
from dsteer.data.prompts import read_prompts
from dsteer.data.tables import Row
from dsteer.data.types import Message, PreferencePair
from dsteer.errors import DataError

USER = Message(role="user", content="What colour is the sky?")
SYSTEM = Message(role="system", content="Be brief.")
BLUE = Message(role="assistant", content="Blue.")
GREEN = Message(role="assistant", content="Green.")
TOOL = {"role": "tool", "content": "42"}


def read(**columns: Any) -> PreferencePair | str:
    return next(read_preferences([Row(columns, "rows.jsonl", 2, "rows.jsonl line 3")]))


def test_text() -> None:
    pair = read(prompt="The sky is", chosen=" blue.", rejected=" green.", score=3)
    assert isinstance(pair, PreferencePair)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("The sky is", " blue.", " green.")
    assert (pair.source, pair.row) == ("rows.jsonl", 2)


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": [SYSTEM, USER], "chosen": [BLUE], "rejected": [GREEN]},
        {"chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, GREEN]},
        {
            "prompt": USER["content"],
            "chosen": [SYSTEM, USER, BLUE],
            "rejected": [SYSTEM, USER, GREEN],
        },
    ],
)
def test_messages_explicit_and_implicit(columns: dict[str, Any]) -> None:
    pair = read(**columns)
    assert isinstance(pair, PreferencePair)
    assert pair.prompt == [SYSTEM, USER]
    assert (pair.chosen, pair.rejected) == ("Blue.", "Green.")


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt": [USER], "chosen": [TOOL], "rejected": [GREEN]}, "unsupported_role"),
        ({"prompt": [USER], "chosen": [BLUE, BLUE], "rejected": [GREEN]}, "answer_not_one_message"),
        ({"prompt": [USER], "chosen": [], "rejected": [GREEN]}, "answer_not_one_message"),
        ({"chosen": [USER, BLUE], "rejected": []}, "answer_not_one_message"),
        ({"chosen": [USER, BLUE], "rejected": [GREEN]}, "prompts_differ"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [GREEN]}, "last_turn_not_assistant"),
        ({"chosen": [USER, BLUE], "rejected": [SYSTEM, USER, GREEN]}, "prompts_differ"),
        ({"prompt": [SYSTEM], "chosen": [BLUE], "rejected": [GREEN]}, "last_prompt_turn_not_user"),
        ({"prompt": [], "chosen": [BLUE], "rejected": [GREEN]}, "last_prompt_turn_not_user"),
        (
            {"prompt": [{"role": "user", "content": " "}], "chosen": [BLUE], "rejected": [GREEN]},
            "empty_prompt",
        ),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty_prompt"),
        ({"prompt": "p", "chosen": "\n", "rejected": "b"}, "empty_answer"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "identical_answers"),
        ({"prompt": [USER], "chosen": [BLUE], "rejected": [BLUE]}, "identical_answers"),
    ],
)
def test_each_reason_drops_a_row(columns: dict[str, Any], reason: str) -> None:
    assert read(**columns) == reason


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"prompt": "", "chosen": " ", "rejected": ""}, "empty; expected a prompt"),
        ({"chosen": "a", "rejected": "b"}, "no column 'prompt': give one"),
        ({"prompt": "p", "rejected": "b"}, "no column 'chosen'; found 'prompt', 'rejected'"),
        ({"prompt": "p", "chosen": "a", "rejected": 1.5}, "'rejected' is 1.5, expected text"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "'prompt' is a list, expected text"),
        (
            {"prompt": "p", "chosen": [BLUE], "rejected": "b"},
            "'rejected' is not a list of messages",
        ),
        (
            {"prompt": "p", "chosen": [BLUE], "rejected": [GREEN]},
            "no prompt: give it as a list of mess",
        ),
        (
            {"prompt": "p", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
            "'prompt' is none of the messages",
        ),
        ({"prompt": [USER], "chosen": ["x"], "rejected": [GREEN]}, "'chosen' holds 'x', expected"),
        (
            {"prompt": [{"from": "human", "value": "x"}], "chosen": [BLUE], "rejected": [GREEN]},
            "'prompt': a message's role and content must be text",
        ),
    ],
)
def test_malformed_rows_name_file_and_line(
    tmp_path: Path, columns: dict[str, Any], problem: str
) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path.write_text(f"{json.dumps(good)}\n{json.dumps(columns)}\n")
    with pytest.raises(DataError, match=f"^{path} line 2: {problem}") as caught:
        load_preferences(path, format="preference")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ plain prompts


def test_prompts_from_text_json_lines_and_csv(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("How are you?\n\n  Why?\n")
    lines = tmp_path / "b.jsonl"
    lines.write_text(json.dumps({"prompt": [SYSTEM, USER], "n": 1, "x": None}) + "\n")
    table = tmp_path / "c.csv"
    table.write_bytes(b'\xef\xbb\xbfid,prompt,label\r\n7,"One\r\ntwo?",safe\r\n8,Three,\r\n')

    assert [(pair.prompt, pair.row) for pair in load_preferences(text)] == [
        ("How are you?", 0),
        ("  Why?", 2),
    ]
    [pair] = load_preferences(lines)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([SYSTEM, USER], None, None)
    assert pair.tags == {"n": "1"}
    assert [(pair.prompt, pair.tags) for pair in load_preferences(table)] == [
        ("One\r\ntwo?", {"id": "7", "label": "safe"}),
        ("Three", {"id": "8"}),
    ]


def test_prompts_that_are_dropped_or_refused() -> None:
    def one(source: str = "p.jsonl", **columns: Any) -> PreferencePair | str:
        return next(read_prompts([Row(columns, source, 0, f"{source} line 1")]))

    assert one("p.txt", prompt=" ") == "blank_line"
    assert one(prompt=[TOOL]) == "unsupported_role"
    for columns, problem in [
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": []}, "'prompt' is empty"),
        ({"question": "x"}, "no column 'prompt'; found 'question'"),
        ({"prompt": {"a": 1}}, "'prompt' is an object, expected text"),
    ]:
        with pytest.raises(DataError, match=f"p.jsonl line 1: {problem}"):
            one(**columns)


@pytest.mark.shared_data
def test_real_prompts(shared_data: Path) -> None:
    pairs = load_preferences(shared_data / "xstest-prompts.csv")
    assert len(pairs) == 450
    assert {pair.tags["label"] for pair in pairs} == {"safe", "unsafe"}
