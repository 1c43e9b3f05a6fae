"""Scores remembered by text: a slow metric reads each distinct text once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def by_text(score: Callable[[list[str]], list[T]]) -> Callable[[Sequence[str]], list[T]]:
    """Wrap a metric of a batch of texts, so that it sees each distinct text once.

    The scores live as long as the returned function, and hold for all of its calls. When ``score``
    raises, nothing of that call is remembered.

    Args:
        score: one value a text, in order; a text's value must not depend on the other texts.

    Returns:
        The same metric for any texts. ``score`` is called at most once a call, with the new texts
        in order of appearance, and not at all when there is none.

    Raises:
        ValueError: ``score`` gave more or fewer values than texts.
    """
    known: dict[str, T] = {}

    def scores(texts: Sequence[str]) -> list[T]:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(dict(zip(new, score(new), strict=True)))
        return [known[text] for text in texts]

    return scores
