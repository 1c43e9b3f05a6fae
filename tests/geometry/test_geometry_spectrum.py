"""Spectra equal numpy's float64 decomposition and hand-worked cases."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import measures

from dsteer.errors import MeasurementError
from dsteer.geometry import spectrum as module
from dsteer.geometry.displacement import shared_share
from dsteer.geometry.intervals import held_out_cosine
from dsteer.geometry.spectrum import Spectrum, spectra, spectrum

RNG = np.random.default_rng(20)
TOLERANCE = 1e-10  # of σ₁: what the module promises


def orthogonal(n: int, k: int) -> np.ndarray:
    return np.linalg.qr(RNG.standard_normal((n, k)))[0]


def with_values(n: int, d: int, sigma: np.ndarray) -> np.ndarray:
    """A matrix (n, d) of known singular values, its rows in general position."""
    k = len(sigma)
    return (orthogonal(n, k) * sigma) @ orthogonal(d, k).T


KINDS = {
    "noise": lambda n, d: RNG.standard_normal((n, d)),
    "rank one": lambda n, d: np.outer(RNG.standard_normal(n), RNG.standard_normal(d)),
    "rank three": lambda n, d: RNG.standard_normal((n, 3)) @ RNG.standard_normal((3, d)),
    "graded": lambda n, d: with_values(n, d, np.logspace(0, -12, min(n, d))),
    "common shift": lambda n, d: RNG.standard_normal((n, d)) + 10 * RNG.standard_normal(d),
    "huge shift": lambda n, d: RNG.standard_normal((n, d)) + 1e6 * RNG.standard_normal(d),
    "scaled rows": lambda n, d: (
        RNG.standard_normal((n, d)) * np.exp(3 * RNG.standard_normal((n, 1)))
    ),
    "one wide column": lambda n, d: RNG.standard_normal((n, d)) * np.where(np.arange(d), 1, 1e4),
    "minute": lambda n, d: 1e-12 * RNG.standard_normal((n, d)),
}
SHAPES = [(1, 1), (1, 6), (6, 1), (2, 2), (2, 9), (9, 2), (30, 30), (31, 30), (30, 31), (90, 40),
          (40, 90), (300, 200)]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_singular_values_equal_numpy(kind: str, n: int, d: int) -> None:
    rows = KINDS[kind](n, d)
    both = spectra(rows)
    for found, target in zip(both, (rows, measures.centred(rows)), strict=True):
        assert found.singular_values.dtype == torch.float64
        assert found.singular_values.shape == (min(n, d),)
        sigma = found.singular_values.numpy()
        assert (np.diff(sigma) <= 0).all()
        if n == 1 and found.centred:
            assert not sigma.any()
            continue
        expected = measures.singular_values(target)
        np.testing.assert_allclose(sigma, expected, rtol=0, atol=TOLERANCE * expected[0])
        alone = spectrum(rows, centred=found.centred)
        assert torch.equal(alone.singular_values, found.singular_values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_first_right_is_the_leading_direction(kind: str, n: int, d: int) -> None:
    rows = KINDS[kind](n, d)
    for found, target in zip(spectra(rows), (rows, measures.centred(rows)), strict=True):
        if found.first_right is None:
            assert n == 1
            continue
        u = found.first_right.numpy()
        assert np.linalg.norm(u) == pytest.approx(1, abs=1e-12)
        # ‖Du‖ = σ₁ holds for the leading direction alone, also where σ₂ is as large
        assert np.linalg.norm(target @ u) == pytest.approx(
            float(found.singular_values[0]), rel=1e-10
        )
        if not found.centred:
            assert u @ rows.sum(axis=0) >= -1e-9 * np.abs(rows).sum()


def test_exact_rank_one_has_no_second_value() -> None:
    """A Gram matrix alone would show σ₂ ≈ 1e-8 σ₁."""
    found = spectrum(np.outer(RNG.standard_normal(200), RNG.standard_normal(64)))
    assert found.sigma_ratio is not None
    assert found.sigma_ratio < 1e-14
    assert found.entropy() == pytest.approx(0, abs=1e-14)
    assert found.effective_rank == pytest.approx(1, abs=1e-11)  # p = 1 sums 64 values of 1e-16
    assert found.participation_ratio == pytest.approx(1, abs=1e-14)
    assert found.stable_rank == pytest.approx(1, abs=1e-14)


def test_well_conditioned_matrices_take_the_gram_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick route must serve what it is for: noise with and without a shift."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("fell back to a singular value decomposition")

    monkeypatch.setattr(module.np.linalg, "svd", refuse)
    for n, d in ((60, 200), (200, 60)):
        noise, shift = RNG.standard_normal((n, d)), RNG.standard_normal(d)
        decaying = noise * np.arange(1, d + 1) ** -1.0
        for rows in (noise, noise + 20 * shift, 1e-6 * noise + shift, decaying):
            spectra(rows)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_equal_spectrum_of_rank_r(rank: int) -> None:
    """r equal singular values: H = ln r for any p, every rank is r."""
    rows = with_values(40, 12, np.full(rank, 3.0))
    found = spectrum(rows)
    np.testing.assert_allclose(found.singular_values[:rank].numpy(), 3.0, rtol=1e-12)
    for power in (1, 2):
        # p = 1 weighs the 12 − r values of about 1e-16 σ₁ that rounding leaves
        assert found.entropy(power) == pytest.approx(math.log(rank), abs=1e-12)
    assert found.entropy(base="bits") == pytest.approx(math.log2(rank), abs=1e-12)
    assert found.entropy(base=2) == found.entropy(base="bits")
    assert found.entropy(base=10) == pytest.approx(math.log10(rank), abs=1e-12)
    assert found.entropy(normalised=True) == pytest.approx(math.log(rank) / math.log(12), abs=1e-12)
    assert found.effective_rank == pytest.approx(rank, abs=1e-11)
    assert found.participation_ratio == pytest.approx(rank, abs=1e-11)
    assert found.stable_rank == pytest.approx(rank, abs=1e-11)
    assert found.sigma_ratio == pytest.approx(0 if rank == 1 else 1, abs=1e-12)


def test_hand_worked_diagonal() -> None:
    """σ = 4, 2, 1: q ∝ 16, 4, 1 for p = 2."""
    rows = np.array([[4.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, -1.0, 0]])
    found = spectrum(rows)
    np.testing.assert_allclose(found.singular_values.numpy(), [4, 2, 1], rtol=1e-12)
    q = [16 / 21, 4 / 21, 1 / 21]
    assert found.entropy() == pytest.approx(-sum(x * math.log(x) for x in q), rel=1e-12)
    p = [4 / 7, 2 / 7, 1 / 7]
    assert found.entropy(power=1) == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-12)
    assert found.participation_ratio == pytest.approx(21**2 / (256 + 16 + 1), rel=1e-12)
    assert found.stable_rank == pytest.approx(21 / 16, rel=1e-12)
    assert found.sigma_ratio == pytest.approx(0.5, rel=1e-12)
    shares = found.top_shares(2)
    assert shares == pytest.approx([4 / math.sqrt(21), 2 / math.sqrt(21)], rel=1e-12)
    assert found.first_right is not None
    np.testing.assert_allclose(found.first_right.numpy(), [1, 0, 0, 0], atol=1e-12)
    assert (found.n, found.d, found.centred) == (3, 4, False)


def test_quantities_equal_the_naive_ones() -> None:
    rows = RNG.standard_normal((50, 30)) * np.arange(1, 31) ** -0.7 + 0.5
    for found in spectra(rows):
        sigma = found.singular_values.numpy()
        for power in (1, 2, 3):
            assert found.entropy(power) == pytest.approx(measures.entropy(sigma, power), rel=1e-12)
        assert found.effective_rank == pytest.approx(measures.effective_rank(sigma), rel=1e-12)
        assert found.participation_ratio == pytest.approx(
            measures.participation_ratio(sigma), rel=1e-12
        )
        assert found.stable_rank == pytest.approx(measures.stable_rank(sigma), rel=1e-12)


def undefined(found: Spectrum) -> bool:
    return (
        found.first_right is None
        and found.sigma_ratio is None
        and found.entropy() is None
        and found.entropy(1, "bits", normalised=True) is None
        and found.effective_rank is None
        and found.participation_ratio is None
        and found.stable_rank is None
        and found.top_shares(5) is None
        and not found.singular_values.any()
    )


@pytest.mark.parametrize(("n", "d"), [(1, 1), (5, 3), (3, 5)])
def test_zero_displacement_is_undefined(n: int, d: int) -> None:
    assert all(undefined(found) for found in spectra(np.zeros((n, d))))


@pytest.mark.parametrize(("n", "d"), [(1, 4), (7, 4), (4, 7), (1000, 3), (10, 500)])
def test_equal_rows_have_no_centred_spectrum(n: int, d: int) -> None:
    """What centring leaves of equal rows is the rounding of their mean, not a spectrum."""
    uncentred, centred = spectra(np.tile(RNG.standard_normal(d), (n, 1)))
    assert not undefined(uncentred)
    assert uncentred.stable_rank == pytest.approx(1, abs=1e-12)
    assert undefined(centred)


def test_small_rest_beside_a_large_shift_is_kept() -> None:
    """Float32 rounding of a planted constant is a real rest and must be measured."""
    b = RNG.standard_normal(64).astype(np.float32)
    states = RNG.standard_normal((100, 64)).astype(np.float32)
    delta = (states + b).astype(np.float64) - states
    uncentred, centred = spectra(delta)
    expected = measures.singular_values(measures.centred(delta))
    np.testing.assert_allclose(
        centred.singular_values.numpy(), expected, rtol=0, atol=TOLERANCE * expected[0]
    )
    assert uncentred.sigma_ratio is not None
    assert uncentred.sigma_ratio < 1e-5  # the planted truth's bound


def test_single_row() -> None:
    found = spectrum(np.array([[3.0, 4.0]]))
    np.testing.assert_allclose(found.singular_values.numpy(), [5.0], rtol=1e-15)
    assert found.sigma_ratio == 0
    assert found.entropy() == 0
    assert found.entropy(normalised=True) is None
    assert found.stable_rank == 1


@pytest.mark.parametrize(
    "convert", [torch.from_numpy, np.asarray, lambda x: torch.tensor(x).t().t()]
)
def test_tensors_and_arrays_agree(convert: Callable[[np.ndarray], object]) -> None:
    rows = RNG.standard_normal((20, 8))
    assert torch.equal(spectrum(convert(rows)).singular_values, spectrum(rows).singular_values)


def test_float32_is_measured_in_float64() -> None:
    rows = RNG.standard_normal((20, 8)).astype(np.float32)
    expected = measures.singular_values(rows.astype(np.float64))
    for given in (rows, torch.from_numpy(rows), torch.from_numpy(rows).requires_grad_()):
        np.testing.assert_allclose(spectrum(given).singular_values.numpy(), expected, rtol=1e-12)
    half = torch.from_numpy(rows).bfloat16()
    expected = measures.singular_values(half.double().numpy())
    np.testing.assert_allclose(spectrum(half).singular_values.numpy(), expected, rtol=1e-12)


def test_input_is_left_as_it_was() -> None:
    for n, d in ((6, 9), (9, 6)):
        rows = RNG.standard_normal((n, d))
        before = rows.copy()
        spectra(rows)
        np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_states_that_are_not_finite_are_refused(bad: float) -> None:
    rows = RNG.standard_normal((4, 3))
    rows[2, 1] = bad
    with pytest.raises(MeasurementError, match="1 of 12 numbers are not finite"):
        spectra(rows)


def test_malformed_input_is_refused_in_one_line() -> None:
    """In a process without the shape hook of the tests, as users run it."""
    code = """
import numpy as np, torch, dsteer
from dsteer.errors import MeasurementError
for given in (np.ones(5), torch.ones(2, 3, 4), np.ones((0, 3)), [[1.0], [2.0, 3.0]], "text",
              np.ones((2, 2), dtype=complex)):
    try:
        dsteer.spectrum(given)
    except MeasurementError as error:
        assert "\\n" not in str(error) and str(error).startswith("delta: "), error
    else:
        raise AssertionError(given)
assert dsteer.spectrum([[3, 0], [0, 4]]).sigma_ratio == 0.75

from dsteer.geometry.displacement import radial, strengths_along
from dsteer.geometry.intervals import held_out_cosine
for call, width in ((dsteer.cosine_to, 5), (strengths_along, 5), (held_out_cosine, (3, 5))):
    try:
        call(np.ones((4, 2)), np.ones(width))
    except MeasurementError as error:
        assert "width" in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError(call)
try:
    radial(np.ones(2), np.ones(3))
except MeasurementError as error:
    assert "width 2, but the mean state has 3" in str(error)
else:
    raise AssertionError("radial")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_trap_one_ratio_is_small_without_one_direction() -> None:
    """Cosines of only 0.5 with v and an isotropic rest give σ₂/σ₁ ≈ 0.10 at N = 500.

    Δ = v + r, ‖v‖ = 1, ‖r‖² = 3 spread over d dimensions. σ₁² ≈ N + 3N/d; the rest has
    σ₂ ≈ √(3/d) (√N + √d). For d = 2048: σ₂/σ₁ ≈ 0.0383 · 67.6 / 22.4 = 0.116.
    """
    rng = np.random.default_rng(3)
    n, d = 500, 2048
    v = np.zeros(d)
    v[0] = 1.0
    rows = v + rng.standard_normal((n, d)) * math.sqrt(3 / d)
    cosines = rows @ v / np.linalg.norm(rows, axis=1)
    assert cosines.mean() == pytest.approx(0.5, abs=0.01)
    found = spectrum(rows)
    assert found.sigma_ratio == pytest.approx(0.116, abs=0.01)
    energy = found.top_shares(1)
    assert energy is not None
    assert energy[0] ** 2 < 0.3  # of the energy, the first direction has only a quarter


def test_trap_three_rank_one_is_no_constant_vector() -> None:
    """Δ = ⟨a, h⟩ u: one direction, of rank one to rounding, with a size that each prompt has.

    On held-out rows a constant explains nothing of it, and an affine map of h everything.
    """
    rng = np.random.default_rng(11)
    h, a, u = rng.standard_normal((400, 12)), rng.standard_normal(12), rng.standard_normal(12)
    delta = np.outer(h @ a, u)
    fit, test = slice(0, 250), slice(250, 400)
    found = spectrum(delta)
    assert found.sigma_ratio is not None
    assert found.sigma_ratio < 1e-7  # rounding of σ₁²
    assert found.effective_rank == pytest.approx(1, abs=1e-5)
    share = shared_share(delta)
    assert share.debiased == pytest.approx(0, abs=0.02)  # 1/N is 0.0025, its spread as much
    held = held_out_cosine(delta[fit], delta[test])
    assert held is not None
    assert held.low is not None
    assert held.high is not None
    assert held.low < 0 < held.high
    left = float(np.square(delta[test] - delta[fit].mean(axis=0)).sum())
    inputs = np.column_stack([h, np.ones(400)])
    affine = np.linalg.lstsq(inputs[fit], delta[fit], rcond=None)[0]
    missed = float(np.square(delta[test] - inputs[test] @ affine).sum())
    energy = float(np.square(delta[test]).sum())
    assert left / energy > 0.9
    assert missed / energy < 1e-20  # least squares of an exact map, in float64
