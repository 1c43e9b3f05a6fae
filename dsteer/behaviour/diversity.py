"""Diversity of texts: distinct n-grams and repetition."""

from __future__ import annotations

from collections.abc import Sequence

from dsteer.behaviour.words import words
from dsteer.errors import MeasurementError

Text = str | Sequence[int]
"""A text, whose units are its words in lower case, or a text's token ids."""


def distinct_n(texts: Sequence[Text], n: int = 2) -> list[float | None]:
    """Distinct n-grams over all n-grams of each text, in (0, 1].

    It falls with length: compare texts of like length.

    Returns:
        One value a text; None for a text of fewer than n words.

    Raises:
        MeasurementError: n < 1.
    """
    return [_distinct(grams) for grams in _ngrams(texts, n)]


def corpus_distinct_n(texts: Sequence[Text], n: int = 2) -> float | None:
    """Distinct n-grams of all texts together over all of their n-grams, in (0, 1].

    No n-gram spans two texts. It falls with the number of texts: compare equally large sets.

    Returns:
        None where no text has n words.

    Raises:
        MeasurementError: n < 1.
    """
    return _distinct([gram for grams in _ngrams(texts, n) for gram in grams])


def repetition(texts: Sequence[Text], n: int = 4) -> list[float | None]:
    """Share of each text's n-grams that occurred earlier in the same text: 1 - distinct-n.

    Returns:
        One value in [0, 1) a text; None for a text of fewer than n words.

    Raises:
        MeasurementError: n < 1.
    """
    return [None if share is None else 1.0 - share for share in distinct_n(texts, n)]


def _ngrams(texts: Sequence[Text], n: int) -> list[list[tuple[str | int, ...]]]:
    if n < 1:
        raise MeasurementError(f"n-grams of {n} words: ask for 1 or more")
    units: list[Sequence[str | int]] = [
        words(text) if isinstance(text, str) else text for text in texts
    ]
    return [
        [tuple(text[start : start + n]) for start in range(len(text) - n + 1)] for text in units
    ]


def _distinct(grams: list[tuple[str | int, ...]]) -> float | None:
    return len(set(grams)) / len(grams) if grams else None
