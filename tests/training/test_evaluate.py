"""Rewards, KL and intervals against hand computation."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dsteer.config import TinyModelConfig
from dsteer.geometry.intervals import wilson
from dsteer.models.tiny import build_model, build_tokenizer
from dsteer.training import evaluate as module
from dsteer.training.evaluate import (
    Continuation,
    batches,
    continuation_logits,
    curve_point,
    evaluate,
    log_likelihoods,
    noise_floor,
    pair_likelihoods,
    reward_margins,
)
from dsteer.training.examples import Example

LN = math.log


class Bigram(nn.Module):
    """A language model by table: p(next | last token), so that every number is known by hand."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(table), 1)
        self.table = torch.tensor(table).log()
        text = SimpleNamespace(vocab_size=len(table))
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


# after token 0: 1/2 1/4 1/4; after 1: 1/8 3/4 1/8; after 2: a third each
BASE = Bigram([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 4, 1 / 8], [1 / 3, 1 / 3, 1 / 3]])
# after token 0, token 1 has become likelier and token 2 less likely
TUNED = Bigram([[1 / 4, 5 / 8, 1 / 8], [1 / 8, 3 / 4, 1 / 8], [1 / 3, 1 / 3, 1 / 3]])


def test_the_implicit_reward_of_a_two_token_example_by_hand() -> None:
    # chosen: 0 → 1 → 1; rejected: 0 → 2 → 0
    example = Example(
        prompt=(2, 0), chosen=(1, 1), rejected=(2, 0), split_token=False, conversation=""
    )
    tuned, base = pair_likelihoods(TUNED, [example]), pair_likelihoods(BASE, [example])
    assert tuned.chosen.item() == pytest.approx(LN(5 / 8) + LN(3 / 4), abs=1e-7)  # float32 table
    assert base.rejected.item() == pytest.approx(LN(1 / 4) + LN(1 / 3), abs=1e-7)
    # r_w = β ln(5/8 ÷ 1/4) = β ln 2.5, r_l = β ln(1/8 ÷ 1/4) = −β ln 2
    margin = reward_margins(tuned, base, beta=0.3)
    assert margin.item() == pytest.approx(0.3 * (LN(2.5) + LN(2)), abs=1e-7)
    point = curve_point(margin)
    assert point.loss == pytest.approx(LN(1 + math.exp(-0.3 * LN(5))), abs=1e-7)
    assert (point.accuracy, point.margin) == (1.0, margin.item())


def test_evaluation_by_hand() -> None:
    right = Example((2, 0), (1, 1), (2, 0), False, "a")  # margin β ln 5
    wrong = Example((0,), (2,), (1, 1, 1), False, "b")  # margin −β ln 5
    equal = Example((1,), (1, 2), (1, 2), False, "c")  # margin 0: a tie, which counts as wrong
    result = evaluate(TUNED, BASE, [right, wrong, equal], beta=1.0, seed=0)
    assert result.reward_accuracy.value == pytest.approx(1 / 3)
    assert result.reward_accuracy.n == 3
    assert result.reward_margin.value == pytest.approx(0.0, abs=1e-7)
    # KL differs from 0 after token 0 only: one of the chosen tokens of `right`, that of `wrong`
    after_0 = 1 / 4 * LN(1 / 2) + 5 / 8 * LN(5 / 2) + 1 / 8 * LN(1 / 2)
    assert result.kl_to_base.value == pytest.approx(2 * after_0 / 5, rel=1e-6)  # of five tokens
    assert result.kl_noise_floor == pytest.approx(0.0, abs=1e-12)  # a table does not round
    assert not result.learned


def test_learning_is_said_only_above_chance_and_noise() -> None:
    def example(row: int) -> Example:
        return Example((2, 0), (1, 1), (2, 0), False, f"c{row}")

    learned = evaluate(TUNED, BASE, [example(row) for row in range(20)], beta=0.1, seed=0)
    assert learned.learned
    assert learned.reward_accuracy.value == 1.0
    # one conversation, twenty times: no evidence
    repeated = evaluate(TUNED, BASE, [example(0)] * 20, beta=0.1, seed=0)
    assert not repeated.learned
    untouched = evaluate(BASE, BASE, [example(row) for row in range(20)], beta=0.1, seed=0)
    assert not untouched.learned
    assert untouched.kl_to_base.value == 0.0


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17: 857, table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_the_published_intervals(successes, n, low, high) -> None:
    interval = wilson(successes, n, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_widens_where_pairs_share_conversations() -> None:
    assert wilson(80, 100, 25).low == pytest.approx(wilson(20, 25, 25).low)
    assert wilson(80, 100, 25).value == 0.8


def test_batches_hold_each_text_once_within_the_budget(monkeypatch) -> None:
    monkeypatch.setattr(module, "LOGIT_VALUES", 1000)
    items = [Continuation((1,) * n, (2,)) for n in (3, 50, 7, 200, 1, 20, 20)]
    found = list(batches(items, vocab_size=10))
    assert sorted(index for batch in found for index in batch) == list(range(len(items)))
    for batch in found:
        longest = max(len(items[index]) for index in batch)
        assert len(batch) == 1 or 10 * longest * len(batch) <= 1000
    assert found[0] == [3]  # longer than the budget, alone


@pytest.fixture(scope="module")
def model():
    texts = ["\n\nHuman: Hi\n\nAssistant: Hello there, how are you?"] * 3
    shape = TinyModelConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    return build_model(shape, build_tokenizer(texts, 300), seed=0).eval()


def test_batching_changes_nothing_but_rounding(model) -> None:
    generator = torch.Generator().manual_seed(0)
    items = []
    for length in (2, 17, 9, 40, 3):
        ids = torch.randint(5, 250, (length,), generator=generator).tolist()
        items.append(Continuation(tuple(ids[: length // 2]), tuple(ids[length // 2 :])))
    together = log_likelihoods(model, items)
    for item, value in zip(items, together, strict=True):
        ids = torch.tensor([item.context + item.tokens])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(item.context)
        alone = sum(float(log_p[start + k - 1, token]) for k, token in enumerate(item.tokens))
        assert float(value) == pytest.approx(alone, abs=1e-5)  # float32 sums of ~20 tokens
    assert len(continuation_logits(model, items)[1]) == len(items[1].tokens)
    # float32 rounding of logits near 1: KL is of second order in it
    assert 0 <= noise_floor(model, items) < 1e-10
