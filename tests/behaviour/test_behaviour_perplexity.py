"""Perplexity against transformers' own loss."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsteer.behaviour.perplexity import Surprise, perplexity, surprises
from dsteer.errors import MeasurementError
from dsteer.training.evaluate import Continuation


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def test_each_text_against_the_loss_of_transformers(model: LlamaForCausalLM) -> None:
    drawn = torch.Generator().manual_seed(1)
    items = []
    for context, length in [(3, 5), (1, 1), (7, 2), (2, 11)]:
        ids = torch.randint(40, (context + length,), generator=drawn).tolist()
        items.append(Continuation(tuple(ids[:context]), tuple(ids[context:])))
    found = surprises(model, items)
    total = 0.0
    for item, surprise in zip(items, found, strict=True):
        ids = torch.tensor([item.context + item.tokens])
        labels = ids.clone()
        labels[0, : len(item.context)] = -100
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=labels).loss)
        assert surprise is not None
        assert surprise.tokens == len(item.tokens)
        assert surprise.nats_a_token == pytest.approx(loss, rel=1e-5)
        total += loss * len(item.tokens)
    assert perplexity(found) == pytest.approx(math.exp(total / 19), rel=1e-5)


def test_the_aggregate_weighs_tokens_not_texts() -> None:
    assert perplexity([Surprise(3 * math.log(8), 3), None, Surprise(0.0, 6)]) == pytest.approx(2)
    assert perplexity([Surprise(math.inf, 2)]) == math.inf
    assert perplexity([Surprise(2000.0, 2)]) == math.inf
    assert perplexity([None]) is None
    assert perplexity([]) is None


def test_a_text_without_a_token_has_no_value(model: LlamaForCausalLM) -> None:
    texts = [Continuation((1, 2), ()), Continuation((1,), (2,))]
    empty, some = surprises(model, texts)
    assert empty is None
    assert some is not None
    assert surprises(model, [texts[0]]) == [None]
    assert surprises(model, []) == []


def test_a_context_is_needed(model: LlamaForCausalLM) -> None:
    with pytest.raises(MeasurementError, match="text 1 has no token"):
        surprises(model, [Continuation((1,), (2,)), Continuation((), (2,))])
