"""What the text metrics take for a word and for the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_UNSPACED: Final = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9d"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
_LETTER: Final = rf"(?:[^\W_{_UNSPACED}][\u0300-\u036f]*)"
WORD: Final = re.compile(rf"(?=\w)[{_UNSPACED}]|{_LETTER}+(?:['’\-]{_LETTER}+)*")
"""A run of letters and digits, hyphens and apostrophes inside; one character where a script writes
no spaces. Scripts with vowel signs (such as Devanagari) are cut at these."""

HEADER: Final = re.compile(
    r"^[ \t]*(?:(?:Human|Assistant|User):|<\|\w+\|>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>"
    r"|### ?(?:Human|User|Assistant|Instruction|Response|Input)\b)",
    re.MULTILINE,
)
"""A role header of a dialogue format at the start of a line."""


def words(text: str) -> list[str]:
    """The words of a text in order, in lower case; see `WORD`."""
    return WORD.findall(text.lower())


def word_counts(texts: Sequence[str]) -> list[int]:
    """Length of each text in words. In tokens, a length is that of the generated ids."""
    return [len(words(text)) for text in texts]


def first_turn(text: str) -> str:
    """The text before the first role header after its first word: the model's own turn.

    A header at the very start is cut off; the turn then goes on to the next header.
    """
    for turn in HEADER.split(text):
        if WORD.search(turn):
            return turn
    return ""
