"""How likely texts are under a model, usually the base: teacher-forced perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from dsteer.errors import MeasurementError
from dsteer.training.evaluate import Continuation, log_likelihoods


@dataclass(frozen=True, slots=True)
class Surprise:
    """What a continuation costs under a model.

    Attributes:
        nll: -ln π(tokens | context), summed over the tokens, in nats.
        tokens: how many, at least one.
    """

    nll: float
    tokens: int

    @property
    def nats_a_token(self) -> float:
        """Mean negative log-likelihood: the log of the text's own perplexity."""
        return self.nll / self.tokens


def surprises(
    model: PreTrainedModel, continuations: Sequence[Continuation]
) -> list[Surprise | None]:
    """Negative log-likelihood of each continuation given its context, in batches.

    Args:
        model: in evaluation mode.
        continuations: a context of at least one token, and the tokens after it (the end-of-text
            token too, where the text has it).

    Returns:
        One a text; None for a continuation without a token.

    Raises:
        MeasurementError: a context without a token, which leaves nothing to predict from.
    """
    for row, item in enumerate(continuations):
        if not item.context:
            raise MeasurementError(
                f"the context of text {row} has no token: begin it with the model's BOS token"
            )
    rows = [row for row, item in enumerate(continuations) if item.tokens]
    items = [continuations[row] for row in rows]
    found: list[Surprise | None] = [None] * len(continuations)
    for row, item, log_p in zip(rows, items, log_likelihoods(model, items).tolist(), strict=True):
        found[row] = Surprise(-log_p, len(item.tokens))
    return found


def perplexity(surprises: Sequence[Surprise | None]) -> float | None:
    """exp(Σ nll / Σ tokens) over the texts that have a token, in [1, ∞]; None without any.

    Infinite where a token had probability 0.
    """
    present = [item for item in surprises if item is not None]
    if not present:
        return None
    mean = sum(item.nll for item in present) / sum(item.tokens for item in present)
    return math.exp(mean) if mean < 709 else math.inf
