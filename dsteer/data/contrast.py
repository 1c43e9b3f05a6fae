"""Contrast pairs: two texts that differ in one property; the sets that are shipped, and files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from dsteer.data.preference import read_messages
from dsteer.data.tables import Row, read_rows
from dsteer.data.types import Message, Prompt, Role
from dsteer.errors import DataError, did_you_mean

SETS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "formality": "formal, or casual",
        "brevity": "a few words, or a long sentence",
        "hedging": "uncertain, or certain beyond what is known",
        "warmth": "caring, or coldly factual",
        "humour": "joking, or plain",
        "technical_depth": "in the terms of an expert, or of everyday life",
        "assertiveness": "standing up for oneself, or giving way",
        "creativity": "with an image or an unusual idea, or conventional",
        "tool_restraint": "answering at once, or reaching for a tool that nobody needs",
        "declining_politely": "kindly saying no, or agreeing",
    }
)
"""Each shipped set: what its positive answers are like, or its negative ones."""


@dataclass(frozen=True)
class ContrastPair:
    """Two texts, the first with a property and the second without; unpacks as a tuple of both.

    Attributes:
        positive: a text, or a list of messages, that shows the property.
        negative: the same without it.
        metadata: what else is known of the pair.

    Raises:
        DataError: one of both is empty.
    """

    positive: Prompt
    negative: Prompt
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, text in (("positive", self.positive), ("negative", self.negative)):
            if not text:
                raise DataError(
                    f"a contrast pair with {name} {text!r}; expected a text, or a list of messages"
                )

    def __iter__(self) -> Iterator[Prompt]:
        return iter((self.positive, self.negative))


def contrast_sets() -> dict[str, str]:
    """The shipped sets, by name: what their positive answers are like, or their negative ones.

    The data card is ``dsteer/data/contrasts/README.md``.
    """
    return dict(SETS)


def load_contrast(name_or_path: str | Path) -> list[ContrastPair]:
    """Read contrast pairs: a shipped set, or a file with ``positive`` and ``negative``.

    Files are JSONL, CSV or Parquet. Both texts are strings or lists of messages. With a column
    ``prompt`` (the same) they are two answers to it, and become dialogues that end with them; so in
    the shipped sets.

    Raises:
        DataError: no such set or file, no row in it, or one that holds no pair.
    """
    name = str(name_or_path)
    if name in SETS:
        path = Path(__file__).parent / "contrasts" / f"{name}.jsonl"
    else:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise DataError(
                f"{name}: no file, and no shipped contrast set{did_you_mean(name, SETS)}; "
                f"expected such as a JSONL file, or one of {', '.join(SETS)}"
            )
    return [_pair(row) for row in read_rows(str(path))]


def _pair(row: Row) -> ContrastPair:
    positive, negative = _text(row, "positive"), _text(row, "negative")
    if row.columns.get("prompt") is not None:
        asked = _turns(_text(row, "prompt"), "user")
        positive, negative = (
            [*asked, *_turns(answer, "assistant")] for answer in (positive, negative)
        )
    return ContrastPair(positive, negative)


def _text(row: Row, name: str) -> Prompt:
    """A column that must be a text or a list of messages, and not empty."""
    value = row.columns.get(name)
    text = read_messages(row, name) if isinstance(value, list) else row.text(name)
    if not text:
        raise row.error(f"{name!r} is empty, expected a text or a list of messages")
    return text


def _turns(text: Prompt, role: Role) -> list[Message]:
    return [Message(role=role, content=text)] if isinstance(text, str) else list(text)
