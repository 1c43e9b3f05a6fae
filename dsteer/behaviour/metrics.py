"""The metrics of a sweep: what each is called, means, and how it is taken from generated texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.behaviour.diversity import distinct_n, repetition
from dsteer.behaviour.oracles import oracle_scores
from dsteer.behaviour.overlap import bleu, rouge_l
from dsteer.behaviour.refusal import refusal
from dsteer.behaviour.validity import screen

Values = Float[Tensor, " n"]
"""One value a prompt, float64; NaN where a text has none."""


@dataclass(frozen=True)
class Metric:
    """What a metric is.

    Attributes:
        label: as axes and tables call it.
        unit: of its values.
        better: which way is better for a reader, if any.
        definition: one sentence.
        worst: what a degenerate output scores where it counts as the worst; None: no such value.
        counted: whether each value is 1 or 0 (½ at a tie), so that the metric is a share of rows.
    """

    label: str
    unit: str
    better: Literal["up", "down"] | None
    definition: str
    worst: float | None = None
    counted: bool = False


TEACHER_FORCED: Mapping[str, Metric] = {
    "kl_recovered": Metric(
        "KL recovered", "share", "up",
        "1 − Σ KL(target‖steered) / Σ KL(target‖start) over the answers' tokens, teacher-forced.",
    ),
    "kl_recovered_reverse": Metric(
        "KL recovered, reverse", "share", "up",
        "The same with KL(steered‖target) and KL(start‖target).",
    ),
    "kl_first_token": Metric(
        "KL to the target, first token", "nats", "down",
        "Mean KL(target‖steered) of the first token of the answer.",
    ),
    "top1_agreement": Metric(
        "top-1 agreement", "share", "up",
        "Share of the answers' tokens whose most likely one is the same for steered and target.",
    ),
    "reward_margin": Metric(
        "implicit reward margin", "", None,
        "Mean of r(chosen) − r(rejected), r = β [ln π(y|x) − ln π_base(y|x)] with the steered "
        "model as π, over the tokens of each answer that are read.",
    ),
    "preference_match": Metric(
        "preference match", "share", None,
        "Share of pairs with r(chosen) > r(rejected); a tie counts one half.",
        counted=True,
    ),
    "truthfulqa_mc1": Metric(
        "TruthfulQA MC1", "share", "up",
        "Share of questions whose best answer is more likely than every false one.",
        counted=True,
    ),
    "truthfulqa_mc2": Metric(
        "TruthfulQA MC2", "share", "up",
        "Probability of the true answers among all answers, mean over questions.",
    ),
}  # fmt: skip

GENERATED: Mapping[str, Metric] = {
    "external_reward": Metric(
        "external reward", "", "up", "Logit of the reward model for prompt and generated answer."
    ),
    "bleu_reference": Metric(
        "BLEU, reference", "points", "up",
        "Sentence BLEU (0 to 100, sacrebleu, effective order) against the preferred answer.", 0.0,
    ),
    "rouge_l_reference": Metric(
        "ROUGE-L, reference", "share", "up", "ROUGE-L F against the preferred answer.", 0.0
    ),
    "bleu_target": Metric(
        "BLEU, target's text", "points", "up",
        "Sentence BLEU (0 to 100) against the target model's own answer.", 0.0,
    ),
    "rouge_l_target": Metric(
        "ROUGE-L, target's text", "share", "up",
        "ROUGE-L F against the target model's own answer.", 0.0,
    ),
    "perplexity": Metric(
        "perplexity under the base", "", "down",
        "exp of the mean −ln π_base(token) over the tokens of the texts that are not degenerate.",
    ),
    "distinct_2": Metric(
        "distinct-2", "share", None, "Distinct word pairs of a text / word pairs.", 0.0
    ),
    "repetition": Metric(
        "repetition", "share", "down", "Share of a text's four-word runs seen before in it.", 1.0
    ),
    "length": Metric("length", "tokens", None, "Generated tokens without the end of text."),
    "degenerate": Metric(
        "degenerate outputs", "share", "down",
        "Share of texts that are empty, loop or leak a role header.",
        counted=True,
    ),
    "refusal": Metric(
        "refusal", "share", None, "Share of texts in which the rules find a refusal (English).",
        counted=True,
    ),
    "refusal_position": Metric(
        "position of the refusal", "share", None,
        "Where in the text the first refusal stands, of the texts with one.",
    ),
    "refusal_loops": Metric(
        "looping refusals", "share", "down", "Share of the refusals that stand there three times.",
        counted=True,
    ),
    "refusal_judge": Metric(
        "refusal, by judge", "share", None, "The judge's probability that the answer declines."
    ),
    "judge_prefers": Metric(
        "preferred by the judge", "share", "up",
        "The judge's probability for the text against the target's own, mean of both orders.",
    ),
    "toxicity": Metric("toxicity", "", "down", "The classifier's score of the text."),
    "judge": Metric(
        "judge's score", "points", "up",
        "Σ s p(s) / Σ p(s) over the score labels (G-Eval); abstentions are left out and counted.",
    ),
}  # fmt: skip


def oracle_metric(axis: str, poles: tuple[str, str]) -> Metric:
    """The synthetic world's oracle of one axis."""
    return Metric(
        f"oracle: {axis}", "", None,
        f"The world's own score of the text, from −1 ({poles[1]}) to 1 ({poles[0]}).",
    )  # fmt: skip


@dataclass(frozen=True)
class Generated:
    """Texts that one model or arm wrote, one a prompt."""

    texts: Sequence[str]
    tokens: Sequence[Sequence[int]]


def numbers(values: Sequence[float | int | None]) -> Values:
    """As float64, None as NaN."""
    return torch.tensor(
        [float("nan") if value is None else float(value) for value in values], dtype=torch.float64
    )


def text_metrics(
    written: Generated, references: Sequence[str | None], target: Generated, *, synthetic: bool
) -> dict[str, Values]:
    """The metrics that need the texts alone."""
    texts = list(written.texts)
    refusals = [refusal(text) for text in texts]
    found: dict[str, Sequence[float | None]] = {
        "bleu_target": bleu(texts, list(target.texts)),
        "rouge_l_target": rouge_l(texts, list(target.texts)),
        "distinct_2": distinct_n(texts, 2),
        "repetition": repetition(texts),
        "length": [len(ids) for ids in written.tokens],
        "degenerate": [screen(text) is not None for text in texts],
        "refusal": [item is not None for item in refusals],
        "refusal_position": [None if item is None else item.position for item in refusals],
        "refusal_loops": [None if item is None else item.loops for item in refusals],
    }
    if any(reference is not None for reference in references):
        found["bleu_reference"] = bleu(texts, references)
        found["rouge_l_reference"] = rouge_l(texts, references)
    if synthetic:
        found |= {f"oracle_{axis}": values for axis, values in oracle_scores(texts).items()}
    return {name: numbers(values) for name, values in found.items()}
