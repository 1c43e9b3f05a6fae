"""Pairs whose answers part: the text that both share, and the first tokens that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from dsteer.data.tokens import Encoded
from dsteer.data.types import PreferencePair
from dsteer.training.examples import Example, answered, encode_pairs


def first_divergence(chosen: Sequence[int], rejected: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ; None if one begins with the other."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    return next((index for index, (w, other) in pairs if w != other), None)


@dataclass(frozen=True)
class DivergentPairs:
    """The pairs of a split whose answers diverge within the length that is read.

    Attributes:
        examples: their ids, cut.
        at: index of the first diverging token in the answers of each.
        with_answers: pairs of the split that have two answers.
        no_divergence: of them, those whose answers do not diverge within the length.
        prompts_cut: diverging pairs whose prompt lost its left.
        answers_cut: diverging pairs of which an answer lost its end.
    """

    examples: tuple[Example, ...]
    at: tuple[int, ...]
    with_answers: int
    no_divergence: int
    prompts_cut: int
    answers_cut: int

    @classmethod
    def of(
        cls,
        pairs: Sequence[PreferencePair],
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        *,
        encoder_decoder: bool = False,
    ) -> DivergentPairs:
        """Encode pairs as DPO does, and cut both texts of each to ``max_tokens``.

        The prompt loses its left behind the BOS, but answers keep at most half of the length where
        they leave it no room. Pairs without answers are passed over.

        Raises:
            ModelError: the tokenizer has no EOS token.
        """
        both = answered(pairs)
        examples, at, prompts, answers = [], [], 0, 0
        encoded = encode_pairs(both, tokenizer, encoder_decoder=encoder_decoder) if both else []
        for example in encoded:
            cut = _cut(example, max_tokens, tokenizer.bos_token_id)
            index = first_divergence(cut.chosen, cut.rejected)
            if index is None:
                continue
            examples.append(cut)
            at.append(index)
            prompts += len(cut.prompt) < len(example.prompt)
            answers += (cut.chosen, cut.rejected) != (example.chosen, example.rejected)
        same = len(both) - len(examples)
        return cls(tuple(examples), tuple(at), len(both), same, prompts, answers)

    def first(self, count: int) -> DivergentPairs:
        """Only the first so many pairs; the counts stay those of the split."""
        return replace(self, examples=self.examples[:count], at=self.at[:count])

    @property
    def tokens(self) -> tuple[list[int], list[int]]:
        """The first diverging tokens: those of the chosen answers, those of the rejected."""
        found = list(zip(self.examples, self.at, strict=True))
        return [e.chosen[k] for e, k in found], [e.rejected[k] for e, k in found]

    @property
    def keys(self) -> list[str]:
        """The conversation of each pair."""
        return [e.conversation or str(row) for row, e in enumerate(self.examples)]

    @property
    def contexts(self) -> list[Encoded]:
        """Prompt and common prefix of the answers: the last token predicts the diverging one."""
        return [
            Encoded((*e.prompt, *e.chosen[:k]), len(e.prompt))
            for e, k in zip(self.examples, self.at, strict=True)
        ]


def _cut(example: Example, limit: int, bos: int | None) -> Example:
    longest = max(len(example.chosen), len(example.rejected))
    room = limit - min(longest, limit // 2)
    prompt = example.prompt
    if len(prompt) > room:
        head = prompt[:1] if prompt[0] == bos else ()
        prompt = (*head, *prompt[len(prompt) - room + len(head) :])
    left = limit - len(prompt)
    return replace(
        example, prompt=prompt, chosen=example.chosen[:left], rejected=example.rejected[:left]
    )
