"""hh-style transcripts: ``"\\n\\nHuman: …\\n\\nAssistant: …"``.

A turn may hold blank lines, lists and even "Human:" at the start of a line, so only the two literal
markers split a transcript.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from dsteer.data.types import Message, Prompt, Role
from dsteer.errors import DataError

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"

_MARKER = re.compile("\n\n(Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_MARKERS: dict[Role, str] = {"user": HUMAN, "assistant": ASSISTANT}


def parse_turns(text: str) -> tuple[str, list[tuple[Role, str]]]:
    """Cut a transcript at its markers, keeping every byte.

    Returns:
        The text before the first marker, and of each turn its role and its raw text: what stands
        between the colon and the next marker.
    """
    preamble, *rest = _MARKER.split(text)
    turns = [(_ROLES[role], raw) for role, raw in zip(rest[::2], rest[1::2], strict=True)]
    return preamble, turns


def parse_transcript(text: str) -> list[Message]:
    """Turn a transcript into messages; one space after the colon belongs to the marker.

    A text that ends with ``"\\n\\nAssistant:"`` gives a last assistant message without content: the
    answer that is still to come.

    Raises:
        DataError: the text does not begin with one of the two markers.
    """
    preamble, turns = parse_turns(text)
    if preamble or not turns:
        raise DataError(
            f"{text[:40]!r} is no transcript: expected it to begin with {HUMAN + ' '!r} "
            f"or {ASSISTANT + ' '!r}"
        )
    return [Message(role=role, content=raw.removeprefix(" ")) for role, raw in turns]


def render_transcript(messages: Sequence[Message]) -> str:
    """Write messages as a transcript; the inverse of :func:`parse_transcript`, byte for byte.

    Exact for all messages; for texts, where each turn begins with one space. A last assistant
    message without content becomes ``"\\n\\nAssistant:"``, from which a model answers.

    Raises:
        DataError: a role that a transcript lacks (system), or a marker inside a message.
    """
    parts = []
    for number, message in enumerate(messages, 1):
        role, content = message["role"], message["content"]
        if role not in _MARKERS:
            raise DataError(
                f"message {number} has the role {role!r}: a transcript has only user and assistant"
            )
        if holds_marker(content):
            raise DataError(
                f"message {number} holds {HUMAN!r} or {ASSISTANT!r}: it would become two turns"
            )
        is_cue = role == "assistant" and not content and number == len(messages)
        parts.append(_MARKERS[role] + ("" if is_cue else " " + content))
    return "".join(parts)


def holds_marker(text: str) -> bool:
    """Whether a text would be cut inside a transcript."""
    return _MARKER.search(text) is not None


def conversation_key(prompt: Prompt) -> str:
    """Name the conversation that a prompt belongs to: a hash of its first human turn.

    Case and white space don't count, so a dialogue and its continuations, in whatever format, have
    one key. A text without markers counts as a human turn.
    """
    if isinstance(prompt, str):
        turns = parse_turns(prompt)[1]
        first = next((raw for role, raw in turns if role == "user"), prompt)
    else:
        contents = [message["content"] for message in prompt]
        human = [message["content"] for message in prompt if message["role"] == "user"]
        first = human[0] if human else "\n".join(contents)
    return hashlib.sha256(" ".join(first.casefold().split()).encode()).hexdigest()[:16]
