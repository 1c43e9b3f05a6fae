"""Intervals: hand-worked, equal to loops, and covering what they are for in simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import measures
from scipy.stats import binomtest, norm, t

from dsteer.errors import MeasurementError
from dsteer.geometry.alignment import cosine_to, cosine_to_mean
from dsteer.geometry.displacement import shared_share
from dsteer.geometry.intervals import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    convergence,
    convergence_sizes,
    draw_counts,
    held_out_cosine,
    mean_cosine,
    percentiles,
    proportion,
    share_intervals,
    sign_flip_null,
    spectral_intervals,
    wilson,
)
from dsteer.geometry.spectrum import spectra

RNG = np.random.default_rng(23)


def ends(interval: Interval | None) -> tuple[float, float]:
    assert interval is not None
    assert interval.low is not None
    assert interval.high is not None
    assert interval.low <= interval.value <= interval.high
    return interval.low, interval.high


# ---------------------------------------------------------------------------------- means


def test_bootstrap_mean_has_the_standard_error() -> None:
    """Independent rows: the half-width is 1.96 s/√n; 4000 draws know it to about 3 %."""
    values = RNG.standard_normal(400)
    found = bootstrap_mean(values, draws=4000, seed=1)
    low, high = ends(found)
    assert found is not None
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.08)
    assert found.n == 400
    assert found.json() == {"value": found.value, "low": low, "high": high, "n": 400}


@pytest.mark.parametrize("count", [2, 10, 128])
def test_few_conversations_widen_to_students_interval(count: int) -> None:
    """Draws of a mean are about normal with variance s² (c − 1)/c /c; the ends are ±t s/√c."""
    s, confidence = 3.0, 0.9
    spread = s * math.sqrt((count - 1) / count / count)
    draws = norm.ppf((np.arange(400_000) + 0.5) / 400_000, scale=spread)
    low, high = percentiles(draws, confidence, count)
    expected = float(t.ppf(0.95, count - 1)) * s / math.sqrt(count)
    # quantiles of 400,000 even ones; the tail of two conversations is 1e-19, beyond them all
    if count == 2:
        assert (low, high) == pytest.approx((draws[0], draws[-1]), rel=1e-6)
    else:
        assert (low, high) == pytest.approx((-expected, expected), rel=1e-3)
    assert percentiles(draws, confidence) == pytest.approx(
        (-1.6449 * spread, 1.6449 * spread), rel=1e-3
    )


def test_conversations_stay_together() -> None:
    """Four copies of each row say no more than one: keys restore the width that copies halve."""
    values = RNG.standard_normal(100)
    single = ends(bootstrap_mean(values, draws=3000))
    copies = np.repeat(values, 4)
    keys = [f"c{i // 4}" for i in range(400)]
    kept = ends(bootstrap_mean(copies, keys, draws=3000))
    apart = ends(bootstrap_mean(copies, draws=3000))
    assert kept == pytest.approx(single, rel=1e-12)  # the very same draws
    assert (apart[1] - apart[0]) == pytest.approx((single[1] - single[0]) / 2, rel=0.1)


def test_order_of_conversations_is_free() -> None:
    values = np.arange(6.0)
    keys = ["b", "a", "b", "c", "a", "c"]
    found = bootstrap_mean(values, keys, draws=50)
    means = {tuple(sorted(pick)) for pick in np.ndindex(3, 3, 3)}
    by_key = {0: [0.0, 2.0], 1: [1.0, 4.0], 2: [3.0, 5.0]}
    possible = {float(np.mean([x for k in pick for x in by_key[k]])) for pick in means}
    low, high = ends(found)
    assert min(possible) <= low <= high <= max(possible)


def test_undefined_values_are_left_out() -> None:
    values = np.array([1.0, math.nan, 3.0, math.nan])
    found = bootstrap_mean(values, ["a", "b", "c", "c"])
    assert found is not None
    assert (found.value, found.n) == (2.0, 2)
    assert (found.low, found.high) == (1.0, 3.0)
    assert bootstrap_mean(np.array([math.nan])) is None


def test_one_conversation_has_no_interval() -> None:
    assert bootstrap_mean(np.array([1.0, 3.0]), ["a", "a"]) == Interval(2.0, None, None, 2)
    delta = RNG.standard_normal((3, 4))
    one = ["a"] * 3
    for found in (
        mean_cosine(delta, clusters=one),
        held_out_cosine(delta, delta, one, None),
        share_intervals(delta, one).plain,
        spectral_intervals(delta, one)[0].entropy,
    ):
        assert found is not None
        assert found.low is None
        assert found.high is None


def test_bootstrap_ratio() -> None:
    above, below = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 4.0])
    found = bootstrap_ratio(above, below)
    assert found is not None
    assert found.value == pytest.approx(6 / 8)
    low, high = ends(found)
    assert 0.5 <= low <= high <= 1
    proportional = bootstrap_ratio(3 * below, below)
    assert ends(proportional) == pytest.approx((3, 3))
    assert bootstrap_ratio(above, np.zeros(3)) is None
    with pytest.raises(MeasurementError, match="not finite"):
        bootstrap_ratio(np.array([math.inf]), np.array([1.0]))


def test_one_key_a_row_is_needed() -> None:
    with pytest.raises(MeasurementError, match="2 conversation keys for 3 rows"):
        bootstrap_mean(np.ones(3), ["a", "b"])


def test_same_seed_same_interval() -> None:
    delta = RNG.standard_normal((30, 4)) + 0.5
    assert mean_cosine(delta, seed=3) == mean_cosine(delta, seed=3)
    assert mean_cosine(delta, seed=3) != mean_cosine(delta, seed=4)
    assert held_out_cosine(delta, delta, seed=3) == held_out_cosine(delta, delta, seed=3)
    assert torch.equal(sign_flip_null(delta, delta, seed=3), sign_flip_null(delta, delta, seed=3))


# ---------------------------------------------------------------------------------- cosines


def test_values_are_those_of_alignment() -> None:
    fit, test = RNG.standard_normal((20, 5)) + 0.5, RNG.standard_normal((9, 5)) + 0.5
    test[4] = 0
    held = held_out_cosine(fit, test, draws=20)
    assert held is not None
    expected = cosine_to(test, fit.mean(axis=0)).nanmean()
    assert held.value == pytest.approx(float(expected), abs=1e-14)
    assert held.n == 8
    for mode in ("in_sample", "leave_one_out"):
        found = mean_cosine(fit, mode, draws=20)
        assert found is not None
        assert found.value == pytest.approx(float(cosine_to_mean(fit, mode).mean()), abs=1e-14)


def test_cosines_in_a_draw_equal_a_loop() -> None:
    """Refitted v, and leave-one-out without any copy of row i, written out."""
    from dsteer.geometry.intervals import _own_cosines

    rows = RNG.standard_normal((6, 3)) + 0.3
    weights = np.array([[2.0, 0, 1, 0, 3, 0], [1, 1, 1, 1, 1, 1]])
    inside = _own_cosines(rows, weights, "in_sample")
    outside = _own_cosines(rows, weights, "leave_one_out")
    for draw, counts in enumerate(weights.astype(int)):
        drawn = np.repeat(rows, counts, axis=0)
        for i in np.flatnonzero(counts):
            assert inside[draw, i] == pytest.approx(
                measures.cosine(rows[i], drawn.mean(axis=0)), abs=1e-12
            )
            others = np.repeat(rows, np.where(np.arange(6) == i, 0, counts), axis=0)
            assert outside[draw, i] == pytest.approx(
                measures.cosine(rows[i], others.mean(axis=0)), abs=1e-12
            )


def test_undefined_cosines_have_no_interval() -> None:
    delta = RNG.standard_normal((5, 3))
    assert held_out_cosine(np.zeros((5, 3)), delta) is None
    assert held_out_cosine(delta, np.zeros((2, 3))) is None
    assert mean_cosine(np.zeros((5, 3))) is None
    assert mean_cosine(delta[:1], "leave_one_out") is None


def test_a_constant_displacement_is_certain() -> None:
    b = np.tile(RNG.standard_normal(8), (12, 1))
    for found in (held_out_cosine(b, b[:5]), mean_cosine(b, "leave_one_out"), mean_cosine(b)):
        assert ends(found) == pytest.approx((1, 1), abs=1e-12)


def test_sign_flip_null_of_a_constant() -> None:
    """Signs are flipped in test rows too: |cos| stays 1, the mean over rows spreads like 1/√n."""
    b = np.tile(RNG.standard_normal(8), (40, 1))
    null = sign_flip_null(b[:20], b[:16], draws=500)
    assert null.shape == (500, 16)
    known = null[~null.isnan().any(dim=1)]  # v is 0 where as many signs are up as down
    assert len(known) > 350
    np.testing.assert_allclose(known.abs().numpy(), 1, atol=1e-12)
    means = known.mean(dim=1)
    assert float(means.std()) == pytest.approx(1 / 4, rel=0.2)
    assert abs(float(means.mean())) < 0.05


def test_sign_flip_null_of_in_sample_cosines() -> None:
    """Without a shared direction in-sample cosines stay near 1/√N, leave-one-out ones at 0."""
    n = 64
    rows = np.random.default_rng(6).standard_normal((n, 400)) + 0.2
    inside = sign_flip_null(rows, mode="in_sample", draws=100).mean(dim=1)
    outside = sign_flip_null(rows, mode="leave_one_out", draws=100).mean(dim=1)
    # a mean over 64 rows and 100 draws; the shared part of the rows adds 4 % to ‖v‖ at random
    assert float(inside.mean()) == pytest.approx(1 / math.sqrt(n), abs=0.01)
    assert abs(float(outside.mean())) < 0.01


def test_sign_flips_are_by_conversation() -> None:
    rows = np.abs(RNG.standard_normal((6, 3))) + 1
    keys = ["a", "a", "a", "b", "b", "b"]
    null = sign_flip_null(rows, rows, "held_out", ["k"] * 6, keys, draws=50)
    signs = null.sign()
    assert (signs[:, :3] == signs[:, :1]).all()
    assert (signs[:, 3:] == signs[:, 3:4]).all()
    assert not (signs[:, 0] == signs[:, 3]).all()


def test_held_out_null_needs_test_rows() -> None:
    with pytest.raises(MeasurementError, match="test"):
        sign_flip_null(np.ones((3, 2)))


# ---------------------------------------------------------------------------------- shares


def test_a_proportion_is_scipys_wilson_interval() -> None:
    rng = np.random.default_rng(11)
    for share in (0.0, 0.04, 0.5, 1.0):
        rows = (rng.random(50) < share).astype(float)
        found = proportion(rows, confidence=0.9)
        assert found is not None
        wanted = binomtest(int(rows.sum()), 50).proportion_ci(0.9, method="wilson")
        assert (found.value, found.n) == (rows.mean(), 50)
        assert ends(found) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_a_proportion_counts_conversations_ties_and_what_is_defined() -> None:
    rows = np.array([1.0, 0.5, np.nan, 0.0, 1.0, 1.0])
    found = proportion(rows, ["a", "a", "b", "c", "c", "d"])
    # by hand: 3.5 of 5 hold; 1.5, 1, 1 of 2, 2, 1 rows (b has none that is defined); residuals
    # 0.1, -0.4, 0.3; variance 3/2 · 0.26 / 25; 0.21 / that, times (1.95996 / 4.30265)², is 2.793,
    # and least 25/9 = 2.778
    trials = 0.21 / (1.5 * 0.26 / 25) * (norm.ppf(0.975) / t.ppf(0.975, 2)) ** 2
    assert trials == pytest.approx(2.793, abs=1e-3)
    expected = wilson(3.5, 5, trials)
    assert found is not None
    assert (found.value, found.n) == (0.7, 5)
    assert ends(found) == pytest.approx(ends(expected), abs=1e-12)
    alike = proportion(np.array([1.0, 1.0, 0.0, 0.0]), ["a", "a", "b", "b"])
    assert alike == wilson(2, 4, 2), "two answers, each told twice"
    apart = proportion(np.array([1.0, 0.0] * 20), [i // 2 for i in range(40)])
    assert apart == wilson(20, 40, 20), "nothing varies between conversations: the safe side"
    none = proportion(np.zeros(6), ["a", "a", "a", "b", "b", "c"])
    assert none == wilson(0, 6, 36 / 14)
    assert proportion(np.array([0.5, 0.5])) == Interval(0.5, 0.5, 0.5, 2), "ties alone are exact"
    assert proportion(np.array([math.nan])) is None
    with pytest.raises(MeasurementError, match="counts rows as 1, 0 or"):
        proportion(np.array([0.3]))


# ---------------------------------------------------------------------------------- spectra


def test_infinitesimal_jackknife_equals_finite_differences() -> None:
    """The slope of each measure in the weight of a conversation, by moving that weight."""
    rows = RNG.standard_normal((12, 7)) * np.arange(1, 8) + 1.0
    keys = [i // 2 for i in range(12)]
    found = spectral_intervals(rows, keys, confidence=0.95)
    quantile = 2.5705818366147395  # Student's t, 5 degrees of freedom, 97.5 %
    for intervals, target in zip(found, (rows, measures.centred(rows)), strict=True):
        functions: dict[str, Callable[[np.ndarray], float]] = {
            "entropy": lambda s: measures.entropy(s, 2),
            "entropy_p1": lambda s: measures.entropy(s, 1),
            "participation_ratio": lambda s: math.log(measures.participation_ratio(s)),
        }
        for name, function in functions.items():
            slopes = []
            for key in range(6):
                moved = []
                for step in (1e-5, -1e-5):
                    weights = 1 + step * (np.array(keys) == key)
                    moved.append(
                        function(measures.singular_values(np.sqrt(weights)[:, None] * target))
                    )
                slopes.append((moved[0] - moved[1]) / 2e-5)
            error = math.sqrt(6 / 5 * math.fsum(slope**2 for slope in slopes))
            low, high = ends(getattr(intervals, name))
            value = getattr(intervals, name).value
            if name.startswith("entropy"):
                expected = (value - quantile * error, value + quantile * error)
                limit = (0.0, math.log(7))
            else:
                expected = (value * math.exp(-quantile * error), value * math.exp(quantile * error))
                limit = (1.0, 7.0)
            # central differences of step 1e-5 are good to about 1e-9
            assert low == pytest.approx(max(expected[0], limit[0]), rel=1e-6)
            assert high == pytest.approx(min(expected[1], limit[1]), rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(12, 40), (48, 7)])
def test_the_first_two_directions_spread_as_resampled_rows_do(n: int, d: int) -> None:
    """Against the singular values of each resampled matrix, rows repeated as they were drawn."""
    rows = RNG.standard_normal((n, d)) * np.arange(1, d + 1) + 1.0
    keys = [i // 2 for i in range(n)]
    found = spectral_intervals(rows, keys, draws=50, seed=3)
    drawn = draw_counts(n // 2, 50, np.random.default_rng(3)).astype(int)
    resampled = [np.concatenate([rows[2 * c : 2 * c + 2] for c in np.repeat(range(n // 2), count)])
                 for count in drawn]  # fmt: skip
    quantile = float(t.ppf(0.975, n // 2 - 1))
    functions: dict[str, tuple[Callable[[np.ndarray], float], float, float]] = {
        "sigma_ratio": (lambda s: math.log(s[1] / s[0]), 0.0, 1.0),
        "stable_rank": (lambda s: math.log(measures.stable_rank(s)), 1.0, min(n, d)),
    }
    for intervals, matrices in zip(
        found, (resampled, [measures.centred(one) for one in resampled]), strict=True
    ):
        for name, (function, least, most) in functions.items():
            error = float(np.std([function(measures.singular_values(m)) for m in matrices], ddof=1))
            interval = getattr(intervals, name)
            grown = math.exp(quantile * error)
            # both are float64: the Gram matrix halves the digits, at most 1e-7
            assert interval.low == pytest.approx(max(least, interval.value / grown), rel=1e-6)
            assert interval.high == pytest.approx(min(most, interval.value * grown), rel=1e-6)


def test_the_first_two_are_found_among_the_leading_directions() -> None:
    """More directions than are looked at: 60 rows of flat noise under a shift."""
    rows = RNG.standard_normal((60, 200)) + 0.3
    drawn = draw_counts(60, 100, np.random.default_rng(0))
    ratios = []
    for count in drawn.astype(int):
        s = measures.singular_values(np.repeat(rows, count, axis=0))
        ratios.append(math.log(s[1] / s[0]))
    found = spectral_intervals(rows, draws=100)[0].sigma_ratio
    low, high = ends(found)
    grown = math.exp(float(t.ppf(0.975, 59)) * float(np.std(ratios, ddof=1)))
    # half of the directions are left out; what turns towards them is a few hundredths of the width
    assert high / low == pytest.approx(grown**2, rel=0.02)


@pytest.mark.parametrize(("n", "d"), [(15, 40), (40, 15)])
def test_spectral_values_are_those_of_the_spectrum(n: int, d: int) -> None:
    rows = RNG.standard_normal((n, d)) + 0.5
    both = spectra(rows)
    given = spectral_intervals(rows, power=1, measured=both)
    assert given == spectral_intervals(rows, power=1)
    for found, spectrum in zip(given, both, strict=True):
        for name in ("effective_rank", "participation_ratio", "stable_rank", "sigma_ratio"):
            ends(getattr(found, name))
            assert getattr(found, name).value == getattr(spectrum, name)
        assert found.entropy == found.entropy_p1
        assert found.entropy_normalised is not None
        assert found.entropy_normalised.value == spectrum.entropy(1, normalised=True)
        assert ends(found.entropy_normalised) == pytest.approx(
            tuple(end / math.log(15) for end in ends(found.entropy))
        )


def test_undefined_spectra_have_no_intervals() -> None:
    constant = np.tile([1.0, 2.0, 3.0], (6, 1))
    uncentred, centred = spectral_intervals(constant)
    assert ends(uncentred.stable_rank) == pytest.approx((1, 1))
    ratio = uncentred.sigma_ratio
    assert ratio is not None
    assert ratio.value == pytest.approx(0, abs=1e-7), "the Gram matrix halves the digits"
    assert (ratio.low, ratio.high) == (None, None), "no draw has a second direction"
    for rows in (2, 3):  # too many draws hold one row alone, or two, which centred are a line
        few = spectral_intervals(RNG.standard_normal((rows, 5)))[rows - 2].sigma_ratio
        assert few is not None
        assert (few.low, few.high) == (None, None)
    alone = spectral_intervals(RNG.standard_normal((5, 3)), ["a"] * 5)[0].sigma_ratio
    assert alone is not None
    assert (alone.low, alone.high) == (None, None), "one conversation has no spread"
    assert vars(centred) == dict.fromkeys(vars(centred))
    shares = share_intervals(np.zeros((4, 2)))
    assert (shares.plain, shares.debiased) == (None, None)


def test_share_intervals_equal_a_loop() -> None:
    rows = RNG.standard_normal((12, 5)) + 0.5
    keys = ["c%d" % (i % 4) for i in range(12)]  # noqa: UP031
    found = share_intervals(rows, keys)
    whole = shared_share(rows)
    for name in ("plain", "debiased"):
        left = []
        for key in sorted(set(keys)):
            kept = rows[[k != key for k in keys]]
            left.append(measures.shared_share(kept)[name == "debiased"])
        error = math.sqrt(3 / 4 * float(np.square(np.array(left) - np.mean(left)).sum()))
        half = 3.182446305284263 * error  # Student's t, 3 degrees of freedom
        interval = getattr(found, name)
        low, high = ends(interval)
        assert interval.value == getattr(whole, name)
        least = 0.0 if name == "plain" else -1.0
        assert low == pytest.approx(max(least, interval.value - half), abs=1e-12)
        assert high == pytest.approx(min(1.0, interval.value + half), abs=1e-12)


# ---------------------------------------------------------------------------------- coverage


def sample(rng: np.random.Generator, n: int) -> np.ndarray:
    """A shared shift with uneven noise, two rows a conversation."""
    d = 16
    shift = np.linspace(-1, 1, d)
    own = np.repeat(rng.standard_normal((n // 2, d)), 2, axis=0)
    return shift + 0.7 * (own + rng.standard_normal((n, d))) * np.linspace(0.3, 1.7, d)


def test_intervals_cover_what_they_are_for() -> None:
    """95 % intervals over 150 data sets cover the expected value at this N.

    The count is binomial: 0.95 ± 3 · 0.018. Some schemes here err on the wide side (jackknife of
    spectra), and percentiles of 150 draws on the narrow one; so 0.88 is asked for, and for the
    widths no more than 2 times the true spread.
    """
    rng = np.random.default_rng(7)
    n, m = 60, 40
    keys, test_keys = [i // 2 for i in range(n)], [i // 2 for i in range(m)]

    def measure(fit: np.ndarray, test: np.ndarray) -> dict[str, float]:
        share = shared_share(fit)
        values = {
            "held_out": float(cosine_to(test, fit.mean(axis=0)).mean()),
            "in_sample": float(cosine_to_mean(fit).mean()),
            "leave_one_out": float(cosine_to_mean(fit, "leave_one_out").mean()),
            "plain": share.plain or 0.0,
            "debiased": share.debiased or 0.0,
        }
        for name, found in zip(("uncentred", "centred"), spectra(fit), strict=True):
            values[f"{name} entropy"] = found.entropy() or 0.0
            values[f"{name} effective_rank"] = found.effective_rank or 0.0
            values[f"{name} participation_ratio"] = found.participation_ratio or 0.0
            values[f"{name} stable_rank"] = found.stable_rank or 0.0
            values[f"{name} sigma_ratio"] = found.sigma_ratio or 0.0
        return values

    drawn = [measure(sample(rng, n), sample(rng, m)) for _ in range(800)]
    truth = {name: float(np.mean([one[name] for one in drawn])) for name in drawn[0]}
    spread = {name: float(np.std([one[name] for one in drawn])) for name in drawn[0]}
    hits = dict.fromkeys(truth, 0)
    widths = dict.fromkeys(truth, 0.0)
    count = 150
    for seed in range(count):
        fit, test = sample(rng, n), sample(rng, m)
        shares = share_intervals(fit, keys)
        found = {
            "held_out": held_out_cosine(fit, test, keys, test_keys, draws=150, seed=seed),
            "in_sample": mean_cosine(fit, "in_sample", keys, draws=150, seed=seed),
            "leave_one_out": mean_cosine(fit, "leave_one_out", keys, draws=150, seed=seed),
            "plain": shares.plain,
            "debiased": shares.debiased,
        }
        for name, intervals in zip(
            ("uncentred", "centred"), spectral_intervals(fit, keys), strict=True
        ):
            found[f"{name} entropy"] = intervals.entropy
            found[f"{name} effective_rank"] = intervals.effective_rank
            found[f"{name} participation_ratio"] = intervals.participation_ratio
            found[f"{name} stable_rank"] = intervals.stable_rank
            found[f"{name} sigma_ratio"] = intervals.sigma_ratio
        for name, interval in found.items():
            low, high = ends(interval)
            hits[name] += low <= truth[name] <= high
            widths[name] += (high - low) / (2 * 1.96) / count
    for name in truth:
        assert hits[name] / count >= 0.88, (name, hits[name] / count)
        assert widths[name] < 2 * spread[name], (name, widths[name], spread[name])


def test_bootstrap_of_a_spectrum_would_miss() -> None:
    """Why spectra are not bootstrapped: repeated rows lower the entropy below its value."""
    rng = np.random.default_rng(8)
    rows = rng.standard_normal((60, 100))
    value = spectra(rows)[0].entropy()
    drawn = [spectra(rows[rng.integers(0, 60, 60)])[0].entropy() for _ in range(50)]
    assert max(entropy or 0 for entropy in drawn) < (value or 0)


# ---------------------------------------------------------------------------------- convergence


def test_convergence_of_a_shift_in_noise() -> None:
    """cos(v_a, v_b) ≈ ‖μ‖² / (‖μ‖² + tr Σ / n): with ‖μ‖ = 1 and tr Σ = 10, n / (n + 10)."""
    rng = np.random.default_rng(9)
    d = 1000
    mu = np.zeros(d)
    mu[0] = 1
    rows = mu + rng.standard_normal((400, d)) * math.sqrt(10 / d)
    points = convergence(rows, [10, 50, 200], draws=40)
    assert [point.n for point in points] == [10, 50, 200]
    for point in points:
        # the norms' own fluctuation and 40 draws of one data set leave about 0.03
        assert point.cosine == pytest.approx(point.n / (point.n + 10), abs=0.05)
        assert point.low <= point.cosine <= point.high
    assert points[0].json() == {
        "n": 10,
        "cosine": points[0].cosine,
        "low": points[0].low,
        "high": points[0].high,
    }


def test_samples_are_disjoint_and_conversations_whole() -> None:
    """Each conversation has its own axis: a shared one would show as a positive cosine."""
    keys = [i // 3 for i in range(30)]
    rows = np.eye(10)[keys]
    for point in convergence(rows, [3, 6, 15], keys, draws=30):
        if point.n % 3 == 0 and point.n < 15:
            assert (point.cosine, point.low, point.high) == (0, 0, 0)
    apart = convergence(np.eye(30), [1, 15], draws=30)
    assert [point.high for point in apart] == [0, 0]


def test_convergence_sizes() -> None:
    assert convergence_sizes(512) == [8, 16, 32, 64, 128, 256]
    assert convergence_sizes(100) == [8, 16, 32, 50]
    assert convergence_sizes(10) == [5]
    assert convergence_sizes(1) == []
    assert convergence(np.ones((1, 3))) == []
    assert convergence(np.zeros((20, 3))) == []
    with pytest.raises(MeasurementError, match="sample size 11: expected 1 to 10"):
        convergence(np.ones((20, 3)), [11])
