"""Training of the tiny base: packing, order, schedule, exact resume."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from dsteer.config import BaseConfig, TinyModelConfig
from dsteer.data.types import PreferencePair
from dsteer.errors import DataError, MeasurementError
from dsteer.models.tiny import build_model, build_tokenizer
from dsteer.store import read_metadata
from dsteer.training import language_model
from dsteer.training.language_model import (
    mean_loss,
    pack,
    preference_texts,
    train_language_model,
)

TEXTS = [f"\n\nHuman: What is {i} plus one?\n\nAssistant: It is {i + 1}." for i in range(120)]
SHAPE = TinyModelConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXTS, 320)


@pytest.fixture(scope="module")
def blocks(tokenizer):
    return pack(TEXTS, tokenizer, 32, seed=0)


def config(**changes) -> BaseConfig:
    values = {"model": SHAPE, "steps": 12, "batch_size": 4, "context_length": 32,
              "warmup_steps": 3, "log_every": 4, "checkpoint_every": 5}  # fmt: skip
    return BaseConfig(**{**values, **changes})


def train(blocks, tokenizer, folder, **changes):
    settings = config(**changes)
    model = build_model(settings.model, tokenizer, seed=1)
    run = train_language_model(
        model, blocks, settings, checkpoint=folder / "base.safetensors", seed=7, device=CPU
    )
    return model, run


def test_both_answers_are_trained_on() -> None:
    pair = PreferencePair("\n\nHuman: Hi\n\nAssistant:", " Hello.", " Go.", "c", "s", 0)
    assert preference_texts([pair, PreferencePair("just a prompt")]) == [
        "\n\nHuman: Hi\n\nAssistant: Hello.",
        "\n\nHuman: Hi\n\nAssistant: Go.",
    ]


def test_packing_wastes_nothing(tokenizer) -> None:
    blocks = pack(TEXTS, tokenizer, 32, seed=0)
    stream = blocks.flatten().tolist()
    total = sum(len(ids) + 1 for ids in tokenizer(TEXTS)["input_ids"])
    assert len(stream) == total - total % 32
    assert tokenizer.pad_token_id not in stream
    # every text but a cut last one is there, once, from BOS to EOS
    documents = "".join(tokenizer.decode(stream)).split(tokenizer.eos_token)
    whole = [text.removeprefix(tokenizer.bos_token) for text in documents[:-1]]
    assert len(set(whole)) == len(whole)
    assert set(whole) <= set(TEXTS)
    assert len(whole) >= len(TEXTS) - 2  # one block holds fewer than 32 tokens: 1 or 2 texts
    assert whole != TEXTS[: len(whole)]  # in random order
    assert torch.equal(pack(TEXTS, tokenizer, 32, seed=0), blocks)


def test_too_few_tokens_for_a_block(tokenizer) -> None:
    with pytest.raises(DataError, match=r"fill no block of 512; lower base\.context_length"):
        pack(TEXTS[:2], tokenizer, 512, seed=0)


def test_each_epoch_is_a_permutation_and_batches_run_across() -> None:
    drawn = torch.cat([language_model._batch(step, 10, 4, seed=3) for step in range(5)]).tolist()
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_the_schedule() -> None:
    settings = config(steps=12, warmup_steps=4, learning_rate=1e-2)
    rates = [language_model._rate(step, settings) for step in (1, 2, 4, 8, 12)]
    # a quarter, a half and all of the peak; the cosine's middle (1 + 0.1) / 2; its end 0.1
    assert rates == pytest.approx([2.5e-3, 5e-3, 1e-2, 5.5e-3, 1e-3], rel=1e-12)
    assert language_model._rate(1, config(warmup_steps=0)) < 3e-3  # no division by zero


ARCHITECTURES = get_args(TinyModelConfig.model_fields["architecture"].annotation)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_loss_is_the_models_own(blocks, tokenizer, architecture) -> None:
    shape = SHAPE.model_copy(update={"architecture": architecture, "num_attention_heads": 2})
    model = build_model(shape, tokenizer, seed=0)
    assert model.config.model_type == architecture
    own = float(model(input_ids=blocks[:4], labels=blocks[:4]).loss)
    # float32, and another order of summation
    assert float(language_model._next_token_loss(model, blocks[:4])) == pytest.approx(own, rel=1e-6)
    everything = float(model(input_ids=blocks, labels=blocks).loss)
    assert mean_loss(model, blocks, batch_size=3) == pytest.approx(everything, rel=1e-6)


def test_training_learns_and_says_how(blocks, tokenizer, tmp_path) -> None:
    before = torch.random.get_rng_state()
    model, run = train(blocks, tokenizer, tmp_path, steps=60, learning_rate=2e-2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert run.tokens_seen == 60 * 4 * 32
    steps = [point["step"] for point in run.curve]
    assert steps == sorted({1, *range(4, 61, 4), *range(5, 61, 5)})
    # an untrained model is near the uniform distribution
    assert run.curve[0]["loss"] == pytest.approx(math.log(len(tokenizer)), abs=0.1)
    assert run.curve[-1]["loss"] < 0.5 * run.curve[0]["loss"]
    assert not model.training


class Killed(BaseException):
    pass


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_cut_off_anywhere_ends_with_the_same_bytes(
    architecture, tied, blocks, tokenizer, tmp_path, monkeypatch
) -> None:
    shape = SHAPE.model_copy(
        update={
            "architecture": architecture,
            "num_attention_heads": 2,
            "tie_word_embeddings": tied,
        }
    )
    whole, told = train(blocks, tokenizer, tmp_path / "whole", model=shape)
    rate = language_model._rate
    for last in (1, 7, 12):  # before, between and after the checkpoints of steps 5 and 10

        def dies(step: int, settings: BaseConfig, last: int = last) -> float:
            if step == last:
                raise Killed
            return rate(step, settings)

        folder = tmp_path / str(last)
        monkeypatch.setattr(language_model, "_rate", dies)
        with pytest.raises(Killed):
            train(blocks, tokenizer, folder, model=shape)
        monkeypatch.setattr(language_model, "_rate", rate)
        saved = folder / "base.safetensors"
        assert (read_metadata(saved)["step"] if saved.exists() else 0) == (last - 1) // 5 * 5
        resumed, retold = train(blocks, tokenizer, folder, model=shape)
        assert retold == told
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_loss_that_is_not_finite_stops(blocks, tokenizer, tmp_path) -> None:
    with pytest.raises(
        MeasurementError, match=r"the loss is nan at step \d+; lower base.learning_rate"
    ):
        train(blocks, tokenizer, tmp_path, learning_rate=1e30, warmup_steps=0)
