"""Singular spectra of N states of width d, their entropies and ranks, through one Gram matrix.

Both spectra, uncentred and centred, come from one Gram matrix and one tridiagonal reduction:

1. Take the mean μ off, C = D − 1μᵀ, and form the smaller Gram matrix of C. It never holds the
   mean's energy N‖μ‖², so that a large common shift costs the centred values no digits.
2. Reflect coordinates so that the mean is the first axis: for N ≤ d the axis 1/√N of the rows,
   where the uncentred Gram matrix has one more row and column; for N > d the axis μ/‖μ‖, where it
   has N‖μ‖² more in one entry.
3. Householder reduction to a tridiagonal T leaves the first axis alone. So T without that row and
   column (N ≤ d), or without that entry (N > d), has the centred eigenvalues, and T the uncentred.
4. The eigenvalues of T are computed to high relative accuracy (through its Cholesky factor), so
   that a large entry of the mean costs the small ones nothing either. What remains is the rounding
   of the Gram matrix of C, at most 3√k ε σ₁² of C with k = min(N, d) (measured: 2√k ε σ₁² over
   flat, graded and shifted spectra of up to 2000 rows), which moves σ by 1.5√k ε σ₁²/σ. Where that
   could exceed 1e-10 of the largest σ, the values come from a direct decomposition instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import blas, eigh_tridiagonal, lapack
from torch import Tensor

from dsteer.errors import MeasurementError
from dsteer.geometry.displacement import as_matrix
from dsteer.geometry.moments import Moments

Base = Literal["e", "bits", 2, 10]

TOLERANCE = 1e-10
"""Largest error of a singular value, in units of σ₁."""
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Spectrum:
    """Singular values σ₁ ≥ σ₂ ≥ … of a matrix of N states, and what is read off them.

    All quantities depend on N: print it beside them. They are None for an all-zero matrix.

    Attributes:
        singular_values: float64, descending, min(N, d) of them, in the states' units.
        first_right: the first right singular vector (d,), of unit norm, its sign such that the
            mean projection of the states is not negative; None for an all-zero matrix. The paper
            writes d×N and calls it u₁.
        n: N, the number of states.
        d: their width.
        centred: whether the mean state was taken off first.
    """

    singular_values: Float[Tensor, " k"]
    first_right: Float[Tensor, " d"] | None
    n: int
    d: int
    centred: bool

    @property
    def sigma_ratio(self) -> float | None:
        """σ₂/σ₁; 0 if there is only one singular value. Nearly empty as evidence: see trap 1."""
        sigma = self._sigma()
        if sigma is None:
            return None
        return float(sigma[1] / sigma[0]) if len(sigma) > 1 else 0.0

    def entropy(
        self, power: int | float = 2, base: Base = "e", normalised: bool = False
    ) -> float | None:
        """Spectral entropy H = −Σ q ln q with q_j = σ_j^p / Σσ^p.

        Args:
            power: p; 2 weighs by energy, 1 is Roy & Vetterli's.
            base: of the logarithm: ``"e"`` (nats), 2 or ``"bits"``, 10.
            normalised: divide by the logarithm of min(N, d), so that the largest value is 1 (and
                the base plays no part); None where min(N, d) is 1.
        """
        sigma = self._sigma()
        if sigma is None:
            return None
        entropy = spectral_entropy(sigma, power)
        if normalised:
            return entropy / math.log(len(sigma)) if len(sigma) > 1 else None
        return entropy / {"e": 1.0, "bits": math.log(2), 2: math.log(2), 10: math.log(10)}[base]

    @property
    def effective_rank(self) -> float | None:
        """exp(H) with p = 1 (Roy & Vetterli 2007)."""
        entropy = self.entropy(power=1)
        return None if entropy is None else math.exp(entropy)

    @property
    def participation_ratio(self) -> float | None:
        """(Σσ²)² / Σσ⁴."""
        sigma = self._sigma()
        if sigma is None:
            return None
        energy = (sigma / sigma[0]) ** 2
        return float(energy.sum() ** 2 / (energy**2).sum())

    @property
    def stable_rank(self) -> float | None:
        """‖D‖_F² / σ₁²."""
        sigma = self._sigma()
        return None if sigma is None else float(((sigma / sigma[0]) ** 2).sum())

    def top_shares(self, count: int) -> list[float] | None:
        """σ_j / ‖D‖_F of the largest ``count`` singular values (figure 4b)."""
        sigma = self._sigma()
        if sigma is None:
            return None
        return [float(share) for share in sigma[:count] / np.linalg.norm(sigma)]

    def _sigma(self) -> np.ndarray | None:
        sigma = self.singular_values.numpy()
        return sigma if sigma[0] > 0 else None


def spectral_entropy(sigma: np.ndarray, power: int | float) -> float:
    """−Σ q ln q with q_j = σ_j^p / Σσ^p, of singular values with σ₁ > 0, in nats."""
    weights = (sigma / sigma.max()) ** power
    q = weights[weights > 0] / weights.sum()
    return max(0.0, float(-(q * np.log(q)).sum()))


def spectrum(
    delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"], *, centred: bool = False
) -> Spectrum:
    """Measure the singular spectrum of N states, uncentred (shared shift) or centred (the rest).

    Raises:
        MeasurementError: ``delta`` is not (n, d), or not finite.
    """
    return _measure(*_parts(delta), (centred,))[0]


def spectra(
    delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
) -> tuple[Spectrum, Spectrum]:
    """Measure the uncentred and the centred spectrum, sharing their work.

    Returns:
        (uncentred, centred).

    Raises:
        MeasurementError: ``delta`` is not (n, d), or not finite.
    """
    uncentred, centred = _measure(*_parts(delta), (False, True))
    return uncentred, centred


def principal(
    delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"], k: int, *, centred: bool = False
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k d"]]:
    """The k largest singular values of N states and their right singular vectors, by a full SVD.

    Signs are those of :attr:`Spectrum.first_right`: the mean projection of the states is not
    negative; of centred ones, whose projections average to zero, the largest entry is positive.

    Returns:
        (σ, V): descending, and one unit vector a row; a row of zeros where σ is rounding alone.

    Raises:
        MeasurementError: ``delta`` is not (n, d), or not finite; k is not within 1 … min(N, d).
    """
    rows, mean, rest = _parts(delta)
    if not 1 <= k <= min(rows.shape):
        raise MeasurementError(
            f"{k} principal directions of {rows.shape[0]} states of width {rows.shape[1]}; "
            f"expected 1 to {min(rows.shape)}"
        )
    size = float(np.linalg.norm(rows))
    _, sigma, right = np.linalg.svd(rest if centred else rows, full_matrices=False)
    sigma, right = sigma[:k].copy(), right[:k].copy()
    rounding = max(rows.shape) * _EPS * size
    for j in range(k):
        if sigma[j] <= rounding:
            sigma[j], right[j] = 0.0, 0.0
            continue
        top = right[j][np.abs(right[j]).argmax()]
        leading = top if centred else right[j] @ mean
        right[j] *= -1.0 if leading < 0 else 1.0
    return torch.from_numpy(sigma), torch.from_numpy(right)


def spectra_from_moments(moments: Moments) -> tuple[Spectrum, Spectrum]:
    """Measure the uncentred and the centred spectrum of rows of which only the moments are kept.

    The values are those of :func:`spectra` to a few ε σ₁, and as many: min(N, d).

    Raises:
        MeasurementError: no rows came.
    """
    mean, rest = moments.condensed()
    uncentred, centred = (
        replace(spectrum, n=moments.n)
        for spectrum in _measure(mean + rest, mean, rest, (False, True))
    )
    return uncentred, centred


def _parts(delta: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States, their mean, and what is left without it."""
    rows = as_matrix(delta, "delta")
    mean = rows.mean(axis=0)
    return rows, mean, rows - mean


def _measure(
    rows: np.ndarray, mean: np.ndarray, rest: np.ndarray, wanted: tuple[bool, ...]
) -> list[Spectrum]:
    n, d = rows.shape
    size = float(np.linalg.norm(rows))
    if np.linalg.norm(rest) <= n * _EPS * size:
        rest[:] = 0.0  # only the rounding of the mean is left: all rows are equal
    reduced = _Reduced.of(rest, mean)
    out = []
    for centred in wanted:
        matrix = rest if centred else rows
        sigma, first = np.zeros(min(n, d)), None
        if size > 0 and matrix.any():
            first = torch.from_numpy(reduced.first_right(centred, matrix))
            squared = reduced.eigenvalues(centred)
            if squared is None:
                sigma = np.linalg.svd(matrix, compute_uv=False)
            else:  # centring N ≤ d rows leaves N − 1 values, and one that is exactly 0
                sigma[: len(squared)] = np.sqrt(squared)
        out.append(Spectrum(torch.from_numpy(sigma), first, n, d, centred))
    return out


@dataclass(frozen=True)
class _Reduced:
    """The tridiagonal form of both Gram matrices (step 3 above).

    Attributes:
        reflector: w of I − wwᵀ, the reflection of step 2; None where the mean is zero.
        packed: Householder vectors of the reduction, and tau their factors.
        diagonal: of T, without the mean's entry where N > d.
        off: T's subdiagonal.
        mean_entry: what the uncentred T has more in its first entry.
        by_rows: N ≤ d, so that the Gram matrix is of rows and the first axis is the mean's alone.
    """

    reflector: np.ndarray | None
    packed: np.ndarray
    tau: np.ndarray
    diagonal: np.ndarray
    off: np.ndarray
    mean_entry: float
    by_rows: bool

    @classmethod
    def of(cls, rest: np.ndarray, mean: np.ndarray) -> _Reduced:
        n, d = rest.shape
        by_rows = n <= d
        # one BLAS for all steps (scipy's): numpy's own threads would still be spinning beside it
        lower = blas.dsyrk(1.0, rest.T, trans=int(by_rows), lower=1)
        reflector = _reflector(np.ones(n) if by_rows else mean)
        if reflector is not None:
            image = blas.dsymv(1.0, lower, reflector, lower=1)
            image -= (0.5 * (reflector @ image)) * reflector
            lower = blas.dsyr2(-1.0, reflector, image, a=lower, lower=1, overwrite_a=1)
            if by_rows:
                border = -math.sqrt(n) * (rest @ mean)  # the reflection takes 1/√N to −e₁
                lower[:, 0] = border - reflector * (reflector @ border)
                lower[0, 0] = 0.0
        work = int(lapack.dsytrd_lwork(len(lower), lower=1)[0])
        packed, diagonal, off, tau, info = lapack.dsytrd(lower, lower=1, lwork=work, overwrite_a=1)
        if info != 0:
            raise RuntimeError(f"dsytrd failed with {info}")
        return cls(reflector, packed, tau, diagonal, off, n * float(mean @ mean), by_rows)

    def tridiagonal(self, centred: bool) -> tuple[np.ndarray, np.ndarray]:
        if centred:
            return (self.diagonal[1:], self.off[1:]) if self.by_rows else (self.diagonal, self.off)
        diagonal = self.diagonal.copy()
        diagonal[0] += self.mean_entry
        return diagonal, self.off

    def eigenvalues(self, centred: bool) -> np.ndarray | None:
        """Descending; None where they are not known well enough (step 4 above)."""
        diagonal, off = self.tridiagonal(centred)
        if len(diagonal) == 1:
            return diagonal
        squared, _, _, failed = lapack.dpteqr(diagonal, off, np.zeros((1, 1)), compute_z=0)
        if failed:
            return None  # singular to rounding
        noise = 3 * math.sqrt(len(self.diagonal)) * _EPS * self.scale
        known = math.sqrt(squared[-1] * squared[0]) * TOLERANCE >= noise / 2
        return np.asarray(squared) if known else None

    @property
    def scale(self) -> float:
        """A bound on the centred σ₁²: the largest row sum of the centred T."""
        diagonal, off = self.tridiagonal(centred=True)
        beside = np.abs(np.concatenate([[0.0], off, [0.0]]))
        return float((np.abs(diagonal) + beside[1:] + beside[:-1]).max())

    def first_right(self, centred: bool, matrix: np.ndarray) -> np.ndarray:
        """The first right singular vector of ``matrix``, from T's top eigenvector."""
        diagonal, off = self.tridiagonal(centred)
        last = len(diagonal) - 1
        top: np.ndarray = np.ones(1)
        if last > 0:
            _, vectors = eigh_tridiagonal(
                diagonal, off, select="i", select_range=(last, last), check_finite=False
            )
            top = vectors[:, 0]
        vector = np.zeros(len(self.diagonal))
        vector[len(vector) - len(top) :] = top
        if len(vector) > 1:  # Q = 1 ⊕ Q₂, packed as a QR factorisation keeps it
            column = vector[1:, None]
            factors = np.asfortranarray(self.packed[1:, :-1])
            work = int(lapack.dormqr("L", "N", factors, self.tau, column, lwork=-1)[1][0])
            vector[1:] = lapack.dormqr("L", "N", factors, self.tau, column, lwork=work)[0][:, 0]
        if self.reflector is not None:
            vector -= self.reflector * (self.reflector @ vector)
        right = matrix.T @ vector if self.by_rows else vector
        right /= np.linalg.norm(right)
        leading = right[np.abs(right).argmax()] if centred else right @ matrix.sum(axis=0)
        return -right if leading < 0 else right


def _reflector(axis: np.ndarray) -> np.ndarray | None:
    """w with ‖w‖² = 2 such that I − wwᵀ takes ``axis`` to the first axis; None for a zero axis."""
    length = np.linalg.norm(axis)
    if length == 0:
        return None
    w = axis / length
    w[0] += math.copysign(1.0, w[0])
    return np.asarray(w * (math.sqrt(2.0) / np.linalg.norm(w)))
