"""The screen for collapsed texts: empty, looping, or speaking for the other side of the dialogue.

A mean over the texts that are left flatters a collapsed model: report the counts beside it.

On the 4598 answers of hh-rlhf harmless-base's test file it names 3 loops and 33 role headers, all
of them such by reading, and 5 empty texts, which hold no letter or digit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final, Literal

from dsteer.behaviour.diversity import repetition
from dsteer.behaviour.words import HEADER, WORD, words

Collapse = Literal["empty", "loop", "role_header"]

LONGEST_PERIOD: Final = 20
"""Words (or characters) of the longest phrase that a loop repeats: about a sentence."""

LOOP_REPEATS: Final = 4
"""Times that the phrase stands at the end. Three occur in songs and emphasis."""

LOOP_SHARE: Final = 0.25
"""Least share of the text that the loop fills, so that a long answer with a flourish stays."""

LOOP_WORDS: Final = 8
"""Fewest words of a loop of words: 'no, no, no, no' stays."""

LOOP_CHARACTERS: Final = 20
"""Fewest characters of a loop of characters: 'hahahaha' and 'Hmmmm' stay."""

REPETITION: Final = 0.5
"""Share of repeated 4-word phrases above which a text loops wherever its loop lies."""

REPETITION_WORDS: Final = 20
"""Fewest words of a text for that share to be asked for."""


def screen(text: str, stop: Sequence[str] = ()) -> Collapse | None:
    """What is wrong with a generated text, or None; the first of these that holds.

    - ``empty``: no letter or digit.
    - ``loop``: it ends in one phrase of at most `LONGEST_PERIOD` words said `LOOP_REPEATS` times or
      more, which makes `LOOP_WORDS` words and `LOOP_SHARE` of the text or more (the last word may
      be cut off); or the same of characters, `LOOP_CHARACTERS` of them or more; or more than
      `REPETITION` of its 4-word phrases occurred earlier in the text.
    - ``role_header``: a line begins with a role header of a dialogue format, such as ``Human:`` or
      ``<|im_start|>``.

    Args:
        text: what the model wrote.
        stop: strings that end an answer; the text is cut at the first of them.
    """
    for end in stop:
        text = text.split(end, 1)[0]
    if not WORD.search(text):
        return "empty"
    if _loops(text):
        return "loop"
    return "role_header" if HEADER.search(text) else None


def degenerate(text: str, stop: Sequence[str] = ()) -> bool:
    """Whether the screen finds anything wrong."""
    return screen(text, stop) is not None


def counts(texts: Sequence[str], stop: Sequence[str] = ()) -> dict[str, int]:
    """How many texts are ``valid``, ``empty``, a ``loop`` or have a ``role_header``."""
    found = Counter(screen(text, stop) or "valid" for text in texts)
    return {kind: found[kind] for kind in ("valid", "empty", "loop", "role_header")}


def _loops(text: str) -> bool:
    units = words(text)
    if _tail_loops(units, LOOP_WORDS) or _tail_loops(units[:-1], LOOP_WORDS):
        return True
    if _tail_loops("".join(text.split()), LOOP_CHARACTERS):
        return True
    share = repetition([text], 4)[0] if len(units) >= REPETITION_WORDS else None
    return share is not None and share > REPETITION


def _tail_loops(units: Sequence[str], least: int) -> bool:
    """Whether the units end in a phrase said often enough, over at least so many units."""
    least = max(least, round(LOOP_SHARE * len(units)))
    for period in range(1, LONGEST_PERIOD + 1):
        tail = period
        while tail < len(units) and units[-tail - 1] == units[-tail - 1 + period]:
            tail += 1
        if tail >= max(least, LOOP_REPEATS * period):
            return True
    return False
