"""Scores of given answers under many arms are those of plain passes, in float64, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build, prompts_of
from planted import planted_pair, tiny_llama
from torch import Tensor

import dsteer
from dsteer.behaviour import teacher_forced
from dsteer.behaviour.teacher_forced import predictions, score
from dsteer.data.tokens import Encoded
from dsteer.models.readout import Readout
from dsteer.steering.arms import Arm, Steering
from dsteer.training.evaluate import Continuation, log_likelihoods

LENGTHS = ((5, 4), (1, 6), (9, 1), (9, 7), (3, 2))
"""Tokens of prompts and answers."""


def texts() -> list[Encoded]:
    whole = prompts_of(tuple(prompt + answer for prompt, answer in LENGTHS))
    return [Encoded(w.ids, prompt) for w, (prompt, _) in zip(whole, LENGTHS, strict=True)]


def steering(site: str, size: float = 1.0, **kwargs: Any) -> Steering:
    first, second = size * torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    arms = (Arm(first, 0.0), Arm(first, 1.0), Arm(second, -1.5), Arm(second, 0.5))
    return Steering(site, arms, **kwargs)


def log_softmax(model: Any, text: Encoded, what: Steering | None, arm: int) -> np.ndarray:
    """ln of the model's own probabilities of each answer token, (t, V), float64."""
    ids = torch.tensor([text.ids])
    with torch.no_grad():
        if what is None:
            logits = model(input_ids=ids, use_cache=False).logits
        else:
            with dsteer.steer(
                model,
                what.arms[arm].vector,
                what.arms[arm].strength,
                what.positions,
                site=what.site,
                prompt_lengths=[text.prompt_length],
            ):
                logits = model(input_ids=ids, use_cache=False).logits
    z = logits[0, text.prompt_length - 1 : -1].double().numpy()
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def expected(
    model: Any, other: Any, items: Sequence[Encoded], what: Steering
) -> dict[str, np.ndarray]:
    found = {
        name: np.zeros((len(what.arms), len(items)))
        for name in ("log_likelihood", "kl", "kl_reverse", "kl_first", "agreement")
    }
    for j, text in enumerate(items):
        p = log_softmax(other, text, None, 0)
        answer = np.array(text.ids[text.prompt_length :])
        for i in range(len(what.arms)):
            q = log_softmax(model, text, what, i)
            kl = (np.exp(p) * (p - q)).sum(-1)
            found["log_likelihood"][i, j] = q[np.arange(len(answer)), answer].sum()
            found["kl"][i, j], found["kl_first"][i, j] = kl.sum(), kl[0]
            found["kl_reverse"][i, j] = (np.exp(q) * (q - p)).sum()
            found["agreement"][i, j] = (q.argmax(-1) == p.argmax(-1)).sum()
    return found


@pytest.mark.parametrize("positions", ["all", "prompt_last", "generated"])
@pytest.mark.parametrize(
    ("name", "site"),
    [("llama", "resid_post.1"), ("llama", "final_norm"), ("gemma2", "resid_post.0"),
     ("gpt2", "resid_post.1")],
)  # fmt: skip
def test_equal_plain_passes_in_float64(
    name: str, site: str, positions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other, items = build(name), build(name), texts()
    with torch.no_grad():
        for weight in other.parameters():
            if weight.dim() == 2:
                weight *= 0.9
    what = steering(site, size=0.3, positions=positions)
    readout, aim = Readout.of(model), Readout.of(other)
    assert (readout.softcap is not None) == (name == "gemma2")
    wanted = expected(model, other, items, what)
    assert wanted["kl"].min() > 1e-4
    assert np.ptp(wanted["kl"], axis=0).min() > 1e-5
    for limit in (teacher_forced.LOGIT_BYTES, 4 * len(readout.weight) * 6, 1):
        monkeypatch.setattr(teacher_forced, "LOGIT_BYTES", limit)
        got = score(model, items, what, readout, predictions(other, items, aim))
        for key, values in wanted.items():
            assert getattr(got, key).dtype == torch.float64
            # six or seven digits of float32, and 1e-6 where the value is small
            np.testing.assert_allclose(
                getattr(got, key).numpy(), values, rtol=2e-6, atol=1e-6, err_msg=key
            )
        assert got.tokens.tolist() == [answer for _, answer in LENGTHS]


def test_likelihoods_are_those_of_training() -> None:
    model, items = tiny_llama(), texts()
    what = steering("resid_post.2")
    readout = Readout.of(model)
    got = score(model, items, what, readout, predictions(model, items, readout))
    asked = [Continuation(t.ids[: t.prompt_length], t.ids[t.prompt_length :]) for t in items]
    own = log_likelihoods(model, asked)
    np.testing.assert_allclose(got.log_likelihood[0], own, atol=2e-5)
    for number, (arm, item) in enumerate([(1, 0), (2, 3)]):
        with dsteer.steer(
            model, what.arms[arm].vector, what.arms[arm].strength, site=what.site,
            prompt_lengths=[items[item].prompt_length],
        ):  # fmt: skip
            steered = log_likelihoods(model, [asked[item]])
        assert float(got.log_likelihood[arm, item]) == pytest.approx(float(steered), abs=2e-5)
        assert abs(float(steered) - float(own[item])) > 0.01, number
    # a model against itself: no rounding is left over
    assert (got.kl[0] < 1e-11).all()
    assert (got.kl >= 0).all()
    assert (got.kl_reverse >= 0).all()
    assert torch.equal(got.agreement[0], got.tokens.double())


def test_close_predictions_are_told_apart() -> None:
    model, other, items = tiny_llama(), tiny_llama(), texts()
    with torch.no_grad():
        weight = other.lm_head.weight
        weight += 3e-5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    what = Steering("final_norm", (Arm(torch.zeros(32), 0.0),))
    got = score(model, items, what, Readout.of(model), predictions(other, items, Readout.of(other)))
    wanted = expected(model, other, items, what)
    assert wanted["kl_first"].max() < 1e-6  # of float32's rounding, and less
    for key in ("kl", "kl_reverse", "kl_first"):
        np.testing.assert_allclose(getattr(got, key), wanted[key], rtol=0.02, err_msg=key)


@pytest.mark.parametrize("block", range(4))
def test_planted_truth(block: int) -> None:
    planted, items = planted_pair(block), texts()
    base, tuned = planted.base, planted.tuned
    heads = Readout.of(base), Readout.of(tuned)
    for model, other, sign in ((base, tuned, 1), (tuned, base, -1)):
        aim = predictions(other, items, heads[0])
        for site in (f"resid_post.{k}" for k in range(4)):
            arms = (Arm(planted.b, 0.0), Arm(planted.b, float(sign)))
            got = score(model, items, Steering(site, arms), heads[1], aim)
            each = (got.kl[1] / got.tokens, got.kl_reverse[1] / got.tokens, got.kl_first[1])
            if site == f"resid_post.{block}":
                assert max(float(kl.max()) for kl in each) < 1e-6
                assert torch.equal(got.agreement[1], got.tokens.double())
            else:
                assert min(float(kl.max()) for kl in each) > 1e-3
            assert float(got.kl[0].min()) > 1e-3


def test_some_of_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, items = tiny_llama(), tiny_llama(1), texts()
    readout, what = Readout.of(model), steering("resid_post.0")
    aims = predictions(other, items, Readout.of(other))
    part = score(model, items, what, readout, aims).of(slice(1, 3))
    assert part.tokens.tolist() == [6, 1]
    assert part.kl.shape == (4, 2)
    again = score(
        model, items[1:3], what, readout, predictions(other, items[1:3], Readout.of(other))
    )
    np.testing.assert_allclose(part.kl, again.kl, rtol=1e-5)
    np.testing.assert_allclose(part.log_likelihood, again.log_likelihood, rtol=1e-5)


def test_vocabularies_of_two_sizes_are_compared_where_both_have_tokens() -> None:
    model, items = tiny_llama(), texts()
    larger = tiny_llama(vocab_size=300)
    with torch.no_grad():
        larger.model.embed_tokens.weight[:260] = model.model.embed_tokens.weight
        larger.lm_head.weight[:260] = model.lm_head.weight
        for mine, own in zip(
            larger.model.layers.parameters(), model.model.layers.parameters(), strict=True
        ):
            mine.copy_(own)
    heads = Readout.of(model), Readout.of(larger, vocabulary=260)
    aims = predictions(larger, items, heads[1])
    got = score(model, items, steering("final_norm"), heads[0], aims)
    assert float(got.kl[0].max()) < 1e-6 < float(got.kl[1].min())


def test_tensors_of_other_sizes_are_refused() -> None:
    model, items = tiny_llama(), texts()
    readout = Readout.of(model)
    with pytest.raises(dsteer.errors.ModelError, match="width"):
        score(
            model, items, Steering("resid_post.0", (Arm(Tensor([1.0, 2.0]), 1.0),)), readout,
            predictions(model, items, readout),
        )  # fmt: skip
