"""Singular spectra of N states of width d, their entropies and ranks, through one Gram matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.geometry.displacement import as_matrix

Base = Literal["e", "bits", 2, 10]


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
        self, power: float = 2, base: Base = "e", normalised: bool = False
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


def spectral_entropy(sigma: np.ndarray, power: float) -> float:
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
    return spectra(delta)[int(centred)]


def spectra(
    delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
) -> tuple[Spectrum, Spectrum]:
    """Measure the uncentred and the centred spectrum, sharing their work.

    Returns:
        (uncentred, centred).

    Raises:
        MeasurementError: ``delta`` is not (n, d), or not finite.
    """
    rows = as_matrix(delta, "delta")
    return _measure(rows, False), _measure(rows - rows.mean(axis=0), True)


def _measure(rows: np.ndarray, centred: bool) -> Spectrum:
    _, sigma, right = np.linalg.svd(rows, full_matrices=False)
    first = torch.from_numpy(right[0].copy()) if sigma[0] > 0 else None
    return Spectrum(torch.from_numpy(sigma), first, *rows.shape, centred)
