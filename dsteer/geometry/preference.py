"""Preference directions e_w − e_l, gradients of the DPO loss, and clouds in a base's own axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.errors import MeasurementError
from dsteer.geometry.displacement import as_matrix, as_vector
from dsteer.geometry.intervals import (
    Clusters,
    Interval,
    cluster_sums,
    jackknifed,
    share_intervals,
)

# ---------------------------------------------------------------------------------- e_w − e_l


def preference_vectors(
    unembedding: Float[Tensor, "v d"],
    preferred: Sequence[int],
    rejected: Sequence[int],
    scale: float = 1.0,
) -> Float[Tensor, "n d"]:
    """scale · (e_w − e_l) for each pair of tokens, e the rows of the unembedding W_U.

    Args:
        unembedding: W_U.
        preferred: token w of each pair.
        rejected: token l of each pair.
        scale: the factor that the model puts on its logits, so that ⟨n, scale (e_w − e_l)⟩ is a
            difference of logits (but for their biases).

    Returns:
        float64 (n, d).

    Raises:
        MeasurementError: no pairs, unequal counts, or a token that the unembedding does not have.
    """
    if len(preferred) != len(rejected) or not preferred:
        raise MeasurementError(
            f"{len(preferred)} preferred and {len(rejected)} rejected tokens; expected pairs of "
            "tokens, at least one"
        )
    tokens = (*preferred, *rejected)
    if min(tokens) < 0 or max(tokens) >= len(unembedding):
        raise MeasurementError(
            f"tokens {min(tokens)} to {max(tokens)}: the unembedding has {len(unembedding)} rows; "
            "give the tokenizer that belongs to the model"
        )
    rows = [unembedding[list(side)].detach().cpu().double() for side in (preferred, rejected)]
    return scale * (rows[0] - rows[1])


def margins(
    states: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    vectors: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
) -> Float[Tensor, " n"]:
    """m = ⟨n, e_w − e_l⟩ of each pair: how far the state n prefers token w to token l, in nats.

    Raises:
        MeasurementError: malformed or non-finite input, or different shapes.
    """
    rows, others = _two(states, vectors)
    return torch.from_numpy(np.einsum("nd,nd->n", rows, others))


def paired_cosines(
    first: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    second: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
) -> Float[Tensor, " n"]:
    """Cosine of row i of one matrix with row i of the other; NaN where one of them is zero.

    Raises:
        MeasurementError: malformed or non-finite input, or different shapes.
    """
    rows, others = _two(first, second)
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.clip(np.einsum("nd,nd->n", rows, others) / norms, -1.0, 1.0)
    return torch.from_numpy(np.where(norms > 0, cosines, np.nan))


def other_pairs(
    first: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    second: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    clusters: Clusters = None,
    *,
    confidence: float = 0.95,
) -> Interval | None:
    """Mean over i ≠ j of ⟨row i of one matrix, row j of the other⟩, jackknife over conversations.

    It is (⟨Σaᵢ, Σbᵢ⟩ − Σ⟨aᵢ, bᵢ⟩) / (n (n − 1)). Beside the mean product of rows with their own
    partners it says whether the partner matters.

    Returns:
        None for a single row.

    Raises:
        MeasurementError: malformed or non-finite input, or different shapes.
    """
    rows, others = _two(first, second)
    n = len(rows)
    if n < 2:
        return None
    own = np.einsum("nd,nd->n", rows, others)
    sums = cluster_sums(np.column_stack([rows, others, own, np.ones(n)]), clusters)
    total = sums.sum(axis=0)

    def mean(sums: np.ndarray) -> np.ndarray:
        a, b, own, count = np.split(sums, [rows.shape[1], 2 * rows.shape[1], -1], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            both = np.einsum("cd,cd->c", a, b) - own[:, 0]
            return np.asarray(both / (count[:, 0] * (count[:, 0] - 1)))

    value = float(mean(total[None])[0])
    left_out = mean(total - sums)
    return jackknifed(value, left_out[np.isfinite(left_out)], n, confidence)


def unit_rows(
    rows: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
) -> Float[Tensor, "n d"]:
    """Rows divided by their norms, float64; zero rows stay zero.

    Raises:
        MeasurementError: malformed or non-finite input.
    """
    matrix = as_matrix(rows, "rows")
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return torch.from_numpy(matrix / np.where(norms > 0, norms, 1.0))


# ---------------------------------------------------------------------------------- pairwise


@dataclass(frozen=True)
class PairwiseCosines:
    """Cosines between all directions of a set, and what chance gives.

    Attributes:
        values: cos(gᵢ, gⱼ), i < j, over the rows that are not zero: n (n − 1) / 2 numbers, float64.
        mean: their mean, jackknife over conversations; None for fewer than two rows.
        sign_flip_q95: 95 % quantile of the mean where each conversation gets a random sign: no
            shared direction, but the same lines; None for fewer than two rows.
    """

    values: Float[Tensor, " pairs"]
    mean: Interval | None
    sign_flip_q95: float | None


def pairwise_cosines(
    rows: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    clusters: Clusters = None,
    *,
    draws: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairwiseCosines:
    """Compare every direction with every other one; with u = g/‖g‖ the mean is
    (‖Σu‖² − n) / (n (n − 1)).

    Args:
        rows: the directions; zero rows are left out.
        clusters: conversation key of each row.
        draws: random sign patterns of the null.
        confidence: coverage asked for.
        seed: of the signs.

    Raises:
        MeasurementError: malformed or non-finite input.
    """
    matrix = as_matrix(rows, "rows")
    kept = np.linalg.norm(matrix, axis=1) > 0
    n = int(kept.sum())
    if n < 2:
        return PairwiseCosines(torch.empty(0, dtype=torch.float64), None, None)
    unit = unit_rows(matrix[kept]).numpy()
    keys = None if clusters is None else [k for k, keep in zip(clusters, kept, strict=True) if keep]
    sums = cluster_sums(unit, keys)
    signs = 2.0 * np.random.default_rng(seed).integers(0, 2, size=(draws, len(sums))) - 1.0
    flipped = (np.square(signs @ sums).sum(axis=1) - n) / (n * (n - 1))
    return PairwiseCosines(
        torch.from_numpy(np.clip(unit @ unit.T, -1.0, 1.0)[np.triu_indices(n, 1)]),
        share_intervals(torch.from_numpy(unit), keys, confidence=confidence).debiased,
        float(np.quantile(flipped, 0.95)),
    )


def random_cosines(width: int, count: int, seed: int = 0) -> Float[Tensor, " count"]:
    """Cosines of independent isotropic directions in R^d: mean 0, standard deviation 1/√d."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, count, width))
    return paired_cosines(first, second)


# ---------------------------------------------------------------------------------- the gradient


def loss_weights(
    policy: Float[Tensor, " n"], reference: Float[Tensor, " n"], beta: float
) -> Float[Tensor, " n"]:
    """β σ(−β (m − m_ref)), by which the DPO loss pushes on each pair's margin m: ∂L/∂m is minus it.

    L = −ln σ(β (m − m_ref)), m = ln π(y_w|x) − ln π(y_l|x). At the start of a training it is β/2.
    """
    return beta * torch.sigmoid(-beta * (policy - reference))


def preference_gradients(
    vectors: Float[Tensor, "n d"],
    policy: Float[Tensor, " n"],
    reference: Float[Tensor, " n"],
    beta: float,
) -> Float[Tensor, "n d"]:
    """∇_n L = −β σ(−β (m − m_ref)) (e_w − e_l): the loss's exact gradient at the shared context.

    n is the final_norm state that predicts the first diverging token; it acts through tokens w and
    l alone, since the normalisation of both log-probabilities is the same and cancels. It needs a
    head without a soft cap. Source: method.md.

    Args:
        vectors: e_w − e_l of each pair, in logits (:func:`preference_vectors`).
        policy: m of each pair under the policy, in nats.
        reference: m_ref of each pair under the reference.
        beta: β.
    """
    return -loss_weights(policy, reference, beta)[:, None] * vectors


# ---------------------------------------------------------------------------------- clouds


@dataclass(frozen=True)
class PrincipalAxes:
    """Axes of largest variance of some states.

    Attributes:
        mean: the states' mean (d,).
        axes: orthonormal rows (k, d); the largest entry of each is positive.
        explained: share of the states' variance along each axis.
        n: states that they were fitted on.
    """

    mean: Float[Tensor, " d"]
    axes: Float[Tensor, "k d"]
    explained: tuple[float, ...]
    n: int

    @classmethod
    def fit(
        cls, states: Float[Tensor, "n d"] | Float[np.ndarray, "n d"], k: int = 2
    ) -> PrincipalAxes:
        """Fit at most k axes; fewer where the states spread in fewer directions.

        Raises:
            MeasurementError: malformed or non-finite input.
        """
        rows = as_matrix(states)
        mean = rows.mean(axis=0)
        centred = rows - mean
        wide = rows.shape[1] > len(rows)
        values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
        values, vectors = values[::-1], vectors[:, ::-1]
        total = float(np.square(centred).sum())
        rounding = max(rows.shape) * np.finfo(np.float64).eps
        k = min(k, int((values > rounding * max(values[0], 0.0)).sum()))
        if total <= rounding * float(np.square(rows).sum()):
            k = 0
        axes = (centred.T @ vectors[:, :k]).T if wide else vectors[:, :k].T
        if k:
            axes = np.linalg.qr(axes.T)[0].T
        largest = axes[np.arange(k), np.abs(axes).argmax(axis=1)] if k else np.ones(0)
        return cls(
            torch.from_numpy(mean),
            torch.from_numpy(np.ascontiguousarray(axes * np.sign(largest)[:, None])),
            tuple(float(value) / total for value in values[:k]),
            len(rows),
        )

    def project(
        self, states: Float[Tensor, "n d"] | Float[np.ndarray, "n d"]
    ) -> Float[Tensor, "n k"]:
        """Coordinates of states along the axes, from the fitted mean.

        Raises:
            MeasurementError: malformed or non-finite input.
        """
        return (torch.from_numpy(as_matrix(states)) - self.mean) @ self.axes.T

    def share(self, vector: Float[Tensor, " d"] | Float[np.ndarray, " d"]) -> float | None:
        """Share of ‖v‖² that lies along the axes; None for v = 0.

        Raises:
            MeasurementError: malformed or non-finite input.
        """
        v = torch.from_numpy(np.array(as_vector(vector)))
        squared = float(v @ v)
        return None if squared == 0 else float(torch.square(self.axes @ v).sum()) / squared


def orthonormal(
    candidates: Sequence[Float[Tensor, " d"]], tolerance: float = 1e-6
) -> tuple[Float[Tensor, "k d"], tuple[int, ...]]:
    """Gram-Schmidt: unit rows that span the candidates, in their order.

    A candidate of which less than ``tolerance`` of its norm is new adds no row.

    Returns:
        The rows, float64, and the number of the candidate that each came from.

    Raises:
        MeasurementError: no candidates, malformed ones, or none that is not zero.
    """
    rows: list[np.ndarray] = []
    used: list[int] = []
    for number, candidate in enumerate(candidates):
        vector = as_vector(candidate)
        rest = vector.copy()
        for _ in range(2):  # once more against rounding
            for row in rows:
                rest = rest - (row @ rest) * row
        size = float(np.linalg.norm(rest))
        if size > tolerance * float(np.linalg.norm(vector)):
            rows.append(rest / size)
            used.append(number)
    if not rows:
        raise MeasurementError(f"{len(candidates)} vectors, all zero: they span nothing")
    return torch.from_numpy(np.stack(rows)), tuple(used)


def _two(first: object, second: object) -> tuple[np.ndarray, np.ndarray]:
    rows, others = as_matrix(first, "first"), as_matrix(second, "second")
    if rows.shape != others.shape:
        raise MeasurementError(
            f"shapes {rows.shape} and {others.shape}; expected one row a pair in both"
        )
    return rows, others
