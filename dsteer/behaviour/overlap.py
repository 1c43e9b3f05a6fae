"""Overlap of texts with references: BLEU by sacrebleu, ROUGE-L by rouge-score.

A reference is what the caller compares with: the data's answer, or the target model's own output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Literal

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from dsteer.behaviour.words import WORD
from dsteer.errors import MeasurementError

BleuTokens = Literal["13a", "intl", "zh", "char"]
"""sacrebleu's tokenizers: "13a" is the usual one; "zh" or "char" for text without spaces."""

_PART: Final = re.compile(r"[^\W_]+")


def bleu(
    candidates: Sequence[str],
    references: Sequence[str | None],
    tokenize: BleuTokens = "13a",
) -> list[float | None]:
    """Sentence BLEU of each text against its reference, in points from 0 to 100.

    BLEU = 100 · min(1, e^(1 − r/c)) · (Π pₙ)^(1/N) of c candidate and r reference tokens, with pₙ
    the share of the candidate's n-grams that the reference holds. N = 4, or the longest n-gram
    that the candidate has (effective order); shares of zero are smoothed ("exp").

    Returns:
        One value a text: 0 for an empty text, None where the reference is missing or has no word.

    Raises:
        MeasurementError: other than one reference a text.
    """
    metric = BLEU(effective_order=True, tokenize=tokenize)
    return [
        min(100.0, float(metric.sentence_score(candidate, [reference]).score))
        if reference is not None
        else None
        for candidate, reference in _paired(candidates, references)
    ]


def corpus_bleu(
    candidates: Sequence[str],
    references: Sequence[str | None],
    tokenize: BleuTokens = "13a",
) -> float | None:
    """BLEU of all texts that have a reference, with counts summed before the shares are taken.

    In points from 0 to 100, by sacrebleu's defaults: N = 4 always. None without any reference.

    Raises:
        MeasurementError: other than one reference a text.
    """
    pairs = [(c, r) for c, r in _paired(candidates, references) if r is not None]
    if not pairs:
        return None
    texts, targets = zip(*pairs, strict=True)
    metric = BLEU(tokenize=tokenize, force=True)  # force: no advice on texts that look tokenized
    return min(100.0, float(metric.corpus_score(list(texts), [list(targets)]).score))


def rouge_l(candidates: Sequence[str], references: Sequence[str | None]) -> list[float | None]:
    """ROUGE-L of each text against its reference: an F-measure from 0 to 1.

    F = 2PR/(P + R) with P = L/c and R = L/r, L the longest common subsequence of c candidate and r
    reference tokens. Tokens are runs of letters and digits in lower case, not stemmed: on ASCII
    text those of rouge-score's own tokenizer, which drops all other letters. Where a script writes
    no spaces, each character is a token.

    Returns:
        One value a text: 0 for an empty text, None where the reference is missing or has no word.

    Raises:
        MeasurementError: other than one reference a text.
    """
    scorer = RougeScorer(["rougeL"], tokenizer=_Tokenizer())
    return [
        float(scorer.score(reference, candidate)["rougeL"].fmeasure)
        if reference is not None
        else None
        for candidate, reference in _paired(candidates, references)
    ]


class _Tokenizer:
    """rouge-score's interface to a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return [part for word in WORD.findall(text.lower()) for part in _PART.findall(word)]


def _paired(
    candidates: Sequence[str], references: Sequence[str | None]
) -> list[tuple[str, str | None]]:
    """Each text with its reference, or with None for one that has no word."""
    if len(candidates) != len(references):
        raise MeasurementError(
            f"{len(references)} references for {len(candidates)} texts: give one a text, "
            "None where there is none"
        )
    return [
        (candidate, reference if reference and WORD.search(reference) else None)
        for candidate, reference in zip(candidates, references, strict=True)
    ]
