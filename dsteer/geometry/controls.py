"""Random directions that a direction is held against."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.errors import MeasurementError
from dsteer.geometry.displacement import rows_and_vector

_LEAST = 1e-12
"""Energies below this share of the largest count as this: directions that no state has."""

_BISECTIONS = 80


def energy_matched(
    states: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    vector: Float[Tensor, " d"] | Float[np.ndarray, " d"],
    *,
    draws: int = 20,
    seed: int = 0,
) -> Float[Tensor, "draws d"]:
    """Random directions whose ablation takes as much out of the states as that of v does.

    Ablation h − (h·r̂) r̂ removes the energy e(r̂) = mean (h·r̂)². States lie in few directions, so an
    isotropic r̂ removes next to nothing and is no control for a v̂ that they lie along. With the
    eigenvalues λ_j and eigenvectors e_j of the states' second moment, and normal z, the draws are
    r = Σ λ_j^(s/2) z_j e_j: isotropic at s = 0, shaped like the states at s = 1. e(r̂) rises with s,
    and s is solved for in each draw.

    Args:
        states: h, those that are ablated.
        vector: v.
        draws: how many directions.
        seed: of z.

    Returns:
        Unit vectors, float64. Where no other direction removes as much as v̂ they come close to it.

    Raises:
        MeasurementError: malformed or non-finite input, different widths, v = 0, or states that are
            all 0.
    """
    rows, v = rows_and_vector(states, vector)
    if not v.any():
        raise MeasurementError("vector: it is zero, so its ablation removes nothing to be matched")
    if not rows.any():
        raise MeasurementError("states: all are zero, so nothing can be ablated")
    target = float(np.square(rows @ (v / np.linalg.norm(v))).mean())
    energies, axes = np.linalg.eigh(rows.T @ rows / len(rows))
    logs = np.log(np.maximum(energies / energies[-1], _LEAST))
    z = np.random.default_rng(seed).standard_normal((draws, len(v)))
    low, high = np.full((draws, 1), -1e3), np.full((draws, 1), 1e3)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        less = np.square(_unit(middle, logs, z)) @ energies < target
        low = np.where(less[:, None], middle, low)
        high = np.where(less[:, None], high, middle)
    return torch.from_numpy(_unit((low + high) / 2, logs, z) @ axes.T)


def _unit(power: np.ndarray, logs: np.ndarray, z: np.ndarray) -> np.ndarray:
    """λ^(s/2) z, normalised, without overflow."""
    exponents = power * logs / 2 + np.log(np.abs(z))
    scaled = np.sign(z) * np.exp(exponents - exponents.max(axis=1, keepdims=True))
    return np.asarray(scaled / np.linalg.norm(scaled, axis=1, keepdims=True))
