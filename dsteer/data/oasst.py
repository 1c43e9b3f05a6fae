"""Open-Assistant conversation trees into pairs, by the rank of sibling answers (0 is best)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations, pairwise
from typing import Any, Literal

from dsteer.data.tables import Row
from dsteer.data.transcript import conversation_key, holds_marker, render_transcript
from dsteer.data.types import Message, PreferencePair

Pairing = Literal["best_worst", "adjacent", "all"]

_Node = dict[str, Any]


def read_oasst(
    rows: Iterable[Row], *, lang: str | None, pairing: Pairing, skipped: Counter[str]
) -> Iterator[PreferencePair | str]:
    """Yield a pair of sibling answers, or why there is none, of each prompt in the trees.

    Reads the export format (a tree a row, ``prompt`` with nested ``replies``) and the hub's (a
    message a row, with ``parent_id``). A prompt is a prompter's message with all that precedes it,
    written as an hh-style transcript. Its ranked answers are paired as ``pairing`` says: the best
    with the worst, each with the next, or each with all below it.

    What is counted as a row is therefore a prompt that is reached, and, where ``pairing`` makes
    several pairs of it, each of these. These reasons drop one:

    - ``fewer_than_two_ranked_answers``: nothing to compare.
    - ``tied_rank``: two answers of equal rank.
    - ``identical_answers``: two answers of equal text.

    A message is left out, with all that follows it, and counted in ``skipped``, for the first of:
    ``deleted``, ``failed_review``, ``other_language``, ``empty_text``, ``role_marker_in_text`` (it
    would cut the transcript), ``roles_do_not_alternate``, ``parent_missing`` (hub format); what
    follows it counts as ``below_a_skipped_message``.

    Args:
        rows: of one of the two formats.
        lang: keep only messages in this language; None keeps all.
        pairing: which siblings make pairs.
        skipped: is filled with the number of messages left out, by reason.

    Raises:
        DataError: a row or message lacks a field, or one is of a wrong type.
    """
    for row, root in _trees(rows, skipped):
        # (message, the conversation before it); a stack, so that depth has no limit
        open_prompts: list[tuple[_Node, list[Message]]] = [(root, [])]
        while open_prompts:
            node, before = open_prompts.pop()
            if not _usable(row, node, "prompter", lang, skipped):
                continue
            context = [*before, Message(role="user", content=node["text"])]
            answers = [
                reply
                for reply in _replies(row, node)
                if _usable(row, reply, "assistant", lang, skipped)
            ]
            yield from _pairs(row, root, context, answers, pairing)
            for answer in reversed(answers):
                said = [*context, Message(role="assistant", content=answer["text"])]
                open_prompts.extend((reply, said) for reply in reversed(_replies(row, answer)))


def _trees(rows: Iterable[Row], skipped: Counter[str]) -> Iterator[tuple[Row, _Node]]:
    """Yield each tree's root with the row that it stands in."""
    messages: dict[str, tuple[Row, _Node]] = {}
    for row in rows:
        if "message_id" in row.columns and "prompt" not in row.columns:
            name = row.text("message_id")
            if name in messages:
                raise row.error(f"message {name!r} stands in two rows")
            messages[name] = row, {**row.columns, "replies": []}
            continue
        root = row.columns.get("prompt")
        if not isinstance(root, dict):
            raise row.error("no tree: expected an object 'prompt', or 'message_id' and 'parent_id'")
        yield row, root
    roots, orphans = [], []
    for row, node in messages.values():
        parent = node.get("parent_id")
        if parent is None:
            roots.append((row, node))
        elif parent in messages:
            messages[parent][1]["replies"].append(node)
        else:
            orphans.append((row, node))
    for row, node in orphans:
        _skip(row, node, "parent_missing", skipped)
    yield from roots


def _skip(row: Row, node: _Node, reason: str, skipped: Counter[str]) -> None:
    """Count a message that is left out, and all below it."""
    skipped[reason] += 1
    below = [*_replies(row, node)]
    while below:
        skipped["below_a_skipped_message"] += 1
        below.extend(_replies(row, below.pop()))


def _replies(row: Row, node: _Node) -> list[_Node]:
    replies = node.get("replies", [])
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise row.error(f"message {node.get('message_id')!r}: 'replies' is not a list of messages")
    return replies


def _usable(row: Row, node: _Node, role: str, lang: str | None, skipped: Counter[str]) -> bool:
    for field in ("text", "role"):
        if not isinstance(node.get(field), str):
            raise row.error(f"message {node.get('message_id')!r}: {field!r} is not text")
    reason = _why_not(node, role, lang)
    if reason is not None:
        _skip(row, node, reason, skipped)
    return reason is None


def _why_not(node: _Node, role: str, lang: str | None) -> str | None:
    if node.get("deleted"):
        return "deleted"
    if node.get("review_result") is False:
        return "failed_review"
    if lang is not None and node.get("lang") != lang:
        return "other_language"
    if not node["text"].strip():
        return "empty_text"
    if holds_marker(node["text"]):
        return "role_marker_in_text"
    return None if node["role"] == role else "roles_do_not_alternate"


def _pairs(
    row: Row, root: _Node, context: list[Message], answers: list[_Node], pairing: Pairing
) -> Iterator[PreferencePair | str]:
    prompt = render_transcript([*context, Message(role="assistant", content="")])
    ranked = [(_rank(row, answer), answer["text"]) for answer in answers]
    order = sorted((rank, text) for rank, text in ranked if rank is not None)
    if len(order) < 2:
        yield "fewer_than_two_ranked_answers"
        return
    choices = {
        "best_worst": [(order[0], order[-1])],
        "adjacent": pairwise(order),
        "all": combinations(order, 2),
    }
    for (rank, better), (other, worse) in choices[pairing]:
        if rank == other:
            yield "tied_rank"
        elif better == worse:
            yield "identical_answers"
        else:
            yield PreferencePair(
                prompt=prompt,
                chosen=" " + better,
                rejected=" " + worse,
                conversation=conversation_key(prompt),
                source=row.source,
                row=row.index,
                tags={"tree": str(root.get("message_id", ""))},
            )


def _rank(row: Row, node: _Node) -> float | None:
    rank = node.get("rank")
    if rank is None:
        return None
    if isinstance(rank, bool) or not isinstance(rank, int | float) or not math.isfinite(rank):
        raise row.error(
            f"message {node.get('message_id')!r}: 'rank' is {rank!r}, expected a number"
        )
    return rank
