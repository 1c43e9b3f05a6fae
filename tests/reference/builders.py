"""Naive float64 versions of how steering vectors are built, from their definitions."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize


def difference(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    total = np.zeros(positive.shape[1])
    for p in positive:
        total += p / len(positive)
    for n in negative:
        total -= n / len(negative)
    return total


def principal(rows: np.ndarray) -> np.ndarray:
    """The eigenvector of the largest eigenvalue of Σ rᵢ rᵢᵀ, of either sign."""
    _, vectors = np.linalg.eigh(sum(np.outer(row, row) for row in rows))
    return np.asarray(vectors[:, -1])


def probe(rows: np.ndarray, labels: np.ndarray, c: float) -> np.ndarray:
    """The w of least ½‖w‖² + c Σ log(1 + e^(−y w·x)), by a general minimiser."""

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = labels * (rows @ w)
        value = 0.5 * w @ w + c * np.logaddexp(0, -margin).sum()
        slope = -labels / (1 + np.exp(margin))
        return float(value), w + c * slope @ rows

    options = {"maxiter": 10_000, "ftol": 1e-15, "gtol": 1e-10}
    start = np.zeros(rows.shape[1])
    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x)


def held_out(
    positive: np.ndarray, negative: np.ndarray, parts: list[list[int]]
) -> tuple[float, float]:
    """Accuracy and Cohen's d of the mean difference, fold by fold, pair by pair."""
    right, p_all, n_all = [], [], []
    for part in parts:
        others = [i for i in range(len(positive)) if i not in part]
        v = difference(positive[others], negative[others])
        v /= np.sqrt(v @ v)
        middle = (positive[others] @ v).mean() / 2 + (negative[others] @ v).mean() / 2
        for i in part:
            p, n = positive[i] @ v - middle, negative[i] @ v - middle
            right += [p > 0, n < 0]
            p_all.append(p)
            n_all.append(n)
    pooled = np.sqrt((np.var(p_all, ddof=1) + np.var(n_all, ddof=1)) / 2)
    return sum(right) / len(right), (np.mean(p_all) - np.mean(n_all)) / pooled
