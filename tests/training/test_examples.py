"""Pairs become the same ids here as inside TRL."""

from __future__ import annotations

import pytest
from datasets import Dataset
from trl import DPOConfig

from dsteer.config import TinyModelConfig
from dsteer.data.types import Message, PreferencePair
from dsteer.errors import DataError, ModelError
from dsteer.models.tiny import build_model, build_tokenizer
from dsteer.training.dpo import _quiet, _Trainer
from dsteer.training.examples import answered, as_text, encode_pairs, fitting, to_rows

TEXTS = [f"\n\nHuman: Hello number {i}?\n\nAssistant: I am {i} and fine." for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXTS, 320)


def text_pair(i: int, *, prompt: str | None = None) -> PreferencePair:
    asked = prompt or f"\n\nHuman: Hello number {i}?\n\nAssistant:"
    return PreferencePair(asked, f" I am {i} and fine.", f" Who are you, {i * i}?", f"c{i}", "s", i)


def message_pair(i: int) -> PreferencePair:
    prompt = [Message(role="user", content=f"Hello number {i}?")]
    return PreferencePair(prompt, f"I am {i} and fine.", f"Who are you, {i}?", f"m{i}", "s", i)


CASES = {
    "text": [text_pair(i) for i in range(6)],
    "messages": [message_pair(i) for i in range(6)],
    "mixed": [text_pair(1), message_pair(2)],
    # the answer begins in the middle of a token of the prompt
    "merging": [
        PreferencePair("\n\nHuman: Hello num", "ber 1?", "ber 2 and fine.", "c", "s", 0),
        text_pair(2),
    ],
    "bos in the text": [text_pair(1, prompt="<|bos|>\n\nHuman: Hi\n\nAssistant:")],
}


@pytest.mark.parametrize("case", CASES)
def test_ids_equal_those_of_trl(case: str, tokenizer, tmp_path) -> None:
    pairs = CASES[case]
    model = build_model(
        TinyModelConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1), tokenizer, 0
    )
    with _quiet():
        trainer = _Trainer(
            model=model,
            ref_model=None,
            args=DPOConfig(
                output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none",
                activation_checkpointing=False, precompute_ref_log_probs=True,
            ),
            train_dataset=Dataset.from_list(to_rows(pairs, tokenizer)),
            processing_class=tokenizer,
        )  # fmt: skip
    examples = encode_pairs(pairs, tokenizer)
    assert [list(e.prompt) for e in examples] == trainer.train_dataset["prompt_ids"][:]
    assert [list(e.chosen) for e in examples] == trainer.train_dataset["chosen_ids"][:]
    assert [list(e.rejected) for e in examples] == trainer.train_dataset["rejected_ids"][:]
    for example in examples:
        assert example.prompt.count(tokenizer.bos_token_id) == 1
        assert example.prompt[0] == tokenizer.bos_token_id
        for answer in (example.chosen, example.rejected):
            assert answer.count(tokenizer.eos_token_id) == 1
            assert answer[-1] == tokenizer.eos_token_id
    assert examples[0].split_token == (case == "merging")
    assert not any(example.split_token for example in examples[1:])


def test_an_example_is_prompt_answer_and_eos(tokenizer) -> None:
    (example,) = encode_pairs([text_pair(3)], tokenizer)
    decoded = tokenizer.decode(example.prompt[1:]), tokenizer.decode(example.chosen)
    assert decoded == ("\n\nHuman: Hello number 3?\n\nAssistant:", " I am 3 and fine.<|eos|>")
    assert example.length == len(example.prompt) + max(len(example.chosen), len(example.rejected))


def test_messages_without_a_template_become_a_transcript(tokenizer) -> None:
    plain = build_tokenizer(TEXTS, 320)
    plain.chat_template = None
    asked = "\n\nHuman: Hello number 2?\n\nAssistant:"
    assert as_text(message_pair(2), plain) == (asked, " I am 2 and fine.", " Who are you, 2?")
    assert encode_pairs([message_pair(2)], plain)[0].prompt == tuple(tokenizer(asked)["input_ids"])


def test_fitting_cuts_as_trl_does(tokenizer) -> None:
    examples = encode_pairs(
        [text_pair(1), text_pair(2, prompt="\n\nHuman:" + " a" * 50)], tokenizer
    )
    length = len(examples[0].prompt)
    (kept,) = fitting(examples, length + 2)
    assert kept.prompt == examples[0].prompt
    assert kept.chosen == examples[0].chosen[:2]
    assert kept.rejected == examples[0].rejected[:2]
    assert fitting(examples, length) == []  # the prompt alone fills it


def test_pairs_without_answers() -> None:
    prompt = PreferencePair("Hi", source="list.txt", row=4)
    assert answered([prompt, text_pair(1)]) == [text_pair(1)]
    with pytest.raises(DataError, match=r"list\.txt row 4: a prompt without answers"):
        as_text(prompt)


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = build_tokenizer(TEXTS, 320)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        to_rows([text_pair(1)], tokenizer)
