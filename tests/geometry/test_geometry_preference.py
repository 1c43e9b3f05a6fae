"""Preference vectors, the exact gradient, pairwise cosines and principal axes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsteer.errors import MeasurementError
from dsteer.geometry.preference import (
    PrincipalAxes,
    loss_weights,
    margins,
    orthonormal,
    other_pairs,
    paired_cosines,
    pairwise_cosines,
    preference_gradients,
    preference_vectors,
    random_cosines,
    unit_rows,
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ---------------------------------------------------------------------------------- e_w − e_l


def test_preference_vectors_by_hand() -> None:
    head = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    found = preference_vectors(head, [2, 1], [0, 1], scale=0.5)
    assert found.dtype == torch.float64
    assert found.tolist() == [[1.0, 1.5], [0.0, 0.0]]
    assert margins(torch.tensor([[2.0, 4.0], [1.0, 1.0]]), found).tolist() == [8.0, 0.0]


@pytest.mark.parametrize(
    ("preferred", "rejected", "words"),
    [([], [], "at least one"), ([0], [1, 2], "1 preferred and 2"), ([3], [0], "has 3 rows"),
     ([0], [-1], "tokens -1 to 0")],
)  # fmt: skip
def test_tokens_that_make_no_pair(preferred: list[int], rejected: list[int], words: str) -> None:
    with pytest.raises(MeasurementError, match=words):
        preference_vectors(torch.eye(3), preferred, rejected)


def test_cosines_row_by_row() -> None:
    first = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 2.0]])
    second = torch.tensor([[0.0, 2.0], [3.0, 3.0], [1.0, 0.0], [-1.0, -2.0]])
    found = paired_cosines(first, second)
    assert found[[0, 1, 3]].tolist() == pytest.approx([0, 1, -1], abs=1e-15)
    assert math.isnan(found[2])
    assert unit_rows(first)[2].tolist() == [0.0, 0.0]
    unchecked = paired_cosines.__wrapped__  # what a user without shape checks calls
    with pytest.raises(MeasurementError, match=r"\(4, 2\) and \(3, 2\)"):
        unchecked(first, second[:3])


def test_products_with_other_pairs() -> None:
    first, second = normal(0, 7, 3), normal(1, 7, 3)
    products = first @ second.T
    found = other_pairs(first, second)
    assert found is not None
    assert found.value == pytest.approx(products[~np.eye(7, dtype=bool)].mean(), rel=1e-12)
    left = [products[k][:, k][~np.eye(6, dtype=bool)].mean() for k in
            (np.delete(np.arange(7), i) for i in range(7))]  # fmt: skip
    error = math.sqrt(6 / 7 * sum((x - np.mean(left)) ** 2 for x in left))
    assert found.high is not None
    assert found.high - found.value == pytest.approx(2.4469118511449692 * error, rel=1e-9)
    # one conversation alone leaves nothing to vary, one row has no other
    alone = other_pairs(first, second, ["a"] * 7)
    assert alone is not None
    assert alone.value == pytest.approx(found.value, rel=1e-12)
    assert (alone.low, alone.high) == (None, None)
    assert other_pairs(first[:1], second[:1]) is None


# ---------------------------------------------------------------------------------- pairwise


def test_pairwise_cosines_are_those_of_all_couples() -> None:
    rows = normal(2, 9, 5) + 1
    rows[4] = 0  # no direction: left out
    found = pairwise_cosines(rows)
    kept = np.delete(rows, 4, axis=0)
    unit = kept / np.linalg.norm(kept, axis=1, keepdims=True)
    couples = [unit[i] @ unit[j] for i in range(8) for j in range(i + 1, 8)]
    np.testing.assert_allclose(found.values.numpy(), couples, atol=1e-14)
    assert found.mean is not None
    assert found.mean.value == pytest.approx(np.mean(couples), abs=1e-14)
    assert found.mean.n == 8
    assert found.mean.low < found.mean.value < found.mean.high


def test_a_shared_direction_stands_out_and_noise_does_not() -> None:
    noise = normal(3, 60, 200)
    shared = pairwise_cosines(noise + 10 * np.eye(200)[0])
    chance = pairwise_cosines(noise)
    assert shared.mean is not None
    assert shared.sign_flip_q95 is not None
    assert shared.mean.low > 5 * shared.sign_flip_q95
    assert chance.mean is not None
    assert chance.sign_flip_q95 is not None
    assert chance.mean.value < chance.sign_flip_q95
    # v and −v in turns: couples agree or oppose, and on average they cancel
    turns = pairwise_cosines(np.tile([[1.0, 2.0], [-1.0, -2.0]], (10, 1)))
    assert turns.mean is not None
    assert turns.mean.value == pytest.approx(-1 / 19, abs=1e-12)
    # a conversation's rows get one sign: within it nothing is random
    one = pairwise_cosines(np.ones((6, 3)), ["a"] * 6)
    assert one.sign_flip_q95 == pytest.approx(1, abs=1e-12)


def test_fewer_than_two_directions_have_no_cosine() -> None:
    found = pairwise_cosines(np.array([[1.0, 0.0], [0.0, 0.0]]))
    assert (len(found.values), found.mean, found.sign_flip_q95) == (0, None, None)


def test_random_directions() -> None:
    found = random_cosines(64, 20_000, seed=1)
    assert torch.equal(found, random_cosines(64, 20_000, seed=1))
    assert float(found.mean()) == pytest.approx(0, abs=0.003)
    assert float(found.std()) == pytest.approx(1 / 8, rel=0.03)


# ---------------------------------------------------------------------------------- the gradient


def test_the_exact_gradient_is_that_of_autograd() -> None:
    """A softmax head on one shared state: the whole DPO loss, differentiated."""
    torch.manual_seed(0)
    beta, head = 0.3, torch.randn(11, 6, dtype=torch.float64)
    base = torch.randn(4, 6, dtype=torch.float64)
    n = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    w, l_ = [0, 3, 5, 10], [1, 4, 0, 9]
    rows = torch.arange(4)

    def log_ratio(states: torch.Tensor) -> torch.Tensor:
        log_p = (states @ head.T).log_softmax(-1)
        return log_p[rows, w] - log_p[rows, l_]

    loss = -torch.nn.functional.logsigmoid(beta * (log_ratio(n) - log_ratio(base)))
    (expected,) = torch.autograd.grad(loss.sum(), n)
    e = preference_vectors(head, w, l_)
    policy, reference = margins(n, e), margins(base, e)
    found = preference_gradients(e, policy, reference, beta)
    assert float((found - expected).abs().max()) < 1e-12
    # float32 states, as models give them
    single = preference_gradients(
        preference_vectors(head.float(), w, l_),
        margins(n.float(), e.float()),
        margins(base.float(), e.float()),
        beta,
    )
    assert float((single - expected).abs().max()) < 1e-6


def test_the_weight_of_a_pair() -> None:
    m = torch.tensor([2.0, -1.0, 50.0], dtype=torch.float64)
    assert loss_weights(m, m, 0.2).tolist() == [0.1, 0.1, 0.1]  # the start: β/2
    found = loss_weights(m, torch.zeros(3, dtype=torch.float64), 0.2)
    expected = [0.2 / (1 + math.exp(0.2 * margin)) for margin in m.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------------------- clouds


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_principal_axes_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    rows = normal(4, *shape) * np.linspace(3, 1, shape[1]) + 5
    found = PrincipalAxes.fit(rows, 3)
    _, values, axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found.axes.numpy() @ axes[:3].T), np.eye(3), atol=1e-9)
    np.testing.assert_allclose(found.explained, values[:3] ** 2 / (values**2).sum(), rtol=1e-10)
    np.testing.assert_allclose((found.axes @ found.axes.T).numpy(), np.eye(3), atol=1e-12)
    assert all(float(axis[axis.abs().argmax()]) > 0 for axis in found.axes)
    assert found.n == shape[0]
    other = normal(5, 3, shape[1])
    np.testing.assert_allclose(
        found.project(other).numpy(), (other - rows.mean(0)) @ found.axes.numpy().T, atol=1e-12
    )
    v = found.axes[0] * 3 + found.axes[1] * 4
    assert found.share(v) == pytest.approx(1, abs=1e-12)
    assert found.share(torch.zeros(shape[1])) is None
    assert 0 < found.share(other[0]) < 1


def test_states_that_spread_in_fewer_directions_have_fewer_axes() -> None:
    line = np.outer(np.arange(5.0), [1.0, 2.0, 2.0]) + 7
    found = PrincipalAxes.fit(line, 2)
    assert found.axes.shape == (1, 3)
    assert found.explained == pytest.approx((1.0,))
    point = PrincipalAxes.fit(np.tile(normal(6, 4), (9, 1)), 2)
    assert point.axes.shape == (0, 4)
    assert point.explained == ()
    assert point.project(normal(7, 2, 4)).shape == (2, 0)


def test_gram_schmidt_leaves_out_what_is_not_new() -> None:
    a, b = torch.tensor([2.0, 0, 0]), torch.tensor([3.0, 1e-9, 0])
    c = torch.tensor([1.0, 1.0, 0])
    rows, used = orthonormal([a, b, c])
    assert used == (0, 2)
    np.testing.assert_allclose(rows.numpy(), [[1, 0, 0], [0, 1, 0]], atol=1e-12)
    with pytest.raises(MeasurementError, match="all zero"):
        orthonormal([torch.zeros(3)])
