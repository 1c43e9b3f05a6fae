"""Pairs whose answers part, on a tokenizer of one token a byte."""

from __future__ import annotations

from planted import byte_tokenizer

from dsteer.data.types import PreferencePair
from dsteer.training.divergence import DivergentPairs, first_divergence

TOKENIZER = byte_tokenizer()
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text)["input_ids"][1:])


def test_first_divergence() -> None:
    assert first_divergence((1, 2, 3), (1, 5)) == 1
    assert first_divergence((1, 2), (3,)) == 0
    assert first_divergence((1, 2), (1, 2)) is None
    assert first_divergence((1, 2), (1, 2, 3)) is None


def test_the_shared_text_and_the_tokens_behind_it() -> None:
    pairs = [
        PreferencePair("Q:", " yes", " yet", "a"),
        PreferencePair("Q:", " no", " nobody", "b"),  # one ends where the other goes on
        PreferencePair("Q:", " same", " same", "c"),
        PreferencePair("only a prompt"),
        PreferencePair("R:", "x", "y"),
    ]
    found = DivergentPairs.of(pairs, TOKENIZER, 100)
    assert (found.with_answers, found.no_divergence) == (4, 1)
    assert (found.prompts_cut, found.answers_cut) == (0, 0)
    assert found.at == (3, 3, 0)
    assert found.tokens == ([*ids("s"), EOS, *ids("x")], [*ids("t"), *ids("b"), *ids("y")])
    assert found.keys == ["a", "b", "2"]
    assert [item.ids for item in found.contexts] == [
        (BOS, *ids(text)) for text in ("Q: ye", "Q: no", "R:")
    ]
    assert [item.prompt_length for item in found.contexts] == [3, 3, 3]
    fewer = found.first(1)
    assert (len(fewer.examples), fewer.at, fewer.no_divergence) == (1, (3,), 1)


def test_no_pairs_need_no_tokenizer_rules() -> None:
    found = DivergentPairs.of([PreferencePair("a prompt")], TOKENIZER, 100)
    assert (found.examples, found.with_answers, found.tokens) == ((), 0, ([], []))


def test_texts_are_cut_to_the_length() -> None:
    pair = PreferencePair("0123456789", "abcdefgh", "abX", "a")
    # room for 9 of the prompt's 11 tokens beside 9 of the answer (EOS included)
    (example,) = DivergentPairs.of([pair], TOKENIZER, 18).examples
    assert example.prompt == (BOS, *ids("23456789"))
    assert example.chosen == (*ids("abcdefgh"), EOS)
    # answers keep half of 10, so the prompt has 5
    found = DivergentPairs.of([pair], TOKENIZER, 10)
    assert found.examples[0].prompt == (BOS, *ids("6789"))
    assert found.examples[0].chosen == ids("abcde")
    assert found.examples[0].rejected == (*ids("abX"), EOS)
    assert (found.prompts_cut, found.answers_cut) == (1, 1)
    # cut before the answers part: nothing is left to compare
    assert DivergentPairs.of([pair], TOKENIZER, 4).no_divergence == 1
