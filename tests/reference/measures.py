"""Naive float64 versions of the measures, from their definitions: slow, and easy to check."""

from __future__ import annotations

import math

import numpy as np


def centred(rows: np.ndarray) -> np.ndarray:
    """Rows minus their mean, in extended precision: the mean may be far larger than the rest."""
    extended = rows.astype(np.longdouble)
    return np.asarray(extended - extended.mean(axis=0), dtype=np.float64)


def singular_values(rows: np.ndarray) -> np.ndarray:
    return np.linalg.svd(np.asarray(rows, dtype=np.float64), compute_uv=False)


def entropy(sigma: np.ndarray, power: float) -> float:
    weights = [float(value) ** power for value in sigma]
    shares = [weight / math.fsum(weights) for weight in weights]
    return -math.fsum(share * math.log(share) for share in shares if share > 0)


def effective_rank(sigma: np.ndarray) -> float:
    return math.exp(entropy(sigma, 1))


def participation_ratio(sigma: np.ndarray) -> float:
    return math.fsum(sigma**2) ** 2 / math.fsum(sigma**4)


def stable_rank(sigma: np.ndarray) -> float:
    return math.fsum(sigma**2) / float(sigma[0]) ** 2


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return math.fsum(a * b) / math.sqrt(math.fsum(a * a) * math.fsum(b * b))


def in_sample(rows: np.ndarray) -> list[float]:
    mean = rows.mean(axis=0)
    return [cosine(row, mean) for row in rows]


def leave_one_out(rows: np.ndarray) -> list[float]:
    return [
        cosine(row, np.delete(rows, index, axis=0).mean(axis=0)) for index, row in enumerate(rows)
    ]


def shared_share(rows: np.ndarray) -> tuple[float, float]:
    """m = N‖v‖²/‖D‖_F², and the mean over i≠j of ⟨Δᵢ, Δⱼ⟩ over the mean of ‖Δᵢ‖²."""
    n = len(rows)
    v = rows.mean(axis=0)
    plain = n * float(v @ v) / float((rows**2).sum())
    pairs = [float(rows[i] @ rows[j]) for i in range(n) for j in range(n) if i != j]
    return plain, float(np.mean(pairs)) / float((rows**2).sum(axis=1).mean())


def softmax(logits: np.ndarray) -> np.ndarray:
    grown = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(grown / grown.sum(axis=-1, keepdims=True))


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
