"""Mean and second moment of rows that arrive in chunks, kept as one triangular factor.

Summing Σ xxᵀ squares the spectrum: rounding of ε σ₁² there moves a small singular value by up to
√ε σ₁ ≈ 1.5e-8 σ₁. So what is kept is the d×d second moment's own factor. With a pilot row p taken
off each row (the first one; a large mean that all rows share then costs no digits), and a column of
ones in front, the rows seen so far are

    [1 | X − 1pᵀ] = Q R,   R = ⎡ ±√N   ±√N (μ − p)ᵀ ⎤   upper triangular, (d+1)×(d+1)
                               ⎣  0          C       ⎦

and only R is kept: CᵀC is the scatter about the mean μ, and N μμᵀ + CᵀC = Σ xxᵀ. A chunk of m rows
is folded into R by Householder reflections (LAPACK's dtpqrt, 2 m d² operations, twice a Gram
matrix's), which are backward stable: singular values are off by a few ε σ₁. Two factors merge in
the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from scipy.linalg import lapack
from torch import Tensor

from dsteer.errors import MeasurementError
from dsteer.geometry.displacement import as_matrix

_BLOCK = 64
"""Columns that dtpqrt reflects at once; 32 to 128 are equally fast."""


class Moments:
    """N, mean and second moment of rows of width d, float64; memory O(d²) whatever N.

    Args:
        width: d.
    """

    def __init__(self, width: int) -> None:
        self.n = 0
        self._pilot = np.zeros(width)
        self._factor = np.zeros((width + 1, width + 1), order="F")

    @property
    def width(self) -> int:
        """d."""
        return self._pilot.size

    def update(self, chunk: Float[Tensor, "n d"] | Float[np.ndarray, "n d"]) -> None:
        """Add rows.

        Raises:
            MeasurementError: the rows are malformed, not finite, or of another width.
        """
        rows = as_matrix(chunk, "chunk")
        self._require_width(rows.shape[1])
        if self.n == 0:
            self._pilot = rows[0].copy()
        block = np.ones((len(rows), self.width + 1), order="F")
        np.subtract(rows, self._pilot, out=block[:, 1:])
        self._fold(block, triangular=False)
        self.n += len(rows)

    def merge(self, other: Moments) -> None:
        """Add the rows that another accumulation saw.

        Raises:
            MeasurementError: they are of another width.
        """
        self._require_width(other.width)
        if other.n == 0:
            return
        if self.n == 0:
            self._pilot = other._pilot.copy()
        block = other._factor.copy(order="F")
        block[0, 1:] += block[0, 0] * (other._pilot - self._pilot)
        self._fold(block, triangular=True)
        self.n += other.n

    @property
    def mean(self) -> Float[np.ndarray, " d"]:
        """μ.

        Raises:
            MeasurementError: no rows came.
        """
        self._require_rows()
        return np.asarray(self._pilot + self._factor[0, 1:] / self._factor[0, 0])

    @property
    def second_moment(self) -> Float[np.ndarray, "d d"]:
        """(1/N) Σ xxᵀ, uncentred.

        Raises:
            MeasurementError: no rows came.
        """
        mean, scatter = self.mean, self._factor[1:, 1:]
        return np.asarray(scatter.T @ scatter / self.n + np.outer(mean, mean))

    def condensed(self) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "k d"]]:
        """Few rows that stand for all: k = min(N, d+1) of them, as their mean and the rest.

        The N rows are turned by an orthogonal matrix, so that singular values and right singular
        vectors stay, uncentred and centred: [√N μᵀ; C], reflected such that its mean, √(N/k) μ,
        again lies along 1/√k. Of N ≤ d rows, C has N − 1 rows but for rounding.

        Returns:
            (mean, rows minus mean).

        Raises:
            MeasurementError: no rows came.
        """
        k = min(self.n, self.width + 1)
        mean = math.sqrt(self.n / max(k, 1)) * self.mean
        rest = np.zeros((k, self.width))
        rest[1:] = self._factor[1:k, 1:]
        if k > 1:  # the reflection that takes the first axis to 1/√k
            axis = np.full(k, -1 / math.sqrt(k))
            axis[0] += 1
            axis *= math.sqrt(2) / np.linalg.norm(axis)
            rest -= np.outer(axis, axis @ rest)
        return mean, rest

    def tensors(self) -> dict[str, np.ndarray]:
        """What there is to keep: ``n``, ``pilot`` (d,), ``factor`` (d+1, d+1), which is Rᵀ."""
        return {"n": np.array([self.n]), "pilot": self._pilot, "factor": self._factor.T}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> Moments:
        """Take up again what :meth:`tensors` gave."""
        moments = cls(tensors["pilot"].size)
        moments.n = int(tensors["n"][0])
        moments._pilot = tensors["pilot"].copy()
        moments._factor = tensors["factor"].T.copy(order="F")
        return moments

    def _fold(self, block: np.ndarray, *, triangular: bool) -> None:
        rows, size = block.shape
        factor, _, _, info = lapack.dtpqrt(
            rows if triangular else 0,
            min(_BLOCK, size),
            self._factor,
            block,
            overwrite_a=1,
            overwrite_b=1,
        )
        if info != 0:
            raise RuntimeError(f"dtpqrt failed with {info}")
        self._factor = factor

    def _require_width(self, width: int) -> None:
        if width != self.width:
            raise MeasurementError(
                f"rows of width {width}, but the moments are of width {self.width}; both must come "
                "from one site of one model"
            )

    def _require_rows(self) -> None:
        if self.n == 0:
            raise MeasurementError("moments of no rows are undefined; give at least one")
