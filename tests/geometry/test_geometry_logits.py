"""KL and KL recovered, against plain loops and planted optima."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from reference import measures
from torch import Tensor

from dsteer.errors import MeasurementError
from dsteer.geometry.logits import kl_divergence, kl_recovery

GRID = [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]


class Head:
    """An affine head with an optional soft cap, in float64 so that tests see the maths alone."""

    def __init__(self, vocab: int, d: int, cap: float | None = None, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.weight = torch.from_numpy(rng.standard_normal((vocab, d)))
        self.bias = torch.from_numpy(rng.standard_normal(vocab))
        self.cap = cap

    def __call__(self, states: Tensor) -> Tensor:
        logits = states.double() @ self.weight.T + self.bias
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def exact(values: np.ndarray) -> np.ndarray:
    """Numbers that float32 holds exactly, as the states of models are."""
    return values.astype(np.float32).astype(np.float64)


def states(n: int, d: int, seed: int = 1) -> np.ndarray:
    return exact(np.random.default_rng(seed).standard_normal((n, d)))


def test_kl_hand_worked() -> None:
    """p = (½, ½), q = (¼, ¾): ½ ln 2 + ½ ln ⅔."""
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(expected, rel=1e-7)  # float32
    assert float(kl_divergence(p.log() + 5, q.log() - 3)) == pytest.approx(expected, rel=1e-6)


def test_kl_equals_the_naive_one_and_never_is_negative() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((5, 40)) * 4, rng.standard_normal((5, 40)) * 4
    found = kl_divergence(torch.from_numpy(a), torch.from_numpy(b))
    expected = [
        measures.kl(p, q) for p, q in zip(measures.softmax(a), measures.softmax(b), strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert found.dtype == torch.float64
    near = torch.from_numpy(a)
    assert (kl_divergence(near, near) == 0).all()
    assert (kl_divergence(near, near + 1e-9 * torch.from_numpy(b)) >= 0).all()


def test_kl_with_impossible_tokens() -> None:
    some = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    other = torch.tensor([[0.0, 0.0], [0.0, -math.inf]])
    found = kl_divergence(some, other)
    assert float(found[0]) == pytest.approx(math.log(2))
    assert float(found[1]) == math.inf


def test_kl_survives_extreme_logits() -> None:
    """Logits of ±1e4: probabilities of exactly 0 and 1."""
    a = torch.tensor([[1e4, -1e4, 0.0]])
    assert float(kl_divergence(a, a)) == 0
    assert float(kl_divergence(a, torch.zeros(1, 3))) == pytest.approx(math.log(3))


def naive_curve(
    base: np.ndarray, tuned: np.ndarray, v: np.ndarray, head: Head, target: Head
) -> np.ndarray:
    """KL(p_tuned‖p_λ) of each row and strength, in loops."""
    kl = np.empty((len(base), len(GRID)))
    for i in range(len(base)):
        p = measures.softmax(target(torch.from_numpy(tuned[i : i + 1])).numpy()[0])
        for j, strength in enumerate(GRID):
            shifted = torch.from_numpy(base[i : i + 1] + strength * v)
            kl[i, j] = measures.kl(p, measures.softmax(head(shifted).numpy()[0]))
    return kl


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("chunk_bytes", [1, 2**28])
def test_curve_equals_the_naive_one(cap: float | None, chunk_bytes: int) -> None:
    n, d = 12, 6
    head, target = Head(30, d, cap), Head(30, d, cap, seed=5)
    base, tuned, v = states(n, d), exact(states(n, d, 2) + 1), states(1, d, 3)[0]
    found = kl_recovery(
        base, tuned, v, head, target, GRID, linear=cap is None, draws=50, chunk_bytes=chunk_bytes
    )
    kl = naive_curve(base, tuned, v, head, target)
    # a soft-capped head is given h + λv in float32: 1e-7 of the state
    tolerance = 1e-12 if cap is None else 1e-5
    np.testing.assert_allclose(found.kl, kl.mean(axis=0), rtol=tolerance)
    assert found.kl_tuned_base == pytest.approx(kl[:, 2].mean(), rel=1e-12)
    for j, interval in enumerate(found.recovered):
        assert interval is not None
        assert interval.value == pytest.approx(1 - kl[:, j].sum() / kl[:, 2].sum(), abs=tolerance)
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low <= interval.value + 1e-12
        assert interval.high >= interval.value - 1e-12
    top = target(torch.from_numpy(tuned)).argmax(-1)
    for j, strength in enumerate(GRID):
        same = head(torch.from_numpy(base + strength * v)).argmax(-1) == top
        assert found.agreement[j] == pytest.approx(float(same.double().mean()))
    assert found.n == n
    assert found.strengths == tuple(GRID)


@pytest.mark.parametrize("cap", [None, 8.0])
def test_a_planted_shift_is_recovered_whole(cap: float | None) -> None:
    """tuned = base + v: KL is 0 at λ = 1, all of it recovered, and that λ is the best."""
    d = 8
    head = Head(50, d, cap)
    v = states(1, d, 4)[0] * 0.25
    base = states(40, d)
    found = kl_recovery(base, base + v, v, head, head, GRID, linear=cap is None, draws=100)
    one = GRID.index(1.0)
    assert found.kl_tuned_base > 0.05
    assert found.kl[one] < 1e-12  # the state h + v was rounded to float32
    assert found.agreement[one] == 1
    assert found.recovered[one] is not None
    assert found.recovered[one].value == pytest.approx(1, abs=1e-10)
    zero = found.recovered[GRID.index(0.0)]
    assert zero is not None
    assert (zero.value, zero.low, zero.high) == pytest.approx((0, 0, 0), abs=1e-14)
    optimum = found.optimal_strength
    assert optimum is not None
    assert optimum.value == pytest.approx(1, abs=1e-6)
    assert (optimum.low, optimum.high) == pytest.approx((1, 1), abs=1e-6)
    assert found.optimal_recovered == pytest.approx(1, abs=1e-10)
    assert found.undefined is None


def test_inverting_swaps_the_roles() -> None:
    d = 8
    head = Head(50, d)
    v, base = states(1, d, 4)[0] * 0.25, states(20, d)
    found = kl_recovery(base + v, base, v, head, head, [-2, -1, 0], linear=True, draws=50)
    assert found.kl[1] < 1e-12
    assert found.optimal_strength is not None
    assert found.optimal_strength.value == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize(("size", "places"), [(0.05, 1e-7), (0.3, 1e-7), (1.5, 1e-5)])
def test_optimal_strength_equals_a_direct_minimisation(size: float, places: float) -> None:
    """Between grid points, by minimising the float64 total with SciPy. Larger v bend the curve more
    within one grid step, which costs the interpolant digits."""
    from scipy.optimize import minimize_scalar

    d = 6
    head, n = Head(40, d), 30
    base, v = states(n, d), exact(states(1, d, 6)[0] * size)
    tuned = exact(base + 0.7 * v + 0.2 * states(n, d, 7))
    found = kl_recovery(base, tuned, v, head, head, GRID, linear=True, draws=20)

    def total(strength: float) -> float:
        p = head(torch.from_numpy(tuned))
        return float(kl_divergence(p, head(torch.from_numpy(base + strength * v))).sum())

    best = minimize_scalar(total, bounds=(-1, 2), method="bounded", options={"xatol": 1e-10})
    assert found.optimal_strength is not None
    assert found.optimal_strength.value == pytest.approx(float(best.x), abs=max(places, 2e-7))
    assert found.optimal_recovered == pytest.approx(1 - best.fun / total(0.0), abs=1e-8)


def test_interval_of_the_optimal_strength_covers() -> None:
    """Each conversation has its own strength around 0.6; intervals cover the population's optimum.

    60 data sets: 0.95 ± 3 · 0.028; percentiles of 100 draws of 40 rows run a little narrow.
    """
    d = 5
    head = Head(25, d)
    v = states(1, d, 8)[0] * 0.4

    def data(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        base = states(n, d, 1000 + seed)
        return base, base + rng.normal(0.6, 0.5, (n, 1)) * v

    truth = kl_recovery(*data(0, 20000), v, head, head, GRID, linear=True, draws=1).optimal_strength
    assert truth is not None
    hits = 0
    for seed in range(1, 61):
        found = kl_recovery(*data(seed, 40), v, head, head, GRID, linear=True, draws=100, seed=seed)
        interval = found.optimal_strength
        assert interval is not None
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low <= interval.value <= interval.high
        hits += interval.low <= truth.value <= interval.high
    assert hits / 60 >= 0.85


def test_conversations_widen_the_interval() -> None:
    """Four equal tokens a conversation: the interval of single tokens is half as wide."""
    d = 5
    head = Head(25, d)
    v = states(1, d, 8)[0] * 0.4
    rng = np.random.default_rng(3)
    base = np.repeat(states(40, d), 4, axis=0)
    tuned = base + np.repeat(rng.normal(0.6, 0.5, (40, 1)), 4, axis=0) * v
    keys = [f"c{i // 4}" for i in range(160)]

    def width(clusters: list[str] | None) -> float:
        found = kl_recovery(base, tuned, v, head, head, GRID, clusters, linear=True, draws=800)
        assert found.optimal_strength is not None
        assert found.optimal_strength.low is not None
        assert found.optimal_strength.high is not None
        return found.optimal_strength.high - found.optimal_strength.low

    assert width(None) / width(keys) == pytest.approx(0.5, abs=0.1)


def test_equal_models_have_nothing_to_recover() -> None:
    head, base = Head(20, 4), states(6, 4)
    found = kl_recovery(base, base, states(1, 4, 2)[0], head, head, GRID, linear=True, draws=10)
    assert found.kl_tuned_base == 0
    assert found.recovered == (None,) * len(GRID)
    assert found.optimal_strength is None
    assert found.optimal_recovered is None
    assert found.undefined is not None
    assert "nothing to recover" in found.undefined


def test_a_zero_vector_has_no_best_strength() -> None:
    head, base = Head(20, 4), states(6, 4)
    found = kl_recovery(base, base + 1, np.zeros(4), head, head, GRID, linear=True, draws=10)
    assert found.optimal_strength is None
    assert found.undefined is not None
    assert "vector is zero" in found.undefined
    values = [interval.value for interval in found.recovered if interval is not None]
    assert values == pytest.approx([0] * len(GRID), abs=1e-12)


def test_a_minimum_beyond_the_grid_is_said() -> None:
    head, base, v = Head(20, 4), states(6, 4), states(1, 4, 2)[0]
    found = kl_recovery(base, base + 3 * v, v, head, head, GRID, linear=True, draws=10)
    assert found.optimal_strength is None
    assert found.undefined is not None
    assert "strength 2, the last of the grid" in found.undefined
    assert all(interval is not None for interval in found.recovered)


def test_one_row() -> None:
    head, base, v = Head(20, 4), states(1, 4), states(1, 4, 2)[0]
    found = kl_recovery(base, base + 0.8 * v, v, head, head, GRID, linear=True, draws=10)
    assert found.optimal_strength is not None
    assert found.optimal_strength.value == pytest.approx(0.8, abs=1e-5)
    assert found.optimal_strength.low is None


def test_huge_vectors_neither_overflow_nor_vanish() -> None:
    """e^{λu} of 1e3 and more leaves float64: such strengths are read logit by logit."""
    head, base = Head(20, 4), states(6, 4)
    v = 1000 * states(1, 4, 2)[0]
    found = kl_recovery(base, base, v, head, Head(20, 4, seed=9), GRID, linear=True, draws=10)
    assert np.isfinite(found.kl).all()
    zero = kl_recovery(base, base, v / 1e3, head, Head(20, 4, seed=9), GRID, linear=True, draws=10)
    middle = GRID.index(0.0)
    assert found.kl[middle] == pytest.approx(zero.kl[middle], rel=1e-12)
    assert found.kl[0] > 100


def test_refuses() -> None:
    head, base, v = Head(20, 4), states(6, 4), states(1, 4, 2)[0]
    with pytest.raises(MeasurementError, match="at least 3 rising"):
        kl_recovery(base, base, v, head, head, [0.0, 1.0], linear=True)
    with pytest.raises(MeasurementError, match="at least 3 rising"):
        kl_recovery(base, base, v, head, head, [0.0, 1.0, 1.0], linear=True)
    base[0, 0] = math.nan
    with pytest.raises(MeasurementError, match="base_states: 1 of 24"):
        kl_recovery(base, states(6, 4), v, head, head, GRID, linear=True)
