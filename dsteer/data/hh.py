"""Anthropic hh-rlhf: rows of two transcripts, ``chosen`` and ``rejected``, into pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

from dsteer.data.tables import Row
from dsteer.data.transcript import ASSISTANT, conversation_key, parse_turns
from dsteer.data.types import PreferencePair, Role


def read_hh(rows: Iterable[Row]) -> Iterator[PreferencePair | str]:
    """Cut each row at its last ``"\\n\\nAssistant:"``; yield a pair, or why the row is dropped.

    The prompt ends with that marker and each answer begins with a space, so the prompt ends on a
    token boundary; prompt + chosen and prompt + rejected are the row's two texts, byte for byte.

    The first of these reasons that holds drops a row:

    - ``no_opening_human_turn``: a transcript doesn't begin with ``"\\n\\nHuman:"``.
    - ``last_turn_not_assistant``: a transcript ends with a human turn, so there is no answer.
    - ``prompts_differ``: the transcripts differ before their last turn, so that the two answers
      are not answers to one prompt.
    - ``roles_do_not_alternate``: two turns of one role follow each other (a lost or broken turn),
      which chat templates refuse.
    - ``empty_answer``: an answer is white space.
    - ``no_space_before_answer``: an answer follows the colon directly, which would put the end of
      the prompt inside a token.
    - ``identical_answers``: nothing is preferred.

    Raises:
        DataError: a column is missing or no text, or a text is no dialogue (it has neither marker).
    """
    for row in rows:
        yield _parse(row)


def _parse(row: Row) -> PreferencePair | str:
    chosen, rejected = row.text("chosen"), row.text("rejected")
    prompt = chosen[: chosen.rfind(ASSISTANT) + len(ASSISTANT)]
    roles = _roles(row, "chosen", chosen)
    reason = _why_not(chosen, rejected, prompt, roles, _roles(row, "rejected", rejected))
    if reason is not None:
        return reason
    pair = PreferencePair(
        prompt=prompt,
        chosen=chosen.removeprefix(prompt),
        rejected=rejected.removeprefix(prompt),
        conversation=conversation_key(prompt),
        source=row.source,
        row=row.index,
    )
    if (prompt + str(pair.chosen), prompt + str(pair.rejected)) != (chosen, rejected):
        raise AssertionError(f"{row.where}: prompt and answers don't give the row back")
    return pair


def _roles(row: Row, name: str, text: str) -> list[Role | None]:
    """The roles of a transcript's turns; None stands for text before the first marker."""
    preamble, turns = parse_turns(text)
    if not turns:
        raise row.error(
            f"{name!r} is no dialogue: expected '\\n\\nHuman: …\\n\\nAssistant: …', "
            f"got {text[:40]!r}"
        )
    roles: list[Role | None] = [role for role, _ in turns]
    return [None, *roles] if preamble else roles


def _why_not(
    chosen: str, rejected: str, prompt: str, roles: list[Role | None], other: list[Role | None]
) -> str | None:
    if not roles[0] == other[0] == "user":
        return "no_opening_human_turn"
    if not roles[-1] == other[-1] == "assistant":
        return "last_turn_not_assistant"
    if roles != other or not rejected.startswith(prompt):
        return "prompts_differ"
    if any(a == b for a, b in pairwise(roles)):
        return "roles_do_not_alternate"
    answers = chosen[len(prompt) :], rejected[len(prompt) :]
    if not all(answer.strip() for answer in answers):
        return "empty_answer"
    if not all(answer.startswith(" ") for answer in answers):
        return "no_space_before_answer"
    if chosen == rejected:
        return "identical_answers"
    return None
