"""Parts of a displacement: directions in order, their coefficients, and what of them h_base tells.

A token's displacement Δ (d,) is expanded in orthonormal directions u_1 … u_k, the leading right
singular vectors of the displacements of fit tokens (uncentred):

- *oracle*: P_k Δ = Σ_j ⟨Δ, u_j⟩ u_j, which needs the tuned model's state;
- *deployable*: μ + Σ_j ĉ_j(h) u_j, with c_j = ⟨Δ − μ, u_j⟩ predicted from the base's state h by
  ridge regression, which needs the base's alone. With k = 0 it is μ, a constant vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.errors import MeasurementError
from dsteer.geometry.displacement import as_matrix
from dsteer.geometry.spectrum import principal

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties among which tune tokens choose, in units of the states' mean variance."""


def leading(delta: Float[Tensor, "n d"], most: int) -> Float[Tensor, "k d"]:
    """At most so many right singular vectors of uncentred displacements, as unit rows, float64.

    Those whose singular value is rounding alone are left out.
    """
    rows = as_matrix(delta, "delta")
    sigma, right = principal(torch.from_numpy(rows), min(most, *rows.shape))
    return right[sigma > 0]


def random_directions(d: int, k: int, seed: int) -> Float[Tensor, "k d"]:
    """k orthonormal rows whose span is uniformly distributed, float64."""
    drawn = np.random.default_rng(seed).normal(size=(d, k))
    return torch.from_numpy(np.ascontiguousarray(np.linalg.qr(drawn)[0].T))


@dataclass(frozen=True)
class Coefficients:
    """Predicts a displacement's coefficients from the base's state: ĉ(h) = (h − h̄) W.

    Attributes:
        mean: h̄ of the fit tokens.
        displacement: μ, their mean displacement.
        directions: u_1 … u_k as rows.
        weights: W, one column a direction.
        penalty: the ridge penalty, in units of the mean variance of a coordinate of h.
        r2: share of the coefficients' variance that is predicted on tune tokens; None where they do
            not vary.
    """

    mean: Float[Tensor, " d"]
    displacement: Float[Tensor, " d"]
    directions: Float[Tensor, "k d"]
    weights: Float[Tensor, "d k"]
    penalty: float
    r2: float | None

    def displace(self, base: Float[Tensor, "*t d"], k: int) -> Float[Tensor, "*t d"]:
        """μ + Σ_{j ≤ k} ĉ_j(h) u_j of each state."""
        mean, weights = self.mean.to(base), self.weights[:, :k].to(base)
        directions, shift = self.directions[:k].to(base), self.displacement.to(base)
        return shift + (base - mean) @ weights @ directions


def fit_coefficients(
    base: Float[Tensor, "n d"],
    delta: Float[Tensor, "n d"],
    directions: Float[Tensor, "k d"],
    penalties: Sequence[float],
    tune_base: Float[Tensor, "m d"],
    tune_delta: Float[Tensor, "m d"],
) -> Coefficients:
    """Fit the coefficients by ridge regression, W = (XᵀX + N λ s² I)⁻¹ XᵀC with X = h − h̄.

    Args:
        base: states of the fit tokens.
        delta: their displacements.
        directions: orthonormal rows.
        penalties: λ to choose among, in units of s², the mean variance of a coordinate of h; the
            one with the largest R² on the tune tokens is taken, the largest of equals.
        tune_base: states of the tune tokens.
        tune_delta: their displacements.

    Raises:
        MeasurementError: malformed input, or no penalty.
    """
    states, moved = as_matrix(base, "base"), as_matrix(delta, "delta")
    tune, tune_moved = as_matrix(tune_base, "tune_base"), as_matrix(tune_delta, "tune_delta")
    if not penalties:
        raise MeasurementError("no penalty to choose among; give at least one")
    axes = as_matrix(directions, "directions")
    mean, mu = states.mean(axis=0), moved.mean(axis=0)
    centred = states - mean
    wanted = (moved - mu) @ axes.T
    scale = float((centred**2).mean())
    values, vectors = np.linalg.eigh(centred.T @ centred)
    projected = vectors.T @ (centred.T @ wanted)
    held, aim = (tune - mean) @ vectors, (tune_moved - mu) @ axes.T
    spread = float((aim**2).sum())
    best: tuple[float, float, np.ndarray] | None = None
    for penalty in sorted(penalties, reverse=True):
        shrunk = np.maximum(values, 0) + len(states) * penalty * scale
        solved = np.divide(
            projected, shrunk[:, None], out=np.zeros_like(projected), where=shrunk[:, None] > 0
        )
        left = float(((aim - held @ solved) ** 2).sum())
        if best is None or left < best[0]:
            best = (left, penalty, vectors @ solved)
    assert best is not None
    left, penalty, weights = best
    mean_t, mu_t, weights_t = (torch.from_numpy(part) for part in (mean, mu, weights))
    r2 = 1 - left / spread if spread > 0 else None
    return Coefficients(mean_t, mu_t, torch.from_numpy(axes), weights_t, penalty, r2)
