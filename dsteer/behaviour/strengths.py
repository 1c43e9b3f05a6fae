"""How far a model can be pushed, and a grid of strengths that spans that range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

COLLAPSED = 0.5
"""A model has collapsed where at least this share of its outputs is degenerate."""

_BISECTIONS = 3
_SMALLEST = 0.25


@dataclass(frozen=True)
class LiveRange:
    """Strengths between which a model still writes.

    Attributes:
        low: the strength below 0 at which it collapses; None if it does not within reach.
        high: that above 0; None likewise.
        probes: strength and share of degenerate outputs, in rising order.
        threshold: the share from which outputs count as collapsed.
    """

    low: float | None
    high: float | None
    probes: tuple[tuple[float, float], ...]
    threshold: float


def live_range(degenerate: Callable[[Sequence[float]], list[float]], limit: float) -> LiveRange:
    """Find where a model collapses, by doubling and then bisecting the strength, on both sides.

    A model of which some outputs are degenerate as it is has collapsed where half of the rest are
    too: at the share s₀ + (1 − s₀)/2, at least one half. Where all are, it can't collapse.

    Args:
        degenerate: strengths → shares of degenerate outputs, on prompts that are reported nowhere.
        limit: the largest strength tried.
    """
    doubling = [min(_SMALLEST, limit)]
    while doubling[-1] * 2 <= limit:
        doubling.append(doubling[-1] * 2)
    if doubling[-1] < limit:
        doubling.append(limit)
    asked = [*(-x for x in reversed(doubling)), 0.0, *doubling]
    shares = dict(zip(asked, degenerate(asked), strict=True))
    threshold = max(COLLAPSED, (1 + shares[0.0]) / 2)
    brackets: dict[int, tuple[float, float]] = {}
    for sign in (-1, 1):
        reached = [0.0, *doubling]
        for below, above in pairwise(reached):
            if shares[sign * above] >= threshold and shares[0.0] < 1:
                brackets[sign] = (below, above)
                break
    for _ in range(_BISECTIONS if brackets else 0):
        middles = {sign: (low + high) / 2 for sign, (low, high) in brackets.items()}
        found = degenerate([sign * middle for sign, middle in middles.items()])
        for (sign, middle), share in zip(middles.items(), found, strict=True):
            shares[sign * middle] = share
            low, high = brackets[sign]
            brackets[sign] = (low, middle) if share >= threshold else (middle, high)
    return LiveRange(
        low=-brackets[-1][1] if -1 in brackets else None,
        high=brackets[1][1] if 1 in brackets else None,
        probes=tuple(sorted(shares.items())),
        threshold=threshold,
    )


def grid(live: LiveRange, points: int, limit: float) -> tuple[float, ...]:
    """Rising strengths with 0 that span the live range and go one step past collapse.

    A third of the points lie below 0, three at least, the rest above. On each side they grow
    geometrically up to the collapse, and one more lies past it; 1 and −1 are among them,
    unless the limit is smaller.

    Args:
        live: what :func:`live_range` found.
        points: how many, at least 9.
        limit: where a side ends that does not collapse.
    """
    below = max(3, (points - 1) // 3)
    negative = _side(-live.low if live.low is not None else None, below, limit)
    positive = _side(live.high, points - 1 - below, limit)
    return (*(-x for x in reversed(negative)), 0.0, *positive)


def _side(collapse: float | None, count: int, limit: float) -> list[float]:
    """``count`` rising strengths above 0, at least 3."""
    end = limit if collapse is None else collapse
    within = count if collapse is None else count - 1
    values = np.geomspace(min(_SMALLEST * 2, end / 4), end, within)
    step = max(1.25, end / values[-2])
    if values[0] < 1 < end:  # the nearest becomes 1, but never the end
        values[np.abs(np.log(values[:-1])).argmin()] = 1.0
    if collapse is not None:
        values = np.append(values, max(end * step, 1.0))  # the paper's range is covered
    return _rounded(values)


def _rounded(values: np.ndarray) -> list[float]:
    """To as few digits, two at least, as keep them apart."""
    digits = 2
    while True:
        found = [float(f"{value:.{digits}g}") for value in values]
        if all(a < b for a, b in pairwise(found)):
            return found
        digits += 1
