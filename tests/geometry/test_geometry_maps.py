"""Nested maps of states: planted maps are found, and each fit against numpy's own least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsteer.errors import MeasurementError
from dsteer.geometry.maps import NAMES, StateMap, fit_maps

WIDTH, FIT, TUNE = 12, 200, 80
RANKS = (1, 2, 4, 8)
PENALTIES = (1e-6, 1e-2, 1.0)


def states(n: int, seed: int, width: int = WIDTH) -> np.ndarray:
    """States of unequal variances about a mean far from zero."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) * np.linspace(0.5, 2, width) + 3 * rng.normal(size=width)


def fitted(planted, seed: int = 0, n: int = FIT, width: int = WIDTH) -> dict[str, StateMap]:
    base, tune = states(n, seed, width), states(TUNE, seed + 1, width)
    rows = (base, planted(base), tune, planted(tune))
    return fit_maps(*(torch.from_numpy(part) for part in rows), RANKS, PENALTIES)


def r2(found: StateMap, base: np.ndarray, delta: np.ndarray) -> float:
    guess = found.displace(torch.from_numpy(base)).numpy()
    return 1 - float(((delta - guess) ** 2).sum() / (delta**2).sum())


def test_each_planted_map_is_found_by_its_own_kind_and_those_that_hold_it() -> None:
    rng = np.random.default_rng(5)
    b = rng.normal(size=WIDTH)
    low = rng.normal(size=(WIDTH, 2)) @ rng.normal(size=(2, WIDTH)) / WIDTH
    full = rng.normal(size=(WIDTH, WIDTH)) / WIDTH
    holds = {
        "scale": (lambda h: 0.3 * h, {"scale", "scale_translation", "ridge"}),
        "translation": (
            lambda h: np.tile(b, (len(h), 1)),
            {"translation", "scale_translation", "low_rank", "ridge"},
        ),
        "both": (lambda h: 0.3 * h + b, {"scale_translation", "ridge"}),
        "low rank": (lambda h: b + h @ low, {"low_rank", "ridge"}),
        "full": (lambda h: b + h @ full, {"ridge"}),
    }
    base = states(100, 9)
    for planted, exact in holds.values():
        found = fitted(planted)
        assert tuple(found) == NAMES
        for name, each in found.items():
            share = r2(each, base, planted(base))
            # the least penalty, 1e-6, shrinks by about that much: its square is far below this
            assert (share > 1 - 1e-9) == (name in exact), (name, share)


def test_the_planted_rank_is_chosen_and_the_constant_is_recovered_exactly() -> None:
    rng = np.random.default_rng(6)
    b = rng.normal(size=WIDTH)
    low = rng.normal(size=(WIDTH, 2)) @ rng.normal(size=(2, WIDTH)) / WIDTH
    assert fitted(lambda h: b + h @ low)["low_rank"].rank == 2
    assert fitted(lambda h: 0.3 * h)["scale"].factor == pytest.approx(0.3, rel=1e-12)
    both = fitted(lambda h: 0.3 * h + b)["scale_translation"]
    assert both.factor == pytest.approx(0.3, rel=1e-12)
    np.testing.assert_allclose(both.shift, b, atol=1e-12)


def test_fits_are_those_of_numpys_least_squares() -> None:
    """On noise no map is exact: the factors and the ridge weights are those of stacked systems."""
    rng = np.random.default_rng(7)
    base, tune = states(FIT, 1), states(TUNE, 2)
    delta, aim = rng.normal(size=base.shape) + 0.2 * base, rng.normal(size=tune.shape)
    found = fit_maps(*(torch.from_numpy(x) for x in (base, delta, tune, aim)), (3,), (0.5,))
    a = np.linalg.lstsq(base.reshape(-1, 1), delta.ravel(), rcond=None)[0]
    assert found["scale"].factor == pytest.approx(float(a[0]), rel=1e-10)
    # one factor and a free constant for each coordinate
    ones = np.kron(np.ones((FIT, 1)), np.eye(WIDTH))
    both = np.linalg.lstsq(np.hstack([base.reshape(-1, 1), ones]), delta.ravel(), rcond=None)[0]
    assert found["scale_translation"].factor == pytest.approx(float(both[0]), rel=1e-9)
    np.testing.assert_allclose(found["scale_translation"].shift, both[1:], atol=1e-9)
    # ridge: the penalty as rows of the system
    x, d = base - base.mean(0), delta - delta.mean(0)
    root = np.sqrt(FIT * 0.5 * x.var(axis=0).mean())
    tall = np.vstack([x, root * np.eye(WIDTH)])
    weights = np.linalg.lstsq(tall, np.vstack([d, 0 * np.eye(WIDTH)]), rcond=None)[0]
    want = delta.mean(0) + (tune - base.mean(0)) @ weights
    np.testing.assert_allclose(found["ridge"].displace(torch.from_numpy(tune)), want, atol=1e-9)
    # reduced rank: the penalised fit's best rank-3 approximation, by Eckart and Young
    _, _, axes = np.linalg.svd(tall @ weights, full_matrices=False)
    want = delta.mean(0) + (tune - base.mean(0)) @ weights @ axes[:3].T @ axes[:3]
    np.testing.assert_allclose(found["low_rank"].displace(torch.from_numpy(tune)), want, atol=1e-9)


def test_fewer_rows_than_coordinates_and_coordinates_without_variance() -> None:
    wide = 40
    rng = np.random.default_rng(8)
    b, w = rng.normal(size=wide), rng.normal(size=wide) / wide

    def planted(h: np.ndarray) -> np.ndarray:
        return b + np.outer(h @ w, b)

    few = fitted(planted, n=15, width=wide)
    base = states(50, 9, wide)
    for each in few.values():
        assert np.isfinite(r2(each, base, planted(base)))
    # of 14 free rows the fit is all but exact, where the least penalty is taken
    own, tune = states(15, 0, wide), states(TUNE, 1, wide)
    own[:, ::2] = tune[:, ::2] = 1.5  # half of the coordinates never vary
    rows = (own, planted(own), own, planted(own))
    still = fit_maps(*(torch.from_numpy(part) for part in rows), RANKS, PENALTIES)
    assert still["ridge"].penalty == min(PENALTIES)
    assert r2(still["ridge"], own, planted(own)) > 1 - 1e-6
    # with one row nothing varies: every affine map is the constant
    one = (own[:1], planted(own[:1]), tune, planted(tune))
    single = fit_maps(*(torch.from_numpy(part) for part in one), RANKS, PENALTIES)
    for name in ("scale_translation", "low_rank", "ridge"):
        np.testing.assert_allclose(
            single[name].displace(torch.from_numpy(tune)), np.tile(planted(own[:1]), (TUNE, 1))
        )


def test_what_cannot_be_fitted_is_refused() -> None:
    rows = [torch.ones(4, 3, dtype=torch.float64)] * 4
    for ranks, penalties in (((), (1.0,)), ((1,), ())):
        with pytest.raises(MeasurementError, match="give at least one of each to choose among"):
            fit_maps(*rows, ranks, penalties)
    broken = [rows[0] * torch.nan, *rows[1:]]
    with pytest.raises(MeasurementError, match="not finite"):
        fit_maps(*broken, (1,), (1.0,))
