"""TRL's preference form: ``prompt``, ``chosen``, ``rejected``, as text or as messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, get_args

from dsteer.data.tables import Row
from dsteer.data.transcript import conversation_key
from dsteer.data.types import Message, PreferencePair, Prompt, Role


def read_preferences(rows: Iterable[Row]) -> Iterator[PreferencePair | str]:
    """Yield a pair of each row, or why it is dropped.

    Three forms are read:

    - text: all three columns are text, and prompt + chosen is the whole text;
    - messages: ``prompt`` a list, ``chosen`` and ``rejected`` each a list of one answer;
    - implicit prompt: ``chosen`` and ``rejected`` are whole conversations that share all but their
      last message; a ``prompt`` text beside them must be one of their messages.

    Of a pair with messages the prompt is the message list and an answer is its content.

    The first of these reasons that holds drops a row:

    - ``unsupported_role``: a message is of a role other than system, user and assistant (tools).
    - ``answer_not_one_message``: an answer is none or several messages.
    - ``last_turn_not_assistant``: an answer is not the assistant's.
    - ``prompts_differ``: the two conversations differ before their last message.
    - ``last_prompt_turn_not_user``: the prompt's last message is not the user's.
    - ``empty_prompt``, ``empty_answer``: white space or nothing.
    - ``identical_answers``: nothing is preferred.

    Raises:
        DataError: a column is missing or of a wrong type, the row is wholly empty, or a text pair
            has no prompt (guessing one from a common prefix would cut inside words).
    """
    for row in rows:
        yield _parse(row)


def _parse(row: Row) -> PreferencePair | str:
    if isinstance(row.columns.get("chosen"), list):
        parts = _from_messages(row)
        if isinstance(parts, str):
            return parts
        prompt, chosen, rejected = parts
    else:
        prompt, chosen, rejected = _from_text(row)
    if isinstance(prompt, str) and not (prompt + chosen + rejected).strip():
        raise row.error("empty; expected a prompt and two answers")
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if not asked.strip():
        return "empty_prompt"
    if not (chosen.strip() and rejected.strip()):
        return "empty_answer"
    if chosen == rejected:
        return "identical_answers"
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        conversation=conversation_key(prompt),
        source=row.source,
        row=row.index,
    )


def _from_text(row: Row) -> tuple[str, str, str]:
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if "prompt" not in row.columns:
        raise row.error(
            "no column 'prompt': give one; for transcripts with Human and Assistant markers use "
            "the format hh-rlhf"
        )
    return row.text("prompt"), chosen, rejected


def _from_messages(row: Row) -> tuple[Prompt, str, str] | str:
    chosen, rejected = read_messages(row, "chosen"), read_messages(row, "rejected")
    given = row.columns.get("prompt")
    prompt = read_messages(row, "prompt") if isinstance(given, list) else None
    everything = [*chosen, *rejected, *(prompt or ())]
    if any(message["role"] not in get_args(Role) for message in everything):
        return "unsupported_role"
    if prompt is not None:
        if len(chosen) != 1 or len(rejected) != 1:
            return "answer_not_one_message"
    elif len(chosen) == len(rejected) == 1:
        raise row.error("no prompt: give it as a list of messages, as the answers are")
    elif not (chosen and rejected):
        return "answer_not_one_message"
    if not chosen[-1]["role"] == rejected[-1]["role"] == "assistant":
        return "last_turn_not_assistant"
    if prompt is None:
        prompt = chosen[:-1]
        if prompt != rejected[:-1]:
            return "prompts_differ"
    if not prompt or prompt[-1]["role"] != "user":
        return "last_prompt_turn_not_user"
    if isinstance(given, str) and not any(given == message["content"] for message in prompt):
        raise row.error("'prompt' is none of the messages of 'chosen'")
    return prompt, chosen[-1]["content"], rejected[-1]["content"]


def read_messages(row: Row, name: str) -> list[Message]:
    """A column that must be a list of messages.

    Raises:
        DataError: it is not.
    """
    value = row.columns.get(name)
    if not isinstance(value, list):
        raise row.error(f"{name!r} is not a list of messages like the other columns")
    return [_message(row, name, item) for item in value]


def _message(row: Row, name: str, item: Any) -> Message:
    if not isinstance(item, dict):
        raise row.error(f"{name!r} holds {item!r:.40}, expected a message with role and content")
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise row.error(f"{name!r}: a message's role and content must be text")
    return Message(role=role, content=content)  # type: ignore[typeddict-item]  # checked by callers
