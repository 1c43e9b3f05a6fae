"""Tests of a difference by conversation, several tests at once, and effects that are ratios.

A conversation is kept whole: its rows move between groups together, or change sign together. With
``count`` of the random draws at least as extreme as what was seen, p is (count + 1)/(draws + 1):
never 0, so that a test at level α rejects no more than α of true nulls (Phipson & Smyth 2010).

Intervals of means, cosines and spectra, and the sign-flip null of cosines, are in
:mod:`dsteer.geometry.intervals`; halves of v and Spearman-Brown in
:mod:`dsteer.geometry.comparison`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import binomtest
from scipy.stats import t as student
from torch import Tensor

from dsteer.errors import MeasurementError
from dsteer.geometry.comparison import Halves, Reliability
from dsteer.geometry.displacement import as_numbers
from dsteer.geometry.intervals import (
    Clusters,
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_sums,
    cluster_sums,
)

Alternative = Literal["two-sided", "greater", "less"]

_EQUAL = 1e-12
"""Statistics that differ by less, relative to the largest, are equal: they differ by rounding."""


@dataclass(frozen=True)
class PValue:
    """A test's outcome.

    Attributes:
        p: probability of an effect at least this extreme under the null.
        estimate: the effect.
        n: rows.
        conversations: how many the test rests on.
    """

    p: float
    estimate: float
    n: int
    conversations: int

    def json(self) -> dict[str, float | int]:
        """``{"p", "estimate", "n", "conversations"}``."""
        return {
            "p": self.p,
            "estimate": self.estimate,
            "n": self.n,
            "conversations": self.conversations,
        }


@dataclass(frozen=True)
class RatioEffect:
    """An effect that is a ratio of means.

    Attributes:
        interval: the ratio; None where it is suppressed, without ends where nothing bounds it.
        why: why the ratio or its ends are missing, in words; None if nothing is.
    """

    interval: Interval | None
    why: str | None


# ---------------------------------------------------------------------------------- tests


def permutation_test(
    a: Float[Tensor, " n"] | Float[np.ndarray, " n"],
    b: Float[Tensor, " m"] | Float[np.ndarray, " m"],
    a_clusters: Clusters = None,
    b_clusters: Clusters = None,
    *,
    alternative: Alternative = "two-sided",
    draws: int = 2000,
    seed: int = 0,
) -> PValue:
    """Difference of the means of two groups, mean a − mean b, by permuting whole conversations.

    The null: which group a conversation is in says nothing about its values.

    Args:
        a: values of one group.
        b: of the other.
        a_clusters: conversation key of each value.
        b_clusters: likewise.
        alternative: which differences are extreme.
        draws: random permutations.
        seed: of the permutations.

    Raises:
        MeasurementError: malformed or non-finite values, or a conversation in both groups.
    """
    first, second = _finite(a, "a"), _finite(b, "b")
    if a_clusters is not None and b_clusters is not None:
        shared = set(a_clusters) & set(b_clusters)
        if shared:
            raise MeasurementError(
                f"conversations in both groups: {len(shared)}, {min(map(str, shared))!r} for one; "
                "expected disjoint groups: test the paired differences (paired_sign_flip)"
            )
    sums = np.concatenate(
        [
            cluster_sums(np.column_stack([values, np.ones(len(values))]), clusters)
            for values, clusters in ((first, a_clusters), (second, b_clusters))
        ]
    )
    inside = len(cluster_sums(first, a_clusters))
    order = np.argsort(np.random.default_rng(seed).random((draws, len(sums))), axis=1)
    groups = np.concatenate([np.arange(len(sums))[None] < inside, order < inside])
    ones = groups.astype(np.float64) @ sums
    twos = sums.sum(axis=0) - ones
    found = ones[:, 0] / ones[:, 1] - twos[:, 0] / twos[:, 1]
    n = len(first) + len(second)
    return PValue(_extreme(found, alternative), float(found[0]), n, len(sums))


def paired_sign_flip(
    differences: Float[Tensor, " n"] | Float[np.ndarray, " n"],
    clusters: Clusters = None,
    *,
    alternative: Alternative = "two-sided",
    draws: int = 2000,
    seed: int = 0,
) -> PValue:
    """Mean of paired differences, by giving each conversation's differences a random sign.

    The null: a conversation's differences are as likely with the other sign.

    Raises:
        MeasurementError: malformed or non-finite differences, or not one cluster key a row.
    """
    values = _finite(differences, "differences")
    sums = cluster_sums(values, clusters)
    signs = 2.0 * np.random.default_rng(seed).integers(0, 2, size=(draws, len(sums))) - 1.0
    found = np.concatenate([[sums.sum()], signs @ sums]) / len(values)
    return PValue(_extreme(found, alternative), float(found[0]), len(values), len(sums))


def sign_test(
    differences: Float[Tensor, " n"] | Float[np.ndarray, " n"],
    clusters: Clusters = None,
    *,
    alternative: Alternative = "two-sided",
) -> PValue | None:
    """In how many conversations the differences sum to more than 0: exact, binomial with ½.

    ``estimate`` is the share of conversations; those that sum to exactly 0 are left out.

    Returns:
        None where all are.

    Raises:
        MeasurementError: malformed or non-finite differences, or not one cluster key a row.
    """
    values = _finite(differences, "differences")
    sums = cluster_sums(values, clusters)
    above, counted = int((sums > 0).sum()), int((sums != 0).sum())
    if counted == 0:
        return None
    p = float(binomtest(above, counted, alternative=alternative).pvalue)
    return PValue(p, above / counted, len(values), counted)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values of several tests, in the order given (Holm 1979).

    The k-th smallest of m is multiplied by m − k + 1, and is no smaller than the one before: those
    below α keep the chance of any false one at α. None (undefined) is no test and stays None.

    Raises:
        MeasurementError: a number that is no probability.
    """
    known = [(p, i) for i, p in enumerate(p_values) if p is not None]
    for p, _ in known:
        if not 0 <= p <= 1:
            raise MeasurementError(f"p-value {p}: expected a probability, 0 to 1")
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, i) in enumerate(sorted(known)):
        least = max(least, min(1.0, (len(known) - rank) * p))
        adjusted[i] = least
    return adjusted


def _finite(values: object, name: str) -> np.ndarray:
    numbers = as_numbers(values, name)
    if not np.isfinite(numbers).all():
        raise MeasurementError(f"{name}: some are not finite; leave undefined rows out")
    return numbers


def _extreme(found: np.ndarray, alternative: Alternative) -> float:
    """(count + 1)/(draws + 1) of the draws found[1:] at least as extreme as found[0]."""
    sided = {"two-sided": np.abs(found), "greater": found, "less": -found}[alternative]
    slack = _EQUAL * float(np.abs(found).max())
    return float((sided >= sided[0] - slack).sum()) / len(found)


# ---------------------------------------------------------------------------------- effects


def paired_difference(
    x: Float[Tensor, " n"] | Float[np.ndarray, " n"],
    y: Float[Tensor, " n"] | Float[np.ndarray, " n"],
    clusters: Clusters = None,
    *,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """Mean of x − y over the rows where both are defined, bootstrap over conversations.

    Returns:
        None where no row has both.

    Raises:
        MeasurementError: malformed values, or not one of each and one cluster key a row.
    """
    first, second = as_numbers(x, "x"), as_numbers(y, "y")
    if first.shape != second.shape:
        raise MeasurementError(f"{first.size} values beside {second.size}: expected pairs")
    return bootstrap_mean(
        torch.from_numpy(first - second),
        clusters,
        draws=draws,
        confidence=confidence,
        seed=seed,
    )


def ratio_effect(
    numerators: Float[Tensor, " n"] | Float[np.ndarray, " n"],
    denominators: Float[Tensor, " n"] | Float[np.ndarray, " n"],
    clusters: Clusters = None,
    *,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> RatioEffect:
    """ΣA / ΣB, bootstrap over conversations; suppressed where the interval of mean B includes 0.

    Raises:
        MeasurementError: not one cluster key a row, or numbers that are not finite.
    """
    below = torch.from_numpy(_finite(denominators, "denominators"))
    beneath = bootstrap_mean(below, clusters, draws=draws, confidence=confidence, seed=seed)
    if beneath is None or beneath.low is None or beneath.high is None:
        return RatioEffect(None, "one conversation can't tell the denominator from 0")
    if beneath.low <= 0 <= beneath.high:
        return RatioEffect(
            None,
            f"the denominator's interval, {beneath.low:.3g} to {beneath.high:.3g}, includes 0",
        )
    interval = bootstrap_ratio(
        numerators, below, clusters, draws=draws, confidence=confidence, seed=seed
    )
    return RatioEffect(interval, None)


def fieller(
    numerators: Float[Tensor, " n"] | Float[np.ndarray, " n"],
    denominators: Float[Tensor, " n"] | Float[np.ndarray, " n"],
    clusters: Clusters = None,
    *,
    confidence: float = 0.95,
) -> RatioEffect:
    """ΣA / ΣB with Fieller's interval: every r for which the mean of A − rB can't be told from 0.

    With sums (A_c, B_c) of c conversations and t Student's quantile with c − 1 degrees of freedom
    these are the r with (ΣA − rΣB)² ≤ t² c s²(A − rB), a quadratic. Where ΣB itself can't be told
    from 0 they are no interval: all numbers outside two ends, or all numbers; then the ends are
    None, and ``why`` says which. Source: Fieller (1954), "Some problems in interval estimation".

    Raises:
        MeasurementError: not one cluster key a row, or numbers that are not finite.
    """
    above, below = _finite(numerators, "numerators"), _finite(denominators, "denominators")
    if above.shape != below.shape:
        raise MeasurementError(f"{above.size} numerators for {below.size} denominators")
    n, total = len(below), float(below.sum())
    if total == 0:
        return RatioEffect(None, "the denominators sum to 0")
    value = float(above.sum()) / total
    sums = cluster_sums(np.column_stack([above, below]), clusters)
    count = len(sums)
    if count < 2:
        return RatioEffect(Interval(value, None, None, n), "one conversation has no spread")
    t = float(student.ppf((1 + confidence) / 2, count - 1))
    spread = t * t * count * np.cov(sums.T)
    whole = sums.sum(axis=0)
    # c − 2br + ar² ≤ 0
    c, b, a = (float(whole[i] * whole[j] - spread[i, j]) for i, j in ((0, 0), (0, 1), (1, 1)))
    if a > 0:
        half = math.sqrt(max(0.0, b * b - a * c))
        return RatioEffect(Interval(value, (b - half) / a, (b + half) / a, n), None)
    why = "the denominator can't be told from 0: "
    if b * b - a * c > 0 and a < 0:
        half = math.sqrt(b * b - a * c)
        low, high = sorted(((b - half) / a, (b + half) / a))
        why += f"every ratio below {low:.3g} or above {high:.3g} agrees with the data"
    else:
        why += "no ratio can be excluded"
    return RatioEffect(Interval(value, None, None, n), why)


@dataclass(frozen=True)
class LeastCount:
    """The least of some counts at which a share is reached.

    Attributes:
        value: on the rows as they are; None where no count reaches it.
        low: lower end; None where no count reaches it there either, or one conversation leaves
            nothing to vary.
        high: upper end, likewise: beyond the largest count, where there is a lower one.
        resampled: whether the ends were drawn.
    """

    value: int | None
    low: int | None
    high: int | None
    resampled: bool

    def json(self) -> dict[str, int | bool | None]:
        """``{"value", "low", "high", "resampled"}``."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "resampled": self.resampled,
        }


def least_count(
    gains: Float[Tensor, "k n"] | Float[np.ndarray, "k n"],
    whole: Float[Tensor, " n"] | Float[np.ndarray, " n"],
    counts: Sequence[int],
    share: float,
    clusters: Clusters = None,
    *,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LeastCount | None:
    """The least k with Σ gains_k ≥ share · Σ whole, bootstrap over conversations.

    Its ends are counts that were measured, so the interval holds the true one in at least the
    share of cases that is asked for, mostly in more.

    Args:
        gains: what each count gains on each row.
        whole: what the whole change gains on each row.
        counts: the counts, ascending.
        share: of the whole gain.
        clusters: conversation of each row.
        draws: resamples.
        confidence: coverage asked for.
        seed: of the resamples.

    Returns:
        None where the whole change gains nothing.

    Raises:
        MeasurementError: not one cluster key a row, or numbers that are not finite.
    """
    rows = np.column_stack([_finite(whole, "whole"), *(_finite(each, "gains") for each in gains)])
    total = rows.sum(axis=0)
    if total[0] <= 0:
        return None
    steps = np.asarray(counts, float)
    value = least_steps(total[None], share, steps)[0]
    sums = cluster_sums(rows, clusters)
    if len(sums) < 2:
        return LeastCount(finite_count(value), None, None, resampled=False)
    found = least_steps(bootstrap_sums(sums, draws, seed), share, steps)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(found, tails, method="inverted_cdf")
    return LeastCount(finite_count(value), finite_count(low), finite_count(high), resampled=True)


def least_steps(
    totals: Float[np.ndarray, "b m"], share: float, steps: Float[np.ndarray, " k"]
) -> Float[np.ndarray, " b"]:
    """The least step whose number reaches a share of the row's first; ∞ where none does."""
    hits = (totals[:, 1:] >= share * totals[:, :1]) & (totals[:, :1] > 0)
    return np.where(hits.any(axis=1), steps[hits.argmax(axis=1)], np.inf)


def finite_count(k: float) -> int | None:
    """A count; None of ∞, where none was reached."""
    return int(k) if math.isfinite(k) else None


def split_half_reliability(
    delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    clusters: Clusters = None,
    *,
    draws: int = 100,
    confidence: float = 0.95,
    seed: int = 0,
) -> Reliability:
    """Split-half reliability of v with Spearman-Brown's correction, by conversation.

    Raises:
        MeasurementError: malformed or non-finite input, or not one cluster key a row.
    """
    return Halves.of(delta, clusters, draws=draws, seed=seed).reliability(confidence)
