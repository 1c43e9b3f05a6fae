"""The four-way design: parts, shares, cosines and KL against numpy, hand and planted truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsteer.errors import MeasurementError
from dsteer.geometry.template import PARTS, Cells, four_way, reach, training_across_forms

NAMES = ("base_raw", "base_templated", "tuned_raw", "tuned_templated")
# Sums and differences of a dozen float64 numbers of size 1: a few units of 1e-16 each.
EXACT = {"rel": 1e-10, "abs": 1e-12}


def random_cells(seed: int, n: int = 24, d: int = 6) -> Cells:
    generator = torch.Generator().manual_seed(seed)
    return Cells(
        *(torch.randn(n, d, generator=generator, dtype=torch.float64) + i for i in range(4))
    )


def planted(n: int, *, b: torch.Tensor, t: torch.Tensor, c: torch.Tensor, noise: float = 0.0):
    """Cells where training adds b, the template adds t, and both together add c besides."""
    generator = torch.Generator().manual_seed(n)

    def rest() -> torch.Tensor:
        return noise * torch.randn(n, len(b), generator=generator, dtype=torch.float64)

    h = torch.randn(n, len(b), generator=generator, dtype=torch.float64)
    return Cells(h, h + t + rest(), h + b + rest(), h + b + t + c + rest())


def between(one: np.ndarray, two: np.ndarray, keys: np.ndarray | None = None) -> float:
    """Mean inner product of rows of different conversations."""
    keys = np.arange(len(one)) if keys is None else keys
    return float((one @ two.T)[keys[:, None] != keys].mean())


def test_parts_equal_numpy() -> None:
    cells = random_cells(0)
    br, bt, tr, tt = (getattr(cells, name).numpy() for name in NAMES)
    expected = {
        "training_raw": tr - br,
        "training_templated": tt - bt,
        "template_base": bt - br,
        "template_tuned": tt - tr,
        "interaction": (tt - bt) - (tr - br),
        "training_mean": ((tr - br) + (tt - bt)) / 2,
        "template_mean": ((bt - br) + (tt - tr)) / 2,
        "total": tt - br,
    }
    assert expected.keys() == PARTS.keys()
    found = four_way(cells, draws=50)
    total = expected["total"]
    for name, rows in expected.items():
        np.testing.assert_allclose(cells.part(name), rows, atol=1e-14)
        part = found.parts[name]
        np.testing.assert_allclose(part.mean, rows.mean(0), atol=1e-14)
        squared = between(rows, rows)
        assert part.squared.value == pytest.approx(squared, **EXACT)
        if squared > 0:
            assert part.norm.value == pytest.approx(squared**0.5, **EXACT)
        else:
            assert part.norm is None
        share = between(rows, total) / between(total, total)
        assert part.share.value == pytest.approx(share, **EXACT)
        energy = (rows**2).sum() / (total**2).sum()
        assert part.energy.value == pytest.approx(energy, **EXACT)
        gram = rows @ rows.T
        others = (gram.sum() - np.trace(gram)) / (24 * 23)
        assert part.shared.value == pytest.approx(others / (np.trace(gram) / 24), **EXACT)
    for name, (a, b) in {
        "training_forms": ("training_raw", "training_templated"),
        "template_models": ("template_base", "template_tuned"),
        "training_template": ("training_raw", "template_base"),
    }.items():
        one, two = expected[a], expected[b]
        cosine = between(one, two) / (between(one, one) * between(two, two)) ** 0.5
        assert found.cosines[name].value == pytest.approx(cosine, **EXACT)
    assert found.base_norm == pytest.approx(np.linalg.norm(br, axis=1).mean(), **EXACT)
    assert found.n == 24


def test_products_and_their_jackknife_are_of_different_conversations() -> None:
    cells, keys = random_cells(11, n=13), np.array([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 5, 5])
    found = four_way(cells, list(keys), draws=5)
    part, total = cells.part("interaction").numpy(), cells.part("total").numpy()

    def share(kept: np.ndarray) -> float:
        p, t, k = part[kept], total[kept], keys[kept]
        return between(p, t, k) / between(t, t, k)

    value = share(keys >= 0)
    left_out = np.array([share(keys != key) for key in range(6)])
    # Student's 97.5 % quantile with 5 degrees of freedom, from a table
    half = 2.5705818 * (5 / 6 * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5
    interval = found.parts["interaction"].share
    assert interval.value == pytest.approx(value, **EXACT)
    assert (interval.low, interval.high) == pytest.approx((value - half, value + half), rel=1e-7)


def test_both_sums_are_the_total() -> None:
    cells = random_cells(1)
    parts = four_way(cells, draws=10).parts
    for names in (
        ("training_raw", "template_base", "interaction"),
        ("training_mean", "template_mean"),
    ):
        np.testing.assert_allclose(
            sum(cells.part(name) for name in names), cells.part("total"), atol=1e-13
        )
        assert sum(parts[name].share.value for name in names) == pytest.approx(1, **EXACT)
    assert parts["total"].share.value == pytest.approx(1, **EXACT)
    assert parts["total"].energy.value == 1


def test_hand_worked() -> None:
    # training 3 e₁, template 4 e₂, together 1 e₁ more: total (4, 4), ‖total‖² = 32
    b, t, c = torch.tensor([[3.0, 0.0], [0.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    found = four_way(planted(5, b=b, t=t, c=c))
    shares = {name: part.share.value for name, part in found.parts.items()}
    assert shares["training_raw"] == pytest.approx(12 / 32)
    assert shares["template_base"] == pytest.approx(16 / 32)
    assert shares["interaction"] == pytest.approx(4 / 32)
    assert shares["training_mean"] == pytest.approx(14 / 32)
    assert shares["template_mean"] == pytest.approx(18 / 32)
    assert found.parts["template_tuned"].norm.value == pytest.approx(17**0.5)
    assert found.parts["interaction"].energy.value == pytest.approx(1 / 32)
    assert found.cosines["training_forms"].value == pytest.approx(1)
    assert found.cosines["training_template"].value == pytest.approx(0, abs=1e-12)
    assert found.cosines["template_models"].value == pytest.approx(4 / 17**0.5)


def test_planted_parts_are_recovered_beside_noise() -> None:
    generator = torch.Generator().manual_seed(3)
    b, t, c = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    c *= 0.5
    noise, n = 0.3, 400
    found = four_way(planted(n, b=b, t=t, c=c, noise=noise), draws=200).parts
    for name, truth, cells in (
        ("training_raw", b, 1),
        ("template_base", t, 1),
        ("interaction", c, 3),
        ("training_templated", b + c, 2),
        ("template_tuned", t + c, 2),
    ):
        # each of the 16 numbers has an error of noise·√cells/√n; four of those is never met
        error = (found[name].mean - truth).norm() / (16 * cells / n) ** 0.5 / noise
        assert error < 2
        low, high = found[name].norm.low, found[name].norm.high
        assert low < found[name].norm.value < high
        assert low < truth.norm() < high


def test_shared_share_tells_a_vector_from_scatter() -> None:
    b, t, c = torch.eye(3, 16, dtype=torch.float64)
    with_vector = four_way(planted(300, b=b, t=t, c=c, noise=0.1), draws=10)
    without = four_way(planted(300, b=b, t=t, c=0 * c, noise=0.1), draws=10)
    # ‖c‖² = 1 beside three noises of 16 · 0.01 each
    assert with_vector.parts["interaction"].shared.value == pytest.approx(1 / 1.48, abs=0.05)
    interval = without.parts["interaction"].shared
    assert interval.low < 0 < interval.high
    assert without.parts["interaction"].mean.norm() > 0, "a mean of scatter is never 0"
    squared = without.parts["interaction"].squared
    assert squared.low < 0 < squared.high


def test_intervals_move_with_conversations() -> None:
    cells = random_cells(4, n=60)
    keys = [i // 6 for i in range(60)]
    alone, together = four_way(cells), four_way(cells, keys)
    one = four_way(cells, ["same"] * 60)
    for part in ("training_raw", "interaction"):
        # no two conversations, so nothing is free of the prompts' scatter
        assert one.parts[part].squared is one.parts[part].norm is one.parts[part].share is None
        assert one.parts[part].energy.low is None
        # cells without a conversation's own scatter: both estimates are of one truth
        assert alone.parts[part].share.value != together.parts[part].share.value
        assert alone.parts[part].share.low != together.parts[part].share.low
    assert set(one.cosines.values()) == {None}
    two = four_way(cells, [i // 30 for i in range(60)]).parts["total"].norm
    assert two.value > 0
    assert two.low is two.high is None, "without one of two conversations no pair is left"
    again = four_way(cells, keys)
    assert again.parts["interaction"].share == together.parts["interaction"].share
    with pytest.raises(MeasurementError, match="2 conversation keys for 60 rows"):
        four_way(cells, [0, 1])


@pytest.mark.parametrize("together", [1, 3])
def test_intervals_cover_the_truth_of_parts_without_interaction(together: int) -> None:
    """T e₁ and 1 e₂, no interaction, each with scatter 1 in d = 160 ≫ N = 36 (or conversations of
    3): the plug-in interaction share is 0.09 with an interval that never holds 0, and the plug-in
    cosine of T_raw and T_templ is 0.9 or less."""
    n, d, trials = 36, 160, 120
    random = np.random.default_rng(23)
    truth = {"training_raw": 0.2, "template_base": 0.8, "interaction": 0.0}
    keys = [i // together for i in range(n)]
    values: dict[str, list[float]] = {}
    hits: dict[str, int] = {}

    def effect(axis: int, size: float) -> np.ndarray:
        rest = random.normal(size=(n, d))
        if together > 1:  # half of the variance is the conversation's
            rest = (rest + np.repeat(random.normal(size=(n // together, d)), together, 0)) / 2**0.5
        return size * np.eye(d)[axis] + rest / d**0.5

    for _ in range(trials):
        base = random.normal(size=(n, d))
        b, t, c = effect(0, 0.5), effect(1, 1.0), effect(2, 0.0)
        cells = Cells(*map(torch.from_numpy, (base, base + t, base + b, base + b + t + c)))
        found = four_way(cells, keys, draws=2)
        for name, interval, expected in (
            *((name, found.parts[name].share, share) for name, share in truth.items()),
            ("squared norm", found.parts["interaction"].squared, 0.0),
            ("cosine", found.cosines["training_forms"], 1.0),
            ("orthogonal", found.cosines["training_template"], 0.0),
        ):
            values.setdefault(name, []).append(interval.value)
            hits[name] = hits.get(name, 0) + (interval.low <= expected <= interval.high)
    expected = {**truth, "squared norm": 0.0, "cosine": 1.0, "orthogonal": 0.0}
    for name, drawn in values.items():
        # ratios have a bias of second order, a tenth of their standard error and less
        error = np.std(drawn) / trials**0.5
        assert abs(np.mean(drawn) - expected[name]) < 5 * error, name
    # 95 % of 120 is 114 ± 2.4; below 106 has a probability of 0.1 %. A plug-in covers 0-50 %.
    assert min(hits.values()) >= 106, hits


def test_plug_in_products_would_be_biased() -> None:
    """The same cells: products of the means themselves against those between conversations."""
    b, t, c = torch.eye(3, 256, dtype=torch.float64) * torch.tensor([[0.2], [1.0], [0.0]])
    cells = planted(64, b=b, t=t, c=c, noise=1 / 16)
    found = four_way(cells, draws=5)
    interaction, total = found.parts["interaction"], found.parts["total"]
    plug_in = float(interaction.mean @ total.mean / total.mean.square().sum())
    # ⟨Ī, total̄⟩ holds one cell's error on both sides: 256 · (1/16)²/64 = 1/64, of 1.04 + 1/64
    assert plug_in == pytest.approx(1 / 64 / 1.06, abs=0.012)
    raw, templated = (found.parts[f"training_{form}"].mean for form in ("raw", "templated"))
    assert raw @ templated / raw.norm() / templated.norm() < 0.8
    share, cosine = interaction.share, found.cosines["training_forms"]
    assert share.low < 0 < share.high
    assert cosine.low < 1 < cosine.high
    assert cosine.value > 0.9


def test_undefined_is_none() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    b = torch.ones(4, dtype=torch.float64)
    still = four_way(planted(6, b=zero, t=zero, c=zero))
    for part in still.parts.values():
        assert part.norm.value == 0
        assert part.squared.value == 0
        assert part.share is part.energy is part.shared is None
    assert set(still.cosines.values()) == {None}
    trained = four_way(planted(6, b=b, t=zero, c=zero))
    assert trained.parts["training_raw"].share.value == pytest.approx(1)
    assert trained.parts["template_base"].share.value == 0
    assert trained.parts["template_base"].shared is None
    assert trained.cosines["training_forms"].value == pytest.approx(1)
    assert trained.cosines["template_models"] is trained.cosines["training_template"] is None


def test_scatter_around_nothing_has_no_norm() -> None:
    # two prompts that move opposite ways: ⟨P₁, P₂⟩ = −1
    zero = torch.zeros(2, 3, dtype=torch.float64)
    moved = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]], dtype=torch.float64)
    found = four_way(Cells(zero, zero, moved, moved))
    total = found.parts["total"]
    assert total.squared.value == -1
    assert total.norm is total.share is None
    assert total.energy.value == 1
    assert found.parts["interaction"].norm.value == 0, "0 in every prompt"
    assert found.cosines["training_forms"] is None


def test_a_ratio_undefined_without_one_conversation_has_no_ends() -> None:
    moved = torch.tensor([[3.0, 0], [1.0, 0], [-1.0, 0]], dtype=torch.float64)
    # pairs 3 − 3 − 1 < 0; with (−1, 0) → (−0.5, 0): 3 − 1.5 − 0.5 > 0, and without the first < 0
    moved[2, 0] = -0.5
    zero = torch.zeros(3, 2, dtype=torch.float64)
    total = four_way(Cells(zero, zero, moved, moved)).parts["total"]
    assert total.squared.value == pytest.approx(1 / 3)
    assert total.squared.low < 0 == total.norm.low < total.norm.value
    assert total.share.value == 1
    assert total.share.low is None


def test_malformed_cells() -> None:
    cells = random_cells(5)
    bad = cells.base_raw.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(MeasurementError, match=r"base_raw: 1 of 144 numbers are not finite"):
        replace(cells, base_raw=bad)
    with pytest.raises(MeasurementError, match=r"base_raw \(23, 6\), base_templated \(24, 6\)"):
        replace(cells, base_raw=cells.base_raw[1:])


# ---------------------------------------------------------------------------------- across forms


def test_training_across_forms_equals_numpy() -> None:
    fit, test = random_cells(6), random_cells(7)
    found = training_across_forms(fit, test, draws=20)
    forms = {"raw": "training_raw", "templated": "training_templated"}
    for fitted, ours in forms.items():
        v = fit.part(ours).mean(0).numpy()
        for tested, theirs in forms.items():
            rows = test.part(theirs).numpy()
            cosine = rows @ v / np.linalg.norm(rows, axis=1) / np.linalg.norm(v)
            assert found[fitted][tested].value == pytest.approx(cosine.mean(), **EXACT)


def test_training_that_turns_with_the_form() -> None:
    b, t, c = torch.eye(3, 5, dtype=torch.float64)
    cells = planted(20, b=b, t=t, c=c)
    found = training_across_forms(cells, cells, draws=20)
    assert found["raw"]["raw"].value == pytest.approx(1)
    assert found["raw"]["templated"].value == pytest.approx(0.5**0.5)
    assert found["templated"]["raw"].value == pytest.approx(0.5**0.5)
    none = training_across_forms(planted(20, b=0 * b, t=t, c=c), cells, draws=20)
    assert none["raw"] == {"raw": None, "templated": None}


# ---------------------------------------------------------------------------------- KL


def linear(weight: torch.Tensor):
    return lambda states: states @ weight.to(states).T


def test_reach_equals_numpy_and_planted_vectors_reach_all() -> None:
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    b, t = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    cells = planted(40, b=b, t=t, c=torch.zeros(6, dtype=torch.float64))
    vectors = {"b": b, "t": t, "both": b + t, "nothing": 0 * b}
    found = reach(cells, vectors, linear(weight), linear(weight), draws=50)
    assert list(found) == ["base_raw", "base_templated", "tuned_raw", "b", "t", "both"]

    def log_p(states: torch.Tensor) -> np.ndarray:
        logits = (states @ weight.T).numpy()
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    goal = log_p(cells.tuned_templated)
    before = None
    for name, states in {
        "base_raw": cells.base_raw,
        "base_templated": cells.base_templated,
        "tuned_raw": cells.tuned_raw,
        "b": cells.base_raw + b,
        "t": cells.base_raw + t,
        "both": cells.base_raw + b + t,
    }.items():
        kl = (np.exp(goal) * (goal - log_p(states))).sum(1).mean()
        before = before or kl
        # heads read float32: 6e-8 of logits of size 5, and KL is quadratic in what is near
        assert found[name].kl.value == pytest.approx(kl, rel=1e-4, abs=1e-9)
        assert found[name].recovered.value == pytest.approx(1 - kl / before, abs=1e-4)
    # without interaction a vector does what its change does
    assert found["b"].kl.value == pytest.approx(found["tuned_raw"].kl.value, rel=1e-4)
    assert found["t"].kl.value == pytest.approx(found["base_templated"].kl.value, rel=1e-4)
    assert found["both"].recovered.value == pytest.approx(1)


def test_reach_uses_the_tuned_models_own_head() -> None:
    cells = random_cells(10)
    weight = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    same = replace(cells, base_raw=cells.tuned_templated)
    one = reach(same, {}, linear(weight), linear(weight), draws=5)
    assert one["base_raw"].kl.value == 0
    assert {item.recovered for item in one.values()} == {None}
    other = reach(same, {}, linear(weight), linear(2 * weight), draws=5)
    assert other["base_raw"].kl.value > 0.01
