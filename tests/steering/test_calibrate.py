"""Calibrated strengths move predictions by what was asked for, whatever the vector's length."""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from planted import PROMPTS, byte_tokenizer, planted_pair
from scipy.optimize import brentq

import dsteer
from dsteer.data.tokens import Encoded, encode
from dsteer.errors import ConfigError, DataError, MeasurementError, ModelError
from dsteer.geometry.intervals import draw_counts
from dsteer.steering.calibrate import calibrate, mean_norm, percentile_interval
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

TOKENIZER = byte_tokenizer()
TOKENS = 6
PLANTED = planted_pair(1)
MODEL = PLANTED.base
V = torch.randn(32, generator=torch.Generator().manual_seed(4))
OPTIONS: dict[str, Any] = {"tokenizer": TOKENIZER, "tokens": TOKENS}


@functools.cache
def greedy_states() -> tuple[np.ndarray, list[np.ndarray]]:
    """final_norm states of the model's own greedy texts, float64, all and by prompt."""
    rows = []
    for prompt in encode(TOKENIZER, PROMPTS):
        ids = list(prompt.ids)
        for _ in range(TOKENS):
            with torch.no_grad():
                out = MODEL(torch.tensor([ids]), output_hidden_states=True)
            ids.append(int(out.logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        states = out.hidden_states[-1][0, len(prompt.ids) - 1 :]
        rows.append(states.double().numpy())
    return np.concatenate(rows), rows


def percentile_by_hand(strength: float, percentile: float, v: torch.Tensor = V) -> float:
    """At final_norm the logits move by λ u, u = W v: KL(p‖p_λ) = ln Σ p e^{λu} − λ Σ p u."""
    states, _ = greedy_states()
    weight = MODEL.lm_head.weight.detach().double().numpy()
    z = states @ weight.T
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    u = strength * (weight @ v.double().numpy())
    kl = np.log((p * np.exp(u - u.max())).sum(1)) + u.max() - p @ u
    return float(np.percentile(kl, percentile))


@pytest.mark.parametrize(("target", "percentile"), [(1e-4, 95), (0.1, 50), (1.0, 100)])
def test_the_budget_is_met_at_final_norm(target: float, percentile: int) -> None:
    found = SteeringVector(V, "final_norm").calibrate(
        MODEL, PROMPTS, target_kl=target, percentile=percentile, **OPTIONS
    )
    # The bracket is a share of 1e-4 wide, and KL grows by its square.
    assert found.kl.value == pytest.approx(target, rel=3e-4)
    assert percentile_by_hand(found.strength, percentile) == pytest.approx(target, rel=3e-4)
    root = brentq(lambda x: percentile_by_hand(x, percentile) - target, 1e-6, 10, xtol=1e-12)
    assert found.strength == pytest.approx(root, rel=2e-4)
    assert found.n_tokens == len(greedy_states()[0])
    assert found.n_prompts == len(PROMPTS)
    assert found.site == "final_norm"


def test_small_divergences_are_quadratic() -> None:
    """Ten thousand times the budget takes a hundred times the strength."""
    vector = SteeringVector(V, "final_norm")
    small, large = (
        vector.calibrate(MODEL, PROMPTS, target_kl=target, **OPTIONS) for target in (1e-7, 1e-5)
    )
    assert large.strength / small.strength == pytest.approx(10, rel=1e-2)


@pytest.mark.parametrize("site", ["resid_post.0", "mlp_out.2", "final_norm"])
def test_equal_divergence_for_v_and_three_v(site: str) -> None:
    one, three = (
        SteeringVector(V * factor, site).calibrate(MODEL, PROMPTS, target_kl=0.3, **OPTIONS)
        for factor in (1, 3)
    )
    # The same search in other units: equal but for rounding of the states, in float32.
    assert three.strength == pytest.approx(one.strength / 3, rel=1e-4)
    assert three.shift == pytest.approx(one.shift, rel=1e-4)
    against = SteeringVector(-V, site).calibrate(MODEL, PROMPTS, target_kl=0.3, sign=-1, **OPTIONS)
    assert against.strength == pytest.approx(-one.strength, rel=1e-4)


def test_divergence_by_plain_passes() -> None:
    """Inside the model too, the percentile is that of whole passes under :func:`dsteer.steer`."""
    vector = SteeringVector(V, "resid_post.1")
    found = vector.calibrate(MODEL, PROMPTS, target_kl=0.5, positions="generated", **OPTIONS)
    kls = []
    _, rows = greedy_states()
    for prompt, states in zip(encode(TOKENIZER, PROMPTS), rows, strict=True):
        ids = list(prompt.ids)
        with torch.no_grad():
            for _ in range(len(states) - 1):
                ids.append(int(MODEL(torch.tensor([ids])).logits[0, -1].argmax()))
            row, p = torch.tensor([ids]), len(prompt.ids)
            plain = MODEL(row).logits[0, p - 1 :].double().log_softmax(-1)
            with dsteer.steer(MODEL, vector, found.strength, "generated", prompt_lengths=[p]):
                steered = MODEL(row).logits[0, p - 1 :].double().log_softmax(-1)
        kls.append((plain.exp() * (plain - steered)).sum(-1))
    values = torch.cat(kls).numpy()
    assert found.n_tokens == len(values)
    assert np.percentile(values, 95) == pytest.approx(found.kl.value, rel=1e-3)
    assert values.mean() == pytest.approx(found.mean_kl, rel=1e-3)
    assert found.kl.low is not None
    assert found.kl.high is not None
    assert values.min() <= found.kl.low <= found.kl.value <= found.kl.high <= values.max()
    assert found.kl.low < found.kl.high


def test_a_set_is_calibrated_site_by_site() -> None:
    vectors = SteeringVectorSet(
        [SteeringVector(V, "resid_post.2"), SteeringVector(V, "final_norm")]
    )
    found = vectors.calibrate(MODEL, PROMPTS[:2], target_kl=0.2, **OPTIONS)
    assert list(found) == ["resid_post.2", "final_norm"]
    alone = vectors["final_norm"].calibrate(MODEL, PROMPTS[:2], target_kl=0.2, **OPTIONS)
    assert found["final_norm"] == alone
    assert found["resid_post.2"].strength != alone.strength


def test_units() -> None:
    vector = SteeringVector(V, "resid_post.1")
    measure = {"tokenizer": TOKENIZER}
    assert dsteer.strength_in(vector, MODEL, PROMPTS, -2.5) == -2.5
    assert dsteer.strength_in(vector, MODEL, PROMPTS, 0, "kl") == 0.0
    norms = []
    for prompt in encode(TOKENIZER, PROMPTS):
        with torch.no_grad():
            out = MODEL(torch.tensor([prompt.ids]), output_hidden_states=True)
        norms.append(out.hidden_states[2][0].double().norm(dim=1))
    mean = float(torch.cat(norms).mean())
    found = dsteer.strength_in(vector, MODEL, PROMPTS, -0.25, "residual", **measure)
    # float32 states
    assert found == pytest.approx(-0.25 * mean / float(V.double().norm()), rel=1e-6)
    assert mean_norm(MODEL, encode(TOKENIZER, PROMPTS), "resid_post.1") == pytest.approx(mean)
    by_kl = dsteer.strength_in(vector, MODEL, PROMPTS[:3], -0.4, "kl", **measure)
    assert by_kl == calibrate(
        vector, MODEL, PROMPTS[:3], target_kl=0.4, sign=-1, tokenizer=TOKENIZER
    ).strength  # fmt: skip
    assert by_kl < 0


def test_the_tokenizer_beside_the_model(tmp_path: Any) -> None:
    folder, _ = PLANTED.save(tmp_path)
    model = dsteer.ModelPair.load(folder, folder).base
    vector = SteeringVector(V, "final_norm")
    found = vector.calibrate(model, PROMPTS[:2], target_kl=0.2, tokens=TOKENS)
    wanted = vector.calibrate(MODEL, PROMPTS[:2], target_kl=0.2, **OPTIONS)
    assert found.strength == pytest.approx(wanted.strength)


def test_mistakes_are_told_in_one_line() -> None:
    vector = SteeringVector(V, "resid_post.1")
    flat = SteeringVector(torch.ones(32), "final_norm")

    def measured(v: SteeringVector = vector, prompts: Any = PROMPTS[:2], **changes: Any) -> Any:
        return lambda: v.calibrate(
            MODEL, prompts, **{"target_kl": 0.1, "tokenizer": TOKENIZER, "tokens": 3, **changes}
        )

    def inert() -> None:
        model = planted_pair(1).base
        with torch.no_grad():  # every token's logit moves alike
            model.lm_head.weight -= model.lm_head.weight.mean(1, keepdim=True)
        flat.calibrate(model, PROMPTS[:2], target_kl=0.1, **OPTIONS)

    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (MeasurementError, r"target_kl 0: expected a finite", measured(target_kl=0)),
        (MeasurementError, r"target_kl nan", measured(target_kl=float("nan"))),
        (MeasurementError, r"percentile 101", measured(percentile=101)),
        (MeasurementError, r"sign 2", measured(sign=2)),
        (MeasurementError, r"vector at final_norm is zero", measured(
            SteeringVector(torch.zeros(32), "final_norm"))),
        (MeasurementError, r"target_kl 1e\+09.* is at most .* expected a smaller", measured(
            target_kl=1e9)),
        (MeasurementError, r"target_kl 0.1: .* is at most", inert),
        (MeasurementError, r"target_kl 1e-12: .* is already .* expected a larger", measured(
            target_kl=1e-12)),
        (ModelError, r"width is 32, and the vectors are of 3", measured(
            SteeringVector([1.0, 2, 3], "final_norm"))),
        (ModelError, r"made in memory .* give tokenizer", measured(tokenizer=None)),
        (DataError, r"no prompts", measured(prompts=[])),
        (ConfigError, r"units 'nats': no such units", lambda: dsteer.strength_in(
            vector, MODEL, PROMPTS, 1, "nats")),
        (MeasurementError, r"strength inf in units of kl", lambda: dsteer.strength_in(
            vector, MODEL, PROMPTS, float("inf"), "kl")),
        (MeasurementError, r"zero, so no strength of it has a norm", lambda: dsteer.strength_in(
            SteeringVector(torch.zeros(32), "final_norm"), MODEL, PROMPTS, 1, "residual")),
    ]  # fmt: skip
    for kind, words, call in cases:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_texts_that_end_at_once_still_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first predicted token is an end of text: its own prediction is what is compared."""
    prompts = [Encoded((0, 20, 30), 3), Encoded((0, 21), 2)]
    first = int(MODEL(torch.tensor([prompts[0].ids])).logits[0, -1].argmax())
    monkeypatch.setattr(MODEL.generation_config, "eos_token_id", first)
    found = SteeringVector(V, "final_norm").calibrate(MODEL, prompts, target_kl=0.1, **OPTIONS)
    assert found.n_tokens < 2 * TOKENS
    assert found.kl.value == pytest.approx(0.1, rel=3e-4)


def test_the_interval_of_a_percentile_is_that_of_resampled_prompts() -> None:
    """Written out: whole prompts drawn again, numpy's percentile of their tokens."""
    rng = np.random.default_rng(4)
    lengths = [3, 1, 7, 4, 2]
    values = rng.exponential(size=sum(lengths))
    counts = draw_counts(5, 1000, np.random.default_rng(6)).astype(int)
    parts = np.split(values, np.cumsum(lengths)[:-1])
    for percentile in (95.0, 50.0, 100.0):
        found = percentile_interval(values, lengths, percentile, seed=6)
        drawn = [
            np.percentile(
                np.concatenate([np.tile(p, k) for p, k in zip(parts, row, strict=True)]), percentile
            )
            for row in counts
        ]
        # five prompts: Student's 2.776 with 4 degrees of freedom, √(5/4) wider, is this tail
        tail = NormalDist().cdf(-2.7764451051977987 * (5 / 4) ** 0.5)
        assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [tail, 1 - tail]))
        assert found.value == np.percentile(values, percentile)
