"""The λ explorer's samples: which prompts it shows, and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from dsteer.behaviour.refusal import refusal
from dsteer.behaviour.validity import screen
from dsteer.data.sources import load_preferences
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError
from dsteer.store import Json


def sample_prompts(kind: str, count: int) -> tuple[list[PreferencePair], str]:
    """Prompts of the explorer that are not the test split's, and what they are called.

    Args:
        kind: ``benign`` for the shipped list, or a file of prompts.
        count: at most so many.

    Raises:
        DataError: the file holds no prompts.
    """
    if kind != "benign":
        pairs = load_preferences(kind)[:count]
        if not pairs:
            raise DataError(f"samples {kind!r}: no prompts in it; expected one a line")
        return pairs, Path(kind).name
    text = (files("dsteer.data") / "benign_prompts.txt").read_text(encoding="utf-8")
    prompts = [f"\n\nHuman: {line}\n\nAssistant:" for line in text.splitlines() if line]
    return [PreferencePair(prompt) for prompt in prompts[:count]], "dsteer's benign prompts"


def shown(
    pairs: Sequence[PreferencePair],
    steered: Sequence[Sequence[str]],
    ends: Mapping[str, Sequence[str]],
) -> list[Json]:
    """What the explorer shows of each prompt.

    Args:
        pairs: the prompts.
        steered: ``steered[strength][prompt]``.
        ends: texts of ``base`` and ``tuned``.
    """
    return [
        {
            "prompt": _as_text(pair),
            "reference": None if pair.chosen is None else pair.chosen.strip(),
            **{which: _marked(texts[number]) for which, texts in ends.items()},
            "steered": [_marked(texts[number]) for texts in steered],
        }
        for number, pair in enumerate(pairs)
    ]


def _marked(text: str) -> Json:
    return {
        "text": text.strip(), "refusal": refusal(text) is not None, "degenerate": screen(text)
    }  # fmt: skip


def _as_text(pair: PreferencePair) -> str:
    if isinstance(pair.prompt, str):
        return pair.prompt.strip()
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in pair.prompt)
