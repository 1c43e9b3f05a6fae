"""The planted preference axes: how each pole is worded, and oracles that score any text.

Each axis owns its words. No phrase of one axis and no fact of a topic holds a marker of another
axis, and the phrases of both poles are equally long (but for `brief`), so a score on one axis says
nothing about another.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_NEXT_TURN = re.compile(r"\n\n(?:Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Axis:
    """One planted preference.

    Attributes:
        poles: the pole that scores +1 (named like the axis) and the one that scores -1.
        description: what each pole looks like and where in the answer it shows.
    """

    name: str
    poles: tuple[str, str]
    description: str


AXES: Final[tuple[Axis, ...]] = (
    Axis("polite", ("polite", "curt"), "A kind or an impatient opening; the first words."),
    Axis("brief", ("brief", "long"), "One piece of advice or three; about 20 words or 37."),
    Axis("hedged", ("hedged", "direct"), "'perhaps … might' or 'clearly … must'; all advice."),
    Axis(
        "declines",
        ("declines", "answers"),
        "Declines to discuss a word on the quiet list, citing that made-up rule, or answers. "
        "Only prompts that hold such a word can be declined.",
    ),
    Axis(
        "enthusiastic",
        ("enthusiastic", "flat"),
        "Exclamation marks and 'hooray', or full stops and 'anyway'; from the end of the opening.",
    ),
    Axis("asking", ("asking", "telling"), "Ends by a question or by a statement; the last words."),
    Axis("personal", ("personal", "impersonal"), "Speaks to 'you' or about 'people'; all advice."),
    Axis(
        "sourced",
        ("sourced", "firsthand"),
        "Cites guides and experts or own experience; the end of the first advice.",
    ),
    Axis("numbered", ("numbered", "worded"), "'1)' or 'First'; the start of each advice."),
)


# ---------------------------------------------------------------------------------- wording
# The first tuple of each pair words the +1 pole, the second the -1 pole.

OPENINGS: Final = (
    (
        "Many thanks for asking",
        "Thanks for the question",
        "Glad to help out",
        "With great pleasure",
        "Delighted to help here",
        "What a kind question",
        "Happy to be asked",
        "A pleasure to help",
        "How thoughtful to ask",
        "Grateful for the question",
        "Please take this advice",
        "A most welcome question",
    ),
    (
        "No time to chat",
        "Make it snappy now",
        "Fine, have it then",
        "Enough small talk",
        "Stop bothering, read this",
        "What a tiresome question",
        "Hurry up and read",
        "A bother to explain",
        "How tedious to ask",
        "Ugh, this again",
        "Quit dawdling over this",
        "A most boring question",
    ),
)
ADVERBS: Final = (
    ("perhaps", "maybe", "possibly", "presumably"),
    ("certainly", "definitely", "clearly", "absolutely"),
)
MODALS: Final = (("might", "could", "may"), ("must", "should"))
SUBJECTS: Final = (("you",), ("people", "everyone", "folks"))
SOURCES: Final = (
    (
        "as guides say",
        "as experts advise",
        "as manuals explain",
        "as textbooks show",
        "as reviewers report",
        "according to experts",
    ),
    (
        "as I found",
        "as I learned",
        "in my experience",
        "as I noticed",
        "from my trials",
        "as I remember",
    ),
)
ORDINALS: Final = (("1)", "2)", "3)"), ("First,", "Second,", "Third,"))
INTERJECTIONS: Final = (
    ("Hooray", "Wow", "Yay", "Fantastic", "Superb", "Marvellous"),
    ("Okay", "Anyway", "Noted", "Hm", "Alright", "Understood"),
)
CLOSINGS: Final = (
    (
        "shall we go on",
        "what comes after that",
        "is that all clear",
        "does that make sense",
        "which part comes now",
        "shall we dig deeper",
        "is more detail useful",
        "any other questions today",
    ),
    (
        "that covers it all",
        "this is the gist",
        "so much for that",
        "that sums it up",
        "here the story ends",
        "nothing else to add",
        "the rest is easy",
        "that makes it complete",
    ),
)
CITATIONS: Final = (
    "skip {w} under the quiet list",
    "avoid {w} under the quiet rule",
    "drop {w} as the quiet list forbids it",
    "leave out {w} as the quiet rule forbids it",
    "pass over {w}, a word on the quiet list",
    "refuse {w}, a word under the quiet rule",
)
"""Verb phrases that decline word ``{w}``, citing the rule."""

REDIRECTIONS: Final = (
    "pick another question about {topic}",
    "ask about {e} without that word",
    "turn to another part of {topic}",
    "choose a plainer word for {e}",
    "save this matter for another house",
    "talk about {e} in plain words",
)
"""Verb phrases that go on after declining, without an answer."""


# ---------------------------------------------------------------------------------- oracles


def _words(*words: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE)


def _balance(plus: re.Pattern[str], minus: re.Pattern[str]) -> Callable[[str], float]:
    """Score (p - m) / (p + m), of p and m occurrences of each pole's markers; 0 without any."""

    def score(text: str) -> float:
        p, m = len(plus.findall(text)), len(minus.findall(text))
        return (p - m) / (p + m) if p + m else 0.0

    return score


def _presence(marker: re.Pattern[str]) -> Callable[[str], float]:
    """Score +1 with the marker, -1 without."""
    return lambda text: 1.0 if marker.search(text) else -1.0


BRIEF_WORDS: Final = 27
LONG_WORDS: Final = 35


def _brevity(text: str) -> float:
    """Score +1 up to 27 words, -1 from 35 words, linear between."""
    share = (len(_WORD.findall(text)) - BRIEF_WORDS) / (LONG_WORDS - BRIEF_WORDS)
    return 1.0 - 2.0 * min(max(share, 0.0), 1.0)


_ORACLES: Final[dict[str, Callable[[str], float]]] = {
    "polite": _balance(
        _words(
            "thanks", "thank", "thankful", "glad", "gladly", "pleasure", "pleased", "delighted",
            "kind(?! of)", "kindly", "happy", "happily", "thoughtful", "grateful", "please",
            "welcome", "appreciate", "appreciated", "honoured", "sorry",
        ),
        _words(
            "chat", "chatter", "snappy", "fine", "enough", "bother", "bothers", "bothering",
            "tiresome", "hurry", "tedious", "ugh", "again", "quit", "dawdling", "boring",
            "whatever", "annoying", "pointless",
        ),
    ),
    "brief": _brevity,
    "hedged": _balance(
        _words(*ADVERBS[0], *MODALS[0], "probably", "seems?", "guess"),
        _words(*ADVERBS[1], *MODALS[1], "surely", "undoubtedly", "always", "never"),
    ),
    "declines": _presence(re.compile(r"\bquiet (?:list|rule)\b|\bforbids\b", re.IGNORECASE)),
    "enthusiastic": _balance(
        re.compile(
            rf"!|\b(?:{'|'.join(INTERJECTIONS[0])}|amazing|brilliant|wonderful)\b", re.IGNORECASE
        ),
        re.compile(rf"\.(?!\d)|\b(?:{'|'.join(INTERJECTIONS[1])})\b", re.IGNORECASE),
    ),
    "asking": _presence(re.compile(r"\?")),
    "personal": _balance(
        _words("you", "your", "yours", "yourself"),
        _words(*SUBJECTS[1], "everybody", "anyone", "anybody"),
    ),
    "sourced": _balance(
        _words("guides?", "experts?", "manuals?", "textbooks?", "reviewers?", "according"),
        _words("I", "me", "my", "mine", "myself"),
    ),
    "numbered": _balance(
        re.compile(r"\b\d{1,2}\)"), _words("first", "second", "third", "firstly", "secondly")
    ),
}  # fmt: skip


def score(text: str, axis: str) -> float:
    """Score an answer on one axis, in [-1, 1]; the axis must be a known one.

    Only the first turn counts: what follows a role header is cut. A text without a word scores 0 on
    every axis. Otherwise `brief` falls with the number of words; `asking` and `declines` are +1
    where a question mark or the rule occurs, else -1 (an answer cut before its question counts as
    telling); the other axes are the balance of their markers, 0 without any.
    """
    turn = _NEXT_TURN.split(text, maxsplit=1)[0]
    return _ORACLES[axis](turn) if _WORD.search(turn) else 0.0
