"""Distinct n-grams and repetition by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsteer.behaviour.diversity import corpus_distinct_n, distinct_n, repetition
from dsteer.errors import MeasurementError


def test_distinct_n_by_hand() -> None:
    # the cat, cat the, the cat: 2 of 3
    assert distinct_n(["The cat, the cat."]) == [pytest.approx(2 / 3)]
    assert distinct_n(["a b c", "a", "", "…"]) == [1.0, None, None, None]
    assert distinct_n(["a b a"], n=1) == [pytest.approx(2 / 3)]
    assert distinct_n([[5, 6, 5, 6]]) == [pytest.approx(2 / 3)]


def test_repetition_by_hand() -> None:
    # abcd bcda cdab dabc abcd: one of 5 came before
    assert repetition(["a b c d a b c d"]) == [pytest.approx(1 / 5)]
    assert repetition(["a b c", "a b c d", "a a a a a"]) == [None, 0.0, 0.5]
    assert repetition([[1] * 103]) == [pytest.approx(0.99)]


def test_characters_are_words_where_no_spaces_are_written() -> None:
    assert distinct_n(["哈哈哈哈"]) == [pytest.approx(1 / 3)]
    assert repetition(["我喜欢茶我喜欢茶"]) == [pytest.approx(1 / 5)]


def test_the_corpus_counts_n_grams_across_texts_but_none_spans_two() -> None:
    assert corpus_distinct_n(["a b", "a b", "b c"]) == pytest.approx(2 / 3)
    assert corpus_distinct_n(["a", "b"]) is None
    assert corpus_distinct_n([]) is None
    assert corpus_distinct_n(["a b c d"]) == distinct_n(["a b c d"])[0]


def test_a_very_long_text() -> None:
    assert repetition(["yes no " * 50_000])[0] == pytest.approx(1 - 2 / 99_997)


@pytest.mark.parametrize("metric", [distinct_n, corpus_distinct_n, repetition])
def test_no_n_grams_of_nothing(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MeasurementError, match="n-grams of 0 words"):
        metric(["a"], n=0)


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=4), st.integers(1, 4))
def test_ranges(texts: list[list[int]], n: int) -> None:
    for text, share in zip(texts, distinct_n(texts, n), strict=True):
        assert (share is None) == (len(text) < n)
        assert share is None or 0 < share <= 1
    whole = corpus_distinct_n(texts, n)
    assert (whole is None) == all(len(text) < n for text in texts)
    assert whole is None or 0 < whole <= 1
