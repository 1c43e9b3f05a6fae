from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsteer.config import HHSource
from dsteer.data import load_preferences, read_source
from dsteer.data.hh import read_hh
from dsteer.data.tables import Row
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError

ASK = "\n\nHuman: May I ask?\n\nAssistant:"


def read(chosen: object, rejected: object) -> PreferencePair | str:
    row = Row({"chosen": chosen, "rejected": rejected}, "rows.jsonl", 4, "rows.jsonl line 5")
    return next(read_hh([row]))


def test_a_row_is_cut_at_its_last_assistant_marker() -> None:
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: One\n\ntwo?" + "\n\nAssistant:"
    pair = read(prompt + " Yes.\n\n1. a", prompt + " No.")
    assert isinstance(pair, PreferencePair)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, " Yes.\n\n1. a", " No.")
    assert (pair.source, pair.row) == ("rows.jsonl", 4)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("Some words" + ASK + " Yes", "Some words" + ASK + " No", "no_opening_human_turn"),
        ("\n\nAssistant: Yes", "\n\nAssistant: No", "no_opening_human_turn"),
        ("Human: Hi\n\nAssistant: Yes", "Human: Hi\n\nAssistant: No", "no_opening_human_turn"),
        (ASK + " Yes\n\nHuman: Thanks", ASK + " No", "last_turn_not_assistant"),
        ("\n\nHuman: Hi", ASK + " No", "last_turn_not_assistant"),
        (ASK + " Yes", "\n\nHuman: May he ask?\n\nAssistant: No", "prompts_differ"),
        (ASK + " Yes\n\nAssistant: Or no", ASK + " No", "prompts_differ"),
        (ASK + " Yes", ASK + " No\n\nAssistant: Or yes", "prompts_differ"),
        (ASK + " A\n\nAssistant: B", ASK + " A\n\nAssistant: C", "roles_do_not_alternate"),
        ("\n\nHuman: Hi" + ASK + " Yes", "\n\nHuman: Hi" + ASK + " No", "roles_do_not_alternate"),
        (ASK + " ", ASK + " No", "empty_answer"),
        (ASK + " Yes", ASK, "empty_answer"),
        (ASK + "Yes", ASK + " No", "no_space_before_answer"),
        (ASK + " Yes", ASK + "\nNo", "no_space_before_answer"),
        (ASK + " Yes", ASK + " Yes", "identical_answers"),
    ],
)
def test_each_reason_drops_a_row(chosen: str, rejected: str, reason: str) -> None:
    assert read(chosen, rejected) == reason


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (
            {"chosen": "Yes", "rejected": ASK + " No"},
            "'chosen' is no dialogue: expected .* got 'Yes'",
        ),
        ({"chosen": ASK + " Yes", "rejected": ""}, "'rejected' is no dialogue"),
        ({"chosen": ASK + " Yes"}, "no column 'rejected'; found 'chosen'"),
        ({}, "no column 'chosen'; found no column at all"),
        ({"chosen": None, "rejected": ASK + " No"}, "'chosen' is null, expected text"),
        ({"chosen": ASK + " Yes", "rejected": 7}, "'rejected' is 7, expected text"),
        ({"chosen": [], "rejected": []}, "'chosen' is a list, expected text"),
    ],
)
def test_a_malformed_row_is_an_error_with_file_and_line(
    tmp_path: Path, columns: dict[str, object], problem: str
) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"chosen": ASK + " Yes", "rejected": ASK + " No"}
    path.write_text(f"{json.dumps(good)}\n{json.dumps(columns)}\n")
    with pytest.raises(DataError, match=f"^{path} line 2: {problem}") as caught:
        load_preferences(path, format="hh-rlhf")
    assert "\n" not in str(caught.value)


turns = st.lists(
    st.tuples(
        st.sampled_from(["Human", "Assistant"]),
        st.lists(st.sampled_from([" ", "\n", "\n\n", "a", "Human:", "é"]), max_size=5).map("".join),
    ),
    min_size=1,
    max_size=6,
)


@given(turns, turns, st.integers(0, 6))
def test_every_dialogue_is_kept_byte_for_byte_or_dropped_with_a_reason(
    first: list[tuple[str, str]], second: list[tuple[str, str]], shared: int
) -> None:
    def text(parts: list[tuple[str, str]]) -> str:
        return "".join(f"\n\n{name}:{raw}" for name, raw in parts)

    chosen, rejected = text(first), text(first[:shared] + second)
    found = read(chosen, rejected)
    if isinstance(found, PreferencePair):
        assert isinstance(found.prompt, str)
        assert found.prompt.endswith("\n\nAssistant:")
        assert f"{found.prompt}{found.chosen}" == chosen
        assert f"{found.prompt}{found.rejected}" == rejected
    else:
        assert found


def test_every_row_is_counted(tmp_path: Path) -> None:
    rows = [(ASK + " Yes", ASK + " No"), (ASK + " ", ASK + " No"), (ASK + " A", ASK + " A")]
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for chosen, rejected in rows:
            file.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    reading = read_source(HHSource(format="hh-rlhf", path=str(path)))
    assert (reading.rows, len(reading.pairs)) == (3, 1)
    assert reading.dropped == {"empty_answer": 1, "identical_answers": 1}
    assert str(reading.identity).startswith("sha256:")


@pytest.mark.shared_data
def test_the_real_sample(shared_data: Path) -> None:
    path = shared_data / "hh-rlhf-harmless-base-test.jsonl.gz"
    reading = read_source(HHSource(format="hh-rlhf", path=str(path)))
    assert reading.rows == 2312
    assert len(reading.pairs) == 2299
    assert reading.dropped == {
        "empty_answer": 4,
        "prompts_differ": 5,
        "roles_do_not_alternate": 4,
    }
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for pair in reading.pairs:
        assert f"{pair.prompt}{pair.chosen}" == rows[pair.row]["chosen"]
        assert f"{pair.prompt}{pair.rejected}" == rows[pair.row]["rejected"]
        assert str(pair.chosen).startswith(" ")
        assert str(pair.rejected).startswith(" ")
    assert Counter(pair.source for pair in reading.pairs) == {path.name: 2299}
    folder = load_preferences(shared_data, split="test", format="hh-rlhf", limit=20)
    assert folder == reading.pairs[: len(folder)]
