"""Scores remembered by text."""

from __future__ import annotations

import pytest

from dsteer.behaviour.caching import by_text


def test_each_distinct_text_is_scored_once_and_in_order() -> None:
    seen: list[list[str]] = []

    def lengths(texts: list[str]) -> list[int]:
        seen.append(texts)
        return [len(text) for text in texts]

    cached = by_text(lengths)
    assert cached(["bb", "a", "bb", ""]) == [2, 1, 2, 0]
    assert cached(["a", "ccc", "bb"]) == [1, 3, 2]
    assert cached(["a", "a"]) == [1, 1]
    assert cached([]) == []
    assert seen == [["bb", "a", ""], ["ccc"]]


def test_a_missing_score_is_remembered_too() -> None:
    calls = 0

    def abstain(texts: list[str]) -> list[float | None]:
        nonlocal calls
        calls += 1
        return [None for _ in texts]

    cached = by_text(abstain)
    assert cached(["a"]) == cached(["a"]) == [None]
    assert calls == 1


def test_a_failure_is_not_remembered() -> None:
    failing = True

    def flaky(texts: list[str]) -> list[int]:
        if failing:
            raise OSError("no answer")
        return [1 for _ in texts]

    cached = by_text(flaky)
    with pytest.raises(OSError, match="no answer"):
        cached(["a"])
    failing = False
    assert cached(["a"]) == [1]


def test_a_metric_that_loses_a_text_is_caught() -> None:
    with pytest.raises(ValueError, match="shorter"):
        by_text(lambda texts: texts[1:])(["a", "b"])
