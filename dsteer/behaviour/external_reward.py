"""Rewards of answers by a trained reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsteer.behaviour.caching import by_text
from dsteer.behaviour.classifier import Classifier
from dsteer.data.tokens import has_template
from dsteer.data.transcript import ASSISTANT, HUMAN, parse_transcript, render_transcript
from dsteer.data.types import Message, Prompt
from dsteer.errors import ModelError


@dataclass(frozen=True, slots=True)
class Reward:
    """Reward of one answer: the model's logit, and whether the left of the prompt was cut off."""

    value: float
    truncated: bool = False


Metric = Callable[[Sequence[tuple[Prompt, str]]], list[Reward]]
"""Reward of each (prompt, answer), remembered by their text."""


def external_reward(model: Classifier) -> Metric:
    """r(prompt, answer) of a sequence-classification model with one label: its logit.

    The model reads the whole conversation, as its chat template writes it: an hh-style transcript
    by its turns, any other text as one user turn, then the answer as the assistant's last turn.
    Without a template it reads prompt + answer, messages as a transcript. Conversations beyond the
    model's limit lose the left of their prompt, and say so.

    Raises:
        ModelError: the model has more labels than one, so none of them is the reward.
    """
    if len(model.labels) != 1:
        raise ModelError(
            f"{model.name}: {len(model.labels)} labels ({', '.join(map(repr, model.labels))}); a "
            "reward model has one: name such a model as behaviour.reward_model"
        )
    templated = has_template(model.tokenizer)

    def read(texts: list[str]) -> list[Reward]:
        tokenized = model.tokenizer(texts, add_special_tokens=not templated, verbose=False)
        whole = tokenized["input_ids"]
        cut = [model.fit(ids, keep="end") for ids in whole]
        values = model.logits(cut)[:, 0].tolist()
        return [
            Reward(value, truncated=len(short) < len(ids))
            for value, short, ids in zip(values, cut, whole, strict=True)
        ]

    by_conversation = by_text(read)

    def rewards(items: Sequence[tuple[Prompt, str]]) -> list[Reward]:
        return by_conversation(
            [
                _conversation(model, prompt, answer) if templated else _transcript(prompt, answer)
                for prompt, answer in items
            ]
        )

    return rewards


def _conversation(model: Classifier, prompt: Prompt, answer: str) -> str:
    if not isinstance(prompt, str):
        messages = list(prompt)
    elif prompt.startswith((HUMAN, ASSISTANT)):
        messages = parse_transcript(prompt)
    else:
        messages = [Message(role="user", content=prompt)]
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()
    messages.append(Message(role="assistant", content=answer.lstrip(" ")))
    return str(model.tokenizer.apply_chat_template(messages, tokenize=False))


def _transcript(prompt: Prompt, answer: str) -> str:
    if isinstance(prompt, str):
        return prompt + answer
    return render_transcript([*prompt, Message(role="assistant", content=answer.lstrip(" "))])
