"""The shipped contrast sets: counts, balance, variety; and reading pairs from files."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

import dsteer.data.contrast as module
from dsteer.data.contrast import contrast_sets, load_contrast
from dsteer.data.jsonl import read_objects
from dsteer.errors import DataError

FOLDER = Path(module.__file__).parent / "contrasts"
NAMES = sorted(contrast_sets())


def rows(name: str) -> list[dict[str, Any]]:
    return [row for _, row in read_objects(FOLDER / f"{name}.jsonl")]


def opening(text: str, words: int) -> str:
    return " ".join(re.findall(r"[\w'’]+", text.lower())[:words])


def test_the_sets_are_the_files() -> None:
    assert len(NAMES) == 10
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_set_has_at_least_32_pairs_of_answers_to_one_prompt(name: str) -> None:
    pairs = load_contrast(name)
    assert len(pairs) == len(rows(name)) >= 32
    for pair, row in zip(pairs, rows(name), strict=True):
        assert row.keys() == {"prompt", "positive", "negative"}
        asked = {"role": "user", "content": row["prompt"]}
        assert list(pair.positive) == [asked, {"role": "assistant", "content": row["positive"]}]
        assert list(pair.negative) == [asked, {"role": "assistant", "content": row["negative"]}]


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_clean(name: str) -> None:
    for row in rows(name):
        for text in row.values():
            assert text == text.strip() != ""
            assert text.isprintable()
            assert "  " not in text


@pytest.mark.parametrize("name", NAMES)
def test_answers_follow_no_template(name: str) -> None:
    for side in ("positive", "negative"):
        answers = [row[side] for row in rows(name)]
        ((_, same_four),) = Counter(opening(text, 4) for text in answers).most_common(1)
        ((_, same_two),) = Counter(opening(text, 2) for text in answers).most_common(1)
        assert same_four == 1
        assert same_two <= 4  # "it is", "let me": what English begins with


@pytest.mark.parametrize("name", [name for name in NAMES if name != "brevity"])
def test_length_does_not_give_the_side_away(name: str) -> None:
    lengths = [(len(row["positive"]), len(row["negative"])) for row in rows(name)]
    positive, negative = (mean(side) for side in zip(*lengths, strict=True))
    assert 0.8 < positive / negative < 1.25
    assert 0.2 < mean(a > b for a, b in lengths) < 0.8


def test_brevity_is_about_length() -> None:
    assert all(len(row["positive"]) < len(row["negative"]) / 2 for row in rows("brevity"))


def test_nothing_occurs_twice() -> None:
    texts = Counter(text.lower() for name in NAMES for row in rows(name) for text in row.values())
    assert [text for text, times in texts.items() if times > 1] == []


def test_the_data_card_tells_the_counts() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        found = rows(name)
        (line,) = (row for row in card.splitlines() if row.startswith(f"| `{name}` |"))
        lengths = ", ".join(
            f"{round(mean(len(row[side]) for row in found))}" for side in ("positive", "negative")
        )
        assert line.endswith(f"| {len(found)} | {lengths} |")
        assert line.split("|")[2].strip() in contrast_sets()[name]


# ---------------------------------------------------------------------------------- files


def written(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_file_without_prompts_holds_whole_texts(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "hi"}]
    path = written(
        tmp_path / "p.jsonl",
        {"positive": "yes", "negative": "no"},
        {"positive": turn, "negative": "b"},
    )
    assert [tuple(pair) for pair in load_contrast(path)] == [("yes", "no"), (turn, "b")]


def test_a_prompt_may_be_messages(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = written(tmp_path / "p.jsonl", {"prompt": turns, "positive": "a", "negative": "b"})
    (pair,) = load_contrast(path)
    assert list(pair.positive) == [*turns, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ({"positive": "a"}, "line 1: no column 'negative'"),
        ({"positive": "a", "negative": 3}, "line 1: 'negative' is 3, expected text"),
        ({"positive": "", "negative": "b"}, "line 1: 'positive' is empty"),
        ({"positive": "a", "negative": ["b"]}, "line 1: 'negative' holds 'b', expected a message"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, line: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what):
        load_contrast(written(tmp_path / "p.jsonl", line))


def test_neither_a_set_nor_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"formalty: no file.*did you mean 'formality'"):
        load_contrast("formalty")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="holds no row"):
        load_contrast(tmp_path / "empty.jsonl")
