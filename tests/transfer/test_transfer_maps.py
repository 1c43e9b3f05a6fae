"""Maps between models against numpy and scipy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ortho_group

from dsteer.errors import MeasurementError
from dsteer.transfer.align import ordinary
from dsteer.transfer.maps import Cloud, choose, fit, widths_for

N = 400
EXACT = 1e-9
"""float64 with eigenvectors of covariances: about 1e-16 times their condition, below 1e5 here."""


def states(seed: int, n: int, d: int) -> np.ndarray:
    """Correlated states whose directions differ in size, about a mean."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d)) * np.linspace(0.3, 2, d)
    return rng.standard_normal((n, d)) @ mixing + 3 * rng.standard_normal(d)


def noisy(seed: int, d: int = 6, e: int = 8) -> tuple[np.ndarray, np.ndarray]:
    x = states(seed, N, d)
    rng = np.random.default_rng(seed + 100)
    return x, x @ rng.standard_normal((d, e)) + rng.standard_normal((N, e))


def test_cloud_is_a_principal_component_analysis() -> None:
    x = states(0, N, 6)
    cloud = Cloud.of(x)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2 / N
    np.testing.assert_allclose(cloud.variances, values, rtol=EXACT)
    np.testing.assert_allclose(cloud.axes.T @ cloud.axes, np.eye(6), atol=EXACT)
    np.testing.assert_allclose(cloud.scores @ cloud.axes.T + cloud.mean, x, atol=EXACT)
    flat = np.column_stack([x, x[:, 0]])  # seven columns, six directions
    assert len(Cloud.of(flat).variances) == 6


@pytest.mark.parametrize("penalty", [1e-6, 0.1, 3.0])
def test_ridge_is_the_normal_equations(penalty: float) -> None:
    x, y = noisy(1)
    found = fit("ridge", Cloud.of(x), Cloud.of(y), penalty=penalty)
    a, b = x - x.mean(0), y - y.mean(0)
    size = penalty * np.trace(a.T @ a / N) / 6
    wanted = np.linalg.solve(a.T @ a / N + size * np.eye(6), a.T @ b / N).T
    np.testing.assert_allclose(found.linear, wanted, atol=EXACT)
    np.testing.assert_allclose(found(x), a @ wanted.T + y.mean(0), atol=1e-8)
    v = np.arange(6.0)
    np.testing.assert_allclose(found.carry(v), wanted @ v, atol=1e-8)
    rest = y - (a @ wanted.T + y.mean(0))
    wanted_r2 = 1 - (rest**2).sum() / (b**2).sum()
    assert found.r_squared(x, y) == pytest.approx(wanted_r2, abs=EXACT)


def test_procrustes_is_scipys_on_principal_axes() -> None:
    x, y = noisy(2, d=6, e=8)
    found = fit("procrustes", Cloud.of(x), Cloud.of(y), width=5)
    a, b = x - x.mean(0), y - y.mean(0)
    p_a = np.linalg.svd(a, full_matrices=False)[2][:5].T
    p_b = np.linalg.svd(b, full_matrices=False)[2][:5].T
    turn, size = orthogonal_procrustes(a @ p_a, b @ p_b)
    scale = size / ((a @ p_a) ** 2).sum()
    np.testing.assert_allclose(found.linear, scale * p_b @ turn.T @ p_a.T, atol=EXACT)


def test_cca_of_full_width_is_ridge_and_its_correlations_are_canonical() -> None:
    x, y = noisy(3)
    sender, receiver = Cloud.of(x), Cloud.of(y)
    for penalty in (1e-6, 0.1):
        full = fit("cca", sender, receiver, penalty=penalty, width=6)
        ridge = fit("ridge", sender, receiver, penalty=penalty)
        np.testing.assert_allclose(full.linear, ridge.linear, atol=1e-8)
    # canonical directions by the textbook's generalised eigenproblem, without penalty
    a, b = x - x.mean(0), y - y.mean(0)
    s_xx, s_yy, s_xy = a.T @ a, b.T @ b, a.T @ b
    values, vectors = np.linalg.eig(np.linalg.solve(s_xx, s_xy @ np.linalg.solve(s_yy, s_xy.T)))
    top = vectors[:, np.argsort(values.real)[::-1][:2]].real
    one = fit("cca", sender, receiver, penalty=1e-12, width=2)
    # prediction through two canonical variates: least squares of Y on them
    variates = a @ top
    wanted = variates @ np.linalg.lstsq(variates, b, rcond=None)[0] + y.mean(0)
    np.testing.assert_allclose(one(x), wanted, atol=1e-7)


@pytest.mark.parametrize("kind", ["ridge", "procrustes", "cca"])
def test_a_rotation_is_found(kind: str) -> None:
    d = 6
    rotation = ortho_group.rvs(d, random_state=4)
    x = states(4, N, d)
    y = 2.5 * (x @ rotation.T) + 1
    tune = states(5, 50, d)
    widths = [6, 3]
    found = choose(
        kind, Cloud.of(x), Cloud.of(y), (tune, 2.5 * (tune @ rotation.T) + 1), [1e-10, 1.0], widths
    )  # type: ignore[arg-type]
    np.testing.assert_allclose(found.linear, 2.5 * rotation, atol=1e-6)  # the penalty's share
    assert found.penalty in (None, 1e-10)
    assert found.width in (None, 6)
    assert found.r_squared(tune, 2.5 * (tune @ rotation.T) + 1) == pytest.approx(1, abs=1e-8)


def test_settings_are_chosen_on_the_tune_states() -> None:
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((12, 10)), rng.standard_normal((12, 10))  # nothing to learn
    tune = rng.standard_normal((200, 10)), rng.standard_normal((200, 10))
    found = choose("ridge", Cloud.of(x), Cloud.of(y), tune, [1e-8, 1.0, 1e4], [])
    assert found.penalty == 1e4
    narrow = choose("procrustes", Cloud.of(x), Cloud.of(y), tune, [], [10, 1])
    assert narrow.width == 1


def test_a_shuffled_map_knows_both_sides_but_not_the_pairs() -> None:
    x = states(7, N, 6)
    rotation = ortho_group.rvs(6, random_state=7)
    sender, receiver = Cloud.of(x), Cloud.of(x @ rotation.T)
    shuffled = receiver.shuffled(0)
    np.testing.assert_allclose(
        np.sort(shuffled.scores, axis=0), np.sort(receiver.scores, axis=0), atol=0
    )
    whole = fit("ridge", sender, receiver, penalty=1e-8)
    broken = fit("ridge", sender, shuffled, penalty=1e-8)
    held = states(8, 100, 6)
    assert whole.r_squared(held, held @ rotation.T) == pytest.approx(1, abs=1e-6)
    # least squares on unrelated rows explains about d/n of the fit rows, and nothing held out
    assert broken.r_squared(held, held @ rotation.T) < 0.1


def test_widths() -> None:
    a, b = Cloud.of(states(0, N, 24)), Cloud.of(states(1, N, 16))
    assert widths_for("auto", a, b) == [16, 8, 4, 2]
    assert widths_for([100, 5], a, b) == [16, 5]


def test_mistakes() -> None:
    x = states(0, 20, 4)
    with pytest.raises(MeasurementError, match="do not differ"):
        Cloud.of(np.ones((5, 3)))
    with pytest.raises(MeasurementError, match="20 states of the sender for 19"):
        fit("ridge", Cloud.of(x), Cloud.of(x[:19]), penalty=1.0)
    with pytest.raises(MeasurementError, match="cca needs a penalty"):
        fit("cca", Cloud.of(x), Cloud.of(x), width=2)
    flat = fit("ridge", Cloud.of(x), Cloud.of(x), penalty=1.0)
    assert flat.r_squared(x, np.ones((20, 4))) is None


@pytest.mark.parametrize("kind", ["ridge", "procrustes", "cca"])
def test_sinks_explain_nothing(kind: str) -> None:
    """Independent states but for one huge state a text, the same in all texts."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 2000, 12))
    sinks = np.arange(2000) % 40 == 0
    x[sinks], y[sinks] = 300 * np.eye(12)[0], 300 * np.eye(12)[1]

    def explained(a: np.ndarray, b: np.ndarray) -> float:
        fitted, tuned, held = slice(0, 1200), slice(1200, 1600), slice(1600, None)
        clouds = Cloud.of(a[fitted]), Cloud.of(b[fitted])
        best = choose(
            kind, *clouds, (a[tuned], b[tuned]), (1e-6, 1e-3, 10.0), widths_for("auto", *clouds)
        )
        found = best.r_squared(a[held], b[held])
        assert found is not None
        return found

    assert explained(x, y) > 0.9, "all of it the sinks'"
    kept = ordinary([x, y])
    assert kept.tolist() == (~sinks).tolist()
    # noise: of 12 directions fitted on 1170 rows, about −0.01
    assert abs(explained(x[kept], y[kept])) < 0.03


def test_a_sink_in_one_model_alone_is_left_out_of_both() -> None:
    x, y = np.ones((2, 5, 3))
    y[3] *= 11
    assert ordinary([x, y]).tolist() == [True, True, True, False, True]
    assert ordinary([x, x]).all()
