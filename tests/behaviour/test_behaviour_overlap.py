"""BLEU and ROUGE-L against hand-worked values and the libraries themselves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu as sacre_corpus_bleu

from dsteer.behaviour.overlap import bleu, corpus_bleu, rouge_l
from dsteer.errors import MeasurementError

WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=12)
SENTENCE = WORDS.map(" ".join)
ASCII = st.text(st.characters(codec="ascii"), max_size=60)


def test_bleu_by_hand() -> None:
    # 1-grams 4/5, 2-grams 2/4, 3-grams 1/3; 4-grams 0/2, smoothed to 1/(2·2); no brevity penalty
    [score] = bleu(["the cat sat on mats"], ["the cat sat at mats"])
    assert score == pytest.approx(100 * (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25)
    # all n-grams of the 4 words match; the reference has 2 words more
    [score] = bleu(["a b c d"], ["a b c d e f"])
    assert score == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_effective_order_uses_the_n_grams_that_a_short_text_has() -> None:
    assert bleu(["yes", "yes it"], ["yes", "yes it"]) == pytest.approx([100.0, 100.0])


def test_sentence_and_corpus_bleu_of_one_long_sentence_agree_with_sacrebleu() -> None:
    text, reference = "the cat sat on the old mat today", "the cat sat on the mat again today"
    library = sacre_corpus_bleu([text], [[reference]]).score
    assert 30 < library < 60
    assert bleu([text], [reference]) == [pytest.approx(library)]
    assert corpus_bleu([text], [reference]) == pytest.approx(library)


def test_corpus_bleu_sums_counts_and_is_no_mean() -> None:
    texts, references = ["a b c d e", "x y z w"], ["a b c d e", "x y q w"]
    # 1-grams 8/9, 2-grams 5/7, 3-grams 3/5, 4-grams 2/3
    expected = 100 * (8 / 9 * 5 / 7 * 3 / 5 * 2 / 3) ** 0.25
    assert corpus_bleu(texts, references) == pytest.approx(expected)
    assert corpus_bleu([*texts, "no reference"], [*references, None]) == pytest.approx(expected)


def test_rouge_l_by_hand() -> None:
    # the longest common subsequence is "the cat on mat": P = 4/6, R = 4/5
    [score] = rouge_l(["The cat sat on a mat."], ["the cat is on mat"])
    assert score == pytest.approx(2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5))
    assert rouge_l(["b a"], ["a b"]) == [pytest.approx(0.5)]
    assert rouge_l(["running"], ["run"]) == [0.0]  # not stemmed


@given(ASCII, ASCII)
@settings(max_examples=60, deadline=None)
def test_rouge_l_of_ascii_is_that_of_rouge_score(text: str, reference: str) -> None:
    [score] = rouge_l([text], [reference])
    library = RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure
    if any(c.isalnum() for c in reference):
        assert score == pytest.approx(library)
    else:
        assert score is None


@pytest.mark.parametrize("metric", [bleu, rouge_l])
def test_no_reference_no_value_but_an_empty_text_scores_nothing(metric) -> None:  # type: ignore[no-untyped-def]
    assert metric(["a", "a", "a", "", " "], [None, "", " … ", "a b", "a"]) == [
        None, None, None, 0.0, 0.0,
    ]  # fmt: skip
    assert metric([], []) == []


def test_corpus_bleu_without_references() -> None:
    assert corpus_bleu(["a"], [None]) is None
    assert corpus_bleu([], []) is None
    assert corpus_bleu([""], ["a b"]) == 0.0


@pytest.mark.parametrize("metric", [bleu, corpus_bleu, rouge_l])
def test_one_reference_a_text(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MeasurementError, match="1 references for 2 texts"):
        metric(["a", "b"], ["a"])


def test_texts_without_spaces() -> None:
    text, reference = "我喜欢绿茶", "我喜欢红茶"
    # each character is a token: 4 of 5 in common
    assert rouge_l([text], [reference]) == [pytest.approx(0.8)]
    assert bleu([text], [reference]) == [0.0]  # "13a" sees one word
    [score] = bleu([text], [reference], tokenize="zh")
    # 1-grams 4/5, 2-grams 2/4, 3-grams 1/3, 4-grams 0/2 smoothed
    assert score == pytest.approx(100 * (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25)
    assert rouge_l(["un café"], ["un cafe"]) == [pytest.approx(0.5)]


@given(st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_ranges_and_identity(pairs: list[tuple[str, str]]) -> None:
    texts, references = (list(side) for side in zip(*pairs, strict=True))
    assert all(0 <= score <= 100 for score in bleu(texts, references) if score is not None)
    assert all(0 <= score <= 1 for score in rouge_l(texts, references) if score is not None)
    assert bleu(texts, texts) == pytest.approx([100.0] * len(texts))
    assert rouge_l(texts, texts) == [1.0] * len(texts)
    assert rouge_l(texts, references) == pytest.approx(rouge_l(references, texts))
