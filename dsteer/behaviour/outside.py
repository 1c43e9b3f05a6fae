"""Metrics of texts that need something from outside: a reward model, a classifier, a judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from dsteer.behaviour.classifier import Classifier
from dsteer.behaviour.external_reward import external_reward
from dsteer.behaviour.judge import Judge, abstentions
from dsteer.behaviour.toxicity import load_toxicity
from dsteer.config import BehaviourConfig
from dsteer.data.types import Prompt
from dsteer.progress import Reporter

Score = Callable[[Sequence[str]], list[float | None]]
"""The values of the answers to the prompts, in their order."""


class Outside:
    """What a pipeline configures of them; what it does not is absent, with the reason.

    Args:
        config: the ``behaviour`` section.
        prompts: what the texts answer.
        device: where classifiers run.
        reporter: shows progress.

    Attributes:
        scores: by name of the metric.
        absent: names and reasons.
        silent: on how many texts the judge abstained, by reason; it grows as scores are asked for.
    """

    def __init__(
        self, config: BehaviourConfig, prompts: Sequence[Prompt], device: str, reporter: Reporter
    ) -> None:
        self.scores: dict[str, Score] = {}
        self.absent: list[tuple[str, str]] = []
        self.silent: Counter[str] = Counter()

        def pairs(texts: Sequence[str]) -> list[tuple[Prompt, str]]:
            return list(zip(prompts, texts, strict=True))

        if config.reward_model is None:
            self.absent.append(("external_reward", "behaviour.reward_model is not configured"))
        else:
            reward = external_reward(Classifier.load(config.reward_model, device=device))
            self.scores["external_reward"] = lambda texts: [r.value for r in reward(pairs(texts))]
        if config.toxicity is None:
            self.absent.append(("toxicity", "behaviour.toxicity is not configured"))
        else:
            toxicity = load_toxicity(config.toxicity, device=device, reporter=reporter)
            self.scores["toxicity"] = lambda texts: [item.value for item in toxicity(texts)]
        if config.judge is None:
            for name in ("judge", "refusal_judge"):
                self.absent.append((name, "behaviour.judge is not configured"))
            return
        judge = Judge(config.judge, reporter=reporter)

        def judged(texts: Sequence[str]) -> list[float | None]:
            verdicts = judge.scores(pairs(texts))
            self.silent.update(abstentions(verdicts))
            return [verdict.value for verdict in verdicts]

        self.scores["judge"] = judged
        if config.judge.refusal:
            self.scores["refusal_judge"] = lambda texts: [
                verdict.value for verdict in judge.refusals(pairs(texts))
            ]
        else:
            self.absent.append(("refusal_judge", "behaviour.judge.refusal is false"))
