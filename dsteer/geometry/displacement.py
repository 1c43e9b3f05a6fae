"""Displacements: their mean, how much of them is shared, and which way the mean points."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.errors import MeasurementError

INERT_BELOW = 0.1
"""A shift with less than this share of an orthogonal shift's effect is inert (:func:`radial`)."""


def as_matrix(states: object, name: str = "states") -> np.ndarray:
    """Check one state a row and return it as a float64 array (n, d), without a copy where it can.

    Raises:
        MeasurementError: not two-dimensional, empty, not real numbers, or not finite.
    """
    return _checked(states, name, ("n", "d"))


def as_vector(vector: object, name: str = "vector") -> np.ndarray:
    """Check one vector and return it as a float64 array (d,).

    Raises:
        MeasurementError: not one-dimensional, empty, not real numbers, or not finite.
    """
    return _checked(vector, name, ("d",))


def rows_and_vector(delta: object, vector: object) -> tuple[np.ndarray, np.ndarray]:
    """Check displacements (n, d) and a vector (d,) of their width; both as float64 arrays.

    Raises:
        MeasurementError: malformed or non-finite input, or different widths.
    """
    rows, v = as_matrix(delta, "delta"), as_vector(vector)
    if rows.shape[1] != v.size:
        raise MeasurementError(
            f"vector: width {v.size}, but the displacements have {rows.shape[1]}"
        )
    return rows, v


def as_numbers(values: object, name: str) -> np.ndarray:
    """Check a list of numbers and return it as a float64 array (n,); NaN and infinities pass.

    Raises:
        MeasurementError: not one-dimensional, empty, or not real numbers.
    """
    return _checked(values, name, ("n",), finite=False)


def _checked(
    values: object, name: str, axes: tuple[str, ...], *, finite: bool = True
) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().to("cpu")
        if values.is_floating_point():
            values = values.to(torch.float64)
        values = values.numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise MeasurementError(f"{name}: not an array of numbers ({error})") from None
    if array.dtype.kind not in "fiu":
        raise MeasurementError(f"{name}: holds {array.dtype}, expected real numbers")
    if array.ndim != len(axes) or 0 in array.shape:
        raise MeasurementError(
            f"{name}: shape {tuple(array.shape)}, expected ({', '.join(axes)}) with no empty axis"
            + ("; give one row a prompt" if len(axes) == 2 else "")
        )
    array = array.astype(np.float64, copy=False)
    if finite and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise MeasurementError(
            f"{name}: {bad} of {array.size} numbers are not finite; read the states in float32 or "
            "bfloat16 (float16 overflows in some models)"
        )
    return array


class StreamingMean:
    """The mean of rows that arrive in chunks: (1/N) Σᵢ xᵢ, summed in float64."""

    def __init__(self) -> None:
        self._sum: np.ndarray | None = None
        self.count = 0

    def update(self, chunk: Float[Tensor, "n d"] | Float[np.ndarray, "n d"]) -> None:
        """Add rows.

        Raises:
            MeasurementError: the rows are malformed, not finite, or of another width.
        """
        rows = as_matrix(chunk, "chunk")
        total = rows.sum(axis=0)
        if self._sum is not None and self._sum.shape != total.shape:
            raise MeasurementError(
                f"chunk: width {total.size}, but earlier chunks have {self._sum.size}"
            )
        self._sum = total if self._sum is None else self._sum + total
        self.count += rows.shape[0]

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean of all rows so far, float64.

        Raises:
            MeasurementError: no rows came.
        """
        if self._sum is None:
            raise MeasurementError("a mean of no rows is undefined; give at least one")
        return torch.from_numpy(self._sum / self.count)


@dataclass(frozen=True)
class SharedShare:
    """How much of the displacements is one shared vector; None where undefined.

    Attributes:
        plain: m = N‖v‖² / ‖D‖_F² with v the mean row; in [0, 1], but 1/N on pure noise.
        debiased: mean over i≠j of ⟨Δᵢ, Δⱼ⟩, divided by the mean of ‖Δᵢ‖²; 0 on pure noise, can be
            negative; None for one row.
    """

    plain: float | None
    debiased: float | None


def shared_share(delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"]) -> SharedShare:
    """Measure the share of squared displacement that one constant vector explains.

    ``plain`` is N‖v‖²/‖D‖_F²; ``debiased`` leaves out the terms i = j, that is
    (‖ΣΔᵢ‖² − ‖D‖_F²) / ((N − 1)‖D‖_F²). Both are None for all-zero displacements.

    Raises:
        MeasurementError: ``delta`` is malformed or not finite.
    """
    rows = as_matrix(delta, "delta")
    return share_from_sums(
        float(np.square(rows.sum(axis=0)).sum()), float(np.vdot(rows, rows)), len(rows)
    )


def share_from_sums(squared_sum: float, sum_of_squares: float, n: int) -> SharedShare:
    """Shared share from ‖ΣΔᵢ‖², Σ‖Δᵢ‖² and N."""
    if sum_of_squares == 0:
        return SharedShare(None, None)
    plain = squared_sum / (n * sum_of_squares)
    debiased = (squared_sum - sum_of_squares) / ((n - 1) * sum_of_squares) if n > 1 else None
    return SharedShare(min(plain, 1.0), debiased)


@dataclass(frozen=True)
class Radial:
    """A shift seen from the state that it is added to.

    Attributes:
        cosine: cos(v, h); None where v or h is zero.
        radial_norm: ‖⟨v, ĥ⟩ ĥ‖, the part that only changes the state's norm.
        tangential_norm: ‖v − ⟨v, ĥ⟩ ĥ‖, the part that turns the state.
        kept: effect after RMSNorm, as a share of that of an orthogonal shift of the same norm.
        inert: ``kept`` < 0.1: the shift is (nearly) undone by the next RMSNorm. None if undefined.
    """

    cosine: float | None
    radial_norm: float
    tangential_norm: float
    kept: float | None
    inert: bool | None


def radial(
    vector: Float[Tensor, " d"] | Float[np.ndarray, " d"],
    mean_state: Float[Tensor, " d"] | Float[np.ndarray, " d"],
) -> Radial:
    """Split v into parts along and across the mean base state h, and flag an inert shift.

    RMSNorm keeps only a state's direction (up to its gain), so adding v moves what the next block
    reads by ‖(h+v)/‖h+v‖ − h/‖h‖‖ = 2 sin(θ/2), θ the angle between h and h + v. ``kept`` divides
    that by the same quantity for an orthogonal shift of norm ‖v‖, where tan θ = ‖v‖/‖h‖: it is 0
    for v = 0.3 h (norm growth: the cosines look like steering and nothing happens) and 1 for v ⊥ h.
    Source: method.md, trap 2. At ``final_norm`` no norm follows: the flag says nothing there.

    Raises:
        MeasurementError: malformed or non-finite input, or different widths.
    """
    v = as_vector(vector)
    h = as_vector(mean_state, "mean_state")
    if v.shape != h.shape:
        raise MeasurementError(f"vector: width {v.size}, but the mean state has {h.size}")
    norm_v, norm_h = float(np.linalg.norm(v)), float(np.linalg.norm(h))
    if norm_v == 0 or norm_h == 0:
        return Radial(None, 0.0, norm_v, None, None)
    along = float(v @ h) / norm_h
    across = float(np.linalg.norm(v - along * (h / norm_h)))
    turned = 2 * math.sin(math.atan2(across, norm_h + along) / 2)
    orthogonal = 2 * math.sin(math.atan2(norm_v, norm_h) / 2)
    kept = turned / orthogonal
    cosine = min(1.0, max(-1.0, along / norm_v))
    return Radial(cosine, abs(along), across, kept, kept < INERT_BELOW)


def strengths_along(
    delta: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    vector: Float[Tensor, " d"] | Float[np.ndarray, " d"],
) -> Float[Tensor, " n"] | None:
    """Strength λᵢ = ⟨Δᵢ, v⟩ / ‖v‖² of v in each displacement, in units of v; None for v = 0.

    Their mean is the least-squares strength; bootstrap them for its interval.

    Raises:
        MeasurementError: malformed or non-finite input, or different widths.
    """
    rows, v = rows_and_vector(delta, vector)
    squared = float(v @ v)
    return None if squared == 0 else torch.from_numpy(rows @ v / squared)


def least_squares_strength(
    delta_test: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    vector: Float[Tensor, " d"] | Float[np.ndarray, " d"],
) -> float | None:
    """The λ that minimises Σᵢ ‖Δᵢ − λv‖²: ⟨mean Δ_test, v⟩ / ‖v‖², in units of v; None for v = 0.

    Raises:
        MeasurementError: malformed or non-finite input, or different widths.
    """
    strengths = strengths_along(delta_test, vector)
    return None if strengths is None else float(strengths.mean())
