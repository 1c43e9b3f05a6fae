"""The synthetic world's oracles on generated texts."""

from __future__ import annotations

from collections.abc import Sequence

from dsteer.data.synthetic import AXES, World
from dsteer.errors import MeasurementError


def oracle_scores(texts: Sequence[str]) -> dict[str, list[float]]:
    """Score of each text on each planted axis, by the axis's name, in [-1, 1].

    Only the first turn of a text counts, and a text without a word scores 0 on every axis; see
    `dsteer.data.synthetic.axes.score`.
    """
    scores = [World().scores(text) for text in texts]
    return {axis.name: [score[axis.name] for score in scores] for axis in AXES}


def needless_refusals(texts: Sequence[str], rule_triggered: Sequence[bool]) -> list[bool | None]:
    """Whether each text declines by a rule that its prompt does not trigger.

    Args:
        texts: generated answers.
        rule_triggered: whether each prompt holds a word of the quiet list, so that an answer may
            decline; a pair of the synthetic world says so in its tag of this name.

    Returns:
        None where the prompt may be declined.

    Raises:
        MeasurementError: other than one flag a text.
    """
    if len(texts) != len(rule_triggered):
        raise MeasurementError(
            f"{len(rule_triggered)} flags for {len(texts)} texts: give one a text, whether its "
            "prompt triggers the rule"
        )
    declines = oracle_scores(texts)["declines"]
    return [None if may else score > 0 for may, score in zip(rule_triggered, declines, strict=True)]
