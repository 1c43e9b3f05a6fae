"""The shape of preference data, whatever file it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: Role
    content: str


Prompt = str | Sequence[Message]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt with two answers, the first preferred.

    Attributes:
        prompt: text that ends where the answer begins, or a list of messages.
        chosen: the preferred answer, so that ``prompt + chosen`` is the whole text (text prompts).
            None for a plain prompt without answers.
        rejected: the other answer, likewise.
        conversation: pairs with one key stay in one split.
        source: the file or hub id that it came from.
        row: 0-based row in that source.
        tags: what the source knows of the pair (group, axis values …).
    """

    prompt: Prompt
    chosen: str | None = None
    rejected: str | None = None
    conversation: str = ""
    source: str = ""
    row: int = -1
    tags: dict[str, str] = field(default_factory=dict)
