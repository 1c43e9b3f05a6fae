"""Intervals by conversation: rows of one conversation stay together.

``clusters`` gives one conversation key a row; None lets each row stand alone. Five schemes:

- **Shares of yes and no**: Wilson's interval (:func:`proportion`), which keeps a width at 0 and 1.
- **Means over rows** (and ratios of sums): percentile bootstrap over conversations, widened for few
  of them (:func:`percentiles`). In our simulation (``benchmarks/coverage.py``) 20 conversations of
  normal rows cover 94% so, of log-normal ones 90-92%, and 88-92% without; 128 cover 93-95%.
- **Cosines with v refitted in each draw**: bootstrap over conversations, recentred on the estimate.
  A resampled fit holds some conversations several times, so its v has twice the noise of a fit on N
  rows, which shifts all draws by one first-order amount. The interval is for a v fitted on this N.
  That noise also makes draws spread more, so these are not widened: 20 conversations cover 95-98%
  held out and leaving one out, 92% in-sample.
- **Spectra and shares**: jackknife over conversations. Resampling with replacement fails here:
  repeated rows lower the rank, and the interval misses the value that it is for (covering 0-50% of
  the time in our simulation of shifted noise, N = 60-200, instead of 95%); half-samples saturate
  (75-95%). Leaving out one conversation at a time keeps the spectrum as it is, and errs on the wide
  side (Efron & Stein 1981): 85-100%, 85% where a few long rows dominate 60 others. For spectra its
  limit of small weights is used (infinitesimal jackknife), which needs one eigendecomposition: with
  D = UΣVᵀ and weights wᵢ on the rows, ∂(σ_j²)/∂wᵢ = σ_j² U²ᵢⱼ.
- **The first two singular values** (σ₂/σ₁, stable rank): standard errors of a bootstrap, around the
  estimate. Where the two lie near each other they swap places from draw to draw, and slopes at one
  of them, which can't know that, are too steep. Repeated rows move the level of a draw, which is
  taken off, and hardly its spread.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor

from dsteer.errors import MeasurementError
from dsteer.geometry.displacement import (
    SharedShare,
    as_matrix,
    as_numbers,
    share_from_sums,
    shared_share,
)
from dsteer.geometry.spectrum import Spectrum, spectra

Clusters = Sequence[Hashable] | None

_BLOCK = 2**22
"""Numbers (draws × rows) that a block of draws holds at once."""

_LEADING = 32
"""Directions among which the first two of a resampled matrix are looked for."""

_KNOWN = 0.9
"""Share of the draws that must have a second direction for σ₂/σ₁ to have an interval."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        value: the estimate on the rows as they are.
        low: lower end; None where one conversation leaves nothing to vary.
        high: upper end, likewise.
        n: rows that the estimate rests on.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    def json(self) -> dict[str, float | int | None]:
        """``{"value", "low", "high", "n"}``."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


# ---------------------------------------------------------------------------------- shares


def wilson(
    successes: float | int, n: int, effective_n: float | int, confidence: float = 0.95
) -> Interval:
    """Wilson's score interval of a share: it stays honest at 0 and 1, where a bootstrap collapses.

    Args:
        successes: how many of n; a tie may count as ½.
        n: trials.
        effective_n: independent trials (conversations), from which the width comes.
        confidence: coverage asked for.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, m = successes / n, effective_n
    centre = (p + z * z / (2 * m)) / (1 + z * z / m)
    half = z / (1 + z * z / m) * math.sqrt(p * (1 - p) / m + z * z / (4 * m * m))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Interval(p, min(p, low), max(p, high), n)  # at 0 and 1 rounding would leave p outside


def proportion(
    values: Float[Tensor, " n"] | Float[np.ndarray, " n"],
    clusters: Clusters = None,
    *,
    confidence: float = 0.95,
) -> Interval | None:
    """Share of rows that hold: Wilson's interval of as many trials as the rows are worth.

    That is p(1 − p) over the variance of the share between conversations, with Student's quantile
    in place of the normal one, at most n and at least (Σ n_c)² / Σ n_c², where the n_c rows of a
    conversation are one answer; the latter where the share is 0 or 1. One row a conversation: n.
    A conversation that outweighs the others leaves little to tell, whatever the width. Source:
    Korn & Graubard (1998), with Wilson's interval in place of Clopper and Pearson's.

    Args:
        values: 1 where it holds, 0 where not, ½ at a tie; NaN where it is undefined, left out.
        clusters: conversation key of each row.
        confidence: coverage asked for.

    Returns:
        None where no value is defined; nothing but ties is no trial and has no width.

    Raises:
        MeasurementError: another value, or not one cluster key a value.
    """
    numbers = as_numbers(values, "values")
    known = numbers[~np.isnan(numbers)]
    if not np.isin(known, (0.0, 0.5, 1.0)).all():
        raise MeasurementError("a share counts rows as 1, 0 or, at a tie, ½: other values are here")
    codes, _ = _codes(clusters, len(numbers))
    n = len(known)
    if not n:
        return None
    if (known == 0.5).all():
        return Interval(0.5, 0.5, 0.5, n)
    held = np.bincount(codes, np.nan_to_num(numbers))
    trials = _trials(held, np.bincount(codes, ~np.isnan(numbers)), confidence)
    return wilson(float(known.sum()), n, trials, confidence)


def _trials(held: np.ndarray, sizes: np.ndarray, confidence: float) -> float:
    """How many independent rows conversations are worth, from what holds in each and its rows."""
    n, p = float(sizes.sum()), float(held.sum() / sizes.sum())
    least, count = n**2 / float(np.square(sizes).sum()), int((sizes > 0).sum())
    if count < 2:
        return least
    between = count / (count - 1) * float(np.square(held - p * sizes).sum()) / n**2
    if between <= 0:
        return least
    tail = (1 + confidence) / 2
    shrunk = NormalDist().inv_cdf(tail) / float(student.ppf(tail, count - 1))
    return min(n, max(least, p * (1 - p) / between * shrunk**2))


# ---------------------------------------------------------------------------------- means


def bootstrap_mean(
    values: Float[Tensor, " n"] | Float[np.ndarray, " n"],
    clusters: Clusters = None,
    *,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """Mean of the defined values (NaN: undefined, left out), bootstrap over conversations.

    Returns:
        None where no value is defined.

    Raises:
        MeasurementError: not one cluster key a value.
    """
    numbers = as_numbers(values, "values")
    defined = ~np.isnan(numbers)
    return bootstrap_ratio(
        torch.from_numpy(np.where(defined, numbers, 0.0)),
        torch.from_numpy(defined.astype(np.float64)),
        clusters,
        draws=draws,
        confidence=confidence,
        seed=seed,
    )


def bootstrap_ratio(
    numerators: Float[Tensor, " n"] | Float[np.ndarray, " n"],
    denominators: Float[Tensor, " n"] | Float[np.ndarray, " n"],
    clusters: Clusters = None,
    *,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """ΣA / ΣB, percentile bootstrap over conversations; ``n`` counts the rows with B ≠ 0.

    Returns:
        None where ΣB is 0.

    Raises:
        MeasurementError: not one cluster key a row, or numbers that are not finite.
    """
    above, below = as_numbers(numerators, "numerators"), as_numbers(denominators, "denominators")
    if above.shape != below.shape:
        raise MeasurementError(f"{above.size} numerators for {below.size} denominators")
    if not (np.isfinite(above).all() and np.isfinite(below).all()):
        raise MeasurementError("numerators and denominators: some are not finite")
    if below.sum() == 0:
        return None
    value, n = float(above.sum() / below.sum()), int(np.count_nonzero(below))
    codes, count = _codes(clusters, below.size)
    sums = _sum_by(codes, count, np.stack([above, below], axis=1))
    sums = sums[sums.any(axis=1)]  # a conversation without a defined row is none
    if len(sums) < 2:
        return Interval(value, None, None, n)
    drawn = bootstrap_sums(sums, draws, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = drawn[:, 0] / drawn[:, 1]
    low, high = percentiles(ratios[np.isfinite(ratios)], confidence, len(sums))
    return Interval(value, low, high, n)


# ---------------------------------------------------------------------------------- cosines


def held_out_cosine(
    fit: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    test: Float[Tensor, "m d"] | Float[np.ndarray, "m d"],
    fit_clusters: Clusters = None,
    test_clusters: Clusters = None,
    *,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """Mean over test rows of cos(Δ, v), v the mean of the fit rows, refitted in each draw.

    Conversations of both splits are resampled.

    Returns:
        None where it is undefined: v = 0, or all test rows zero (zero rows are left out).

    Raises:
        MeasurementError: malformed or non-finite input, or different widths.
    """
    fitted, tested = _pair(fit, test)
    norms = np.linalg.norm(tested, axis=1)
    kept = norms > 0
    total = fitted.sum(axis=0)
    if not total.any() or not kept.any():
        return None
    unit = tested / np.where(kept, norms, 1.0)[:, None]
    n = int(kept.sum())
    value = float((unit @ (total / np.linalg.norm(total))).sum()) / n
    fit_codes, fit_count = _codes(fit_clusters, len(fitted))
    test_codes, test_count = _codes(test_clusters, len(tested))
    return refitted(
        value,
        n,
        _sum_by(fit_codes, fit_count, fitted),
        _sum_by(test_codes, test_count, unit),
        np.bincount(test_codes, kept, test_count),
        draws=draws,
        confidence=confidence,
        seed=seed,
    )


def refitted(
    value: float,
    n: int,
    fit: np.ndarray,
    unit: np.ndarray,
    sizes: np.ndarray,
    *,
    draws: int,
    confidence: float,
    seed: int,
) -> Interval:
    """The interval of a mean held-out cosine, from sums by conversation alone.

    Args:
        value: the mean cosine.
        n: rows that it rests on.
        fit: Σ Δ of each fit conversation (c, d).
        unit: Σ Δ/‖Δ‖ of each test conversation (c', d).
        sizes: rows in each of these sums (c',).
        draws: resamples.
        confidence: coverage asked for.
        seed: of the resamples.
    """
    if len(fit) < 2 or len(unit) < 2:
        return Interval(value, None, None, n)
    rng = np.random.default_rng(seed)
    v = draw_counts(len(fit), draws, rng) @ fit
    counts = draw_counts(len(unit), draws, rng)
    summed = counts @ unit  # Σ cos(Δ, v) = ⟨Σ Δ/‖Δ‖, v/‖v‖⟩
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.einsum("bd,bd->b", v, summed) / (np.linalg.norm(v, axis=1) * (counts @ sizes))
    return recentred(value, means, confidence, n)


def mean_cosine(
    delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    mode: Literal["in_sample", "leave_one_out"] = "in_sample",
    clusters: Clusters = None,
    *,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """Mean over rows of the in-sample or leave-one-out cosine, v refitted in each draw.

    In a draw, leave-one-out leaves out every copy of row i.

    Returns:
        None where no cosine is defined.

    Raises:
        MeasurementError: malformed or non-finite input.
    """
    rows = as_matrix(delta, "delta")
    own = _own_cosines(rows, np.ones((1, len(rows))), mode)[0]
    defined = ~np.isnan(own)
    if not defined.any():
        return None
    value, n = float(own[defined].mean()), int(defined.sum())
    codes, count = _codes(clusters, len(rows))
    if count < 2:
        return Interval(value, None, None, n)
    drawn = draw_counts(count, draws, np.random.default_rng(seed))
    means = []
    for counts in np.array_split(drawn, math.ceil(draws * len(rows) / _BLOCK)):
        weights = counts[:, codes]
        cosines = _own_cosines(rows, weights, mode)
        weights = np.where(np.isnan(cosines), 0.0, weights)
        with np.errstate(divide="ignore", invalid="ignore"):
            means.append((weights * np.nan_to_num(cosines)).sum(axis=1) / weights.sum(axis=1))
    return recentred(value, np.concatenate(means), confidence, n)


def sign_flip_null(
    fit: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    test: Float[Tensor, "m d"] | Float[np.ndarray, "m d"] | None = None,
    mode: Literal["in_sample", "leave_one_out", "held_out"] = "held_out",
    fit_clusters: Clusters = None,
    test_clusters: Clusters = None,
    *,
    draws: int = 200,
    seed: int = 0,
) -> Float[Tensor, "draws rows"]:
    """Cosines under the null of no shared direction: each conversation's Δ gets a random sign.

    Signs are drawn for fit and test conversations alike, and v is refitted. Row means give the null
    of the mean cosine, one a draw; all entries together that of the histogram.

    Args:
        fit: rows that v is fitted on.
        test: rows whose cosines are taken, for ``held_out``; the other modes take the fit rows.
        mode: which cosine.
        fit_clusters: conversation key of each fit row.
        test_clusters: conversation key of each test row.
        draws: random sign patterns.
        seed: of the signs.

    Returns:
        float64 (draws, rows); NaN where a cosine is undefined.

    Raises:
        MeasurementError: malformed or non-finite input, or ``held_out`` without test rows.
    """
    rng = np.random.default_rng(seed)
    if mode != "held_out":
        rows = as_matrix(fit, "fit")
        return torch.from_numpy(
            _own_cosines(rows, _signs(rng, fit_clusters, len(rows), draws), mode)
        )
    if test is None:
        raise MeasurementError("held-out cosines need test rows; give test=…")
    fitted, tested = _pair(fit, test)
    v = _signs(rng, fit_clusters, len(fitted), draws) @ fitted
    signs = _signs(rng, test_clusters, len(tested), draws)
    norms = _lengths(v, fitted)[:, None] * np.linalg.norm(tested, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = signs * (v @ tested.T) / norms
    return torch.from_numpy(np.where(norms > 0, np.clip(cosines, -1.0, 1.0), np.nan))


def _own_cosines(rows: np.ndarray, weights: np.ndarray, mode: str) -> np.ndarray:
    """cos(wᵢΔᵢ, Σ wⱼΔⱼ) (b, n) for weights (b, n), with j = i left out or not; NaN: undefined."""
    totals = weights @ rows
    norms = np.linalg.norm(rows, axis=1)
    dots = totals @ rows.T
    lengths = _lengths(totals, rows)[:, None]
    if mode == "leave_one_out":
        own = weights * norms**2
        squares = lengths**2 - 2 * weights * dots + weights * own
        # what is left after taking the row off must stand out from rounding
        lengths = np.sqrt(np.where(squares > 1e-13 * lengths**2, squares, 0.0))
        dots = dots - own
    product = lengths * norms
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.sign(weights) * dots / product
    return np.where(product > 0, np.clip(cosines, -1.0, 1.0), np.nan)


def _lengths(totals: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Norms of sums of signed rows; 0 where the rows cancelled and only rounding is left."""
    lengths = np.linalg.norm(totals, axis=1)
    rounding = len(rows) * np.finfo(np.float64).eps * np.linalg.norm(rows)
    return np.where(lengths > rounding, lengths, 0.0)


# ---------------------------------------------------------------------------------- spectra, shares


@dataclass(frozen=True)
class SpectralIntervals:
    """Intervals of what is read off one spectrum; each None where undefined.

    Entropies are in nats; ``entropy`` has the power asked for, ``entropy_normalised`` divides it by
    ln min(N, d). Ranks and σ₂/σ₁ have their intervals on the logarithm. Jackknife, but for
    ``stable_rank`` and ``sigma_ratio``: bootstrap.
    """

    entropy: Interval | None
    entropy_p1: Interval | None
    entropy_normalised: Interval | None
    effective_rank: Interval | None
    participation_ratio: Interval | None
    stable_rank: Interval | None
    sigma_ratio: Interval | None

    @classmethod
    def without_ends(cls, spectrum: Spectrum, power: int | float = 2) -> SpectralIntervals:
        """The values alone, where nothing is known of single conversations."""

        def bare(value: float | None) -> Interval | None:
            return None if value is None else Interval(value, None, None, spectrum.n)

        return cls(
            entropy=bare(spectrum.entropy(power)),
            entropy_p1=bare(spectrum.entropy(1)),
            entropy_normalised=bare(spectrum.entropy(power, normalised=True)),
            effective_rank=bare(spectrum.effective_rank),
            participation_ratio=bare(spectrum.participation_ratio),
            stable_rank=bare(spectrum.stable_rank),
            sigma_ratio=bare(spectrum.sigma_ratio),
        )


def spectral_intervals(
    delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    clusters: Clusters = None,
    *,
    power: int | float = 2,
    confidence: float = 0.95,
    measured: tuple[Spectrum, Spectrum] | None = None,
    draws: int = 200,
    seed: int = 0,
) -> tuple[SpectralIntervals, SpectralIntervals]:
    """Intervals for the (uncentred, centred) spectrum, by conversation.

    Args:
        delta: the states (n, d).
        clusters: conversation key of each row.
        power: p of the entropy.
        confidence: coverage asked for.
        measured: ``spectra(delta)``, where the caller has it already.
        draws: resamples for σ₂/σ₁ and the stable rank.
        seed: of the resamples.

    Raises:
        MeasurementError: malformed or non-finite input.
    """
    rows = as_matrix(delta, "delta")
    codes, count = _codes(clusters, len(rows))
    drawn = draw_counts(count, draws, np.random.default_rng(seed))[:, codes]
    uncentred, centred = measured if measured is not None else spectra(torch.from_numpy(rows))
    return (
        _spectral(uncentred, rows, codes, count, drawn, power, confidence),
        _spectral(centred, rows - rows.mean(axis=0), codes, count, drawn, power, confidence),
    )


def _spectral(
    spectrum: Spectrum,
    rows: np.ndarray,
    codes: np.ndarray,
    count: int,
    drawn: np.ndarray,
    power: int | float,
    confidence: float,
) -> SpectralIntervals:
    bare = SpectralIntervals.without_ends(spectrum, power)
    if spectrum.first_right is None or count < 2:
        return bare
    k = len(spectrum.singular_values)
    energy, scores = _principal(rows)
    loading = np.divide(scores**2, energy, out=np.zeros_like(scores), where=energy > 0)  # U²
    quantile = float(student.ppf((1 + confidence) / 2, count - 1))

    def jackknife(slopes: np.ndarray) -> float:
        """Standard error of f from its slopes σ_j² ∂f/∂(σ_j²)."""
        influence = np.bincount(codes, loading @ slopes, count)
        return math.sqrt(count / (count - 1) * float(influence @ influence))

    def entropy_slopes(p: int | float) -> np.ndarray:
        weights = (energy / energy[0]) ** (p / 2)
        q = weights / weights.sum()
        logs = np.log(np.where(q > 0, q, 1.0))
        return np.asarray(-(p / 2) * q * (logs - float(q @ logs)))

    def added(found: Interval | None, error: float, most: float) -> Interval | None:
        if found is None:
            return None
        half = quantile * error
        return replace(found, low=max(0.0, found.value - half), high=min(most, found.value + half))

    def scaled(
        found: Interval | None, error: float | None, least: float, most: float
    ) -> Interval | None:
        if found is None or error is None:
            return found
        grown = math.exp(min(quantile * error, 700.0))
        return replace(
            found, low=max(least, found.value / grown), high=min(most, found.value * grown)
        )

    q = energy / energy.sum()
    ranks = 2 * q * (1 - q / float(q @ q))
    by_power, by_one = jackknife(entropy_slopes(power)), jackknife(entropy_slopes(1))
    scale = math.log(k) if k > 1 else 1.0
    ratio, stable = _first_two(rows, scores[:, :_LEADING], drawn, spectrum.centred)
    return SpectralIntervals(
        entropy=added(bare.entropy, by_power, scale),
        entropy_p1=added(bare.entropy_p1, by_one, scale),
        entropy_normalised=added(bare.entropy_normalised, by_power / scale, 1.0),
        effective_rank=scaled(bare.effective_rank, by_one, 1.0, float(k)),
        participation_ratio=scaled(bare.participation_ratio, jackknife(ranks), 1.0, float(k)),
        stable_rank=scaled(bare.stable_rank, stable, 1.0, float(k)),
        sigma_ratio=scaled(bare.sigma_ratio, ratio, 0.0, 1.0),
    )


def _principal(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """σ² (k,), descending, and the scores UΣ (n, k), through the smaller Gram matrix."""
    n, d = rows.shape
    energy, vectors = np.linalg.eigh(rows @ rows.T if n <= d else rows.T @ rows)
    energy, vectors = np.clip(energy[::-1], 0.0, None), vectors[:, ::-1]
    if n <= d:
        return energy, vectors * np.sqrt(energy)
    scores = rows @ vectors
    return np.einsum("nk,nk->k", scores, scores), scores


def _first_two(
    rows: np.ndarray, scores: np.ndarray, drawn: np.ndarray, centred: bool
) -> tuple[float | None, float | None]:
    """Standard errors of ln σ₂/σ₁ and of ln stable rank, over weights (draws, n) on the rows.

    The weighted matrix is looked at within the first directions of the unweighted one, given by
    their scores (n, k). Where singular values decay that changes nothing; where hundreds are nearly
    equal, a draw's first two turn towards directions that are left out, and errors are down to a
    third of those of whole draws, which overstate the spread there (``benchmarks/coverage.py``).
    None where too many draws have no second direction, as of two or three rows.
    """
    energies = np.empty((len(drawn), scores.shape[1]))
    for draw, weights in enumerate(drawn):
        gram = scores.T @ (weights[:, None] * scores)
        if centred:
            total = weights @ scores
            gram -= np.outer(total, total) / weights.sum()
        energies[draw] = np.linalg.eigvalsh(gram)[::-1]
    whole = drawn @ np.einsum("nd,nd->n", rows, rows)
    if centred:
        whole -= np.square(drawn @ rows).sum(axis=1) / drawn.sum(axis=1)
    first = energies[:, 0]
    second = energies[:, 1] if energies.shape[1] > 1 else np.zeros_like(first)
    rounding = len(rows) * np.finfo(np.float64).eps * float(np.square(rows).sum())

    def error(above: np.ndarray) -> float | None:
        known = (first > rounding) & (above > rounding)
        if known.mean() < _KNOWN:
            return None
        return float(np.log(above[known] / first[known]).std(ddof=1))

    ratio = error(second)
    return None if ratio is None else ratio / 2, error(whole)


@dataclass(frozen=True)
class ShareIntervals:
    """Jackknife intervals of the shared share; None where undefined."""

    plain: Interval | None
    debiased: Interval | None


def share_intervals(
    delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    clusters: Clusters = None,
    *,
    confidence: float = 0.95,
) -> ShareIntervals:
    """Jackknife intervals of m = N‖v‖²/‖D‖_F², plain and debiased (see ``shared_share``).

    Each conversation is left out in turn; the interval is value ± t · standard error.

    Raises:
        MeasurementError: malformed or non-finite input.
    """
    rows = as_matrix(delta, "delta")
    codes, count = _codes(clusters, len(rows))
    value = shared_share(torch.from_numpy(rows))
    squares = np.einsum("nd,nd->n", rows, rows)
    return jackknife_shares(
        value,
        _sum_by(codes, count, rows),
        np.bincount(codes, squares, count),
        np.bincount(codes, minlength=count),
        confidence,
    )


def jackknife_shares(
    value: SharedShare, sums: np.ndarray, squares: np.ndarray, sizes: np.ndarray, confidence: float
) -> ShareIntervals:
    """Intervals of the shared share, from Σ Δ (c, d), Σ ‖Δ‖² and rows of each conversation."""
    left_sums = sums.sum(axis=0) - sums
    left_squares = squares.sum() - squares
    left, n = sizes.sum() - sizes, int(sizes.sum())
    shares = [
        share_from_sums(float(total), float(square), int(size))
        for total, square, size in zip(
            np.einsum("cd,cd->c", left_sums, left_sums), left_squares, left, strict=True
        )
        if size > 0
    ]
    return ShareIntervals(
        _jackknifed(value.plain, [s.plain for s in shares], 0.0, n, confidence),
        _jackknifed(value.debiased, [s.debiased for s in shares], -1.0, n, confidence),
    )


def _jackknifed(
    value: float | None, left_out: Sequence[float | None], least: float, n: int, confidence: float
) -> Interval | None:
    if value is None:
        return None
    known = np.array([item for item in left_out if item is not None])
    return jackknifed(value, known, n, confidence, least=least, most=1.0)


def jackknifed(
    value: float | np.ndarray,
    left_out: np.ndarray,
    n: int,
    confidence: float,
    *,
    least: float = -math.inf,
    most: float = math.inf,
) -> Interval:
    """value ± t · SE from the values without each conversation; no bounds if one is undefined."""
    middle, count = float(value), len(left_out)
    if count < 2 or np.isnan(left_out).any():
        return Interval(middle, None, None, n)
    error = math.sqrt((count - 1) / count * float(np.square(left_out - left_out.mean()).sum()))
    half = error * float(student.ppf((1 + confidence) / 2, count - 1))
    return Interval(middle, max(least, middle - half), min(most, middle + half), n)


# ---------------------------------------------------------------------------------- convergence


@dataclass(frozen=True)
class SplitHalf:
    """Agreement of v between two disjoint samples of n rows.

    Attributes:
        n: rows in each sample.
        cosine: mean over draws of cos(v_a, v_b).
        low: lower quantile over the draws: their spread, not an interval of the mean.
        high: upper quantile.
    """

    n: int
    cosine: float
    low: float
    high: float

    def json(self) -> dict[str, float | int]:
        """``{"n", "cosine", "low", "high"}``."""
        return {"n": self.n, "cosine": self.cosine, "low": self.low, "high": self.high}


def convergence_sizes(n: int) -> list[int]:
    """Sample sizes 8, 16, 32 … below half of n rows, and that half itself."""
    sizes = [8 * 2**k for k in range(n.bit_length()) if 8 * 2**k < n // 2]
    return [*sizes, n // 2] if n >= 2 else []


def convergence(
    delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    sizes: Sequence[int] | None = None,
    clusters: Clusters = None,
    *,
    draws: int = 20,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[SplitHalf]:
    """Convergence of v* with N: cos between the means of two disjoint random samples of n rows.

    Conversations are shuffled whole; the samples are the first and the last n rows of the shuffle.

    Args:
        delta: displacements (n, d).
        sizes: rows a sample; default: :func:`convergence_sizes`.
        clusters: conversation key of each row.
        draws: shuffles.
        confidence: share of the draws between ``low`` and ``high``.
        seed: of the shuffles.

    Returns:
        One entry a size; sizes where a mean is zero in every draw are left out.

    Raises:
        MeasurementError: malformed input, or a size that is not between 1 and half of the rows.
    """
    rows = as_matrix(delta, "delta")
    n = len(rows)
    asked = convergence_sizes(n) if sizes is None else list(sizes)
    for size in asked:
        if not 1 <= size <= n // 2:
            raise MeasurementError(
                f"sample size {size}: expected 1 to {n // 2}, half of the {n} rows"
            )
    codes, count = _codes(clusters, n)
    rng = np.random.default_rng(seed)
    cosines = np.full((draws, len(asked)), np.nan)
    for draw in range(draws):
        shuffled = rows[np.argsort(rng.permutation(count)[codes], kind="stable")]
        for column, size in enumerate(asked):
            first, last = shuffled[:size].sum(axis=0), shuffled[n - size :].sum(axis=0)
            norms = float(np.linalg.norm(first) * np.linalg.norm(last))
            if norms > 0:
                cosines[draw, column] = min(1.0, max(-1.0, float(first @ last) / norms))
    points = []
    for column, size in enumerate(asked):
        known = cosines[~np.isnan(cosines[:, column]), column]
        if len(known):
            points.append(SplitHalf(size, float(known.mean()), *percentiles(known, confidence)))
    return points


# ---------------------------------------------------------------------------------- resampling


def cluster_sums(values: np.ndarray, clusters: Clusters) -> np.ndarray:
    """Sum rows (n, …) by conversation: (conversations, …), in order of first appearance."""
    codes, count = _codes(clusters, len(values))
    return _sum_by(codes, count, values)


def bootstrap_sums(sums: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Sums over resampled conversations: (conversations, k) → (draws, k)."""
    return np.asarray(draw_counts(len(sums), draws, np.random.default_rng(seed)) @ sums)


def _codes(clusters: Clusters, n: int) -> tuple[np.ndarray, int]:
    """The conversation number of each row, and how many there are."""
    if clusters is None:
        return np.arange(n), n
    if len(clusters) != n:
        raise MeasurementError(f"{len(clusters)} conversation keys for {n} rows; give one a row")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in clusters]), len(numbers)


def _sum_by(codes: np.ndarray, count: int, rows: np.ndarray) -> np.ndarray:
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(count))
    return np.add.reduceat(rows[order], starts, axis=0)


def draw_counts(count: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each conversation is drawn: (draws, count)."""
    return rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def _signs(rng: np.random.Generator, clusters: Clusters, n: int, draws: int) -> np.ndarray:
    """A random sign of each conversation, for its rows: (draws, n)."""
    codes, count = _codes(clusters, n)
    return (2.0 * rng.integers(0, 2, size=(draws, count)) - 1.0)[:, codes]


def _pair(fit: object, test: object) -> tuple[np.ndarray, np.ndarray]:
    fitted, tested = as_matrix(fit, "fit"), as_matrix(test, "test")
    if fitted.shape[1] != tested.shape[1]:
        raise MeasurementError(
            f"fit rows have width {fitted.shape[1]}, test rows {tested.shape[1]}; "
            "both must come from one site of one model"
        )
    return fitted, tested


def percentiles(
    values: np.ndarray, confidence: float, resampled: int | None = None
) -> tuple[float, float]:
    """The quantiles that leave (1 − confidence)/2 on either side.

    Args:
        values: the draws.
        confidence: share of them between the two.
        resampled: how many conversations c the draws were resampled from: the tails are then
            Φ(√(c/(c − 1)) t), t Student's quantile with c − 1 degrees of freedom, because draws
            spread by √((c − 1)/c) too little, and like a normal one. Source: Hesterberg (2015),
            "What teachers should know about the bootstrap", the expanded percentile interval.
    """
    tail = (1 - confidence) / 2
    if resampled is not None:
        stretch = math.sqrt(resampled / (resampled - 1))
        tail = NormalDist().cdf(stretch * float(student.ppf(tail, resampled - 1)))
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def recentred(
    value: float,
    drawn: np.ndarray,
    confidence: float,
    n: int,
    least: float = -1.0,
    most: float = 1.0,
) -> Interval:
    """Lay the spread of drawn values about their mean around the estimate, within its range."""
    known = drawn[np.isfinite(drawn)]
    low, high = percentiles(known - known.mean(), confidence)
    return Interval(value, max(least, value + low), min(most, value + high), n)
