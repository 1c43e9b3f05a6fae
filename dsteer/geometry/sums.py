"""Displacements summed by cluster, and what can be read off the sums without any row.

Rows of one conversation fall into one bucket by the hash of its key, so buckets are clusters of
whole conversations: independent of each other, as conversations are. Means, cosines' means, shares
and their intervals need no more than a few sums a bucket:

- Σ Δ gives v*, and v* of any resampled or halved set of buckets;
- Σ Δ/‖Δ‖ gives mean cosines with any vector, as mean cos(Δ, v) = ⟨mean Δ/‖Δ‖, v/‖v‖⟩;
- Σ ‖Δ‖² gives the shared share.

The schemes are those of :mod:`dsteer.geometry.intervals`, with buckets in place of conversations.

Not so the sign-flip null: flipped buckets of a shared direction cancel no better than 64 numbers
do, however many rows there are. Its signs are one a conversation and draw, from the hash of the
conversation's key, and Σ s·Δ and Σ s·Δ/‖Δ‖ of each draw are summed as the rows come.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dsteer.errors import MeasurementError
from dsteer.geometry.displacement import SharedShare, as_matrix, as_vector, share_from_sums
from dsteer.geometry.intervals import (
    Interval,
    ShareIntervals,
    SplitHalf,
    bootstrap_ratio,
    draw_counts,
    jackknife_shares,
    percentiles,
    recentred,
    refitted,
)

BUCKETS = 64
"""Intervals then have 63 degrees of freedom, so that Student's quantile is within 2 % of the
normal one, and the sums of all buckets are smaller than a d×d moment from d = 128 on."""

NULL_DRAWS = 200
"""Sign patterns of the null that are summed: 6.4 kB of sums a dimension of the state, which is less
than a d×d moment from d = 800 on. A multiple of 8."""

_PACKED = 2 * NULL_DRAWS // 8

_KEPT = ("total", "unit", "squares", "rows", "nonzero")
_SIGNED = ("signed_total", "signed_unit")


def bucket_of(conversation: str) -> int:
    """The bucket of a conversation: the same in every run, process and split."""
    digest = hashlib.sha256(conversation.encode()).digest()
    return int.from_bytes(digest[:8], "big") % BUCKETS


def signs_of(conversation: str) -> bytes:
    """The random signs of a conversation, one bit each: the same in every run, process and split.

    First come those of its rows where v is fitted on them, one a draw, then, independent of these,
    those of its rows where their cosines are taken.
    """
    key = conversation.encode()
    return hashlib.blake2b(key, digest_size=_PACKED, person=b"sign-flip null").digest()


class ClusterSums:
    """Sums of displacements (n, d) by cluster, float64; memory O(clusters · d) whatever n.

    Args:
        width: d.
        clusters: how many.
        signed: whether to keep sums with random signs too, for the null: 2 · NULL_DRAWS · d more.

    Attributes:
        total: Σ Δ of each cluster (c, d).
        unit: Σ Δ/‖Δ‖ over its rows that are not zero (c, d).
        squares: Σ ‖Δ‖² (c,).
        rows: its rows (c,).
        nonzero: its rows that are not zero (c,).
        signed_total: Σ s·Δ over all rows, s the signs where v is fitted (NULL_DRAWS, d), or (0, d).
        signed_unit: Σ s·Δ/‖Δ‖, s the signs where cosines are taken (NULL_DRAWS, d), or (0, d).
    """

    def __init__(self, width: int, clusters: int = BUCKETS, *, signed: bool = False) -> None:
        self.total = np.zeros((clusters, width))
        self.unit = np.zeros((clusters, width))
        self.squares = np.zeros(clusters)
        self.rows = np.zeros(clusters, dtype=np.int64)
        self.nonzero = np.zeros(clusters, dtype=np.int64)
        self.signed_total = np.zeros((NULL_DRAWS if signed else 0, width))
        self.signed_unit = np.zeros_like(self.signed_total)

    @property
    def signed(self) -> bool:
        """Whether sums with random signs are kept."""
        return len(self.signed_total) > 0

    def update(
        self,
        delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
        codes: Int[np.ndarray, " r"] | Sequence[int],
        signs: UInt8[np.ndarray, "n bytes"] | None = None,
    ) -> None:
        """Add displacements, each to the cluster that its code names.

        Args:
            delta: the rows.
            codes: cluster of each.
            signs: :func:`signs_of` the conversation of each, where signed sums are kept.

        Raises:
            MeasurementError: malformed or non-finite input, or not one code, and signs, a row.
        """
        rows, of = as_matrix(delta, "delta"), np.asarray(codes)
        if of.shape != (len(rows),):
            raise MeasurementError(f"{of.size} cluster codes for {len(rows)} rows; give one a row")
        if self.signed and (signs is None or signs.shape != (len(rows), _PACKED)):
            raise MeasurementError(
                f"signs of shape {None if signs is None else signs.shape} for {len(rows)} rows; "
                f"give {_PACKED} bytes a row"
            )
        norms = np.linalg.norm(rows, axis=1)
        kept = norms > 0
        order = np.argsort(of, kind="stable")
        found, starts = np.unique(of[order], return_index=True)
        self.total[found] += np.add.reduceat(rows[order], starts)
        unit = rows / np.where(kept, norms, 1.0)[:, None]
        self.unit[found] += np.add.reduceat(unit[order], starts)
        self.squares[found] += np.add.reduceat(norms[order] ** 2, starts)
        self.rows += np.bincount(of, minlength=len(self.rows))
        self.nonzero += np.bincount(of[kept], minlength=len(self.rows))
        if self.signed and signs is not None:
            bits = np.unpackbits(signs, axis=1)
            self.signed_total += _flips(bits[:, :NULL_DRAWS]).T @ rows
            self.signed_unit += _flips(bits[:, NULL_DRAWS:]).T @ unit

    def merge(self, other: ClusterSums) -> None:
        """Add the rows that another accumulation saw.

        Raises:
            MeasurementError: it has other clusters, or another width.
        """
        if other.total.shape != self.total.shape:
            raise MeasurementError(
                f"sums of shape {other.total.shape}, expected {self.total.shape}: the same "
                "clusters, of one site of one model"
            )
        if other.signed != self.signed:
            raise MeasurementError("sums with random signs and sums without: expected one kind")
        for name in (*_KEPT, *_SIGNED):
            getattr(self, name).__iadd__(getattr(other, name))

    def tensors(self) -> dict[str, np.ndarray]:
        """What there is to keep: the attributes, by name."""
        names = (*_KEPT, *_SIGNED) if self.signed else _KEPT
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> ClusterSums:
        """Take up again what :meth:`tensors` gave."""
        sums = cls(tensors["total"].shape[1], 0)
        for name in (*_KEPT, *(name for name in _SIGNED if name in tensors)):
            setattr(sums, name, tensors[name].copy())
        return sums

    @property
    def n(self) -> int:
        """Rows of all clusters."""
        return int(self.rows.sum())

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean displacement: v*, where these are the fit rows.

        Raises:
            MeasurementError: no rows came.
        """
        if self.n == 0:
            raise MeasurementError("a mean of no rows is undefined; give at least one")
        return torch.from_numpy(self.total.sum(axis=0) / self.n)

    @property
    def share(self) -> SharedShare:
        """m, see :func:`dsteer.geometry.displacement.shared_share`."""
        whole = self.total.sum(axis=0)
        return share_from_sums(float(whole @ whole), float(self.squares.sum()), self.n)

    def mean_cosine(self, vector: Float[Tensor, " d"] | Float[np.ndarray, " d"]) -> float | None:
        """Mean of cos(Δ, v) over the rows that are not zero; None without such rows, or v = 0."""
        v, count = as_vector(vector), int(self.nonzero.sum())
        length = float(np.linalg.norm(v))
        if length == 0 or count == 0:
            return None
        return float(self.unit.sum(axis=0) @ v) / (length * count)

    @property
    def rounding(self) -> float:
        """A sum of these rows, signed or not, that is no longer than this is only rounding."""
        return self.n * float(np.finfo(np.float64).eps) * math.sqrt(float(self.squares.sum()))

    def filled(self) -> ClusterSums:
        """The clusters that hold rows, without signed sums."""
        held = self.rows > 0
        return ClusterSums.from_tensors({name: getattr(self, name)[held] for name in _KEPT})


def _flips(bits: np.ndarray) -> np.ndarray:
    """±1 of bits (n, draws)."""
    return 2.0 * bits - 1.0


# ---------------------------------------------------------------------------------- intervals


def strength_from_sums(
    test: ClusterSums,
    vector: Float[Tensor, " d"] | Float[np.ndarray, " d"],
    *,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """Least-squares strength ⟨mean Δ, v⟩/‖v‖², in units of v, bootstrap over clusters.

    Returns:
        None for v = 0.
    """
    v = as_vector(vector)
    squared = float(v @ v)
    if squared == 0:
        return None
    held = test.filled()
    found = bootstrap_ratio(
        held.total @ v / squared,
        held.rows.astype(np.float64),
        draws=draws,
        confidence=confidence,
        seed=seed,
    )
    return found and Interval(found.value, found.low, found.high, test.n)


def held_out_from_sums(
    fit: ClusterSums,
    test: ClusterSums,
    *,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """Mean over test rows of cos(Δ, v), v the mean of the fit rows, refitted in each draw.

    Returns:
        None where it is undefined: v = 0, or all test rows zero (zero rows are left out).
    """
    value = test.mean_cosine(fit.mean)
    if value is None:
        return None
    fitted, tested = fit.filled(), test.filled()
    return refitted(
        value,
        int(test.nonzero.sum()),
        fitted.total,
        tested.unit,
        tested.nonzero,
        draws=draws,
        confidence=confidence,
        seed=seed,
    )


def in_sample_from_sums(
    fit: ClusterSums, *, draws: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval | None:
    """Mean over fit rows of cos(Δ, v), v the mean of the same rows, refitted in each draw.

    Returns:
        None where it is undefined: v = 0, or displacements that cancel but for rounding.
    """
    value, n = fit.mean_cosine(fit.mean), int(fit.nonzero.sum())
    if value is None or float(np.linalg.norm(fit.total.sum(axis=0))) <= fit.rounding:
        return None
    held = fit.filled()
    if len(held.rows) < 2:
        return Interval(value, None, None, n)
    counts = draw_counts(len(held.rows), draws, np.random.default_rng(seed))
    v = counts @ held.total
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.einsum("bd,bd->b", v, counts @ held.unit) / (
            np.linalg.norm(v, axis=1) * (counts @ held.nonzero)
        )
    return recentred(value, means, confidence, n)


def null_from_sums(
    fit: ClusterSums, test: ClusterSums, *, draws: int = NULL_DRAWS
) -> Float[Tensor, " draws"]:
    """Mean held-out cosine under the null: each conversation's Δ gets a random sign.

    In draw b it is ⟨Σ t_b·Δ/‖Δ‖, v_b/‖v_b‖⟩ / n over the n test rows that are not zero, with
    v_b = Σ s_b·Δ over the fit rows, s and t the signs of :func:`signs_of`: the scheme of
    :func:`dsteer.geometry.intervals.sign_flip_null`, and its mean over rows.

    Args:
        fit: signed sums of the rows that v is fitted on.
        test: signed sums of the rows whose cosines are taken.
        draws: how many of the sign patterns are used; at most NULL_DRAWS, which is all.

    Returns:
        float64 (draws,); NaN where it is undefined.

    Raises:
        MeasurementError: sums that were kept without random signs.
    """
    if not (fit.signed and test.signed):
        raise MeasurementError("sums without random signs have no null; keep them with signed=True")
    v = fit.signed_total[:draws]
    lengths = np.linalg.norm(v, axis=1)
    above = np.einsum("bd,bd->b", v, test.signed_unit[:draws])
    below = np.where(lengths > fit.rounding, lengths, 0.0) * test.nonzero.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        return torch.from_numpy(np.where(below > 0, above / below, np.nan))


def shares_from_sums(sums: ClusterSums, *, confidence: float = 0.95) -> ShareIntervals:
    """Jackknife intervals of the shared share, each cluster left out in turn."""
    held = sums.filled()
    return jackknife_shares(sums.share, held.total, held.squares, held.rows, confidence)


def convergence_from_sums(
    fit: ClusterSums, *, draws: int = 20, confidence: float = 0.95, seed: int = 0
) -> list[SplitHalf]:
    """Convergence of v* with N: cos between the means of two disjoint random sets of clusters.

    The sets have 1, 2, 4 … clusters and at last half of them; ``n`` is how many rows such a set
    has on average. Sizes where a mean is zero in every draw are left out.
    """
    held = fit.filled()
    half = len(held.rows) // 2
    sizes = [*(2**k for k in range(half.bit_length()) if 2**k < half), *([half] if half else [])]
    rng = np.random.default_rng(seed)
    cosines = np.full((draws, len(sizes)), np.nan)
    for draw in range(draws):
        order = rng.permutation(len(held.rows))
        for column, size in enumerate(sizes):
            first, last = order[:size], order[-size:]
            a, b = held.total[first].sum(axis=0), held.total[last].sum(axis=0)
            norms = float(np.linalg.norm(a) * np.linalg.norm(b))
            if norms > 0:
                cosines[draw, column] = min(1.0, max(-1.0, float(a @ b) / norms))
    points = []
    for column, size in enumerate(sizes):
        known = cosines[~np.isnan(cosines[:, column]), column]
        if len(known):
            low, high = percentiles(known, confidence)
            n = round(size * fit.n / len(held.rows))
            points.append(SplitHalf(n, float(known.mean()), low, high))
    return points
