"""Cosines between displacements and a steering vector."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.errors import MeasurementError
from dsteer.geometry.displacement import as_matrix, as_numbers, rows_and_vector


def cosine_to(
    delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    vector: Float[Tensor, " d"] | Float[np.ndarray, " d"],
) -> Float[Tensor, " n"]:
    """cos(Δᵢ, v) of each row with a vector: held-out when v was fitted on other rows.

    Returns:
        float64 (N,). NaN where it is undefined: rows that are zero, or all rows for v = 0.

    Raises:
        MeasurementError: malformed or non-finite input, or different widths.
    """
    rows, v = rows_and_vector(delta, vector)
    return torch.from_numpy(_cosines(rows @ v, np.linalg.norm(rows, axis=1), np.linalg.norm(v)))


def cosine_to_mean(
    delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    mode: Literal["in_sample", "leave_one_out"] = "in_sample",
) -> Float[Tensor, " n"]:
    """cos(Δᵢ, v) with the mean of the same rows.

    ``in_sample`` uses v = (1/N) ΣΔⱼ, the paper's choice: biased upward, by about 1/√N on pure
    noise. ``leave_one_out`` uses v₋ᵢ = (Nv − Δᵢ)/(N − 1).

    Returns:
        float64 (N,). NaN where it is undefined: zero rows, a zero mean, leave-one-out of one row.

    Raises:
        MeasurementError: malformed or non-finite input, or an unknown mode.
    """
    if mode not in ("in_sample", "leave_one_out"):
        raise MeasurementError(f"mode {mode!r}: expected 'in_sample' or 'leave_one_out'")
    rows = as_matrix(delta, "delta")
    total = rows.sum(axis=0)
    if np.linalg.norm(total) <= len(rows) * np.finfo(np.float64).eps * np.linalg.norm(rows):
        total = np.zeros_like(total)  # the rows cancel, and only rounding is left
    norms = np.linalg.norm(rows, axis=1)
    if mode == "in_sample":
        return torch.from_numpy(_cosines(rows @ total, norms, np.linalg.norm(total)))
    others = total - rows
    dots = np.einsum("nd,nd->n", rows, others)
    return torch.from_numpy(_cosines(dots, norms, np.linalg.norm(others, axis=1)))


def histogram_mode(
    cosines: Float[Tensor, " n"] | Float[np.ndarray, " n"], bins: int = 100
) -> float | None:
    """Where a histogram of cosines peaks: the centre of its fullest bin over [−1, 1].

    The paper reports its cosines by this number (Fig. 3). It is known only to a bin (2/bins wide);
    of equally full bins the lowest counts.

    Returns:
        None where no cosine is defined (NaN is left out).

    Raises:
        MeasurementError: not one-dimensional, or empty.
    """
    values = as_numbers(cosines, "cosines")
    values = values[~np.isnan(values)]
    if not values.size:
        return None
    counts, edges = np.histogram(values, bins, (-1.0, 1.0))
    fullest = int(counts.argmax())
    return float(edges[fullest] + edges[fullest + 1]) / 2


def _cosines(dots: np.ndarray, norms: np.ndarray, other: np.ndarray | np.floating) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = dots / (norms * other)
    return np.where(norms * other > 0, np.clip(cosines, -1.0, 1.0), np.nan)
