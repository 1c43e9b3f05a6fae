"""Text becomes token ids here, once; both models of a pair read the same ids."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from dsteer.data.transcript import ASSISTANT, HUMAN, parse_transcript, render_transcript
from dsteer.data.types import Message, PreferencePair, Prompt
from dsteer.errors import ConfigError, DataError, ModelError

Tokenizer = Any
"""A transformers tokenizer."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a prompt, and of an answer if one follows.

    Attributes:
        ids: the ids, at most one BOS, no EOS.
        prompt_length: the first ids, which are the prompt's; the rest is the answer's.
        truncated: whether the left of the prompt was cut off.
    """

    ids: tuple[int, ...]
    prompt_length: int
    truncated: bool = False


def encode(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt | PreferencePair],
    *,
    template: str = "none",
    max_tokens: int | None = None,
    response: Literal["chosen"] | None = None,
    response_tokens: int | None = None,
    encoder_decoder: bool = False,
) -> list[Encoded]:
    """Turn prompts into token ids, with exactly the special tokens that a model was trained with.

    - A text is tokenised as it stands, after the tokenizer's own leading special tokens (BOS, where
      it has one), once: a text that already begins with BOS gets no second.
    - Messages go through the tokenizer's chat template, up to where the answer begins, and are then
      tokenised without adding special tokens. A tokenizer without a template reads them as the
      transcript ``"\\n\\nHuman: …\\n\\nAssistant:"``.
    - ``template="chat"`` puts texts through the chat template too: an hh-style transcript by its
      turns, any other text as one user turn.

    - For an encoder-decoder model the prompt is a text of its own, so it keeps the special tokens
      that the tokenizer puts behind one (EOS), as the encoder was trained to read it. The answer
      is what the decoder writes: it is tokenised alone, without spaces at its start and without
      special tokens, for its start token is the model's.

    The prompt's ids are the same with and without an answer behind them.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: texts, message lists, or pairs, whose prompt is used.
        template: ``none`` or ``chat``.
        max_tokens: longer sequences lose the left of their prompt, behind the BOS.
        response: ``chosen`` appends the preferred answer of each pair.
        response_tokens: keep only so many tokens of the answer.
        encoder_decoder: the encoder reads the prompt, the decoder the answer.

    Raises:
        ConfigError: ``template`` is neither.
        ModelError: ``template="chat"`` and the tokenizer has no chat template.
        DataError: a prompt without tokens or answer, one that the template refuses, or one that
            does not fit into ``max_tokens`` beside its answer.
    """
    if template not in {"none", "chat"}:
        raise ConfigError(f"template {template!r}: no such template; expected none or chat")
    if template == "chat" and not has_template(tokenizer):
        raise ModelError(
            f"tokenizer {_name(tokenizer)} has no chat template, and template is 'chat'; use "
            "template 'none', or a tokenizer with a template"
        )
    texts: list[str] = []
    whole: list[str] = []
    answers: list[str] = []
    bare: list[bool] = []  # the tokenizer's special tokens are still to come
    for number, prompt in enumerate(prompts):
        text, is_rendered = _render(tokenizer, _prompt_of(prompt), template, number)
        texts.append(text)
        bare.append(not is_rendered)
        if response is not None:
            answer = prompt.chosen if isinstance(prompt, PreferencePair) else None
            if not answer:
                raise DataError(
                    f"prompt {number} has no chosen answer to read; give pairs with answers"
                )
            whole.append(text + (answer.lstrip(" ") if is_rendered else answer))
            answers.append(answer)
    leading, trailing = _around(tokenizer, texts)
    encoded = []
    prompt_ids = _tokenize(tokenizer, texts)
    if encoder_decoder:
        replies = encode_answers(tokenizer, answers) or [[] for _ in prompt_ids]
        whole_ids = [[*ids, *reply] for ids, reply in zip(prompt_ids, replies, strict=True)]
    else:
        whole_ids = _tokenize(tokenizer, whole) if whole else prompt_ids
    for number, (ids, full) in enumerate(zip(prompt_ids, whole_ids, strict=True)):
        answer_ids = full[len(ids) :]
        if full[: len(ids)] != ids:  # tokens merged across the prompt's end: keep the prompt's
            answer_ids = _tokenize(tokenizer, [whole[number][len(texts[number]) :]])[0]
        if bare[number] and ids[: len(leading)] != leading:
            ids = leading + ids
        ends = ids[-len(trailing) :] == trailing
        if encoder_decoder and bare[number] and ids and not ends:
            ids = ids + trailing
        encoded.append(
            _fit(tokenizer, ids, answer_ids[:response_tokens], max_tokens, number, response)
        )
    return encoded


@dataclass(frozen=True, slots=True)
class Spelled:
    """Token ids of a text, and where in it each of them ends.

    Attributes:
        ids: the ids, with the special tokens that stand before a text.
        ends: of each id, the number of the text's characters up to its end; 0 for special tokens.
    """

    ids: tuple[int, ...]
    ends: tuple[int, ...]


def spell(
    tokenizer: Tokenizer, texts: Sequence[str], *, max_tokens: int | None = None
) -> list[Spelled]:
    """Turn texts into ids as they stand, as :func:`encode` does, and keep where each token ends.

    A token that holds only some bytes of a character ends with it.

    Args:
        tokenizer: a fast transformers tokenizer.
        texts: texts without special tokens.
        max_tokens: longer texts are cut on the right.

    Raises:
        ModelError: the tokenizer is a slow one, which does not tell where its tokens lie.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"tokenizer {_name(tokenizer)} is a slow one, which does not tell where in a text its "
            "tokens lie; use a model with a fast tokenizer (tokenizer.json)"
        )
    if not texts:
        return []
    found = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    leading, _ = _around(tokenizer, texts)
    spelled = []
    for ids, spans in zip(found["input_ids"], found["offset_mapping"], strict=True):
        head = [] if ids[: len(leading)] == leading else leading
        ends = [0] * len(head) + [end for _, end in spans]
        spelled.append(Spelled((*head, *ids)[:max_tokens], tuple(ends[:max_tokens])))
    return spelled


def encode_answers(tokenizer: Tokenizer, answers: Sequence[str]) -> list[list[int]]:
    """Ids of answers that stand alone, as the decoder of an encoder-decoder model writes them.

    Tokenizers of translators (Marian's) have other pieces for what is written than for what is
    read.
    """
    if not answers:
        return []
    texts = [answer.lstrip(" ") for answer in answers]
    encoded = tokenizer(text_target=texts, add_special_tokens=False, verbose=False)
    return list(encoded["input_ids"])


def encode_conversation(tokenizer: Tokenizer, conversation: Prompt) -> tuple[int, ...]:
    """Ids of a whole conversation: unlike :func:`encode`, nothing is put behind its last turn.

    A text is tokenised as :func:`encode` does. Messages go through the chat template, without what
    begins an answer; a tokenizer without a template reads them as a transcript.

    Raises:
        DataError: no messages or tokens, or messages that the template refuses.
    """
    if isinstance(conversation, str):
        return encode(tokenizer, [conversation])[0].ids
    messages = list(conversation)
    if not messages:
        raise DataError("a conversation of no messages; expected at least one")
    if not has_template(tokenizer):
        return encode(tokenizer, [render_transcript(messages)])[0].ids
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise DataError(
            f"the chat template of {_name(tokenizer)} refuses the conversation ({error})"
        ) from None
    ids = tuple(_tokenize(tokenizer, [text])[0])
    if not ids:
        raise DataError("a conversation without tokens; expected some text")
    return ids


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def given_ids(
    prompts: Sequence[Prompt | PreferencePair] | Sequence[Encoded],
) -> list[Encoded] | None:
    """The prompts themselves if they are ids already; None if they are texts.

    Raises:
        DataError: no prompts, one text for a list, or ids and texts in one list.
    """
    if isinstance(prompts, str):
        raise DataError("prompts is one text; expected a list of prompts")
    if not prompts:
        raise DataError("there are no prompts to read; give at least one")
    ready = [item for item in prompts if isinstance(item, Encoded)]
    if len(ready) == len(prompts):
        return ready
    if ready:
        raise DataError(
            f"{len(ready)} of {len(prompts)} prompts are token ids and the others texts; give a "
            "list of one kind"
        )
    return None


def hash_ids(encoded: Sequence[Encoded]) -> str:
    """SHA-256 over the ids and lengths of all prompts, in order."""
    digest = hashlib.sha256()
    for item in encoded:
        digest.update(array("q", (len(item.ids), item.prompt_length, *item.ids)).tobytes())
    return digest.hexdigest()


def _prompt_of(prompt: Prompt | PreferencePair) -> Prompt:
    return prompt.prompt if isinstance(prompt, PreferencePair) else prompt


def _render(tokenizer: Tokenizer, prompt: Prompt, template: str, number: int) -> tuple[str, bool]:
    """The text of a prompt, and whether a chat template wrote it (special tokens included)."""
    if isinstance(prompt, str):
        if template == "none":
            return prompt, False
        messages = _turns(prompt)
    else:
        messages = list(prompt)
        if messages and messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
            messages.pop()
    if not messages or messages[-1]["role"] == "assistant":
        raise DataError(
            f"prompt {number} ends with an answer; expected it to end where the answer begins"
        )
    if not has_template(tokenizer):
        return render_transcript([*messages, Message(role="assistant", content="")]), False
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(
            f"prompt {number}: the chat template of {_name(tokenizer)} refuses it ({error})"
        ) from None
    return str(text), True


def _turns(text: str) -> list[Message]:
    if not text.startswith((HUMAN, ASSISTANT)):
        return [Message(role="user", content=text)]
    messages = parse_transcript(text)
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()
    return messages


def _tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{text!r:.60}: not valid Unicode; expected text encoded as UTF-8"
            ) from None
    return list(tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])


def _around(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before a text, and those that it puts behind it."""
    for text in ("a", *texts):
        plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if plain:
            marked = list(tokenizer(text, verbose=False)["input_ids"])
            for i in range(len(marked) - len(plain) + 1):
                if marked[i : i + len(plain)] == plain:
                    return marked[:i], marked[i + len(plain) :]
            return [], []
    return [], []


def _fit(
    tokenizer: Tokenizer,
    ids: list[int],
    answer: list[int],
    max_tokens: int | None,
    number: int,
    response: str | None,
) -> Encoded:
    if not ids:
        raise DataError(f"prompt {number} has no tokens; leave empty prompts out")
    if response is not None and not answer:
        raise DataError(f"the answer of prompt {number} has no tokens; leave empty answers out")
    room = None if max_tokens is None else max_tokens - len(answer)
    if room is None or len(ids) <= room:
        return Encoded((*ids, *answer), len(ids))
    head = ids[:1] if ids[0] == getattr(tokenizer, "bos_token_id", None) else []
    if room <= len(head):
        raise DataError(
            f"prompt {number}: max_tokens {max_tokens} leaves no room for it beside the "
            f"{len(answer)} tokens of its answer; raise max_tokens or lower response_tokens"
        )
    kept = head + ids[len(ids) - (room - len(head)) :]
    return Encoded((*kept, *answer), len(kept), truncated=True)


def _name(tokenizer: Tokenizer) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
