"""Nested maps from a base's states to the tuned model's: what a constant vector misses.

Each map predicts the displacement Δ of a token from its base state h, with h̄ and μ the means of h
and Δ over fit tokens, X = h − h̄ and D = Δ − μ:

- ``scale``: Δ̂ = a h, a = Σ⟨h, Δ⟩ / Σ‖h‖²;
- ``translation``: Δ̂ = μ, the steering vector;
- ``scale_translation``: Δ̂ = μ + a (h − h̄), a = Σ⟨X, D⟩ / Σ‖X‖²;
- ``ridge``: Δ̂ = μ + (h − h̄) W, W = (XᵀX + N λ s² I)⁻¹ XᵀD, s² the mean variance of a coordinate;
- ``low_rank``: W projected on the k leading right singular vectors of its penalised fit
  (reduced-rank ridge regression, Mukherjee & Zhu 2011).
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

NAMES = ("scale", "translation", "scale_translation", "low_rank", "ridge")
"""The maps, from few to many free numbers."""


@dataclass(frozen=True)
class StateMap:
    """Δ̂(h) = factor · h + shift + (h − centre) @ left @ right.

    Attributes:
        name: which map.
        factor: a of ``scale``, else 0.
        shift: μ, or zeros.
        centre: h̄.
        left: (d, r) and
        right: (r, d): the linear part; both None where there is none.
        rank: k of ``low_rank``.
        penalty: λ of ``low_rank`` and ``ridge``.
    """

    name: str
    factor: float
    shift: Float[Tensor, " d"]
    centre: Float[Tensor, " d"]
    left: Float[Tensor, "d r"] | None = None
    right: Float[Tensor, "r d"] | None = None
    rank: int | None = None
    penalty: float | None = None

    def displace(self, base: Float[Tensor, "*t d"]) -> Float[Tensor, "*t d"]:
        """Δ̂ of each state."""
        found = self.factor * base + self.shift.to(base)
        if self.left is not None and self.right is not None:
            found = found + (base - self.centre.to(base)) @ self.left.to(base) @ self.right.to(base)
        return found


def fit_maps(
    base: Float[Tensor, "n d"],
    delta: Float[Tensor, "n d"],
    tune_base: Float[Tensor, "m d"],
    tune_delta: Float[Tensor, "m d"],
    ranks: Sequence[int],
    penalties: Sequence[float],
) -> dict[str, StateMap]:
    """Fit every map on fit tokens; rank and penalties are chosen by the error on tune tokens.

    Args:
        base: states of the fit tokens.
        delta: their displacements.
        tune_base: states of the tune tokens.
        tune_delta: their displacements.
        ranks: to choose among, for ``low_rank``; those above the width count as the width.
        penalties: λ to choose among; of equals the largest, and of ranks the smallest, is taken.

    Raises:
        MeasurementError: malformed input, no rank or no penalty.
    """
    h, moved = as_matrix(base, "base"), as_matrix(delta, "delta")
    tune, aim = as_matrix(tune_base, "tune_base"), as_matrix(tune_delta, "tune_delta")
    if not ranks or not penalties:
        raise MeasurementError("ranks and penalties: give at least one of each to choose among")
    centre, mu = h.mean(axis=0), moved.mean(axis=0)
    x, d = h - centre, moved - mu
    held, rest = tune - centre, aim - mu
    square = float((h**2).sum())
    spread = float((x**2).sum())
    found = {
        "scale": _map("scale", centre, factor=float((h * moved).sum()) / square if square else 0.0),
        "translation": _map("translation", centre, shift=mu),
    }
    factor = float((x * d).sum()) / spread if spread else 0.0
    found["scale_translation"] = _map(
        "scale_translation", centre, factor=factor, shift=mu - factor * centre
    )
    values, vectors = _axes(x)
    projected = vectors.T @ (x.T @ d)
    seen = held @ vectors
    variance = spread / x.size if x.size else 0.0
    best_ridge: tuple[float, float, np.ndarray] | None = None
    best_low: tuple[float, float, int, np.ndarray, np.ndarray] | None = None
    for penalty in sorted(penalties, reverse=True):
        shrunk = values + len(h) * penalty * variance
        solved = np.divide(
            projected, shrunk[:, None], out=np.zeros_like(projected), where=shrunk[:, None] > 0
        )
        error = float(((rest - seen @ solved) ** 2).sum())
        if best_ridge is None or error < best_ridge[0]:
            best_ridge = (error, penalty, solved)
        # the fit of the penalised problem is [X; √(Nλs²) I] W, whose Gram matrix is that of this
        directions = _axes(np.sqrt(shrunk)[:, None] * solved)[1]
        for rank in sorted({min(rank, len(centre)) for rank in ranks}):
            axes = directions[:, :rank]
            part = solved @ axes
            error = float(((rest - seen @ part @ axes.T) ** 2).sum())
            if best_low is None or error < best_low[0] * (1 - 1e-9):
                best_low = (error, penalty, rank, part, axes.T)
    assert best_ridge is not None
    assert best_low is not None
    _, penalty, rank, left, right = best_low
    found["low_rank"] = _map(
        "low_rank", centre, shift=mu, left=vectors @ left, right=right, rank=rank, penalty=penalty
    )
    _, penalty, solved = best_ridge
    found["ridge"] = _map("ridge", centre, shift=mu, left=vectors, right=solved, penalty=penalty)
    return found


def _axes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """σ² and right singular vectors as columns, falling, in the cheaper of two ways: no more than
    there are rows, where these are fewer than the coordinates (the dual form)."""
    if len(rows) < rows.shape[1]:
        _, sigma, right = np.linalg.svd(rows, full_matrices=False)
        return sigma**2, right.T
    values, vectors = np.linalg.eigh(rows.T @ rows)
    return np.maximum(values[::-1], 0), vectors[:, ::-1]


def _map(
    name: str,
    centre: np.ndarray,
    *,
    factor: float = 0.0,
    shift: np.ndarray | None = None,
    left: np.ndarray | None = None,
    right: np.ndarray | None = None,
    rank: int | None = None,
    penalty: float | None = None,
) -> StateMap:
    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))

    return StateMap(
        name,
        factor,
        torch.zeros(len(centre), dtype=torch.float64) if shift is None else tensor(shift),
        tensor(centre),
        None if left is None else tensor(left),
        None if right is None else tensor(right),
        rank,
        penalty,
    )
