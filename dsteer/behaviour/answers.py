"""Preference pairs as texts to be scored: prompts with both answers, as ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from dsteer.data.tokens import Encoded, Tokenizer
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError
from dsteer.training.examples import Example, answered, encode_pairs, fitting


@dataclass(frozen=True)
class Answers:
    """Pairs as ids: the chosen answers, then the rejected ones, each with its EOS (unless cut).

    Attributes:
        texts: prompts with answers.
        pairs: how many pairs.
        clusters: conversation of each pair.
        left_out: pairs whose prompt alone fills the limit.
    """

    texts: list[Encoded]
    pairs: int
    clusters: list[str]
    left_out: int = 0

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Answers:
        """The answers of examples."""
        texts = [
            Encoded(example.prompt + answer, len(example.prompt))
            for which in ("chosen", "rejected")
            for example in examples
            for answer in (getattr(example, which),)
        ]
        keys = [example.conversation or str(row) for row, example in enumerate(examples)]
        return cls(texts, len(examples), keys)

    @classmethod
    def read(
        cls,
        pairs: Sequence[PreferencePair],
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        response_tokens: int | None = None,
        encoder_decoder: bool = False,
        where: str = "the split",
    ) -> Answers:
        """Encode the pairs that have two answers.

        Args:
            pairs: any pairs.
            tokenizer: with EOS.
            max_tokens: pairs whose prompt alone fills it are left out; longer answers are cut.
            response_tokens: answers are cut to so many tokens.
            encoder_decoder: how prompts and answers are joined.
            where: what messages call the pairs.

        Raises:
            DataError: no pair is left.
        """
        given = answered(pairs)
        encoded = encode_pairs(given, tokenizer, encoder_decoder=encoder_decoder)
        examples = fitting(encoded, max_tokens)
        if not examples:
            raise DataError(
                f"{where} has {len(given)} pairs with two answers, none of which fits into "
                f"{max_tokens} tokens; give pairs with answers, raise max_tokens of the stage, or "
                "leave the stages that change states out (profile=null rank=null …)"
            )
        if response_tokens is not None:
            examples = [
                Example(
                    prompt=example.prompt,
                    chosen=example.chosen[:response_tokens],
                    rejected=example.rejected[:response_tokens],
                    split_token=example.split_token,
                    conversation=example.conversation,
                )
                for example in examples
            ]
        found = cls.of(examples)
        return cls(found.texts, found.pairs, found.clusters, len(given) - len(examples))

    @property
    def chosen(self) -> slice:
        """The chosen answers among the texts."""
        return slice(0, self.pairs)

    def index(self, count: int) -> list[int]:
        """The texts of the first so many pairs."""
        n = min(count, self.pairs)
        return [*range(n), *range(self.pairs, self.pairs + n)]

    def margins(self, likelihoods: Float[Tensor, "*a n"]) -> Float[Tensor, "*a m"]:
        """ln π(chosen) − ln π(rejected), the last axis being that of the texts."""
        return likelihoods[..., : self.pairs] - likelihoods[..., self.pairs :]
