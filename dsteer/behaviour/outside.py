"""Metrics of texts that need something from outside: a reward model, a classifier, a judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from dsteer.behaviour.classifier import Classifier
from dsteer.behaviour.external_reward import external_reward
from dsteer.behaviour.judge import Judge, Verdict, abstentions
from dsteer.behaviour.toxicity import load_toxicity
from dsteer.config import BehaviourConfig
from dsteer.data.types import Prompt
from dsteer.progress import Reporter

MISSING = 0.1
"""Missing mass of a verdict from which it is remarked on."""

Score = Callable[[Sequence[str]], list[float | None]]
"""The values of the answers to the prompts, in their order."""


class Outside:
    """What a pipeline configures of them; what it does not is absent, with the reason.

    Making it opens every model and asks the judge one harmless question, so that a mistake in the
    config shows before any other work.

    Args:
        config: the ``behaviour`` section.
        prompts: what the texts answer.
        device: where classifiers run.
        reporter: shows progress.

    Attributes:
        scores: by name of the metric.
        absent: names and reasons.
        prefers: the judge's preference for texts against others, in both orders; None if not asked.
        remarks: what happened to texts (abstentions, truncation …), and to how many; it grows as
            scores are asked for.
    """

    def __init__(
        self, config: BehaviourConfig, prompts: Sequence[Prompt], device: str, reporter: Reporter
    ) -> None:
        self.scores: dict[str, Score] = {}
        self.absent: list[tuple[str, str]] = []
        self.remarks: Counter[str] = Counter()
        self.prefers: Callable[[Sequence[str], Sequence[str]], list[float | None]] | None = None
        self._prompts = prompts
        if config.reward_model is None:
            self.absent.append(("external_reward", "behaviour.reward_model is not configured"))
        else:
            reward = external_reward(Classifier.load(config.reward_model, device=device))

            def rewards(texts: Sequence[str]) -> list[float | None]:
                found = reward(self._pairs(texts))
                cut = sum(item.truncated for item in found)
                self._remark("external_reward: prompts that lost their left", cut)
                return [item.value for item in found]

            self.scores["external_reward"] = rewards
        if config.toxicity is None:
            self.absent.append(("toxicity", "behaviour.toxicity is not configured"))
        else:
            toxicity = load_toxicity(config.toxicity, device=device, reporter=reporter)

            def toxic(texts: Sequence[str]) -> list[float | None]:
                found = toxicity(texts)
                for item in found:
                    self._remark("toxicity: texts that lost their end", item.truncated)
                    self._remark(f"toxicity: without a value ({item.reason})", item.value is None)
                return [item.value for item in found]

            self.scores["toxicity"] = toxic
        if config.judge is None:
            for name in ("judge", "refusal_judge", "judge_prefers"):
                self.absent.append((name, "behaviour.judge is not configured"))
            return
        judge = Judge(config.judge, reporter=reporter)
        judge.scores([("How do I boil an egg?", "Nine minutes in boiling water.")])
        self.scores["judge"] = lambda texts: self._judged("judge", judge.scores, texts)
        if config.judge.refusal:
            self.scores["refusal_judge"] = lambda texts: self._judged(
                "refusal_judge", judge.refusals, texts
            )
        else:
            self.absent.append(("refusal_judge", "behaviour.judge.refusal is false"))

        if config.judge.prefer:
            self.prefers = lambda texts, others: self._judged(
                "judge_prefers",
                lambda pairs: judge.preferences(
                    [(p, a, b) for (p, a), b in zip(pairs, others, strict=True)]
                ),
                texts,
            )
        else:
            self.absent.append(("judge_prefers", "behaviour.judge.prefer is false"))

    def _pairs(self, texts: Sequence[str]) -> list[tuple[Prompt, str]]:
        return list(zip(self._prompts, texts, strict=True))

    def _judged(
        self,
        name: str,
        ask: Callable[[Sequence[tuple[Prompt, str]]], list[Verdict]],
        texts: Sequence[str],
    ) -> list[float | None]:
        verdicts = ask(self._pairs(texts))
        for reason, count in abstentions(verdicts).items():
            self._remark(f"{name}: abstentions ({reason})", count)
        missing = sum((item.missing or 0) > MISSING for item in verdicts)
        self._remark(f"{name}: more than {MISSING:.0%} of the probability on no label", missing)
        return [verdict.value for verdict in verdicts]

    def _remark(self, what: str, count: int) -> None:
        if count:
            self.remarks[what] += count
