"""Affine maps from one model's states to another's, x ↦ W (x − μ_A) + μ_B, in float64.

All kinds are computed in the principal axes of both sides: with centred states X = S_A P_Aᵀ and
Y = S_B P_Bᵀ (rows are positions), variances s and C = S_Bᵀ S_A / n, each map is W = P_B K P_Aᵀ. A
penalty λ counts in units of a side's mean variance s̄ = Σs/d.

- **ridge**: K = C diag(1 / (s_A + λ s̄_A)), the least-squares map with a penalty.
- **procrustes**: the orthogonal map of the first k axes with one scale: UΣVᵀ = C_{k×k},
  K = (tr Σ / Σ_{i≤k} s_A) U Vᵀ (Schönemann 1966).
- **cca**: prediction through the first k canonical pairs, regularised on both sides (Vinod 1976):
  with D = (s + λ s̄)^{-1/2} and UρVᵀ = D_B C D_A, K = D_B⁻¹ U_k ρ_k V_kᵀ D_A. With all k it is
  ridge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from torch import Tensor

from dsteer.config import TransferMap
from dsteer.errors import MeasurementError
from dsteer.geometry.displacement import as_matrix

States = Float[Tensor, "n d"] | Float[np.ndarray, "n d"]


@dataclass(frozen=True, eq=False)
class Cloud:
    """States of one model at one site in their principal axes.

    Attributes:
        mean: μ (d,).
        axes: P (d, r), orthonormal, the r axes along which the states differ at all.
        variances: s (r,), falling.
        scores: S (n, r), coordinates of the centred states.
    """

    mean: Float[np.ndarray, " d"]
    axes: Float[np.ndarray, "d r"]
    variances: Float[np.ndarray, " r"]
    scores: Float[np.ndarray, "n r"]

    @classmethod
    def of(cls, states: States, name: str = "states") -> Cloud:
        """Centre states (n, d) and turn them into their principal axes.

        Raises:
            MeasurementError: malformed, not finite, or all the same.
        """
        rows = as_matrix(states, name)
        mean = rows.mean(axis=0)
        centred = rows - mean
        values, vectors = np.linalg.eigh(centred.T @ centred / len(rows))
        kept = values > len(mean) * np.finfo(np.float64).eps * values[-1]
        if len(rows) < 2 or not kept.any() or values[-1] <= 0:
            raise MeasurementError(
                f"{name}: {len(rows)} states that do not differ, so no map can be learned on them; "
                "give more neutral text"
            )
        axes = vectors[:, kept][:, ::-1]
        return cls(mean, axes, values[kept][::-1], centred @ axes)

    def coordinates(self, states: States) -> Float[np.ndarray, "m r"]:
        """Other states (m, d) in these axes, about this mean."""
        return np.asarray((as_matrix(states) - self.mean) @ self.axes)

    def penalised(self, penalty: float) -> Float[np.ndarray, " r"]:
        """s + λ s̄, with s̄ = Σs / d."""
        return np.asarray(self.variances + penalty * self.variances.sum() / len(self.mean))

    def shuffled(self, seed: int) -> Cloud:
        """The same states in another order: a map learned on it knows both sides, not the pairs."""
        order = np.random.default_rng(seed).permutation(len(self.scores))
        return replace(self, scores=self.scores[order])


@dataclass(frozen=True, eq=False)
class AffineMap:
    """x ↦ W (x − μ_A) + μ_B with W = P_B K P_Aᵀ.

    Attributes:
        kind: ridge, procrustes or cca.
        core: K (r_B, r_A).
        sender: states of A that it was learned on.
        receiver: states of B, likewise.
        penalty: λ of ridge and cca; None for procrustes.
        width: k of procrustes and cca; None for ridge.
    """

    kind: TransferMap
    core: Float[np.ndarray, "r_b r_a"]
    sender: Cloud
    receiver: Cloud
    penalty: float | None = None
    width: int | None = None

    @property
    def linear(self) -> Float[np.ndarray, "e d"]:
        """W."""
        return np.asarray(self.receiver.axes @ self.core @ self.sender.axes.T)

    def __call__(self, states: States) -> Float[np.ndarray, "n e"]:
        """What the receiver's states should be where the sender's are these."""
        found = self.sender.coordinates(states) @ self.core.T
        return np.asarray(found @ self.receiver.axes.T + self.receiver.mean)

    def carry(self, vector: Float[np.ndarray, " d"]) -> Float[np.ndarray, " e"]:
        """W v: a difference of states has no place, so the means play no part."""
        return np.asarray(self.receiver.axes @ (self.core @ (self.sender.axes.T @ vector)))

    def r_squared(self, sender: States, receiver: States) -> float | None:
        """1 − ‖Y − map(X)‖² / ‖Y − mean Y‖² on these states; None where Y does not vary."""
        y = as_matrix(receiver, "receiver")
        spread = float(((y - y.mean(axis=0)) ** 2).sum())
        return None if spread == 0 else 1 - float(((y - self(sender)) ** 2).sum()) / spread


def fit(
    kind: TransferMap,
    sender: Cloud,
    receiver: Cloud,
    *,
    penalty: float | None = None,
    width: int | None = None,
) -> AffineMap:
    """Fit one map with given settings; rows of both clouds belong together.

    Args:
        kind: ridge (needs a penalty), procrustes (a width) or cca (both).
        sender: states of A.
        receiver: states of B.
        penalty: λ.
        width: k; the axes of either side are the most.

    Raises:
        MeasurementError: not one receiver row a sender row, or a setting is missing.
    """
    penalties = () if penalty is None else (penalty,)
    widths = () if width is None else (width,)
    for found in _candidates(kind, sender, receiver, penalties, widths):
        return found
    raise MeasurementError(f"{kind} needs a penalty (ridge, cca) and a width (procrustes, cca)")


def choose(
    kind: TransferMap,
    sender: Cloud,
    receiver: Cloud,
    tune: tuple[States, States],
    penalties: Sequence[float],
    widths: Sequence[int],
) -> AffineMap:
    """Fit the map of one kind whose settings leave the smallest error on the tune states.

    Of equals the first is taken. The penalty of cca is that of ridge, which is cca with all axes.

    Args:
        kind: of map.
        sender: states of A.
        receiver: states of B, row by row the same positions.
        tune: other states of A and B.
        penalties: to choose from.
        widths: likewise.

    Raises:
        MeasurementError: not one receiver row a sender row, or nothing to choose from.
    """
    if kind == "cca":
        best = choose("ridge", sender, receiver, tune, penalties, widths)
        penalties = () if best.penalty is None else (best.penalty,)
    x, y = sender.coordinates(tune[0]), receiver.coordinates(tune[1])
    found: list[tuple[float, AffineMap]] = []
    for candidate in _candidates(kind, sender, receiver, penalties, widths):
        error = float(((y - x @ candidate.core.T) ** 2).sum())
        if not found or error < found[0][0]:
            found = [(error, candidate)]
    if not found:
        raise MeasurementError(f"a map of kind {kind} has no settings to choose from")
    return found[0][1]


def widths_for(asked: Sequence[int] | str, sender: Cloud, receiver: Cloud) -> list[int]:
    """The widths k to choose from, falling, none beyond the axes of either side.

    ``auto``: all that both sides have, a half, a quarter and an eighth of it.
    """
    most = min(len(sender.variances), len(receiver.variances))
    wanted = [most >> halvings for halvings in range(4)] if isinstance(asked, str) else asked
    return sorted({min(width, most) for width in wanted if width > 0}, reverse=True)


def _candidates(
    kind: TransferMap,
    sender: Cloud,
    receiver: Cloud,
    penalties: Sequence[float],
    widths: Sequence[int],
) -> Iterator[AffineMap]:
    if len(sender.scores) != len(receiver.scores):
        raise MeasurementError(
            f"{len(sender.scores)} states of the sender for {len(receiver.scores)} of the "
            "receiver; expected one a position in both"
        )
    cross = receiver.scores.T @ sender.scores / len(sender.scores)
    if kind == "ridge":
        for penalty in penalties:
            core = cross / sender.penalised(penalty)
            yield AffineMap(kind, core, sender, receiver, penalty=penalty)
    elif kind == "procrustes":
        for width in widths:
            k = min(width, *cross.shape)
            left, values, right = np.linalg.svd(cross[:k, :k])
            core = np.zeros_like(cross)
            core[:k, :k] = values.sum() / sender.variances[:k].sum() * left @ right
            yield AffineMap(kind, core, sender, receiver, width=k)
    else:
        for penalty in penalties:
            root_a = np.sqrt(sender.penalised(penalty))
            root_b = np.sqrt(receiver.penalised(penalty))
            left, values, right = np.linalg.svd(
                cross / root_b[:, None] / root_a, full_matrices=False
            )
            for width in widths:
                k = min(width, len(values))
                core = (root_b[:, None] * left[:, :k] * values[:k]) @ (right[:k] / root_a)
                yield AffineMap(kind, core, sender, receiver, penalty, k)
