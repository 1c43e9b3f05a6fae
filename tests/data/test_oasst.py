from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dsteer.config import OasstSource
from dsteer.data import load_preferences, read_source
from dsteer.data.oasst import Pairing, read_oasst
from dsteer.data.tables import Row
from dsteer.data.transcript import parse_transcript
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError

Node = dict[str, Any]


def message(name: str, role: str, /, *replies: Node, **fields: Any) -> Node:
    own = {"message_id": name, "text": f"I am {name}.", "role": role, "lang": "en"}
    return {**own, "replies": list(replies), **fields}


def asks(name: str, /, *replies: Node, **fields: Any) -> Node:
    return message(name, "prompter", *replies, **fields)


def says(name: str, place: int | None, /, *replies: Node, **fields: Any) -> Node:
    return message(name, "assistant", *replies, **{"rank": place, **fields})


def read(
    *roots: Node, pairing: Pairing = "best_worst", lang: str | None = "en"
) -> tuple[list[PreferencePair], Counter[str], Counter[str]]:
    rows = [
        Row({"message_tree_id": root["message_id"], "prompt": root}, "t", i, f"t line {i + 1}")
        for i, root in enumerate(roots)
    ]
    return run(rows, pairing, lang)


def run(
    rows: list[Row], pairing: Pairing = "best_worst", lang: str | None = "en"
) -> tuple[list[PreferencePair], Counter[str], Counter[str]]:
    skipped: Counter[str] = Counter()
    found = list(read_oasst(rows, lang=lang, pairing=pairing, skipped=skipped))
    pairs = [item for item in found if not isinstance(item, str)]
    return pairs, Counter(item for item in found if isinstance(item, str)), skipped


def flat(*roots: Node) -> list[Row]:
    """The hub's form of the same trees: one message a row, parents first."""
    rows: list[Row] = []
    todo: list[tuple[Node, str | None]] = [(root, None) for root in reversed(roots)]
    while todo:
        node, parent = todo.pop()
        columns = {**node, "parent_id": parent}
        todo.extend((reply, node["message_id"]) for reply in reversed(columns.pop("replies")))
        rows.append(Row(columns, "t", len(rows), f"t row {len(rows) + 1}"))
    return rows


TREE = asks(
    "q",
    says("middle", 1),
    says("worst", 2),
    says("best", 0, asks("next", says("worse", 1), says("better", 0))),
    says("unranked", None),
)


def test_best_against_worst_in_hh_style() -> None:
    pairs, dropped, skipped = read(TREE)
    first, second = pairs
    assert first.prompt == "\n\nHuman: I am q.\n\nAssistant:"
    assert (first.chosen, first.rejected) == (" I am best.", " I am worst.")
    assert second.prompt == (
        "\n\nHuman: I am q.\n\nAssistant: I am best.\n\nHuman: I am next.\n\nAssistant:"
    )
    assert (second.chosen, second.rejected) == (" I am better.", " I am worse.")
    assert first.conversation == second.conversation
    assert first.tags == {"tree": "q"}
    assert not dropped
    assert not skipped


@pytest.mark.parametrize(
    ("pairing", "expected"),
    [
        ("best_worst", ["best>worst"]),
        ("adjacent", ["best>middle", "middle>worst"]),
        ("all", ["best>middle", "best>worst", "middle>worst"]),
    ],
)
def test_pairings(pairing: Pairing, expected: list[str]) -> None:
    tree = asks("q", says("middle", 1), says("worst", 2), says("best", 0))
    pairs, _, _ = read(tree, pairing=pairing)

    def name(text: str | None) -> str:
        return str(text).removeprefix(" I am ").removesuffix(".")

    assert [f"{name(pair.chosen)}>{name(pair.rejected)}" for pair in pairs] == expected


def test_prompts_without_a_preference_are_counted() -> None:
    _, dropped, _ = read(
        asks("one", says("a", 0)),
        asks("unranked", says("b", None), says("c", None)),
        asks("tied", says("d", 1), says("e", 1)),
        asks("same", says("f", 0, text="Yes."), says("g", 1, text="Yes.")),
        asks("none"),
    )
    assert dropped == {"fewer_than_two_ranked_answers": 3, "tied_rank": 1, "identical_answers": 1}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"deleted": True}, "deleted"),
        ({"review_result": False}, "failed_review"),
        ({"lang": "de"}, "other_language"),
        ({"text": " \n"}, "empty_text"),
        ({"text": "a\n\nHuman: b"}, "role_marker_in_text"),
        ({"role": "prompter"}, "roles_do_not_alternate"),
    ],
)
def test_a_message_is_left_out_with_all_below_it(fields: dict[str, Any], reason: str) -> None:
    below = asks("next", says("x", 0), says("y", 1))
    for tree in (
        asks("q", says("bad", 0, below, **fields), says("good", 1), says("fair", 2)),
        asks("q", says("good", 1), says("fair", 2), says("bad", 0, below, **fields)),
    ):
        for pairs, dropped, skipped in (read(tree), run(flat(tree))):
            assert [pair.chosen for pair in pairs] == [" I am good."]
            assert not dropped
            assert skipped == {reason: 1, "below_a_skipped_message": 3}


def test_a_prompt_in_another_language_ends_its_branch() -> None:
    tree = asks("q", says("a", 0, asks("r", says("b", 0), lang="fr")), says("c", 1))
    pairs, _, skipped = read(tree)
    assert len(pairs) == 1
    assert skipped == {"other_language": 1, "below_a_skipped_message": 1}
    assert not read(tree, lang=None)[2]


def test_the_flat_form_gives_the_same_pairs() -> None:
    nested, rows = read(TREE, pairing="all")[0], flat(TREE)
    assert run(rows, "all")[0] == nested
    assert run(rows[::-1], "best_worst")[0][0].chosen == " I am best."  # children before parents


def test_a_message_without_its_parent_is_counted() -> None:
    rows = [row for row in flat(TREE) if row.columns["message_id"] != "best"]
    pairs, _, skipped = run(rows)
    assert [pair.chosen for pair in pairs] == [" I am middle."]
    assert skipped == {"parent_missing": 1, "below_a_skipped_message": 2}


def test_a_very_deep_tree_is_read() -> None:
    tree = asks("q", says("a", 0), says("b", 1))
    for depth in range(1100):
        tree = asks(f"q{depth}", says(f"a{depth}", 0, tree))
    pairs, dropped, _ = read(tree)
    assert len(pairs) == 1
    assert dropped == {"fewer_than_two_ranked_answers": 1100}


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"prompt": "Hi"}, "no tree: expected an object 'prompt'"),
        ({"text": "Hi"}, "no tree"),
        ({"prompt": {"message_id": "q", "role": "prompter"}}, "message 'q': 'text' is not text"),
        ({"prompt": asks("q", role=1)}, "message 'q': 'role' is not text"),
        ({"prompt": asks("q", replies=["r"])}, "message 'q': 'replies' is not a list of messages"),
        ({"prompt": asks("q", says("a", 0), says("b", 1, rank="1"))}, "message 'b': 'rank' is '1'"),
        ({"message_id": 7, "parent_id": None}, "'message_id' is 7, expected text"),
    ],
)
def test_malformed_trees(tmp_path: Path, columns: Node, problem: str) -> None:
    path = tmp_path / "trees.jsonl"
    path.write_text(f"{json.dumps({'prompt': TREE})}\n{json.dumps(columns)}\n")
    with pytest.raises(DataError, match=f"^{path} line 2: {problem}"):
        load_preferences(path, format="oasst")


def test_one_message_in_two_rows_is_refused() -> None:
    with pytest.raises(DataError, match="t row 1: message 'q' stands in two rows"):
        run([*flat(TREE), flat(TREE)[0]])


@pytest.mark.shared_data
def test_the_real_sample(shared_data: Path) -> None:
    path = str(shared_data / "oasst-en-100-trees.jsonl.gz")
    expected = {"best_worst": 212, "adjacent": 428, "all": 751}
    for pairing, kept in expected.items():
        reading = read_source(OasstSource(format="oasst", path=path, pairing=pairing))  # type: ignore[arg-type]
        assert len(reading.pairs) == kept
        assert reading.dropped == {"fewer_than_two_ranked_answers": 267}
        assert reading.rows == kept + 267
        assert reading.messages_skipped == {"role_marker_in_text": 2, "below_a_skipped_message": 1}
        for pair in reading.pairs:
            roles = [turn["role"] for turn in parse_transcript(f"{pair.prompt}{pair.chosen}")]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
