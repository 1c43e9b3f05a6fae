"""Toxicity of texts: the probability that a classifier, or the Perspective API, gives to it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx2

from dsteer.behaviour.caching import by_text
from dsteer.behaviour.classifier import Classifier
from dsteer.behaviour.http import HttpError, post_json
from dsteer.config import ToxicityConfig
from dsteer.errors import ConfigError, ModelError
from dsteer.progress import SILENT, Reporter

KEY = "PERSPECTIVE_API_KEY"


@dataclass(frozen=True, slots=True)
class Toxicity:
    """Toxicity of one text.

    Attributes:
        value: a probability; None where there is none, with the reason.
        truncated: whether the classifier read only the start of the text.
        reason: why there is no value.
    """

    value: float | None
    truncated: bool = False
    reason: str | None = None


Metric = Callable[[Sequence[str]], list[Toxicity]]
"""Toxicity of each text, remembered by text."""


def load_toxicity(
    config: ToxicityConfig, *, device: str = "auto", reporter: Reporter = SILENT
) -> Metric:
    """The metric that a pipeline asks for.

    Raises:
        ConfigError, ModelError: it can't be had; see the two functions below.
    """
    if config.classifier is None:
        return perspective_toxicity(endpoint=config.perspective_url, reporter=reporter)
    return classifier_toxicity(
        Classifier.load(config.classifier, device=device),
        config.label,
        multi_label=config.multi_label,
    )


def classifier_toxicity(
    classifier: Classifier, label: str, *, multi_label: bool | None = None
) -> Metric:
    """P(label | text) by a text classifier.

    The sigmoid of the label's logit where labels are independent or there is but one, else the
    softmax over the labels. Texts beyond the classifier's limit lose their end, and say so.

    Args:
        classifier: the model.
        label: the label whose probability is the toxicity.
        multi_label: whether labels are independent; None: what the classifier's config says.

    Raises:
        ModelError: the classifier has no such label.
    """
    if label not in classifier.labels:
        raise ModelError(
            f"{classifier.name}: no label {label!r}; it has "
            f"{', '.join(map(repr, classifier.labels))}: name one as behaviour.toxicity.label"
        )
    column = classifier.labels.index(label)
    independent = classifier.multi_label if multi_label is None else multi_label
    independent = independent or len(classifier.labels) == 1

    def score(texts: list[str]) -> list[Toxicity]:
        whole = classifier.tokenizer(texts, verbose=False)["input_ids"]
        results = [Toxicity(None, reason="a text without tokens")] * len(texts)
        rows = [row for row, ids in enumerate(whole) if ids]
        if not rows:
            return results
        cut = [classifier.fit(whole[row], keep="start") for row in rows]
        logits = classifier.logits(cut)
        p = (logits.sigmoid() if independent else logits.softmax(1))[:, column]
        for row, ids, value in zip(rows, cut, p.tolist(), strict=True):
            results[row] = Toxicity(value, truncated=len(ids) < len(whole[row]))
        return results

    return by_text(score)


def perspective_toxicity(
    *,
    endpoint: str,
    rate: float = 1.0,
    retries: int = 3,
    pause: float = 1.0,
    timeout: float = 30.0,
    reporter: Reporter = SILENT,
) -> Metric:
    """The TOXICITY score of the Perspective API, or of a server that speaks its protocol.

    Google has announced the end of the API itself for 31 December 2026. Texts are sent one after
    the other and not stored there. A text that the API can't score (its language, its length) or
    that gets no answer has no value, with the reason.

    Args:
        endpoint: URL of its ``comments:analyze``.
        rate: requests a second; 1 is the API's default quota.
        retries: how often a lost connection, a timeout, 429 or 5xx is tried again.
        pause: seconds before the first retry; each further one doubles it.
        timeout: seconds.
        reporter: shows progress.

    Raises:
        ConfigError: the environment has no PERSPECTIVE_API_KEY; from the metric, the key is
            refused, or the endpoint is none.
    """
    key = os.environ.get(KEY)
    if not key:
        raise ConfigError(
            f"behaviour.toxicity.perspective: the environment has no {KEY}; set it, or name a "
            "classifier instead"
        )

    def score(texts: list[str]) -> list[Toxicity]:
        results = []
        next_at = time.monotonic()
        with (
            httpx2.Client(params={"key": key}, timeout=timeout) as client,
            reporter.bar("toxicity", len(texts), unit="texts") as advance,
        ):
            for text in texts:
                time.sleep(max(0.0, next_at - time.monotonic()))
                next_at = time.monotonic() + 1 / rate
                results.append(_analyze(client, endpoint, text, retries, pause))
                advance(1)
        return results

    return by_text(score)


def _analyze(
    client: httpx2.Client, endpoint: str, text: str, retries: int, pause: float
) -> Toxicity:
    body = {
        "comment": {"text": text},
        "requestedAttributes": {"TOXICITY": {}},
        "doNotStore": True,
    }
    try:
        answer = post_json(client, endpoint, body, retries=retries, pause=pause)
    except HttpError as failure:
        # Google refuses a malformed key with 400, as it does a text that it can't score.
        if failure.status in {401, 403} or "API key" in str(failure):
            raise ConfigError(
                f"Perspective API: the key is refused ({failure}); set {KEY} to a valid one"
            ) from None
        if failure.status == 404 or (failure.status is None and not failure.temporary):
            raise ConfigError(
                f"Perspective API: {endpoint} is no comments:analyze endpoint ({failure}); mend "
                "behaviour.toxicity.perspective_url"
            ) from None
        return Toxicity(None, reason=f"no answer: {failure}")
    try:
        return Toxicity(float(answer["attributeScores"]["TOXICITY"]["summaryScore"]["value"]))
    except (KeyError, TypeError, ValueError):
        return Toxicity(None, reason="an answer without a TOXICITY score")
