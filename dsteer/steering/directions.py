"""Directions that tell two groups of states apart, and how well they do on states left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import cho_factor, cho_solve, eigh
from scipy.special import expit, log_expit

from dsteer.errors import ConfigError, MeasurementError, did_you_mean
from dsteer.geometry.spectrum import spectrum

Method = Literal["mean", "pca", "pca_centred", "logistic"]
"""How a direction is found in states of two groups; dᵢ = pᵢ − nᵢ of the i-th pair.

===========  ===============================================================  ========
mean         mean(p) − mean(n)                                                as it is
pca          the v̂ of largest Σᵢ (dᵢ·v̂)²: PCA of d and −d; mean dᵢ·v̂ ≥ 0      unit
pca_centred  the same of d − mean(d); dᵢ·v̂ > 0 for most pairs                 unit
logistic     w of least ½‖w‖² + c Σ log(1 + e^(−y w·x)), no intercept, over   unit
             x = ±dᵢ/2 with y = ±1: states without the mean of their pair
===========  ===============================================================  ========

``pca`` is what the package steering-vectors calls PCA and repeng ``pca_center``, ``pca_centred`` is
repeng's ``pca_diff``, and ``logistic`` steering-vectors' probe. Centring takes the shared shift out
of the differences, so ``pca_centred`` finds how pairs differ from each other. Without pairs (each
token a sample) ``logistic`` takes off the mean of both groups' means, and PCA is not defined.
"""

_NEWTON_STEPS = 100
_SOLVED = 1e-10
"""The gradient at which Newton's method stops, in units of the gradient at w = 0."""


@dataclass(frozen=True)
class Groups:
    """States of two groups at one site.

    Attributes:
        positive: float64, a row a state.
        negative: likewise; where rows are pairs, as many.
        positive_pair: the pair to which each row belongs.
        negative_pair: likewise.
        paired: whether row i of both groups is pair i.
    """

    positive: Float[np.ndarray, "p d"]
    negative: Float[np.ndarray, "q d"]
    positive_pair: Int[np.ndarray, " p"]
    negative_pair: Int[np.ndarray, " q"]
    paired: bool

    @classmethod
    def of_pairs(
        cls, positive: Float[np.ndarray, "n d"], negative: Float[np.ndarray, "n d"]
    ) -> Groups:
        """States that come in pairs, row by row."""
        pairs = np.arange(len(positive))
        return cls(positive, negative, pairs, pairs, True)

    def of(self, pairs: Int[np.ndarray, " k"]) -> Groups:
        """The states of some pairs."""
        p = np.isin(self.positive_pair, pairs)
        q = np.isin(self.negative_pair, pairs)
        return Groups(
            self.positive[p],
            self.negative[q],
            self.positive_pair[p],
            self.negative_pair[q],
            self.paired,
        )

    @property
    def gap(self) -> Float[np.ndarray, " d"]:
        """mean(positive) − mean(negative)."""
        return np.asarray(self.positive.mean(axis=0) - self.negative.mean(axis=0))


def require_method(method: str, *, paired: bool) -> None:
    """Check the name of a method.

    Raises:
        ConfigError: there is no such method, or it needs pairs and there are none.
    """
    if method not in get_args(Method):
        raise ConfigError(
            f"method {method!r}: no such method{did_you_mean(method, get_args(Method))}"
        )
    if method in ("pca", "pca_centred") and not paired:
        raise ConfigError(
            f"method {method!r} with position 'all': tokens of two texts are no pairs, so they "
            "have no differences; expected position last, first or mean, or method mean or logistic"
        )


def direction(groups: Groups, method: str, *, c: float = 1.0) -> Float[np.ndarray, " d"]:
    """The direction from the negative to the positive group, float64; zero where there is none.

    Args:
        groups: the states.
        method: see :data:`Method`.
        c: of ``logistic``: the weight of the loss beside ½‖w‖², in the units of the states.
    """
    if method == "mean":
        return groups.gap
    if method == "logistic":
        w = logistic(*_samples(groups), c=c)
        length = np.linalg.norm(w)
        return w / length if length > 0 else w
    delta = groups.positive - groups.negative
    found = spectrum(delta, centred=method == "pca_centred").first_right
    if found is None:
        return np.zeros(delta.shape[1])
    unit = found.numpy()
    along = delta @ unit
    if method == "pca":
        return unit
    most = np.sign(along).sum() or along.sum()
    return np.asarray(-unit if most < 0 else unit)


def _samples(groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Rows y x of a linear probe without intercept, and how often each counts."""
    if groups.paired:  # (dᵢ/2, +1) and (−dᵢ/2, −1) are one row twice
        half = (groups.positive - groups.negative) / 2
        return half, np.full(len(half), 2.0)
    centre = (groups.positive.mean(axis=0) + groups.negative.mean(axis=0)) / 2
    rows = np.concatenate([groups.positive - centre, centre - groups.negative])
    return rows, np.ones(len(rows))


def logistic(
    rows: Float[np.ndarray, "n d"], counts: Float[np.ndarray, " n"], *, c: float = 1.0
) -> Float[np.ndarray, " d"]:
    """The w that minimises ½‖w‖² + c Σᵢ countᵢ log(1 + e^(−w·rowᵢ)), by Newton's method.

    w lies in the span of the rows, so it is sought in their min(n, d) principal coordinates. The
    function is strictly convex: a step that does not lower it enough is halved.
    """
    n, d = rows.shape
    basis = None
    x = rows
    if n < d:  # K = XXᵀ = QΛQᵀ, and XQ' = √Λ are the coordinates
        values, vectors = eigh(rows @ rows.T)
        kept = values > values[-1] * n * np.finfo(np.float64).eps
        if not kept.any():
            return np.zeros(d)
        root = np.sqrt(values[kept])
        x, basis = vectors[:, kept] * root, vectors[:, kept] / root
    w = np.zeros(x.shape[1])

    def value(w: np.ndarray) -> float:
        return float(0.5 * w @ w - c * counts @ log_expit(x @ w))

    start = float(np.linalg.norm(c * counts @ x / 2))
    for _ in range(_NEWTON_STEPS):
        p = expit(-(x @ w))
        gradient = w - c * (counts * p) @ x
        if np.linalg.norm(gradient) <= _SOLVED * start:
            break
        hessian = (x * (c * counts * p * (1 - p))[:, None]).T @ x
        hessian[np.diag_indices_from(hessian)] += 1.0
        step = cho_solve(cho_factor(hessian), gradient)
        size, now, slope = 1.0, value(w), float(gradient @ step)
        while value(w - size * step) > now - 1e-4 * size * slope and size > 1e-8:
            size /= 2
        w = w - size * step
    return np.asarray(w if basis is None else rows.T @ (basis @ w))


# ---------------------------------------------------------------------------------- held out


@dataclass(frozen=True)
class Separation:
    """How well a direction tells the groups apart on pairs that it was not fitted on.

    Attributes:
        accuracy: the share of states on their group's side of the midpoint between both groups'
            mean projections, each group counting half, and a state on the midpoint half; None of a
            direction that is undefined or of fewer than two pairs.
        cohens_d: (mean p − mean n) / √((var p + var n)/2) of the projections; None as above, or
            where they do not vary.
        folds: the parts of the pairs, each left out once.
    """

    accuracy: float | None
    cohens_d: float | None
    folds: int


def folds_of(n: int, folds: int, seed: int) -> list[Int[np.ndarray, " _"]]:
    """Pairs 0 … n − 1 in that many parts of about one size, at random; none of fewer than two.

    Raises:
        MeasurementError: fewer than two folds.
    """
    if folds < 2:
        raise MeasurementError(f"folds {folds}: expected at least 2")
    if n < 2:
        return []
    order = np.random.default_rng(seed).permutation(n)
    return [np.sort(part) for part in np.array_split(order, min(folds, n))]


def separation(
    groups: Groups,
    fit: Callable[[Int[np.ndarray, " _"]], Float[np.ndarray, " _"]],
    parts: Sequence[Int[np.ndarray, " _"]],
) -> Separation:
    """Fit a direction on all parts but one, measure it on that one, for each part in turn.

    Projections are on the unit direction, from the midpoint of the pairs that it was fitted on.

    Args:
        groups: the states.
        fit: finds the direction in the states of some pairs.
        parts: pairs, each in one part.
    """
    positive: list[np.ndarray] = []
    negative: list[np.ndarray] = []
    for number, part in enumerate(parts):
        others = np.concatenate([*parts[:number], *parts[number + 1 :]])
        v, fitted, left = fit(others), groups.of(others), groups.of(part)
        length = np.linalg.norm(v)
        if length == 0:
            return Separation(None, None, len(parts))
        unit = v / length
        middle = (fitted.positive.mean(axis=0) + fitted.negative.mean(axis=0)) @ unit / 2
        positive.append(left.positive @ unit - middle)
        negative.append(left.negative @ unit - middle)
    if not parts:
        return Separation(None, None, 0)
    p, q = np.concatenate(positive), np.concatenate(negative)
    accuracy = ((1 + np.sign(p)).mean() + (1 - np.sign(q)).mean()) / 4
    return Separation(float(accuracy), cohens_d(p, q), len(parts))


def cohens_d(p: Float[np.ndarray, " n"], q: Float[np.ndarray, " m"]) -> float | None:
    """(mean p − mean q) / √((var p + var q)/2), unbiased variances; None where undefined."""
    if min(len(p), len(q)) < 2:
        return None
    spread = float(np.sqrt((p.var(ddof=1) + q.var(ddof=1)) / 2))
    return float(p.mean() - q.mean()) / spread if spread > 0 else None
