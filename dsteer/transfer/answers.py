"""Given answers as token ids, and what an arm does to the predictions of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.behaviour.teacher_forced import Scores, preference_match
from dsteer.data.tokens import Encoded, encode
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError
from dsteer.geometry.logits import NOTHING
from dsteer.models.pair import ModelPair
from dsteer.steering.arms import Steering
from dsteer.steering.decode import Decoding, decode


@dataclass(frozen=True)
class Answers:
    """Prompts with answers: the chosen ones, then the rejected ones.

    Attributes:
        texts: ids, cut.
        pairs: how many pairs; without rejected answers there are as many texts.
        clusters: conversation of each pair.
        written: whether the tuned model wrote the answers, because the pairs have none.
    """

    texts: list[Encoded]
    pairs: int
    clusters: list[str]
    written: bool

    @property
    def chosen(self) -> slice:
        """The chosen answers among the texts."""
        return slice(0, self.pairs)

    def chosen_only(self, count: int | None = None) -> Answers:
        """The chosen answers of the first so many pairs, or of all."""
        kept = slice(0, self.pairs if count is None else min(count, self.pairs))
        return Answers(self.texts[kept], kept.stop, self.clusters[kept], self.written)

    @property
    def truncated(self) -> int:
        """How many pairs lost the left of their prompt, beside either answer."""
        cut = [item.truncated for item in self.texts]
        return sum(any(cut[pair :: self.pairs]) for pair in range(self.pairs))


def read_answers(
    pair: ModelPair,
    pairs: Sequence[PreferencePair],
    count: int,
    *,
    template: str,
    max_tokens: int,
    response_tokens: int,
) -> Answers:
    """The first pairs with both answers; of prompts alone, the tuned model's own greedy texts.

    Raises:
        DataError: no room for prompts, or prompts to which the tuned model writes nothing.
    """
    reach = pair.max_positions
    if reach is not None and response_tokens >= reach:
        raise DataError(
            f"transfer.response_tokens: {response_tokens} tokens leave no room for a prompt in the "
            f"{reach} that the models were made for; lower it"
        )
    limit = max_tokens if reach is None else min(max_tokens, reach)
    tokenizer = pair.tokenizer_for(template)
    complete = [item for item in pairs if item.chosen and item.rejected][:count]
    if complete:
        clusters = [item.conversation for item in complete]
        both = [*complete, *(replace(item, chosen=item.rejected) for item in complete)]
        texts = encode(
            tokenizer,
            both,
            template=template,
            max_tokens=limit,
            response="chosen",
            response_tokens=response_tokens,
        )
        return Answers(texts, len(complete), clusters, written=False)
    asked = list(pairs[:count])
    room = limit - response_tokens
    if room < 1:
        raise DataError(
            f"transfer.max_tokens: {limit} tokens leave no room for a prompt beside the "
            f"{response_tokens} of an answer; raise it or lower transfer.response_tokens"
        )
    encoded = encode(tokenizer, asked, template=template, max_tokens=room)
    with pair.using("tuned") as model:
        made = decode(
            model, tokenizer, encoded, Steering.none(pair.width), Decoding(response_tokens)
        ).tokens[0]
        del model
    kept = [i for i, tokens in enumerate(made) if tokens]
    if not kept:
        raise DataError(
            "the pairs have no answers, and the tuned model writes none to the prompts; give pairs "
            "with answers"
        )
    texts = [replace(encoded[i], ids=(*encoded[i].ids, *made[i][:response_tokens])) for i in kept]
    return Answers(texts, len(kept), [asked[i].conversation for i in kept], written=True)


@dataclass(frozen=True)
class Effects:
    """What arms do to pairs: an arm's effect on some pairs is Σ gained / Σ below over them.

    Attributes:
        gained: (arms, pairs), 0 for an arm that does nothing.
        below: (pairs,), what the sum is divided by.
    """

    gained: Float[Tensor, "a n"]
    below: Float[Tensor, " n"]


def effects(scores: Scores, answers: Answers, beta: float) -> dict[str, Effects | None]:
    """Effects of arms 1, 2 … against arm 0, which must do nothing; None: undefined.

    - ``kl_recovered``: Σ (KL₀ − KL) / Σ KL₀ on the tokens of the chosen answers.
    - ``first_token``: the same on their first tokens alone.
    - ``reward_margin``: mean of β [Δ ln π(chosen) − Δ ln π(rejected)], Δ against arm 0.
    - ``reward_accuracy``: how often that margin is above 0 (a tie: ½), less ½.

    KL effects are undefined where both models predict the same, reward effects without rejected
    answers.
    """
    mine = scores.of(answers.chosen)
    found: dict[str, Effects | None] = {}
    for name, values, units in (
        ("kl_recovered", mine.kl, mine.tokens.double()),
        ("first_token", mine.kl_first, torch.ones(answers.pairs, dtype=torch.float64)),
    ):
        before = values[0]
        nothing = float(before.sum()) <= NOTHING * float(units.sum())
        found[name] = None if nothing else Effects(before - values[1:], before)
    found |= {"reward_margin": None, "reward_accuracy": None}
    if len(answers.texts) == 2 * answers.pairs:
        change = scores.log_likelihood[1:] - scores.log_likelihood[0]
        margins = beta * (change[:, : answers.pairs] - change[:, answers.pairs :])
        match = preference_match(margins)
        ones = torch.ones(answers.pairs, dtype=torch.float64)
        found["reward_margin"] = Effects(margins, ones)
        found["reward_accuracy"] = Effects(match - 0.5, ones)
    return found
