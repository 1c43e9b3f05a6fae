"""How likely texts are under a model, usually the base: teacher-forced perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsteer.behaviour.teacher_forced import own_likelihoods, predictions
from dsteer.data.tokens import Encoded
from dsteer.errors import MeasurementError
from dsteer.models.load import Model
from dsteer.models.readout import Readout
from dsteer.training.evaluate import Continuation

AT_ONCE = 256
"""Texts whose states are held at a time."""


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
    model: Model, continuations: Sequence[Continuation], readout: Readout | None = None
) -> list[Surprise | None]:
    """Negative log-likelihood of each continuation given its context, in batches.

    Args:
        model: a causal language model.
        continuations: a context of at least one token, and the tokens after it (the end-of-text
            token too, where the text has it).
        readout: the model's head; default: taken from it.

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
    rows.sort(key=lambda row: -len(continuations[row]))
    readout = readout or Readout.of(model)
    found: list[Surprise | None] = [None] * len(continuations)
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start : start + AT_ONCE]
        items = [continuations[row] for row in some]
        texts = [Encoded(item.context + item.tokens, len(item.context)) for item in items]
        log_p = own_likelihoods(predictions(model, texts, readout), texts)
        for row, item, value in zip(some, items, log_p.tolist(), strict=True):
            found[row] = Surprise(-value, len(item.tokens))
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
