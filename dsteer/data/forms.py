"""One conversation in two forms: the raw transcript, and through the chat template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dsteer.data.tokens import Encoded, Tokenizer, encode
from dsteer.data.transcript import ASSISTANT, HUMAN, holds_marker, parse_turns, render_transcript
from dsteer.data.types import Message, PreferencePair, Prompt
from dsteer.errors import DataError

FORMS = ("raw", "templated")


@dataclass(frozen=True)
class BothForms:
    """Prompts that can be read in both forms; entry i of each list is one prompt.

    Attributes:
        kept: which of the given prompts.
        raw: ids of the transcript as it stands.
        templated: ids of the same conversation through the chat template.
        dropped: rule → how many prompts it left out.
    """

    kept: tuple[int, ...]
    raw: tuple[Encoded, ...]
    templated: tuple[Encoded, ...]
    dropped: dict[str, int]


def both_forms(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt | PreferencePair],
    *,
    most: int,
    max_tokens: int | None = None,
) -> BothForms:
    """Encode the first prompts that can be read both raw and through the chat template.

    A text is raw as it stands, and its turns go through the template; messages go through the
    template, and are raw as the transcript that they make. Nothing is cut: a prompt of which one
    form would lose its left part would not be the same conversation in both.

    Rules that leave a prompt out, in this order:

    - ``ends_elsewhere``: a transcript or messages that do not end where an answer begins (they hold
      the answer, or a text ends with a human turn);
    - ``no_transcript``: messages that a transcript can't hold (a system turn, a marker inside a
      message), or a text with a marker and something before it;
    - ``template_refuses``: the template raises an error for this conversation;
    - ``too_long``: one of its forms has more than ``max_tokens`` tokens.

    Args:
        tokenizer: with a chat template.
        prompts: texts, message lists, or pairs, whose prompt is used.
        most: stop after so many.
        max_tokens: the longest form that is read; None: any.

    Raises:
        ModelError: the tokenizer has no chat template.
        DataError: a prompt without tokens.
    """
    kept: list[int] = []
    raw: list[Encoded] = []
    templated: list[Encoded] = []
    dropped = Counter[str]()
    for number, prompt in enumerate(prompts):
        if len(kept) == most:
            break
        found = _encode(tokenizer, prompt, max_tokens)
        if isinstance(found, str):
            dropped[found] += 1
            continue
        kept.append(number)
        raw.append(found[0])
        templated.append(found[1])
    return BothForms(tuple(kept), tuple(raw), tuple(templated), dict(dropped))


def _encode(
    tokenizer: Tokenizer, prompt: Prompt | PreferencePair, max_tokens: int | None
) -> tuple[Encoded, Encoded] | str:
    """Both forms of a prompt, or the rule that leaves it out."""
    asked = prompt.prompt if isinstance(prompt, PreferencePair) else prompt
    if not _ends_at_answer(asked):
        return "ends_elsewhere"
    text = asked if isinstance(asked, str) else _transcript(asked)
    if text is None or (holds_marker(text) and not text.startswith((HUMAN, ASSISTANT))):
        return "no_transcript"
    (raw,) = encode(tokenizer, [text])
    try:
        (templated,) = encode(tokenizer, [asked], template="chat")
    except DataError:
        return "template_refuses"
    if max_tokens is not None and max(len(raw.ids), len(templated.ids)) > max_tokens:
        return "too_long"
    return raw, templated


def _ends_at_answer(prompt: Prompt) -> bool:
    if isinstance(prompt, str):
        turns = parse_turns(prompt)[1]
        return not turns or (turns[-1][0] == "assistant" and not turns[-1][1].removeprefix(" "))
    return not prompt or prompt[-1]["role"] != "assistant" or not prompt[-1]["content"]


def _transcript(messages: Sequence[Message]) -> str | None:
    """Messages as a transcript that ends where the answer begins; None where they make none."""
    turns = list(messages)
    if turns and turns[-1]["role"] == "assistant":
        turns.pop()  # the empty answer that is still to come
    try:
        return render_transcript([*turns, Message(role="assistant", content="")])
    except DataError:
        return None
