"""Answers behind prompts, through the template that both models read."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import TEMPLATE, byte_tokenizer, tiny_llama

from dsteer.data.tokens import encode
from dsteer.data.types import PreferencePair
from dsteer.models.load import quiet
from dsteer.models.pair import ModelPair
from dsteer.transfer.answers import read_answers

ROOM = {"max_tokens": 400, "response_tokens": 4}
PROMPT = "\n\nHuman: Tea?\n\nAssistant:"


@pytest.fixture
def pair(tmp_path: Path) -> ModelPair:
    """A base whose tokenizer has no template, and a tuned model whose tokenizer has one."""
    for name, template in (("base", None), ("tuned", TEMPLATE)):
        with quiet():
            tiny_llama().save_pretrained(tmp_path / name)
        byte_tokenizer(template).save_pretrained(tmp_path / name)
    return ModelPair.load(tmp_path / "base", tmp_path / "tuned", device="cpu")


def test_answers_are_read_through_the_template_of_the_tuned_model(pair: ModelPair) -> None:
    pairs = [PreferencePair(PROMPT, " Yes, tea.", " No, rain.", conversation="a")]
    found = read_answers(pair, pairs, 1, template="chat", **ROOM)
    (wanted,) = encode(byte_tokenizer(TEMPLATE), [PROMPT], template="chat")
    assert [item.ids[: item.prompt_length] for item in found.texts] == [wanted.ids] * 2
    read = [byte_tokenizer().decode(item.ids[item.prompt_length :]) for item in found.texts]
    assert read == ["Yes,", "No, "]


def test_written_answers_follow_the_template_too(pair: ModelPair) -> None:
    found = read_answers(
        pair, [PreferencePair(PROMPT, conversation="a")], 1, template="chat", **ROOM
    )
    (wanted,) = encode(byte_tokenizer(TEMPLATE), [PROMPT], template="chat")
    assert found.written
    assert found.texts[0].ids[: found.texts[0].prompt_length] == wanted.ids


def test_a_pair_whose_prompt_was_cut_counts_once(pair: ModelPair) -> None:
    pairs = [
        PreferencePair(PROMPT + " So?" * 20, " Yes, tea.", " No.", conversation="a"),
        PreferencePair(PROMPT, " Yes, tea.", " No.", conversation="b"),
        PreferencePair(PROMPT + "!" * 11, " Yes, tea.", " N", conversation="c"),
    ]
    # BOS and 36 letters of the last prompt leave 3 of 40 tokens: room for " N", not for " Yes"
    found = read_answers(pair, pairs, 3, template="none", max_tokens=40, response_tokens=4)
    assert [item.truncated for item in found.texts] == [True, False, True, True, False, False]
    assert found.truncated == 2
    few = found.chosen_only(1)
    assert (few.pairs, few.texts, few.clusters) == (1, found.texts[:1], ["a"])
    assert found.chosen_only().texts == found.texts[:3]
