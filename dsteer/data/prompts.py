"""Plain lists of prompts, without answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import get_args

from dsteer.data.preference import read_messages
from dsteer.data.tables import Row
from dsteer.data.transcript import conversation_key
from dsteer.data.types import PreferencePair, Prompt, Role


def read_prompts(rows: Iterable[Row]) -> Iterator[PreferencePair | str]:
    """Yield a pair without answers of each row, or why it is dropped.

    A row is a line of a ``.txt`` file, or has a column ``prompt`` (text or messages); its other
    columns, where they are text, numbers or truth values, become the pair's tags.

    Reasons: ``blank_line`` (of a ``.txt`` file), ``unsupported_role`` (other than system, user and
    assistant).

    Raises:
        DataError: the column is missing, of a wrong type or empty.
    """
    for row in rows:
        yield _parse(row)


def _parse(row: Row) -> PreferencePair | str:
    prompt: Prompt
    if isinstance(row.columns.get("prompt"), list):
        prompt = read_messages(row, "prompt")
        if any(message["role"] not in get_args(Role) for message in prompt):
            return "unsupported_role"
        empty = not prompt or not prompt[-1]["content"].strip()
    else:
        prompt = row.text("prompt")
        empty = not prompt.strip()
    if empty:
        if row.source.endswith((".txt", ".txt.gz")):
            return "blank_line"
        raise row.error("'prompt' is empty")
    tags = {
        name: str(value)
        for name, value in row.columns.items()
        if name != "prompt" and isinstance(value, str | int | float) and value != ""
    }
    return PreferencePair(
        prompt=prompt,
        conversation=conversation_key(prompt),
        source=row.source,
        row=row.index,
        tags=tags,
    )
