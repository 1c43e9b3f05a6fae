"""Several vectors and displacements of one width beside each other: do they share a direction?

**Reliability.** v is the mean of N noisy rows, so two v's of one true direction agree less than 1.
Random halves of the conversations give two means with independent errors; with r the mean cosine of
the halves over many draws, the full-length v has reliability ρ = 2r/(1 + r) (Spearman-Brown), which
is ‖v‖²/(‖v‖² + σ²) with σ² the expected squared error, and √ρ is about its cosine with the true v.

**Disattenuated cosine.** cos(v_a, v_b) mixes three things: the true cosine, noise that lowers it,
and, where both are fitted on the same prompts, errors in common that shift it. The cross-halves
cosine c = mean of [cos(a₁, b₂) + cos(a₂, b₁)]/2, with a₁, b₁ on one half of the conversations and
a₂, b₂ on the other, has no errors in common; c/√(r_a r_b) with the halves' own r estimates the true
cosine. It is a ratio of estimates: it may exceed 1, and is told as it is. It is undefined where a
reliability is not positive. Source: Spearman (1904), "The proof and measurement of association
between two things".

Intervals: jackknife over conversations, the same halves in each: value ± t · standard error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import subspace_angles
from scipy.stats import beta
from torch import Tensor

from dsteer.errors import MeasurementError
from dsteer.geometry.displacement import as_matrix, as_vector
from dsteer.geometry.intervals import Clusters, Interval, cluster_sums, jackknifed

_EPS = float(np.finfo(np.float64).eps)

# ---------------------------------------------------------------------------------- vectors


def cosine_matrix(vectors: Sequence[Float[Tensor, " d"]]) -> Float[Tensor, "m m"]:
    """cos(v_i, v_j) of each two of m vectors, float64; NaN in the rows and columns of zero vectors.

    Raises:
        MeasurementError: no vectors, malformed ones, or different widths.
    """
    rows = _stacked(vectors)
    norms = np.linalg.norm(rows, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = rows / norms[:, None]
    cosines = np.clip(unit @ unit.T, -1.0, 1.0)
    cosines[np.diag_indices(len(rows))] = np.where(norms > 0, 1.0, np.nan)
    return torch.from_numpy(cosines)


@dataclass(frozen=True)
class DirectionSet:
    """How nearly some vectors point one way, whatever their lengths.

    Attributes:
        singular_values: of the m unit vectors stacked as rows, descending; their squares sum to m.
        share: σ₁²/m: 1 where all are parallel (or antiparallel), 1/m where all are orthogonal.
        sigma_ratio: σ₂/σ₁.
        direction: the first right singular vector (d,), its sign such that the unit vectors' mean
            projection is not negative.
    """

    singular_values: Float[Tensor, " k"]
    share: float
    sigma_ratio: float
    direction: Float[Tensor, " d"]


def direction_set(vectors: Sequence[Float[Tensor, " d"]]) -> DirectionSet | None:
    """Measure the rank-one-ness of at least two vectors; None where fewer than two are not zero.

    Raises:
        MeasurementError: no vectors, malformed ones, or different widths.
    """
    rows = _stacked(vectors)
    norms = np.linalg.norm(rows, axis=1)
    unit = rows[norms > 0] / norms[norms > 0, None]
    if len(unit) < 2:
        return None
    _, sigma, right = np.linalg.svd(unit, full_matrices=False)
    sign = -1.0 if float((unit @ right[0]).sum()) < 0 else 1.0
    second = float(sigma[1] / sigma[0]) if len(sigma) > 1 else 0.0
    return DirectionSet(
        torch.from_numpy(sigma),
        float(sigma[0] ** 2 / len(unit)),
        second,
        torch.from_numpy(sign * right[0]),
    )


def random_cosine(d: int, confidence: float = 0.95) -> float:
    """The quantile of |cos| of two random directions in d dimensions: cos² ~ Beta(1/2, (d − 1)/2).

    Raises:
        MeasurementError: d is below 2.
    """
    if d < 2:
        raise MeasurementError(f"width {d}: expected 2 or more, one dimension has no other way")
    return math.sqrt(float(beta.ppf(confidence, 0.5, (d - 1) / 2)))


def _stacked(vectors: Sequence[Float[Tensor, " d"]]) -> np.ndarray:
    rows = [as_vector(vector) for vector in vectors]
    if not rows:
        raise MeasurementError("no vectors to compare; give at least one")
    if len({row.size for row in rows}) > 1:
        raise MeasurementError(
            f"vectors of widths {', '.join(str(row.size) for row in rows)}; only vectors of one "
            "width have a cosine"
        )
    return np.stack(rows)


# ---------------------------------------------------------------------------------- reliability


@dataclass(frozen=True)
class Reliability:
    """Split-half reliability of v.

    Attributes:
        half: mean cosine r between the v's of two random halves; None where it is undefined.
        full: ρ = 2r/(1 + r), for v on all rows; None where r is not positive.
        spread: quantiles of the halves' cosine over the draws (not an interval of its mean).
    """

    half: Interval | None
    full: Interval | None
    spread: tuple[float, float] | None


@dataclass(frozen=True)
class Agreement:
    """How far two v's agree.

    Attributes:
        cosine: cos(v_a, v_b) as fitted, on all rows; None where one of them is zero.
        cross: cosine across halves of disjoint conversations (attenuated, no errors in common).
        disattenuated: ``cross`` over the root of both halves' reliabilities; may exceed 1.
        undefined: why ``disattenuated`` is None.
    """

    cosine: Interval | None
    cross: Interval | None
    disattenuated: Interval | None
    undefined: str | None


@dataclass(frozen=True)
class Halves:
    """Sums of displacements over conversations, and over random halves of the conversations.

    Two of them can be compared if they hold the same conversations and were split by one seed.

    Attributes:
        sums: Σ of the displacements of each conversation (c, d).
        first: whether a conversation is in the first half, in each draw (b, c).
        n: rows.
    """

    sums: np.ndarray
    first: np.ndarray
    n: int

    @classmethod
    def of(
        cls,
        delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
        clusters: Clusters = None,
        *,
        draws: int = 100,
        seed: int = 0,
    ) -> Halves:
        """Split the conversations of displacements (n, d).

        Raises:
            MeasurementError: malformed or non-finite input, or not one conversation key a row.
        """
        rows = as_matrix(delta, "delta")
        return cls.of_sums(cluster_sums(rows, clusters), len(rows), draws=draws, seed=seed)

    @classmethod
    def of_sums(
        cls, sums: Float[np.ndarray, "c d"], n: int, *, draws: int = 100, seed: int = 0
    ) -> Halves:
        """Split sums over conversations, or over any groups of whole conversations, of n rows."""
        count = len(sums)
        order = np.argsort(np.random.default_rng(seed).random((draws, count)), axis=1)
        return cls(as_matrix(sums, "sums"), order < count // 2, n)

    def reliability(self, confidence: float = 0.95) -> Reliability:
        """Split-half reliability, with its jackknife over conversations."""
        if self._own is None:
            return Reliability(None, None, None)
        drawn, left = self._own
        r = float(np.nanmean(drawn))
        spread = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
        full = None
        if r > 0:
            full = jackknifed(spearman_brown(r), spearman_brown(left), self.n, confidence, most=1.0)
        return Reliability(
            jackknifed(r, left, self.n, confidence, least=-1.0, most=1.0),
            full,
            (float(spread[0]), float(spread[1])),
        )

    def agreement(self, other: Halves, confidence: float = 0.95) -> Agreement:
        """Cosine with another v over the same conversations: as fitted, and disattenuated.

        Raises:
            MeasurementError: other conversations, draws or widths.
        """
        if self.sums.shape != other.sums.shape or not np.array_equal(self.first, other.first):
            raise MeasurementError(
                f"halves of shapes {self.sums.shape} and {other.sums.shape}; expected the same "
                "conversations, width, draws and seed"
            )
        cosine = self._as_fitted(other, confidence)
        if len(self.sums) < 2:
            return Agreement(cosine, None, None, "one conversation can't be halved")
        if self._own is None or other._own is None:
            return Agreement(cosine, None, None, "a vector is zero")
        drawn, left = _crossed(self, other, same=False)
        value = float(np.nanmean(drawn))
        cross = jackknifed(value, left, self.n, confidence, least=-1.0, most=1.0)
        mine, theirs = (float(np.nanmean(halves[0])) for halves in (self._own, other._own))
        if mine <= 0 or theirs <= 0:
            low = min(mine, theirs)
            why = f"a split-half reliability is not positive ({low:.2g})"
            return Agreement(cosine, cross, None, why)
        product = self._own[1] * other._own[1]
        with np.errstate(invalid="ignore"):
            corrected = left / np.sqrt(np.where(product > 0, product, np.nan))
        exact = value / math.sqrt(mine * theirs)
        return Agreement(cosine, cross, jackknifed(exact, corrected, self.n, confidence), None)

    def _as_fitted(self, other: Halves, confidence: float) -> Interval | None:
        a, b = self.sums.sum(axis=0), other.sums.sum(axis=0)
        dot, mine, theirs = float(a @ b), float(a @ a), float(b @ b)
        rounding = max(self._rounding, other._rounding)
        value = float(_cosines(np.array(dot), np.array(mine), np.array(theirs), rounding))
        if math.isnan(value):
            return None
        inner = np.einsum("cd,cd->c", self.sums, other.sums)
        left = _cosines(
            dot - self.sums @ b - other.sums @ a + inner,
            mine - 2 * (self.sums @ a) + self._squares,
            theirs - 2 * (other.sums @ b) + other._squares,
            rounding,
        )
        return jackknifed(value, left, self.n, confidence, least=-1.0, most=1.0)

    @cached_property
    def _squares(self) -> np.ndarray:
        return np.asarray(np.einsum("cd,cd->c", self.sums, self.sums))

    @cached_property
    def _rounding(self) -> float:
        """Squared length below which a sum of these rows is only rounding."""
        return (len(self.sums) * _EPS) ** 2 * float(self._squares.sum())

    @cached_property
    def _parts(self) -> tuple[_Part, _Part]:
        """Both halves, in each draw."""
        inside = self.first.astype(np.float64)
        one = inside @ self.sums
        return _Part(one, inside), _Part(self.sums.sum(axis=0) - one, 1.0 - inside)

    @cached_property
    def _own(self) -> tuple[np.ndarray, np.ndarray] | None:
        """cos(first, second) of each draw, and their mean without each conversation."""
        if len(self.sums) < 2:
            return None
        drawn, left = _crossed(self, self, same=True)
        return None if np.isnan(drawn).all() else (drawn, left)


@dataclass(frozen=True)
class _Part:
    """One half: its sum (b, d) and the conversations in it (b, c) in each draw."""

    sum: np.ndarray
    inside: np.ndarray


def _crossed(a: Halves, b: Halves, *, same: bool) -> tuple[np.ndarray, np.ndarray]:
    """Cosines across halves: each draw's, and their mean with each conversation left out (c,).

    ``same``: cos(a₁, a₂) of one v; else both cos(a₁, b₂) and cos(a₂, b₁). A conversation with sum s
    is in one of the two parts only, so without it ⟨a₁, b₂⟩ loses ⟨s, b₂⟩ or ⟨a₁, s⟩.
    """
    rounding = max(a._rounding, b._rounding)
    (a1, a2), (b1, b2) = a._parts, b._parts
    drawn, left = [], []
    for one, two in ((a1, b2),) if same else ((a1, b2), (a2, b1)):
        dots = np.einsum("bd,bd->b", one.sum, two.sum)
        mine, theirs = (np.einsum("bd,bd->b", part.sum, part.sum) for part in (one, two))
        drawn.append(_cosines(dots, mine, theirs, rounding))
        lost = one.inside * (two.sum @ a.sums.T) + two.inside * (one.sum @ b.sums.T)
        left.append(
            _cosines(
                dots[:, None] - lost,
                mine[:, None] + one.inside * (a._squares - 2 * (one.sum @ a.sums.T)),
                theirs[:, None] + two.inside * (b._squares - 2 * (two.sum @ b.sums.T)),
                rounding,
            )
        )
    return np.concatenate(drawn), _mean(np.concatenate(left))


def _cosines(
    dots: np.ndarray, squares: np.ndarray, others: np.ndarray, rounding: float
) -> np.ndarray:
    """dot/√(‖·‖²‖·‖²), cut to [−1, 1]; NaN where a length is within rounding of zero."""
    known = (squares > rounding) & (others > rounding)
    lengths = np.sqrt(np.where(known, squares, 1.0)) * np.sqrt(np.where(known, others, 1.0))
    return np.asarray(np.where(known, np.clip(dots / lengths, -1.0, 1.0), np.nan))


def _mean(drawn: np.ndarray) -> np.ndarray:
    """Mean over the draws (b, c) → (c,), of those that are defined; NaN where none is."""
    known = ~np.isnan(drawn)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, drawn, 0.0).sum(axis=0) / known.sum(axis=0))


def spearman_brown(r: np.ndarray | float) -> np.ndarray:
    """Reliability of twice the length, 2r/(1 + r); NaN for r = −1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        longer = 2 * np.asarray(r) / (1 + np.asarray(r))
    return np.asarray(np.where(np.isfinite(longer), longer, np.nan))


# ---------------------------------------------------------------------------------- subspaces


def top_directions(
    delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    k: int,
    *,
    centred: bool = False,
    floor: float = 0.0,
) -> Float[Tensor, "r d"] | None:
    """The first right singular vectors of D as orthonormal rows, at most k of them.

    Args:
        delta: displacements (n, d).
        k: how many are asked for.
        centred: take the mean row off first.
        floor: singular values up to here count as noise; their directions are left out.

    Returns:
        float64 (r, d) with r ≤ k; None where no singular value is above the floor (and rounding).

    Raises:
        MeasurementError: malformed or non-finite input, or k below 1.
    """
    if k < 1:
        raise MeasurementError(f"{k} directions asked for; expected 1 or more")
    rows = as_matrix(delta, "delta")
    size = float(np.linalg.norm(rows))
    if centred:
        rows = rows - rows.mean(axis=0)
    if len(rows) > rows.shape[1]:
        rows = np.asarray(np.linalg.qr(rows, mode="r"))  # same right side, no taller than wide
    _, sigma, right = np.linalg.svd(rows, full_matrices=False)
    least = max(floor, max(rows.shape) * _EPS * size)
    r = min(k, int((sigma > least).sum()))
    return torch.from_numpy(right[:r].copy()) if r else None


def noise_floor(rms: float, n: int, d: int) -> float:
    """The largest singular value of N × d noise whose rows have root mean square norm ``rms``.

    rms (√(N/d) + 1): the edge of the Marchenko-Pastur law for independent entries of standard
    deviation rms/√d, (rms/√d)(√N + √d).
    """
    return rms * (math.sqrt(n / d) + 1)


def principal_angles(
    first: Float[Tensor, "r d"], second: Float[Tensor, "s e"]
) -> Float[Tensor, " q"]:
    """Principal angles between the row spaces, in degrees, ascending: min(r, s) of them.

    Each is the smallest angle between two directions, one of either subspace, orthogonal to the
    directions of the angles before. 0: shared; 90: orthogonal (Björck & Golub 1973, through scipy).

    Raises:
        MeasurementError: malformed or non-finite input, or different widths.
    """
    rows, others = as_matrix(first, "first"), as_matrix(second, "second")
    if rows.shape[1] != others.shape[1]:
        raise MeasurementError(
            f"subspaces in {rows.shape[1]} and {others.shape[1]} dimensions have no angles"
        )
    return torch.from_numpy(np.degrees(subspace_angles(rows.T, others.T))[::-1].copy())


def random_angles(
    d: int, r: int, s: int, *, draws: int = 200, seed: int = 0
) -> Float[Tensor, "draws q"]:
    """Null of :func:`principal_angles`: random subspaces of r and s dimensions in d, in degrees.

    By symmetry one of them can be the first r axes: then the cosines are the singular values of the
    first r rows of a random orthonormal basis (d, s).

    Raises:
        MeasurementError: a subspace is larger than the space, or empty.
    """
    _check_sizes(d, (r, s))
    random = np.random.default_rng(seed)
    drawn = [
        np.linalg.svd(np.linalg.qr(random.normal(size=(d, s)))[0][:r], compute_uv=False)
        for _ in range(draws)
    ]
    return torch.from_numpy(np.degrees(np.arccos(np.clip(np.stack(drawn), 0.0, 1.0))))


@dataclass(frozen=True)
class SharedSubspace:
    """Directions that several subspaces share.

    Attributes:
        eigenvalues: of the average projector (1/m) Σ Pᵢ, descending, those that can differ from 0:
            1 for a direction that lies in all m subspaces, 1/m for one that lies in one of them.
        directions: their eigenvectors, orthonormal rows.
    """

    eigenvalues: Float[Tensor, " k"]
    directions: Float[Tensor, "k d"]


def shared_subspace(bases: Sequence[Float[Tensor, "_ d"]]) -> SharedSubspace:
    """Eigenvalues of the average projector of m subspaces, each given by orthonormal rows.

    (1/m) Σ VᵢᵀVᵢ = SᵀS/m with S all rows on top of each other: the squared singular values of S/√m.

    Raises:
        MeasurementError: no subspaces, malformed ones, or different widths.
    """
    if not bases:
        raise MeasurementError("no subspaces to average; give at least one")
    stacks = [as_matrix(rows, "subspace") for rows in bases]
    if len({rows.shape[1] for rows in stacks}) > 1:
        raise MeasurementError("subspaces of different widths share nothing that can be measured")
    stack = np.concatenate(stacks) / math.sqrt(len(stacks))
    _, sigma, right = np.linalg.svd(stack, full_matrices=False)
    return SharedSubspace(torch.from_numpy(np.minimum(sigma**2, 1.0)), torch.from_numpy(right))


def all_but_one(m: int, angles: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The average projector's eigenvalue where m − 1 of m subspaces are one, and the last is apart.

    For a direction that all but one share, and that the last one's nearest direction meets at θ:
    (1/m)((m − 1) P + Q) has the eigenvalue ½ (1 + √(1 − 4 (m − 1)/m² sin²θ)). What lies above it is
    shared by all. For m = 2 it is ½ (1 + cos θ).

    Args:
        m: how many subspaces, two or more.
        angles: θ in degrees; of random subspaces, the null's smallest angles.
    """
    sine = torch.sin(torch.deg2rad(angles.double()))
    return (1 + torch.sqrt(1 - 4 * (m - 1) / m**2 * sine**2)) / 2


def random_shared(
    d: int, sizes: Sequence[int], *, draws: int = 200, seed: int = 0
) -> Float[Tensor, "draws k"]:
    """Null of :func:`shared_subspace`: its eigenvalues for random subspaces of these dimensions.

    Raises:
        MeasurementError: a subspace is larger than the space, or empty, or there are none.
    """
    _check_sizes(d, sizes)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        rows = [np.linalg.qr(random.normal(size=(d, size)))[0] for size in sizes]
        drawn.append(np.linalg.svd(np.concatenate(rows, axis=1), compute_uv=False) ** 2)
    return torch.from_numpy(np.minimum(np.stack(drawn) / len(sizes), 1.0))


def _check_sizes(d: int, sizes: Sequence[int]) -> None:
    if not sizes or not all(1 <= size <= d for size in sizes):
        raise MeasurementError(
            f"subspaces of {', '.join(map(str, sizes)) or 'no'} dimensions in {d}; expected 1 to "
            f"{d}"
        )
