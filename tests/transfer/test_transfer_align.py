"""Shared positions of two tokenizers against the decoded texts, and states against the model's."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from planted import byte_tokenizer, tiny_llama

from dsteer.data.synthetic import World
from dsteer.data.tokens import Spelled, encode, spell
from dsteer.errors import DataError, MeasurementError, ModelError
from dsteer.models.tiny import build_tokenizer
from dsteer.transfer.align import (
    MIN_TEXTS,
    PARTS,
    align,
    parts,
    read_states,
    read_texts,
    word_ends,
)

TEXTS = [str(pair.prompt) + str(pair.chosen) for pair in World(0).pairs(30)]
ODD = "\n\nHuman: Größe, naïve café!\n\nAssistant: 東京 is 5.5° — don't\tstop 👩‍🚀 end_of it"


@cache
def coarse() -> object:
    """A byte-pair tokenizer whose merges were learned on the texts."""
    return build_tokenizer(TEXTS, 700)


@cache
def fine() -> object:
    """Another with few merges, learned on other texts."""
    return build_tokenizer(["the rain in the plain", "and then and there"], 300)


def test_word_ends() -> None:
    assert word_ends("Tea, or  5.5 x_y?") == [3, 7, 10, 12, 16]
    assert word_ends("?! ") == []


@pytest.mark.parametrize("make", [coarse, fine, byte_tokenizer])
def test_spelling_is_the_encoding_with_ends(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    for text in (*TEXTS[:3], ODD):
        (spelled,) = spell(tokenizer, [text])
        (encoded,) = encode(tokenizer, [text])
        assert spelled.ids == encoded.ids
        assert spelled.ends[0] == 0, "BOS ends nothing"
        assert list(spelled.ends) == sorted(spelled.ends)
        assert spelled.ends[-1] == len(text)
        for token, end in enumerate(spelled.ends[1:], 1):
            read = tokenizer.decode(spelled.ids[1 : token + 1])
            if "\ufffd" not in read:  # else it ends inside a character
                assert read == text[:end]
    (cut,) = spell(tokenizer, [ODD], max_tokens=5)
    assert len(cut.ids) == len(cut.ends) == 5
    assert spell(tokenizer, []) == []


@pytest.mark.parametrize("text", [*TEXTS[:4], ODD])
def test_both_have_read_the_same_whole_words(text: str) -> None:
    a, b = coarse(), fine()
    (of_a,), (of_b,) = spell(a, [text]), spell(b, [text])
    positions = align(text, of_a, of_b)
    assert positions
    found = []
    for i, j in positions:
        read = a.decode(of_a.ids[1 : i + 1])  # type: ignore[attr-defined]
        assert read == b.decode(of_b.ids[1 : j + 1])  # type: ignore[attr-defined]
        assert text.startswith(read)
        assert read[-1].isalnum() or read[-1] == "_"
        assert not text[len(read) : len(read) + 1].isalnum()
        found.append(len(read))
    # byte-level tokenizers end a token at the end of each word, but where merges cross it
    ends = set(of_a.ends) & set(of_b.ends)
    assert found == [end for end in word_ends(text) if end in ends]
    assert len(found) > 0.5 * len(word_ends(text))


def test_of_several_tokens_of_one_character_the_last_counts() -> None:
    text = "né x"
    a = Spelled((9, 1, 2, 3, 4), (0, 1, 2, 2, 4))  # é in two tokens
    b = Spelled((9, 1, 2), (0, 2, 4))
    assert align(text, a, b) == [(3, 1), (4, 2)]


def test_a_token_across_a_words_end_is_no_position() -> None:
    a = Spelled((0, 1, 2), (0, 4, 6))  # "ab c", "d."
    b = Spelled((0, 1, 2, 3), (0, 2, 5, 6))
    assert align("ab cd.", a, b) == []


def test_the_first_token_is_no_position() -> None:
    a = Spelled((1, 2), (2, 5))  # "ab", " cd" without BOS
    b = Spelled((0, 1, 2), (0, 2, 5))
    assert align("ab cd", a, b) == [(1, 2)]
    assert align("ab cd", b, a) == [(2, 1)]


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False
        name_or_path = "old/model"

    with pytest.raises(ModelError, match=r"tokenizer 'old/model' is a slow one.*tokenizer\.json"):
        spell(Slow(), ["text"])


def test_texts_fill_a_budget_and_are_dealt_once() -> None:
    a, b = coarse(), fine()
    sizes = {"sender_tokens": 40, "receiver_tokens": 60}
    found = read_texts(TEXTS, a, b, **sizes, budget=10**6)
    assert len(found) == len(TEXTS)
    for text in found:
        last = text.positions[-1]
        assert (len(text.sender), len(text.receiver)) == (last[0] + 1, last[1] + 1)
        assert len(text.sender) <= 40
        assert len(text.receiver) <= 60
    few = read_texts(TEXTS, a, b, **sizes, budget=700)
    assert few == found[: len(few)]
    read = [len(text.receiver) for text in few]
    assert sum(read[:-1]) < 700 <= sum(read)
    divided = parts(found, seed=1)
    assert list(divided) == list(PARTS)
    assert [len(divided[part]) for part in PARTS] == [21, 4, 5]
    assert sorted(id(text) for part in PARTS for text in divided[part]) == sorted(map(id, found))
    assert all(parts(found[:MIN_TEXTS], seed=0).values())
    with pytest.raises(DataError, match=r"has 9 texts .* expected at least 10.*transfer\.text"):
        read_texts([*TEXTS[:9], "?!"], a, b, **sizes, budget=10**6)


def test_states_are_the_models_own() -> None:
    model = tiny_llama(initializer_range=0.1)
    texts = [(0, 5, 9, 30, 7, 8), (0, 3, 4), (0, 100, 101, 102)]
    tokens = [[1, 2, 5], [2], [0, 3]]
    sites = ("resid_post.1", "final_norm")
    states = read_states(model, texts, tokens, sites, batch_tokens=12)
    row = 0
    for ids, wanted in zip(texts, tokens, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for token in wanted:
            for site, layer in (("resid_post.1", 2), ("final_norm", -1)):
                own = hidden[layer][0, token]
                # float32: other batches round otherwise
                torch.testing.assert_close(states[site][row], own, atol=1e-5, rtol=1e-5)
            row += 1
    assert row == len(states["final_norm"])
    with pytest.raises(ModelError, match="has 260 tokens, and its tokenizer gives the id 260"):
        read_states(model, [(0, 260)], [[1]], sites)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.inf
    with pytest.raises(MeasurementError, match="not finite"):
        read_states(model, texts[:1], [[1]], sites)
