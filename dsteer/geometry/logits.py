"""What a shift of the final state does to next-token distributions: KL in nats, KL recovered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import chebyshev
from torch import Tensor

from dsteer.errors import MeasurementError
from dsteer.geometry.displacement import as_matrix, as_vector
from dsteer.geometry.intervals import (
    Clusters,
    Interval,
    bootstrap_ratio,
    bootstrap_sums,
    cluster_sums,
    percentiles,
)

Readout = Callable[[Tensor], Tensor]
"""final_norm states (n, d), float32 → logits (n, V), on whatever device the head is."""

NOTHING = 1e-8
"""A KL in nats a token that is no larger is nothing to recover."""

_LARGEST_EXPONENT = 600.0
"""e^±600 neither overflows nor, times a probability that matters, vanishes in float64."""


def kl_divergence(
    log_p: Float[Tensor, "*rows vocab"], log_q: Float[Tensor, "*rows vocab"]
) -> Float[Tensor, "*rows"]:
    """KL(p‖q) = Σ p (ln p − ln q) in nats, over the last axis, in float64.

    Args:
        log_p: log-probabilities, or logits (they are normalised here, in float64).
        log_q: likewise.

    Returns:
        float64, never negative; infinite where q lacks a token that p has.
    """
    return _kl(log_p.to(torch.float64).log_softmax(-1), log_q.to(torch.float64).log_softmax(-1))


def noise_kl(states: Float[Tensor, "n d"], readout: Readout, rms: float, seed: int = 0) -> float:
    """Mean KL, in nats, that random shifts of norm ``rms`` make in (256 of) the states."""
    random = torch.Generator().manual_seed(seed)
    states = states[:: max(1, len(states) // 256)].double()
    noise = torch.randn(states.shape, generator=random, dtype=torch.float64)
    noisy = states + noise * (rms / noise.norm(dim=1, keepdim=True))
    kl = [
        kl_divergence(readout(quiet.float()).cpu(), readout(loud.float()).cpu())
        for quiet, loud in zip(torch.split(states, 32), torch.split(noisy, 32), strict=True)
    ]
    return float(torch.cat(kl).mean())


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp_min(0.0)


def float64(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Values in float64, on their own device where it has float64, else on the CPU."""
    return (values.cpu() if values.device.type == "mps" else values).double()


@dataclass(frozen=True)
class KLRecovery:
    """KL recovered by adding λv to the base's final state.

    Attributes:
        strengths: the λ, in units of v.
        recovered: R(λ) = 1 − Σ KL(p_tuned‖p_λ) / Σ KL(p_tuned‖p_base), one a strength; None at each
            where KL(p_tuned‖p_base) is 0.
        kl: mean KL(p_tuned‖p_λ) a row in nats, one a strength.
        agreement: share of rows where p_λ and p_tuned have the same most likely token.
        kl_tuned_base: mean KL(p_tuned‖p_base) a row in nats.
        optimal_strength: the λ of least total KL; None where undefined.
        optimal_recovered: R at that λ.
        undefined: why something is None, in words; None if nothing is.
        n: rows.
    """

    strengths: tuple[float, ...]
    recovered: tuple[Interval | None, ...]
    kl: tuple[float, ...]
    agreement: tuple[float, ...]
    kl_tuned_base: float
    optimal_strength: Interval | None
    optimal_recovered: float | None
    undefined: str | None
    n: int


def kl_recovery(
    base_states: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    tuned_states: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    vector: Float[Tensor, " d"] | Float[np.ndarray, " d"],
    base_readout: Readout,
    tuned_readout: Readout,
    strengths: Sequence[int | float] | np.ndarray,
    clusters: Clusters = None,
    *,
    linear: bool,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    chunk_bytes: int = 2**28,
) -> KLRecovery:
    """Measure how much of the tuned model's next-token behaviour λv gives back to the base.

    p_λ = softmax(base_readout(h_base + λv)), p_tuned = softmax(tuned_readout(h_tuned)). With an
    affine readout λv adds λu to all logits, u = W_U v, so that for each row

        KL(p_tuned‖p_λ) = KL(p_tuned‖p_base) − λ⟨p_tuned, u⟩ + ln Σ p_base e^{λu},

    convex in λ: all strengths together are one product of p_base (n, V) with e^{λu} (V, strengths).

    The optimal λ: the grid brackets the minimum of the total KL in each bootstrap draw, KL is then
    read at Chebyshev nodes between the outermost brackets, and each draw's interpolant is minimised
    by bisecting its slope. Intervals are percentiles over resampled conversations, v held fixed.

    Args:
        base_states: final_norm states of the base (n, d); on response tokens, teacher-forced.
        tuned_states: those of the tuned model on the same ids.
        vector: v, in the states' units.
        base_readout: states → logits, called with chunks of rows in float32.
        tuned_readout: likewise.
        strengths: the grid of λ, rising.
        clusters: conversation key of each row.
        linear: whether ``base_readout`` is affine in the state (no soft-capping).
        draws: bootstrap draws.
        confidence: coverage asked for.
        seed: of the draws.
        chunk_bytes: memory that the logits of one chunk of rows may take.

    Raises:
        MeasurementError: malformed or non-finite input, or fewer than 3 rising strengths.
    """
    base, tuned = as_matrix(base_states, "base_states"), as_matrix(tuned_states, "tuned_states")
    v = as_vector(vector)
    if base.shape != tuned.shape or base.shape[1] != v.size:
        raise MeasurementError(
            f"base_states {base.shape}, tuned_states {tuned.shape} and vector {v.shape}: "
            "expected one state a token from both models, and a vector of their width"
        )
    grid = np.asarray(strengths, dtype=np.float64)
    if len(grid) < 3 or not np.isfinite(grid).all() or (np.diff(grid) <= 0).any():
        raise MeasurementError(f"strengths {list(strengths)}: expected at least 3 rising numbers")
    rows = _Rows(base, tuned, v, base_readout, tuned_readout, linear, chunk_bytes)
    kl, agreement, origin = rows.measure(grid, agreement=True)
    n, before = len(base), float(origin.sum())
    recovered: tuple[Interval | None, ...] = (None,) * len(grid)
    optimum: Interval | None = None
    optimal_recovered: float | None = None
    undefined: str | None = None
    if before == 0:
        undefined = "KL(tuned‖base) is 0: there is nothing to recover"
    elif not v.any():
        undefined = "the vector is zero: every strength does the same"
    if before > 0:
        recovered = tuple(
            bootstrap_ratio(
                torch.from_numpy(origin - column),
                torch.from_numpy(origin),
                clusters,
                draws=draws,
                confidence=confidence,
                seed=seed,
            )
            for column in kl.T
        )
    if undefined is None:
        totals = _totals(kl, clusters, draws, seed)
        best = int(totals[0].argmin())
        if best in (0, len(grid) - 1):
            way = "the first" if best == 0 else "the last"
            undefined = (
                f"KL is least at strength {grid[best]:g}, {way} of the grid: "
                "give strengths that go beyond it"
            )
        else:
            low, high = _brackets(totals, grid)
            nodes = _nodes(low.min(), high.max(), grid)
            fine = _totals(rows.measure(nodes)[0], clusters, draws, seed)
            found, least = _minima(nodes, fine, low, high)
            optimum = Interval(float(found[0]), None, None, n)
            if len(found) > 1:
                resampled = n if clusters is None else len(set(clusters))
                ends = percentiles(found[1:], confidence, resampled)
                optimum = Interval(optimum.value, *ends, n)
            optimal_recovered = 1 - least / before
    return KLRecovery(
        strengths=tuple(float(strength) for strength in grid),
        recovered=recovered,
        kl=tuple(float(mean) for mean in kl.mean(axis=0)),
        agreement=tuple(float(share) for share in agreement),
        kl_tuned_base=before / n,
        optimal_strength=optimum,
        optimal_recovered=optimal_recovered,
        undefined=undefined,
        n=n,
    )


@dataclass(frozen=True)
class _Rows:
    """The states, and how their KL is read."""

    base: np.ndarray
    tuned: np.ndarray
    vector: np.ndarray
    base_readout: Readout
    tuned_readout: Readout
    linear: bool
    chunk_bytes: int

    @torch.no_grad()
    def measure(
        self, strengths: np.ndarray, *, agreement: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """KL(p_tuned‖p_λ) (n, strengths), top-1 agreement (strengths,), KL(p_tuned‖p_base) (n,)."""
        v = torch.from_numpy(self.vector)
        ends = float64(self.base_readout(torch.stack([torch.zeros_like(v), v]).float()))
        push = ends[1] - ends[0]
        scale = torch.from_numpy(strengths).to(push.device)
        exponents = scale * push[:, None]
        by_product = self.linear and bool(exponents.amax() - exponents.amin() < _LARGEST_EXPONENT)
        shift = exponents.amax(0)
        growth = (exponents - shift).exp()
        kl = np.empty((len(self.base), len(strengths)))
        origin = np.empty(len(self.base))
        same = np.zeros(len(strengths))
        for start, stop in self._chunks(len(push)):
            states = torch.from_numpy(self.base[start:stop])
            target = self.tuned_readout(torch.from_numpy(self.tuned[start:stop]).float())
            logits = self.base_readout(states.float())
            log_p, log_q = float64(target).log_softmax(-1), float64(logits).log_softmax(-1)
            first = _kl(log_p, log_q)
            origin[start:stop] = first.cpu().numpy()
            top = target.argmax(-1)
            if by_product:
                tilt = (log_p.exp() @ push)[:, None] * scale
                partition = (log_q.exp() @ growth).log() + shift
                exact = (first[:, None] - tilt + partition).clamp_min(0.0)
                kl[start:stop] = exact.cpu().numpy()
            for column, strength in enumerate(strengths):
                if by_product and not agreement:
                    break
                if self.linear:
                    steered = logits + (strength * push).to(logits)
                else:
                    steered = self.base_readout((states + strength * v).float())
                same[column] += int((steered.argmax(-1) == top).sum())
                if not by_product:
                    beside = _kl(log_p, float64(steered).log_softmax(-1))
                    kl[start:stop, column] = beside.cpu().numpy()
        return kl, same / len(self.base), origin

    def _chunks(self, vocab: int) -> Iterator[tuple[int, int]]:
        step = max(1, self.chunk_bytes // (8 * vocab * 6))  # about six float64 arrays of logits
        for start in range(0, len(self.base), step):
            yield start, min(start + step, len(self.base))


def _totals(kl: np.ndarray, clusters: Clusters, draws: int, seed: int) -> np.ndarray:
    """Total KL of the rows as they are, then of each draw: (1 + draws, strengths)."""
    sums = cluster_sums(kl, clusters)
    total = sums.sum(axis=0)[None]
    return total if len(sums) < 2 else np.concatenate([total, bootstrap_sums(sums, draws, seed)])


def _brackets(totals: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The strengths on both sides of the least total, for each draw."""
    best = totals.argmin(axis=1)
    return grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]


def _nodes(low: float, high: float, grid: np.ndarray) -> np.ndarray:
    """Chebyshev nodes of [low, high]: 16, and 8 more a grid step, at most 64."""
    steps = int(((grid > low) & (grid <= high)).sum())
    points = chebyshev.chebpts1(min(64, 16 + 8 * steps))
    return np.asarray(low + (high - low) * (points + 1) / 2)


def _minima(
    nodes: np.ndarray, totals: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, float]:
    """The minimiser of each row's interpolant between low and high, and the first row's minimum."""
    count = len(nodes)
    points = chebyshev.chebpts1(count)
    scale = (nodes[-1] - nodes[0]) / (points[-1] - points[0])
    middle = (nodes[-1] + nodes[0]) / 2
    # discrete orthogonality of the Chebyshev polynomials at their nodes
    values = chebyshev.chebvander(points, count - 1)
    coefficients = 2 / count * values.T @ totals.T
    coefficients[0] /= 2
    slope = chebyshev.chebder(coefficients)
    left, right = (low - middle) / scale, (high - middle) / scale
    for _ in range(60):
        half = (left + right) / 2
        falling = chebyshev.chebval(half, slope, tensor=False) < 0
        left, right = np.where(falling, half, left), np.where(falling, right, half)
    best = (left + right) / 2
    least = float(chebyshev.chebval(best[0], coefficients[:, 0]))
    return middle + scale * best, max(0.0, least)
