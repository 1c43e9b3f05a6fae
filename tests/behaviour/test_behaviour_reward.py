"""Rewards of a tiny reward model, saved by the test and loaded through the normal path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import byte_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from dsteer.behaviour.classifier import Classifier
from dsteer.behaviour.external_reward import Reward, external_reward
from dsteer.errors import ModelError
from dsteer.models.load import quiet

EGG = "\n\nHuman: How do I boil an egg?\n\nAssistant:"
MESSAGES = [{"role": "user", "content": "Hi"}]
ITEMS = [(EGG, " Eight minutes."), (EGG, " No."), ("Name a river.", "The Nile."), (MESSAGES, "Yo")]

# What the model must read of each item, written out by hand.
TEMPLATED = (
    "<s><user>How do I boil an egg?\n<assistant>Eight minutes.\n",
    "<s><user>How do I boil an egg?\n<assistant>No.\n",
    "<s><user>Name a river.\n<assistant>The Nile.\n",
    "<s><user>Hi\n<assistant>Yo\n",
)
PLAIN = (
    "<s>" + EGG + " Eight minutes.",
    "<s>" + EGG + " No.",
    "<s>Name a river.The Nile.",
    "<s>\n\nHuman: Hi\n\nAssistant: Yo",
)


def saved(folder: Path, tokenizer: Any, labels: int = 1, positions: int = 256) -> Path:
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=None,
        max_position_embeddings=positions, num_labels=labels,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config)
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def direct(folder: Path, text: str) -> float:
    ids = AutoTokenizer.from_pretrained(folder)(
        text, add_special_tokens=False, return_tensors="pt"
    )["input_ids"]
    with quiet():
        model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits.item()


def load(folder: Path) -> Classifier:
    return Classifier.load(folder, device="cpu")


@pytest.mark.parametrize("templated", [True, False])
def test_the_logit_of_the_whole_conversation(tmp_path: Path, templated: bool) -> None:
    tokenizer = byte_tokenizer() if templated else byte_tokenizer(template=None)
    folder = saved(tmp_path, tokenizer)
    got = external_reward(load(folder))(ITEMS)
    expected = [direct(folder, text) for text in (TEMPLATED if templated else PLAIN)]
    assert [item.value for item in got] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01
    assert not any(item.truncated for item in got)


def test_an_open_last_turn_is_the_answers(tmp_path: Path) -> None:
    rewards = external_reward(load(saved(tmp_path, byte_tokenizer())))
    opened = [*MESSAGES, {"role": "assistant", "content": ""}]
    one, other = rewards([(MESSAGES, "Yo"), (opened, "Yo")])
    assert one == other


def test_a_long_prompt_loses_its_left(tmp_path: Path) -> None:
    folder = saved(tmp_path, byte_tokenizer(template=None), positions=24)
    got = external_reward(load(folder))([("x" * 40 + "QA:", " yes"), ("Q", " no")])
    assert [item.truncated for item in got] == [True, False]
    kept = "<s>" + ("x" * 40 + "QA: yes")[-23:]
    assert got[0].value == pytest.approx(direct(folder, kept), abs=1e-5)


def test_each_conversation_is_read_once(tmp_path: Path) -> None:
    model = load(saved(tmp_path, byte_tokenizer()))
    rows: list[int] = []
    model.model.register_forward_hook(
        lambda _module, _args, kwargs, _output: rows.append(len(kwargs["input_ids"])),
        with_kwargs=True,
    )
    rewards = external_reward(model)
    first = rewards([*ITEMS, ITEMS[0]])
    assert rewards(ITEMS) == first[:-1]
    assert isinstance(first[0], Reward)
    assert sum(rows) == len(ITEMS)


def test_more_labels_than_one_are_no_reward(tmp_path: Path) -> None:
    model = load(saved(tmp_path, byte_tokenizer(), labels=2))
    with pytest.raises(ModelError, match=r"2 labels \('LABEL_0', 'LABEL_1'\).*reward_model"):
        external_reward(model)
