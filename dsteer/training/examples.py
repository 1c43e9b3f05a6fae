"""Preference pairs as training examples: the text that TRL is given, and the token ids it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from dsteer.data.tokens import encode, encode_answers
from dsteer.data.transcript import render_transcript
from dsteer.data.types import Message, PreferencePair
from dsteer.errors import DataError, ModelError


class Row(TypedDict):
    """A pair in TRL's form: three texts, or three lists of messages."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]


@dataclass(frozen=True, slots=True)
class Example:
    """A pair as token ids, before any cut to a maximal length.

    Attributes:
        prompt: ids with one BOS; for an encoder, with the special tokens around a text.
        chosen: ids of the preferred answer with its EOS.
        rejected: ids of the other answer with its EOS.
        split_token: whether the prompt's last tokens merge with an answer, so that TRL leaves them
            out (end prompts on a token boundary).
        conversation: pairs with one key belong together.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    split_token: bool
    conversation: str

    @property
    def length(self) -> int:
        """Tokens of the longer of the two texts."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def answered(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs that have both answers."""
    return [pair for pair in pairs if pair.chosen is not None and pair.rejected is not None]


def as_text(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as text. Messages go through the tokenizer's chat template;
    without one they become an hh-style transcript.

    Raises:
        DataError: the pair has no answers, or its messages don't fit into a transcript.
    """
    if pair.chosen is None or pair.rejected is None:
        raise DataError(
            f"{pair.source} row {pair.row}: a prompt without answers can't be trained on"
        )
    if isinstance(pair.prompt, str):
        return pair.prompt, pair.chosen, pair.rejected
    if tokenizer is not None and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            list(pair.prompt), tokenize=False, add_generation_prompt=True
        )
        return text, pair.chosen, pair.rejected
    cue = Message(role="assistant", content="")
    return render_transcript([*pair.prompt, cue]), " " + pair.chosen, " " + pair.rejected


def to_rows(pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Write pairs in TRL's form: messages if every prompt is a message list and the tokenizer has a
    template, else texts. A BOS that a text begins with is taken off if the tokenizer writes it.

    Raises:
        ModelError: the tokenizer has no EOS token, which ends each answer.
    """
    _require_eos(tokenizer)
    if tokenizer.chat_template and all(not isinstance(pair.prompt, str) for pair in pairs):
        return [_messages(pair) for pair in pairs]
    bos = tokenizer.bos_token if _writes_bos(tokenizer) else ""
    rows = []
    for pair in pairs:
        prompt, chosen, rejected = as_text(pair, tokenizer)
        rows.append(Row(prompt=prompt.removeprefix(bos), chosen=chosen, rejected=rejected))
    return rows


def _require_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has no EOS token, which ends each answer; set eos_token")
    return int(tokenizer.eos_token_id)


def _writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    first = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def _messages(pair: PreferencePair) -> Row:
    assert not isinstance(pair.prompt, str)
    assert pair.chosen is not None
    assert pair.rejected is not None
    return Row(
        prompt=list(pair.prompt),
        chosen=[Message(role="assistant", content=pair.chosen)],
        rejected=[Message(role="assistant", content=pair.rejected)],
    )


def encode_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoder_decoder: bool = False,
) -> list[Example]:
    """Turn pairs into ids, exactly as TRL's DPOTrainer does.

    EOS is added to text answers (a template brings its own). Prompt and prompt + answer are encoded
    separately; the answer begins where they part.

    Args:
        pairs: with two answers each.
        tokenizer: with EOS.
        encoder_decoder: prompt and answers are texts of their own, encoded as
            :func:`dsteer.data.tokens.encode` does for such a model, and EOS ends each answer.
    """
    if encoder_decoder:
        return _encode_apart(pairs, tokenizer)
    examples = []
    for pair, row in zip(pairs, to_rows(pairs, tokenizer), strict=True):
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        alone = _ids(prompt, tokenizer, open_ended=True)
        with_chosen = _ids(_joined(prompt, chosen, tokenizer), tokenizer)
        with_rejected = _ids(_joined(prompt, rejected, tokenizer), tokenizer)
        cut = min(_shared(alone, with_chosen), _shared(alone, with_rejected))
        examples.append(
            Example(
                prompt=tuple(alone[:cut]),
                chosen=tuple(with_chosen[cut:]),
                rejected=tuple(with_rejected[cut:]),
                split_token=cut < len(alone),
                conversation=pair.conversation,
            )
        )
    return examples


def _joined(
    prompt: str | list[Message], answer: str | list[Message], tokenizer: PreTrainedTokenizerBase
) -> str | list[Message]:
    if isinstance(prompt, str) and isinstance(answer, str):
        end = tokenizer.eos_token
        return prompt + answer + ("" if answer.endswith(end) else end)
    return [*prompt, *answer]  # type: ignore[list-item]


def _encode_apart(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    if not pairs:
        return []
    eos = _require_eos(tokenizer)
    texts = [as_text(pair, tokenizer) for pair in pairs]
    prompts = encode(tokenizer, [pair.prompt for pair in pairs], encoder_decoder=True)
    answers = []
    for answer in (1, 2):
        ids = encode_answers(tokenizer, [text[answer] for text in texts])
        answers.append([tuple(row) if row[-1:] == [eos] else (*row, eos) for row in ids])
    return [
        Example(
            prompt=prompt.ids,
            chosen=chosen,
            rejected=rejected,
            split_token=False,
            conversation=pair.conversation,
        )
        for pair, prompt, chosen, rejected in zip(pairs, prompts, *answers, strict=True)
    ]


def _ids(
    text: str | list[Message], tokenizer: PreTrainedTokenizerBase, *, open_ended: bool = False
) -> list[int]:
    if isinstance(text, str):
        return list(tokenizer(text=text, verbose=False)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        text,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=open_ended,
        tokenizer_kwargs={"verbose": False},
    )
    return list(encoded["input_ids"])


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def fitting(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Cut texts at ``max_length`` tokens, as TRL does: prompts that fill it are left out, answers
    lose their end."""
    return [
        Example(
            prompt=example.prompt,
            chosen=example.chosen[: max_length - len(example.prompt)],
            rejected=example.rejected[: max_length - len(example.prompt)],
            split_token=example.split_token,
            conversation=example.conversation,
        )
        for example in examples
        if len(example.prompt) < max_length
    ]
