"""Tests and ratio effects: against scipy, every permutation by hand, and hand-worked numbers."""

from __future__ import annotations

import math
import re
from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from dsteer.errors import MeasurementError
from dsteer.geometry.comparison import Halves, spearman_brown
from dsteer.geometry.inference import (
    LeastCount,
    PValue,
    fieller,
    holm,
    least_count,
    paired_difference,
    paired_sign_flip,
    permutation_test,
    ratio_effect,
    sign_test,
    split_half_reliability,
)
from dsteer.geometry.intervals import bootstrap_mean, bootstrap_ratio

RNG = np.random.default_rng(41)

# ---------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_permutations_are_scipys(alternative: str) -> None:
    a, b = RNG.standard_normal(14) + 0.6, RNG.standard_normal(9)
    found = permutation_test(a, b, alternative=alternative, draws=20_000)  # type: ignore[arg-type]
    expected = stats.permutation_test(
        (a, b),
        lambda x, y: x.mean() - y.mean(),
        alternative=alternative,
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    )
    assert found.estimate == pytest.approx(a.mean() - b.mean(), rel=1e-12)
    # two draws of 20,000 each: 4 standard errors of their difference
    slack = 4 * math.sqrt(2 * 0.25 / 20_000)
    assert found.p == pytest.approx(expected.pvalue, abs=slack)
    assert (found.n, found.conversations) == (23, 23)


def test_permutations_move_whole_conversations() -> None:
    """5 conversations of 1 to 3 rows: the 10 ways to put 2 of them in the first group, by hand."""
    rows = {"p": [3.0, 4.0], "q": [5.0], "r": [1.0, 0.0, 2.0], "s": [-1.0], "t": [0.5, 2.0]}

    def difference(names: tuple[str, ...]) -> float:
        ones = [x for name in names for x in rows[name]]
        twos = [x for name in rows if name not in names for x in rows[name]]
        return float(np.mean(ones) - np.mean(twos))

    seen = difference(("p", "q"))
    every = [difference(names) for names in combinations(rows, 2)]
    exact = np.mean([abs(found) >= abs(seen) - 1e-12 for found in every])
    keys = [name for name in rows for _ in rows[name]]
    values = np.array([x for name in rows for x in rows[name]])
    found = permutation_test(values[:3], values[3:], keys[:3], keys[3:], draws=20_000)
    assert found.estimate == pytest.approx(seen, rel=1e-12)
    assert found.conversations == 5
    # binomial over 20,000 draws, 4 standard errors
    assert found.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))


def test_sign_flips_are_all_signs_by_hand() -> None:
    values, keys = np.array([1.0, 2.0, -0.5, 3.0, 0.5, 1.5]), ["a", "a", "b", "c", "d", "e"]
    sums = np.array([3.0, -0.5, 3.0, 0.5, 1.5])
    every = np.array([np.dot(signs, sums) for signs in product((1, -1), repeat=5)])
    for alternative, exact in (
        ("two-sided", np.mean(np.abs(every) >= sums.sum())),
        ("greater", np.mean(every >= sums.sum())),
        ("less", np.mean(every <= sums.sum())),
    ):
        found = paired_sign_flip(values, keys, alternative=alternative, draws=20_000)  # type: ignore[arg-type]
        assert found.estimate == pytest.approx(7.5 / 6, rel=1e-12)
        # binomial over 20,000 draws, 4 standard errors
        assert found.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))


def test_p_is_never_zero_and_ties_count() -> None:
    """Nine draws and none as extreme: 1/10. All alike: every draw is as extreme, up to rounding."""
    sure = paired_sign_flip(np.full(60, 0.1), draws=9, seed=3)
    assert sure.p == 1 / 10
    alike = permutation_test(np.full(7, 0.1), np.full(5, 0.1), draws=50)
    assert alike.p == 1
    assert sure.json() == {"p": 0.1, "estimate": sure.estimate, "n": 60, "conversations": 60}


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_signs_are_binomial(alternative: str) -> None:
    """By conversation: a's rows sum to +1, d's to 0 (left out); 4 of 5 are above 0."""
    values = np.array([3.0, -2.0, 1.0, 1.0, 2.0, -2.0, 0.5, -4.0])
    keys = ["a", "a", "b", "c", "d", "d", "e", "f"]
    tails = {"greater": 6 / 32, "less": 31 / 32, "two-sided": 12 / 32}
    found = sign_test(values, keys, alternative=alternative)  # type: ignore[arg-type]
    assert found is not None
    assert found == PValue(found.p, 4 / 5, 8, 5)
    assert found.p == pytest.approx(tails[alternative], rel=1e-12)
    assert sign_test(np.zeros(4)) is None


def test_holm_by_hand() -> None:
    """m = 4: 0.01·4, 0.02·3, 0.03·2 lifted to what stands before it, 0.5·1. None is no test."""
    found = holm([0.03, None, 0.01, 0.5, 0.02])
    assert found == [pytest.approx(0.06), None, pytest.approx(0.04), 0.5, pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(MeasurementError, match=r"p-value 1\.2: expected a probability"):
        holm([0.1, 1.2])


# ---------------------------------------------------------------------------------- effects


def test_paired_differences_are_means_of_differences() -> None:
    x, y = RNG.standard_normal(12), RNG.standard_normal(12)
    keys = [i // 2 for i in range(12)]
    assert paired_difference(x, y, keys, seed=2) == bootstrap_mean(x - y, keys, seed=2)
    x[3] = math.nan
    found = paired_difference(x, y, keys)
    assert found is not None
    assert found.n == 11


def test_a_ratio_is_suppressed_where_its_denominator_may_be_zero() -> None:
    above, sure = RNG.standard_normal(30) + 2, RNG.standard_normal(30) + 4
    shown = ratio_effect(above, sure, seed=1)
    assert shown.why is None
    assert shown.interval == bootstrap_ratio(above, sure, seed=1)
    unsure = RNG.standard_normal(30)
    hidden = ratio_effect(above, unsure - unsure.mean() + 0.05)
    assert hidden.interval is None
    assert hidden.why is not None
    assert hidden.why.startswith("the denominator's interval, -")
    assert hidden.why.endswith("includes 0")
    single = ratio_effect(above, sure, ["one"] * 30)
    assert (single.interval, single.why) == (
        None,
        "one conversation can't tell the denominator from 0",
    )


def test_fieller_holds_the_ratios_that_a_t_test_keeps() -> None:
    """Its ends are where Student's t of A − rB, by scipy, is at its 95 % quantile."""
    below = RNG.standard_normal(15) + 3
    above = 0.4 * below + RNG.standard_normal(15)
    found = fieller(above, below)
    assert found.why is None
    assert found.interval is not None
    assert found.interval.value == pytest.approx(above.sum() / below.sum(), rel=1e-12)
    for end in (found.interval.low, found.interval.high):
        assert end is not None
        assert stats.ttest_1samp(above - end * below, 0).pvalue == pytest.approx(0.05, rel=1e-9)
    exact = fieller(2 * below, below)
    assert exact.interval is not None
    # a root of rounding: √1e-16 of numbers of size 1
    assert exact.interval.low == pytest.approx(2, abs=1e-6)
    assert exact.interval.high == pytest.approx(2, abs=1e-6)


def test_fieller_goes_by_conversation() -> None:
    """Rows summed by hand before give the same."""
    sums = RNG.standard_normal((8, 2)) + np.array([1.0, 4.0])
    whole = fieller(sums[:, 0], sums[:, 1]).interval
    halves = np.repeat(sums / 2, 2, axis=0)
    split = fieller(halves[:, 0], halves[:, 1], [*"aabbccddeeffgghh"]).interval
    assert whole is not None
    assert split is not None
    assert (split.value, split.low, split.high) == pytest.approx(
        (whole.value, whole.low, whole.high)
    )
    assert (whole.n, split.n) == (8, 16)


def test_fieller_says_when_nothing_bounds_the_ratio() -> None:
    below = RNG.standard_normal(20)
    below += 0.05 - below.mean()
    clear = fieller(RNG.standard_normal(20) + 3, below)
    assert clear.interval is not None
    assert clear.interval.low is None
    assert clear.why is not None
    assert clear.why.startswith("the denominator can't be told from 0: every ratio below")
    low, high = map(float, re.findall(r"(?:below|above) (\S+)", clear.why))
    assert low < 0 < high  # the ratios near 0 are what the data exclude
    noise = RNG.standard_normal(20)
    vague = fieller(noise - noise.mean() + 0.01, below)
    assert vague.why == "the denominator can't be told from 0: no ratio can be excluded"
    assert fieller(np.ones(2), np.array([1.0, -1.0])).why == "the denominators sum to 0"
    assert fieller(np.ones(2), np.ones(2), ["a", "a"]).why == "one conversation has no spread"


@pytest.mark.parametrize(
    "attempt",
    [
        lambda bad: permutation_test(bad, np.ones(2)),
        lambda bad: paired_sign_flip(bad),
        lambda bad: sign_test(bad),
        lambda bad: ratio_effect(np.ones(2), bad),
        lambda bad: fieller(bad, np.ones(2)),
        lambda bad: least_count(bad[None], np.ones(2), (1,), 0.5),
    ],
)
def test_numbers_that_are_not_finite_are_refused(attempt) -> None:
    with pytest.raises(MeasurementError, match="some are not finite; leave undefined rows out"):
        attempt(np.array([1.0, math.nan]))


def test_a_conversation_in_both_groups_is_refused() -> None:
    with pytest.raises(MeasurementError, match=r"in both groups: 1, 'k' for one.*paired_sign_flip"):
        permutation_test(np.ones(2), np.ones(2), ["j", "k"], ["k", "l"])


# ---------------------------------------------------------------------------------- reliability


def test_spearman_brown_by_hand() -> None:
    """r = ½ lengthens to ⅔; −1 to nothing."""
    assert spearman_brown(0.5) == pytest.approx(2 / 3)
    assert np.isnan(spearman_brown(-1.0))
    rows = RNG.standard_normal((20, 4)) + 0.5
    keys = [i // 2 for i in range(20)]
    found = split_half_reliability(rows, keys, draws=30, seed=1)
    assert found == Halves.of(rows, keys, draws=30, seed=1).reliability()
    assert found.half is not None
    assert found.full is not None
    assert found.full.value == pytest.approx(2 * found.half.value / (1 + found.half.value))


def test_the_least_count_by_hand() -> None:
    gains = np.array([[1.0, 0.0, 1.0, 0.0], [2.0, 2.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    whole, keys = np.full(4, 2.0), ["a", "b", "c", "d"]  # Σ whole = 8; Σ gains = 2, 6, 8
    assert least_count(gains, whole, (1, 2, 4), 0.25, keys).value == 1
    assert least_count(gains, whole, (1, 2, 4), 0.5, keys).value == 2
    assert least_count(gains, whole, (1, 2, 4), 0.9, keys).value == 4
    assert least_count(gains[:2], whole, (1, 2), 0.9, keys).value is None
    assert least_count(gains, -whole, (1, 2, 4), 0.5, keys) is None
    assert least_count(gains, whole, (1, 2, 4), 0.5, ["a"] * 4) == LeastCount(2, None, None, False)


def test_the_least_count_is_resampled_by_conversation() -> None:
    """Two conversations: half of the resamples hold both, a quarter one of them twice."""
    gains = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    found = least_count(gains, np.ones(3), (1, 3), 0.9, ["a", "a", "b"], draws=4000)
    assert (found.value, found.low, found.high, found.resampled) == (3, 1, 3, True)
    # beyond the largest count where many resamples reach the share with none
    found = least_count(gains[:1], np.ones(3), (1,), 0.6, ["a", "a", "b"], draws=4000)
    assert (found.value, found.low, found.high) == (1, 1, None)
