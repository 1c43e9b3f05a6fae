"""Means, shared share, radial parts and strengths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from reference import measures

from dsteer.errors import MeasurementError
from dsteer.geometry.displacement import (
    StreamingMean,
    as_matrix,
    as_vector,
    least_squares_strength,
    radial,
    shared_share,
    strengths_along,
)

RNG = np.random.default_rng(22)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_streaming_mean(chunk: int) -> None:
    rows = RNG.standard_normal((50, 4)).astype(np.float32) + 1e4
    mean = StreamingMean()
    for start in range(0, len(rows), chunk):
        mean.update(rows[start : start + chunk])
    exact = [math.fsum(column) / 50 for column in rows.T.tolist()]
    np.testing.assert_allclose(mean.mean.numpy(), exact, rtol=1e-14)
    assert mean.mean.dtype == torch.float64
    assert mean.count == 50


def test_streaming_mean_refuses() -> None:
    mean = StreamingMean()
    with pytest.raises(MeasurementError, match="no rows"):
        _ = mean.mean
    mean.update(np.ones((2, 3)))
    with pytest.raises(MeasurementError, match="width 4, but earlier chunks have 3"):
        mean.update(np.ones((2, 4)))
    with pytest.raises(MeasurementError, match="not finite"):
        mean.update(np.array([[1.0, math.nan, 0.0]]))


@pytest.mark.parametrize(("n", "d"), [(2, 3), (9, 4), (4, 9)])
def test_shared_share_equals_the_naive_one(n: int, d: int) -> None:
    rows = RNG.standard_normal((n, d)) + 0.4
    found = shared_share(rows)
    assert (found.plain, found.debiased) == pytest.approx(measures.shared_share(rows), rel=1e-12)


def test_shared_share_hand_worked() -> None:
    """A constant: 1 and 1. Two orthogonal rows of norm 1: ‖v‖² = ½, m = ½, ⟨Δ₁, Δ₂⟩ = 0."""
    constant = shared_share(np.tile([1.0, 2.0], (5, 1)))
    assert (constant.plain, constant.debiased) == pytest.approx((1, 1))
    orthogonal = shared_share(np.eye(2))
    assert (orthogonal.plain, orthogonal.debiased) == pytest.approx((0.5, 0))
    opposite = shared_share(np.array([[1.0], [-1.0]]))
    assert (opposite.plain, opposite.debiased) == pytest.approx((0, -1))


def test_shared_share_of_noise() -> None:
    """Plain is 1/N on noise, debiased 0: the spread of both is about 1/(N√d) = 0.0003 here."""
    found = shared_share(np.random.default_rng(5).standard_normal((100, 1000)))
    assert found.plain == pytest.approx(1 / 100, abs=0.0015)
    assert found.debiased == pytest.approx(0, abs=0.0015)


def test_shared_share_undefined() -> None:
    zero = shared_share(np.zeros((3, 2)))
    assert (zero.plain, zero.debiased) == (None, None)
    one = shared_share(np.ones((1, 2)))
    assert one.plain == pytest.approx(1)
    assert one.debiased is None


def test_norm_growth_is_inert_and_an_orthogonal_shift_is_not() -> None:
    h = RNG.standard_normal(64)
    across = RNG.standard_normal(64)
    across -= (across @ h) / (h @ h) * h
    across *= np.linalg.norm(h) / np.linalg.norm(across)
    for growth in (0.3, -0.3, 5.0):
        grown = radial(growth * h, h)
        assert grown.inert is True
        assert grown.cosine == pytest.approx(math.copysign(1, growth), abs=1e-12)
        assert grown.radial_norm == pytest.approx(abs(growth) * np.linalg.norm(h))
        assert grown.tangential_norm == pytest.approx(0, abs=1e-12)
        assert grown.kept == pytest.approx(0, abs=1e-12)
    for size in (1e-6, 0.3, 1.0, 100.0):
        turned = radial(size * across, h)
        assert turned.inert is False
        assert turned.cosine == pytest.approx(0, abs=1e-12)
        assert turned.kept == pytest.approx(1, abs=1e-9)
        assert turned.tangential_norm == pytest.approx(size * np.linalg.norm(h))


def test_inert_is_about_the_effect_not_the_cosine() -> None:
    """A shift of cosine 0.96 with h still turns it by tan θ = 0.28 ‖v‖ / (‖h‖ + 0.96 ‖v‖)."""
    h = np.array([10.0, 0.0])
    v = 3 * np.array([0.96, 0.28])
    found = radial(v, h)
    turn = math.atan2(3 * 0.28, 10 + 3 * 0.96)
    orthogonal = math.atan2(3, 10)
    assert found.kept == pytest.approx(math.sin(turn / 2) / math.sin(orthogonal / 2))
    assert found.inert is False
    assert radial(3 * np.array([0.999, 0.0447]), h).inert is True


def test_a_shift_that_turns_the_state_round_is_not_inert() -> None:
    h = np.array([1.0, 2.0, 3.0])
    found = radial(-2 * h, h)
    assert found.cosine == pytest.approx(-1)
    assert found.inert is False


def test_the_flag_agrees_with_rmsnorm_itself() -> None:
    """``kept`` is a ratio of real differences after RMSNorm."""

    def rms_norm(x: np.ndarray) -> np.ndarray:
        return np.asarray(x / np.sqrt((x**2).mean()))

    h = RNG.standard_normal(32)
    v = 0.5 * RNG.standard_normal(32)
    across = RNG.standard_normal(32)
    across -= (across @ h) / (h @ h) * h
    across *= np.linalg.norm(v) / np.linalg.norm(across)
    effect = np.linalg.norm(rms_norm(h + v) - rms_norm(h))
    most = np.linalg.norm(rms_norm(h + across) - rms_norm(h))
    assert radial(v, h).kept == pytest.approx(effect / most, rel=1e-12)


def test_radial_undefined() -> None:
    for v, h in ((np.zeros(3), np.ones(3)), (np.ones(3), np.zeros(3))):
        found = radial(v, h)
        assert found.cosine is None
        assert found.kept is None
        assert found.inert is None
        assert found.tangential_norm == pytest.approx(np.linalg.norm(v))


def test_least_squares_strength() -> None:
    rows = RNG.standard_normal((40, 6)) + 1
    v = rows[:20].mean(axis=0)
    expected = np.linalg.lstsq(np.tile(v, 20)[:, None], rows[20:].ravel(), rcond=None)[0][0]
    assert least_squares_strength(rows[20:], v) == pytest.approx(float(expected), rel=1e-12)
    each = strengths_along(rows[20:], v)
    assert each is not None
    assert float(each.mean()) == pytest.approx(float(expected), rel=1e-12)
    assert least_squares_strength(np.tile(v, (3, 1)) * 2, v) == pytest.approx(2, rel=1e-12)
    assert least_squares_strength(rows, np.zeros(6)) is None


def test_input_checks_name_value_expectation_and_remedy() -> None:
    with pytest.raises(MeasurementError, match=r"states: shape \(5,\), expected \(n, d\)"):
        as_matrix(np.ones(5))
    with pytest.raises(MeasurementError, match=r"vector: shape \(1, 5\), expected \(d\)"):
        as_vector(np.ones((1, 5)))
    with pytest.raises(MeasurementError, match="expected real numbers"):
        as_vector(np.array(["a"]))
    with pytest.raises(MeasurementError, match="expected real numbers"):
        as_vector(np.array([True]))
    assert as_vector([1, 2]).dtype == np.float64
    assert as_matrix(torch.ones(2, 2, dtype=torch.int64)).dtype == np.float64
